"""Draws evidence.png, the trade-off against the KL coefficient in the three tasks, and prints the tables of
the pages in tutorials/results.

    python tutorials/figures/evidence.py

It reads the records in tutorials/results, which compare.py has made."""

import functools
import math
import sys
from pathlib import Path

import pandas
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from tutorials import pictures, tradeoff  # noqa: E402

RESULTS = HERE.parent / "results"
TASKS = {"translation": "translation game", "imdb": "mock sentiment", "qa": "technical QA"}
BOTH = "elastic-reset and a penalty"
WORDS = {
    BOTH: "penalty and resets",
    "ppo-kl": "penalty alone",
    "ppo-kl, averaged at the end": "penalty, averaged at the end",
    "ppo-kl, mixed with the start": "penalty, mixed with the start",
    "ppo, stopped early": "PPO, stopped early",
    "S2P": "supervised loss together with RL (S2P)",
    "SIL": "imitation by students (SIL)",
}
MISJUDGED = {  # both have a coefficient that is so many times the best one of the penalty alone
    "penalty alone, both with a tenth of its best coefficient": ("ppo-kl", 0.1),
    "penalty, mixed with the start, both with a tenth": ("ppo-kl, mixed with the start", 0.1),
    "penalty alone, both with ten times its best coefficient": ("ppo-kl", 10),
}
ONE_EACH = list(WORDS)[:3]  # the methods with one setting for each KL coefficient
BATCHES = {8: "batch_8", 16: "", 32: "batch_32"}
ALONE_WORDS = {
    "elastic-reset": "resets alone",
    "elastic-reset, mixed with the start": "resets alone, mixed with the start",
}
ALONE_WORDS |= {method: words for method, words in WORDS.items() if method.startswith("ppo-kl")}
BLUE, GREEN = pictures.STYLES["elastic-reset"][0], pictures.STYLES["ppo-kl"][0]
COMPARED = {  # {method: its line in the picture}
    "ppo-kl": dict(label="KL penalty alone", color=GREEN, marker="^"),
    BOTH: dict(label="KL penalty and resets", color=BLUE, marker="o"),
    "ppo-kl, mixed with the start": dict(
        label="KL penalty, mixed with the start at the end",
        color=GREEN,
        marker="^",
        fillstyle="none",
        linestyle=":",
    ),
}
RESETS_ALONE = "resets_alone"
ALONE_FOLDERS = {"seeds 0 to 4": RESETS_ALONE, "seeds 200 to 204": "resets_alone_again"}
NEAR_KL_16 = [  # settings of real text with about the same KL
    "elastic-reset:kl_coef=0.003",
    "ppo, eta 0.40",
    "ppo-kl:kl_coef=0.003, eta 0.80",
    "ppo-kl:kl_coef=0.01",
    "ppo-kl:kl_coef=0.01, average",
]
BOUNDS = (1.15, 1.25, 1.5, 2)  # of the drift that counts, in multiples of the start's
FACTORS = {"none": 0, "about a tenth of the best": 0.1, "the best": 1, "about ten times the best": 10}


def rows_of(summary, method):
    """A row for each setting of a method and each seed. Without a penalty, resets are a method of their own,
    so they are added to those with one."""
    names = [method, "elastic-reset"] if method == BOTH else [method]
    return summary["ends"][summary["ends"]["method"].isin(names)]


def settings_of(summary, method):
    """Return a method's settings at the learning rate of the chosen one, {KL coefficient: a row for each
    seed}."""
    own = rows_of(summary, method)
    rate = tradeoff.chosen_rows(summary, method)["learning_rate"].iloc[0]
    own = own[own["learning_rate"] == rate]
    return {coef: rows.droplevel("setting") for coef, rows in own.groupby("kl_coef")}


def in_per_cent(summary, number="mean"):
    """The area of each KL coefficient in per cent of the tuned penalty's: a row per coefficient, a column for
    the penalty alone, with resets, and for the best mixture with the start. `number`: the mean over the
    seeds, or sem, its standard error."""
    tuned_penalty = tradeoff.chosen_rows(summary, "ppo-kl")["area"].mean()
    columns = {}
    for method in COMPARED:
        areas = rows_of(summary, method).groupby(["kl_coef", "setting"])["area"].agg(["mean", "sem"])
        best = areas["mean"].groupby("kl_coef").idxmax()
        columns[method] = 100 * areas.loc[best].droplevel("setting")[number] / tuned_penalty
    return pandas.DataFrame(columns)


def best_coefficient(summary):
    """Return the KL coefficient that was chosen for the penalty alone."""
    return tradeoff.chosen_rows(summary, "ppo-kl")["kl_coef"].iloc[0]


def picture(summaries):
    """The trade-off in per cent against the KL coefficient as a multiple of the best one."""
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for axes, (task, summary) in zip(panels, summaries.items(), strict=True):
        draw_choice(axes, summary, alone_in_per_cent(task))
        axes.set_title(TASKS[task])
    figure.axes[1].set_xlabel("KL coefficient, as a multiple of the best")  # of all three
    figure.axes[0].set_ylabel("trade-off (100: tuned KL penalty)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    return figure


def alone_and_penalty(task):
    """The rows of resets without a penalty, with the period and share that the map chose, and of the tuned
    penalty in the same record."""
    summary = record_of(task, RESETS_ALONE)["summary"]
    return [tradeoff.chosen_rows(summary, method) for method in ("elastic-reset", "ppo-kl")]


def alone_in_per_cent(task):
    """The area of resets without a penalty in per cent of the tuned penalty's."""
    alone, penalty = alone_and_penalty(task)
    return 100 * alone["area"].mean() / penalty["area"].mean()


def draw_choice(axes, summary, alone):
    """A line for each method, and a star for resets alone. The coefficient 0 stands left of the others."""
    table = in_per_cent(summary)
    errors = in_per_cent(summary, "sem")
    multiples = table.index / best_coefficient(summary)
    zero = min(multiples[multiples > 0]) / 3
    for method, values in table.items():
        known = values.notna().to_numpy()
        places = [place or zero for place in multiples[known]]
        look = COMPARED[method] | dict(markersize=6, elinewidth=0.8)
        axes.errorbar(places, values[known], errors[method][known], **look)
    look = dict(color=BLUE, marker="*", markersize=15, linestyle="")
    axes.plot(zero, alone, **look, label="resets alone, period and share chosen", zorder=4)
    axes.set_xscale("log")
    ticks = [tick for tick in (0.01, 0.1, 1, 10) if tick > 4 * zero]
    axes.set_xticks([zero, *ticks], ["none", *(f"{tick:g}" for tick in ticks)])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="0.7", linestyle=":", zorder=0)
    axes.set_ylim(-5, 125)
    axes.spines[["top", "right"]].set_visible(False)


def choice_table(summaries):
    """The trade-off in per cent where the penalty is missing, too weak, right and too strong. In each cell:
    the penalty alone / with resets / the best mixture."""
    rows = [["none; resets with chosen period and share"]]
    for task in summaries:
        rows[0].append(f"- / **{alone_in_per_cent(task):.0f}** / -")
    per_cent = {task: in_per_cent(summary) for task, summary in summaries.items()}
    for words, factor in FACTORS.items():
        row = [words]
        for task, summary in summaries.items():
            coef = nearest(per_cent[task].index, factor * best_coefficient(summary))
            if coef is None:
                row.append("not run")
                continue
            areas = per_cent[task].loc[coef]
            row.append(" / ".join("-" if math.isnan(area) else f"{area:.0f}" for area in areas))
        rows.append(row)
    return "\n".join(tradeoff.table(["KL coefficient", *(TASKS[task] for task in summaries)], rows))


def nearest(coefs, wanted):
    """The coefficient next to the one that is wanted, if it is within a factor of 2, and 0 for 0."""
    if wanted == 0:
        return 0.0
    distances = {coef: abs(math.log(coef / wanted)) for coef in coefs if coef}
    found = min(distances, key=distances.get)
    return found if distances[found] < math.log(2) else None


def while_it_trains(record, method, coef):
    """The drift of each seed while the policy trains: the mean of all evaluations but the first and those
    just after a reset."""
    rows = rows_of(record["summary"], method)
    setting = rows[rows["kl_coef"] == coef].index.unique("setting").item()
    drifts = {}
    for seed, history in tradeoff.runs_by_setting(record)[setting].items():
        lines = pandas.DataFrame(tradeoff.during_training(history)[1:])
        drifts[seed] = lines[lines["event"] != "after reset"]["drift"].mean()
    return pandas.Series(drifts)


def training_table():
    """Drift while the policy trains, without resets and with them, and the paired difference."""
    rows = []
    for words in ("none", "about a tenth of the best", "the best"):
        for task in TASKS:
            record = record_of(task)
            summary = record["summary"]
            coef = nearest(settings_of(summary, BOTH), FACTORS[words] * best_coefficient(summary))
            without = while_it_trains(record, "ppo-kl", coef)
            with_resets = while_it_trains(record, BOTH, coef)
            means = [rounded(mean, mean) for mean in (without.mean(), with_resets.mean())]
            rows.append([f"{TASKS[task]}, {words}", *means, interval_of(without - with_resets)])
    names = ["mean drift while the policy trains", "without resets", "with resets", "resets lower it by"]
    return "\n".join(tradeoff.table(names, rows))


def interval_of(differences):
    """The mean of paired differences with its 95 per cent interval."""
    mean, low, high, _ = tradeoff.difference(differences, 0)
    return f"{rounded(mean, mean)} ({rounded(low, mean)} to {rounded(high, mean)})"


def with_error(values):
    """Mean and standard error of some numbers."""
    mean, error = tradeoff.mean_and_error(values)
    return f"{rounded(mean, mean)} ± {rounded(error, mean)}" if error else rounded(mean, mean)


def rounded(number, size):
    """To as many digits as are worth having of a number of this size."""
    return f"{number:,.{0 if abs(size) >= 100 else 2 if abs(size) >= 3 else 3}f}"


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
            numbers = [with_error(one[name]) for name in ("reward", "drift", "area")]
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
        coef = factor * best_coefficient(summary)
        ours = best_near(summary, BOTH, coef)
        theirs = best_near(summary, rival, coef)
        if ours is not None and theirs is not None:
            pairs[words] = ours, theirs
    return pairs


def best_near(summary, method, coef):
    """The best setting of those whose KL coefficient is nearest to coef, if it is within a factor of 2."""
    own = rows_of(summary, method)
    found = nearest(own["kl_coef"].unique(), coef)
    if found is None:
        return None
    there = own[own["kl_coef"] == found]
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
    coefs = (0.003, 0.01, 0.03)
    rows = []
    for size, folder in BATCHES.items():
        own = record_of("translation", folder)["summary"]
        for rival in ONE_EACH[1:]:
            ours = settings_of(own, BOTH)
            theirs = settings_of(own, rival)
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
            cells.append(f"{reward:.3f} / {rounded(drift, drift)} ({rounded(largest, largest)})")
        rows.append(cells)
    return "\n".join(tradeoff.table(["every", *(f"share {share:g}" for share in shares)], rows))


def resets_alone(summaries):
    """Resets without a penalty, with the period and share that the map chose, against the tuned penalty: a
    row for each method and each set of seeds."""
    rows = []
    for words, summary in summaries.items():
        yardstick = tradeoff.chosen_rows(summary, "ppo-kl")["area"]
        for method, name in ALONE_WORDS.items():
            if method not in summary["methods"].index:
                continue
            own = tradeoff.chosen_rows(summary, method)
            cells = [with_error(own[column]) for column in ("reward", "drift", "largest", "area")]
            label = setting_words(summary["methods"].loc[method, "chosen"])
            less = "" if method == "ppo-kl" else apart(own["area"], yardstick)
            rows.append([f"{name}, {words}", label, *cells, less])
    names = ["method", "setting", "reward", "drift at the end", "largest drift", "area"]
    return "\n".join(tradeoff.table([*names, "area less the penalty's"], rows))


def setting_words(label):
    """ "elastic-reset:kl_coef=0:reset_every=100:share=0.6, eta 0.80" -> "every 100, share 0.6, eta 0.80" """
    label, _, afterwards = label.partition(", ")
    own = tradeoff.split_label(label)[1]
    said = []
    for name, words in {"reset_every": "every", "share": "share", "kl_coef": "KL"}.items():
        if own.get(name, "0") != "0":
            said.append(f"{words} {own[name]}")
    if afterwards:
        said.append(afterwards)
    return ", ".join(said)


def real_text(summary, wanted=()):
    """The reward of each setting, and three numbers that may tell what it costs. Settings that lie between
    others are left out."""
    names = ("reward", "kl", "distinct_2", "drift")
    rows = []
    for label in wanted or summary["ends"].index.unique("setting"):
        if not any(part in label for part in (" at ", "eta 0.20", "eta 0.60")):
            rows.append([label, *(with_error(summary["ends"].loc[label][name]) for name in names)])
    start = [rounded(summary["start"][name], summary["start"][name]) for name in names]
    titles = ["", "reward", "KL from the start", "different pairs of words", "perplexity"]
    return "\n".join(tradeoff.table(titles, [["start", *start], *rows]))


def records(folder=""):
    """{task: the summary of its record}, or of that in a folder of it"""
    return {task: record_of(task, folder)["summary"] for task in TASKS}


@functools.cache
def record_of(task, folder=""):
    """The record of a task, or that in a folder of it, with its summary. It is read once."""
    return tradeoff.read_record(RESULTS / task / folder)


def by_bound():
    """The area of resets without a penalty in per cent of the penalty's, for other bounds of the drift that
    counts, and their gain in reward at any drift."""
    rows = [[f"a drift of at most {bound:g} times the start's"] for bound in BOUNDS]
    rows.append(["their gain in reward, at whatever drift"])
    for task in TASKS:
        summary = record_of(task, RESETS_ALONE)["summary"]
        low, high = summary["range"]
        both = alone_and_penalty(task)
        for row, bound in zip(rows[:-1], BOUNDS, strict=True):
            ours, theirs = (mean_area(own, summary["floor"], low, bound * low) for own in both)
            words = f"{100 * ours / theirs:.0f}"
            row.append(f"**{words}**" if math.isclose(bound * low, high) else words)
        gains = [own["reward"].mean() - summary["floor"] for own in both]
        rows[-1].append(f"{100 * gains[0] / gains[1]:.0f}")
    return "\n".join(tradeoff.table(["resets without a penalty; 100 is the penalty", *TASKS.values()], rows))


def mean_area(own, floor, low, high):
    """The mean over the seeds of a setting's area, with another bound."""
    areas = []
    for drift, reward in zip(own["drift"], own["reward"], strict=True):
        areas.append(tradeoff.area_under_front([drift], [reward], floor, low, high))
    return sum(areas) / len(areas)


def first_table(summaries):
    """README's table: what resets and the baselines that cost nothing reach, in per cent of the tuned
    penalty's area, with 95 per cent intervals where they were run together with it."""
    rows = [
        ["resets without a penalty, period and share chosen (QA: only the share)"],
        ["resets without a penalty, share of the start 0.11 to 0.13"],
        ["plain PPO, mixed with the start at the end"],
        ["tuned KL penalty, mixed with the start at the end"],
    ]
    for task, summary in summaries.items():
        table = in_per_cent(summary)
        best = best_coefficient(summary)
        none = table.loc[0.0]
        low, high = alone_interval(task)
        mixed = "ppo-kl, mixed with the start"
        cells = [f"**{alone_in_per_cent(task):.0f}** ({low:.0f} to {high:.0f})"]
        cells += [f"{value:.0f}" for value in (none[BOTH], none[mixed], table.loc[best][mixed])]
        for row, text in zip(rows, cells, strict=True):
            row.append(text)
    names = ["trade-off of reward and drift; 100 is a tuned KL penalty", *TASKS.values()]
    return "\n".join(tradeoff.table(names, rows))


def alone_interval(task):
    """The 95 per cent interval of alone_in_per_cent()."""
    alone, penalty = alone_and_penalty(task)
    _, low, high, _ = tradeoff.difference(alone["area"], penalty["area"])
    return [100 + 100 * end / penalty["area"].mean() for end in (low, high)]


def page_tables():
    """{page of tutorials/results: {name: table}}"""
    found, again = records(), records("confirmation")
    pages = {task: task_tables(task, found[task], again[task]) for task in TASKS}
    pages["translation"]["batches"] = by_batch_size()
    reviews = record_of("reviews")["summary"]
    pages["reviews"] = dict(few=real_text(reviews, NEAR_KL_16), all=real_text(reviews))
    pages["README"] = dict(choice=choice_table(found), training=training_table())
    pages["README"] |= {"rivals": rivals(found), "rivals again": rivals(again), "bounds": by_bound()}
    pages["../../README"] = dict(first=first_table(found))
    return pages


def task_tables(task, found, again):
    """Return the tables of a task's own page, {name: table}."""
    tables = dict(map=map_of(record_of(task, "map")["summary"]))
    alone = {}
    for words, folder in ALONE_FOLDERS.items():
        if (RESULTS / task / folder).exists():
            alone[words] = record_of(task, folder)["summary"]
    tables["resets alone"] = resets_alone(alone)
    tables |= {number: by_coefficient(found, number) for number in ("drift", "reward")}
    return tables | {"tuned": tuned(found), "tuned again": tuned(again)}


if __name__ == "__main__":
    found = records()
    picture(found).savefig(HERE / "evidence.png", dpi=200)
    for page, tables in page_tables().items():
        for name, text in tables.items():
            print(f"\n{page}: {name}\n{text}")
    for task, summary in found.items():
        print(f"{task}: {near_the_best(summary)}")
