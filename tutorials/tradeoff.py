"""What a comparison says: the numbers, tables and pictures of a record that compare.py has made.

    from tutorials import tradeoff

    record = tradeoff.read_record("tutorials/results/imdb")
    record["summary"]["ends"].loc["ppo"]         # a pandas table: what a setting delivers, a row per seed
    record["summary"]["methods"]                 # a row per method, with the setting that was chosen

A record, tradeoff.json, has every evaluation of every run, {label: {seed: [evaluation, ...]}}, and the
settings of each label. A label is a method with settings of its own, as ppo-kl:kl_coef=0.1. All settings
that differ in KNOBS only are one method."""

import itertools
import json
import math
import re
from pathlib import Path

import pandas
from scipy import stats

from elastic_reset import write_text, written_whole

# =============================================== The numbers ================================================

# The settings along which a method is one. The share is how far back a reset goes: ema_decay ** reset_every.
KNOBS = ["kl_coef", "learning_rate", "reset_every", "share"]
# Up to which drift a model counts, as a multiple of the start's. In qa pass@1 breaks down beyond.
WORST = dict(qa=1.15)  # in other tasks 1.5


def split_label(label):
    """ "ppo-kl:kl_coef=0.1" -> ("ppo-kl", {"kl_coef": "0.1"})"""
    method, *own = re.split(r":(?=\w+=)", label)
    return method, dict(setting.split("=", 1) for setting in own)


def join_label(method, own, separator=":"):
    """Make a label. The inverse of split_label()."""
    words = [method]
    for name, value in own.items():
        words.append(f"{name}={value}")
    return separator.join(words)


def tradeoff(record):
    """Compute the numbers of a record. Returns

    start: the first evaluation of all runs. range: its drift, and the largest one that counts.
    floor: the reward from which gains are counted: the start's or, in the game, that of the sender that stays
        fixed, because what the receiver gains without the policy is not a method's.
    ends: a row for each setting and seed, see delivered(), with its area, see area_under_front().
    methods: a row for each method: settings (how many), chosen (as given, or that of the largest mean area),
        worst (that of the smallest).
    together: the area of all settings of a method taken together, the better of them at each drift, a row
        for each method and seed."""
    histories = record["runs"]
    first_runs = next(iter(histories.values()))
    start = next(iter(first_runs.values()))[0]
    task = next(iter(record["configs"].values())).get("task")
    low = start["drift"]
    high = WORST.get(task, 1.5) * low
    ends = pandas.DataFrame(delivered(record))
    ends = ends.drop_duplicates(["setting", "seed"]).set_index(["setting", "seed"])
    floor = start["reward"]
    if "fixed-sender" in histories:
        floor = ends.loc["fixed-sender"]["reward"].mean()

    def area(rows):
        return area_under_front(rows["drift"], rows["reward"], floor, low, high)

    numbers = ends[["drift", "reward"]]
    ends["area"] = numbers.groupby(level=["setting", "seed"], sort=False).apply(area)
    together = numbers.groupby([ends["method"], "seed"], sort=False).apply(area)
    return dict(
        start=start,
        floor=floor,
        range=[low, high],
        ends=ends,
        methods=methods_of(ends, record.get("chosen", {})),
        together=together,
    )


def methods_of(ends, chosen):
    """Tabulate the methods: how many settings each has, the chosen one, whether that was chosen by another
    record, and the worst one."""
    areas = ends.groupby("setting", sort=False)["area"].mean()
    rows = {}
    for method, own in ends.groupby("method", sort=False):
        own = areas[own.index.unique("setting")]
        choice = chosen.get(method, own.idxmax())
        if choice not in own:
            raise ValueError(f"{choice}, chosen for {method}, is not among the settings that were run")
        rows[method] = dict(settings=len(own), chosen=choice, worst=own.idxmin())
        rows[method]["chosen_elsewhere"] = method in chosen
    return pandas.DataFrame.from_dict(rows, orient="index")


def delivered(record):
    """List what every setting delivers, a row for each seed: its last evaluation, the knobs, the largest
    drift of any evaluation (largest), and that just before the last reset (before)."""
    rows = []
    for label, runs in record["runs"].items():
        config = record["configs"][label]
        setting = without(("average", "mixtures"), label)
        method = method_of(setting, config)
        knobs = knobs_of(setting, config)
        for seed, history in runs.items():
            training = during_training(history)
            about = dict(seed=int(seed)) | knobs | drifts_of(training)
            name = dict(setting=setting, method=method)
            rows.append(name | about | training[-1])
            for line in history[len(training) :]:
                rows.append(after(setting, method, line["event"]) | about | line)
            for i, line in enumerate(training[:-1]):
                if setting == "ppo" and i > 0:
                    stopped = dict(setting=f"ppo at {line['update']}", method="ppo, stopped early")
                    rows.append(stopped | about | drifts_of(training[: i + 1]) | line)
    return rows


def runs_by_setting(record):
    """Return {setting: {seed: its evaluations}}. A setting is a label without what comes after training."""
    return {without(("average", "mixtures"), label): runs for label, runs in record["runs"].items()}


def drifts_of(training):
    """Return the largest drift of a run, and that just before the last reset or else at the end."""
    drifts = [line["drift"] for line in training]
    resets = [line["drift"] for line in training if line["event"] == "before reset"]
    return dict(largest=max(drifts), before=resets[-1] if resets else drifts[-1])


def after(setting, method, event):
    """Name what is made of a run's weights when it has ended."""
    if event == "average":
        return dict(setting=f"{setting}, average", method=f"{method}, averaged at the end")
    eta = float(event.removeprefix("eta "))
    return dict(setting=f"{setting}, {event}", method=f"{method}, mixed with the start", eta=eta)


def knobs_of(setting, config):
    """Return the values of KNOBS in a run, and of the settings that a baseline adds."""
    knobs = {name: config[name] for name in ("kl_coef", "learning_rate")}
    if config.get("reset", "none") != "none":
        knobs["reset_every"] = config["reset_every"]
    if config.get("reset") == "elastic" and config.get("ema_update", "update") == "update":
        share = config["ema_decay"] ** config["reset_every"]
        knobs["share"] = float(f"{share:.2g}")
    if is_baseline(setting):
        knobs |= {name: config[name] for name in split_label(setting)[1]}
    return knobs


def method_of(label, config):
    """Return the method that a label is a setting of: its name, without the values of knobs, which for a
    baseline are all its settings."""
    method, own = split_label(without((*KNOBS, "ema_decay"), label))
    if is_baseline(label):
        return method.rpartition(":")[2]
    if method == "ppo":
        method = "ppo-kl"
    if config.get("reset", "none") != "none" and config["kl_coef"]:
        method += " and a penalty"
    return join_label(method, own)


def is_baseline(label):
    """Say whether a label names a method of a program of its own, by its file."""
    return ":" in split_label(label)[0]


def without(names, label):
    """Return a label without some of its settings."""
    method, own = split_label(label)
    return join_label(method, {name: own[name] for name in own if name not in names})


def during_training(history):
    """Return the evaluations during training, without what was evaluated after it."""
    return [line for line in history if not re.match("average|eta", line["event"])]


def area_under_front(drifts, rewards, floor, low, high):
    """Return the best reward at a drift of at most d, less `floor` and at least 0, averaged over d from low
    to high."""
    area = 0.0
    best = 0.0
    for drift, reward in sorted(zip(drifts, rewards, strict=True)):
        more = reward - floor - best
        width = high - max(low, drift)
        if more > 0 and width > 0:
            area += more * width / (high - low)
            best += more
    return area


def chosen_rows(summary, method):
    """Return a row for each seed of the setting that was chosen for a method."""
    return summary["ends"].loc[summary["methods"].loc[method, "chosen"]]


def mean_and_error(values):
    """Return the mean of some numbers and its standard error. A single number has the error 0."""
    values = pandas.Series(values)
    return values.mean(), values.sem() if len(values) > 1 else 0.0


def difference(ours, theirs):
    """Compare two columns by seed. Returns the mean difference, the ends of its 95 per cent interval
    (Student's t, paired), and a verdict in words. Two seeds give no interval and no verdict."""
    differences = (ours - theirs).dropna()
    mean = differences.mean()
    if len(differences) < 3:
        return mean, math.nan, math.nan, "too few seeds"
    if differences.std() == 0:
        low, high = mean, mean
    else:
        low, high = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
    return mean, low, high, verdict


# ================================================ The tables ================================================


def read_record(folder):
    """Read the tradeoff.json in a folder. Raises ValueError if it is none."""
    path = Path(folder) / "tradeoff.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record | dict(summary=tradeoff(record))
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of a comparison ({error!r})") from error


def write_results(record, folder):
    """Write summary.md and the pictures. Returns the summary."""
    ends = record["summary"]["ends"]
    along = {  # {picture: the knobs that a method must have several values of}
        plot_tradeoff: [],
        plot_choice: ["kl_coef"],
        plot_basin: ["kl_coef", "learning_rate"],
        plot_map: ["reset_every", "share"],
    }
    for plot, knobs in along.items():
        path = folder / f"{plot.__name__.removeprefix('plot_')}.png"
        if knobs and not methods_along(ends, *knobs):
            path.unlink(missing_ok=True)  # of a comparison that had more settings
            continue
        with written_whole(path) as aside:
            plot(record).savefig(aside, format="png", dpi=200)
    text = summary_text(record)
    write_text(folder / "summary.md", text)
    return text


def methods_along(ends, *knobs):
    """Return the methods that have at least two values of each of these knobs and one of each other, {method:
    its rows}."""
    found = {}
    for method, own in ends.groupby("method", sort=False):
        if set(varied(own)) == set(knobs):
            found[method] = own
    return found


def varied(own):
    """List the knobs that a method has several values of."""
    return [name for name in (*KNOBS, "eta") if name in own and own[name].nunique() > 1]


def summary_text(record):
    """Write summary.md: a row per method, a row per setting."""
    summary = record["summary"]
    ends = summary["ends"]
    low, high = summary["range"]
    floor = "the fixed sender's" if "fixed-sender" in record["runs"] else "the start's"
    chosen_by = "runs with other seeds" if record.get("chosen") else "these runs themselves"
    about = (
        f"Reward and drift are those of what a setting delivers: mean +- standard error over "
        f"{ends.index.unique('seed').size} seeds. Its area is its gain in reward over "
        f"{summary['floor']:.4g}, {floor}, at a drift of at most d, averaged over d from the start's "
        f"{low:.4g} to {high / low:.3g} times that, {high:.4g}. A method's area over all settings takes "
        f"the best of them at each d, so it grows with their number. Settings were chosen by {chosen_by}. "
        f"Differences are paired by seed and have 95 per cent intervals (Student's t). These know nothing "
        f"of how the start, the evaluation's prompts and the setting were chosen. `largest` is the largest "
        f"drift of any evaluation, `before` that just before the last reset."
    )
    source = f"`{' '.join(record['command'])}`, commit {record['commit']}, torch {record['torch']}"
    tables = [*methods_table(summary), "", *settings_table(summary)]
    return "\n".join([about, "", *tables, "", source, ""])


def methods_table(summary):
    """Return the lines of a table with a row per method."""
    ends = summary["ends"]
    methods = summary["methods"]
    first = "ppo-kl" if "ppo-kl" in methods.index else methods.index[0]
    yardstick = chosen_rows(summary, first)["area"]
    some_elsewhere = methods["chosen_elsewhere"].any()
    rows = []
    for method, numbers in methods.iterrows():
        chosen = chosen_rows(summary, method)
        together = summary["together"][method]
        by = ""
        if some_elsewhere and not numbers["chosen_elsewhere"]:
            by = " (by these runs)"
        row = [method, numbers["settings"], cell(together), numbers["chosen"] + by]
        row += [cell(chosen[name]) for name in ("reward", "drift", "area")]
        row.append(interval(chosen["area"], yardstick) if method != first else "")
        worst = ends.loc[numbers["worst"]]
        rows.append([*row, cell(worst["area"])])
    names = ["method", "settings", "area, all settings", "chosen setting", "reward", "drift", "area"]
    return table([*names, f"area less {first}'s", "worst setting's area"], rows)


def settings_table(summary):
    """Return the lines of a table with a row per setting, and one for the start."""
    start = summary["start"]
    ends = summary["ends"]
    others = [name for name in start if name not in ("update", "event", "reward", "drift", "seconds")]
    rows = [["start", f"{start['reward']:.4g}", f"{start['drift']:.4g}", "", "", ""]]
    rows[0] += [f"{start[name]:.4g}" for name in others]
    names = ["reward", "drift", "largest", "before", "area", *others]
    for setting, own in ends.groupby("setting", sort=False):
        rows.append([setting, *(cell(own[name]) for name in names)])
    return table(["setting", *names], rows)


def table(names, rows):
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def cell(values):
    mean, error = mean_and_error(values)
    return f"{mean:.4g} +- {error:.2g}" if len(values) > 1 else f"{mean:.4g}"


def interval(ours, theirs):
    """ "better: +0.015 [+0.004, +0.026]" """
    if not ours.any() and not theirs.any():
        return "neither counts"
    mean, low, high, verdict = difference(ours, theirs)
    ends = "" if math.isnan(low) else f" [{low:+.3g}, {high:+.3g}]"
    return f"{verdict}: {mean:+.3g}{ends}"


# =============================================== The pictures ===============================================

STYLES = {  # a method's colour, which the colour-blind tell apart, and its marker, which is left in grey
    "elastic-reset": ("#0072B2", "o"),
    "ppo": ("#D55E00", "s"),
    "ppo-kl": ("#009E73", "^"),
    "reinforce": ("#CC79A7", "D"),
    "fixed-sender": ("#666666", "X"),
    "reset-init": ("#56B4E9", "P"),
    "reset-ema": ("#E69F00", "v"),
    "ema-reference": ("#882255", "p"),
}
SPARE = [("#000000", "<"), ("#332288", ">"), ("#999933", "h"), ("#AA4499", "d")]  # of methods unknown here
VARIANTS = [("-", "full"), ("--", "none"), (":", "left"), ("-.", "top")]  # line and filling
UNITS = dict(
    translation="nats per token of human English",
    imdb="perplexity under another language model",
    qa="perplexity of human answers",
)


def styles_of(names):
    """Return {name: its style}. A method has the same colour and marker in every picture. Lines and fillings
    tell apart what has the same method but other settings."""
    methods = [re.split("[:,]| and ", name)[0] for name in names]
    others = [method for method in dict.fromkeys(methods) if method not in STYLES]
    known = STYLES | dict(zip(others, itertools.cycle(SPARE), strict=False))
    styles = {}
    for i, name in enumerate(names):
        color, marker = known[methods[i]]
        line, filling = VARIANTS[methods[:i].count(methods[i]) % len(VARIANTS)]
        styles[name] = dict(color=color, marker=marker, linestyle=line, fillstyle=filling)
    return styles


def new_figure(width, height, rows_and_columns=(1, 1)):
    """Make a figure. Returns it, and its panels as a list."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(*rows_and_columns, squeeze=False).flat)


def drift_axis(record):
    """Name a drift axis. All methods of a record have the same task."""
    return f"drift ({UNITS[next(iter(record['configs'].values()))['task']]})"


def means_of(ends):
    """Return a row for each setting: means over the seeds, and standard errors as reward_error."""
    grouped = ends.groupby("setting", sort=False)
    means = grouped.mean(numeric_only=True)
    errors = grouped[["reward", "drift"]].sem().fillna(0.0)  # a single seed has none
    return means.join(errors.add_suffix("_error")).join(grouped["method"].first())


def plot_tradeoff(record):
    """Draw reward against drift, a curve per method over its settings, the chosen one large; and, right, the
    drift of the chosen settings and of plain PPO over the updates. Means with standard errors. Of more than
    three methods only drawn_methods() are there; the tables have all."""
    summary = record["summary"]
    methods = summary["methods"].loc[drawn_methods(summary)]
    figure, (plane, over_time) = new_figure(9, 4.6, (1, 2))
    draw_front(plane, summary, methods["chosen"])
    wanted = ["ppo", *methods["chosen"]]
    shown = {}
    for setting, runs in runs_by_setting(record).items():
        if setting in wanted:
            shown[method_of(setting, {}) if is_baseline(setting) else setting] = runs
    draw_over_time(over_time, shown, summary["range"])
    plane.set(xlabel=drift_axis(record), ylabel="reward")
    over_time.set(xlabel="update", ylabel=drift_axis(record))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    return figure


def drawn_methods(summary):
    """List the methods of a picture: all, or of more than three the best with resets, the best without, and
    the best of what is made of a run's weights at its end."""
    methods = summary["methods"]
    if len(methods) <= 3:
        return list(methods.index)
    areas = summary["ends"].groupby("setting")["area"].mean()
    best = {}
    for method in methods["chosen"].map(areas).sort_values(ascending=False).index:
        kind = "at the end" if ", " in method else "resets" if "reset" in method else "none"
        best.setdefault(kind, method)
    return list(best.values())


def draw_front(axes, summary, chosen):
    """Draw the curves of some methods, given as {method: its chosen setting}. The panel has the upper half of
    the gain in reward, and the drift that counts; beyond stands a hatched strip."""
    low, high = summary["range"]
    styles = styles_of(list(chosen.index))
    means = means_of(summary["ends"])
    for method, setting in chosen.items():
        style = styles[method] | dict(linewidth=1.5)
        own = curve(means[means["method"] == method])
        axes.plot(own["drift"], own["reward"], **style, markersize=4)
        point = means.loc[setting]
        place = point["drift"], point["reward"], point["reward_error"], point["drift_error"]
        axes.errorbar(*place, **style | dict(linestyle="", markersize=10))
        axes.plot([], [], **style, markersize=7, label=method)  # for the legend
    best = means.loc[chosen]
    counting = means[means["method"].isin(chosen.index) & (means["drift"] <= high)]
    top = max([*counting["reward"], *best["reward"]])
    half = summary["floor"] + 0.5 * (top - summary["floor"])
    bottom = min([half, *best["reward"]])
    margin = 0.06 * (top - bottom or 1)
    right = max([high, *best["drift"]]) + 0.15 * (high - low)
    axes.set_xlim(min([low, *best["drift"]]) - 0.05 * (high - low), right)
    axes.set_ylim(bottom - margin, top + margin)
    axes.axvspan(high, right, facecolor="none", edgecolor="0.8", hatch="//", zorder=0)
    axes.set_title(f"hatched: beyond {high / low:.3g} times the start's drift", fontsize=11)
    arrow = dict(arrowprops=dict(arrowstyle="->", color="0.4"), color="0.4", ha="center", fontsize=11)
    axes.annotate("better", (0.5, 0.5), (0.65, 0.35), "axes fraction", **arrow)


def curve(own):
    """Return those of a method's settings that a line joins: all, where only one knob varies; else those
    that no other one beats in both reward and drift."""
    if len(varied(own)) == 1:
        return own.sort_values(varied(own))
    own = own.sort_values(["drift", "reward"], ascending=[True, False])
    best_before = own["reward"].cummax().shift(fill_value=-math.inf)
    return own[own["reward"] > best_before]


def over_updates(runs, name):
    """Return the metric's mean over the seeds and its standard error, a row for each evaluation."""
    columns = {}
    for seed, history in runs.items():
        training = during_training(history)
        columns[seed] = [line[name] for line in training]
    seeds = pandas.DataFrame(columns)
    updates = [line["update"] for line in training]
    error = seeds.sem(axis=1).fillna(0.0)
    return pandas.DataFrame(dict(update=updates, mean=seeds.mean(axis=1), error=error))


def draw_over_time(axes, runs_of, counting):
    """Draw drift over the updates, up to twice the range that counts. A curve that ends beyond says where."""
    low, high = counting
    limit = low + 2 * (high - low)
    styles = styles_of(list(runs_of))
    ends = {}
    for label, runs in runs_of.items():
        drift = over_updates(runs, "drift")
        update = drift["update"]
        mean = drift["mean"]
        look = styles[label] | dict(linewidth=1.5, markersize=4)
        axes.plot(update, mean, **look)
        band = dict(color=look["color"], alpha=0.15, linewidth=0)
        axes.fill_between(update, mean - drift["error"], mean + drift["error"], **band)
        ends[label] = mean.iloc[-1]
    bottom = min(low, *ends.values()) - 0.1 * (high - low)
    axes.set_ylim(bottom, limit)
    labels = sorted(ends, key=ends.get)
    heights = spread([(ends[label] - bottom) / (limit - bottom) for label in labels], 0.17)
    for label, height in zip(labels, heights, strict=True):
        words = label.replace(":", "\n", 1)
        if ends[label] > limit:
            words += f"\nends at {short(ends[label])}"
        look = dict(color=styles[label]["color"], fontsize=10, va="center", transform=axes.transAxes)
        axes.text(1.02, height, words, **look)


def spread(heights, gap):
    """Move ascending heights to at least `gap` from each other and to at most 1 - gap / 2."""
    heights = list(heights)
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    top = 1 - gap / 2
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], top)
        top -= gap
    return heights


def plot_choice(record):
    """Draw reward and drift against the KL coefficient, a line per method; 0 stands left of the others."""
    from matplotlib.ticker import NullFormatter

    summary = record["summary"]
    figure, panels = new_figure(11, 4.6, (1, 2))
    styles = styles_of(summary["methods"].index)
    found = {}
    for method, own in methods_along(summary["ends"], "kl_coef").items():
        found[method] = with_zero(own, method, summary)
    values = pandas.concat(found.values())["kl_coef"].unique()
    zero = min(values[values > 0]) / 3
    for axes, name in zip(panels, ("reward", "drift"), strict=True):
        for method, own in found.items():
            means = means_of(own).sort_values("kl_coef")
            places = means["kl_coef"].replace(0.0, zero)
            look = styles[method] | dict(label=method, markersize=5, linewidth=1.2)
            axes.errorbar(places, means[name], means[f"{name}_error"], **look)
        axes.set(xscale="log", xlabel="KL coefficient", ylabel=name)
        axes.xaxis.set_minor_formatter(NullFormatter())
        if 0.0 in values:
            axes.set_xticks([zero, *axes.get_xticks()[1:-1]])
            axes.set_xticklabels(["0", *(f"{tick:g}" for tick in axes.get_xticks()[1:])])
        axes.set_xlim(zero / 1.5, 1.5 * max(values))
    low = summary["start"]["drift"]
    drift = panels[1]
    drift.axhline(low, color="0.4", linewidth=1, zorder=0)
    drift.annotate("start", (1.5 * max(values), low), (4, -3), textcoords="offset points", color="0.4")
    if drift.get_ylim()[1] > 5 * low:
        drift.set_yscale("log", nonpositive="clip")
    drift.set_ylabel(drift_axis(record))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def with_zero(own, method, summary):
    """Return a method's rows and, where it has a penalty, those of the same method without one."""
    ends = summary["ends"]
    alone = ends[ends["method"] == method.removesuffix(" and a penalty")]
    if method.endswith(" and a penalty") and alone.index.unique("setting").size == 1:
        return pandas.concat([alone, own])
    return own


def grid_of(own, summary, row, column):
    """Return two tables of a method's means, drift and the share of the best gain in reward, with a row for
    each value of one knob and a column for each of another."""
    means = means_of(own)
    gain = means["reward"] - summary["floor"]
    means["kept"] = gain / best_gain(summary)
    drift = means.pivot(index=row, columns=column, values="drift")
    return drift, means.pivot(index=row, columns=column, values="kept")


def best_gain(summary):
    """Return the best gain in reward of all settings that end with a drift that counts."""
    means = means_of(summary["ends"])
    counts = means["drift"] <= summary["range"][1]
    return means["reward"][counts].max() - summary["floor"]


def plot_basin(record):
    """Draw a map per method, learning rate by KL coefficient, with each cell's drift and its share of the
    best gain in reward. Cells with nine tenths of that gain and a drift that counts end well."""
    from matplotlib.colors import ListedColormap

    summary = record["summary"]
    found = methods_along(summary["ends"], "kl_coef", "learning_rate")
    figure, panels = new_figure(4.2 * len(found), 4, (1, len(found)))
    colors = ListedColormap(["#FFFFFF", "#A9C3E0", "#E69F00"])
    for axes, (method, own) in zip(panels, found.items(), strict=True):
        drift, share = grid_of(own, summary, "learning_rate", "kl_coef")
        failure = (share < 0.9).astype(int)
        failure = failure.mask(drift > summary["range"][1], 2).mask(drift.isna())
        axes.imshow(failure, origin="lower", cmap=colors, vmin=-0.5, vmax=2.5, aspect="auto")
        write_cells(axes, drift, share)
        axes.set(xlabel="KL coefficient", ylabel="learning rate")
        well = int((failure == 0).sum().sum())
        axes.set_title(f"{method}\n{well} of {drift.count().sum()} cells end well", fontsize=10)
    figure.supxlabel("blue: too little gain; orange: too much drift", fontsize=9)
    return figure


def plot_map(record):
    """Draw a map per method, how far back a reset goes by how often. Blue: the share of the best gain in
    reward that is kept. Orange: the drift is too large to count."""
    from matplotlib.colors import ListedColormap

    summary = record["summary"]
    found = methods_along(summary["ends"], "reset_every", "share")
    updates = next(iter(record["configs"].values()))["updates"]
    figure, panels = new_figure(5.5 * len(found), 4.4, (1, len(found)))
    for axes, (method, own) in zip(panels, found.items(), strict=True):
        drift, share = grid_of(own, summary, "reset_every", "share")
        look = dict(origin="upper", aspect="auto")
        image = axes.imshow(share, cmap="Blues", alpha=0.6, vmin=0, vmax=1, **look)
        too_far = drift.where(drift > summary["range"][1])
        axes.imshow(too_far, cmap=ListedColormap(["#E69F00"]), **look)
        write_cells(axes, drift, share)
        words = {updates: "\nonce, at the end"}
        rows = [f"{every:g}{words.get(every, '')}" for every in drift.index]
        axes.set_yticks(range(len(rows)), rows)
        axes.set(
            xlabel="how far back: the start's share of a reset", ylabel="how often: updates between resets"
        )
        axes.set_title(method, fontsize=10)
    figure.colorbar(image, ax=panels, label="gain, of the best one whose drift counts")
    words = "in each cell: drift; gain, of the best one whose drift counts\norange: drift too large to count"
    figure.supxlabel(words, fontsize=9)
    return figure


def short(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def write_cells(axes, drift, share):
    """Write drift and share of the gain into each cell, and the knobs at the edges."""
    rows, columns = drift.shape
    for row, column in itertools.product(range(rows), range(columns)):
        value = drift.iloc[row, column]
        words = "not run" if math.isnan(value) else f"{short(value)}\n{share.iloc[row, column]:.0%}"
        axes.text(column, row, words, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(columns), drift.columns.map("{:g}".format))
    axes.set_yticks(range(rows), drift.index.map("{:g}".format))
