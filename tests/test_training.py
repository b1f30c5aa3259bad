"""Sections 5 and 10: the loop, a run's folder, its checkpoints, interruptions, several processes."""

import functools
import importlib.util
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, contents, killed_within_update, metrics_of, refuse_training
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

import elastic_reset
from elastic_reset import METHODS, TranslationGame, configure, main, train
from tutorials.compare import to_argv


def command(flags):
    return [sys.executable, str(ROOT / "elastic_reset.py"), *to_argv(flags)]


def last_line_of(capsys):
    return capsys.readouterr().err.splitlines()[-1]


# ---- what a run leaves behind


def test_files_of_a_run(tiny, tmp_path, capsys):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    result = train(configure(**tiny | dict(learning_rate=0.05)))
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    run = tmp_path / "run"
    names = {
        "config.json",
        "metrics.jsonl",
        "samples.md",
        "curve.png",
        "model",
        "receiver",
        "checkpoint",
        ".lock",
    }
    assert {path.name for path in run.iterdir()} == names
    assert {path.name for path in (run / "checkpoint").iterdir()} == {"state.pt", "previous.pt"}
    lines = metrics_of(run)
    assert [(line["update"], line["event"]) for line in lines] == [
        (0, ""), (2, "before reset"), (2, "after reset"), (4, "before reset"), (4, "after reset"),
    ]  # fmt: skip
    assert {"reward", "drift", "bleu_de", "bleu_en", "kl"} <= lines[0].keys() and lines[0]["kl"] == 0
    assert {"entropy", "receiver_loss", "policy_kl"} <= lines[1].keys()
    assert not {"train_kl", "kl_coef"} & lines[1].keys()  # there is no KL penalty
    assert json.loads((run / "config.json").read_text())["reset_every"] == 2
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    samples = (run / "samples.md").read_text()
    assert all(f"- {column}: " in samples for column in ("French", "human English", "human German"))
    assert "- English, **update 4**: " in samples
    printed = capsys.readouterr().out
    assert "bleu_en" in printed and "nrefs:1|case:mixed|eff:no|tok:13a" in printed and str(run) in printed
    path = "foreach" if elastic_reset.ema_kernel is None else "rust"
    assert f"\nresets: 2; averages: {path}; BLEU: nrefs:1|" in printed
    assert result["start"]["update"] == 0 and result["end"]["event"] == "after reset"


def test_saved_models_begin_where_the_run_ended(tiny, tmp_path):
    end = train(configure(**tiny | dict(reset="none")))["end"]
    models = dict(model=str(tmp_path / "run" / "model"), receiver_model=str(tmp_path / "run" / "receiver"))
    again = tiny | models | dict(updates=1, output_dir=str(tmp_path / "again"))
    start = train(configure(**again))["start"]
    for name in ("reward", "drift", "bleu_de", "bleu_en"):
        assert start[name] == pytest.approx(end[name], rel=1e-5)


def test_saved_models_leave_the_run_s_own_folders_alone(tiny, tmp_path):
    config = configure(**tiny)
    task = elastic_reset.TranslationGame(config)
    task.saved_models = dict(checkpoint=(task.receiver, task.receiver_tokenizer))
    with pytest.raises(
        ValueError, match="saved_models has 'checkpoint', which is a folder of the run itself"
    ):
        train(config, task)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(tiny, method):
    own = dict(kl_coef=0.1) if method in ("ppo-kl", "ema-reference") else {}
    history = train(configure(**tiny | dict(method=method) | own))["history"]
    moved = history[-1]["kl"] != 0
    assert moved is (method not in ("fixed-sender", "reset-init"))  # the last update ends in a reset
    assert ("train_kl" in history[-1]) is (method in ("ppo-kl", "ema-reference"))


def test_a_reset_to_init_ends_at_the_start(tiny):
    history = train(configure(**tiny | dict(method="reset-init", receiver_learning_rate=0.0)))["history"]
    start, before, after = history[0], history[-2], history[-1]
    assert after["reward"] == start["reward"] and after["drift"] == start["drift"] != before["drift"]


@pytest.mark.parametrize("rhythm, times", [("update", 4), ("epoch", 8)])
def test_ema_rhythms(tiny, rhythm, times, monkeypatch):
    calls, update = [], elastic_reset.ElasticReset.update
    monkeypatch.setattr(elastic_reset.ElasticReset, "update", lambda self: (calls.append(1), update(self)))
    train(configure(**tiny | dict(ema_update=rhythm)))
    assert len(calls) == times


def test_early_stop(tiny, monkeypatch):
    passes, backward = [], elastic_reset.ppo_backward
    monkeypatch.setattr(elastic_reset, "ppo_backward", lambda *args: (passes.append(1), backward(*args))[1])
    train(configure(**tiny | dict(early_stop_kl=1e-12, num_ppo_epochs=4)))
    assert len(passes) == 4 * 2  # each update ends after its first epoch of two minibatches


@pytest.mark.parametrize("kls, goes_on", [((0.3, 0.0), False), ((0.0, 0.15), True)])
def test_early_stop_looks_at_the_mean_of_an_epoch(tiny, kls, goes_on, monkeypatch):
    """The last minibatch's KL alone would say the opposite."""
    passes, given = [], itertools.cycle(kls)
    monkeypatch.setattr(
        elastic_reset, "ppo_backward", lambda *args: passes.append(1) or dict(policy_kl=next(given))
    )
    train(configure(**tiny | dict(early_stop_kl=0.1, num_ppo_epochs=3, updates=1)))
    assert len(passes) == (3 if goes_on else 1) * 2


def test_gradient_accumulation_changes_nothing_but_memory(tiny, tmp_path, monkeypatch):
    """Every pass is cut: those of sampling's scores, of the reference, of evaluations and of gradients."""
    rows, forward, results = [], elastic_reset.ActorCritic.forward, {}

    def counting(self, batch, *args, **settings):
        rows.append(len(batch["mask"]))
        return forward(self, batch, *args, **settings)

    monkeypatch.setattr(elastic_reset.ActorCritic, "forward", counting)
    for steps in (1, 3, 100):
        rows.clear()
        flags = dict(gradient_accumulation_steps=steps, output_dir=str(tmp_path / str(steps)), kl_coef=0.1)
        results[steps] = train(configure(**tiny | flags))["end"]
        assert max(rows) == math.ceil(16 / steps)
        losses = ("policy_loss", "value_loss", "clipfrac", "gradient")
        for name in ("reward", "drift", "kl", "train_kl", *losses):
            assert results[steps][name] == pytest.approx(results[1][name], rel=1e-3, abs=1e-4)


def test_accelerate_s_own_accumulation_changes_nothing(tiny, tmp_path):
    """Its environment variable would divide each loss by four."""
    train(configure(**tiny))
    other = command(tiny | dict(output_dir=str(tmp_path / "other")))
    environment = os.environ | dict(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    subprocess.run(other, env=environment, check=True, capture_output=True)
    assert metrics_of(tmp_path / "other") == metrics_of(tmp_path / "run")


def test_adaptive_kl_follows_its_equation(tiny):
    flags = dict(kl_coef=0.1, kl_target=1e-3, reset="none", eval_every=1, learning_rate=1e-2)
    lines = train(configure(**tiny | flags))["history"][1:]
    assert lines[0]["kl_coef"] == pytest.approx(0.1) and lines[0]["train_kl"] == 0
    for line, after in zip(lines, lines[1:], strict=False):
        error = min(max(line["train_kl"] / 1e-3 - 1, -0.2), 0.2)
        assert after["kl_coef"] / line["kl_coef"] == pytest.approx(1 + error * 16 / 10_000, abs=2e-6)
    assert lines[1]["kl_coef"] < lines[0]["kl_coef"] < lines[3]["kl_coef"] + 1e-3


def test_value_learning_rate_is_the_head_s(tiny):
    config = configure(**tiny | dict(value_learning_rate=0.5, learning_rate=0.0))
    policy, accelerator = TranslationGame(config).policy, elastic_reset.processes()
    model, optimizer = elastic_reset.prepare_policy(policy, config, accelerator)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trainable)
    for name, p in trainable.items():
        assert rates[id(p)] == (0.5 if name.startswith("value.") else 0.0), name


# ---- trackers


def logged(folder):
    """{(name, update): value} of a run's event files for TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance=dict(scalars=0)).Reload()
    names = events.Tags()["scalars"]
    return {(name, event.step): event.value for name in names for event in events.Scalars(name)}


def test_tensorboard_sees_every_evaluation_and_goes_on(tiny, tmp_path):
    flags = tiny | dict(report_to="tensorboard", eval_every=1)
    train(configure(**flags | dict(updates=3)))
    expected = {}
    for history in (metrics_of(tmp_path / "run"), train(configure(**flags | dict(resume=True)))["history"]):
        for line in history:
            side = "before_reset/" if line["event"] == "before reset" else ""
            for name in line.keys() - {"update", "event", "seconds"}:
                expected[side + name, line["update"]] = line[name]
        found = logged(tmp_path / "run")
        assert found.keys() >= expected.keys() and ("before_reset/reward", 2) in expected
        assert {place: found[place] for place in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert {update for name, update in expected if name == "reward"} == {0, 1, 2, 3, 4}
    assert expected["before_reset/kl", 4] != expected["kl", 4]


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed(tiny, tmp_path, package, capsys, monkeypatch):
    find = importlib.util.find_spec
    missing = lambda name, *args: None if name == package else find(name, *args)  # noqa: E731
    refuse_training(monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    monkeypatch.setattr(TranslationGame, "__init__", lambda *args: pytest.fail("it made the task"))
    assert main(to_argv(tiny | dict(report_to=package))) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(f"report_to is {package}; that needs `pip install {package}`")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


# ---- whose folder it is


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["other files", "a file", "under a file", "a model inside", "a hub's model"])
def test_a_folder_of_others_is_refused_untouched(tiny, tmp_path, kind, resume, capsys, monkeypatch):
    run, changes = tmp_path / "run", {}
    if kind in ("a file", "under a file"):
        run.write_text("mine")
        changes = dict(output_dir=str(run / "below")) if kind == "under a file" else {}
    elif kind == "other files":
        run.mkdir()
        (run / "thesis.tex").write_text("mine")
    else:
        folder = run / "model" if kind == "a model inside" else run
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "marian"}')
        changes = dict(model=str(folder))
    before = contents(tmp_path)
    refuse_training(monkeypatch)
    assert main(to_argv(tiny | changes | dict(resume=resume))) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and str(run) in errors
    assert contents(tmp_path) == before


def test_a_folder_with_a_run_is_refused_untouched_and_resumed_when_asked(tiny, tmp_path, capsys, monkeypatch):
    train(configure(**tiny))
    before = contents(tmp_path)
    inside = dict(model=str(tmp_path / "run" / "model"), resume=True)
    with monkeypatch.context() as patch:
        refuse_training(patch)
        for changes, message in [
            ({}, "holds a run: go on with --resume true, or choose another"),
            (dict(resume=True, learning_rate=0.1), "holds a run with learning_rate 0.0002, not 0.1"),
            (inside, "holds a run with model '', not "),
            (dict(resume=True, updates=3), "has done 4 updates"),
        ]:
            capsys.readouterr()
            assert main(to_argv(tiny | changes)) == 2
            errors = capsys.readouterr().err
            assert message in errors and errors.count("\n") == 1
            assert contents(tmp_path) == before
    assert train(configure(**tiny | dict(resume=True, updates=6)))["end"]["update"] == 6
    assert json.loads((tmp_path / "run" / "config.json").read_text())["updates"] == 6


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_damaged_checkpoints(tiny, tmp_path, capsys):
    train(configure(**tiny | dict(updates=1)))
    checkpoint, trace = tmp_path / "run" / "checkpoint" / "state.pt", tmp_path / "trace"
    good, state = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)
    damages = [b"", good[: len(good) // 2], b"no checkpoint", torch.ones(2), dict(weight=torch.ones(2))]
    damages += [state | dict(history=Code(f"touch {trace}")), state | dict(parts={})]
    damages += [{name: part for name, part in state.items() if name != "history"}]
    damages += [state | dict(update="one"), state | dict(kl_coef=None), state | dict(history=[])]
    for part, name, value in [
        ("model", "value.head.bias", torch.ones(2)),
        ("model", "unknown", torch.ones(1)),
        ("task.receiver_optimizer", "param_groups", []),
        ("elastic", "updates", torch.tensor(0.5)),
    ]:
        damages.append(state | dict(parts=state["parts"] | {part: state["parts"][part] | {name: value}}))
    for part, missing in [("model", "value.head.bias"), ("elastic", "updates"), ("optimizer", "state")]:
        rest = {name: value for name, value in state["parts"][part].items() if name != missing}
        damages.append(state | dict(parts=state["parts"] | {part: rest}))
    damages.append(state | dict(parts=state["parts"] | dict(other={})))
    for damage in damages:
        if isinstance(damage, bytes):
            checkpoint.write_bytes(damage)
        else:
            torch.save(damage, checkpoint)
        before = contents(tmp_path)
        capsys.readouterr()
        assert main(to_argv(tiny | dict(resume=True))) == 2, damage
        errors = capsys.readouterr().err
        assert f"checkpoint {checkpoint} is damaged" in errors and errors.count("\n") == 1
        assert contents(tmp_path) == before and not trace.exists()


def test_the_checkpoint_before_a_damaged_one_is_used(tiny, tmp_path, capsys):
    flags = tiny | dict(updates=3)
    train(configure(**flags))
    expected, newest = metrics_of(tmp_path / "run"), tmp_path / "run" / "checkpoint" / "state.pt"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # torch alone would not notice
    newest.write_bytes(damaged)
    capsys.readouterr()
    assert main(to_argv(flags | dict(resume=True))) == 0
    assert f"checkpoint {newest} is damaged or another run's: a checksum is wrong" in capsys.readouterr().err
    assert metrics_of(tmp_path / "run") == expected
    before = torch.load(newest.with_name("previous.pt"), weights_only=True)
    assert before["update"] == 2  # the one that was used, not the damaged one


def test_a_folder_that_another_process_works_in(tiny, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
    code += "print('held', flush=True); input()"
    words = [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert main(to_argv(tiny)) == 2
        assert "another process works in " in last_line_of(capsys)
        other.communicate(b"\n")


def test_nothing_of_others_in_a_run_s_folder_is_touched(tiny, tmp_path):
    train(configure(**tiny))
    mine = tmp_path / "run" / "model" / "notes.txt"
    mine.write_text("mine")
    train(configure(**tiny | dict(updates=6, resume=True)))
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100_000])
def test_damaged_config_of_a_run(tiny, tmp_path, text, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    assert main(to_argv(tiny | dict(resume=True))) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "run" / "config.json").read_text() == text


# ---- ends before the end


@pytest.mark.parametrize("flags", [{}, dict(kl_reference="ema", separate_value_model=True)])
def test_resumed_run_is_identical(tiny, tmp_path, flags, monkeypatch):
    whole = tiny | flags | dict(kl_coef=0.1, kl_target=1.0, output_dir=str(tmp_path / "whole"))
    train(configure(**whole))
    part = whole | dict(output_dir=str(tmp_path / "part"), resume=True)

    for number in (2, 1, 1):  # die within update 2, then within update 2 and 3, the first after resuming
        killed_within_update(number, functools.partial(train, configure(**part)), monkeypatch)
        part |= dict(save_every=2)  # may be changed on the way
    train(configure(**part))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "part")
    for name in ("model", "receiver"):
        a, b = ((tmp_path / run / name / "model.safetensors").read_bytes() for run in ("whole", "part"))
        assert a == b


def test_killed_run_is_identical_to_an_unkilled_one(tiny, tmp_path):
    """SIGKILL twice, at random moments; then the same metrics as without."""
    whole = tiny | dict(output_dir=str(tmp_path / "whole"), updates=20, save_every=3)
    train(configure(**whole))
    part, rng = whole | dict(output_dir=str(tmp_path / "part"), resume=True), random.Random(0)
    for evaluations in (3, 9):
        process = subprocess.Popen(command(part), stdout=-3, stderr=-3)
        wait_for(lambda: lines_of(tmp_path / "part") >= evaluations)  # noqa: B023
        time.sleep(rng.random() / 4)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    train(configure(**part))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "part")


def lines_of(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the run never came so far"
        time.sleep(0.02)


@pytest.fixture
def heeded_signals():
    """Signals do what they do in a terminal, even if the tests were started by nohup or behind &."""
    handlers = {s: signal.SIG_DFL for s in (signal.SIGTERM, signal.SIGHUP)}
    handlers[signal.SIGINT] = signal.default_int_handler
    before = {s: signal.signal(s, handler) for s, handler in handlers.items()}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


def signalled(monkeypatch, *signals):
    """Sends these to the process while an update is at work."""
    learn, left = TranslationGame.learn, list(signals)

    def learn_and_signal(self, *args):
        while left:
            signal.raise_signal(left.pop())
        return learn(self, *args)

    monkeypatch.setattr(TranslationGame, "learn", learn_and_signal)


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_saves_says_how_to_go_on_and_does(tiny, tmp_path, number, capsys, monkeypatch):
    flags = tiny | dict(save_every=1000)
    train(configure(**flags | dict(output_dir=str(tmp_path / "whole"))))
    signalled(monkeypatch, number)
    assert main(to_argv(flags)) == 128 + number
    assert "stopped after update 1; --resume true goes on" in last_line_of(capsys)
    assert (tmp_path / "run" / "checkpoint" / "state.pt").exists()
    assert main(to_argv(flags | dict(resume=True))) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


@pytest.mark.usefixtures("heeded_signals")
def test_a_second_ctrl_c_does_not_wait(tiny, tmp_path, capsys, monkeypatch):
    signalled(monkeypatch, signal.SIGINT, signal.SIGINT)
    assert main(to_argv(tiny)) == 130
    assert last_line_of(capsys).endswith("KeyboardInterrupt")
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize("updates", [1, 3])
def test_a_run_stopped_between_evaluations_can_end_there(tiny, updates, capsys, monkeypatch):
    flags, save = tiny | dict(updates=6), elastic_reset.Run.save_if_due

    def stopping(self):
        self.stop = float(self.update == updates)
        save(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(elastic_reset.Run, "save_if_due", stopping)
        train(configure(**flags))
    end = train(configure(**flags | dict(updates=updates, resume=True)))["end"]
    assert end["update"] == updates and end["kl"] != 0


@pytest.mark.parametrize("quantity", ["train_reward", "loss", "gradient", "receiver_loss"])
def test_not_finite(tiny, quantity, capsys, monkeypatch):
    where, name, value = {
        "train_reward": (TranslationGame, "reward", lambda self, prompts, _: [math.nan] * len(prompts)),
        "loss": (elastic_reset, "ppo_backward", lambda *args: dict(loss=math.inf)),
        "gradient": (elastic_reset, "optimizer_step", lambda *args: dict(gradient=math.inf)),
        "receiver_loss": (TranslationGame, "learn", lambda *args: dict(receiver_loss=math.inf)),
    }[quantity]
    monkeypatch.setattr(where, name, value)
    assert main(to_argv(tiny)) == 1
    error = last_line_of(capsys)
    assert re.search(rf"update 1: {quantity} is (nan|inf); checkpoints, if any yet, are in ", error)


def test_last_good_checkpoint_is_named_and_good(tiny, tmp_path, capsys, monkeypatch):
    reward = TranslationGame.reward
    calls = iter([reward] * 3)
    nan = lambda self, prompts, responses: [float("nan")] * len(prompts)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(TranslationGame, "reward", lambda self, *args: next(calls, nan)(self, *args))
        assert main(to_argv(tiny)) == 1
    expected = f"update 4: train_reward is nan; checkpoints, if any yet, are in {tmp_path / 'run'}"
    assert expected in last_line_of(capsys)
    assert train(configure(**tiny | dict(resume=True)))["end"]["update"] == 4


def test_a_full_disk_is_named_and_the_checkpoint_before_stays(tiny, capsys):
    """A limit on the size of files stands for the disk."""
    assert main(to_argv(tiny | dict(updates=2))) == 0
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
    try:
        assert main(to_argv(tiny | dict(resume=True))) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert "File too large" in last_line_of(capsys)
    assert train(configure(**tiny | dict(resume=True)))["end"]["update"] == 4


# ---- a user's own task

SHORT = dict(updates=1, response_length=6, batch_size=4, mini_batch_size=4)


class Vowels:
    """A task unlike ours: a decoder that answers from scratch is paid for the letter a."""

    validation_prompts = ["b c", "d"] * 50

    def __init__(self, config=None):
        self.tokenizer = elastic_reset.train_tokenizer(["a b c d e"], configure())  # it pads on the right
        torch.manual_seed(0)
        shape = GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        self.policy = GPT2LMHeadModel(shape)
        self.policy.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1)

    def prompts(self, n, update):
        return (["b c", "d", "e e e"] * n)[:n]

    def reward(self, prompts, responses):
        return [response.split().count("a") / 6 for response in responses]

    def evaluate(self, responses):
        rewards = self.reward(self.validation_prompts, responses)
        drift = -sum(map(len, responses)) / len(responses)
        return dict(reward=sum(rewards) / len(rewards), drift=drift, samples=dict(a=responses))


def test_a_users_own_task_learns_in_a_thread_too(tmp_path):
    config = configure(
        output_dir=str(tmp_path), updates=30, response_length=6, learning_rate=1e-2, reset_every=10,
        batch_size=64, mini_batch_size=32,
    )  # fmt: skip
    results = []
    thread = threading.Thread(target=lambda: results.append(train(config, task=Vowels())))
    thread.start()
    thread.join()
    [result] = results
    assert result["start"]["reward"] < 0.35 and max(line["reward"] for line in result["history"]) > 0.8


def test_a_fourth_task_needs_no_more_than_its_class(tmp_path, monkeypatch, capsys):
    class Letters(Vowels):
        preset = SHORT | dict(updates=2, learning_rate=0.03)

    monkeypatch.setitem(elastic_reset.TASKS, "letters", Letters)
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "; qa 120; letters 2)" in text and "; letters 0.03)" in text
    others = dict(lora_r=4, reward_model="x", receiver_data=["y"], programs="z")  # of single tasks of ours
    assert main(to_argv(dict(task="letters", output_dir=str(tmp_path / "run")) | others)) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings | Letters.preset | others | dict(task="letters") == settings
    assert metrics_of(tmp_path / "run")[-1]["update"] == 2


@pytest.mark.parametrize("error", [KeyError("word"), RuntimeError("of a library"), TypeError("None")])
def test_a_mistake_in_a_task_is_shown_as_python_shows_it(tiny, error, monkeypatch):
    def reward(self, prompts, responses):
        raise error

    monkeypatch.setattr(TranslationGame, "reward", reward)
    with pytest.raises(type(error)) as raised:
        main(to_argv(tiny))
    assert raised.value is error and raised.traceback[-1].name == "reward"


class WithHelper(Vowels):
    """A second model learns too, under names that a run itself uses."""

    def __init__(self, config=None):
        super().__init__()
        self.helper = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
        self.trained = dict(model=self.helper, optimizer=torch.optim.AdamW(self.helper.parameters(), 0.01))

    def learn(self, prompts, responses):
        loss = self.helper(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss
        loss.backward()
        self.trained["optimizer"].step()
        self.trained["optimizer"].zero_grad()
        return dict(helper_loss=loss.item())


def test_a_second_model_is_resumed_and_saved_where_it_is_to_be(tmp_path):
    flags, ends = SHORT | dict(eval_every=1), {}
    for place, updates, resume in [("whole", 4, False), ("part", 2, False), ("part", 4, True)]:
        task = WithHelper()
        if place == "part":
            own = elastic_reset.train_tokenizer(["x y z"], configure())
            task.saved_models = dict(helper=(task.helper, own))
        config = configure(output_dir=str(tmp_path / place), **flags | dict(updates=updates, resume=resume))
        train(config, task=task)
        ends[place] = task.helper.state_dict()
    torch.testing.assert_close(ends["part"], ends["whole"], rtol=0, atol=0)
    assert metrics_of(tmp_path / "part") == metrics_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "part")[-1]["helper_loss"] < metrics_of(tmp_path / "part")[1]["helper_loss"]

    folders = {place: {p.name for p in (tmp_path / place).iterdir() if p.is_dir()} for place in ends}
    assert folders == dict(whole={"model", "checkpoint"}, part={"model", "checkpoint", "helper"})
    for name, word, width in (("model", "a", 16), ("helper", "x", 8)):
        assert GPT2LMHeadModel.from_pretrained(tmp_path / "part" / name).config.n_embd == width
        assert word in AutoTokenizer.from_pretrained(tmp_path / "part" / name).get_vocab()


def test_a_module_under_two_names_is_trained(tmp_path):
    """Two blocks share their feed-forward layers, and the penalty's reference looks through both."""
    task = Vowels()
    task.policy = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    task.policy.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1)
    first, second = task.policy.transformer.h
    second.mlp = first.mlp
    parameters = dict(task.policy.named_parameters(remove_duplicate=False))
    before = {name: p.detach().clone() for name, p in first.mlp.named_parameters()}
    task.policy.save_pretrained = lambda folder: folder.mkdir()  # safetensors would not take shared tensors
    train(configure(output_dir=str(tmp_path), **SHORT | dict(updates=3, kl_coef=0.1)), task=task)
    assert second.mlp is first.mlp
    for name, p in task.policy.named_parameters(remove_duplicate=False):
        assert p is parameters[name], name
    for name, p in first.mlp.named_parameters():
        assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize("adapter", [False, True])
def test_a_policy_keeps_its_own_ways_of_generating(tmp_path, adapter):
    from peft import LoraConfig, get_peft_model

    own = dict(do_sample=True, top_p=0.8, temperature=0.6, repetition_penalty=1.3, max_new_tokens=7)
    task = Vowels()
    ways = task.policy.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1, **own)
    before, base = ways.to_dict(), task.policy
    if adapter:
        task.policy = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    train(configure(output_dir=str(tmp_path), **SHORT | dict(kl_coef=0.1)), task=task)
    assert base.generation_config is task.policy.generation_config is ways and ways.to_dict() == before
    if not adapter:
        delivered = json.loads((tmp_path / "model" / "generation_config.json").read_text())
        assert delivered | own | dict(pad_token_id=0, eos_token_id=1) == delivered


def test_the_model_s_own_ways_of_generating_are_dropped_and_entropy_is_estimated(tmp_path):
    """A policy without a preference, but for the two tokens that its model never generates: log 7 nats."""
    task, answers, evaluate = Vowels(), [], Vowels.evaluate
    torch.nn.init.zeros_(task.policy.lm_head.weight)
    task.policy.generation_config.suppress_tokens = [3, 4]
    task.policy.generation_config.min_new_tokens = 5
    task.evaluate = lambda responses: (answers.extend(responses), evaluate(task, responses))[1]
    flags = SHORT | dict(updates=3, seed=2**40, learning_rate=0.0)
    end = train(configure(output_dir=str(tmp_path), **flags), task=task)["end"]
    assert end["entropy"] == pytest.approx(math.log(7), abs=1e-5)  # all but padding
    words = [answer.split() for answer in answers]
    assert {word for answer in words for word in answer} == set("abcde") and [] in words


def test_decoders_are_prompted_from_the_left():
    task = Vowels()
    batch, _ = elastic_reset.respond(task.policy, task.tokenizer, ["b c", "d"], response_length=3)
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]  # without the EOS that it appends


UNUSABLE = {
    "too few prompts": (dict(prompts=lambda n, update: ["b"]), r"prompts\(\) gave 1; expected 4"),
    "no text": (dict(prompts=lambda n, update: [3] * n), "text input must be of type"),
    "long prompts": (dict(prompts=lambda n, update: ["b " * 27] * n), "27 tokens; expected 1 to 26"),
    "too few rewards": (dict(reward=lambda *_: [1.0]), r"reward\(\) gave .*; expected 4 numbers"),
    "no rewards": (
        dict(reward=lambda *_: [None] * 4),
        r"reward\(\) gave .*; expected 4 numbers",
    ),
    "no drift": (dict(evaluate=lambda responses: dict(reward=1.0)), "drift"),
    "words": (dict(evaluate=lambda responses: dict(reward="high", drift=1.0)), "high"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_tasks(tmp_path, name):
    changes, message = UNUSABLE[name]
    task = Vowels()
    task.evaluate = lambda responses: dict(reward=1.0, drift=1.0)
    vars(task).update(changes)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        train(configure(output_dir=str(tmp_path), **SHORT), task=task)


def test_a_policy_that_names_no_eos(tmp_path):
    task = Vowels()
    task.policy.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"model.generation_config names .*eos_token_id.: .None"):
        train(configure(output_dir=str(tmp_path), **SHORT), task=task)


def test_prompts_without_tokens_and_tokenizers_without_padding(tmp_path):
    task = Vowels()
    task.tokenizer = elastic_reset.train_tokenizer(["a b c d e"], configure(), append_eos=False)
    task.prompts = lambda n, update: ["b", "", "b", "b"]
    with pytest.raises(ValueError, match="prompts have 0 to 1 tokens; expected 1 to 26"):
        train(configure(output_dir=str(tmp_path / "a"), **SHORT), task=task)
    task = Vowels()
    task.tokenizer.pad_token = None  # padding is the model's own
    assert train(configure(output_dir=str(tmp_path / "b"), **SHORT), task=task)["end"]["update"] == 1


def test_no_task(tmp_path):
    with pytest.raises(ValueError, match="expected translation, imdb, qa or your own task"):
        train(configure(output_dir=str(tmp_path), **SHORT))


def test_rewards_as_tensors_and_samples_of_other_types(tmp_path, capsys):
    task = Vowels()
    task.reward = lambda prompts, responses: torch.ones(len(prompts), requires_grad=True) * 2
    answers = [dict(number=[3, 4], nothing=[None, None]), dict(nothing=[None, None], number=[3, 5])]
    answers = iter([dict(reward=torch.tensor(1.5), drift=2, samples=answer) for answer in answers])
    task.evaluate = lambda responses: next(answers)
    end = train(configure(output_dir=str(tmp_path), **SHORT), task=task)["end"]
    assert end["reward"] == 1.5 and end["train_reward"] == 2
    samples = (tmp_path / "samples.md").read_text()
    assert "## 1\n\n- number: 3\n- nothing: None\n" in samples
    assert "## 2\n\n- number: 4\n- number, **update 1**: 5\n- nothing: None\n" in samples
    assert "resets: 0; averages:" in capsys.readouterr().out


def test_an_adapter_of_the_embeddings(tmp_path):
    from peft import LoraConfig, get_peft_model

    task = Vowels()
    task.policy = get_peft_model(task.policy, LoraConfig(r=2, target_modules=["c_attn", "wte"]))
    assert train(configure(output_dir=str(tmp_path), **SHORT), task=task)["end"]["kl"] != 0


# ---- several processes


TWO = """
import sys
import time
import torch
import elastic_reset
from elastic_reset import Run, configure, main, optimizer_step, processes
from tutorials.compare import to_argv
accelerator = processes()
assert accelerator.num_processes == 2
layer = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(layer.weight)
optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
factor = 1.0 + 2.0 * accelerator.process_index
accelerator.backward(factor * layer(torch.ones(1, 1)).sum())
stats = optimizer_step(layer, optimizer, configure(max_grad_norm=1e9), accelerator)
assert layer.weight.item() == -2.0 and stats["gradient"] == 2.0
flags = FLAGS
time.sleep(2 * accelerator.is_main_process)  # the other one must not train: it would save no weights
pairs, config = [("a b", "b a")], configure(**flags | dict(d_model=8))
loss = elastic_reset.likelihood_loss
folder = elastic_reset.pretrained(
    "other", "Seq2SeqLM", pairs, loss, updates=1, config=config, family="marian", texts=["a b"]
)
elastic_reset.load_model("other", folder, "Seq2SeqLM", config)
for place, updates in [("whole", 4), ("part", 2), ("part", 4)]:
    assert main(to_argv(flags | dict(output_dir=f"{place}", updates=updates, resume=True))) == 0
for task in ("imdb", "qa"):
    assert main(to_argv(flags | dict(task=task, output_dir=task, updates=2))) == 0
n = 3 + accelerator.process_index  # the longest response of this process
batch = dict(mask=torch.ones(2, n, dtype=torch.bool), values=torch.ones(2, n), scores=torch.zeros(2))
whole = Run(configure(output_dir="widths", batch_size=4, mini_batch_size=4)).gathered(batch)
assert whole["mask"].dtype == torch.bool and whole["mask"].sum(1).tolist() == [3, 4, 3, 4]
assert whole["values"].sum(1).tolist() == [3, 4, 3, 4] and whole["scores"].shape == (4,)
try:
    Run(configure(output_dir="odd", batch_size=65))
except ValueError as error:
    assert "multiples of the 2 processes" in str(error)
else:
    raise AssertionError("an odd batch")
"""


def test_two_processes_do_what_one_does(tiny, tmp_path):
    """Two gloo processes share each batch and give the numbers of one, up to the order of sums; what they
    resume is identical."""
    flags = tiny | dict(kl_coef=0.1, kl_target=1e-3, d_model=24, entropy_coef=0.01)
    flags.pop("output_dir", None)
    script, launch = tmp_path / "two.py", [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script.write_text(TWO.replace("FLAGS", repr(flags)))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command, how = [*launch, "--nproc_per_node", "2", str(script)], dict(capture_output=True, text=True)
    done = subprocess.run(command, **how, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "part")
    for place, other in (("whole", {}), ("imdb", dict(task="imdb")), ("qa", dict(task="qa"))):
        two = metrics_of(tmp_path / place)
        own = flags | other | dict(output_dir=str(tmp_path / "one" / place), updates=two[-1]["update"])
        one = train(configure(**own))["history"]
        for line, same in zip(two, one, strict=True):
            assert line.pop("event") == same["event"]
            numbers = {name: same[name] for name in line}
            assert line == pytest.approx(numbers, rel=1e-3, abs=1e-4), (place, line["update"])


# ---- what it is all for


def test_learning_of_the_embedded_game(tmp_path):
    """The default game up to its first reset: far above the fixed sender, with hardly any drift."""
    flags = dict(updates=100, eval_every=100, eval_size=128)
    ends = {}
    for method in ("elastic-reset", "fixed-sender"):
        result = train(configure("translation", method, **flags, output_dir=str(tmp_path / method)))
        ends[method] = result["end"]
    start, end, fixed = result["start"], ends["elastic-reset"], ends["fixed-sender"]
    assert end["reward"] > fixed["reward"] + 0.1 > start["reward"] + 1
    assert end["bleu_de"] > max(start["bleu_de"], fixed["bleu_de"]) + 15
    assert end["bleu_en"] > start["bleu_en"] + 15 and end["drift"] < 1.3 * start["drift"]
