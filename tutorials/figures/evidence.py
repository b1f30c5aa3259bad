"""Draws evidence.png, reward against drift in the three tasks, and prints the table of the README.

    python tutorials/figures/evidence.py

It reads the records in tutorials/results, which compare.py has made."""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import compare  # noqa: E402

TASKS = {"translation": "translation game", "imdb": "mock sentiment", "qa": "technical QA"}
CURVES = {"ppo-kl": "PPO with a KL penalty", "elastic-reset": "Elastic Reset with a KL penalty"}
ALONE = {"ppo-kl": ("ppo", "PPO alone"), "elastic-reset": ("elastic-reset", "Elastic Reset alone")}


def settings_of(summary, method):
    """Those of a method by their KL coefficient, at the learning rate of the chosen one."""
    numbers = summary["methods"][method]
    own = [summary["settings"][label] for label in numbers["labels"]]
    rate = summary["settings"][numbers["chosen"]]["knobs"]["learning_rate"]
    own = [setting for setting in own if setting["knobs"]["learning_rate"] == rate]
    return {setting["knobs"]["kl_coef"]: setting for setting in own}


def draw_panel(axes, summary):
    """A curve per method along its KL coefficients; the coefficient 0 is drawn large."""
    for method, label in CURVES.items():
        own, (color, marker) = settings_of(summary, method), compare.STYLES[method]
        look = dict(color=color, marker=marker, markersize=5, linewidth=1.5, elinewidth=0.7, label=label)
        draw_points(axes, [own[coef] for coef in sorted(own) if coef], **look)
        name, label = ALONE[method]
        color, marker = compare.STYLES[name]
        look = dict(color=color, marker=marker, markersize=10, elinewidth=0.7, linestyle="", label=label)
        draw_points(axes, [own[0.0]] if 0.0 in own else [], **look)
    start = summary["start"]["drift"]
    axes.axvline(start, color="0.6", linestyle=":", linewidth=1.5, zorder=0)
    axes.text(start, 0.02, " start", color="0.4", transform=axes.get_xaxis_transform())
    if axes.get_xlim()[1] > 5 * start:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)


def draw_points(axes, points, **look):
    drift = [compare.mean_and_error(point["drift"]) for point in points]
    reward = [compare.mean_and_error(point["reward"]) for point in points]
    (x, x_error), (y, y_error) = ([[n[i] for n in numbers] for i in (0, 1)] for numbers in (drift, reward))
    axes.errorbar(x, y, y_error, x_error, **look)


def picture(summaries):
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (task, summary) in zip(figure.subplots(1, len(TASKS)), summaries.items(), strict=True):
        draw_panel(axes, summary)
        axes.set(title=TASKS[task], xlabel="drift")
    figure.axes[0].set_ylabel("reward")
    shown = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def table(summaries):
    """Reward and drift of what each method delivers, a row per method."""
    rows = {
        "start": lambda summary: dict(reward=[summary["start"]["reward"]], drift=[summary["start"]["drift"]]),
        "PPO": lambda summary: settings_of(summary, "ppo-kl").get(0.0),
        "Elastic Reset alone": lambda summary: settings_of(summary, "elastic-reset").get(0.0),
        "KL penalty, best tried": lambda summary: chosen(summary, "ppo-kl"),
        "Elastic Reset with a KL penalty, best tried": lambda summary: chosen(summary, "elastic-reset"),
    }
    names = ["", *(f"{TASKS[task]}: {number}" for task in summaries for number in ("reward", "drift"))]
    lines = []
    for name, find in rows.items():
        found = [find(summary) for summary in summaries.values()]
        cells = [short(numbers and numbers[which]) for numbers in found for which in ("reward", "drift")]
        lines.append([name, *cells])
    return "\n".join(compare.table(names, lines))


def chosen(summary, method):
    setting = summary["settings"][summary["methods"][method]["chosen"]]
    return setting if setting["knobs"]["kl_coef"] else None


def short(values):
    """Mean and standard error of a list; a dash if there is none."""
    if not values:
        return "-"
    mean, error = compare.mean_and_error(values)
    return f"{mean:.3g} ± {error:.1g}" if error else f"{mean:.3g}"


if __name__ == "__main__":
    found = {task: compare.read_record(HERE.parent / "results" / task)["summary"] for task in TASKS}
    picture(found).savefig(HERE / "evidence.png", dpi=150)
    print(table(found))
