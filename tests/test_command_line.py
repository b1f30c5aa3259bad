"""Room 8: flags, their ranges and one-line errors; and rooms 7's damaged data."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

import elastic_reset
from elastic_reset import METHODS, TASKS, configure, main, parse_flags, split_of, to_argv

RESETTING = ("elastic-reset", "reset-init", "reset-ema")


def error_of(argv, capsys):
    code = main(argv)
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and captured.out == "", captured
    return lines[0]


BAD_FLAGS = [
    ("", "expected one of translation"),
    ("--task chess", "--task is chess; expected one of translation"),
    ("--task translation --method sgd", "expected one of elastic-reset, ppo"),
    ("--task translation --preset maxi", "choose from"),
    ("--task translation --reset sometimes", "choose from"),
    ("--task translation --kl_reference last", "choose from"),
    ("--task translation --seeds 3", "give that as well"),
    (
        "--task translation --compare ppo, reinforce",
        "unrecognized arguments: reinforce; --help lists them all",
    ),
    ("--task translation --no_such_flag 1", "unrecognized arguments: --no_such_flag"),
    ("--task translation --updates", "expected one argument"),
    ("--task translation --updates ten", "invalid int value: 'ten'"),
    ("--task translation --updates 0", "updates is 0; expected 1 or more"),
    ("--task translation --updates 2.5", "invalid int value"),
    ("--task translation --seed -1", "seed is -1; expected 0 or more"),
    ("--task translation --ema_decay 1.5", "ema_decay is 1.5; expected 0 to 1"),
    ("--task translation --ema_decay nan", "ema_decay is nan; expected 0 to 1"),
    ("--task translation --reset_every 0", "reset_every is 0; expected 1 or more"),
    ("--task translation --learning_rate -0.1", "learning_rate is -0.1; expected 0 to 1"),
    ("--task translation --gamma 1.1", "gamma is 1.1"),
    ("--task translation --lam -1", "lam is -1"),
    ("--task translation --cliprange -0.2", "cliprange is -0.2"),
    ("--task translation --temperature 0", "temperature is 0"),
    ("--task translation --kl_coef nan", "kl_coef is nan"),
    ("--task translation --batch_size 32 --mini_batch_size 64", "expected batch_size (32) or less"),
    ("--task translation --d_model 90", "expected a multiple of 4"),
    ("--task translation --resume perhaps", "--resume"),
    ("--task translation --kl_reference ema", "kl_reference is ema; expected init as long as kl_coef is 0"),
    ("--task translation --response_length 65", "response_length (65) is more than max_length (64)"),
    (
        "--task imdb --prompt_length 29",
        "prompt_length (29) + response_length (32) is more than max_length (60)",
    ),
    ("--task imdb --response_length 20", "(20) or less; the preset may have set one of them: give both"),
    ("--task qa --max_length 199", "prompt_length (200) is more than max_length (199)"),
    ("--task qa --response_length 201", "response_length (201) is more than max_length (200)"),
    ("--task translation --kl_target 6", "kl_target adapts kl_coef, but kl_coef is 0"),
    ("--task translation --max_grad_norm 0", "max_grad_norm is 0"),
    ("--task translation --dtype float16", "choose from"),
    ("--task translation --report_to wandb", "that package is not installed"),
    ("--task translation --compare ppo,ppo", "expected different methods"),
    ("--task translation --compare ppo,", "expected different methods"),
    ("--task translation --compare ppo,sgd", "method is 'sgd'; expected one of"),
    ("--task translation --compare ppo:kl_coef", "kl_coef"),
    ("--task translation --compare ppo:kl_coef=much", "invalid float value: 'much'"),
    ("--task translation --compare ppo:seed=7", "--compare ppo:seed=7: seed is the comparison's"),
    ("--task translation --compare ppo --seeds 0", "seeds is 0; expected 1 or more"),
    ("--task translation --compare ppo --jobs 0", "jobs is 0"),
    ("--task translation --config nowhere.yaml", "--config nowhere.yaml cannot be read"),
    ("--task translation --data nowhere/at/all", "data nowhere/at/all cannot be read"),
    (
        "--task translation --model nowhere/at/all",
        "sender 'nowhere/at/all' cannot be loaded as a model for Seq2SeqLM",
    ),
]


@pytest.mark.parametrize("line, expected", BAD_FLAGS)
def test_bad_command_lines(line, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert expected in error_of(line.split(), capsys)
    assert list(tmp_path.iterdir()) == []


GOOD = '{"en": "a dog", "fr": "un chien", "de": "ein Hund"}\n'
BAD_DATA = {
    "empty folder": ({}, "doesn't contain any data files"),
    "empty file": ({"train.jsonl": ""}, "holds no rows"),
    "no validation": ({"train.jsonl": GOOD}, "train[200:] --validation_data "),
    "torn line": ({"train.jsonl": GOOD + '{"en": "a'}, "train.jsonl, line 2: column 8: not JSON"),
    "no object": ({"train.jsonl": GOOD + "[1, 2]\n"}, "train.jsonl, line 2: no object"),
    "no column": ({"train.jsonl": '{"en": "a", "fr": "b"}\n'}, "jsonl, line 1: no column 'de' (found en"),
    "missing later": ({"train.jsonl": GOOD * 3 + '{"en": "a", "fr": "b"}\n'}, "line 4: no column 'de'"),
    "number": ({"train.jsonl": GOOD + '{"en": "a", "fr": "b", "de": 3}\n'}, "2: column 'de' holds '3'"),
    "null": ({"train.jsonl": GOOD + '{"en": null, "fr": "b", "de": "c"}\n'}, "2: column 'en' holds 'None'"),
    "blank": ({"train.jsonl": GOOD + '{"en": "a", "fr": " ", "de": "c"}\n'}, "line 2: column 'fr' holds ' '"),
    "csv": ({"train.csv": "en,fr,de\na,b,c\nd,,f\n"}, "train.csv, line 3: column 'fr' holds ''"),
    "no parquet": ({"train.parquet": "this is no parquet"}, "cannot be read"),
    "not UTF-8": ({"train.jsonl": b'{"en": "\xff", "fr": "b", "de": "c"}\n'}, "train.jsonl, line 1"),
    "bad validation": (
        {"train.jsonl": GOOD, "validation.jsonl": '{"en": "a", "fr": "b", "de": ""}\n'},
        "validation.jsonl, line 1",
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
    assert expected in error_of(argv, capsys)
    assert not (tmp_path / "run").exists()


def test_bad_slice(capsys, tmp_path):
    (tmp_path / "train.jsonl").write_text(GOOD)
    argv = ["--task", "translation", "--data", f"{tmp_path}:train[abc]"]
    argv += ["--output_dir", str(tmp_path / "run")]
    assert "cannot be read" in error_of(argv, capsys)


def test_real_data_needs_models_or_pairs(capsys, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(GOOD)
    argv = ["--task", "translation", "--data", str(tmp_path), "--output_dir", str(tmp_path / "run")]
    assert "the sender needs --model or --sender_data" in error_of(argv, capsys)


def test_damaged_checkpoint(tiny, capsys, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint" / "state.safetensors"
    elastic_reset.train(configure(**tiny))
    capsys.readouterr()
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert main(to_argv(tiny | dict(resume=True))) == 2
    assert "is damaged" in capsys.readouterr().err.splitlines()[-1]


def test_damaged_files_of_a_run_are_named(tiny, capsys, tmp_path):
    elastic_reset.train(configure(**tiny))
    for name, content in [("config.json", "{"), ("config.json", "[]")]:
        (tmp_path / "run" / name).write_text(content)
        capsys.readouterr()
        assert main(to_argv(tiny | dict(resume=True))) == 2
        assert f"{name} is damaged" in capsys.readouterr().err
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="metrics.jsonl is damaged"):
        elastic_reset.read_history(tmp_path / "run")


def test_too_few_positions(tiny, capsys, tmp_path):
    elastic_reset.train(configure(**tiny))
    capsys.readouterr()
    folders = dict(model=str(tmp_path / "run" / "model"), receiver_model=str(tmp_path / "run" / "receiver"))
    flags = tiny | folders | dict(max_length=500, output_dir=str(tmp_path / "other"))
    assert main(to_argv(flags)) == 2
    assert "has 128 positions, too few for max_length (500) tokens" in capsys.readouterr().err


def test_layers_of_settings(tmp_path):
    assert configure(task="translation", method="ppo").kl_coef == 0
    assert configure(task="translation", method="ppo", kl_coef=0.3).kl_coef == 0.3
    assert configure(task="translation", preset="paper").batch_size == 256
    path = tmp_path / "run.yaml"
    path.write_text("task: translation\nlearning_rate: 1e-5\nupdates: 7\nsender_data: [a, b]\n")
    given, command = parse_flags(["--config", str(path), "--updates", "9"])
    assert given == dict(task="translation", learning_rate=1e-5, updates=9, sender_data=["a", "b"])
    path.write_text("compare: ppo\nconfig: another.yaml\n")
    assert parse_flags(["--config", str(path)])[1].compare == "ppo"
    path.write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match="unrecognized arguments: --learning_rat"):
        parse_flags(["--config", str(path)])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", ["mini", "paper"])
@pytest.mark.parametrize("task", TASKS)
def test_every_method_is_itself_in_every_preset(task, preset, method):
    config = configure(task, method, preset)
    if method in ("ppo-kl", "ema-reference", "reset-reference"):
        assert config.kl_coef > 0
    elif method not in (*RESETTING, "fixed-sender"):
        assert config.kl_coef == 0
    references = {"ppo-kl": "init", "ema-reference": "ema", "reset-reference": "reset"}
    assert config.kl_reference == references.get(method, config.kl_reference)
    assert (config.reset != "none") == (method in RESETTING)


def test_a_kl_method_needs_a_coefficient():
    with pytest.raises(ValueError, match="kl_coef is 0; try --kl_coef 0.05"):
        configure("custom", "ppo-kl")


def test_a_run_is_repeated_by_its_config(tiny, tmp_path, capsys):
    first = elastic_reset.train(configure(**tiny | dict(learning_rate=1e-5)))
    again = str(tmp_path / "again")
    assert main(["--config", str(tmp_path / "run" / "config.json"), "--output_dir", again]) == 0
    saved = [json.loads((tmp_path / run / "config.json").read_text()) for run in ("run", "again")]
    assert saved[0] | dict(output_dir=again) == saved[1]
    same = ["--task", "translation", "--resume", "true", "--output_dir", again]
    assert main(["--config", str(tmp_path / "run" / "config.json"), *same]) == 0
    capsys.readouterr()
    assert main(["--config", str(tmp_path / "run" / "config.json"), "--method", "ppo"]) == 2
    assert "which names every setting: give one" in capsys.readouterr().err
    end = elastic_reset.read_history(tmp_path / "again")[-1]
    assert end["reward"] == first["end"]["reward"] and end["kl"] == first["end"]["kl"]


def test_flags_survive_the_way_to_another_process():
    flags = dict(task="translation", resume=True, kl_coef=0.1, sender_data=["a b", "c"], updates=3)
    assert parse_flags(to_argv(flags))[0] == flags


@pytest.mark.parametrize(
    "wrong", [dict(updates="3"), dict(resume=1), dict(sender_data="abc"), dict(updats=3)]
)
def test_wrong_types_from_python(wrong):
    with pytest.raises(ValueError, match="expected a value of type|unknown setting"):
        configure(**wrong)


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("name", ("name", "train")),
        ("user/name:validation", ("user/name", "validation")),
        ("../folder:train[9000:]", ("../folder", "train[9000:]")),
        ("folder:train[:10%]", ("folder", "train[:10%]")),
        ("C:\\folder", ("C:\\folder", "train")),
        ("hf://datasets/a/b@c/d/*.parquet", ("hf://datasets/a/b@c/d/*.parquet", "train")),
    ],
)
def test_split_of(spec, expected):
    assert split_of(spec) == expected


def test_help_lists_every_flag_and_method():
    text = subprocess.run(
        [sys.executable, str(ROOT / "elastic_reset.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    flat = " ".join(text.split())
    for f in elastic_reset.fields(elastic_reset.Config):
        assert f"--{f.name}" in flat
    assert all(method in "".join(text.split()) for method in METHODS)
    assert "batch_size responses (default 200; imdb 120, qa 40)" in flat
    assert "what to train, always needed: translation, imdb, qa --method" in flat
    assert json.dumps("theta_bar <- theta_0")[1:-1] in flat
