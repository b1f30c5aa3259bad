"""The kernel against NumPy: every dtype, every way to cut parameters, every number of threads, and everything
one can pass wrongly."""

import inspect
import math
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

try:
    from ema_kernel import reset, update
except ImportError as error:
    pytest.skip(f"the extension is not built (pip install .): {error}", allow_module_level=True)

F16, F32, F64, BF16 = np.dtype("float16"), np.dtype("float32"), np.dtype("float64"), np.dtype("uint16")
POLICIES = {"float32": F32, "float64": F64, "float16": F16, "bfloat16": BF16}
SHARED = (1 << 19) + 1  # the shortest buffer that more than one thread works on
LENGTH = st.one_of(st.integers(0, 300), st.integers(0, 40_000), st.sampled_from([SHARED, 1_000_003]))
LENGTHS = st.one_of(
    st.lists(LENGTH, max_size=4),
    st.lists(st.integers(0, 300), max_size=200),
    st.just([SHARED - 1]),
    st.just([1] * 5000 + [600_000]),
)
DECAYS = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 0.995, 0.9999, 1.0]))


def average_of(policy: np.dtype) -> np.dtype:
    return F64 if policy == F64 else F32


def any_bits(rng, dtype: np.dtype, length: int) -> np.ndarray:
    """Numbers of every size and sign, zeros, subnormals, infinities and NaN among them."""
    return np.frombuffer(rng.bytes(length * dtype.itemsize), dtype).copy()


def widen(policy: np.ndarray) -> np.ndarray:
    """The policy in its average's precision."""
    if policy.dtype == BF16:
        return (policy.astype(np.uint32) << 16).view(F32)
    return policy.astype(average_of(policy.dtype))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16's 8 significant bits, in float64 arithmetic and by np.rint: ties to even."""
    exact = values.astype(F64)
    with np.errstate(all="ignore"):
        step = np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - 1, -126) - 7)
        rounded = (np.rint(exact / step) * step).astype(F32)
    return (rounded.view(np.uint32) >> 16).astype(BF16)


def narrow(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):
        return to_bfloat16(values) if dtype == BF16 else values.astype(dtype)


def expected_update(ema: np.ndarray, policy: np.ndarray, decay: float) -> np.ndarray:
    """The formula as documented, one rounding an operation, in the average's precision."""
    real = ema.dtype.type
    weight, end = real(1 - decay), widen(policy)
    with np.errstate(all="ignore"):
        return ema + weight * (end - ema) if weight < 0.5 else end - (end - ema) * (real(1) - weight)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, but that one NaN is as good as another."""
    a, b = (x.view(np.float32) if x.dtype == np.uint32 else x for x in (a, b))
    if a.dtype == BF16:
        a, b = widen(a), widen(b)
    bits = np.dtype(f"uint{8 * a.itemsize}")
    return bool(np.all((a.view(bits) == b.view(bits)) | (np.isnan(a) & np.isnan(b))))


def cut(policy: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """Parameters of these lengths, each with memory of its own."""
    return [part.copy() for part in np.split(policy, np.cumsum(lengths)[:-1])] if lengths else []


@pytest.mark.parametrize("dtype", POLICIES.values(), ids=POLICIES)
@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, decay=DECAYS, threads=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_update_follows_the_formula_bit_for_bit(dtype, lengths, decay, threads, seed):
    rng = np.random.default_rng(seed)
    ema, policy = (any_bits(rng, d, sum(lengths)) for d in (average_of(dtype), dtype))
    expected, policies = expected_update(ema, policy, decay), cut(policy, lengths)
    assert update(ema, policies, decay, threads) is None
    assert same_bits(ema, expected)
    assert b"".join(p.tobytes() for p in policies) == policy.tobytes()


@pytest.mark.parametrize("dtype", POLICIES.values(), ids=POLICIES)
@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, threads=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_reset_restarts_from_the_average(dtype, lengths, threads, seed):
    rng, average = np.random.default_rng(seed), average_of(dtype)
    start = dtype if lengths else average  # without policies the average's dtype is the only one
    policy, ema, init = (any_bits(rng, d, sum(lengths)) for d in (dtype, average, start))
    policies, expected, untouched = cut(policy, lengths), narrow(ema, dtype), init.copy()
    assert reset(policies, ema, init, threads) is None
    assert same_bits(np.concatenate([*policies, policy[:0]]), expected)
    assert same_bits(ema, widen(init)) and init.tobytes() == untouched.tobytes()


def test_arithmetic_that_needs_no_oracle():
    ema, policies, init = np.zeros(5, F32), [np.ones(2, F32), np.ones(3, F32)], np.full(5, 7, F32)
    update(ema, policies, 0.75)
    assert ema.tolist() == [0.25] * 5
    update(ema, tuple(policies), decay=0.25, threads=2)
    assert ema.tolist() == [0.8125] * 5
    reset(policies, ema, init)
    assert [p.tolist() for p in policies] == [[0.8125] * 2, [0.8125] * 3]
    assert (ema.tolist(), init.tolist()) == ([7] * 5, [7] * 5)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["float16", "bfloat16"])
def test_nan_stays_nan(dtype):
    """Even one whose payload lies in the bits that rounding drops, or which a carry would wrap around."""
    ema = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(F32)
    policy = np.zeros(len(ema), dtype)
    reset([policy], ema, np.zeros(len(ema), dtype))
    assert np.isnan(widen(policy)).all()


def test_slices_and_subclasses_of_arrays_are_arrays(tmp_path):
    whole, mapped = np.zeros(10, F32), np.memmap(tmp_path / "ema", F32, "w+", shape=4)
    update(whole[2:5], [np.ones(3, F32)], 0.5)
    assert whole.tolist() == [0, 0, 0.5, 0.5, 0.5, 0, 0, 0, 0, 0]
    reset([mapped[:1], mapped[1:]], np.ones(4, F32), np.zeros(4, F32))
    assert mapped.tolist() == [1] * 4


def read_only(array):
    array.flags.writeable = False
    return array


def unrelated_view(array):
    """The same memory under another owner, as two `.numpy()` calls on one tensor give it."""
    return np.asarray(SimpleNamespace(__array_interface__=array.__array_interface__))


def ones(length=8, dtype=F32):
    return np.ones(length, dtype)


def pair(second, first=F32):
    """Two policies, the second of which is wrong."""
    return {"policies": [ones(4, first), second]}


def shifted():
    return np.zeros(17, np.uint8)[1:].view(F32)


MISUSE_OF_BOTH = {
    "array for list": (lambda: {"policies": ones()}, TypeError, "policies must be a list of NumPy arrays"),
    "list for array": (lambda: {"ema": [1.0] * 8}, TypeError, "ema must be a NumPy array, not list"),
    "none": (lambda: pair(None), TypeError, r"policies\[1\] must be a NumPy array, not NoneType"),
    "integers": (
        lambda: {"policies": [ones(8, np.int32)]},
        TypeError,
        r"policies\[0\] must be float32, .*int32",
    ),
    "two dtypes": (
        lambda: pair(ones(4, F16)),
        TypeError,
        r"policies\[1\] must be float32 as policies\[0\] is, not",
    ),
    "other endian": (
        lambda: pair(ones(4, F32.newbyteorder())),
        TypeError,
        r"policies\[1\] must .* not [<>]f4",
    ),
    "float64 average": (lambda: {"ema": ones(8, F64)}, TypeError, "ema must be float32 for .* not float64"),
    "half average": (
        lambda: pair(ones(4, F16), F16) | {"ema": ones(8, F16)},
        TypeError,
        "ema must be float32",
    ),
    "float32 average": (
        lambda: pair(ones(4, F64), F64),
        TypeError,
        "ema must be float64 for float64 policies",
    ),
    "shorter": (lambda: {"ema": ones(7)}, ValueError, "ema must be as long as .*: 8 elements, not 7"),
    "longer": (lambda: {"ema": ones(9)}, ValueError, "ema must be as long as .*: 8 elements, not 9"),
    "nothing": (lambda: {"policies": []}, ValueError, "ema must be as long as .*: 0 elements, not 8"),
    "matrix": (lambda: {"ema": ones((2, 4))}, ValueError, "ema must have one dimension, not 2"),
    "scalar": (lambda: pair(ones(())), ValueError, r"policies\[1\] must have one dimension, not 0"),
    "strided": (lambda: {"ema": ones(16)[::2]}, ValueError, "ema must be contiguous"),
    "reversed": (lambda: pair(ones(4)[::-1]), ValueError, r"policies\[1\] must be contiguous"),
    "misaligned": (lambda: pair(shifted()), ValueError, r"policies\[1\] must be contiguous and aligned"),
    "read-only": (lambda: {"ema": read_only(ones())}, ValueError, "ema is changed in place but is read-only"),
    "no threads": (lambda: {"threads": 0}, ValueError, "threads must be at least 1, not 0"),
    "negative threads": (lambda: {"threads": -3}, ValueError, "threads must be at least 1, not -3"),
}
MISUSE_OF_UPDATE = {
    "decay above": (lambda: {"decay": 1.0000001}, ValueError, "decay must lie between .* not 1.0000001"),
    "decay below": (lambda: {"decay": -0.1}, ValueError, "decay must lie between 0 and 1, not -0.1"),
    "decay NaN": (lambda: {"decay": math.nan}, ValueError, "decay must lie between 0 and 1, not NaN"),
}
MISUSE_OF_RESET = {
    "read-only policy": (
        lambda: pair(read_only(ones(4))),
        ValueError,
        r"policies\[1\] is .* but is read-only",
    ),
    "init of other dtype": (lambda: {"init": ones(8, F64)}, TypeError, "init must be float32 for float32"),
    "init of the average's dtype": (
        lambda: {"policies": [ones(8, F16)]},
        TypeError,
        "init must be float16 for float16 policies, not float32",
    ),
    "init of other length": (lambda: {"init": ones(1)}, ValueError, "init must be as long as all policies"),
    "init strided": (lambda: {"init": ones(16)[::2]}, ValueError, "init must be contiguous"),
    "init missing": (lambda: {"init": None}, TypeError, "init must be a NumPy array"),
}
CASES = [(update, name, *case) for name, case in (MISUSE_OF_BOTH | MISUSE_OF_UPDATE).items()]
CASES += [(reset, name, *case) for name, case in (MISUSE_OF_BOTH | MISUSE_OF_RESET).items()]


def snapshot(arguments):
    arrays = [*arguments["policies"], arguments["ema"], arguments.get("init")]
    return [x.tobytes() for x in arrays if isinstance(x, np.ndarray)]


@pytest.mark.parametrize(
    ("function", "wrong", "error", "message"),
    [(function, *case) for function, _, *case in CASES],
    ids=[f"{function.__name__}-{name}" for function, name, *_ in CASES],
)
def test_misuse_raises_and_changes_nothing(function, wrong, error, message):
    arguments = {"ema": np.zeros(8, F32), "policies": [ones(4), ones(4)], "threads": 1}
    arguments |= {"decay": 0.5} if function is update else {"init": np.full(8, 2, F32)}
    arguments |= wrong()
    before = snapshot(arguments)
    with pytest.raises(error, match=message) as raised:
        function(**arguments)
    assert "\n" not in str(raised.value)
    assert snapshot(arguments) == before


PLACES = {"ema": (0, 8), "init": (16, 24), "policies[0]": (32, 36), "policies[1]": (44, 48)}
OVERLAPS = [  # where the first then starts: it covers the second, or touches its first or last element
    ("ema", "init", [16, 9, 23]),
    ("ema", "policies[1]", [44, 37, 47]),
    ("init", "policies[0]", [32, 25, 35]),
    ("policies[0]", "policies[1]", [44, 41, 47]),
]


@pytest.mark.parametrize("view", [lambda x: x, unrelated_view], ids=["one-owner", "two-owners"])
@pytest.mark.parametrize(
    ("first", "second", "start"), [(a, b, start) for a, b, starts in OVERLAPS for start in starts]
)
def test_shared_memory_raises_and_changes_nothing(view, first, second, start):
    memory, (a, b) = np.arange(64, dtype=F32), PLACES[first]
    places = PLACES | {first: (start, start + b - a)}
    names = {name: view(memory)[a:b] for name, (a, b) in places.items()}
    policies = [names["policies[0]"], names["policies[1]"]]
    message = re.escape(f"{first} and {second} share memory; give each an array of its own")
    with pytest.raises(ValueError, match=message):
        reset(policies, names["ema"], names["init"])
    if first == "ema" and second != "init":
        with pytest.raises(ValueError, match=message):
            update(names["ema"], policies, 0.5)
    assert np.array_equal(memory, np.arange(64))


def test_neighbours_in_one_array_are_apart():
    memory = np.arange(16, dtype=F32)
    policies = [memory[4:7], memory[7:8], memory[2:2]]
    update(memory[0:4], policies, 0.0)
    reset(policies, memory[0:4], memory[8:12])
    assert memory.tolist() == [8, 9, 10, 11, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]


def test_what_is_only_read_may_be_read_only_and_may_overlap():
    ema, policy = np.zeros(9, F32), read_only(np.arange(5, dtype=F32))
    update(ema, [policy, policy[1:]], 0.5)
    assert ema.tolist() == [0, 0.5, 1, 1.5, 2, 0.5, 1, 1.5, 2]


def at_once(*calls):
    """Run each call in a thread of its own, all starting together; what a thread raises is raised here."""
    start, errors = threading.Barrier(len(calls)), []

    def run(call):
        start.wait()
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_two_owners_of_one_average_take_turns(threads):
    """In any order, n updates towards 1 with decay 1/2 give 1 - 2^-n exactly; torn ones do not."""
    ema, policy = np.zeros(SHARED, F32), np.ones(SHARED, F32)
    views = [ema, unrelated_view(ema)]
    for n in range(2, 22, 2):
        at_once(*(lambda view=view: update(view, [policy], 0.5, threads) for view in views))
        assert np.all(ema == 1 - 2.0**-n)


def test_two_threads_on_one_array_raise_or_take_turns():
    ema, policy, done = np.zeros(SHARED, F32), np.ones(SHARED, F32), []

    def call():
        try:
            update(ema, [policy], 0.5)
            done.append(1)
        except BufferError as error:
            assert "ema is in use by a call on another thread" in str(error)

    for _ in range(10):
        at_once(call, call)
        assert len(done) >= 1 and np.all(ema == 1 - 2.0 ** -len(done))


def test_two_threads_may_read_one_policy():
    averages, policy = [np.zeros(SHARED, F32) for _ in range(2)], np.ones(SHARED, F32)
    for n in range(1, 11):
        at_once(*(lambda ema=ema: update(ema, [policy], 0.5, 2) for ema in averages))
        assert all(np.all(ema == 1 - 2.0**-n) for ema in averages)


def test_the_gil_is_released():
    """Without forced switches, this thread sees the call unfinished only if the call let go of the GIL."""
    ema, policy, interval = np.zeros(4_000_000, F32), np.ones(4_000_000, F32), sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        for _ in range(50):
            started, finished = threading.Event(), threading.Event()

            def call(started=started, finished=finished):
                started.set()
                update(ema, [policy], 0.5)
                finished.set()

            thread = threading.Thread(target=call)
            thread.start()
            started.wait()
            seen_unfinished = not finished.is_set()
            thread.join()
            if seen_unfinished:
                return
    finally:
        sys.setswitchinterval(interval)
    pytest.fail("no other thread ran during 50 updates")


FORK = """
import os, signal, warnings
import numpy as np
from ema_kernel import update
warnings.simplefilter("ignore")
ema, policy = np.zeros(1_000_000, "float32"), np.ones(1_000_000, "float32")
update(ema, [policy], 0.5, 2)
child = os.fork()
signal.alarm(300)  # rather die than hang
update(ema, [policy], 0.5, 2)
right = bool((ema == 0.75).all())
if child == 0:
    os._exit(0 if right else 1)
assert right and os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="needs fork")
def test_a_forked_process_does_not_wait_for_threads_it_has_not():
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=600)


def test_help_names_the_arguments():
    assert list(inspect.signature(update).parameters) == ["ema", "policies", "decay", "threads"]
    assert list(inspect.signature(reset).parameters) == ["policies", "ema", "init", "threads"]
    assert "in place" in update.__doc__ and "in place" in reset.__doc__


def test_the_example_in_the_readme_runs():
    readme = Path(__file__).parents[1] / "ema_kernel" / "README.md"
    examples = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, str(readme), "exec"), {})


class TestWithTorch:
    @pytest.fixture
    def torch(self):
        torch = pytest.importorskip("torch")
        torch.manual_seed(0)
        return torch

    @pytest.mark.parametrize("name", POLICIES)
    @pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.995, 1.0])
    def test_agrees_with_lerp(self, torch, name, decay):
        policies = [torch.randn(n).to(getattr(torch, name)) for n in (600, 1, 400)]
        ema = torch.randn(1001, dtype=torch.float64 if name == "float64" else torch.float32)
        expected = torch.lerp(ema, torch.cat(policies).to(ema.dtype), 1 - decay)
        update(ema.numpy(), self.numpy(torch, policies), decay)
        torch.testing.assert_close(ema, expected, rtol=0, atol=16 * torch.finfo(ema.dtype).eps)

    @pytest.mark.parametrize("name", POLICIES)
    def test_reset_rounds_as_torch_does(self, torch, name):
        policies = [torch.zeros(n, dtype=getattr(torch, name)) for n in (600, 1, 400)]
        ema = torch.randn(1001, dtype=torch.float64 if name == "float64" else torch.float32)
        average, init = ema.clone(), torch.randn(1001).to(policies[0].dtype)
        (start,) = self.numpy(torch, [init])
        reset(self.numpy(torch, policies), ema.numpy(), start)
        assert torch.equal(torch.cat(policies), average.to(init.dtype))
        assert torch.equal(ema, init.to(ema.dtype))

    def test_a_tensor_is_told_how_to_become_an_array(self, torch):
        with pytest.raises(TypeError, match=r"policies\[0\] .* not torch.Tensor; .*tensor\.numpy\(\)"):
            update(torch.zeros(3).numpy(), [torch.ones(3)], 0.5)

    def test_two_views_of_one_tensor_alias(self, torch):
        tensor = torch.zeros(8)
        with pytest.raises(ValueError, match=r"ema and policies\[0\] share memory"):
            update(tensor.numpy(), [tensor.numpy()], 0.5)

    @staticmethod
    def numpy(torch, tensors):
        return [(t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy() for t in tensors]
