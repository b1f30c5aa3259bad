"""compare.py, tradeoff.py and pictures.py: numbers by hand, recorded comparisons, runs in processes."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pandas
import psutil
import pytest
from conftest import ROOT, TINY
from hypothesis import given
from hypothesis import strategies as st

from elastic_reset import configure, parse_flags
from tutorials import compare as program
from tutorials.compare import evaluation_of, expanded, finished, main, to_argv
from tutorials.pictures import (
    STYLES,
    drawn_methods,
    methods_along,
    over_updates,
    plot_basin,
    plot_choice,
    plot_map,
    plot_tradeoff,
    spread,
    styles_of,
    write_pictures,
)
from tutorials.tradeoff import (
    KNOBS,
    area_under_front,
    difference,
    mean_and_error,
    method_of,
    split_label,
    summary_text,
    tradeoff,
)

GAME = TINY | dict(task="translation")
RECORDS = [ROOT / "tutorials" / "results" / task for task in ("imdb", "qa", "translation")]


def history(*points):
    return [dict(update=i, event="", drift=d, reward=r) for i, (d, r) in enumerate(points)]


def record_of(runs):
    """A record with its summary; a label's settings are those that it names."""
    record = dict(runs=runs, configs={}, command=[], commit="", torch="")
    for label in runs:
        method, own = split_label(label)
        config = dict(task="translation", kl_coef=0.0, learning_rate=1.0, updates=400)
        if method == "elastic-reset":
            config |= dict(reset="elastic", reset_every=50)
        if method.endswith(".py:S2P"):
            config |= own
        config |= {name: float(value) for name, value in own.items() if name in KNOBS}
        config["ema_decay"] = float(own.get("share", 0.13)) ** (1 / config.get("reset_every", 50))
        record["configs"][label] = config
    return record | dict(summary=tradeoff(record))


# The numbers


def test_area_by_hand():
    """A gain of 4 over the start's 1 at drift 2: of the range 1 to 3 the upper half gains 4."""
    assert area_under_front([2, 2.5], [5, 2], 1, 1, 3) == pytest.approx(2)
    assert area_under_front([2], [-4], 0, 1, 3) == 0
    assert area_under_front([0.5], [2], 0, 0.5, 1.5) == pytest.approx(2)
    assert area_under_front([9, 2, 1], [4, 1, 3], 0, 1, 3) == pytest.approx(3)


@given(st.lists(st.tuples(st.floats(0.5, 4), st.floats(-2, 5)), min_size=1, max_size=5))
def test_area_against_its_definition(points):
    places = [1 + 2 * (i + 0.5) / 2000 for i in range(2000)]
    area = sum(max([0.0] + [r for d, r in points if d <= place]) for place in places) / 2000
    drifts, rewards = zip(*points, strict=True)
    assert area_under_front(drifts, rewards, 0, 1, 3) == pytest.approx(area, abs=0.02)


def numbers_of(summary, setting, name):
    return [*summary["ends"].loc[setting][name]]


def test_numbers_by_hand():
    small, large = "elastic-reset:kl_coef=0.1", "elastic-reset:kl_coef=0.2"
    runs = {
        small: {0: history((1, 0), (1.2, 2)), 1: history((1, 0), (1.1, 1))},
        large: {0: history((1, 0), (1, 1)), 1: history((1, 0), (1.0, 2))},
    }
    record = record_of(runs)
    numbers = record["summary"]
    assert numbers["range"] == [1, 1.5] and numbers["floor"] == 0
    assert numbers_of(numbers, small, "reward") == [2, 1] and numbers_of(numbers, small, "drift") == [
        1.2,
        1.1,
    ]
    assert numbers_of(numbers, small, "area") == pytest.approx([0.3 / 0.5 * 2, 0.4 / 0.5 * 1])
    assert numbers_of(numbers, large, "area") == pytest.approx([1, 2])
    name = "elastic-reset and a penalty"
    assert [*numbers["together"][name]] == pytest.approx([1 + 0.3 / 0.5 * 1, 2])
    assert [*numbers["methods"].loc[name]] == [2, large, small, False]  # settings, chosen, worst
    again = tradeoff(record | dict(chosen={name: small}))
    assert [*again["methods"].loc[name]] == [2, small, small, True]
    again = tradeoff(record | dict(chosen={name: "elastic-reset:kl_coef=0.3"}))  # which was not run
    assert [*again["methods"].loc[name]] == [2, large, small, False]


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match="ppo, seed 1: drift is no number"):
        record_of({"ppo": {0: history((1, 0), (2, 1)), 1: history((1, 0), (float("nan"), 1))}})
    with pytest.raises(ValueError, match="the start's drift is 0"):
        record_of({"ppo": {0: history((0, 0), (2, 1))}})


def test_in_the_game_gains_begin_where_the_receiver_gets_alone():
    runs = {"fixed-sender": {0: history((1, 0), (1, 3))}, "ppo": {0: history((1, 0), (1, 5))}}
    numbers = record_of(runs)["summary"]
    assert numbers["floor"] == 3 and numbers_of(numbers, "ppo", "area") == [2]
    slow = {f"fixed-sender{own}": runs["fixed-sender"] for own in (":batch_size=8", ":average=1")}
    for label, own in slow.items():
        numbers = record_of({label: own, "ppo": runs["ppo"]})["summary"]
        assert (numbers["floor"], numbers["floor_of"]) == (3, "the fixed sender's")
    assert record_of({"ppo": runs["ppo"]})["summary"]["floor_of"] == "the start's"


def test_what_makes_a_method():
    none, some = dict(kl_coef=0.0), dict(kl_coef=3.0)
    assert method_of("ppo", none) == method_of("ppo:learning_rate=0.1", none) == "ppo-kl"
    assert method_of("ppo-kl:kl_coef=3", some) == "ppo-kl"
    assert method_of("elastic-reset:reset_every=5:share=0.3:kl_coef=0", none) == "elastic-reset"
    resets = dict(reset="elastic")
    assert method_of("elastic-reset:ema_decay=0.5", some | resets) == "elastic-reset and a penalty"
    assert method_of("reset-ema", some | dict(reset="ema")) == "reset-ema and a penalty"
    assert method_of("elastic-reset:batch_size=5", none) == "elastic-reset:batch_size=5"
    assert method_of("tutorials/baselines.py:S2P:s2p_coef=1", none) == "S2P"


def test_three_drifts_of_a_setting():
    """The largest of any evaluation, that just before the last reset, and that at the end."""
    lines = history((1, 0), (3, 1), (1.5, 1), (2, 1), (1.2, 1))
    lines[3]["event"] = "before reset"
    numbers = record_of({"elastic-reset": {0: lines}, "ppo": {0: lines[:3]}})["summary"]["ends"]
    names = ["largest", "before", "drift", "reset_every", "share"]
    assert [*numbers.loc["elastic-reset", 0][names]] == [3, 2, 1.2, 50, 0.13]
    assert [*numbers.loc["ppo", 0][names[:3]]] == [3, 1.5, 1.5]
    assert [*numbers.loc["ppo at 1", 0][names[:3]]] == [3, 3, 3]


def test_a_difference_by_hand():
    """Of 1, 2, 3 the mean is 2, its error 1 / sqrt(3). Student's t is 4.3027 for two degrees of freedom."""
    theirs = pandas.Series([5.0, 1.0, 7.0])
    mean, low, high, verdict = difference(theirs + [1, 2, 3], theirs)
    assert (mean, low, high) == pytest.approx((2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)
    assert verdict == "no clear difference"
    assert difference(theirs + [1, 1.1, 1.2], theirs)[3] == "better"
    assert difference(theirs - [1, 1.1, 1.2], theirs)[3] == "worse"
    assert difference(theirs, theirs) == (0, 0, 0, "no clear difference")
    assert difference(theirs[:2] + 1, theirs[:2])[3] == "too few seeds"
    shuffled = (theirs + [1, 1.1, 1.2]).iloc[::-1]  # a seed is its row's name, not its place
    assert difference(shuffled, theirs)[1:3] == pytest.approx(difference(theirs + [1, 1.1, 1.2], theirs)[1:3])


def test_several_values_are_as_many_methods():
    assert expanded("ppo, ppo-kl:kl_coef=0.1|0.2:learning_rate=1e-3|1e-4") == [
        "ppo",
        "ppo-kl:kl_coef=0.1:learning_rate=1e-3",
        "ppo-kl:kl_coef=0.1:learning_rate=1e-4",
        "ppo-kl:kl_coef=0.2:learning_rate=1e-3",
        "ppo-kl:kl_coef=0.2:learning_rate=1e-4",
    ]


def test_what_a_run_delivers_beside_its_end():
    """Plain PPO stopped at its evaluations, the average of its weights, mixtures with the start."""
    average = dict(update=3, event="average", drift=1.1, reward=3)
    mixture = dict(update=3, event="eta 0.30", drift=1.2, reward=2)
    plain = history((1, 0), (1.2, 1), (2, 4), (3, 5))
    numbers = record_of({"ppo": {0: [*plain, average, mixture], 1: [*plain, average, mixture]}})["summary"]
    settings = {}
    for (label, _), row in numbers["ends"].xs(0, level="seed", drop_level=False).iterrows():
        settings[label] = row["method"], row["reward"], row["update"]
    assert settings == {
        "ppo": ("ppo-kl", 5, 3),
        "ppo, average": ("ppo-kl, averaged at the end", 3, 3),
        "ppo, eta 0.30": ("ppo-kl, mixed with the start", 2, 3),
        "ppo at 1": ("ppo, stopped early", 1, 1),
        "ppo at 2": ("ppo, stopped early", 4, 2),
    }
    assert numbers["ends"].loc["ppo, eta 0.30", 0]["eta"] == 0.3


def test_mean_and_standard_error():
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2, 1 / 3**0.5))
    assert mean_and_error([1.0]) == (1, 0)


def test_means_over_the_seeds():
    runs = {0: history((1, 0), (2, 4)), 1: history((1, 2), (7, 9))}
    rewards = over_updates(runs, "reward")
    assert [*rewards["mean"]] == [1, 6.5] and [*rewards["error"]] == pytest.approx([1, 2.5])
    runs[1].insert(1, dict(update=0.5, event="", drift=3, reward=5))  # which the other seed has not
    assert [*over_updates(runs, "reward")["mean"]] == [1, 6.5]


def test_settings_with_fewer_seeds_say_so():
    runs = {"ppo": {0: history((1, 0), (1.2, 2)), 1: history((1, 0), (1.1, 1))}}
    assert "over 2 seeds" in summary_text(record_of(runs))
    runs["reset-ema"] = {0: runs["ppo"][0]}
    text = summary_text(record_of(runs))
    assert "over at most 2 seeds" in text
    assert "| ppo (seeds: 2) |" in text and "| reset-ema (seeds: 1) |" in text


# Recorded comparisons


@pytest.mark.parametrize("folder", RECORDS, ids=lambda folder: folder.name)
def test_records_give_their_numbers_and_tables_again(folder):
    record = json.loads((folder / "tradeoff.json").read_text(encoding="utf-8"))
    record["summary"] = tradeoff(record)
    assert summary_text(record) == (folder / "summary.md").read_text(encoding="utf-8")


def test_a_record_is_shown_again(tmp_path, capsys):
    """Also one with a method that is not known any more."""
    text = (RECORDS[2] / "tradeoff.json").read_text(encoding="utf-8")
    (tmp_path / "tradeoff.json").write_text(text.replace('"reinforce"', '"of old"'), encoding="utf-8")
    assert main(["--read", str(tmp_path)]) == 0
    tables = (RECORDS[2] / "summary.md").read_text(encoding="utf-8").partition("\n`")[0]
    written = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert written.partition("\n`")[0] == tables.replace("reinforce", "of old")
    assert written == capsys.readouterr().out[:-1]
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"runs": {}, "configs": {}}', "no commit"])
def test_what_is_no_record_is_said_in_one_line(text, tmp_path, capsys):
    if text == "no commit":
        record = json.loads((RECORDS[0] / "tradeoff.json").read_text(encoding="utf-8"))
        del record["commit"]
        text = json.dumps(record)
    (tmp_path / "tradeoff.json").write_text(text, encoding="utf-8")
    assert main(["--read", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "tradeoff.json is no record of a comparison" in error and error.count("\n") == 1


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


def test_a_method_looks_the_same_in_both_panels():
    runs = {"ppo": {0: history((1, 0), (1.2, 1), (9, 3))}}
    runs |= {f"ppo-kl:kl_coef={coef}": {0: history((1, 0), (1 + coef, coef))} for coef in (0.1, 0.2)}
    record = record_of(runs)
    left, right = plot_tradeoff(record).axes
    curves = {line.get_label(): line for line in left.lines}
    chosen = record["summary"]["methods"].loc["ppo-kl", "chosen"]
    names = [text.get_text().partition("\nends at")[0].replace("\n", ":") for text in right.texts]
    assert {*names} == {"ppo", chosen}
    penalty = next(line for line in right.lines if line.get_ydata()[-1] < 2)
    for look in ("color", "marker", "linestyle", "fillstyle"):
        assert getattr(penalty, f"get_{look}")() == getattr(curves["ppo-kl"], f"get_{look}")()


def test_names_do_not_overlap_and_lie_within_the_picture():
    assert spread([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    heights = spread([0.2, 0.2, 0.21, 0.99, 1.0], 0.1)
    assert heights == pytest.approx([0.2, 0.3, 0.4, 0.85, 0.95])


@pytest.mark.parametrize("drift", [0.5, 2, 200])
def test_names_and_legend_of_a_picture_lie_apart(drift):
    """The names right of the curves and those of the legend are where no other text is. A curve that leaves
    the panel says where it ends."""
    labels = ["elastic-reset", "ppo-kl:d_model=8", "ppo-kl:d_model=16"]
    runs = {label: {0: history((1, -99), (drift, 1), (drift + i / 99, 2))} for i, label in enumerate(labels)}
    figure = plot_tradeoff(record_of(runs))
    figure.draw_without_rendering()
    texts = figure.axes[1].texts + figure.legends[0].texts + figure.axes[0].texts
    names = [text.get_text().replace("\n", ":", 1) for text in texts]
    assert all(sum(name.startswith(label) for name in names) == 2 for label in labels)
    assert sum("ends at 200" in name for name in names) == (3 if drift == 200 else 0)
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), (names[i], names)
        assert 0 <= box.x0 and box.x1 <= figure.bbox.width and 0 <= box.y0 and box.y1 <= figure.bbox.height


def test_a_picture_of_many_methods_has_the_best_of_each_kind():
    worse, better = {0: history((1, 0), (1.2, 1))}, {0: history((1, 0), (1.1, 2))}
    runs = {"ppo": {0: history((1, 0), (1.2, 1), (1.4, 1.5))}, "reset-ema": worse, "elastic-reset": better}
    summary = record_of(runs)["summary"]
    assert [*summary["methods"].index] == ["ppo-kl", "ppo, stopped early", "reset-ema", "elastic-reset"]
    assert drawn_methods(summary) == ["elastic-reset", "ppo, stopped early", "ppo-kl"]
    del runs["reset-ema"]
    assert drawn_methods(record_of(runs)["summary"]) == ["ppo-kl", "ppo, stopped early", "elastic-reset"]


def runs_over(method, drift_of, **knobs):
    """Runs of a method with all combinations of the values of two knobs."""
    (one, values), (other, more) = knobs.items()
    runs = {}
    for a, b in itertools.product(values, more):
        ends = {seed: history((1, 0), (drift_of(a, b), seed + b)) for seed in (0, 1)}
        runs[f"{method}:{one}={a}:{other}={b}"] = ends
    return runs


def test_a_picture_of_the_coefficients():
    runs = runs_over("ppo-kl", lambda a, b: 1 + b, kl_coef=[0.1, 0.2, 0.4], learning_rate=[0.1])
    runs |= runs_over("elastic-reset", lambda a, b: 1 + b, kl_coef=[0.1, 0.2], learning_rate=[0.1])
    figure = plot_choice(record_of(runs))
    names = [line.get_label() for line in figure.axes[0].containers]
    assert names == ["ppo-kl", "elastic-reset and a penalty"]


def test_the_coefficient_0_stands_apart_and_joins_resets_of_the_same_period():
    """The smallest coefficient is 0.003, so 0 stands at 0.001, where no other number may stand."""
    ends = {0: history((1, 0), (1.1, 1)), 1: history((1, 0), (1.2, 2))}
    resets = {f"elastic-reset:kl_coef={coef}": ends for coef in (0, 0.003, 0.1)}
    axes = plot_choice(record_of(resets)).axes[0]
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown[0] == "0" and "0.001" not in shown and "0.01" in shown
    assert len(axes.containers[0].lines[0].get_xdata()) == 3
    other = {"elastic-reset:kl_coef=0:reset_every=100": ends} | {name: resets[name] for name in [*resets][1:]}
    axes = plot_choice(record_of(other)).axes[0]
    assert len(axes.containers[0].lines[0].get_xdata()) == 2


def test_methods_that_differ_in_something_else_are_no_curve():
    ends = {0: history((1, 0), (1.1, 1))}
    labels = [f"a.py:S2P:kl_coef={coef}:s2p_coef={other}" for coef in (0.1, 0.2) for other in (1, 2)]
    record = record_of({label: ends for label in labels})
    assert not methods_along(record["summary"]["ends"], "kl_coef")
    record = record_of({label: ends for label in labels[::2]})
    assert [*methods_along(record["summary"]["ends"], "kl_coef")] == ["S2P"]


def test_nothing_ends_well_where_nothing_is_gained():
    knobs = dict(kl_coef=[0.1, 0.2], learning_rate=[0.01, 0.1])
    runs = runs_over("ppo-kl", lambda coef, rate: 1.1, **knobs)
    for seeds in runs.values():
        for lines in seeds.values():
            lines[-1]["reward"] = -0.5
    axes = plot_basin(record_of(runs)).axes[0]
    assert axes.get_title() == "ppo-kl\n0 of 4 cells end well"


def test_pictures_that_a_record_has_no_settings_for_are_deleted(tmp_path):
    knobs = dict(reset_every=[100, 400], share=[0.2, 0.4])
    record = record_of(runs_over("elastic-reset", lambda every, share: 1 + every / 1000, **knobs))
    for name in ("choice", "basin", "notes"):
        (tmp_path / f"{name}.png").write_bytes(b"old")
    write_pictures(record, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tradeoff.png", "map.png", "notes.png"}


def test_a_picture_of_coefficients_and_learning_rates():
    """The rate 0.1 has nine tenths of the best gain, 0.6, and its drift counts at 0.2 and 0.4."""
    knobs = dict(kl_coef=[0.1, 0.2, 0.4], learning_rate=[0.01, 0.1])
    runs = runs_over("ppo-kl", lambda coef, rate: 1 + rate / coef, **knobs)
    runs |= runs_over("elastic-reset", lambda coef, rate: 1 + rate / coef, **knobs)
    titles = [axes.get_title() for axes in plot_basin(record_of(runs)).axes[:2]]
    names = ("ppo-kl", "elastic-reset and a penalty")
    assert titles == [f"{name}\n2 of 6 cells end well" for name in names]


def test_a_map_of_periods_and_shares():
    """Each cell has its drift and the share of the best gain; the last row is named what it is."""
    knobs = dict(reset_every=[100, 400], share=[0.2, 0.4])
    runs = runs_over("elastic-reset", lambda every, share: 1 + every / 1000, **knobs)
    axes = plot_map(record_of(runs)).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.1\n78%", "1.1\n100%", "1.4\n78%", "1.4\n100%"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["100", "400\nonce, at the end"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.2", "0.4"]


def test_a_cell_that_was_not_run_does_not_end_well():
    knobs = dict(kl_coef=[0.1, 0.2], learning_rate=[0.01, 0.1])
    runs = runs_over("ppo-kl", lambda coef, rate: 1.1, **knobs)
    del runs["ppo-kl:kl_coef=0.2:learning_rate=0.1"]
    axes = plot_basin(record_of(runs)).axes[0]
    assert axes.get_title() == "ppo-kl\n1 of 3 cells end well"
    assert "not run" in [text.get_text() for text in axes.texts]


# Comparisons


def command(folder, methods, *words, **flags):
    return to_argv(GAME | dict(output_dir=str(folder)) | flags) + ["--methods", methods, *words]


def exit_code(main, words):
    """What main() returns for these flags, or exits with."""
    try:
        return main(words.split())
    except SystemExit as stop:
        return stop.code


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
        ("--task imdb --methods ppo:average=2", "average is 2; expected 0 or 1"),
        ("--task imdb --methods elastic-reset:share=0.3:ema_decay=0.9", "share sets ema_decay"),
        ("--task imdb --methods nowhere.py:S2P", "there is no program nowhere.py"),
        (f"--task imdb --methods {ROOT / 'README.md'}:S2P", "there is no program"),
        (f"--task imdb --methods {ROOT / 'elastic_reset.py'}:ppo", "has no parse() and configure_baseline()"),
        (f"--read {RECORDS[0]} --tuned_on {RECORDS[0]}", "--read FOLDER alone"),
        (
            f"--task translation --methods ppo-kl:kl_coef=9 --seed 7 --tuned_on {RECORDS[2]}",
            "--tuned_on chose",
        ),
        ("--task imdb --methods elastic-reset:share=2", "share is 2; expected a number between 0 and 1"),
        ("--task imdb --methods elastic-reset:share=0.0", "share is 0.0; expected a number between 0 and 1"),
        ("--task imdb --methods ppo:share=0.3", "share is for elastic resets"),
        ("--task imdb --methods elastic-reset:share=0.3:ema_update=epoch", "share is for elastic resets"),
        ("--task imdb --methods elastic-reset:average=1", "the last update resets the average to the start"),
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
    assert exit_code(main, words) == 2
    error = capsys.readouterr().err
    assert error.startswith(("compare.py: ", "elastic_reset.py: error: "))
    assert error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())


def test_settings_are_not_chosen_on_the_seeds_that_are_reported(capsys):
    words = ["--task", "translation", "--methods", "ppo", "--tuned_on", str(RECORDS[2])]
    assert main([*words, "--seed", "3", "--seeds", "2"]) == 2
    assert "has the seed 3 too; report on other seeds" in capsys.readouterr().err
    chosen = program.chosen_on(RECORDS[2], range(100, 103))
    assert chosen["ppo-kl"] == "ppo-kl:kl_coef=0.03"


def test_each_of_several_records_chooses_for_its_methods(monkeypatch):
    given = []
    monkeypatch.setattr(program, "compare", lambda *arguments: given.append(arguments[-1]) or "")
    map_and_tuning = [str(RECORDS[2] / folder) for folder in ("map", "tuning")]
    words = ["--task", "translation", "--methods", "ppo", "--seed", "3", "--tuned_on", *map_and_tuning]
    assert main(words) == main([*words[:-2], *reversed(map_and_tuning)]) == 0
    first, second = given
    assert first.keys() == second.keys()
    assert first["elastic-reset"] == "elastic-reset:kl_coef=0"  # both have it, and the last one chooses
    assert second["elastic-reset"] == "elastic-reset:kl_coef=0:reset_every=100:share=0.6"
    assert first["S2P"] == second["S2P"] == "tutorials/baselines.py:S2P:s2p_coef=0.2"  # only one has it


@pytest.mark.parametrize(
    ("text", "message"), [('task: imdb\nseed: "3"', "--seed is '3'"), ("task: [imdb]", "--task is ['imdb']")]
)
def test_a_file_s_settings_of_another_kind_are_named(text, message, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    assert main(["--config", str(file), "--methods", "ppo"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_programs_of_one_name_in_two_folders_are_two(tmp_path, capsys):
    """Each is the file that was named, and they do not share a folder."""
    programs = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        programs.append(tmp_path / folder / "own.py")
        text = f"where = {folder!r}\nfrom tutorials.baselines import configure_baseline, parse\n"
        programs[-1].write_text(text)
    assert [program.program_at(str(path)).where for path in programs] == ["one", "two"]
    methods = ",".join(f"{path}:S2P:s2p_coef=1" for path in programs)
    assert main(["--task", "translation", "--methods", methods, "--output_dir", str(tmp_path / "runs")]) == 2
    assert "have the same folder" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_a_program_is_no_wrong_flag(monkeypatch):
    monkeypatch.setattr(program, "compare", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--task", "imdb", "--methods", "ppo"])


def test_help_points_to_the_other_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--methods LIST" in text and "elastic_reset.py --help" in text


def test_settings_of_a_method(tmp_path):
    shared = to_argv(GAME | dict(kl_coef=0.5))
    label = "ppo:mixtures=3:average=1:kl_coef=0.2:model=a/b:c"
    config, afterwards = program.settings_of(label, 7, shared, tmp_path)
    assert afterwards == {"eta 0.25": 0.25, "eta 0.50": 0.5, "eta 0.75": 0.75, "average": None}
    assert config.output_dir == str(tmp_path / "ppo,kl_coef=0.2,model=a%2Fb%3Ac" / "seed7")
    other = dict(method="ppo", seed=7, kl_coef=0.2, model="a/b:c", output_dir=config.output_dir, resume=True)
    assert config == configure(**parse_flags(shared) | other)


def test_the_share_of_a_reset_sets_the_decay(tmp_path):
    """After as many updates as a period has, the start's weight in the average is decay ** period."""
    shared = ["--task", "translation"]
    label = "elastic-reset:reset_every=100:share=0.35"
    config, _ = program.settings_of(label, 0, shared, tmp_path)
    assert config.reset_every == 100 and config.ema_decay**100 == pytest.approx(0.35, rel=1e-3)
    assert config.output_dir == str(tmp_path / "elastic-reset,reset_every=100,share=0.35" / "seed0")
    config, _ = program.settings_of("elastic-reset:share=.5", 0, shared, tmp_path)
    assert config.reset_every == 100 and config.ema_decay**100 == pytest.approx(0.5, rel=1e-3)


def test_a_method_overrides_a_file_and_flags_override_the_method(tmp_path):
    file = ["--config", str(ROOT / "tutorials" / "paper" / "imdb.yaml")]

    def kl_coef(label, *flags):
        return program.settings_of(label, 0, [*file, *flags], tmp_path)[0].kl_coef

    assert (kl_coef("ppo"), kl_coef("ppo-kl"), kl_coef("ppo-kl:kl_coef=0.3")) == (0.0, 0.001, 0.3)
    assert (kl_coef("ppo", "--kl_coef", "0.2"), kl_coef("ppo:kl_coef=0.3", "--kl_coef", "0.2")) == (0.2, 0.3)


def test_comparison_end_to_end_and_once_more(tmp_path, capsys):
    label = "ppo:kl_coef=0.2:d_model=24"
    methods = f"elastic-reset,{label},{label}:mixtures=3"
    argv = command(tmp_path, methods, "--seeds", "2", "--jobs", "2", seed=3)
    assert main(argv) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "tradeoff.json").read_text())
    plain, mixed = record["runs"][label], record["runs"][f"{label}:mixtures=3"]
    assert set(record["runs"]["elastic-reset"]) == set(plain) == set(mixed) == {"3", "4"}
    assert record["configs"][label]["kl_coef"] == 0.2 and record["commit"] == program.commit()
    assert mixed["3"][:-3] == plain["3"] and plain["3"] != plain["4"]
    assert [line["event"] for line in mixed["3"][-3:]] == ["eta 0.25", "eta 0.50", "eta 0.75"]
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    summary = (tmp_path / "summary.md").read_text()
    assert "| elastic-reset |" in summary and summary.strip() in capsys.readouterr().out
    assert len(list(tmp_path.glob("*/seed*/afterwards.jsonl"))) == 2
    logs = [log.read_text() for log in tmp_path.glob("*/seed*.log")]
    assert len(logs) == 4 and "RL, ppo" in "".join(logs) and "training the" not in "".join(logs)
    places = [place for place in tmp_path.glob("*/**/*") if place.is_file()]
    before = [place.stat().st_mtime_ns for place in places]
    assert main(argv) == 0 and (tmp_path / "summary.md").read_text() == summary
    assert before == [place.stat().st_mtime_ns for place in places]

    config, _ = program.settings_of(label, 3, to_argv(GAME), tmp_path)
    mixture = evaluation_of(config)  # at eta 1 the policy is that of the end, at eta 0 that of the start
    first, last, names = plain["3"][0], plain["3"][-1], ("reward", "drift", "bleu_de", "bleu_en", "kl")
    assert mixture(1.0) == pytest.approx({name: last[name] for name in names}, rel=1e-5)
    start = mixture(0.0)  # the receiver, which the reward depends on, stays as it is at the end
    assert start["drift"] == pytest.approx(first["drift"], rel=1e-5) and start["kl"] == 0
    assert last["drift"] != pytest.approx(first["drift"], rel=1e-5) and last["kl"] != 0

    assert finished(config)
    lines = tmp_path / label.replace(":", ",") / "seed3" / "metrics.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:-1]))
    assert not finished(config)


def test_an_interrupted_run_goes_on_and_another_one_is_refused(tmp_path, capsys):
    assert main(command(tmp_path, "ppo", "--seeds", "1", updates=2)) == 0, capsys.readouterr().err
    first = (tmp_path / "ppo" / "seed0" / "metrics.jsonl").read_text()
    assert main(command(tmp_path, "ppo", "--seeds", "1")) == 0, capsys.readouterr().err
    assert (tmp_path / "ppo" / "seed0" / "metrics.jsonl").read_text().startswith(first)  # times as well
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
    assert "1 of 3 runs failed, the first in" in error and "a file of others" in error
    assert (tmp_path / "reinforce" / "seed0" / "samples.md").exists()
    assert not (tmp_path / "summary.md").exists()


def test_a_model_that_cannot_be_loaded_is_named_before_the_first_run(tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    label = f"ppo:model={tmp_path / 'nothing'}"
    assert main(command(tmp_path / "compare", f"ppo,{label}", "--seeds", "1")) == 2
    assert "nothing" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "compare").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_comparison_ends_its_runs(tmp_path, number):
    """Both runs have saved what they had done, and their processes are gone, also if SIGINT is ignored, as it
    is in what a script starts in the background."""
    argv = command(tmp_path, "elastic-reset,ppo", "--seeds", "1", "--jobs", "2", updates=10_000)
    program_file = ROOT / "tutorials" / "compare.py"

    def in_the_background():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(number, signal.SIG_DFL)

    with open(tmp_path / "output", "w") as output:
        comparison = subprocess.Popen(
            [sys.executable, str(program_file), *argv], stderr=output, preexec_fn=in_the_background
        )
    places = [tmp_path / method / "seed0" / "metrics.jsonl" for method in ("elastic-reset", "ppo")]
    deadline = time.monotonic() + 600
    while not all(place.exists() and place.read_text().count("\n") > 1 for place in places):
        assert time.monotonic() < deadline and comparison.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.1)
    children = psutil.Process(comparison.pid).children()
    assert len(children) == 2
    comparison.send_signal(number)
    assert comparison.wait(300) == 128 + number
    assert (tmp_path / "output").read_text().endswith("compare.py: stopped; the same command goes on\n")
    assert not any(child.is_running() for child in children)
    for place in places:
        assert list((place.parent / "checkpoint").iterdir())
        log = place.parent.with_suffix(".log").read_text()
        assert "stopped after update" in log.splitlines()[-1]


def test_a_run_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "GRACE", 0.5)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(99)"
    run = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True)
    assert run.stdout.read(1) == b"1"
    program.end([run], [])
    assert run.returncode == -signal.SIGKILL


def test_signals_are_noted_and_ignored_ones_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_the_start = signal.getsignal(signal.SIGTERM)
    try:
        with program.stop_signals() as stops:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stops == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == at_the_start
    finally:
        signal.signal(signal.SIGHUP, before)
