"""Room 5: comparing methods."""

import json
import math

import pytest
from conftest import TINY

from elastic_reset import area_under_front, main, mean_and_error, seed_means, to_argv, tradeoff


def history(*points):
    return [dict(update=i, event="", drift=d, reward=r) for i, (d, r) in enumerate(points)]


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


def test_comparison_end_to_end_and_resumed(tmp_path, capsys):
    flags = TINY | dict(task="translation", output_dir=str(tmp_path), seed=3)
    argv = to_argv(flags) + [
        "--compare",
        "elastic-reset,ppo:kl_coef=0.2,average-after",
        "--seeds",
        "2",
        "--jobs",
        "2",
    ]
    assert main(argv) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "tradeoff.json").read_text())
    assert set(record["runs"]) == {"elastic-reset", "ppo:kl_coef=0.2", "average-after"}
    assert set(record["runs"]["elastic-reset"]) == {"3", "4"}
    assert record["configs"]["ppo:kl_coef=0.2"]["kl_coef"] == 0.2 and len(record["commit"]) > 0
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    summary = (tmp_path / "summary.md").read_text()
    assert "| elastic-reset |" in summary and summary.strip() in capsys.readouterr().out
    places = sorted(tmp_path.glob("*/seed*/metrics.jsonl"))
    before = [place.stat().st_mtime_ns for place in places]
    assert len(places) == 6 and main(argv) == 0
    assert before == [place.stat().st_mtime_ns for place in places]


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
    mixture = dict(update=1, event="eta 0.50", drift=2, reward=5)
    methods = tradeoff({"a": {0: [*history((1, 0)), end, mixture]}, "b": {0: history((1, 0), (1, 1))}})[
        "methods"
    ]
    assert methods["a"]["passed"] == [None] and methods["a"]["reward"] == [2]
    mixture |= dict(drift=1.2)
    better = tradeoff({"a": {0: [*history((1, 0)), end, mixture]}, "b": {0: history((1, 0), (1, 1))}})[
        "methods"
    ]
    assert better["a"]["area"] > methods["a"]["area"]


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = to_argv(TINY | dict(task="translation", output_dir=str(tmp_path)))
    assert main([*flags, "--compare", "fixed-sender,ppo:model=nowhere,ppo", "--seeds", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 3 runs failed; that in" in error and "sender 'nowhere' cannot be loaded" in error
    assert (tmp_path / "ppo" / "seed0" / "samples.md").exists() and not (tmp_path / "summary.md").exists()


def test_a_run_that_fails_is_named(tmp_path, capsys):
    (tmp_path / "ppo" / "seed0").mkdir(parents=True)
    (tmp_path / "ppo" / "seed0" / "config.json").write_text("{}")
    flags = TINY | dict(task="translation", output_dir=str(tmp_path))
    assert main(to_argv(flags) + ["--compare", "ppo", "--seeds", "1"]) == 2
    assert "seed0 holds a run with task None, not 'translation'" in capsys.readouterr().err
