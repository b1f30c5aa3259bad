"""Room 1: the average and the reset."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import elastic_reset
from elastic_reset import RESET_RULES, ElasticReset

KERNEL = pytest.param(
    "rust", marks=pytest.mark.skipif(elastic_reset.ema_kernel is None, reason="ema_kernel is not built")
)


@pytest.fixture(params=[KERNEL, "foreach"])
def backend(request, monkeypatch):
    if request.param == "foreach":
        monkeypatch.setattr(elastic_reset, "ema_kernel", None)
    return request.param


def filled(module, value):
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)
    return module


def values_of(tensors):
    return {float(x) for t in tensors for x in t.detach().reshape(-1)}


def test_zeros_and_ones(backend):
    model = filled(nn.Linear(3, 2), 0.0)
    elastic = ElasticReset(model, decay=0.75)
    assert elastic.backend == backend
    filled(model, 1.0)
    elastic.update()
    assert values_of(elastic.ema) == {0.25} and values_of(model.parameters()) == {1.0}
    elastic.update()
    assert values_of(elastic.ema) == {0.4375}
    elastic.reset()
    assert values_of(model.parameters()) == {0.4375} and values_of(elastic.ema) == values_of(
        elastic.init
    ) == {0.0}


def test_after_a_reset_nothing_is_shared(backend):
    model = filled(nn.Linear(3, 2), 1.0)
    elastic = ElasticReset(model)
    elastic.reset()
    filled(model, 5.0)
    assert values_of(elastic.ema) == values_of(elastic.init) == {1.0}


@pytest.mark.parametrize("rule", RESET_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rule_against_numpy_over_random_schedules(backend, rule, dtype):
    rng = np.random.default_rng(0)
    for _ in range(20):
        decay, every = float(rng.uniform(0, 1)), int(rng.integers(1, 5))
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)).to(dtype)
        policy = flat(model)
        ema, init = policy.copy(), policy.copy()
        elastic = ElasticReset(model, decay, every, reset=rule)
        for step in range(1, 13):
            change = rng.normal(size=policy.shape)
            with torch.no_grad():
                for p, c in zip(model.parameters(), np.split(change, splits(model)), strict=True):
                    p += torch.tensor(c, dtype=dtype).view(p.shape)
            policy = policy + change
            ema = decay * ema + (1 - decay) * policy
            due = step % every == 0 and rule != "none"
            if due and rule == "elastic":
                policy, ema = ema.copy(), init.copy()
            if due and rule == "ema":
                policy = ema.copy()
            if due and rule == "init":
                policy = init.copy()
            assert elastic.step() is due
        tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(flat(model), policy, **tolerance)
        np.testing.assert_allclose(np.concatenate([e.numpy().ravel() for e in elastic.ema]), ema, **tolerance)
        np.testing.assert_array_equal(np.concatenate([i.numpy().ravel() for i in elastic.init]), init)


def flat(model):
    return np.concatenate([p.detach().numpy().ravel().astype(np.float64) for p in model.parameters()])


def splits(model):
    return np.cumsum([p.numel() for p in model.parameters()])[:-1]


def test_tied_weights_once_frozen_ones_and_buffers_never(backend):
    model = nn.ModuleDict(dict(a=nn.Linear(2, 2), b=nn.Linear(2, 2), norm=nn.BatchNorm1d(2)))
    model.b.weight = model.a.weight
    model.b.bias.requires_grad_(False)
    elastic = ElasticReset(model)
    assert elastic.names == ["a.weight", "a.bias", "norm.weight", "norm.bias"]
    before = model.b.bias.clone(), model.norm.running_mean.clone()
    model.norm.running_mean += 1
    elastic.reset()
    assert model.b.weight is model.a.weight and torch.equal(model.b.bias, before[0])
    assert torch.equal(model.norm.running_mean, before[1] + 1)
    assert ElasticReset([model.a.weight, model.b.weight]).names == ["0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_policy_has_a_float32_average(backend, dtype):
    model = filled(nn.Linear(8, 8), 1.0).to(dtype)
    elastic = ElasticReset(model, decay=0.995)
    filled(model, 1.125)
    for _ in range(100):
        elastic.update()
    expected = 1.125 - 0.125 * 0.995**100
    assert {e.dtype for e in elastic.ema + elastic.init} == {torch.float32}
    assert values_of(elastic.ema).pop() == pytest.approx(
        expected, rel=1e-5
    )  # in bfloat16 it would still be 1
    elastic.reset()
    assert values_of(model.parameters()) == {float(torch.tensor(expected).to(dtype))}


def test_mixed_dtypes(backend):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).to(torch.bfloat16), nn.Linear(3, 3).double())
    elastic = ElasticReset(model, decay=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    filled(model, 4.0)
    elastic.update()
    for ema, p in zip(elastic.ema, before, strict=True):
        torch.testing.assert_close(ema, (0.5 * p.to(ema.dtype) + 2.0))
    assert [e.dtype for e in elastic.ema[::2]] == [torch.float32, torch.float32, torch.float64]


@pytest.mark.parametrize("how", ["assign", "double", "data", "half and back"])
def test_survives_parameters_that_are_pointed_elsewhere(backend, how):
    model = filled(nn.Linear(3, 2), 1.0)
    elastic = ElasticReset(model, decay=0.5)
    filled(model, 3.0)
    if how == "assign":
        model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    elif how == "double":
        model.double()
    elif how == "data":
        model.weight.data = model.weight.data.clone()
    else:
        model.bfloat16(), model.float()
    elastic.update()
    assert values_of(elastic.ema) == {2.0} and elastic.ema[0].dtype == model.weight.dtype
    elastic.reset()
    assert values_of(model.parameters()) == {2.0} and values_of(elastic.ema) == {1.0}
    assert elastic.backend == backend


def test_averaged_puts_everything_back(backend):
    model = filled(nn.Linear(3, 2), 1.0)
    elastic = ElasticReset(model, decay=0.5)
    filled(model, 3.0)
    elastic.update()
    with pytest.raises(RuntimeError, match="inside"), elastic.averaged():
        assert values_of(model.parameters()) == {2.0}
        raise RuntimeError("inside")
    assert values_of(model.parameters()) == {3.0} and values_of(elastic.ema) == {2.0}


def test_averaged_follows_replaced_parameters(backend):
    model = filled(nn.Linear(3, 2), 1.0)
    elastic = ElasticReset(model, decay=0.5)
    model.load_state_dict({n: torch.full_like(t, 3.0) for n, t in model.state_dict().items()}, assign=True)
    with elastic.averaged():
        assert values_of(model.parameters()) == {1.0}
    assert values_of(model.parameters()) == {3.0}
    with pytest.raises(RuntimeError), elastic.holding([torch.zeros(2, 3), torch.zeros(99)]):
        raise AssertionError("not reached")
    assert values_of(model.parameters()) == {3.0}


def test_state_dict_through_safetensors(backend, tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    elastic = ElasticReset(model, decay=0.9, reset_every=3)
    start = copy.deepcopy(model)
    for _ in range(4):
        filled(model, 2.0), elastic.step()
    save_file(elastic.state_dict(), tmp_path / "elastic.safetensors")
    other = ElasticReset(start, decay=0.9, reset_every=3)
    other.load_state_dict(load_file(tmp_path / "elastic.safetensors"))
    assert other.updates == 4 and other.resets == 1
    for name, tensor in elastic.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_state_of_another_model_changes_nothing(backend):
    elastic, other = ElasticReset(nn.Linear(2, 2)), ElasticReset(nn.Linear(3, 2))
    before = [e.clone() for e in elastic.ema]
    states = [other.state_dict(), {}, elastic.state_dict() | {"extra": torch.zeros(1)}]
    states.append(elastic.state_dict() | {"updates": 3})
    for state in states:
        with pytest.raises(ValueError, match="another policy"):
            elastic.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, elastic.ema, strict=True))


@pytest.mark.parametrize(
    "arguments, error",
    [
        (dict(decay=1.5), "decay is 1.5"),
        (dict(decay=float("nan")), "decay is nan"),
        (dict(reset_every=0), "reset_every is 0"),
        (dict(reset_every=2.5), "reset_every is 2.5"),
        (dict(reset="both"), "expected one of elastic, ema, init, none"),
    ],
)
def test_unusable_arguments(arguments, error):
    with pytest.raises(ValueError, match=error):
        ElasticReset(nn.Linear(2, 2), **arguments)


def test_unusable_models():
    with pytest.raises(ValueError, match="nothing to average"):
        ElasticReset(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(TypeError, match="item 0 is neither"):
        ElasticReset(["weight"])
    with pytest.raises(TypeError, match="item 0 is neither"):
        ElasticReset(nn.Linear(2, 2).weight)


def test_trains_with_fused_optimizers_and_checkpointing(backend):
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    flat_model = copy.deepcopy(plain)
    ElasticReset(flat_model)
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    for model in (plain, flat_model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        for _ in range(10):
            (checkpoint(model, x, use_reentrant=False) - y).square().mean().backward()
            optimizer.step(), optimizer.zero_grad()
    for a, b in zip(plain.parameters(), flat_model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_flat_parameters_copy_and_save_like_others(backend, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    elastic = ElasticReset(model)
    twin = copy.deepcopy(model)
    filled(model, 0.5)
    assert 0.5 not in values_of(list(twin.parameters())[:1])
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
    torch.save(model.state_dict(), tmp_path / "state.pt")
    model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    elastic.step()
    save_model(model, tmp_path / "all.safetensors")
    assert len(load_file(tmp_path / "all.safetensors")) == len(list(model.parameters()))
    sizes = []
    for bias in (model.transformer.ln_f.bias, model.transformer.ln_f.bias.detach().clone()):
        torch.save(bias.detach(), tmp_path / "bias.pt")
        sizes.append((tmp_path / "bias.pt").stat().st_size)
    assert sizes[0] == sizes[1]


def test_accelerate_saves_every_weight(backend, tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare_model(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)))
    elastic = ElasticReset(model)
    accelerator.save_state(tmp_path, safe_serialization=True)
    saved = [p.detach().clone() for p in model.parameters()]
    filled(model, 9.0)
    accelerator.load_state(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(saved, model.parameters(), strict=True))
    assert elastic.step() is False and elastic.backend == backend


def changed_module(model):
    model[1] = nn.Linear(3, 3)


def added_parameter(model):
    model[0].register_parameter("scale", nn.Parameter(torch.ones(1)))


def removed_parameter(model):
    model[0].bias = None


def deleted_parameter(model):
    del model[0].bias


def reshaped_parameter(model):
    model[0].bias.data = torch.zeros(5)


def frozen_parameter(model):
    model[1].weight.requires_grad_(False)


def tied_parameters(model):
    model[1].weight = model[0].weight


CHANGES = [changed_module, added_parameter, removed_parameter, deleted_parameter, reshaped_parameter]
CHANGES += [frozen_parameter, tied_parameters]


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_no_longer_the_one_averaged_is_refused(backend, change):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    elastic = ElasticReset(model, reset_every=1)
    elastic.step()
    change(model)
    with pytest.raises(ValueError, match="parameter '[01][a-z.]*' was added, removed, replaced"):
        elastic.step()


def test_shared_parameters_stay_shared():
    model = filled(nn.Linear(2, 2), 1.0).share_memory()
    elastic = ElasticReset(model, decay=0.5, reset_every=1)
    assert elastic.step() and elastic.backend == "foreach" and model.weight.is_shared()


def test_parameters_on_the_same_memory_stay_there(backend):
    one = nn.Parameter(torch.zeros(3))
    other = nn.Parameter(one.data)
    ElasticReset([one, other])
    one.data.add_(1)
    assert values_of([other]) == {1.0}


def test_attaching_in_inference_mode(backend):
    model = filled(nn.Linear(2, 2), 1.0)
    elastic = ElasticReset(model)
    model.double()
    with torch.inference_mode(), elastic.averaged():
        model(torch.ones(1, 2, dtype=torch.float64))
    model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()


def test_averages_of_transposed_parameters_can_be_saved(backend, tmp_path):
    elastic = ElasticReset([nn.Parameter(torch.arange(6.0).view(2, 3).t())], decay=0.5)
    elastic.update()
    save_file(elastic.state_dict(), tmp_path / "elastic.safetensors")
    assert torch.equal(load_file(tmp_path / "elastic.safetensors")["ema.0"], elastic.params[0])


def test_complex_parameters_take_torchs_way():
    layer = nn.Linear(2, 2, dtype=torch.complex64)
    elastic = ElasticReset(layer, decay=0.5, reset_every=1)
    assert elastic.backend == "foreach" and elastic.step()


def test_shards_of_a_dtensor():
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = filled(nn.Linear(4, 4), 1.0)
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        elastic = ElasticReset(model, decay=0.5)
        assert elastic.backend == "foreach"
        filled(model, 3.0)
        elastic.update()
        elastic.reset()
        assert values_of([p.to_local() for p in model.parameters()]) == {2.0} and values_of(elastic.ema) == {
            1.0
        }
    finally:
        dist.destroy_process_group()


def test_imports_with_torch_alone():
    """Room 1 must work where nothing but torch is installed: every other package is made unimportable."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
from elastic_reset import ElasticReset
model = torch.nn.Linear(2, 2)
elastic = ElasticReset(model, decay=0.5, reset_every=1)
assert elastic.step() and elastic.backend == "foreach"
print("fine")
"""
    refused = (
        "transformers accelerate datasets tokenizers safetensors sacrebleu matplotlib tqdm yaml ema_kernel"
    )
    code = code.replace("{refused}", repr(set(refused.split())))
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout == "fine\n", result.stderr
