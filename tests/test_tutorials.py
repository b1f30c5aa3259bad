"""README and tutorials: their Python blocks from top to bottom, their pictures, where their links lead, and
the files of the paper's settings."""

import itertools
import json
import os
import re
import subprocess
import sys

import matplotlib
import pytest
from conftest import ROOT
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from elastic_reset import METHODS, TASKS, configure, parse_flags

CHAPTERS = [ROOT / "README.md", *sorted((ROOT / "tutorials").glob("[0-9]*.md"))]
RESULTS = ROOT / "tutorials" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "tutorials").glob("*.md")), ROOT / "ema_kernel" / "README.md"]
PAGES += sorted(RESULTS.glob("*.md"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter(path, monkeypatch, tmp_path):
    """It runs, and each plot that it leaves in the current folder has a copy that its text shows. The names
    of these begin with the chapter's number."""
    (tmp_path / "tutorials").symlink_to(ROOT / "tutorials")
    monkeypatch.chdir(tmp_path)
    examples = list(Sybil([PythonCodeBlockParser()]).parse(path))
    assert examples
    with matplotlib.rc_context():  # the chapters' fonts are not those of other tests' pictures
        for example in examples:
            example.evaluate()
    shown = re.findall(r"!\[[^]]*\]\(figures/(\d\d_[^)]+\.png)\)", path.read_text(encoding="utf-8"))
    assert {picture.name for picture in tmp_path.glob("*.png")} == set(shown)


def paper_config(task, *flags):
    file = ROOT / "tutorials" / "paper" / f"{task}.yaml"
    return configure(**parse_flags(["--config", str(file), *flags]))


@pytest.mark.parametrize("task", TASKS)
def test_the_paper_s_settings_with_every_method(task):
    """Of the task's preset for small models nothing is left; a method still sets what is its own."""
    lines = (ROOT / "tutorials" / "paper" / f"{task}.yaml").read_text(encoding="utf-8").splitlines()
    names = {line.partition(":")[0] for line in lines if re.match(r"\w", line)}
    assert TASKS[task].preset.keys() | {"task"} <= names and "method" not in names
    assert (paper_config(task).task, paper_config(task).method) == (task, "elastic-reset")
    for method in METHODS:
        penalty = (
            ["--kl_coef", "0.05"] if task == "translation" and method in ("ppo-kl", "ema-reference") else []
        )
        config = paper_config(task, "--method", method, *penalty)
        assert (config.method, config.ema_decay) == (method, 0.995)
        assert config.reset == METHODS[method]["reset"]
        if method in ("ppo", "reinforce"):
            assert (config.kl_coef, config.kl_target, config.kl_reference) == (0, 0, "init")
        if method in ("ppo-kl", "ema-reference"):
            assert config.kl_coef == {"translation": 0.05, "imdb": 0.001, "qa": 0.02}[task]
            assert config.kl_reference == METHODS[method]["kl_reference"]


def test_the_paper_s_numbers():
    game, reviews, questions = (paper_config(task) for task in ("translation", "imdb", "qa"))
    assert (game.reset_every, game.kl_coef, game.learning_rate) == (1000, 0, 1e-4)
    assert (reviews.reset_every, reviews.kl_target, reviews.kl_reference) == (17, 1, "ema")
    assert (questions.reset_every, questions.ema_update, questions.kl_target) == (260, "epoch", 6)
    assert questions.learning_rate == 1.41e-5 and questions.mini_batch_size == 128


@pytest.mark.parametrize("method", ["ppo-kl", "ema-reference"])
def test_a_penalty_in_the_paper_s_game_needs_a_coefficient(method):
    with pytest.raises(ValueError, match="kl_coef is 0"):
        paper_config("translation", "--method", method)


def test_a_method_has_one_colour_everywhere():
    from tutorials import pictures

    known = {color for color, _ in [*pictures.STYLES.values(), *pictures.SPARE]}
    for path in CHAPTERS:
        assert {*re.findall(r"#[0-9A-F]{6}", path.read_text(encoding="utf-8"))} <= known, path.name


def test_the_animation_marks_what_people_did_not_say_and_draws_a_frame():
    from tutorials.figures import saw_tooth

    human, said = "the old cook sees a hat", "this elderly cook sees sees a cat"
    assert saw_tooth.faults(said, human) == [False, False, False, False, True, False, True]
    assert saw_tooth.stammers(said) and not saw_tooth.stammers(human)
    begun = dict(update=0, event="", reward=-2.0, drift=0.2, english=[human, human])
    before = begun | dict(update=10, event="before reset", english=[human, said])
    history = [begun, before, begun | dict(update=10, event="after reset")]
    assert saw_tooth.most_repaired(history, before) == 1
    captions = {"French": ["un", "deux"], "human English": [human, human]}
    frame = saw_tooth.draw({"ppo": history[:2], "elastic-reset": history}, captions, 1, 2)
    assert frame.size == (810, 522)


def test_the_evidence_is_drawn_from_the_records():
    from tutorials.figures import evidence

    panels = evidence.picture(evidence.records()).axes
    for axes, task in zip(panels, evidence.TASKS, strict=True):
        stars = next(line for line in axes.lines if line.get_marker() == "*")
        methods = (evidence.ALONE, evidence.WEAK)
        shown = [evidence.per_cent_of_the_penalty(task, words)[0] for words in methods]
        assert stars.get_ydata() == pytest.approx(shown)
        lines = axes.containers[: len(evidence.COMPARED)]
        assert all(len(container.lines[0].get_xdata()) > 3 for container in lines)
    for page, tables in evidence.page_tables().items():
        text = (RESULTS / f"{page}.md").read_text(encoding="utf-8")
        for name, table in tables.items():
            assert table in text, f"{page}: {name}"
    for task in evidence.TASKS:
        words = f"{evidence.per_cent_of_the_penalty(task, evidence.ALONE)[0]:.0f} per cent"
        assert words in (RESULTS / "README.md").read_text(encoding="utf-8"), task


def test_records_that_are_compared_begin_with_the_same_models():
    """And the fixed sender, whose runs two records have, ends with the same numbers in both."""
    from tutorials.figures import evidence

    for task, folders in itertools.product(evidence.TASKS, evidence.RECORDS.values()):
        rivals, ours = (evidence.record_of(task, folder)["summary"] for folder in folders)
        for name in ("reward", "drift"):
            assert rivals["start"][name] == ours["start"][name], (task, folders)
        known, new = (summary["ends"][["reward", "drift"]] for summary in (rivals, ours))
        shared = known.index.intersection(new.index)
        assert set(shared.unique("setting")) == ({"fixed-sender"} if task == "translation" else set())
        assert known.loc[shared].equals(new.loc[shared])


def test_the_page_of_the_real_model_is_read_from_its_record():
    from tutorials.figures import real_model

    text = (RESULTS / "real_model.md").read_text(encoding="utf-8")
    for name, table in real_model.page_tables().items():
        assert table in text, name
    record = real_model.tradeoff.read_record(real_model.RECORD)
    points = {line.get_label(): len(line.get_xdata()) for line in real_model.picture(record).axes[0].lines}
    assert all(points[words] > 1 for words in real_model.KINDS)
    for axes in real_model.grpo_picture().axes:  # before and after each of four resets
        assert [len(line.get_xdata()) for line in axes.lines] == [5, 9]


def test_texts_stand_under_their_prompts_also_if_one_has_not_changed(tmp_path, monkeypatch):
    from elastic_reset import samples_text
    from tutorials.figures import real_model

    monkeypatch.setattr(real_model, "RECORD", tmp_path)
    start = [dict(prompt=f"prompt {i}", continuation="old") for i in range(4)]
    end = [
        row | dict(continuation=text) for row, text in zip(start, ["old", "a|b", "c\n\nd", "e"], strict=True)
    ]
    for seed in (9, 10):
        folder = tmp_path / "ppo-kl,kl_coef=0.1" / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "samples.md").write_text(samples_text(start, start if seed == 10 else end, 5))
    real_model.copy_samples(tmp_path, ["ppo-kl:kl_coef=0.1"])
    rows = [table.splitlines()[-1] for table in real_model.sample_tables()]
    assert rows == [f"| ppo-kl:kl_coef=0.1 | {text} |" for text in ("old", "a\\|b", "c / d")]
    with pytest.raises(ValueError, match="ppo has no finished run"):
        real_model.copy_samples(tmp_path, ["ppo"])


def run_py(*words, folder):
    command = [sys.executable, str(ROOT / "tutorials" / "run.py"), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_run_py_runs_a_chapter_in_the_current_folder(tmp_path):
    done = run_py("2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "in float32" in done.stdout
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"]


def test_run_py_writes_notebooks_and_scripts_once(tmp_path):
    assert run_py("2", "--notebook", "--script", folder=tmp_path).returncode == 0
    notebook = json.loads((tmp_path / "02_an_ema_by_hand.ipynb").read_text(encoding="utf-8"))
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds[:2] == ["markdown", "code"] and notebook["nbformat"] == 4
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    script = (tmp_path / "02_an_ema_by_hand.py").read_text(encoding="utf-8")
    assert all(cell in script for cell in code)
    links = re.findall(r"\]\((?!http|#)([^)#]+)", json.dumps(notebook))
    assert links and all((tmp_path / link).exists() for link in links)
    again = run_py("2", "--script", folder=tmp_path)
    assert again.returncode == 2 and "File exists" in again.stderr


@pytest.mark.parametrize("number", ["0", "42", "three"])
def test_run_py_names_a_wrong_chapter_in_one_line(number, tmp_path):
    done = run_py(number, folder=tmp_path)
    assert done.returncode == 2
    assert number in done.stderr.splitlines()[-1]


def test_run_py_names_the_line_of_an_error(tmp_path):
    code = "import run; from pathlib import Path; run.run(Path('chapter.md'))"
    (tmp_path / "chapter.md").write_text("text\n\n```python\n1 / 0\n```\n")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | dict(PYTHONPATH=str(ROOT / "tutorials")),
    )  # fmt: skip
    assert 'chapter.md", line 4' in done.stderr and "ZeroDivisionError" in done.stderr


LINK = re.compile(r"\[((?:[^][]|\[[^]]*\])*)\]\(([^)\s]+)\)")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    """To a file; to a heading; to a line that holds the words of the link."""
    text = path.read_text(encoding="utf-8")
    links = [(label, target) for label, target in LINK.findall(text) if not target.startswith("http")]
    for label, target in links:
        name, _, place = target.partition("#")
        aim = (path.parent / name if name else path).read_bytes().decode(errors="replace")
        if re.fullmatch(r"L\d+", place):
            lines, word = aim.splitlines(), label.strip("`")
            now = [i for i, line in enumerate(lines, 1) if word in line]
            assert int(place[1:]) in now, f"{path.name}: {label} is in line {now}, not {place}"
        elif place:
            headings = [line.lstrip("# ").lower() for line in aim.splitlines() if line.startswith("#")]
            assert place in [re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings]
