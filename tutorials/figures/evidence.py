"""Draws evidence.png, reward against drift in the three tasks, and prints the tables of README.md and of
tutorials/results/README.md.

    python tutorials/figures/evidence.py

It reads the records in tutorials/results, which compare.py has made."""

import math
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from tutorials import tradeoff  # noqa: E402

RESULTS = HERE.parent / "results"
TASKS = {"translation": "translation game", "imdb": "mock sentiment", "qa": "technical QA"}
BOTH = "elastic-reset and a penalty"
CURVES = {"ppo-kl": "PPO with a KL penalty", BOTH: "Elastic Reset with a KL penalty"}
ALONE = {"ppo-kl": ("ppo", "PPO alone"), "elastic-reset": ("elastic-reset", "Elastic Reset alone")}
WORDS = {
    BOTH: "penalty and resets",
    "ppo-kl": "penalty alone",
    "ppo-kl, averaged at the end": "penalty, averaged at the end",
    "ppo-kl, mixed with the start": "penalty, mixed with the start",
    "ppo, stopped early": "PPO, stopped early",
    "S2P": "supervised loss beside RL (S2P)",
    "SIL": "imitation by students (SIL)",
}
MISJUDGED = {  # both have a coefficient that is so many times the best one of the penalty alone
    "penalty alone, both with a tenth of its best coefficient": ("ppo-kl", 0.1),
    "penalty, mixed with the start, both with a tenth": ("ppo-kl, mixed with the start", 0.1),
    "penalty alone, both with ten times its best coefficient": ("ppo-kl", 10),
}
ONE_EACH = list(WORDS)[:3]  # the methods with one setting for each KL coefficient
BATCHES = {8: "batch_8", 16: "", 32: "batch_32"}
ZOOM = {"translation": ((0.21, 0.26), (-0.13, -0.08))}  # where most of the points of a panel lie


def settings_of(summary, method):
    """Those of a method at the learning rate of the chosen one: {KL coefficient: a row for each seed}."""
    ends = summary["ends"]
    rate = tradeoff.chosen_rows(summary, method)["learning_rate"].iloc[0]
    names = [method, "elastic-reset"] if method == BOTH else [method]  # at the coefficient 0 resets are alone
    own = ends[ends["method"].isin(names) & (ends["learning_rate"] == rate)]
    return {coef: rows.droplevel("setting") for coef, rows in own.groupby("kl_coef")}


def draw_panel(axes, summary):
    """A curve per method along its KL coefficients; the coefficient 0 is drawn large."""
    for method, label in CURVES.items():
        own = settings_of(summary, method)
        color, marker = tradeoff.STYLES[method.split()[0]]
        look = dict(color=color, marker=marker, markersize=5, linewidth=1.5, elinewidth=0.7, label=label)
        draw_points(axes, [own[coef] for coef in sorted(own) if coef], **look)
    for method, (name, label) in ALONE.items():
        color, marker = tradeoff.STYLES[name]
        look = dict(color=color, marker=marker, markersize=10, elinewidth=0.7, linestyle="", label=label)
        draw_points(axes, [settings_of(summary, method)[0.0]], **look)
    start = summary["start"]["drift"]
    axes.axvline(start, color="0.6", linestyle=":", linewidth=1.5, zorder=0)
    axes.text(start, 0.02, " start", color="0.4", transform=axes.get_xaxis_transform())
    if axes.get_xlim()[1] > 5 * start:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)


def draw_points(axes, points, **look):
    drift = [tradeoff.mean_and_error(point["drift"]) for point in points]
    reward = [tradeoff.mean_and_error(point["reward"]) for point in points]
    (x, x_error), (y, y_error) = zip(*drift, strict=True), zip(*reward, strict=True)
    axes.errorbar(x, y, y_error, x_error, **look)


def picture(summaries):
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (task, summary) in zip(figure.subplots(1, len(TASKS)), summaries.items(), strict=True):
        draw_panel(axes, summary)
        axes.set(title=TASKS[task], xlabel=f"drift ({tradeoff.UNITS[task].split()[0]})")
        if task in ZOOM:
            inset = axes.inset_axes([0.35, 0.12, 0.6, 0.6])
            draw_panel(inset, summary)
            inset.set(xlim=ZOOM[task][0], ylim=ZOOM[task][1])
            axes.indicate_inset_zoom(inset)
    figure.axes[0].set_ylabel("reward")
    arrow = dict(arrowprops=dict(arrowstyle="->", color="0.4"), color="0.4")
    figure.axes[1].annotate("better", (0.3, 0.5), (0.42, 0.4), "axes fraction", **arrow)
    shown = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def table(summaries):
    """Reward and drift of what each method delivers, a row per method."""
    rows = {
        "start": lambda summary: dict(reward=[summary["start"]["reward"]], drift=[summary["start"]["drift"]]),
        "PPO": lambda summary: settings_of(summary, "ppo-kl")[0.0],
        "Elastic Reset alone": lambda summary: settings_of(summary, "elastic-reset")[0.0],
        "KL penalty, best tried": lambda summary: tradeoff.chosen_rows(summary, "ppo-kl"),
        "Elastic Reset with a KL penalty, best tried": lambda summary: tradeoff.chosen_rows(summary, BOTH),
    }
    names = ["", *(f"{TASKS[task]}: {number}" for task in summaries for number in ("reward", "drift"))]
    lines = []
    for name, find in rows.items():
        found = [find(summary) for summary in summaries.values()]
        cells = [short(numbers[which]) for numbers in found for which in ("reward", "drift")]
        lines.append([name, *cells])
    return "\n".join(tradeoff.table(names, lines))


def short(values):
    """Mean and standard error of some numbers."""
    mean, error = tradeoff.mean_and_error(values)
    return f"{rounded(mean, mean)} ± {rounded(error, mean)}" if error else rounded(mean, mean)


def rounded(number, size):
    """To as many digits as are worth having of a number of this size."""
    return f"{number:,.{0 if abs(size) >= 100 else 2 if abs(size) >= 3 else 3}f}"


def without_penalty(summaries):
    """What PPO and resets end at where no KL penalty helps them."""
    rows = []
    for task, summary in summaries.items():
        own = [settings_of(summary, method)[0.0] for method in ALONE]
        cells = [short(setting[name]) for setting in own for name in ("reward", "drift")]
        rows.append([TASKS[task], short([summary["start"]["drift"]]), *cells])
    names = ["", "start: drift", "PPO: reward", "PPO: drift", "resets alone: reward", "resets alone: drift"]
    return "\n".join(tradeoff.table(names, rows))


def by_coefficient(summary, number):
    """The mean of `number` for each KL coefficient, a row per method."""
    own = {WORDS[method]: settings_of(summary, method) for method in ONE_EACH}
    coefs = sorted({coef for settings in own.values() for coef in settings})
    rows = []
    for words, settings in own.items():
        means = [tradeoff.mean_and_error(settings[coef][number])[0] for coef in coefs]
        rows.append([words, *(rounded(mean, mean) for mean in means)])
    return "\n".join(tradeoff.table([f"{number} at the KL coefficient", *(f"{c:g}" for c in coefs)], rows))


def tuned(summary):
    """Each method at its chosen setting; the last column is paired by seed."""
    rows = []
    yardstick = tradeoff.chosen_rows(summary, BOTH)["area"]
    for method, words in WORDS.items():
        if method in summary["methods"].index:
            one = tradeoff.chosen_rows(summary, method)
            label = summary["methods"].loc[method, "chosen"].removeprefix("tutorials/baselines.py:")
            numbers = [short(one[name]) for name in ("reward", "drift", "area")]
            rows.append([words, label, *numbers, "" if method == BOTH else apart(one["area"], yardstick)])
    names = ["method", "chosen", "reward", "drift", "area", "area less that of resets"]
    return "\n".join(tradeoff.table(names, rows))


def rivals(summaries):
    """The area of resets less that of each rival, paired by seed, with 95 per cent intervals."""
    pairs = {name: rival_pairs(summaries[name]) for name in summaries}
    rows = []
    for words in dict.fromkeys(words for own in pairs.values() for words in own):
        rows.append([words, *(verdict(*own[words]) if words in own else "-" for own in pairs.values())])
    names = ["resets with a penalty, against", *(TASKS[name] for name in pairs)]
    return "\n".join(tradeoff.table(names, rows))


def rival_pairs(summary):
    """{words: the setting with resets, and the rival's}"""
    methods = [method for method in WORDS if method in summary["methods"].index]
    best = {method: tradeoff.chosen_rows(summary, method) for method in methods}
    pairs = {}
    for method in methods[1:]:
        pairs[WORDS[method]] = best[BOTH], best[method]
    for words, (rival, factor) in MISJUDGED.items():
        coef = factor * best["ppo-kl"]["kl_coef"].iloc[0]
        ours = best_near(summary, BOTH, coef)
        theirs = best_near(summary, rival, coef)
        if ours is not None and theirs is not None:
            pairs[words] = ours, theirs
    return pairs


def best_near(summary, method, coef):
    """The best setting of those whose KL coefficient is nearest to coef, if it is within a factor of 2."""
    own = summary["ends"][summary["ends"]["method"] == method]
    distances = {c: abs(math.log(c / coef)) for c in own["kl_coef"].unique() if c}
    nearest = min(distances, key=distances.get)
    if distances[nearest] >= math.log(2):
        return None
    there = own[own["kl_coef"] == nearest]
    return there.loc[there.groupby("setting", sort=False)["area"].mean().idxmax()]


def verdict(ours, rival):
    if not any(ours["area"]) and not any(rival["area"]):
        return "neither counts"
    return f"{tradeoff.difference(ours['area'], rival['area'])[3]}: {apart(ours['area'], rival['area'])}"


def apart(ours, rival):
    """The mean difference, and the 95 per cent interval if there are enough seeds for one."""
    mean, low, high, _ = tradeoff.difference(ours, rival)
    return f"{mean:+.3f}" + ("" if math.isnan(low) else f" ({low:+.3f} to {high:+.3f})")


def near_the_best(summary):
    """{words for a method: how many of its KL coefficients have nine tenths of its best area}"""
    counts = {}
    for method in ONE_EACH:
        means = [tradeoff.mean_and_error(s["area"])[0] for s in settings_of(summary, method).values()]
        counts[WORDS[method]] = f"{sum(mean >= 0.9 * max(means) for mean in means)} of {len(means)}"
    return counts


def by_batch_size():
    """The area of resets less that of a rival at the same KL coefficient, in the game with other batches."""
    rows, coefs = [], (0.003, 0.01, 0.03)
    for size, folder in BATCHES.items():
        own = tradeoff.read_record(RESULTS / "translation" / folder)["summary"]
        for rival in ONE_EACH[1:]:
            ours, theirs = settings_of(own, BOTH), settings_of(own, rival)
            words = [verdict(ours[coef], theirs[coef]) for coef in coefs]
            rows.append([f"{size} responses an update, against: {WORDS[rival]}", *words])
    return "\n".join(tradeoff.table(["at the KL coefficient", *(f"{coef:g}" for coef in coefs)], rows))


def map_of(summary):
    """Reward and drift at the end for each period and share, and in brackets the largest drift of any
    evaluation."""
    own = summary["ends"][summary["ends"]["method"] == "elastic-reset"]
    means = own.groupby(["reset_every", "share"])[["reward", "drift", "largest"]].mean()
    shares = sorted(own["share"].unique())
    rows = []
    for every in sorted(own["reset_every"].unique()):
        cells = [f"{every:g}"]
        for share in shares:
            reward, drift, largest = means.loc[every, share]
            cells.append(f"{reward:.3f} / {drift:.3f} ({largest:.2f})")
        rows.append(cells)
    return "\n".join(tradeoff.table(["every", *(f"share {share:g}" for share in shares)], rows))


def resets_alone(summary):
    """Resets without a penalty, with the knobs that the map chose, against the tuned penalty."""
    words = {"elastic-reset": "resets alone", "ppo-kl": "penalty alone"}
    yardstick = tradeoff.chosen_rows(summary, "ppo-kl")["area"]
    rows = []
    for method, name in words.items():
        own = tradeoff.chosen_rows(summary, method)
        cells = [short(own[column]) for column in ("reward", "drift", "largest", "area")]
        rows.append([name, summary["methods"].loc[method, "chosen"], *cells])
        rows[-1].append("" if method == "ppo-kl" else apart(own["area"], yardstick))
    names = [
        "method",
        "setting",
        "reward",
        "drift at the end",
        "largest drift",
        "area",
        "area less the penalty's",
    ]
    return "\n".join(tradeoff.table(names, rows))


def real_text(summary):
    """The reward of each setting, and three numbers that may tell what it costs. Some settings that lie
    between others are left out."""
    names, rows = ("reward", "kl", "distinct_2", "drift"), []
    for label in summary["ends"].index.unique("setting"):
        if not any(part in label for part in (" at ", "eta 0.20", "eta 0.60")):
            rows.append([label, *(short(summary["ends"].loc[label][name]) for name in names)])
    start = [rounded(summary["start"][name], summary["start"][name]) for name in names]
    titles = ["", "reward", "KL from the start", "different pairs of words", "perplexity"]
    return "\n".join(tradeoff.table(titles, [["start", *start], *rows]))


def records(folder=""):
    """{task: the summary of its record}, or of that in a folder of it"""
    return {task: tradeoff.read_record(RESULTS / task / folder)["summary"] for task in TASKS}


def page_tables():
    """{name: table}, those of tutorials/results/README.md"""
    found, again = records(), records("confirmation")
    tables = {"without": without_penalty(found), "rivals": rivals(found), "rivals again": rivals(again)}
    tables["batches"] = by_batch_size()
    tables["map"] = map_of(tradeoff.read_record(RESULTS / "translation" / "map")["summary"])
    tables["resets alone"] = resets_alone(
        tradeoff.read_record(RESULTS / "translation" / "resets_alone")["summary"]
    )
    tables["reviews"] = real_text(tradeoff.read_record(RESULTS / "reviews")["summary"])
    for name, summary in found.items():
        tables |= {f"{number} {name}": by_coefficient(summary, number) for number in ("drift", "reward")}
        tables[f"tuned {name}"] = tuned(summary)
    return tables | {f"tuned {name} again": tuned(summary) for name, summary in again.items()}


if __name__ == "__main__":
    found = records()
    picture(found).savefig(HERE / "evidence.png", dpi=200)
    print(table(found))
    for name, text in page_tables().items():
        print(f"\n{name}\n{text}")
    for name, summary in found.items():
        print(f"{name}: {near_the_best(summary)}")
