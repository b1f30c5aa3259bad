"""ElasticResetCallback in other people's trainers: transformers' own and TRL's GRPO, RLOO and DPO, on one
process and on two."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from conftest import ROOT
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from elastic_reset import ElasticReset, ElasticResetCallback, configure, train_tokenizer

WORDS = "a b c d e f g h"
QUIET = dict(report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=3)


@pytest.fixture
def tokenizer():
    return train_tokenizer([WORDS, " " + WORDS], configure(), append_eos=False)


@pytest.fixture
def model(tokenizer, tmp_path):
    torch.manual_seed(0)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    shape = dict(
        n_embd=16, n_layer=1, n_head=2, n_positions=96, bos_token_id=1, eos_token_id=1, pad_token_id=0
    )
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **no_dropout))
    model.save_pretrained(tmp_path / "start")
    return GPT2LMHeadModel.from_pretrained(tmp_path / "start")


def rows(n=32):
    ids = torch.randint(2, 10, (n, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([dict(input_ids=row, labels=row) for row in ids])


def trained(model, folder, callback, **settings):
    arguments = dict(max_steps=6, per_device_train_batch_size=4, learning_rate=0.05, save_steps=2) | QUIET
    arguments = TrainingArguments(str(folder), **arguments | settings)
    return Trainer(model, arguments, train_dataset=rows(), callbacks=[callback])


def test_optimizer_steps_are_counted(model, tmp_path):
    """With two micro-batches a step: six steps, resets after the third and the sixth."""
    callback = ElasticResetCallback(decay=0.5, reset_every=3)
    start = [p.detach().clone() for p in model.parameters()]
    trained(model, tmp_path / "run", callback, gradient_accumulation_steps=2).train()
    assert (callback.elastic.updates, callback.elastic.resets) == (6, 2)
    assert all(torch.equal(ema, p) for ema, p in zip(callback.elastic.ema, start, strict=True))


def go_on(tmp_path, checkpoint, output_dir, max_steps=8, named=False):
    """Resumes a run, from the model's start as a new process would."""
    policy, callback = GPT2LMHeadModel.from_pretrained(tmp_path / "start"), ElasticResetCallback(0.5, 3)
    settings = dict(resume_from_checkpoint=str(tmp_path / checkpoint)) if named else {}
    trainer = trained(policy, tmp_path / output_dir, callback, max_steps=max_steps, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / checkpoint))
    return policy, callback.elastic


def test_what_cannot_work_is_refused_early(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="decay is 3"):
        trained(model, tmp_path / "run", ElasticResetCallback(decay=3)).train()
    with pytest.raises(ValueError, match="auto_find_batch_size"):
        trained(model, tmp_path / "run", ElasticResetCallback(), auto_find_batch_size=True).train()
    for kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        state = SimpleNamespace(distributed_type=kind, fsdp_plugin=SimpleNamespace(fsdp_version=1))
        trainer = trained(model, tmp_path / "run", ElasticResetCallback())
        monkeypatch.setattr("accelerate.state.AcceleratorState", lambda state=state: state)
        with pytest.raises(ValueError, match="without DeepSpeed, FSDP1"):
            trainer.train()
        monkeypatch.undo()


def test_averages_of_another_run_are_refused(model, tmp_path):
    """Both runs have a checkpoint-2; the trainer does not say which one it goes on from."""
    trained(model, tmp_path / "a", ElasticResetCallback(0.5, 3), max_steps=2).train()
    other = GPT2LMHeadModel.from_pretrained(tmp_path / "start")
    trained(other, tmp_path / "b", ElasticResetCallback(0.5, 3), max_steps=2, learning_rate=0.01).train()
    with pytest.raises(ValueError, match="holds another run's averages"):
        go_on(tmp_path, "a/checkpoint-2", "b")
    with pytest.raises(FileNotFoundError, match="c/checkpoint-2/elastic_reset.safetensors"):
        go_on(tmp_path, "a/checkpoint-2", "c")
    _, elastic = go_on(tmp_path, "a/checkpoint-2", "c", max_steps=4, named=True)
    assert (elastic.updates, elastic.resets) == (4, 1)
    _, elastic = go_on(tmp_path, "c/checkpoint-4", "c", max_steps=6)
    assert (elastic.updates, elastic.resets) == (6, 2)


def test_checkpoints_without_whole_averages_are_refused(model, tmp_path):
    trained(model, tmp_path / "run", ElasticResetCallback(0.5, 3)).train()
    path = tmp_path / "run" / "checkpoint-6" / "elastic_reset.safetensors"
    whole = path.read_bytes()
    for damage in (lambda: path.write_bytes(whole[:500]), path.unlink):
        damage()
        with pytest.raises((SafetensorError, FileNotFoundError)):
            go_on(tmp_path, "run/checkpoint-6", "run")


def test_the_same_as_a_loop_of_ones_own(model, tmp_path):
    """The trainer's weights are those of a plain loop with elastic.step() behind optimizer.step()."""
    own = GPT2LMHeadModel.from_pretrained(tmp_path / "start")
    callback, plain = ElasticResetCallback(0.9, 2), dict(optim="sgd", lr_scheduler_type="constant")
    trainer = trained(model, tmp_path / "run", callback, **plain)
    trainer.train_dataset = Dataset.from_list([rows()[0]] * 32)  # whatever the order, the same batches
    trainer.train()
    batch = {name: torch.tensor([ids] * 4) for name, ids in rows()[0].items()}
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
    elastic = ElasticReset(own, 0.9, 2)
    for _ in range(6):
        own(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        elastic.step()
    assert callback.elastic.resets == elastic.resets == 3
    torch.testing.assert_close(dict(model.named_parameters()), dict(own.named_parameters()))


def test_resuming_goes_on_as_if_uninterrupted(model, tmp_path):
    whole = ElasticResetCallback(0.5, 3)
    trained(model, tmp_path / "run", whole, max_steps=8).train()
    policy, elastic = go_on(tmp_path, "run/checkpoint-4", "run")  # between the resets after 3 and 6
    assert (elastic.updates, elastic.resets) == (8, 2) == (whole.elastic.updates, whole.elastic.resets)
    torch.testing.assert_close(elastic.state_dict(), whole.elastic.state_dict())
    torch.testing.assert_close(dict(policy.named_parameters()), dict(model.named_parameters()))


def test_unknown_events_are_no_errors_but_unknown_names_are():
    callback = ElasticResetCallback()
    assert callback.on_something_new(None, None, None, model=None) is None
    with pytest.raises(AttributeError):
        _ = callback.other


def test_dpo_resets_the_adapter_alone(model, tokenizer, tmp_path):
    from trl import DPOConfig, DPOTrainer

    pairs = [dict(prompt="a b", chosen=" c d", rejected=" e f")] * 16
    lora = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    settings = dict(max_steps=4, per_device_train_batch_size=2, learning_rate=0.01, save_steps=4, bf16=False)
    callback = ElasticResetCallback(0.5, 2)
    trainer = DPOTrainer(
        model, args=DPOConfig(str(tmp_path / "dpo"), **settings | QUIET),
        train_dataset=Dataset.from_list(pairs), processing_class=tokenizer, peft_config=lora,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert callback.elastic.resets == 2 and all("lora_" in name for name in callback.elastic.names)
    saved = load_file(tmp_path / "dpo" / "checkpoint-4" / "elastic_reset.safetensors")
    assert int(saved["updates"]) == 4


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_online_trainers(kind, model, tokenizer, tmp_path):
    import trl

    def reward(completions, **kwargs):
        return [float(text.count("a")) for text in completions]

    settings = dict(max_steps=3, per_device_train_batch_size=4, num_generations=4, max_completion_length=6)
    settings |= dict(learning_rate=0.01, save_strategy="no", bf16=False)
    callback = ElasticResetCallback(0.5, 3)
    arguments = getattr(trl, f"{kind}Config")(str(tmp_path / kind), **settings | QUIET)
    trainer = getattr(trl, f"{kind}Trainer")(
        model, args=arguments, reward_funcs=reward, processing_class=tokenizer, callbacks=[callback],
        train_dataset=Dataset.from_list([dict(prompt="a b")] * 16),
    )  # fmt: skip
    trainer.train()
    assert (callback.elastic.updates, callback.elastic.resets) == (3, 1)


# On two processes


def shard_on_the_cpu():
    """accelerate shards on accelerators alone. Here the CPU counts as one."""
    init = AcceleratorState.__init__

    def with_plugin(self, *args, fsdp_plugin=None, **settings):
        init(self, *args, fsdp_plugin=fsdp_plugin, **settings)
        self.fsdp_plugin = fsdp_plugin or self._shared_state.get("fsdp_plugin")
        if self.fsdp_plugin is not None:  # also where something else asks for the state once more
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = with_plugin


def train_as_one_of_several(kind, folder, checkpoint=""):
    """What each process does: six optimizer steps, resets after the third and the sixth. The main one saves
    the weights at the end."""
    import trl

    processes, main = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
    settings = dict(max_steps=6, save_steps=4, learning_rate=0.05, gradient_accumulation_steps=2, optim="sgd")
    settings |= dict(per_device_train_batch_size=8 // processes, lr_scheduler_type="constant", bf16=False)
    if processes > 1 and kind != "ddp":
        shard_on_the_cpu()
        layers = dict(transformer_layer_cls_to_wrap="GPT2Block", state_dict_type="SHARDED_STATE_DICT")
        settings |= dict(fsdp=True, fsdp_config=dict(version=2, **layers))
    model, callback = (
        GPT2LMHeadModel.from_pretrained(Path(folder).parent / "start"),
        ElasticResetCallback(0.5, 3),
    )
    if kind == "lora":
        torch.manual_seed(1)
        shape = dict(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **shape))
    if kind == "grpo":
        settings |= dict(num_generations=4, max_completion_length=6)
        tokenizer = train_tokenizer([WORDS, " " + WORDS], configure(), append_eos=False)
        trainer = trl.GRPOTrainer(
            model, args=trl.GRPOConfig(folder, **settings | QUIET), processing_class=tokenizer,
            reward_funcs=lambda completions, **kwargs: [float(text.count("a")) for text in completions],
            train_dataset=Dataset.from_list([dict(prompt="a b")] * 64), callbacks=[callback],
        )  # fmt: skip
    else:
        arguments = TrainingArguments(folder, **settings | QUIET)
        trainer = Trainer(model, arguments, train_dataset=rows(64), callbacks=[callback])
    trainer.train(resume_from_checkpoint=checkpoint or None)
    assert (callback.elastic.updates, callback.elastic.resets) == (6, 2)
    sharded = [hasattr(p, "full_tensor") for p in callback.elastic.params]
    assert all(sharded) if processes > 1 and kind != "ddp" else not any(sharded)
    weights = [
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for p in trainer.model.parameters()
    ]
    if main:
        torch.save(weights, f"{folder}/weights.pt")


def on_processes(n, *arguments):
    launch(n, f"import test_trainers; test_trainers.train_as_one_of_several(*{arguments!r})", ROOT)
    return torch.load(f"{arguments[1]}/weights.pt", weights_only=True)


def launch(n, code, folder, *words):
    """Runs the code in n processes. Each leaves the process group, as one that ends within it may abort."""
    code += "\nimport accelerate\naccelerate.PartialState().destroy_process_group()"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), "--no-python"]
    done = subprocess.run(
        [sys.executable, *torchrun, sys.executable, "-c", code, *words], capture_output=True, text=True,
        env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")])), cwd=folder,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "lora"])
def test_two_processes_train_as_one_does(kind, model, tmp_path):
    """With two micro-batches a step, the weights after the second reset, and with FSDP2 also those of a run
    that is resumed between two resets."""
    one, two = (on_processes(n, kind, str(tmp_path / f"{kind}{n}")) for n in (1, 2))
    torch.testing.assert_close(two, one)
    averages = [
        load_file(tmp_path / f"{kind}{n}" / "checkpoint-4" / "elastic_reset.safetensors") for n in (1, 2)
    ]
    torch.testing.assert_close(*averages)  # and so either number of processes can go on from either
    if kind == "fsdp":
        folder = str(tmp_path / "fsdp2")
        torch.testing.assert_close(
            on_processes(2, kind, folder, folder + "/checkpoint-4"), two, rtol=0, atol=0
        )


def test_online_reinforcement_learning_with_shards(model, tmp_path):
    start = [p.detach().clone() for p in model.parameters()]
    end = on_processes(2, "grpo", str(tmp_path / "grpo2"))
    assert all(p.isfinite().all() for p in end)
    assert any(not torch.equal(a, b) for a, b in zip(start, end, strict=True))


def run_the_example(kind):
    """tutorials/two_gpus.py, in each process; for FSDP2 as if the CPU were a GPU."""
    program = (ROOT / "tutorials" / "two_gpus.py").read_text(encoding="utf-8")
    if kind == "fsdp":
        shard_on_the_cpu()
        assert " if gpu else {}" in program
        program = program.replace(" if gpu else {}", "")
    names = {"__name__": "__main__"}
    exec(compile(program, "two_gpus.py", "exec"), names)
    sharded = [hasattr(p, "full_tensor") for p in names["callback"].elastic.params]
    assert all(sharded) if kind == "fsdp" else not any(sharded)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_example_for_two_gpus(kind, model, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "start")
    launch(2, f"import test_trainers; test_trainers.run_the_example({kind!r})", tmp_path, "start", "4")
    saved = load_file(tmp_path / "runs" / "grpo" / "checkpoint-4" / "elastic_reset.safetensors")
    assert (int(saved["updates"]), int(saved["resets"])) == (4, 4)
