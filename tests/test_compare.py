"""tutorials/compare.py: the numbers by hand, the recorded comparisons, comparisons made of processes."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, TINY

from elastic_reset import configure, parse_flags
from tutorials import compare as program
from tutorials.compare import (
    STYLES,
    area_under_front,
    finished,
    main,
    mean_and_error,
    mixture_of,
    plot_tradeoff,
    seed_means,
    spread,
    styles_of,
    summary_text,
    to_argv,
    tradeoff,
)

GAME = TINY | dict(task="translation")
RECORDS = [ROOT / "tutorials" / "results" / task for task in ("imdb", "qa", "translation")]


def history(*points):
    return [dict(update=i, event="", drift=d, reward=r) for i, (d, r) in enumerate(points)]


# The numbers


def test_area_by_hand():
    """Start (1, 0), reward 4 at drift 2: of the range 1 to 3 the upper half gains 4."""
    assert area_under_front(history((1, 0), (2, 4), (2.5, 1)), 1, 3) == pytest.approx(2)
    assert area_under_front(history((1, 0), (2, -4)), 1, 3) == 0
    assert area_under_front(history((1, 0), (0.5, 2)), 0.5, 1.5) == pytest.approx(2)


def test_numbers_by_hand():
    runs = {
        "a": {0: history((1, 0), (1.2, 2), (1.4, 3)), 1: history((1, 0), (1.1, 1), (1.8, 5))},
        "b": {0: history((1, 0), (2, 1), (3, 9)), 1: history((1, 0), (1, 0), (1, 0))},
    }
    numbers = tradeoff(runs)
    assert numbers["range"] == [1, 1.5]
    assert numbers["methods"]["a"]["reward"] == [3, 5] and numbers["methods"]["a"]["passed"] == [None, 2]
    assert numbers["methods"]["b"]["drift"] == [3, 1] and numbers["methods"]["b"]["passed"] == [1, None]
    assert numbers["methods"]["a"]["area"] == pytest.approx([(0.2 * 2 + 0.1 * 3) / 0.5, 0.4 * 1 / 0.5])


def test_mean_and_standard_error():
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2, 1 / 3**0.5))
    assert mean_and_error([1.0]) == (1, 0)


def test_means_over_common_evaluations():
    runs = {
        0: history((1, 0), (2, 4), (5, 5)),
        1: [*history((1, 2)), dict(update=2, event="", drift=7, reward=9)],
    }
    assert seed_means(runs, "reward") == [[1, 7], [0, 5], [2, 9]]
    assert seed_means(runs, "drift", logarithmic=True)[0] == pytest.approx([1, math.sqrt(5 * 7)])


def test_more_looks_do_not_make_a_larger_area():
    """Of a reset's two sides only the second counts, and only updates that every run evaluated."""
    seldom = history((1, 0), (1, 3))
    often = [seldom[0], dict(seldom[1], event="before reset", reward=9), seldom[1]]
    often.append(dict(update=5, event="", drift=0.9, reward=7))
    methods = tradeoff({"seldom": {0: seldom}, "often": {0: often}})["methods"]
    assert methods["often"]["area"] == methods["seldom"]["area"] != [0]


def test_a_mixture_counts_in_the_area_but_passes_nothing():
    end = dict(update=1, event="", drift=1.4, reward=2)
    far, near = (dict(update=1, event="eta 0.50", drift=drift, reward=5) for drift in (2, 1.2))
    other = {0: history((1, 0), (1, 1))}
    with_far, with_near = (
        tradeoff({"a": {0: [*history((1, 0)), end, mixture]}, "b": other})["methods"]["a"]
        for mixture in (far, near)
    )
    assert with_far["passed"] == [None] and with_far["reward"] == [2]
    assert with_near["area"] > with_far["area"]


# Recorded comparisons


@pytest.mark.parametrize("folder", RECORDS, ids=lambda folder: folder.name)
def test_records_give_their_numbers_and_tables_again(folder):
    record = json.loads((folder / "tradeoff.json").read_text(encoding="utf-8"))
    assert tradeoff(record["runs"]) == record["summary"]
    assert summary_text(record) == (folder / "summary.md").read_text(encoding="utf-8")


def test_a_record_is_shown_again(tmp_path, capsys):
    text = (RECORDS[2] / "tradeoff.json").read_text(encoding="utf-8")
    (tmp_path / "tradeoff.json").write_text(text.replace('"ppo"', '"a method of old"'), encoding="utf-8")
    assert main(["--read", str(tmp_path)]) == 0
    table = (RECORDS[2] / "summary.md").read_text(encoding="utf-8").replace("| ppo |", "| a method of old |")
    assert (tmp_path / "summary.md").read_text(encoding="utf-8") == table == capsys.readouterr().out[:-1]
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "tradeoff.json").write_text("{}")
    assert main(["--read", str(tmp_path)]) == 2
    assert "tradeoff.json is no record of a comparison" in capsys.readouterr().err


def test_a_method_has_one_colour_and_marker_in_every_picture():
    few, many = styles_of(["reset-ema"]), styles_of(["ppo", "ppo-kl:kl_coef=0.1", "reset-ema", "ppo-kl"])
    assert few["reset-ema"] == many["reset-ema"]
    one, other = many["ppo-kl:kl_coef=0.1"], many["ppo-kl"]
    assert (one["color"], one["marker"]) == (other["color"], other["marker"]) == STYLES["ppo-kl"]
    assert one["linestyle"] != other["linestyle"] and one["fillstyle"] != other["fillstyle"]
    everyone = [*STYLES, "of old", "older"]
    looks = styles_of(everyone).values()
    for part in ("color", "marker"):
        assert len({look[part] for look in looks}) == len(everyone)


def test_names_do_not_overlap_and_lie_within_the_picture():
    assert spread([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    heights = spread([0.2, 0.2, 0.21, 0.99, 1.0], 0.1)
    assert heights == pytest.approx([0.2, 0.3, 0.4, 0.85, 0.95])


@pytest.mark.parametrize("drift", [0.5, 2, 200])
def test_names_and_legend_of_a_picture_lie_apart(tmp_path, monkeypatch, drift):
    """The names right of the curves, the legend's and that of the start are where no other text is."""
    import matplotlib.figure

    figures, labels = [], ["elastic-reset", *(f"ppo-kl:kl_coef=0.{i}:mixtures=1" for i in range(8))]
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: [figures.append(self), save(self, *a, **k)]
    )
    mixture = dict(update=2, event="eta 0.50", drift=0.9 * drift, reward=1)
    plot_tradeoff(
        {
            label: {0: [*history((1, -9), (drift, 1), (drift + i / 99, 2)), mixture]}
            for i, label in enumerate(labels)
        },
        tmp_path / "picture.png",
    )
    (figure,) = figures
    figure.draw_without_rendering()
    texts = figure.axes[1].texts + figure.legends[0].texts + figure.axes[0].texts
    assert sorted(text.get_text() for text in texts) == sorted([*labels * 2, "start, below: -9"])
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert 0 <= box.x0 and box.x1 <= figure.bbox.width and 0 <= box.y0 and box.y1 <= figure.bbox.height
    plane, start = figure.axes[0].bbox, boxes[-1]
    assert plane.x0 < start.x0 and start.x1 < plane.x1


# Comparisons


def command(folder, methods, *words, **flags):
    return to_argv(GAME | dict(output_dir=str(folder)) | flags) + ["--methods", methods, *words]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task imdb", "expected --methods"),
        ("--methods ppo", "--task is missing; expected one of translation"),
        ("--task imdb --methods ppo,ppo", "expected different ones"),
        ("--task imdb --methods ppo,", "expected different ones"),
        ("--task imdb --methods ppo --method ppo-kl", "expected --methods alone"),
        ("--task imdb --methods ppo,trust-region", "trust-region"),
        ("--task imdb --methods ppo:seed=3", "seed is the comparison's"),
        ("--task imdb --methods ppo:output_dir=x", "output_dir is the comparison's"),
        ("--task imdb --methods ppo:mixtures=many", "mixtures is many; expected 0 to 99"),
        ("--task imdb --methods ppo:kl_coff=0.1", "kl_coff"),
        ("--task imdb --methods ppo --kl_coef -1", "kl_coef"),
        ("--task imdb --methods ppo --jobs 0", "--jobs 0; expected 1 or more"),
        ("--task imdb --methods ppo --seeds many", "--seeds"),
        ("--task imdb --read runs", "--read FOLDER alone"),
        ("--read nowhere", "nowhere/tradeoff.json"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare.py: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())


def test_help_points_to_the_other_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--methods LIST" in text and "elastic_reset.py --help" in text


def test_settings_of_a_method(tmp_path):
    given = parse_flags(to_argv(GAME | dict(kl_coef=0.5)))
    config, mixtures = program.settings_of("ppo:mixtures=9:kl_coef=0.2:model=a/b:c", 7, given, tmp_path)
    assert mixtures == 9 and config.output_dir == str(tmp_path / "ppo,kl_coef=0.2,model=a%2Fb%3Ac" / "seed7")
    other = dict(method="ppo", seed=7, kl_coef=0.2, model="a/b:c", output_dir=config.output_dir, resume=True)
    assert config == configure(**given | other)


def test_comparison_end_to_end_and_once_more(tmp_path, capsys):
    label = "ppo:kl_coef=0.2:d_model=24"
    methods = f"elastic-reset,{label},{label}:mixtures=3"
    argv = command(tmp_path, methods, "--seeds", "2", "--jobs", "2", seed=3)
    assert main(argv) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "tradeoff.json").read_text())
    plain, mixed = record["runs"][label], record["runs"][f"{label}:mixtures=3"]
    assert set(record["runs"]["elastic-reset"]) == set(plain) == set(mixed) == {"3", "4"}
    assert record["configs"][label]["kl_coef"] == 0.2 and len(record["commit"]) > 0
    assert mixed["3"][:-3] == plain["3"] and plain["3"] != plain["4"]
    assert [line["event"] for line in mixed["3"][-3:]] == ["eta 0.25", "eta 0.50", "eta 0.75"]
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    summary = (tmp_path / "summary.md").read_text()
    assert "| elastic-reset |" in summary and summary.strip() in capsys.readouterr().out
    assert len(list(tmp_path.glob("*/seed*/mixtures.jsonl"))) == 2
    logs = [log.read_text() for log in tmp_path.glob("*/seed*.log")]
    assert len(logs) == 4 and "RL, ppo" in "".join(logs) and "training the" not in "".join(logs)
    places = [place for place in tmp_path.glob("*/**/*") if place.is_file()]
    before = [place.stat().st_mtime_ns for place in places]
    assert main(argv) == 0 and (tmp_path / "summary.md").read_text() == summary
    assert before == [place.stat().st_mtime_ns for place in places]

    config, _ = program.settings_of(label, 3, parse_flags(to_argv(GAME)), tmp_path)
    mixture = mixture_of(config)  # at eta 1 the policy is that of the end, at eta 0 that of the start
    first, last, names = plain["3"][0], plain["3"][-1], ("reward", "drift", "bleu_de", "bleu_en", "kl")
    assert mixture(1.0) == pytest.approx({name: last[name] for name in names}, rel=1e-5)
    start = mixture(0.0)  # the receiver, which the reward depends on, stays as it is at the end
    assert start["drift"] == pytest.approx(first["drift"], rel=1e-6) and start["kl"] == 0
    assert last["drift"] != pytest.approx(first["drift"], rel=1e-5) and last["kl"] != 0

    assert finished(config)
    lines = tmp_path / label.replace(":", ",") / "seed3" / "metrics.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:-1]))
    assert not finished(config)


def test_an_interrupted_run_goes_on_and_another_one_is_refused(tmp_path, capsys):
    assert main(command(tmp_path, "ppo", "--seeds", "1", updates=2)) == 0, capsys.readouterr().err
    assert main(command(tmp_path, "ppo", "--seeds", "1")) == 0, capsys.readouterr().err
    lines = json.loads((tmp_path / "tradeoff.json").read_text())["runs"]["ppo"]["0"]
    assert [line["update"] for line in lines] == [0, 2, 4]
    assert main(command(tmp_path, "ppo", "--seeds", "1", learning_rate=0.1)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 1 runs failed, the first in" in error and "learning_rate" in error


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys):
    (tmp_path / "ppo" / "seed0").mkdir(parents=True)
    (tmp_path / "ppo" / "seed0" / "notes").write_text("of somebody else")
    assert main(command(tmp_path, "fixed-sender,ppo,reinforce", "--seeds", "1")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 3 runs failed, the first in" in error and "ppo/seed0 " in error and "other files" in error
    assert (tmp_path / "reinforce" / "seed0" / "samples.md").exists()
    assert not (tmp_path / "summary.md").exists()


def test_a_model_that_cannot_be_loaded_is_named_before_the_first_run(tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    label = f"ppo:model={tmp_path / 'nothing'}"
    assert main(command(tmp_path / "compare", f"ppo,{label}", "--seeds", "1")) == 2
    assert "nothing" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "compare").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_comparison_ends_its_runs(tmp_path, number):
    """Both runs have saved what they had done, and their processes are gone."""
    argv = command(tmp_path, "elastic-reset,ppo", "--seeds", "1", "--jobs", "2", updates=10_000)
    program_file = ROOT / "tutorials" / "compare.py"
    with open(tmp_path / "output", "w") as output:
        comparison = subprocess.Popen(
            [sys.executable, str(program_file), *argv],
            stderr=output,
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        )
    places = [tmp_path / method / "seed0" / "metrics.jsonl" for method in ("elastic-reset", "ppo")]
    deadline = time.monotonic() + 120
    while not all(place.exists() and place.read_text().count("\n") > 1 for place in places):
        assert time.monotonic() < deadline and comparison.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.1)
    children = psutil.Process(comparison.pid).children()
    assert len(children) == 2
    comparison.send_signal(number)
    assert comparison.wait(60) == 128 + number
    assert (tmp_path / "output").read_text().endswith("compare.py: stopped; the same command goes on\n")
    assert not any(child.is_running() for child in children)
    for place in places:
        assert list((place.parent / "checkpoint").iterdir())
        log = place.parent.with_suffix(".log").read_text()
        assert "stopped after update" in log.splitlines()[-1]


def test_a_run_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "GRACE", 0.5)
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); print(1, flush=True); time.sleep(99)"
    run = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True)
    assert run.stdout.read(1) == b"1"
    program.end([run], [])
    assert run.returncode == -signal.SIGKILL


def test_signals_are_noted_and_ignored_ones_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with program.stop_signals() as stops:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stops == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
