"""tutorials/baselines.py: S2P and SIL, on runs of the embedded game that take seconds."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, killed_within_update, metrics_of

import elastic_reset
from elastic_reset import configure, likelihood_loss, shuffled
from tutorials.baselines import (
    SeededIteratedLearning,
    SupervisedSelfPlay,
    configure_baseline,
    main,
    parse,
    train_baseline,
)
from tutorials.compare import finished, to_argv


def test_s2p_without_weight_is_the_method_itself(tiny, tmp_path):
    """A second loss of weight 0 changes nothing, whatever else is switched on."""
    many = dict(method="elastic-reset", kl_coef=0.1, kl_target=1.0, kl_reference="ema", ema_update="epoch")
    for i, flags in enumerate((dict(method="ppo"), many | dict(early_stop_kl=1e-9, mini_batch_size=6))):
        plain = tiny | flags | dict(output_dir=str(tmp_path / f"plain {i}"))
        elastic_reset.train(configure(**plain))
        s2p = plain | dict(output_dir=str(tmp_path / f"s2p {i}"), s2p_coef=0.0)
        train_baseline(configure_baseline("S2P", **s2p))
        lines = metrics_of(tmp_path / f"s2p {i}")
        assert all(line.pop("s2p_loss") > 0 for line in lines[1:])
        assert lines == metrics_of(tmp_path / f"plain {i}")


def test_s2p_adds_its_gradient(tiny):
    config = configure_baseline("S2P", **tiny | dict(s2p_coef=3.0))
    task = SupervisedSelfPlay(config)
    task.policy.zero_grad()
    pairs = shuffled(task.sender_pairs, 4, 1, config.seed)
    texts = [list(column) for column in zip(*pairs, strict=True)]
    loss = likelihood_loss(task.policy, task.tokenizer, *texts, config.max_length)
    p = task.policy.get_output_embeddings().weight
    expected = 1 + 3 * torch.autograd.grad(loss, p)[0]
    p.grad = torch.ones_like(p)
    assert task.backward(4) == dict(s2p_loss=loss.item())
    torch.testing.assert_close(p.grad, expected)
    assert task.backward(4) != dict(s2p_loss=loss.item())  # other pairs


def test_s2p_keeps_the_sender_near_its_pretraining(tiny, tmp_path):
    game = tiny | dict(updates=10, eval_every=10, learning_rate=5e-3, pretrain_updates=60)
    drift = {}
    for coef in (0.0, 5.0):
        config = configure_baseline("S2P", **game | dict(s2p_coef=coef, output_dir=str(tmp_path / f"{coef}")))
        drift[coef] = train_baseline(config)["end"]["drift"]
    assert drift[5.0] < drift[0.0] - 0.1


def test_s2p_needs_pairs(tiny, tmp_path):
    trained = elastic_reset.train(configure(**tiny))["output_dir"]
    models = dict(model=f"{trained}/model", receiver_model=f"{trained}/receiver")
    rows = [dict(fr=f"un {i}", en=f"one {i}", de=f"ein {i}") for i in range(20)]
    for split in ("train", "validation"):
        (tmp_path / "data").mkdir(exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines)
    flags = tiny | models | dict(data=str(tmp_path / "data"), output_dir=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="pretraining pairs; name them by --sender_data"):
        train_baseline(configure_baseline("S2P", **flags))


def weights_of(model):
    return [p.clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_generation(tiny):
    """The students stay as they were while the teachers play; then they imitate them and replace them."""
    how = dict(sil_every=2, sil_sender_steps=30, sil_receiver_steps=30, sil_batch_size=16)
    config = configure_baseline(
        "SIL", **tiny | how | dict(sil_learning_rate=1e-2, receiver_learning_rate=0.1)
    )
    task = SeededIteratedLearning(config)
    sender, receiver = task.students["sender"], task.students["receiver"]
    start = weights_of(sender), weights_of(receiver)
    french = task.prompts(16, 1)
    with torch.no_grad():  # what PPO would do to the teacher
        for p in task.policy.parameters():
            p += 0.3 * torch.randn_like(p) * p.requires_grad
    stats = task.learn(french, ["a"] * 16)
    assert "sil_sender_loss" not in stats and not same(start[1], weights_of(task.receiver))
    assert same(start[0], weights_of(sender)) and same(start[1], weights_of(receiver))
    teachers = weights_of(task.policy), weights_of(task.receiver)

    english = elastic_reset.translate(
        task.policy, task.tokenizer, french, 64, response_length=config.response_length
    )
    first = likelihood_loss(sender, task.tokenizer, french, english, 64).item()
    stats = task.learn(french, ["a"] * 16)
    assert likelihood_loss(sender, task.tokenizer, french, english, 64).item() < 0.5 * first
    assert stats["sil_sender_loss"] > 0 and stats["sil_receiver_loss"] > 0
    for student, place, before, teacher in zip(
        (sender, receiver), (task.policy, task.receiver), start, teachers, strict=True
    ):
        now = weights_of(place)
        assert same(now, weights_of(student)) and not same(now, before) and not same(now, teacher)


def test_without_imitation_a_generation_is_a_return_to_the_start(tiny):
    flags = tiny | dict(sil_every=2, sil_sender_steps=0, sil_receiver_steps=0, eval_every=1)
    start, after_1, after_2, after_3, after_4 = train_baseline(configure_baseline("SIL", **flags))["history"]
    for name in ("reward", "drift", "kl"):
        assert after_2[name] == after_4[name] == start[name]
        assert start[name] not in (after_1[name], after_3[name])


SMALL = {
    "S2P": dict(s2p_coef=1.0),
    "SIL": dict(sil_every=3, sil_sender_steps=2, sil_receiver_steps=2, sil_batch_size=8, sil_temperature=0.5),
}


@pytest.mark.parametrize("baseline", SMALL)
def test_a_resumed_run_is_identical(tiny, tmp_path, baseline, monkeypatch):
    """Stopped within the update before a generation's last, in its last, and in the one behind it."""
    flags = tiny | SMALL[baseline] | dict(updates=6, eval_every=1)
    whole = configure_baseline(baseline, **flags | dict(output_dir=str(tmp_path / "whole")))
    train_baseline(whole)
    part = configure_baseline(baseline, **flags | dict(output_dir=str(tmp_path / "part"), resume=True))

    for _ in range(3):
        killed_within_update(2, lambda: train_baseline(part), monkeypatch)
    train_baseline(part)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "part")
    for name in ("model", "receiver"):
        a, b = ((tmp_path / run / name / "model.safetensors").read_bytes() for run in ("whole", "part"))
        assert a == b


@pytest.mark.parametrize("baseline", SMALL)
def test_the_command_line_and_its_folder(tiny, tmp_path, baseline, capsys):
    flags = tiny | SMALL[baseline]
    assert main([baseline, *to_argv(flags)]) == 0
    run = tmp_path / "run"
    files = {"config.json", "metrics.jsonl", "samples.md", "curve.png", "model", "receiver", "checkpoint"}
    assert {path.name for path in run.iterdir()} - {".lock"} == files
    before = json.loads((run / "config.json").read_text())
    assert before["method"] == "ppo" and before | SMALL[baseline] == before
    assert finished(configure_baseline(baseline, **flags))
    name, value = next(iter(SMALL[baseline].items()))
    assert not finished(configure_baseline(baseline, **flags | {name: value + 1}))
    capsys.readouterr()
    assert main([baseline, *to_argv(flags | dict(resume=True)), f"--{name}", str(value + 1)]) == 2
    assert f"holds a run with {name} {value!r}, not {value + 1!r}" in capsys.readouterr().err
    again = ["--config", str(run / "config.json"), "--updates", "5", "--resume", "true"]
    assert main([baseline, *again]) == 0
    assert metrics_of(run)[-1]["update"] == 5


def test_a_file_stands_below_the_method_and_flags_above(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("s2p_coef: 3\nkl_coef: 0.3\nkl_target: 2\nlearning_rate: 1e-5\n")

    def config(*words):
        baseline, given = parse(["S2P", "--config", str(file), *words])
        return configure_baseline(baseline, **given)

    plain = config()
    assert (plain.method, plain.s2p_coef, plain.learning_rate) == ("ppo", 3.0, 1e-5)
    assert (plain.kl_coef, plain.kl_target) == (0.0, 0.0)
    assert (config("--kl_coef", "0.1").kl_coef, config("--s2p_coef", "4").s2p_coef) == (0.1, 4.0)
    assert (config("--method", "ppo-kl").kl_coef, config("--method", "ppo-kl").kl_target) == (0.3, 2.0)
    file.write_text("sil_every: 3")
    with pytest.raises(ValueError, match="settings.yaml: there is no setting sil_every"):
        config()
    for wrong in ("a: [", "- a"):
        file.write_text(wrong)
        with pytest.raises(ValueError, match="settings.yaml"):
            config()


def exit_code(main, words):
    """What main() returns for these flags, or exits with."""
    try:
        return main(words.split())
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "required: baseline"),
        ("S3", "invalid choice: 'S3'"),
        ("S2P --s2p_coef -1", "s2p_coef is -1.0; expected"),
        ("S2P --s2p_coef much", "invalid float value: 'much'"),
        ("S2P --sil_every 3", "sil_every is not a setting of S2P"),
        ("SIL --sil_every 0", "sil_every is 0; expected"),
        ("SIL --task qa", "--task is qa; SIL is a baseline of translation alone"),
        ("SIL --nothing 1", "unrecognized arguments: --nothing 1"),
    ],
)
def test_bad_flags_are_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(main, words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert error.startswith(("baselines.py: ", "elastic_reset.py: error: "))
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_a_program_is_no_wrong_flag(monkeypatch):
    monkeypatch.setattr(elastic_reset, "train", lambda config, task: 1 / 0)
    monkeypatch.setattr("tutorials.baselines.SupervisedSelfPlay", lambda config: None)
    with pytest.raises(ZeroDivisionError):
        main(["S2P"])


def test_it_runs_as_a_program():
    command = [sys.executable, str(ROOT / "tutorials" / "baselines.py"), "--help"]
    helped = subprocess.run(command, capture_output=True, text=True)
    assert helped.returncode == 0 and "--sil_receiver_steps" in helped.stdout
