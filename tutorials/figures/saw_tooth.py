"""Draws saw_tooth.gif, the translation game by PPO alone and with Elastic Reset, update by update.

    python tutorials/figures/saw_tooth.py

The first call trains both policies, which takes some minutes, and keeps what they wrote at each evaluation
in runs/saw_tooth. Later calls only draw. A caption stammers when a word comes twice in a row. The one shown
stammers at the end of PPO, and most resets have ended its stammer, so it is no average one. How many of the
held-out captions stammer, at the start and at the end, is printed."""

import io
import json
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import elastic_reset  # noqa: E402
from elastic_reset import TranslationGame, configure, train  # noqa: E402
from tutorials.pictures import STYLES  # noqa: E402

METHODS = {"ppo": "PPO", "elastic-reset": "PPO with Elastic Reset"}
SEED = 101  # of 100 to 102, the one in which PPO's drift is between those of the others
PANELS = {  # the limits, and where the last value is written
    "drift": ((0.15, 0.75), (0.02, 0.98)),
    "reward": ((-0.45, 0.0), (0.99, 0.22)),
}


# ============================================== Two runs, once ==============================================


class Diary(TranslationGame):
    """The game, which also keeps what was written at each evaluation."""

    def __init__(self, config):
        super().__init__(config)
        self.pages = []

    def evaluate(self, responses):
        metrics = super().evaluate(responses)
        self.pages.append(metrics["samples"])
        return metrics


def play(method, folder):
    """One run of the default game, evaluated more often."""
    config = configure("translation", method, seed=SEED, eval_every=10, output_dir=str(folder / method))
    game = Diary(config)
    history = train(config, task=game)["history"]
    for line, page in zip(history, game.pages, strict=True):
        line["english"] = page["English"]
    captions = {name: game.pages[0][name] for name in ("French", "human English")}
    (folder / f"{method}.json").write_text(json.dumps(dict(captions=captions, history=history)))


def read_runs(folder):
    """{method: its history}, and the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for method in METHODS:
        if not (folder / f"{method}.json").exists():
            play(method, folder)
    runs = {method: json.loads((folder / f"{method}.json").read_text()) for method in METHODS}
    return {method: run["history"] for method, run in runs.items()}, runs["ppo"]["captions"]


def stammers(sentence):
    """Whether it says a word twice in a row."""
    words = sentence.split()
    return any(a == b for a, b in zip(words, words[1:], strict=False))


def most_repaired(history, ppo_end):
    """Of the captions that stammer at the end of PPO, the one in which most resets ended a stammer."""
    resets = [
        (before["english"], after["english"])
        for before, after in zip(history, history[1:], strict=False)
        if after["event"] == "after reset"
    ]
    repaired = [
        stammers(end) and sum(stammers(before[i]) and not stammers(after[i]) for before, after in resets)
        for i, end in enumerate(ppo_end["english"])
    ]
    return repaired.index(max(repaired))


# =============================================== The picture ================================================


def synonyms():
    """{word: the first of its synonyms}, from the game's grammar."""
    tables = " ".join([elastic_reset.PEOPLE, elastic_reset.QUALITIES, elastic_reset.TIMES, "the|this"])
    groups = [group.split("|") for group in re.findall(r"\w+\|[\w|]+", tables)]
    return {word: group[0] for group in groups for word in group}


def faults(sentence, human):
    """For each word of a sentence, whether people's English has no such word, or not as often."""
    same = synonyms()
    left, found = Counter(same.get(word, word) for word in human.split()), []
    for word in (same.get(word, word) for word in sentence.split()):
        found.append(left[word] == 0)
        left[word] = max(0, left[word] - 1)
    return found


def write_sentence(figure, left, top, sentence, human):
    """The sentence in lines of equally wide letters, its faults marked."""
    flags = iter(faults(sentence, human))
    width, height = 0.602 * 11 / 72 / figure.get_figwidth(), 1.7 * 11 / 72 / figure.get_figheight()
    look = dict(family="monospace", fontsize=11, va="top")
    for row, line in enumerate(textwrap.wrap(sentence, 42)):
        for word in re.finditer(r"\S+", line):
            mark = dict(facecolor="#FFD966", edgecolor="none", pad=1.5) if next(flags) else None
            figure.text(left + word.start() * width, top - row * height, word[0], bbox=mark, **look)


def draw_panel(axes, name, lines, start, color):
    """One curve up to now; the resets are vertical lines."""
    limits, (x, y) = PANELS[name]
    axes.axhline(start, color="0.7", linestyle=":", linewidth=1)
    resets = [line["update"] for line in lines if line["event"] == "after reset"]
    axes.vlines(resets, *limits, color="0.8", linewidth=1, zorder=0)
    axes.plot([e["update"] for e in lines], [e[name] for e in lines], color=color, linewidth=2)
    axes.plot(lines[-1]["update"], lines[-1][name], "o", color=color, markersize=6, clip_on=False)
    axes.set(xlim=(-5, 405), ylim=limits, xticks=range(0, 401, 100))
    axes.spines[["top", "right"]].set_visible(False)
    now = f"{name} {lines[-1][name]:.2f}"
    side = "left" if x < 0.5 else "right"
    axes.text(x, y, now, transform=axes.transAxes, ha=side, va="top", color=color, fontsize=12)


def draw(runs, captions, which, moment):
    """A frame as an image. `moment`: how many evaluations of Elastic Reset's there have been."""
    human, now = captions["human English"][which], runs["elastic-reset"][moment]
    figure = Figure(figsize=(9, 5.8), facecolor="white")
    for column, (method, title) in enumerate(METHODS.items()):
        left, (color, _) = 0.07 + 0.5 * column, STYLES[method]
        lines = [line for line in runs[method] if line["update"] <= now["update"]]
        if method == "elastic-reset":
            lines = runs[method][: moment + 1]
        figure.text(left, 0.95, title, color=color, weight="bold", fontsize=14)
        if method == "elastic-reset" and now["event"]:
            figure.text(left + 0.41, 0.95, now["event"], ha="right", color=color, fontsize=12)
        for name, bottom, height in (("drift", 0.57, 0.36), ("reward", 0.365, 0.15)):
            axes = figure.add_axes((left, bottom, 0.41, height))
            draw_panel(axes, name, lines, runs[method][0][name], color)
            axes.tick_params(labelbottom=name == "reward")
        write_sentence(figure, left - 0.03, 0.25, lines[-1]["english"][which], human)
    figure.text(0.5, 0.295, f"update {now['update']}", ha="center", fontsize=11, color="0.3")
    figure.text(0.04, 0.07, f"French: {captions['French'][which]}", fontsize=11, color="0.3")
    figure.text(0.04, 0.025, f"English by people: {human}", fontsize=11, color="0.3")
    figure.text(0.97, 0.295, "yellow: not in the English by people", fontsize=11, color="0.3", ha="right")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=90)
    return Image.open(picture).convert("RGB")


def duration(line):
    """Of a frame, in milliseconds; one can look longer at both sides of a reset."""
    return 500 if line["event"] or line["update"] == 0 else 80


def main():
    runs, captions = read_runs(Path("runs/saw_tooth"))
    for method, history in runs.items():
        ends = {line["update"]: sum(map(stammers, line["english"])) for line in history[:: len(history) - 1]}
        print(f"{method}: captions that stammer, by update: {ends}")
    history = runs["elastic-reset"]
    which = most_repaired(history, runs["ppo"][-1])
    frames = [draw(runs, captions, which, moment) for moment in range(len(history))]
    palette = frames[-1].quantize(64)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    times = [3000, *(duration(line) for line in history)]
    # The end comes first, because many programs show the first picture only.
    more = dict(save_all=True, append_images=frames, duration=times, loop=0, optimize=True)
    frames[-1].save(HERE / "saw_tooth.gif", **more)


if __name__ == "__main__":
    main()
