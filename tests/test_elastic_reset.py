"""Section 1: the average and the reset."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import elastic_reset
from elastic_reset import RESET_RULES, ElasticReset

needs_kernel = pytest.mark.skipif(elastic_reset.ema_kernel is None, reason="ema_kernel is not built")


def stage(monkeypatch, nbytes=64):
    """Let averages be kept as those of a policy on a GPU with device="cpu", also where it is on the CPU."""
    monkeypatch.setattr(elastic_reset, "lies_elsewhere", lambda p, device: True)
    monkeypatch.setattr(elastic_reset, "STAGING_BYTES", nbytes)


@pytest.fixture(
    params=[pytest.param("rust", marks=needs_kernel), pytest.param("staged", marks=needs_kernel), "foreach"]
)
def backend(request, monkeypatch):
    if request.param == "foreach":
        monkeypatch.setattr(elastic_reset, "ema_kernel", None)
    if request.param == "staged":
        stage(monkeypatch)
    return request.param.replace("staged", "rust")


def filled(module, value):
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)
    return module


def values_of(tensors):
    return {float(x) for t in tensors for x in t.detach().reshape(-1)}


def flat(tensors):
    return np.concatenate([t.detach().numpy().ravel().astype(np.float64) for t in tensors])


@pytest.mark.parametrize("rule", RESET_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rule_against_numpy_over_random_schedules(backend, rule, dtype):
    rng = np.random.default_rng(0)
    for _ in range(20):
        decay, every = float(rng.uniform(0, 1)), int(rng.integers(1, 5))
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)).to(dtype)
        policy = flat(model.parameters())
        ema, init, resets = policy.copy(), policy.copy(), 0
        elastic = ElasticReset(model, decay, every, reset=rule)
        for step in range(1, 13):
            change = rng.normal(size=policy.shape)
            ends = np.cumsum([p.numel() for p in model.parameters()])[:-1]
            with torch.no_grad():
                for p, c in zip(model.parameters(), np.split(change, ends), strict=True):
                    p += torch.tensor(c, dtype=dtype).view(p.shape)
            policy = policy + change
            ema = decay * ema + (1 - decay) * policy
            due = step % every == 0 and rule != "none"
            resets += due
            if due and rule == "elastic":
                policy, ema = ema.copy(), init.copy()
            if due and rule == "ema":
                policy = ema.copy()
            if due and rule == "init":
                policy = init.copy()
            assert elastic.step() is due
        near = 1e-5 if dtype == torch.float32 else 1e-12
        np.testing.assert_allclose(flat(model.parameters()), policy, near, near)
        np.testing.assert_allclose(flat(elastic.ema), ema, near, near)
        np.testing.assert_array_equal(flat(elastic.init), init)
        assert (elastic.backend, elastic.updates, elastic.resets) == (backend, 12, resets)


def test_tied_weights_once_frozen_ones_and_buffers_never(backend):
    model = nn.ModuleDict(dict(a=nn.Linear(2, 2), b=nn.Linear(2, 2), norm=nn.BatchNorm1d(2)))
    model.b.weight = model.a.weight
    model.b.bias.requires_grad_(False)
    elastic = ElasticReset(model)
    assert elastic.names == ["a.weight", "a.bias", "norm.weight", "norm.bias"]
    kept = model.b.bias, model.norm.running_mean
    with torch.no_grad():
        for tensor in (*model.parameters(), model.norm.running_mean):
            tensor.add_(1)
    expected = [tensor.clone() for tensor in kept]
    elastic.reset()
    assert all(map(torch.equal, kept, expected)) and model.b.weight is model.a.weight
    assert all(map(torch.equal, elastic.params, elastic.init))
    assert ElasticReset([model.a.weight, model.b.weight]).names == ["0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_policy_has_a_float32_average(backend, dtype):
    model = filled(nn.Linear(8, 8), 1.0).to(dtype)
    elastic = ElasticReset(model, decay=0.995)
    filled(model, 1.125)
    for _ in range(100):
        elastic.update()
    expected = 1.125 - 0.125 * 0.995**100
    assert {average.dtype for average in elastic.ema} == {torch.float32}
    assert {start.dtype for start in elastic.init} == {dtype}
    assert values_of(elastic.ema).pop() == pytest.approx(expected, rel=1e-5)  # a bfloat16 average stays at 1
    elastic.reset()
    assert values_of(model.parameters()) == {float(torch.tensor(expected).to(dtype))}


def test_mixed_dtypes(backend):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).to(torch.bfloat16), nn.Linear(3, 3).double())
    elastic = ElasticReset(model, decay=0.5)
    expected = [0.5 * ema + 2.0 for ema in elastic.ema]
    filled(model, 4.0)
    elastic.update()
    torch.testing.assert_close(elastic.ema, expected)
    assert [ema.dtype for ema in elastic.ema[::2]] == [torch.float32, torch.float32, torch.float64]
    elastic.reset()
    for p, ema in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), ema.to(p.dtype))


def half_and_back(model):
    model.bfloat16().float()


def given_other_memory(model):
    model.weight.data = model.weight.data.clone()


@pytest.mark.parametrize("move", [nn.Module.double, half_and_back, given_other_memory])
def test_averages_follow_the_parameters(backend, move):
    model = filled(nn.Linear(3, 2), 1.0)
    elastic = ElasticReset(model, decay=0.5)
    filled(model, 3.0)
    move(model)
    elastic.update()
    assert values_of(elastic.ema) == {2.0} and elastic.ema[0].dtype == model.weight.dtype
    elastic.reset()
    assert values_of(model.parameters()) == {2.0} and values_of(elastic.ema) == {1.0}
    filled(model, 5.0)
    move(model)
    with elastic.averaged():
        assert values_of(model.parameters()) == {1.0}
    assert values_of(model.parameters()) == {5.0} and elastic.backend == backend


def test_averaged_puts_everything_back(backend):
    model = filled(nn.Linear(3, 2), 1.0)
    elastic = ElasticReset(model, decay=0.5)
    filled(model, 3.0)
    elastic.update()
    with pytest.raises(RuntimeError, match="inside"), elastic.averaged():
        assert values_of(model.parameters()) == {2.0}
        filled(model, 9.0)
        raise RuntimeError("inside")
    assert values_of(model.parameters()) == {3.0} and values_of(elastic.ema) == {2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averaged_with_a_share_of_the_start(backend, dtype):
    model = nn.Linear(3, 2).to(dtype)
    elastic = ElasticReset(model, decay=0.5)
    start = [p.detach().clone() for p in model.parameters()]
    filled(model, 3.0)
    elastic.update()
    for share in (0.0, 0.3, 1.0):
        with elastic.averaged(start=share):
            for p, init, ema in zip(model.parameters(), start, elastic.ema, strict=True):
                mixed = (1 - share) * ema + share * init.float()
                # Formulas that differ in float32's last bit can round to neighbours in bfloat16.
                unit = max(1e-6, torch.finfo(dtype).eps)
                torch.testing.assert_close(p.detach(), mixed.to(dtype), rtol=unit, atol=0)
        assert values_of(model.parameters()) == {3.0}
    with elastic.averaged(start=1.0):
        assert all(map(torch.equal, model.parameters(), start))
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="expected a share from 0 to 1"):
            elastic.averaged(start=wrong)


def random_model(rng):
    """Some parameters of random dtypes and shapes, among them empty, transposed and large ones."""
    params = []
    for _ in range(rng.integers(1, 8)):
        dtype = [torch.float32, torch.bfloat16, torch.float16, torch.float64][rng.integers(4)]
        shape = tuple(int(n) for n in rng.integers(0, 9, size=rng.integers(0, 4)))
        values = torch.tensor(rng.normal(size=shape), dtype=dtype)
        params.append(nn.Parameter(values.t() if values.dim() == 2 and rng.random() < 0.5 else values))
    return params


@needs_kernel
def test_direct_staged_and_foreach_agree_over_random_models(monkeypatch):
    """An update to one unit in the last place, a reset exactly; staged and direct to the bit."""
    for seed in range(200):
        weights = {}
        kernels = set()
        for way in ("direct", "staged", "foreach"):
            with monkeypatch.context() as patch:
                if way == "staged":
                    stage(patch, nbytes=int(np.random.default_rng(seed).integers(1, 200)))
                if way == "foreach":
                    patch.setattr(elastic_reset, "ema_kernel", None)
                rng = np.random.default_rng(seed)
                params = random_model(rng)
                elastic = ElasticReset(params, decay=float(rng.random()), reset_every=3)
                if elastic.backend == "rust":  # not so direct, where a parameter is not contiguous
                    kernels.add(way)
                for _ in range(2):
                    with torch.no_grad():
                        for p in params:
                            p += torch.tensor(rng.normal(size=p.shape), dtype=p.dtype)
                    elastic.update()
                averages = [ema.clone() for ema in elastic.ema]
                expected = [ema.to(p.dtype) for ema, p in zip(averages, params, strict=True)]
                starts = [init.to(ema.dtype) for init, ema in zip(elastic.init, averages, strict=True)]
                elastic.reset()
                assert all(map(torch.equal, params, expected)) and all(map(torch.equal, elastic.ema, starts))
                weights[way] = averages
        assert "staged" in kernels
        if "direct" in kernels:
            assert all(map(torch.equal, weights["direct"], weights["staged"]))
        for ours, torchs in zip(weights["staged"], weights["foreach"], strict=True):
            torch.testing.assert_close(ours, torchs, rtol=4 * torch.finfo(ours.dtype).eps, atol=1e-6)


def test_a_pickle_is_no_longer_than_what_it_holds():
    model = [nn.Parameter(torch.ones(1000)) for _ in range(40)]
    assert len(pickle.dumps(ElasticReset(model))) < 2 * len(pickle.dumps([p.data for p in model])) * 3


def test_buffers_are_on_the_cpu_wherever_new_tensors_go(monkeypatch):
    stage(monkeypatch)
    model = filled(nn.Linear(3, 2), 1.0)
    with torch.device("meta"):
        elastic = ElasticReset(model, decay=0.5, device="cpu")
    filled(model, 3.0)
    elastic.update()
    assert values_of(elastic.ema) == {2.0}


def test_parts_fit_into_the_buffers(monkeypatch):
    """Of parameters of 4, 8, 4, 12 and 100 bytes, with buffers of 16: (4, 8, 4), (12), (100)."""
    stage(monkeypatch, nbytes=16)
    model = [nn.Parameter(torch.ones(n)) for n in (1, 2, 1, 3, 25)]
    elastic = ElasticReset(model)
    assert [[place for place, _ in staged] for staged in elastic._staged] == [[0, 1, 2], [3], [4]]
    buffers = {view.untyped_storage().data_ptr() for staged in elastic._staged for _, view in staged}
    assert len(buffers) == 2
    assert {view.untyped_storage().nbytes() for staged in elastic._staged for _, view in staged} == {100}


def test_a_start_that_was_saved_in_float32_is_loaded(backend):
    """As earlier versions did for 16-bit policies. It may be one that the policy's dtype cannot hold."""
    model = nn.Linear(3, 2).bfloat16()
    elastic = ElasticReset(model)
    state = {name: tensor.clone() for name, tensor in elastic.state_dict().items()}
    old = state | {name: tensor.float() for name, tensor in state.items() if name.startswith("init.")}
    filled(model, 2.0)
    elastic.update()
    elastic.load_state_dict(old)
    torch.testing.assert_close(elastic.state_dict(), state, rtol=0, atol=0)
    old["init.bias"] = old["init.bias"] + 1e-6
    with pytest.raises(ValueError, match="init.bias has another shape or dtype"):
        elastic.load_state_dict(old)


def test_a_policy_that_is_cast_while_averaged_gets_its_own_weights_back(backend):
    model = filled(nn.Linear(3, 2), 1.0)
    elastic = ElasticReset(model, decay=0.5)
    filled(model, 3.0)
    elastic.update()
    with elastic.averaged():
        assert values_of(model.to(torch.bfloat16).parameters()) == {2.0}
    assert values_of(model.parameters()) == {3.0} and values_of(elastic.ema) == {2.0}


def test_looking_in_inference_mode(backend):
    """What averaged() is made for must not leave averages that can no longer be updated."""
    model = filled(nn.Linear(2, 2), 1.0)
    elastic = ElasticReset(model, decay=0.5)
    model.double()
    with torch.inference_mode(), elastic.averaged():
        model(torch.ones(1, 2, dtype=torch.float64))
    model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    filled(model, 3.0)
    elastic.update()
    assert values_of(elastic.ema) == {2.0}


def test_state_dict_through_safetensors(backend, tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    model[0].weight.data = torch.randn(4, 3).t()  # not contiguous
    elastic, start = ElasticReset(model, decay=0.9, reset_every=3), copy.deepcopy(model)
    for _ in range(4):
        filled(model, 2.0)
        elastic.step()
    save_file(elastic.state_dict(), tmp_path / "elastic.safetensors")
    other = ElasticReset(start, decay=0.9, reset_every=3)
    other.load_state_dict(load_file(tmp_path / "elastic.safetensors"))
    assert (other.updates, other.resets) == (4, 1)
    filled(start, 2.0)
    for _ in range(2):
        assert elastic.step() == other.step()
    assert elastic.resets == other.resets == 2
    assert all(map(torch.equal, model.parameters(), start.parameters()))


def test_state_of_another_policy_changes_nothing(backend):
    model, other = nn.Linear(2, 2), nn.Linear(3, 2)
    elastic = ElasticReset(model)
    good = {name: torch.full_like(tensor, 7) for name, tensor in elastic.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in elastic.state_dict().items()}
    wrong = [ElasticReset(other).state_dict(), {}, good | {"extra": torch.zeros(1)}]
    wrong += [
        good | {"updates": torch.tensor(3.0)},
        good | {"updates": 3},
        good | {"init.bias": torch.zeros(2, 1)},
    ]
    wrong.append({name: tensor for name, tensor in good.items() if name != "init.bias"})
    for state in wrong:
        with pytest.raises(ValueError, match="not this policy's state"):
            elastic.load_state_dict(state)
    torch.testing.assert_close(elastic.state_dict(), before, rtol=0, atol=0)
    elastic.load_state_dict(good)
    torch.testing.assert_close(elastic.state_dict(), good, rtol=0, atol=0)


def test_unusable_arguments():
    model = nn.Linear(2, 2)
    for error, arguments in {
        "decay is 1.5": dict(decay=1.5),
        "decay is nan": dict(decay=float("nan")),
        "reset_every is 0": dict(reset_every=0),
        "reset_every is 2.5": dict(reset_every=2.5),
        "one of elastic, ema, init, none": dict(reset="both"),
        "device is 'cuda'; expected 'cpu' or None": dict(device="cuda"),
    }.items():
        with pytest.raises(ValueError, match=error):
            ElasticReset(model, **arguments)
    with pytest.raises(ValueError, match="nothing to average"):
        ElasticReset(nn.Linear(2, 2).requires_grad_(False))


# Parameters stay where they are, and what others do with them is as without ElasticReset.


def test_parameters_are_never_moved(backend):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5).bfloat16())

    def places():
        owned = [(p.data_ptr(), p.untyped_storage().data_ptr(), p.untyped_storage().nbytes()) for p in params]
        return owned, [id(p) for p in model.parameters()]

    params = list(model.parameters())
    before = places()
    elastic = ElasticReset(model, reset_every=1)
    elastic.step()
    elastic.load_state_dict(elastic.state_dict())
    with elastic.averaged():
        assert places() == before
    assert places() == before and elastic.resets == 1 and elastic.backend == backend


@needs_kernel
def test_one_call_of_the_kernel_a_dtype_with_the_parameters_own_arrays(monkeypatch):
    calls, kernel = [], elastic_reset.ema_kernel

    def update(ema, policies, decay, threads):
        calls.append((policies, [ema]))
        kernel.update(ema, policies, decay, threads)

    def reset(policies, ema, init, threads):
        calls.append((policies, [ema, init]))
        kernel.reset(policies, ema, init, threads)

    monkeypatch.setattr(elastic_reset, "ema_kernel", SimpleNamespace(update=update, reset=reset))
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5).bfloat16(), nn.Linear(2, 2))
    elastic = ElasticReset(model, reset_every=1)
    elastic.step()
    floats, halves = [elastic.params[i] for i in (0, 1, 4, 5)], elastic.params[2:4]
    assert len(calls) == 4
    for (policies, averages), params in zip(calls, [floats, halves] * 2, strict=True):
        found = [(array.__array_interface__["data"][0], array.size) for array in policies]
        assert found == [(p.data_ptr(), p.numel()) for p in params]
        assert all(a.shape == (sum(p.numel() for p in params),) for a in averages)
        assert averages[0].dtype == np.float32
    update_of_floats, reset_of_floats = calls[0][1], calls[2][1]
    for array, lists in ((update_of_floats[0], elastic.ema), (reset_of_floats[1], elastic.init)):
        assert array.__array_interface__["data"][0] == lists[0].data_ptr()


def on_one_memory():
    memory = torch.zeros(6)
    return [nn.Parameter(memory[:4]), nn.Parameter(memory[2:])]


def transposed():
    return [nn.Parameter(torch.zeros(3, 2).t())]


def complex_numbers():
    return [nn.Parameter(torch.zeros(3, dtype=torch.complex64))]


def shifted():
    """Off a float's place, as in a file that is mapped into memory."""
    return [nn.Parameter(torch.frombuffer(bytearray(14), dtype=torch.float32, offset=2))]


@pytest.mark.parametrize("parameters", [on_one_memory, transposed, complex_numbers, shifted])
def test_what_the_kernel_does_not_take_goes_torchs_way(parameters):
    params = parameters()
    places = [(p.data_ptr(), p.stride()) for p in params]
    elastic = ElasticReset(params, decay=0.5, reset_every=1)
    with torch.no_grad():
        for p in params:
            p.fill_(2.0)
    assert elastic.step() and elastic.backend == "foreach"
    assert all((p == 1).all() for p in params) and all((ema == 0).all() for ema in elastic.ema)
    assert places == [(p.data_ptr(), p.stride()) for p in params]


@needs_kernel
def test_memory_shared_between_processes_stays_shared():
    model = filled(nn.Linear(2, 2), 1.0).share_memory()
    elastic = ElasticReset(model, decay=0.5, reset_every=1)
    assert elastic.step() and elastic.backend == "rust" and model.weight.is_shared()


def train(model, step, forward=None):
    """Steps of a fused optimizer; its moments live through the resets that `step` makes."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(6):
        x, y = torch.randn(16, 4), torch.randn(16, 1)
        ((forward or model)(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        step()


def by_hand(model):
    """Elastic Reset as the paper writes it, for a model that this file does not touch otherwise."""
    params, n = list(model.parameters()), 0
    init = [p.detach().clone() for p in params]
    ema = [i.clone() for i in init]

    @torch.no_grad()
    def step():
        nonlocal n
        n += 1
        for i, p in enumerate(params):
            ema[i] = 0.8 * ema[i] + 0.2 * p
            if n % 3 == 0:
                p.copy_(ema[i])
                ema[i] = init[i].clone()

    return step


def plain(model):
    return model


def compiled(model):
    return torch.compile(model, backend="aot_eager")


def checkpointed(model):
    from torch.utils.checkpoint import checkpoint

    return lambda x: checkpoint(model, x, use_reentrant=False)


@pytest.mark.parametrize("wrap", [plain, compiled, checkpointed])
def test_training_is_that_of_a_loop_without_it(backend, wrap):
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    two = copy.deepcopy(one)
    elastic = ElasticReset(one, 0.8, 3)
    train(one, elastic.step, wrap(one))
    train(two, by_hand(two), wrap(two))
    assert elastic.resets == 2
    torch.testing.assert_close(dict(one.named_parameters()), dict(two.named_parameters()))


def test_a_model_is_saved_as_without_it(backend, tmp_path):
    from accelerate import Accelerator
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1)
    model, accelerator = GPT2LMHeadModel(GPT2Config(**shape)), Accelerator(cpu=True)
    accelerator.prepare_model(model)

    def saved(folder):
        folder.mkdir()
        model.save_pretrained(folder / "pretrained")
        save_model(model, folder / "all.safetensors")
        torch.save(model.state_dict(), folder / "state.pt")
        torch.save(model.transformer.ln_f.bias.detach(), folder / "bias.pt")  # no memory but its own
        accelerator.save_state(folder / "accelerate", safe_serialization=True)
        files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".pt")]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    before = saved(tmp_path / "without")
    elastic = ElasticReset(model, decay=1.0)
    elastic.step()
    assert saved(tmp_path / "with") == before and len(before) == 5
    filled(model, 9.0)
    accelerator.load_state(tmp_path / "with" / "accelerate")
    assert all(map(torch.equal, elastic.params, elastic.init)) and elastic.backend == backend


def test_a_copy_of_both_is_of_its_own(backend):
    model = filled(nn.Linear(3, 2), 1.0)
    elastic = ElasticReset(model, decay=0.5)
    twin, twins = copy.deepcopy((model, elastic))
    filled(twin, 3.0)
    twins.update()
    twins.reset()
    assert values_of(twin.parameters()) == {2.0} and values_of(twins.ema) == {1.0}
    filled(model, 5.0)
    elastic.update()
    assert values_of(elastic.ema) == {3.0} and values_of(model.parameters()) == {5.0}
    assert values_of(twin.parameters()) == {2.0} and elastic.backend == twins.backend == backend


def by_deepcopy(pair):
    twins = copy.deepcopy(pair)
    return lambda: copy.deepcopy(twins)


def by_pickle(pair):
    text = pickle.dumps(pair)
    return lambda: pickle.loads(text)


def by_torch(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    return lambda: torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def all_are(tensors, value):
    return all(bool((t == value).all()) for t in tensors)


@pytest.mark.parametrize("memory", ["free", "the same"])
@pytest.mark.parametrize("kept", [by_deepcopy, by_pickle, by_torch])
def test_a_copy_outlives_what_it_was_made_of(kept, memory, backend):
    """The originals' memory is free, so that the copy's parameters may come to lie just where those did."""
    for size in (1, 16, 100, 5000, 30_000):
        model = filled(nn.Sequential(nn.Linear(size, 1), nn.Linear(1, size)), 1.0)
        elastic = ElasticReset(model, decay=0.5)
        elastic.update()
        again, places = kept((model, elastic)), [p.data for p in model.parameters()] * (memory != "free")
        del model, elastic
        gc.collect()
        model, elastic = again()
        for p, place in zip(model.parameters(), places, strict=False):
            p.data = place.copy_(p.data)
        filled(model, 3.0)
        elastic.update()
        assert all_are(elastic.ema, 2.0) and all_are(elastic.init, 1.0), size
        elastic.reset()
        assert all_are(model.parameters(), 2.0) and all_are(elastic.ema, 1.0), size
        assert elastic.updates == 2 and elastic.backend == backend


@pytest.mark.parametrize("way", ["foreach", pytest.param("staged", marks=needs_kernel)])
def test_two_processes(way):
    """DDP, and FSDP2's shards: see what_each_process_sees()."""
    code = f"import test_elastic_reset as tests; tests.what_each_process_sees({way!r})"
    port = str(free_port())
    environment = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    environment |= dict(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = [sys.executable, "-c", code]
    both = [subprocess.Popen(run, env=environment | dict(RANK=rank), **how) for rank in "01"]
    try:
        texts = [process.communicate(timeout=600)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(texts)


def free_port():
    import socket

    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


def whole_tensor(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def what_each_process_sees(way):
    import tempfile

    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    if way == "staged":
        stage(pytest.MonkeyPatch())
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    two, whole = copy.deepcopy(one), nn.Linear(4, 3)
    elastic = ElasticReset(one, 0.8, 3)
    train(one, elastic.step, DistributedDataParallel(one))
    train(two, by_hand(two))
    torch.testing.assert_close(dict(one.named_parameters()), dict(two.named_parameters()))

    # Three rows on two processes: shards of two rows and of one.
    shards = copy.deepcopy(whole)
    fully_shard(shards, mesh=dist.init_device_mesh("cpu", (2,)))
    elastic, expected = ElasticReset(shards, 0.5), ElasticReset(whole, 0.5)
    assert elastic.backend == way.replace("staged", "rust")
    for model in (shards, whole):
        filled(model, 3.0)
    elastic.update()
    expected.update()
    state = elastic.state_dict()
    for name, p in shards.named_parameters():
        assert isinstance(p, DTensor) and isinstance(state[f"ema.{name}"], DTensor)
        assert state[f"ema.{name}"].placements == p.placements and state[f"ema.{name}"].stride() == p.stride()
        torch.testing.assert_close(state[f"ema.{name}"].full_tensor(), expected.state_dict()[f"ema.{name}"])

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    dcp.save(state, checkpoint_id=folder[0])
    elastic.reset()
    expected.reset()
    for p, q in zip(shards.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor().detach(), q.detach())
    again = ElasticReset(shards, 0.5)  # at other weights than those saved
    loaded = {name: tensor.clone() for name, tensor in again.state_dict().items()}
    dcp.load(loaded, checkpoint_id=folder[0])
    again.load_state_dict(loaded)
    assert again.updates == 1 and again.resets == 0
    again.reset()
    for p, q in zip(shards.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor().detach(), q.detach())
    shards.double()
    elastic.update()
    assert {ema.dtype for ema in elastic.ema} == {torch.float64}

    # FSDP2 may keep the whole parameters after a forward pass. The next pass sees a reset all the same.
    kept = fully_shard(nn.Linear(4, 3), mesh=dist.init_device_mesh("cpu", (2,)), reshard_after_forward=False)
    elastic, x = ElasticReset(kept), torch.ones(1, 4)
    kept(x)
    for ema in elastic.ema:
        ema.fill_(2.0)
    with elastic.averaged():
        assert (kept(x) == 10).all()
    assert not (kept(x) == 10).any()
    elastic.load_state_dict({name: whole_tensor(tensor) for name, tensor in elastic.state_dict().items()})
    elastic.reset()
    assert (kept(x) == 10).all()
    dist.destroy_process_group()


def test_imports_with_torch_alone():
    """Section 1 must work where nothing but torch is installed: every other package is made unimportable."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
from elastic_reset import ElasticReset, ElasticResetCallback
model = torch.nn.Linear(2, 2)
elastic = ElasticReset(model, decay=0.5, reset_every=1)
assert elastic.step() and elastic.backend == "foreach"
assert ElasticResetCallback(decay=0.5).elastic is None
print("fine")
"""
    refused = "transformers accelerate datasets tokenizers safetensors sacrebleu matplotlib tqdm yaml peft"
    code = code.replace("{refused}", repr({*refused.split(), "pydantic_monty", "ema_kernel"}))
    run = dict(cwd=ROOT, capture_output=True, text=True, check=False)
    result = subprocess.run([sys.executable, "-c", code], **run)
    assert result.stdout == "fine\n", result.stderr
