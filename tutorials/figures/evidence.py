"""Draws evidence.png, the trade-off against the KL coefficient in the three tasks, and prints the tables of
the pages in tutorials/results.

    python tutorials/figures/evidence.py

It reads the records in tutorials/results, which compare.py has made."""

import functools
import math
import re
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
AVERAGED, MIXED = "ppo-kl, averaged at the end", "ppo-kl, mixed with the start"
ONE_EACH = {  # the methods with one setting for each KL coefficient
    BOTH: "penalty and resets",
    "ppo-kl": "penalty alone",
    AVERAGED: "penalty, averaged at the end",
}
BATCHES = {8: "batch_8", 16: "", 32: "batch_32"}
# What is compared, in the order of the tables.
PLAIN, ALONE = "plain PPO", "resets without a penalty"
PLAIN_MIXED, STOPPED = "plain PPO, mixed with the start", "plain PPO, stopped early"
WEAK_PENALTY, WEAK, WEAK_MIXED = (
    "weak penalty",
    "weak penalty and resets",
    "weak penalty, mixed with the start",
)
PENALTY, TUNED = "tuned penalty", "tuned penalty and resets, untuned share"
OWN = "penalty chosen for resets, untuned share"
BEST_AVERAGE, BEST_MIXTURE = "best average of a penalty's run", "best mixture of a penalty's run"
STRONG_PENALTY, STRONG = "too strong a penalty", "too strong a penalty and resets, untuned share"
TO_AVERAGE, TO_START = "resets to the average only (reset-ema)", "resets to the start only (reset-init)"
S2P, SIL = "supervised loss together with RL (S2P)", "imitation by students (SIL)"
SHORT = [PLAIN, ALONE, PLAIN_MIXED, WEAK_PENALTY, WEAK, WEAK_MIXED, PENALTY, TUNED, BEST_MIXTURE]
RIVALS = {  # {with resets: what it is compared with}
    ALONE: [PENALTY, PLAIN_MIXED, STOPPED, BEST_AVERAGE, BEST_MIXTURE, TO_AVERAGE, TO_START, S2P, SIL],
    WEAK: [PENALTY, WEAK_PENALTY, WEAK_MIXED, ALONE],
    TUNED: [PENALTY, BEST_AVERAGE, BEST_MIXTURE],
    STRONG: [STRONG_PENALTY],
}
BLUE, GREEN = pictures.STYLES["elastic-reset"][0], pictures.STYLES["ppo-kl"][0]
COMPARED = {  # {method: its line in the picture}
    "ppo-kl": dict(label="KL penalty alone", color=GREEN, marker="^"),
    BOTH: dict(label="KL penalty and resets, share 0.11 to 0.13", color=BLUE, marker="o"),
    MIXED: dict(
        label="KL penalty, mixed at the end with the start",
        color=GREEN,
        marker="^",
        fillstyle="none",
        linestyle=":",
    ),
}
# {seeds: the folder of the rivals' record, and that of resets with a chosen period and share}. Both begin
# with the same pretrained models.
RECORDS = {"seeds 0 to 4": ("", "chosen"), "seeds 200 to 204": ("confirmation", "chosen_again")}
FIRST = next(iter(RECORDS))
MAPS = ("map", "map_weak", "map_default")  # without a penalty, with a weak one, with the task's default one
# Records of resets without a penalty and of the tuned penalty that begin with other pretrained models.
OTHER_MODELS = dict.fromkeys(TASKS, ["other_models"])
OTHER_MODELS["translation"] = ["other_models", "other_models_again"]
NEAR_KL_16 = [  # settings of real text with about the same KL
    "elastic-reset:kl_coef=0.003",
    "ppo, eta 0.40",
    "ppo-kl:kl_coef=0.003, eta 0.80",
    "ppo-kl:kl_coef=0.01",
    "ppo-kl:kl_coef=0.01, average",
]
BOUNDS = (1.15, 1.25, 1.5, 2)  # of the drift that counts, in multiples of the start's


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
        draw_choice(axes, summary, contenders(task))
        axes.set_title(TASKS[task])
    figure.axes[1].set_xlabel("KL coefficient, as a multiple of the best")  # of all three
    figure.axes[0].set_ylabel("trade-off (100: tuned KL penalty)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    return figure


@functools.cache
def contenders(task, seeds=FIRST):
    """{words for a method: a row for each seed of its setting}. What a record of the second seeds lacks is
    missing. What is chosen among the mixtures of a coefficient, the first seeds choose."""
    first = record_of(task)["summary"]
    rivals, ours = (record_of(task, folder)["summary"] for folder in RECORDS[seeds])
    plain = rivals if seeds == FIRST else ours
    weak = chosen(ours, BOTH)
    coef = ours["ends"].loc[weak]["kl_coef"].iloc[0]
    best = best_coefficient(rivals)
    settings = {
        PLAIN: (plain, "ppo"),
        ALONE: (ours, chosen(ours, "elastic-reset")),
        PLAIN_MIXED: (plain, best_setting(first, MIXED, 0)),
        STOPPED: (plain, chosen(first, "ppo, stopped early")),
        WEAK_PENALTY: (rivals, best_setting(first, "ppo-kl", coef)),
        WEAK: (ours, weak),
        WEAK_MIXED: (rivals, best_setting(first, MIXED, coef)),
        PENALTY: (rivals, chosen(rivals, "ppo-kl")),
        TUNED: (rivals, best_setting(rivals, BOTH, best, factor=1.0)),
        OWN: (rivals, chosen(rivals, BOTH)),
        BEST_AVERAGE: (rivals, chosen(rivals, AVERAGED)),
        BEST_MIXTURE: (rivals, chosen(rivals, MIXED)),
        STRONG_PENALTY: (rivals, best_setting(rivals, "ppo-kl", 10 * best)),
        STRONG: (rivals, best_setting(rivals, BOTH, 10 * best)),
        TO_AVERAGE: (ours, chosen(ours, "reset-ema")),
        TO_START: (ours, chosen(ours, "reset-init")),
        S2P: (rivals, chosen(rivals, "S2P")),
        SIL: (rivals, chosen(rivals, "SIL")),
    }
    rows = {}
    for words, (summary, setting) in settings.items():
        if setting is not None:
            rows[words] = rows_named(summary, setting)
    return rows


def chosen(summary, method):
    """The setting that was chosen for a method, or None if the record does not have the method."""
    return summary["methods"]["chosen"].get(method)


def rows_named(summary, setting):
    """A row for each seed of a setting, with its name."""
    return summary["ends"].loc[setting].assign(setting=setting)


def per_cent_of_the_penalty(task, words, seeds=FIRST):
    """The area of a contender in per cent of the tuned penalty's, and its 95 per cent interval."""
    areas, tuned_penalty = (contenders(task, seeds)[name]["area"] for name in (words, PENALTY))
    numbers = tradeoff.difference(areas, tuned_penalty)[:3]
    return [100 + 100 * number / tuned_penalty.mean() for number in numbers]


def draw_choice(axes, summary, found):
    """A line for each method, and stars for resets with a chosen period and share. The coefficient 0 stands
    left of the others."""
    table = in_per_cent(summary)
    errors = in_per_cent(summary, "sem")
    best = best_coefficient(summary)
    multiples = table.index / best
    zero = min(multiples[multiples > 0]) / 3
    for method, values in table.items():
        known = values.notna().to_numpy()
        places = [place or zero for place in multiples[known]]
        look = COMPARED[method] | dict(markersize=6, elinewidth=0.8)
        axes.errorbar(places, values[known], errors[method][known], **look)
    tuned_penalty = found[PENALTY]["area"].mean()
    stars = []
    for words in (ALONE, WEAK):
        mean, error = tradeoff.mean_and_error(100 * found[words]["area"] / tuned_penalty)
        stars.append([found[words]["kl_coef"].iloc[0] / best or zero, mean, error])
    look = dict(color=BLUE, marker="*", markersize=15, linestyle="", elinewidth=0.8)
    axes.errorbar(*zip(*stars, strict=True), **look, label="resets, period and share chosen", zorder=4)
    axes.set_xscale("log")
    ticks = [tick for tick in (0.01, 0.1, 1, 10) if tick > 4 * zero]
    axes.set_xticks([zero, *ticks], ["none", *(f"{tick:g}" for tick in ticks)])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="0.7", linestyle=":", zorder=0)
    axes.set_ylim(-5, 125)
    axes.spines[["top", "right"]].set_visible(False)


def nearest(coefs, wanted, factor):
    """The coefficient next to the one that is wanted, if it is within a factor, and 0 for 0."""
    if wanted == 0:
        return 0.0
    distances = {coef: abs(math.log(coef / wanted)) for coef in coefs if coef}
    found = min(distances, key=distances.get)
    return found if distances[found] <= math.log(factor) else None


def while_it_trains(record, own):
    """The drift of each seed of some rows while the policy trains: the mean of all evaluations but the first
    and those just after a reset."""
    setting = own["setting"].iloc[0]
    drifts = {}
    for seed, history in tradeoff.runs_by_setting(record)[setting].items():
        lines = pandas.DataFrame(tradeoff.during_training(history)[1:])
        drifts[int(seed)] = lines[lines["event"] != "after reset"]["drift"].mean()
    return pandas.Series(drifts)


def training_table():
    """Drift while the policy trains, without resets and with them, and the paired difference."""
    rows = []
    for task in TASKS:
        rivals, ours = (record_of(task, folder) for folder in RECORDS[FIRST])
        found = contenders(task)
        weak, best = (found[words]["kl_coef"].iloc[0] for words in (WEAK, PENALTY))
        pairs = {
            "no penalty, period and share chosen": (PLAIN, ours, ALONE),
            f"penalty {weak:g}, period and share chosen": (WEAK_PENALTY, ours, WEAK),
            f"tuned penalty {best:g}, share of about an eighth": (PENALTY, rivals, TUNED),
        }
        for words, (plain, record, resets) in pairs.items():
            without = while_it_trains(rivals, found[plain])
            with_resets = while_it_trains(record, found[resets])
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
    own = {words: settings_of(summary, method) for method, words in ONE_EACH.items()}
    coefs = sorted({coef for settings in own.values() for coef in settings})
    rows = []
    for words, settings in own.items():
        means = [tradeoff.mean_and_error(settings[coef][number])[0] for coef in coefs]
        rows.append([words, *(rounded(mean, mean) for mean in means)])
    return "\n".join(tradeoff.table([f"{number} at the KL coefficient", *(f"{c:g}" for c in coefs)], rows))


def chosen_table(found, with_largest=True):
    """Each method at its setting, {words: a row for each seed}; the last column is paired by seed. The
    largest drift is left out where the methods were not evaluated equally often."""
    titles = dict(reward="reward", drift="drift at the end", largest="largest drift", area="area")
    if not with_largest:
        del titles["largest"]
    rows = []
    for words, own in found.items():
        cells = [with_error(own[name]) for name in titles]
        less = "" if words == PENALTY else apart(own["area"], found[PENALTY]["area"])
        rows.append([words, setting_words(own), *cells, less])
    names = ["method", "setting", *titles.values(), "area less the tuned penalty's"]
    return "\n".join(tradeoff.table(names, rows))


def per_cent_table(seeds, wanted=None):
    """The area of each contender in per cent of the tuned penalty's, with its 95 per cent interval."""
    found = {task: contenders(task, seeds) for task in TASKS}
    rows = []
    for words in wanted or dict.fromkeys(words for own in found.values() for words in own):
        cells = [per_cent_cell(task, words, seeds) if words in found[task] else "-" for task in TASKS]
        rows.append([words, *cells])
    names = ["trade-off of reward and drift; 100 is a tuned KL penalty", *TASKS.values()]
    return "\n".join(tradeoff.table(names, rows))


def per_cent_cell(task, words, seeds):
    mean, low, high = per_cent_of_the_penalty(task, words, seeds)
    if not contenders(task, seeds)[words]["area"].any():
        return "0"
    return "100" if low == high == 100 else f"{mean:.0f} ({low:.0f} to {high:.0f})"


def rivals(seeds):
    """The area of resets less that of each rival, paired by seed, with 95 per cent intervals."""
    rows = []
    for ours, theirs in RIVALS.items():
        for words in theirs:
            cells = [rival_cell(contenders(task, seeds), ours, words) for task in TASKS]
            if any(cell != "-" for cell in cells):
                rows.append([ours, words, *cells])
    return "\n".join(tradeoff.table(["with resets", "against", *TASKS.values()], rows))


def rival_cell(found, ours, theirs):
    return verdict(found[ours], found[theirs]) if {ours, theirs} <= found.keys() else "-"


def best_setting(summary, method, coef, factor=2.0):
    """The best setting of those whose KL coefficient is nearest to coef, or None if none is within a
    factor."""
    own = rows_of(summary, method)
    found = nearest(own["kl_coef"].unique(), coef, factor)
    if found is None:
        return None
    return own[own["kl_coef"] == found].groupby("setting", sort=False)["area"].mean().idxmax()


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
    for method, words in ONE_EACH.items():
        means = [tradeoff.mean_and_error(s["area"])[0] for s in settings_of(summary, method).values()]
        counts[words] = f"{sum(mean >= 0.9 * max(means) for mean in means)} of {len(means)}"
    return counts


def by_batch_size():
    """The area of resets less that of a rival at the same KL coefficient, in the game with other batches."""
    coefs = (0.003, 0.01, 0.03)
    rows = []
    for size, folder in BATCHES.items():
        own = record_of("translation", folder)["summary"]
        for rival in list(ONE_EACH)[1:]:
            ours = settings_of(own, BOTH)
            theirs = settings_of(own, rival)
            words = [verdict(ours[coef], theirs[coef]) for coef in coefs]
            rows.append([f"{size} responses an update, against: {ONE_EACH[rival]}", *words])
    return "\n".join(tradeoff.table(["at the KL coefficient", *(f"{coef:g}" for coef in coefs)], rows))


def map_of(summary):
    """Reward and drift at the end for each period and share, and in brackets the largest drift of any
    evaluation."""
    own = summary["ends"][summary["ends"]["method"].isin(["elastic-reset", BOTH])]
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


def setting_words(own):
    """Name the setting of some rows, as "every 100, share 0.6" """
    setting = own["setting"].iloc[0]
    if stop := re.fullmatch(r"ppo at (\d+)", setting):
        return f"at update {stop[1]}"
    if tradeoff.is_baseline(setting):
        values = tradeoff.split_label(setting)[1]
        return ", ".join(f"{name.partition('_')[2].replace('_', ' ')} {values[name]}" for name in values)
    said = []
    for name, words in {"reset_every": "every", "share": "share", "kl_coef": "KL", "eta": "eta"}.items():
        if name in own and own[name].iloc[0] > 0:
            said.append(f"{words} {own[name].iloc[0]:g}")
    if setting.endswith(", average"):
        said.append("average")
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


def records():
    """{task: the summary of its record}"""
    return {task: record_of(task)["summary"] for task in TASKS}


@functools.cache
def record_of(task, folder=""):
    """The record of a task, or that in a folder of it, with its summary. It is read once."""
    return tradeoff.read_record(RESULTS / task / folder)


def by_bound():
    """The area of resets without a penalty in per cent of the penalty's, for other bounds of the drift that
    counts, and their gain in reward at any drift. The penalty's coefficient is the best one for the bound."""
    rows = [[f"a drift of at most {bound:g} times the start's"] for bound in BOUNDS]
    rows.append(["their gain in reward over the tuned penalty's, at whatever drift"])
    for task in TASKS:
        summary = record_of(task)["summary"]
        low, high = summary["range"]
        alone, tuned_penalty = (contenders(task)[words] for words in (ALONE, PENALTY))
        for row, bound in zip(rows[:-1], BOUNDS, strict=True):
            penalties = settings_of(summary, "ppo-kl").values()
            best = max(mean_area(own, summary["floor"], low, bound * low) for own in penalties)
            words = f"{100 * mean_area(alone, summary['floor'], low, bound * low) / best:.0f}"
            row.append(f"**{words}**" if math.isclose(bound * low, high) else words)
        gains = [own["reward"].mean() - summary["floor"] for own in (alone, tuned_penalty)]
        rows[-1].append(f"{100 * gains[0] / gains[1]:.0f}")
    return "\n".join(tradeoff.table(["resets without a penalty; 100 is the penalty", *TASKS.values()], rows))


def mean_area(own, floor, low, high):
    """The mean over the seeds of a setting's area, with another bound."""
    areas = []
    for drift, reward in zip(own["drift"], own["reward"], strict=True):
        areas.append(tradeoff.area_under_front([drift], [reward], floor, low, high))
    return sum(areas) / len(areas)


def first_table():
    """README's table."""
    return per_cent_table(FIRST, [ALONE, WEAK, PLAIN_MIXED, BEST_MIXTURE])


def expectations():
    """What a first look at few runs had suggested, and what the seeds say: the difference of two columns,
    paired by seed."""
    game, imdb = (contenders(task) for task in ("translation", "imdb"))
    untuned_game, untuned_imdb = (
        record_of(task)["summary"]["ends"].loc["elastic-reset:kl_coef=0"] for task in ("translation", "imdb")
    )
    resets, penalty, mixture = game[ALONE], game[PENALTY], game[PLAIN_MIXED]
    by_period = drift_by_period("translation")
    level, less, more = "no clear difference", "worse", "better"
    rows = [
        expectation(
            "game: chosen resets without a penalty have the area of a tuned penalty",
            resets["area"] - penalty["area"],
            level,
        ),
        expectation(
            "game: so has plain PPO, mixed with the start",
            mixture["area"] - penalty["area"],
            level,
        ),
        expectation(
            "game: chosen resets have as much reward as untuned ones",
            resets["reward"] - untuned_game["reward"],
            level,
        ),
        expectation(
            "game: and less drift at the end",
            resets["drift"] - untuned_game["drift"],
            less,
        ),
        expectation(
            "game: resets every 25 updates have a smaller largest drift than every 100",
            by_period[25] - by_period[100],
            less,
        ),
        expectation(
            "mock sentiment: chosen resets have more area than untuned ones",
            imdb[ALONE]["area"] - untuned_imdb["area"],
            more,
        ),
        expectation(
            "mock sentiment: a tuned penalty has still more",
            imdb[ALONE]["area"] - imdb[PENALTY]["area"],
            less,
        ),
    ]
    return "\n".join(tradeoff.table(["expected", "difference", "it was"], rows))


def expectation(words, differences, expected):
    """A row that says whether the verdict of paired differences is the expected one."""
    agreed = "not refuted" if expected == "no clear difference" else "confirmed"
    agrees = tradeoff.difference(differences, 0)[3] == expected
    return [words, interval_of(differences), agreed if agrees else "refuted"]


def drift_by_period(task):
    """The largest drift of a run of the map for each period, a row per seed, averaged over the shares."""
    ends = record_of(task, "map")["summary"]["ends"]
    return ends.groupby(["seed", "reset_every"])["largest"].mean().unstack()


def page_tables():
    """{page of tutorials/results: {name: table}}"""
    found = records()
    pages = {task: task_tables(task, found[task]) for task in TASKS}
    pages["translation"]["batches"] = by_batch_size()
    reviews = record_of("reviews")["summary"]
    pages["reviews"] = dict(few=real_text(reviews, NEAR_KL_16), all=real_text(reviews))
    pages["README"] = dict(short=per_cent_table(FIRST, SHORT), training=training_table(), bounds=by_bound())
    for seeds in RECORDS:
        pages["README"][f"all, {seeds}"] = per_cent_table(seeds)
        pages["README"][f"rivals, {seeds}"] = rivals(seeds)
    pages["README"]["expected"] = expectations()
    pages["../../README"] = dict(first=first_table())
    return pages


def task_tables(task, found):
    """Return the tables of a task's own page, {name: table}."""
    maps = [folder for folder in MAPS if (RESULTS / task / folder).exists()]
    tables = {folder: map_of(record_of(task, folder)["summary"]) for folder in maps}
    tables |= {seeds: chosen_table(contenders(task, seeds), seeds == FIRST) for seeds in RECORDS}
    for folder in OTHER_MODELS[task]:
        summary = record_of(task, folder)["summary"]
        names = {ALONE: "elastic-reset", PENALTY: "ppo-kl", BEST_AVERAGE: AVERAGED, BEST_MIXTURE: MIXED}
        rows = {words: rows_named(summary, chosen(summary, method)) for words, method in names.items()}
        tables[folder] = chosen_table(rows)
    return tables | {number: by_coefficient(found, number) for number in ("drift", "reward")}


if __name__ == "__main__":
    found = records()
    picture(found).savefig(HERE / "evidence.png", dpi=200)
    for page, tables in page_tables().items():
        for name, text in tables.items():
            print(f"\n{page}: {name}\n{text}")
    for task, summary in found.items():
        print(f"{task}: {near_the_best(summary)}")
