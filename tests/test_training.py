"""Rooms 4 and 6: the loop, checkpoints, interruptions, what a run leaves behind."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, TINY
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import elastic_reset
from elastic_reset import METHODS, TranslationGame, configure, to_argv, train


def metrics_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def command(flags):
    return [sys.executable, str(ROOT / "elastic_reset.py"), *to_argv(flags)]


def test_files_of_a_run(tiny, tmp_path, capsys):
    result = train(configure(**tiny | dict(learning_rate=0.05)))
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "samples.md",
        "curve.png",
        "model",
        "receiver",
        "checkpoint",
    }
    lines = metrics_of(run)
    assert [(line["update"], line["event"]) for line in lines] == [
        (0, ""), (2, "before reset"), (2, "after reset"), (4, "before reset"), (4, "after reset"),
    ]  # fmt: skip
    assert {"reward", "drift", "bleu_de", "bleu_en", "kl"} <= lines[0].keys()
    assert lines[0]["kl"] == 0 and json.loads((run / "config.json").read_text())["reset_every"] == 2
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    samples = (run / "samples.md").read_text()
    assert "- French: " in samples and "- human English: " in samples and "| update | English |" in samples
    printed = capsys.readouterr().out
    assert "bleu_en" in printed and "nrefs:1|case:mixed|eff:no|tok:13a" in printed and str(run) in printed
    assert result["start"]["update"] == 0 and result["end"]["event"] == "after reset"


def test_models_load_back(tiny, tmp_path):
    train(configure(**tiny))
    policy = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    again = configure(
        **tiny | dict(model=str(tmp_path / "run" / "model"), output_dir=str(tmp_path / "again"))
    )
    task = TranslationGame(again)
    for (name, a), b in zip(policy.named_parameters(), task.policy.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert tokenizer("le petit voisin")["input_ids"] == task.tokenizer("le petit voisin")["input_ids"]
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "receiver").config.model_type == "marian"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(tiny, method, capsys):
    result = train(configure(**tiny | dict(method=method)))
    moved = result["end"]["kl"] != 0
    assert moved is (method not in ("fixed-sender", "reset-init"))  # the last update ends in a reset
    printed = capsys.readouterr().out
    if method == "average-after":
        assert [line["event"] for line in result["history"]][-2:] == ["eta 0.80", "eta 0.90"]
    assert printed.count("mixture, eta 0.") == (9 if method == "average-after" else 0)


def test_a_reset_to_init_ends_at_the_start(tiny):
    history = train(configure(**tiny | dict(method="reset-init", receiver_learning_rate=0.0)))["history"]
    start, before, after = history[0], history[-2], history[-1]
    assert after["reward"] == start["reward"] and after["drift"] == start["drift"] != before["drift"]


@pytest.mark.parametrize("rhythm, times", [("update", 4), ("epoch", 8), ("minibatch", 16)])
def test_ema_update_rhythms(tiny, rhythm, times, monkeypatch):
    calls = []
    update = elastic_reset.ElasticReset.update
    monkeypatch.setattr(elastic_reset.ElasticReset, "update", lambda self: (calls.append(1), update(self)))
    train(configure(**tiny | dict(ema_update=rhythm)))
    assert len(calls) == times


def test_early_stop(tiny, monkeypatch):
    steps = []
    step = elastic_reset.optimizer_step
    monkeypatch.setattr(
        elastic_reset, "optimizer_step", lambda *args: (steps.append(args[1]), step(*args))[1]
    )
    train(configure(**tiny | dict(early_stop_kl=1e-12, num_ppo_epochs=4)))
    policy_steps = [module for module in steps if isinstance(module, elastic_reset.ActorCritic)]
    assert len(policy_steps) == 4 * 2  # each update ends after its first epoch of two minibatches


@pytest.mark.parametrize("steps", [2, 3, 100])
def test_gradient_accumulation_changes_nothing_but_memory(tiny, steps, tmp_path):
    whole = train(configure(**tiny))["end"]
    parts = train(configure(**tiny | dict(gradient_accumulation_steps=steps, output_dir=str(tmp_path / "2"))))
    for name in ("reward", "drift", "policy_loss", "clipfrac"):
        assert parts["end"][name] == pytest.approx(whole[name], rel=1e-3, abs=1e-4)


def test_value_learning_rate_is_the_head_s(tiny):
    config = configure(**tiny | dict(value_learning_rate=0.5, learning_rate=0.0))
    model, optimizer = elastic_reset.actor_critic(TranslationGame(config).policy, config, Accelerator())
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.5]
    head = [p for group in optimizer.param_groups[1:] for p in group["params"]]
    assert [id(p) for p in head] == [id(p) for p in model.value_head.parameters()]
    total = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert total == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_adaptive_kl_moves_the_coefficient(tiny):
    history = train(configure(**tiny | dict(kl_coef=0.1, kl_target=1e-3, kl_horizon=100)))["history"]
    assert history[-1]["kl_coef"] != history[1]["kl_coef"]


def test_kl_reference_at_the_last_reset(tiny):
    """From the reset of update 2 on, the penalty is measured from there: right after it, that KL is 0."""
    history = train(configure(**tiny | dict(method="reset-reference", updates=3, eval_every=1)))["history"]
    kl = [line["train_kl"] for line in history[1:]]
    assert kl[0] == 0 and kl[1] != 0 and kl[2] == 0


@pytest.mark.parametrize(
    "flags", [{}, dict(kl_reference="reset"), dict(kl_reference="ema", separate_value_model=True)]
)
def test_resumed_run_is_identical(tiny, tmp_path, flags, monkeypatch):
    whole = tiny | flags | dict(kl_coef=0.1, kl_target=1.0, output_dir=str(tmp_path / "whole"))
    train(configure(**whole))
    part = whole | dict(output_dir=str(tmp_path / "part"))

    class Killed(Exception):
        pass

    learn = TranslationGame.learn
    for stop in (2, 3, 4):  # die within update 2, then within update 3, then within update 4
        calls = iter(range(stop - 1 if stop == 2 else 1))

        def dying(self, *args, calls=calls):
            if next(calls, None) is None:
                raise Killed
            return learn(self, *args)

        monkeypatch.setattr(TranslationGame, "learn", dying)
        with pytest.raises(Killed):
            train(configure(**part | dict(resume=True)))
    monkeypatch.setattr(TranslationGame, "learn", learn)
    train(configure(**part | dict(resume=True)))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "part")
    for name in ("model", "receiver"):
        a, b = ((tmp_path / run / name / "model.safetensors").read_bytes() for run in ("whole", "part"))
        assert a == b


def test_killed_runs_are_identical_to_unkilled_ones(tiny, tmp_path):
    """SIGKILL at random moments, start-up and pretraining included; then the same metrics as without."""
    whole = tiny | dict(output_dir=str(tmp_path / "whole"), updates=30, save_every=3)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(whole), check=True, capture_output=True, env=environment)
    rng = random.Random(0)
    for attempt in range(2):
        part = whole | dict(output_dir=str(tmp_path / f"part{attempt}"), resume=True)
        process = subprocess.Popen(command(part), stdout=-3, stderr=-3, env=environment)
        wanted = rng.randrange(1, 12)  # evaluations seen before the kill
        wait_for(lambda: lines_of(tmp_path / f"part{attempt}") >= wanted or process.poll() is not None)  # noqa: B023
        process.kill()
        process.wait()
        subprocess.run(command(part), check=True, capture_output=True, env=environment)
        assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / f"part{attempt}")


def lines_of(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the run never came so far"
        time.sleep(0.02)


def test_ctrl_c_saves_and_says_how_to_go_on(tiny, tmp_path):
    flags = tiny | dict(updates=400, eval_every=1, save_every=1000)
    process = subprocess.Popen(command(flags), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: lines_of(tmp_path / "run") >= 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130 and "--resume true goes on" in errors and "Traceback" not in errors
    assert (tmp_path / "run" / "checkpoint" / "state.safetensors").exists()


def test_second_run_does_not_overwrite_the_first(tiny, tmp_path):
    train(configure(**tiny))
    with pytest.raises(ValueError, match="holds a run: go on with --resume true"):
        train(configure(**tiny))
    with pytest.raises(ValueError, match="with learning_rate 0.0002, not 0.1"):
        train(configure(**tiny | dict(resume=True, learning_rate=0.1)))
    longer = train(configure(**tiny | dict(resume=True, updates=6)))
    assert longer["end"]["update"] == 6
    with pytest.raises(ValueError, match="has done 6 updates, but --updates is 5; give more"):
        train(configure(**tiny | dict(resume=True, updates=5)))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["updates"] == 6


def test_trackers_get_both_sides_of_a_reset(tiny, monkeypatch):
    """A tracker keeps one value per name and step."""
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda self, numbers, step: logged.append((step, numbers)))
    monkeypatch.setattr(elastic_reset, "tracking", lambda config: {})
    history = train(configure(**tiny | dict(report_to="tensorboard", reset_every=2)))["history"]
    kept = {(step, name): value for step, numbers in logged for name, value in numbers.items()}
    for line in history:
        name = "before reset/reward" if line["event"] == "before reset" else "reward"
        assert kept[line["update"], name] == line["reward"]


@pytest.mark.parametrize("quantity", ["reward", "loss", "gradient", "receiver_loss"])
def test_not_finite(tiny, tmp_path, quantity, monkeypatch):
    where, name, value = {
        "reward": (TranslationGame, "reward", lambda self, prompts, responses: [float("nan")] * len(prompts)),
        "loss": (elastic_reset, "ppo_backward", lambda *args: dict(loss=float("inf"))),
        "gradient": (elastic_reset, "optimizer_step", lambda *args: dict(gradient=float("inf"))),
        "receiver_loss": (TranslationGame, "learn", lambda *args: dict(receiver_loss=float("inf"))),
    }[quantity]
    monkeypatch.setattr(where, name, value)
    with pytest.raises(
        FloatingPointError, match=f"update 1: {quantity} is (nan|inf); there is no checkpoint yet"
    ):
        train(configure(**tiny))


def test_last_good_checkpoint_is_named(tiny, monkeypatch):
    reward = TranslationGame.reward
    calls = iter([reward, reward, reward])
    nan = lambda self, prompts, responses: [float("nan")] * len(prompts)  # noqa: E731
    monkeypatch.setattr(TranslationGame, "reward", lambda self, *args: next(calls, nan)(self, *args))
    with pytest.raises(
        FloatingPointError, match="update 4: reward is nan; the last good checkpoint is that of update 3"
    ):
        train(configure(**tiny))


class Vowels:
    """A task unlike ours: a decoder that answers from scratch is paid for the letter a."""

    trained, footnote = {}, ""
    validation_prompts = ["b c", "d"] * 50

    def __init__(self):
        from transformers import GenerationConfig

        self.tokenizer = elastic_reset.train_tokenizer(["a b c d e"], 0, 16)  # pads on the right
        torch.manual_seed(0)
        self.policy = GPT2LMHeadModel(
            GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        )
        self.policy.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1)

    def prompts(self, n, update):
        return (["b c", "d", "e e e"] * n)[:n]

    def reward(self, prompts, responses):
        return [response.split().count("a") / 6 for response in responses]

    def evaluate(self, responses):
        rewards = self.reward(self.validation_prompts, responses)
        return dict(reward=sum(rewards) / len(rewards), drift=-sum(map(len, responses)) / len(responses))


def test_a_users_own_task_learns(tmp_path):
    config = configure(
        output_dir=str(tmp_path), updates=30, response_length=6, learning_rate=1e-2, reset_every=10,
        batch_size=64, mini_batch_size=32,
    )  # fmt: skip
    result = train(config, task=Vowels())
    assert result["start"]["reward"] < 0.35 and max(line["reward"] for line in result["history"]) > 0.8


def test_decoders_are_prompted_from_the_left():
    task, config = Vowels(), configure(response_length=3)
    batch, _ = elastic_reset.respond(task, ["b c", "d"], config)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]


SHORT = dict(updates=1, response_length=6, batch_size=4, mini_batch_size=4)


FINE = dict(reward=1.0, drift=1.0)


@pytest.mark.parametrize(
    "metrics, message",
    [
        (None, "gave NoneType 'None'; expected numbers by name"),
        (dict(reward=1.0), "reward and drift of them"),
        (FINE | dict(reward="high"), "gave reward str 'high'; expected a number"),
        (FINE | dict(kl=3.0), "gave 'kl', as train"),
        (FINE | dict(seconds=3.0), "gave 'seconds', as train"),
        (FINE | dict(samples=["a"]), "expected a list of {column: text}"),
    ],
)
def test_an_evaluation_is_checked_before_training(tmp_path, metrics, message):
    task = Vowels()
    task.evaluate = lambda responses: metrics
    with pytest.raises(ValueError, match=message):
        train(configure(output_dir=str(tmp_path), **SHORT), task=task)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "first, later, error, message",
    [
        (dict(samples=[dict(a=1)]), dict(samples=[]), ValueError, "gave other samples than first"),
        (dict(samples=[dict(a=1)]), dict(samples=[dict(b=1)]), ValueError, "gave other samples than first"),
        ({}, dict(drift=math.nan), FloatingPointError, "drift is nan"),
    ],
)
def test_later_evaluations_are_checked_too(tmp_path, first, later, error, message):
    task, answers = Vowels(), iter([FINE | first, FINE | later])
    task.evaluate = lambda responses: next(answers)
    with pytest.raises(error, match=message):
        train(configure(output_dir=str(tmp_path), **SHORT), task=task)


def test_what_may_differ_between_evaluations(tmp_path, capsys):
    task = Vowels()
    answers = [dict(acc=1, samples=[dict(a=1, b=2)]), dict(samples=[dict(b=3, a=1)])]
    answers = iter([FINE | answer for answer in answers])
    task.evaluate = lambda responses: next(answers)
    task.reward = lambda prompts, responses: torch.ones(len(prompts), requires_grad=True) * 2
    end = train(configure(output_dir=str(tmp_path), **SHORT), task=task)["end"]
    assert "acc" not in end and "acc" not in capsys.readouterr().out
    assert "| 1 | **3** |" in (tmp_path / "samples.md").read_text()


def test_an_adapter_of_the_embeddings(tmp_path):
    from peft import LoraConfig, get_peft_model

    task = Vowels()
    task.policy = get_peft_model(task.policy, LoraConfig(r=2, target_modules=["c_attn", "wte"]))
    task.evaluate = lambda responses: FINE
    assert train(configure(output_dir=str(tmp_path), **SHORT), task=task)["end"]["kl"] != 0


def test_a_metric_with_the_name_of_one_of_trainings_counts(tmp_path):
    task = Vowels()
    task.evaluate = lambda responses: FINE | dict(entropy=-5)
    end = train(configure(output_dir=str(tmp_path), **SHORT), task=task)["end"]
    assert end["entropy"] == -5 and "policy_loss" in end


UNUSABLE = {
    "no footnote": (dict(footnote=None), "Vowels has no footnote"),
    "no validation prompts": (dict(validation_prompts=[]), "validation_prompts is empty"),
    "a taken name": (dict(trained=dict(optimizer=None)), "trained names 'optimizer', as train"),
    "too few prompts": (dict(prompts=lambda n, update: ["b"]), "1 of str; expected batch_size .4. of str"),
    "no text": (dict(prompts=lambda n, update: [3] * n), "4 of int; expected batch_size .4. of str"),
    "an empty prompt": (dict(prompts=lambda n, update: ["b", "", "b", "b"]), "prompt '' has no tokens"),
    "a long prompt": (dict(prompts=lambda n, update: ["b " * 65] * n), "has 66 tokens; expected max_length"),
    "no positions": (
        dict(prompts=lambda n, update: ["b " * 30] * n),
        "take 36 positions, but the policy has 32",
    ),
    "no numbers": (
        dict(reward=lambda prompts, responses: [None] * 4),
        "gave list .*; expected a list of num",
    ),
    "a generator": (dict(reward=lambda prompts, responses: (1 for _ in prompts)), "expected a list of num"),
    "a number": (dict(learn=lambda prompts, responses: 3), "learn.. gave int '3'; expected numbers by name"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_tasks(tmp_path, name, monkeypatch):
    changes, message = UNUSABLE[name]
    task = Vowels()
    task.evaluate = lambda responses: FINE
    if name == "no footnote":
        monkeypatch.delattr(Vowels, "footnote")
    else:
        vars(task).update(changes)
    if name == "an empty prompt":
        task.tokenizer = elastic_reset.train_tokenizer(["a b c d e"], 0, 16, append_eos=False)
    with pytest.raises(ValueError, match=message):
        train(configure(output_dir=str(tmp_path), **SHORT), task=task)


def test_a_tokenizer_that_pads_with_an_unknown_token(tmp_path):
    task = Vowels()
    task.tokenizer.add_special_tokens(dict(pad_token="<new>"))
    with pytest.raises(ValueError, match="pads with token 8, but the policy has 8"):
        train(configure(output_dir=str(tmp_path), **SHORT), task=task)


def test_no_task(tmp_path):
    with pytest.raises(ValueError, match="got no task"):
        train(configure(output_dir=str(tmp_path), **SHORT))


def test_a_run_stopped_between_evaluations_ends_in_one(tiny, tmp_path, capsys):
    train(configure(**tiny | dict(updates=3, save_every=1)))
    (tmp_path / "run" / "samples.md").unlink()  # as if stopped after update 3
    checkpoint = tmp_path / "run" / "checkpoint" / "state.safetensors"
    counters, tensors = elastic_reset.read_checkpoint(checkpoint)
    counters["history"] = [line for line in counters["history"] if line["update"] < 3]
    elastic_reset.write_safetensors(checkpoint, tensors, counters)
    result = train(configure(**tiny | dict(updates=3, save_every=1, resume=True)))
    assert result["end"]["update"] == 3 and result["end"]["kl"] != 0
    train(configure(**tiny | dict(reset_every=99, output_dir=str(tmp_path / "none"))))
    assert "no reset: reset_every is 99, updates 4" in capsys.readouterr().out


def test_numbers_and_samples_of_other_types(tmp_path):
    task = Vowels()
    rows = [dict(number=3, nothing=None)]
    task.evaluate = lambda responses: dict(reward=torch.tensor(1.5), drift=2, samples=rows)
    train(configure(output_dir=str(tmp_path), **SHORT), task=task)
    assert metrics_of(tmp_path)[0]["reward"] == 1.5
    assert "- number: 3\n- nothing: None" in (tmp_path / "samples.md").read_text()


def test_wrong_number_of_rewards(tmp_path):
    task = Vowels()
    task.reward = lambda prompts, responses: [1.0]
    config = configure(
        output_dir=str(tmp_path), updates=1, response_length=6, batch_size=4, mini_batch_size=4
    )
    task.evaluate = lambda responses: dict(reward=0.0, drift=0.0)
    with pytest.raises(ValueError, match="expected one for each of 4"):
        train(config, task=task)


def test_two_processes(tiny, tmp_path):
    """Two gloo processes share the batch, pretrain once, end with one policy, and resume exactly."""
    flags = tiny | dict(kl_coef=0.1, kl_target=1e-3, kl_horizon=100, d_model=24)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(place, updates):
        own = flags | dict(output_dir=str(tmp_path / place), updates=updates, resume=True)
        argv = [*launch, str(random.Random(place).randrange(20_000, 60_000)), *command(own)[1:]]
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    run("whole", 4)
    run("part", 2)
    run("part", 4)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "part")
    alone = train(configure(**flags | dict(output_dir=str(tmp_path / "alone"))))["history"]
    assert metrics_of(tmp_path / "whole")[0]["reward"] == pytest.approx(alone[0]["reward"], abs=1e-4)
    assert metrics_of(tmp_path / "whole")[-1] != alone[-1]


def test_gradients_are_averaged_over_processes(tmp_path):
    """optimizer_step() on two processes with losses 1 x and 3 x moves both by the mean gradient, 2; whiten()
    and ppo_backward() count the tokens of both."""
    script = tmp_path / "two.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from accelerate import Accelerator
from elastic_reset import mean_over_processes, optimizer_step, whiten
accelerator = Accelerator()
assert accelerator.num_processes == 2
layer = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(layer.weight)
optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
factor = 1.0 + 2.0 * accelerator.process_index
accelerator.backward(factor * layer(torch.ones(1, 1)).sum())
stats = optimizer_step(accelerator, layer, optimizer, 1e9)
assert layer.weight.item() == -2.0 and stats["gradient"] == 2.0
assert mean_over_processes(dict(a=factor), accelerator) == dict(a=2.0)
numbers = torch.tensor([[1.0, 2.0, 9.0], [4.0, 7.0, -3.0]])
mask = torch.tensor([[True, True, False], [True, True, True]])
row = slice(accelerator.process_index, accelerator.process_index + 1)
own = whiten(numbers[row], mask[row], accelerator.reduce)
assert torch.allclose(own, whiten(numbers, mask)[row], atol=1e-6)
""")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29731",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, str(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_learning_of_the_embedded_game(tmp_path):
    """The default game, shortened: well above start and fixed sender, and the English no less human."""
    ends = {}
    for method in ("elastic-reset", "fixed-sender"):
        flags = dict(
            task="translation", updates=30, reset_every=15, eval_every=30, save_every=30, eval_size=128
        )
        result = train(configure(**flags, method=method, output_dir=str(tmp_path / method)))
        ends[method] = result["end"]
    start, end, fixed = result["start"], ends["elastic-reset"], ends["fixed-sender"]
    assert end["reward"] > fixed["reward"] + 0.1 > start["reward"] + 0.5
    assert end["bleu_de"] > max(start["bleu_de"], fixed["bleu_de"]) + 20
    assert end["bleu_en"] > start["bleu_en"] + 20 and end["drift"] <= start["drift"]


def test_samples_show_what_changes(tiny, tmp_path):
    train(configure(**tiny | dict(method="average-after")))
    text = (tmp_path / "run" / "samples.md").read_text()
    assert "eta" not in text and text.count("## ") == 5
    table = elastic_reset.samples_text([dict(update=0, event="", rows=[dict(a="x|y", b="same")])])
    assert table == "## 1\n\n- a: x|y\n- b: same\n\n"


def test_changed_words_are_bold():
    marked = elastic_reset.marked
    assert marked("the cat sits", "the cat sits") == "the cat sits"
    assert marked("the small small cat sat", "the cat sits") == "the **small small** cat **sat**"
    assert marked("def f():\n    return 2\n", "def f():\n    return 1") == "def f():<br>&emsp;return **2**"
    assert marked("a ** b", "a ** c") == "a ** **b**"
    assert marked("", "a b") == "" and marked("a  b", "") == "**a**  **b**"


def test_duplicate_french_counts_once(tiny, monkeypatch):
    data = elastic_reset.toy_translations()
    data["train"] = [dict(fr="un chien", en="", de="ein Hund"), dict(fr="un chien", en="", de="eine Katze")]
    monkeypatch.setattr(elastic_reset, "toy_translations", lambda: data)
    task = TranslationGame(configure(**tiny))
    assert task.german == {"un chien": "ein Hund"} and task.prompts(2, 1) == ["un chien"] * 2


def test_other_ways_of_generating_are_dropped(tmp_path):
    task = Vowels()
    task.policy.generation_config.no_repeat_ngram_size = 1
    task.policy.generation_config.min_new_tokens = 5
    config = dict(updates=1, response_length=6, batch_size=4, mini_batch_size=4)
    train(configure(output_dir=str(tmp_path / "a"), **config), task=task)
    assert task.policy.generation_config.no_repeat_ngram_size is None
    task.policy.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="names no eos_token_id"):
        train(configure(output_dir=str(tmp_path / "b"), **config), task=task)


def test_large_seeds(tiny):
    train(configure(**tiny | dict(seed=123_456_789, updates=1)))


def test_tiny_flags_are_known():
    configure(**TINY)
