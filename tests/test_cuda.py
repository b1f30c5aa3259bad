"""What only a GPU can show: averages beside the policy and in CPU memory, train(), the callback, shards.
Without one the whole file is skipped, and says so."""

import json
import os

import pytest
import torch
from conftest import TINY, killed_within_update, metrics_of
from torch import nn

import elastic_reset
from elastic_reset import ElasticReset, ElasticResetCallback, configure, train

if not torch.cuda.is_available():
    pytest.skip("there is no GPU that torch can use", allow_module_level=True)

GPU = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def model_on(device, dtype, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 77)).to(dtype).to(device)


def change(model, seed):
    """Add the same numbers to the weights on any device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator).to(p)


@pytest.mark.parametrize("rule", elastic_reset.RESET_RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_beside_staged_and_on_the_cpu_agree(dtype, rule, monkeypatch):
    """An update to one unit in the last place, a reset exactly."""
    monkeypatch.setattr(elastic_reset, "STAGING_BYTES", 100_000)  # so that there are several parts
    models = [model_on(device, dtype) for device in ("cpu", GPU, GPU)]
    averages = []
    for model, device in zip(models, (None, None, "cpu"), strict=True):
        averages.append(ElasticReset(model, decay=0.9, reset_every=3, reset=rule, device=device))
    assert averages[1].backend == "foreach" and averages[1].ema[0].is_cuda
    assert not averages[2].ema[0].is_cuda and not averages[2].init[0].is_cuda
    for step in range(1, 8):
        for model, elastic in zip(models, averages, strict=True):
            change(model, step)
            elastic.update()
        for beside, staged, cpu in zip(averages[1].ema, averages[2].ema, averages[0].ema, strict=True):
            torch.testing.assert_close(staged, cpu, rtol=0, atol=0)
            torch.testing.assert_close(beside.cpu(), cpu, rtol=2e-7, atol=1e-7)
        if averages[0].is_due(step):
            for model, elastic in zip(models, averages, strict=True):
                expected = [ema.to(dtype).cpu() for ema in elastic.ema]
                elastic.reset()
                if rule == "elastic":
                    weights = [p.detach().cpu() for p in model.parameters()]
                    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
            torch.testing.assert_close(averages[2].ema, averages[0].ema, rtol=0, atol=0)


@pytest.mark.parametrize("device, bytes_a_parameter", [("cpu", 0), (None, 6)])
def test_memory_of_the_gpu(device, bytes_a_parameter):
    """In bfloat16 the average takes 4 bytes a parameter and the start 2, or nothing with device="cpu"."""
    model = model_on(GPU, torch.bfloat16)
    n = sum(p.numel() for p in model.parameters())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    elastic = ElasticReset(model, reset_every=1, device=device)
    torch.cuda.reset_peak_memory_stats()
    assert abs(torch.cuda.memory_allocated() - before - bytes_a_parameter * n) < 10_000
    if device == "cpu":
        elastic.step()
        assert torch.cuda.max_memory_allocated() - before < 10_000


@pytest.mark.parametrize("device", [None, "cpu"])
def test_an_update_reads_what_the_stream_has_written(device):
    """The step before it is still waiting on the GPU when update() is called."""
    model = model_on(GPU, torch.float32)
    elastic = ElasticReset(model, decay=0.5, reset_every=1, device=device)
    start = [p.detach().cpu() for p in model.parameters()]
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), 2.0)
        assert elastic.step()
        weights = [p.detach().cpu() for p in model.parameters()]
    torch.testing.assert_close(weights, [p + 1 for p in start])


@pytest.mark.parametrize("device", [None, "cpu"])
def test_state_and_averaged(device):
    model = model_on(GPU, torch.bfloat16)
    elastic = ElasticReset(model, decay=0.5, device=device)
    change(model, 1)
    elastic.update()
    own = [p.detach().clone() for p in model.parameters()]
    with elastic.averaged(start=0.5):
        mixed = [
            (0.5 * e + 0.5 * i.float()).bfloat16() for e, i in zip(elastic.ema, elastic.init, strict=True)
        ]
        for p, expected in zip(model.parameters(), mixed, strict=True):
            torch.testing.assert_close(p.detach().cpu(), expected.cpu())
    assert all(map(torch.equal, model.parameters(), own))
    other = ElasticReset(model_on(GPU, torch.bfloat16, seed=1), decay=0.5, device=device)
    other.load_state_dict({name: tensor.cpu() for name, tensor in elastic.state_dict().items()})
    torch.testing.assert_close(other.state_dict(), elastic.state_dict(), rtol=0, atol=0)


SMALL = TINY | dict(batch_size=8, mini_batch_size=4, eval_size=8)
TASKS = {
    "translation": SMALL,
    "imdb": SMALL | dict(response_length=8, min_response_length=8, reward_updates=20),
    "qa": SMALL | dict(response_length=16, program_samples=2, reward_updates=20),
}


@pytest.mark.parametrize("task", TASKS)
def test_training(task, tmp_path):
    """With averages beside the policy, in CPU memory, and with passes cut into parts."""
    ends = {}
    for name, own in dict(
        beside={}, cpu=dict(ema_device="cpu"), parts=dict(gradient_accumulation_steps=2)
    ).items():
        config = configure(task, **TASKS[task] | own | dict(output_dir=str(tmp_path / name)))
        history = train(config)["history"]
        assert history[-1]["event"] == "after reset" and history[-1]["kl"] != 0
        ends[name] = {key: history[0][key] for key in ("reward", "drift")}
    assert ends["cpu"] == pytest.approx(ends["beside"], rel=1e-3)
    assert ends["parts"] == pytest.approx(ends["beside"], rel=1e-3)


@pytest.mark.parametrize("own", [{}, dict(ema_device="cpu")])
def test_a_resumed_run_is_identical(own, tmp_path, monkeypatch):
    whole = SMALL | own | dict(kl_coef=0.1, output_dir=str(tmp_path / "whole"))
    train(configure("translation", **whole))
    part = whole | dict(output_dir=str(tmp_path / "part"), resume=True)
    killed_within_update(3, lambda: train(configure("translation", **part)), monkeypatch)
    train(configure("translation", **part))
    for one, other in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "part"), strict=True):
        assert (one.pop("update"), one.pop("event")) == (other.pop("update"), other.pop("event"))
        assert one == pytest.approx(other, rel=1e-4)


def tiny_language_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    from elastic_reset import train_tokenizer

    words = "a b c d e f g h"
    tokenizer = train_tokenizer([words, " " + words], configure(), append_eos=False)
    torch.manual_seed(0)
    shape = dict(
        n_embd=16, n_layer=1, n_head=2, n_positions=96, bos_token_id=1, eos_token_id=1, pad_token_id=0
    )
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)), tokenizer


QUIET = dict(report_to="none", disable_tqdm=True, logging_strategy="no", save_strategy="no", seed=3)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_callback_in_a_trainer(device, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    model, _ = tiny_language_model()
    ids = torch.randint(2, 10, (32, 6)).tolist()
    rows = Dataset.from_list([dict(input_ids=row, labels=row) for row in ids])
    callback = ElasticResetCallback(0.5, 3, device=device)
    arguments = TrainingArguments(str(tmp_path), max_steps=6, per_device_train_batch_size=4, **QUIET)
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert (callback.elastic.updates, callback.elastic.resets) == (6, 2)
    assert callback.elastic.params[0].is_cuda and callback.elastic.ema[0].is_cuda == (device is None)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_callback_in_grpo(device, tmp_path):
    import trl
    from datasets import Dataset

    model, tokenizer = tiny_language_model()
    settings = dict(max_steps=3, per_device_train_batch_size=4, num_generations=4, max_completion_length=6)
    callback = ElasticResetCallback(0.5, 3, device=device)
    trainer = trl.GRPOTrainer(
        model,
        args=trl.GRPOConfig(str(tmp_path), **settings | QUIET),
        reward_funcs=lambda completions, **kwargs: [float(text.count("a")) for text in completions],
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([dict(prompt="a b")] * 16),
        callbacks=[callback],
    )
    trainer.train()
    assert (callback.elastic.updates, callback.elastic.resets) == (3, 1)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_shards_of_one_process(device, monkeypatch):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    for name, value in dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1").items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, sharded = model_on(GPU, torch.bfloat16), model_on(GPU, torch.bfloat16)
        fully_shard(sharded)
        ours = ElasticReset(sharded, decay=0.5, reset_every=2, device=device)
        theirs = ElasticReset(plain, decay=0.5, reset_every=2)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
                numbers = torch.randn(p.shape, generator=generator).to(p)
                with torch.no_grad():
                    p += numbers
                    q.to_local().add_(numbers)
            assert ours.step() == theirs.step()
        for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), q.full_tensor().detach())
        state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
        ours.load_state_dict(state)
        torch.testing.assert_close(ours.state_dict()["updates"], state["updates"])
    finally:
        dist.destroy_process_group()


def test_this_file_ran_on_a_gpu(tmp_path):
    """A run's folder says nothing of devices. That the policy was on one is seen in its parameters."""
    config = configure("translation", **SMALL | dict(updates=1, output_dir=str(tmp_path / "run")))
    task = elastic_reset.TranslationGame(config)
    train(config, task)
    assert next(task.policy.parameters()).is_cuda
    assert json.loads((tmp_path / "run" / "config.json").read_text())["updates"] == 1
    assert os.path.exists(tmp_path / "run" / "samples.md")
