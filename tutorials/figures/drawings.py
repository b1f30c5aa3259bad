"""Draws elastic.svg and 05_sender_and_receiver.svg into this folder.

python tutorials/figures/drawings.py"""

from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).resolve().parent
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
rcParams.update({"svg.hashsalt": "elastic", "font.size": 12, "mathtext.fontset": "dejavusans"})


def canvas(width, height):
    """A figure without axes, whose unit of length is an inch."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def arrow(axes, start, end, color=GREY, bend=0.0):
    look = dict(arrowstyle="-|>", color=color, linewidth=1.6, shrinkA=0, shrinkB=0, mutation_scale=14)
    axes.annotate("", end, start, arrowprops=look | dict(connectionstyle=f"arc3,rad={bend}"))


def spring(axes, start, end, coils=9):
    """A zigzag between two points."""
    start, end = np.array(start), np.array(end)
    along = end - start
    across = np.array([-along[1], along[0]]) / np.hypot(*along)
    heights = [0, *([0.07, -0.07] * coils), 0]
    places = np.linspace(0, 1, len(heights))
    points = start + np.outer(places, along) + np.outer(heights, across)
    axes.plot(*points.T, color=GREY, linewidth=1.1)


def draw_elastic():
    """Left, the policy learns and the average follows. Right, the reset."""
    figure, axes = canvas(8.6, 2.9)
    for left, title in ((0.35, "n updates"), (4.75, "the reset")):
        start, average, policy = (left + 0.35, 0.75), (left + 1.75, 1.2), (left + 3.1, 1.95)
        axes.text(left, 2.6, title, weight="bold", va="center")
        if title == "n updates":
            way = np.linspace(0, 1, 13)
            x = start[0] + (policy[0] - start[0]) * way
            y = start[1] + (policy[1] - start[1]) * way + 0.62 * np.sin(np.pi * way)
            y += 0.05 * (-1) ** np.arange(13)
            y[[0, -1]] = start[1], policy[1]
            axes.plot(x, y, color=ORANGE, linewidth=1.2, marker=".", markersize=4)
            axes.text(left + 1.15, 2.1, "PPO", color=ORANGE, ha="center")
            spring(axes, start, average)
            spring(axes, average, policy)
        else:
            arrow(axes, (left + 2.98, 1.9), (left + 1.85, 1.32), ORANGE, 0.15)
            arrow(axes, (left + 1.61, 1.18), (left + 0.48, 0.83), BLUE, 0.15)
            axes.text(left + 2.15, 1.95, r"$\theta\leftarrow\bar\theta$", color=ORANGE, ha="center")
            axes.text(left + 0.9, 1.42, r"$\bar\theta\leftarrow\theta_0$", color=BLUE, ha="center")
        for (x, y), color, name, above in (
            (start, GREY, r"$\theta_0$ start", -0.33),
            (average, BLUE, r"$\bar\theta$ average", -0.33),
            (policy, ORANGE, r"$\theta$ policy", 0.3),
        ):
            axes.plot(x, y, "o", color=color, markersize=11, zorder=3)
            axes.text(x, y + above, name, color=color, ha="center", va="center")
    axes.plot([4.35, 4.35], [0.3, 2.7], color="0.85", linewidth=1)
    axes.text(0.35, 0.08, "more reward, more drift", color=GREY, fontsize=10)
    arrow(axes, (2.25, 0.14), (3.6, 0.14))
    return figure


def draw_game():
    """The two players, what passes between them, and what each of them learns from."""
    figure, axes = canvas(8.6, 2.9)
    for x, color, name, how in (
        (2.0, BLUE, "sender", "learns by PPO"),
        (5.2, GREY, "receiver", "learns from German"),
    ):
        look = dict(facecolor="white", edgecolor=color, linewidth=2)
        axes.add_patch(FancyBboxPatch((x, 1.1), 1.4, 0.8, "round,pad=0.04", **look))
        axes.text(x + 0.7, 1.65, name, color=color, ha="center", va="center", weight="bold")
        axes.text(x + 0.7, 1.33, how, color=color, ha="center", va="center", fontsize=9)
    for begin, end, language, text in (
        (0.2, 1.92, "French", "un chien noir"),
        (3.48, 5.12, "English", "a black dog"),
        (6.68, 8.4, "German", "einen schwarzen\nHund"),
    ):
        arrow(axes, (begin, 1.5), (end, 1.5))
        axes.text((begin + end) / 2, 1.6, language, ha="center", weight="bold")
        axes.text((begin + end) / 2, 1.4, text, ha="center", va="top", fontsize=9, style="italic")
    axes.text(4.3, 1.95, "nobody\nchecks it", ha="center", fontsize=9, color=ORANGE)
    axes.plot([7.55, 7.55, 2.7], [2.05, 2.55, 2.55], color=BLUE, linewidth=1.6)
    arrow(axes, (2.7, 2.55), (2.7, 1.97), BLUE)
    look = dict(ha="center", fontsize=10)
    axes.text(5.0, 2.62, "reward: how probable is the right German?", color=BLUE, va="bottom", **look)
    axes.plot([7.55, 7.55, 5.9], [0.85, 0.45, 0.45], color=GREY, linewidth=1.6)
    arrow(axes, (5.9, 0.45), (5.9, 1.03))
    axes.text(6.7, 0.38, "the right German, to imitate", color=GREY, va="top", **look)
    return figure


if __name__ == "__main__":
    for name, draw in {"elastic": draw_elastic, "05_sender_and_receiver": draw_game}.items():
        draw().savefig(HERE / f"{name}.svg", metadata=dict(Date=None))
