"""ElasticResetCallback in other people's trainers: transformers' own and TRL's GRPO, RLOO and DPO."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from elastic_reset import ElasticReset, ElasticResetCallback, train_tokenizer

WORDS = "a b c d e f g h"
QUIET = dict(report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=3)


@pytest.fixture
def tokenizer():
    tokenizer = train_tokenizer([WORDS, " " + WORDS], 0, 32, append_eos=False)
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.fixture
def model(tokenizer, tmp_path):
    torch.manual_seed(0)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    shape = dict(
        n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1, pad_token_id=0
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


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_weights_kept_elsewhere_are_refused(model, tmp_path, kind, monkeypatch):
    trainer = trained(model, tmp_path / "run", ElasticResetCallback())
    monkeypatch.setattr("accelerate.state.AcceleratorState", lambda: SimpleNamespace(distributed_type=kind))
    with pytest.raises(ValueError, match="not DeepSpeed or FSDP"):
        trainer.train()


def test_another_runs_averages_are_refused(model, tmp_path):
    """Both runs have a checkpoint-2; the trainer does not say which one it goes on from."""
    trained(model, tmp_path / "a", ElasticResetCallback(0.5, 3), max_steps=2).train()
    other = GPT2LMHeadModel.from_pretrained(tmp_path / "start")
    trained(other, tmp_path / "b", ElasticResetCallback(0.5, 3), max_steps=2, learning_rate=0.01).train()

    def go_on(output_dir, **where):
        policy = GPT2LMHeadModel.from_pretrained(tmp_path / "start")
        callback = ElasticResetCallback(0.5, 3, **where)
        trainer = trained(policy, tmp_path / output_dir, callback, max_steps=4)
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
        return callback.elastic.resets

    with pytest.raises(ValueError, match="holds another run's averages"):
        go_on("b")
    with pytest.raises(ValueError, match="the checkpoint lies elsewhere"):
        go_on("c")
    assert go_on("c", checkpoint=tmp_path / "a" / "checkpoint-2") == 1
    policy = GPT2LMHeadModel.from_pretrained(tmp_path / "start")
    again = ElasticResetCallback(0.5, 3, checkpoint=tmp_path / "a" / "checkpoint-2")
    trained(policy, tmp_path / "c", again).train(resume_from_checkpoint=True)  # from c's own checkpoint-4
    assert again.elastic.resets == 2


def test_settings_that_cannot_work_are_refused_early(model, tmp_path):
    with pytest.raises(ValueError, match="decay is 3"):
        ElasticResetCallback(decay=3)
    with pytest.raises(ValueError, match="auto_find_batch_size begins again"):
        trained(model, tmp_path / "a", ElasticResetCallback(), auto_find_batch_size=True).train()
    with pytest.raises(ValueError, match="`checkpoint` is given, but not resumed from"):
        trained(model, tmp_path / "b", ElasticResetCallback(checkpoint=tmp_path)).train()


def test_damaged_averages_are_named(model, tmp_path):
    trained(model, tmp_path / "run", ElasticResetCallback()).train()
    path = tmp_path / "run" / "checkpoint-6" / "elastic_reset.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="elastic_reset.safetensors is damaged"):
        trained(model, tmp_path / "run", ElasticResetCallback(), max_steps=8).train(
            resume_from_checkpoint=True
        )


def test_the_same_as_a_loop_of_ones_own(model, tmp_path):
    """The trainer's weights are those of a plain loop with elastic.step() behind optimizer.step()."""
    own = GPT2LMHeadModel.from_pretrained(tmp_path / "start")
    plain = dict(optim="sgd", lr_scheduler_type="constant")
    trainer = trained(model, tmp_path / "run", ElasticResetCallback(0.9, 2), **plain)
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
    for a, b in zip(model.parameters(), own.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_resuming_goes_on_as_if_uninterrupted(model, tmp_path):
    whole = ElasticResetCallback(0.5, 4)
    trained(model, tmp_path / "whole", whole, save_steps=3).train()
    part = GPT2LMHeadModel.from_pretrained(tmp_path / "start")
    trained(part, tmp_path / "part", ElasticResetCallback(0.5, 4), save_steps=3, max_steps=6).train()
    again = ElasticResetCallback(0.5, 4)
    resumed = trained(
        GPT2LMHeadModel.from_pretrained(tmp_path / "start"), tmp_path / "part", again, save_steps=3
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    assert again.elastic.updates == 6
    for name in ("ema", "init"):
        for a, b in zip(getattr(again.elastic, name), getattr(whole.elastic, name), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    for a, b in zip(resumed.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_resuming_without_averages_is_refused(model, tmp_path):
    trained(model, tmp_path / "run", ElasticResetCallback()).train()
    (tmp_path / "run" / "checkpoint-6" / "elastic_reset.safetensors").unlink()
    with pytest.raises(ValueError, match="elastic_reset.safetensors is missing"):
        trained(model, tmp_path / "run", ElasticResetCallback(), max_steps=8).train(
            resume_from_checkpoint=True
        )


def test_other_settings_at_a_resume_are_warned_of(model, tmp_path):
    trained(model, tmp_path / "run", ElasticResetCallback(0.5, 4)).train()
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "start")
    trainer = trained(again, tmp_path / "run", ElasticResetCallback(0.5, 3), max_steps=7)
    with pytest.warns(UserWarning, match="reset_every is 3; until this checkpoint it was 4"):
        trainer.train(resume_from_checkpoint=True)


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
