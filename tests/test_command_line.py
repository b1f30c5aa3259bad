"""Sections 2 and 10: flags, their layers and ranges, one-line errors; section 6's damaged data."""

import functools
import itertools
import json
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import ROOT, killed_within_update, metrics_of, refuse_training

import elastic_reset
from elastic_reset import METHODS, TASKS, configure, main, parse_flags, train
from tutorials.compare import to_argv

RESETTING = ("elastic-reset", "reset-init", "reset-ema")


def error_of(argv, capsys):
    try:
        code = main(argv)
    except SystemExit as end:  # argparse's own
        code = end.code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and captured.out == "", captured
    return lines[0]


BAD_FLAGS = [
    ("", "--task is custom; expected translation, imdb, qa or your own task"),
    ("--task chess", "--task is chess; expected translation, imdb, qa or your own task"),
    ("--task translation --method sgd", "expected elastic-reset|ppo"),
    ("--task translation --preset mini", "unrecognized arguments: --preset mini"),
    ("--task translation --report_to comet", "expected none|tensorboard|wandb|trackio"),
    ("--task translation --kl_reference last", "expected init|ema"),
    ("--task translation --dtype float16", "expected float32|bfloat16"),
    ("--task translation --resume perhaps", "argument --resume: invalid true_or_false value: 'perhaps'"),
    (
        "--task translation --no_such_flag 1",
        "elastic_reset.py: error: unrecognized arguments: --no_such_flag 1",
    ),
    ("--task translation --update 3", "unrecognized arguments: --update 3"),
    ("--task translation --updates", "expected one argument"),
    (
        "--task translation --updates ten",
        "elastic_reset.py: error: argument --updates: invalid int value: 'ten'",
    ),
    ("--task translation --updates 0", "updates is 0; expected int from 1"),
    ("--task translation --updates 2.5", "argument --updates: invalid int value: '2.5'"),
    ("--task translation --seed -1", "seed is -1; expected int from 0"),
    ("--task translation --ema_decay 1.5", "ema_decay is 1.5; expected float from 0 to 1"),
    ("--task translation --ema_decay nan", "ema_decay is nan; expected float from 0 to 1"),
    ("--task translation --temperature 0", "temperature is 0"),
    ("--task translation --max_grad_norm 0", "max_grad_norm is 0"),
    ("--task translation --batch_size 32 --mini_batch_size 64", "expected int from 0 to 32 (batch_size)"),
    ("--task translation --d_model 90", "d_model"),
    ("--task qa --d_model 20", "d_model"),
    ("--task translation --response_length 65", "is 65; expected int from 1 to 64 (max_length)"),
    ("--task imdb --response_length 20", "is 32; expected int from 0 to 20 (response_length)"),
    ("--task qa --max_length 199", "prompt_length is 200; expected int from 1 to 199 (max_length)"),
    ("--task translation --method ppo --kl_reference ema", "kl_coef is 0, so there is no KL penalty"),
    ("--task translation --method ppo --kl_target 6", "kl_coef is 0, so there is no KL penalty"),
    ("--task translation --config nowhere.yaml", "No such file or directory: 'nowhere.yaml'"),
    ("--task imdb --lora_r 4", "lora_r is a setting of qa, not of imdb"),
    ("--task translation --reward_model x", "reward_model is a setting of imdb, qa, not of translation"),
    ("--task translation --data nowhere/at/all", "data nowhere/at/all cannot be read"),
    (
        "--task translation --model nowhere/at/all",
        "'nowhere/at/all' cannot be used as a Seq2SeqLM",
    ),
]


@pytest.mark.parametrize("line, expected", BAD_FLAGS)
def test_bad_command_lines(line, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuse_training(monkeypatch)
    assert expected in error_of(line.split(), capsys)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


GOOD = '{"en": "a dog", "fr": "un chien", "de": "ein Hund"}\n'
BAD_DATA = {
    "empty folder": ({}, "data DATA cannot be read: "),
    "no validation": ({"train.jsonl": GOOD}, "data DATA:validation cannot be read"),
    "torn line": ({"train.jsonl": GOOD + '{"en": "a'}, "data DATA cannot be read: JSON parse error"),
    "no object": ({"train.jsonl": GOOD + "[1, 2]\n"}, "data DATA cannot be read: "),
    "no column": ({"train.jsonl": GOOD[:32] + "}\n"}, "de is None; expected text; the columns are en, fr"),
    "missing later": ({"train.jsonl": GOOD * 3 + '{"en": "a", "fr": "b"}\n'}, "row 4: de is None"),
    "number": ({"train.jsonl": GOOD + '{"en": "a", "fr": "b", "de": 3}\n'}, "row 2: de is 3;"),
    "null": ({"train.jsonl": GOOD + '{"en": null, "fr": "b", "de": "c"}\n'}, "row 2: en is None"),
    "blank": ({"train.jsonl": GOOD + '{"en": "a", "fr": " ", "de": "c"}\n'}, "2: fr is ' '; expected text"),
    "long rows": ({"train.csv": "en,fr,de\na,b,c,d\n"}, "or columns without a name"),
    "a long row": ({"train.csv": "en,fr,de\na,b,c\na,b,c,d\n"}, "Expected 3 fields in line 3, saw 4"),
    "two kinds": ({"train.csv": "en,fr,de\na,b,c\n", "a.jsonl": GOOD}, "holds .csv and .jsonl files"),
    "card": ({"train.jsonl": GOOD, "README.md": "---\na: [\n---\n"}, "data DATA cannot be read: "),
    "csv": ({"train.csv": "en,fr,de\na,b,c\nd,,f\n"}, "data DATA, row 2: fr is "),
    "no rows": ({"train.jsonl": ""}, "data DATA cannot be read: it holds no rows"),
    "no parquet": ({"train.parquet": "this is no parquet"}, "data DATA cannot be read: Parquet"),
    "not UTF-8": ({"train.jsonl": b'{"en": "\xff", "fr": "b", "de": "c"}\n'}, "cannot be read: 'utf-8'"),
    "bad validation": (
        {"train.jsonl": GOOD, "validation.jsonl": GOOD + '{"en": "a", "fr": "b", "de": ""}\n'},
        "data DATA:validation, row 2: de is ''",
    ),
    "no pairs": (
        {"train.jsonl": GOOD, "validation.jsonl": GOOD},
        "neither a model nor data to train one for the sender",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DATA)
def test_damaged_data(name, capsys, tmp_path):
    files, expected = BAD_DATA[name]
    folder = tmp_path / "data"
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = ["--task", "translation", "--data", str(folder), "--output_dir", str(tmp_path / "run")]
    assert expected.replace("DATA", str(folder)) in error_of(argv, capsys)


def test_a_label_is_0_or_1(capsys, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n')
    argv = ["--task", "imdb", "--data", str(tmp_path), "--output_dir", str(tmp_path / "run")]
    assert f"data {tmp_path}, row 2: label is 2; expected 0 or 1" in error_of(argv, capsys)


def test_bad_slice(capsys, tmp_path):
    (tmp_path / "train.jsonl").write_text(GOOD)
    argv = ["--task", "translation", "--data", f"{tmp_path}:train[abc]"]
    argv += ["--output_dir", str(tmp_path / "run")]
    assert f"data {tmp_path}:train[abc] cannot be read" in error_of(argv, capsys)


def test_layers_of_settings(tmp_path):
    assert configure("translation", "ppo-kl").kl_coef == 0.03
    assert configure("translation", "ppo-kl", kl_coef=0.3).kl_coef == 0.3
    assert configure("translation", "ppo", kl_coef=0.3).kl_coef == 0.3
    assert configure().batch_size == 128 and configure("translation").batch_size == 16
    path = tmp_path / "run.yaml"
    path.write_text(
        "task: translation\nlearning_rate: 1e-5\nupdates: 7\nresume: yes\nsender_data: [a, b c]\n"
    )
    given = parse_flags(["--config", str(path), "--updates", "9"])
    expected = dict(task="translation", learning_rate=1e-5, updates=9, resume=True, sender_data=["a", "b c"])
    assert given == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1", "there is no setting learning_rat"),
        ("updates: many", "updates is 'many'; expected int"),
        ("model:", "model is None; expected str"),
        ("- updates", "expected lines like kl_coef: 0.05"),
        ("updates: [", "run.yaml is no YAML: while parsing a flow node"),
        ("updates: " + "[" * 100_000, "run.yaml is no YAML: "),
    ],
)
def test_a_file_of_flags_is_checked_too(tmp_path, text, message, capsys):
    (tmp_path / "run.yaml").write_text("task: translation\n" * (text[0].isalpha()) + text)
    assert message in error_of(["--config", str(tmp_path / "run.yaml")], capsys)


def paper(task):
    """A file of the paper's settings."""
    return str(ROOT / "tutorials" / "paper" / f"{task}.yaml")


@pytest.mark.parametrize("task, batch_size", [("translation", 256), ("imdb", 27), ("qa", 128)])
def test_the_paper_s_settings_are_over_the_task_s_own(task, batch_size):
    config = configure(**parse_flags(["--config", paper(task)]))
    assert (config.task, config.batch_size, config.ema_decay) == (task, batch_size, 0.995)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_itself_in_every_preset(method):
    for task, settings in itertools.product(TASKS, ("own", "paper")):
        argv = ["--config", paper(task)] if settings == "paper" else ["--task", task]
        argv += ["--method", method]
        if argv[0] == "--config" and task == "translation" and method in ("ppo-kl", "ema-reference"):
            with pytest.raises(ValueError, match="kl_coef is 0"):  # the paper does not say it
                configure(**parse_flags(argv))
            argv += ["--kl_coef", "0.05"]
        config = configure(**parse_flags(argv))
        if method in ("ppo-kl", "ema-reference"):
            assert config.kl_coef > 0
            assert config.kl_reference == {"ppo-kl": "init", "ema-reference": "ema"}[method]
        elif method in ("ppo", "reinforce"):
            assert config.kl_coef == config.kl_target == 0
        assert (config.reset != "none") == (method in RESETTING)


def test_a_coefficient_of_0_turns_the_whole_penalty_off(tmp_path, capsys):
    """Also what a file says of it. Given together, they contradict each other."""
    path, off = tmp_path / "run.yaml", dict(kl_coef=0.0, kl_target=0.0, kl_reference="init")
    path.write_text("task: translation\nkl_coef: 0.1\nkl_target: 6\nkl_reference: ema\n")
    for more in (["--kl_coef", "0"], ["--kl_coef", "0.0", "--updates", "3"], ["--method", "ppo"]):
        config = asdict(configure(**parse_flags(["--config", str(path), *more])))
        assert config | off == config
    config = asdict(configure(**parse_flags(["--config", str(path)])))
    assert config | dict(kl_coef=0.1, kl_target=6.0, kl_reference="ema") == config
    path.write_text("task: translation\nkl_coef: 0\nkl_target: 6\n")
    for argv in (
        ["--config", str(path)],
        ["--task", "translation", "--kl_coef", "0", "--kl_target", "6"],
        ["--task", "translation", "--kl_coef", "0", "--kl_reference", "ema"],
        ["--task", "translation", "--kl_coef", "0", "--method", "ppo-kl"],
    ):
        assert "kl_coef is 0, so there is no KL penalty" in error_of(argv, capsys)
    with pytest.raises(ValueError, match="kl_coef is 0"):
        configure("translation", kl_coef=0, kl_target=6)


@pytest.mark.parametrize(
    "words, name, value",
    [
        ("--ema_decay .9", "ema_decay", 0.9),
        ("--kl_target 5.", "kl_target", 5.0),
        ("--kl_target +1", "kl_target", 1.0),
        ("--learning_rate 1e-5", "learning_rate", 1e-5),
        ("--updates +3", "updates", 3),
        ("--resume TRUE", "resume", True),
    ],
)
def test_numbers_may_be_written_as_python_reads_them(words, name, value):
    config = configure("imdb", **parse_flags(words.split()))
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)


def test_settings_have_their_types_whatever_was_given():
    """A whole number for a float, as 1 for 1.0, and a tuple for a list."""
    floats = [f.name for f in elastic_reset.fields(elastic_reset.Config) if f.type is float]
    config = asdict(configure(**dict.fromkeys(floats, 1), sender_data=("a", "b")))
    assert {config[name] for name in floats} == {1.0} and len(floats) > 15
    assert {type(config[name]) for name in floats} == {float} and config["sender_data"] == ["a", "b"]
    for task, method in itertools.product(["custom", *TASKS], METHODS):
        config = configure(task, method, kl_coef=1)
        for f in elastic_reset.fields(config):
            assert type(getattr(config, f.name)) is f.type, (task, method, f.name)


@pytest.mark.parametrize("way", ["python", "flags", "yaml"])
def test_whole_numbers_for_floats_resume(way, tiny, tmp_path, monkeypatch):
    def run(folder, **more):
        flags = tiny | dict(kl_coef=1, kl_target=6, output_dir=str(tmp_path / folder)) | more
        if way == "python":
            train(configure(**flags))
        elif way == "flags":
            assert main(to_argv(flags)) == 0
        else:
            lines = [f"{name}: {json.dumps(value)}\n" for name, value in flags.items()]
            (tmp_path / "run.yaml").write_text("".join(lines))
            assert main(["--config", str(tmp_path / "run.yaml")]) == 0

    run("whole")
    killed_within_update(3, functools.partial(run, "part"), monkeypatch)
    run("part", resume=True)
    assert metrics_of(tmp_path / "part") == metrics_of(tmp_path / "whole")
    assert '"kl_target": 6.0' in (tmp_path / "part" / "config.json").read_text()


def test_a_kl_method_needs_a_coefficient():
    with pytest.raises(ValueError, match="kl_coef is 0, so there is no KL penalty"):
        configure("custom", "ppo-kl")


def test_a_run_is_repeated_by_its_config(tiny, tmp_path, capsys):
    first = train(configure(**tiny | dict(method="ppo-kl", kl_coef=0.1, learning_rate=1e-5)))
    config, again = str(tmp_path / "run" / "config.json"), str(tmp_path / "again")
    assert main(["--config", config, "--output_dir", again]) == 0
    saved = [json.loads((tmp_path / run / "config.json").read_text()) for run in ("run", "again")]
    assert saved[0] | dict(output_dir=again) == saved[1]
    end = json.loads((tmp_path / "again" / "metrics.jsonl").read_text().splitlines()[-1])
    assert end["reward"] == first["end"]["reward"] and end["kl"] == first["end"]["kl"]
    assert main(["--config", config, "--resume", "true", "--output_dir", again]) == 0
    capsys.readouterr()
    argv = ["--config", config, "--method", "elastic-reset", "--output_dir", str(tmp_path / "other")]
    assert "method" in error_of(argv, capsys)  # the file names every setting, so a method changes none
    assert not (tmp_path / "other").exists()


def test_flags_survive_the_way_to_another_process():
    flags = dict(task="translation", resume=True, kl_coef=0.1, sender_data=["a b", "c"], updates=3)
    flags |= dict(report_to="tensorboard", ema_decay=1.0)
    assert parse_flags(to_argv(flags)) == flags
    assert parse_flags(to_argv(dict(task="qa", resume=False, sender_data=[]))) == dict(
        task="qa", resume=False
    )


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(updates="3"), "updates is '3'; expected int"),
        (dict(updates=True), "updates is True"),
        (dict(resume=1), "resume is 1; expected bool"),
        (dict(sender_data="abc"), "sender_data is 'abc'; expected list"),
        (dict(reset="never"), "reset is 'never'; expected elastic.ema.init.none"),
        (dict(updats=3), "unexpected keyword argument 'updats'"),
    ],
)
def test_wrong_settings_from_python(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        configure(**wrong)


def test_help_lists_every_flag_and_method():
    text = subprocess.run(
        [sys.executable, str(ROOT / "elastic_reset.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    flat, unbroken = " ".join(text.split()), "".join(text.split())
    for f in elastic_reset.fields(elastic_reset.Config):
        assert f"--{f.name} " in flat, f.name
    assert all(method in unbroken for method in METHODS)
    assert "batch_size responses (default 200; translation 400; imdb 240; qa 120)" in flat
    assert "theta_bar <- theta_0" in flat
