"""The kernel against NumPy: every dtype, length and thread count, and everything one can pass wrongly."""

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
LONG = [SHARED - 1, SHARED, 1_000_003]
LENGTHS = st.one_of(st.integers(0, 300), st.integers(0, 40_000), st.sampled_from(LONG))
DECAYS = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 0.995, 0.9999, 1.0]))


def average_of(policy: np.dtype) -> np.dtype:
    return F64 if policy == F64 else F32


def any_bits(rng, dtype: np.dtype, length: int) -> np.ndarray:
    """Numbers of every size and sign, zeros, subnormals, infinities and NaN among them."""
    return np.frombuffer(rng.bytes(length * dtype.itemsize), dtype).copy()


def ordinary(rng, dtype: np.dtype, length: int) -> np.ndarray:
    values = rng.standard_normal(length) * 10 ** rng.uniform(-3, 3, length)
    return to_bfloat16(values.astype(F32)) if dtype == BF16 else values.astype(dtype)


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


@pytest.mark.parametrize("dtype", POLICIES.values(), ids=POLICIES)
@settings(max_examples=60, deadline=None)
@given(length=LENGTHS, decay=DECAYS, threads=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_update_follows_the_formula_bit_for_bit(dtype, length, decay, threads, seed):
    rng = np.random.default_rng(seed)
    ema, policy = any_bits(rng, average_of(dtype), length), any_bits(rng, dtype, length)
    expected, untouched = expected_update(ema, policy, decay), policy.copy()
    assert update(ema, policy, decay, threads) is None
    assert same_bits(ema, expected)
    assert policy.tobytes() == untouched.tobytes()


@pytest.mark.parametrize("dtype", POLICIES.values(), ids=POLICIES)
@settings(max_examples=60, deadline=None)
@given(length=LENGTHS, decay=DECAYS, threads=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_update_is_within_rounding_of_float64(dtype, length, decay, threads, seed):
    rng = np.random.default_rng(seed)
    ema, policy = ordinary(rng, average_of(dtype), length), ordinary(rng, dtype, length)
    start, end = ema.astype(F64), widen(policy).astype(F64)
    update(ema, policy, decay, threads)
    exact = start + (1 - decay) * (end - start)
    tolerance = 4 * np.finfo(ema.dtype).eps * np.maximum(np.abs(start), np.abs(end))
    assert np.all(np.abs(ema - exact) <= tolerance)


@pytest.mark.parametrize("dtype", POLICIES.values(), ids=POLICIES)
@settings(max_examples=60, deadline=None)
@given(length=LENGTHS, threads=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_reset_restarts_from_the_average(dtype, length, threads, seed):
    rng = np.random.default_rng(seed)
    policy, ema, init = (any_bits(rng, d, length) for d in (dtype, average_of(dtype), average_of(dtype)))
    expected, untouched = narrow(ema, dtype), init.copy()
    assert reset(policy, ema, init, threads) is None
    assert same_bits(policy, expected)
    assert ema.tobytes() == init.tobytes() == untouched.tobytes()


def test_arithmetic_that_needs_no_oracle():
    ema, policy, init = np.zeros(5, F32), np.ones(5, F32), np.full(5, 7, F32)
    update(ema, policy, 0.75)
    assert ema.tolist() == [0.25] * 5
    update(ema, policy, decay=0.25, threads=2)
    assert ema.tolist() == [0.8125] * 5
    reset(policy, ema, init)
    assert (policy.tolist(), ema.tolist(), init.tolist()) == ([0.8125] * 5, [7] * 5, [7] * 5)


@pytest.mark.parametrize("dtype", POLICIES.values(), ids=POLICIES)
def test_decay_zero_and_one_are_exact(dtype):
    rng = np.random.default_rng(0)
    ema, policy = ordinary(rng, average_of(dtype), 1000), ordinary(rng, dtype, 1000)
    start = ema.copy()
    update(ema, policy, 1)
    assert np.array_equal(ema, start)
    update(ema, policy, 0)
    assert np.array_equal(ema, widen(policy))


@pytest.mark.parametrize("dtype", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("length", LONG)
def test_thread_count_leaves_no_trace(dtype, length):
    rng = np.random.default_rng(length)
    start, policy = any_bits(rng, average_of(dtype), length), any_bits(rng, dtype, length)
    results = []
    for threads in (1, 2, 3, 10**6):
        ema, halves = start.copy(), policy.copy()
        update(ema, policy, 0.995, threads)
        averaged = ema.tobytes()
        reset(halves, ema, start, threads)
        results.append((averaged, halves.tobytes()))
    assert all(result == results[0] for result in results)


ROUNDING = [  # float32 bits, bfloat16 bits
    (0x3F800000, 0x3F80),
    (0x3F808000, 0x3F80),  # halfway, lower neighbour even
    (0x3F818000, 0x3F82),  # halfway, upper neighbour even
    (0x3F807FFF, 0x3F80),
    (0x3F808001, 0x3F81),
    (0xBF818000, 0xBF82),
    (0x00000000, 0x0000),
    (0x80000000, 0x8000),
    (0x00000001, 0x0000),  # subnormals
    (0x00008001, 0x0001),
    (0x007FFFFF, 0x0080),
    (0x7F7F7FFF, 0x7F7F),
    (0x7F7F8000, 0x7F80),  # the largest float32 values round to infinity
    (0x7F7FFFFF, 0x7F80),
    (0x7F800000, 0x7F80),
    (0xFF800000, 0xFF80),
]


@pytest.mark.parametrize(("bits", "rounded"), ROUNDING, ids=[hex(bits) for bits, _ in ROUNDING])
def test_bfloat16_rounding(bits, rounded):
    policy, ema = np.zeros(1, BF16), np.array([bits], np.uint32).view(F32)
    reset(policy, ema, np.zeros(1, F32))
    assert hex(policy[0]) == hex(rounded)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["float16", "bfloat16"])
def test_nan_stays_nan(dtype):
    """Even one whose payload lies in the bits that rounding drops, or which a carry would wrap around."""
    ema = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(F32)
    policy = np.zeros(len(ema), dtype)
    reset(policy, ema, np.zeros(len(ema), F32))
    assert np.isnan(widen(policy)).all()


@pytest.mark.parametrize("dtype", POLICIES.values(), ids=POLICIES)
def test_nothing_to_do(dtype):
    policy, ema, init = (np.zeros(0, d) for d in (dtype, average_of(dtype), average_of(dtype)))
    update(ema, policy, 0.5)
    reset(policy, ema, init, 2)


def test_slices_and_subclasses_of_arrays_are_arrays(tmp_path):
    whole = np.zeros(10, F32)
    update(whole[2:5], np.ones(3, F32), 0.5)
    assert whole.tolist() == [0, 0, 0.5, 0.5, 0.5, 0, 0, 0, 0, 0]
    mapped = np.memmap(tmp_path / "ema", F32, "w+", shape=4)
    update(mapped, np.ones(4, F32), 0.5)
    assert mapped.tolist() == [0.5] * 4


def read_only(array):
    array.flags.writeable = False
    return array


def unrelated_view(array):
    """The same memory under another owner, as two `.numpy()` calls on one tensor give it."""
    return np.asarray(SimpleNamespace(__array_interface__=array.__array_interface__))


def ones(length=8, dtype=F32):
    return np.ones(length, dtype)


def shifted():
    return np.zeros(33, np.uint8)[1:].view(F32)


MISUSE_OF_BOTH = {
    "list": (lambda: {"ema": [1.0] * 8}, TypeError, "ema must be a NumPy array, not list"),
    "none": (lambda: {"policy": None}, TypeError, "policy must be a NumPy array, not NoneType"),
    "integers": (lambda: {"policy": ones(8, np.int32)}, TypeError, "policy must be float32, .* not int32"),
    "bool policy": (lambda: {"policy": ones(8, bool)}, TypeError, "policy must be float32, .* not bool"),
    "other endian": (lambda: {"policy": ones(8, F32.newbyteorder())}, TypeError, "policy must .* not [<>]f4"),
    "float64 average": (lambda: {"ema": ones(8, F64)}, TypeError, "ema must be float32 for .* not float64"),
    "half average": (lambda: {"policy": ones(8, F16), "ema": ones(8, F16)}, TypeError, "ema must be float32"),
    "float32 average": (
        lambda: {"policy": ones(8, F64)},
        TypeError,
        "ema must be float64 for a float64 policy",
    ),
    "shorter": (lambda: {"ema": ones(7)}, ValueError, "ema must be as long as policy: 8 elements, not 7"),
    "longer": (lambda: {"ema": ones(9)}, ValueError, "ema must be as long as policy: 8 elements, not 9"),
    "matrix": (lambda: {"ema": ones((2, 4))}, ValueError, "ema must have one dimension, not 2"),
    "scalar": (lambda: {"policy": ones(())}, ValueError, "policy must have one dimension, not 0"),
    "strided": (lambda: {"ema": ones(16)[::2]}, ValueError, "ema must be contiguous"),
    "reversed": (lambda: {"policy": ones()[::-1]}, ValueError, "policy must be contiguous"),
    "broadcast": (lambda: {"policy": np.broadcast_to(F32.type(1), 8)}, ValueError, "policy must be contig"),
    "misaligned": (lambda: {"ema": shifted()}, ValueError, "ema must be contiguous and aligned"),
    "read-only": (lambda: {"ema": read_only(ones())}, ValueError, "ema is changed in place but is read-only"),
    "no threads": (lambda: {"threads": 0}, ValueError, "threads must be at least 1, not 0"),
    "negative threads": (lambda: {"threads": -3}, ValueError, "threads must be at least 1, not -3"),
    "half a thread": (lambda: {"threads": 1.5}, TypeError, "threads"),
}
MISUSE_OF_UPDATE = {
    "decay above": (lambda: {"decay": 1.0000001}, ValueError, "decay must lie between .* not 1.0000001"),
    "decay below": (lambda: {"decay": -0.1}, ValueError, "decay must lie between 0 and 1, not -0.1"),
    "decay NaN": (lambda: {"decay": math.nan}, ValueError, "decay must lie between 0 and 1, not NaN"),
    "decay inf": (lambda: {"decay": math.inf}, ValueError, "decay must lie between 0 and 1, not inf"),
    "decay text": (lambda: {"decay": "0.5"}, TypeError, "decay"),
}
MISUSE_OF_RESET = {
    "read-only policy": (lambda: {"policy": read_only(ones())}, ValueError, "policy is .* but is read-only"),
    "init of other dtype": (lambda: {"init": ones(8, F64)}, TypeError, "init must be float32 for a float32"),
    "init of other length": (lambda: {"init": ones(1)}, ValueError, "init must be as long as policy"),
    "init strided": (lambda: {"init": ones(16)[::2]}, ValueError, "init must be contiguous"),
    "init missing": (lambda: {"init": None}, TypeError, "init must be a NumPy array"),
}
CASES = [(update, name, *case) for name, case in (MISUSE_OF_BOTH | MISUSE_OF_UPDATE).items()]
CASES += [(reset, name, *case) for name, case in (MISUSE_OF_BOTH | MISUSE_OF_RESET).items()]


def snapshot(arguments):
    return [x.tobytes() for x in arguments.values() if isinstance(x, np.ndarray)]


@pytest.mark.parametrize(
    ("function", "wrong", "error", "message"),
    [(function, *case) for function, _, *case in CASES],
    ids=[f"{function.__name__}-{name}" for function, name, *_ in CASES],
)
def test_misuse_raises_and_changes_nothing(function, wrong, error, message):
    arguments = {"ema": np.zeros(8, F32), "policy": ones(), "threads": 1}
    arguments |= {"decay": 0.5} if function is update else {"init": np.full(8, 2, F32)}
    arguments |= wrong()
    before = snapshot(arguments)
    with pytest.raises(error, match=message) as raised:
        function(**arguments)
    assert "\n" not in str(raised.value)
    assert snapshot(arguments) == before


@pytest.mark.parametrize("view", [lambda x: x, unrelated_view], ids=["one-owner", "two-owners"])
@pytest.mark.parametrize("names", ["ema policy", "policy ema", "init ema", "init policy"])
@pytest.mark.parametrize("shift", [0, 1, 7])
def test_shared_memory_raises_and_changes_nothing(view, names, shift):
    memory = np.arange(32, dtype=F32)
    first, second = names.split()
    buffers = {"policy": np.zeros(8, F32), "ema": np.zeros(8, F32), "init": np.zeros(8, F32)}
    buffers |= {first: memory[4:12], second: view(memory)[4 + shift : 12 + shift]}
    before = memory.copy()
    with pytest.raises(ValueError, match="share memory; give each a buffer of its own"):
        reset(**buffers)
    if "init" not in names:
        with pytest.raises(ValueError, match="share memory; give each a buffer of its own"):
            update(buffers["ema"], buffers["policy"], 0.5)
    assert np.array_equal(memory, before)


def test_neighbours_in_one_buffer_are_apart():
    memory = np.arange(12, dtype=F32)
    update(memory[0:4], memory[4:8], 0.0)
    reset(memory[4:8], memory[0:4], memory[8:12])
    assert memory.tolist() == [8, 9, 10, 11, 4, 5, 6, 7, 8, 9, 10, 11]


def test_overlap_of_different_dtypes_is_seen():
    memory = np.zeros(16, F32)
    with pytest.raises(ValueError, match="share memory"):
        update(memory[:8], memory.view(BF16)[15:23], 0.5)


def test_what_is_only_read_may_be_read_only_but_not_be_the_target():
    policy, ema = np.ones(4, F32), np.zeros(4, F32)
    update(ema, read_only(policy), 0.5)
    with pytest.raises(ValueError, match="ema and init share memory"):
        reset(np.ones(4, F32), ema, ema)


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
        at_once(*(lambda view=view: update(view, policy, 0.5, threads) for view in views))
        assert np.all(ema == 1 - 2.0**-n)


def test_two_threads_on_one_array_raise_or_take_turns():
    ema, policy, done = np.zeros(SHARED, F32), np.ones(SHARED, F32), []

    def call():
        try:
            update(ema, policy, 0.5)
            done.append(1)
        except BufferError as error:
            assert "in use by a call on another thread" in str(error)

    for _ in range(10):
        at_once(call, call)
        assert len(done) >= 1 and np.all(ema == 1 - 2.0 ** -len(done))


def test_two_threads_may_read_one_policy():
    averages, policy = [np.zeros(SHARED, F32) for _ in range(2)], np.ones(SHARED, F32)
    for n in range(1, 11):
        at_once(*(lambda ema=ema: update(ema, policy, 0.5, 2) for ema in averages))
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
                update(ema, policy, 0.5)
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
update(ema, policy, 0.5, 2)
child = os.fork()
signal.alarm(20)  # rather die than hang
update(ema, policy, 0.5, 2)
right = bool((ema == 0.75).all())
if child == 0:
    os._exit(0 if right else 1)
assert right and os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="needs fork")
def test_a_forked_process_does_not_wait_for_threads_it_has_not():
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


def test_help_names_the_arguments():
    assert list(inspect.signature(update).parameters) == ["ema", "policy", "decay", "threads"]
    assert list(inspect.signature(reset).parameters) == ["policy", "ema", "init", "threads"]
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
        return pytest.importorskip("torch")

    @pytest.mark.parametrize("name", POLICIES)
    @pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.995, 1.0])
    def test_agrees_with_lerp(self, torch, name, decay):
        torch.manual_seed(0)
        dtype = getattr(torch, name)
        policy = torch.randn(1001).to(dtype)
        ema = torch.randn(1001, dtype=torch.float64 if name == "float64" else torch.float32)
        expected = torch.lerp(ema, policy.to(ema.dtype), 1 - decay)
        update(ema.numpy(), self.numpy(torch, policy), decay)
        torch.testing.assert_close(ema, expected, rtol=0, atol=4 * torch.finfo(ema.dtype).eps * 4)

    @pytest.mark.parametrize("name", POLICIES)
    def test_reset_rounds_as_torch_does(self, torch, name):
        torch.manual_seed(0)
        policy = torch.zeros(1001, dtype=getattr(torch, name))
        ema = torch.randn(1001, dtype=torch.float64 if name == "float64" else torch.float32)
        average, init = ema.clone(), torch.ones_like(ema)
        reset(self.numpy(torch, policy), ema.numpy(), init.numpy())
        assert torch.equal(policy, average.to(policy.dtype)) and torch.equal(ema, init)

    def test_a_tensor_is_told_how_to_become_an_array(self, torch):
        with pytest.raises(TypeError, match=r"not torch.Tensor; .*tensor\.numpy\(\)"):
            update(torch.zeros(3), torch.ones(3), 0.5)

    def test_two_views_of_one_tensor_alias(self, torch):
        tensor = torch.zeros(8)
        with pytest.raises(ValueError, match="share memory"):
            update(tensor.numpy(), tensor.numpy(), 0.5)

    def test_empty_tensors(self, torch):
        update(torch.empty(0).numpy(), torch.empty(0).numpy(), 0.5)

    @staticmethod
    def numpy(torch, tensor):
        return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
