"""The pictures of a record that compare.py has made.

    from tutorials import pictures, tradeoff

    record = tradeoff.read_record("tutorials/results/imdb")
    pictures.plot_choice(record)                 # a figure of Matplotlib

plot_tradeoff draws reward against drift, plot_choice the KL coefficients, plot_basin the learning rates by KL
coefficients, plot_map how far back a reset goes by how often. All numbers come from tradeoff.py."""

import itertools
import math
import re

import pandas

from elastic_reset import written_whole
from tutorials.tradeoff import (
    KNOBS,
    UNITS,
    config_of,
    during_training,
    is_baseline,
    method_of,
    runs_by_setting,
)

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
SPARE = [  # of methods unknown here
    ("#000000", "<"),
    ("#332288", ">"),
    ("#999933", "h"),
    ("#AA4499", "d"),
]
VARIANTS = [  # line and filling
    ("-", "full"),
    ("--", "none"),
    (":", "left"),
    ("-.", "top"),
]
ORANGE = "#E69F00"  # too much drift


def write_pictures(record, folder):
    """Draw what a record has settings for, into a folder. A picture that it has none for is deleted."""
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


def methods_along(ends, *knobs):
    """Return the methods that have at least two values of each of these knobs and differ in nothing else,
    {method: its rows}."""
    found = {}
    for method, own in ends.groupby("method", sort=False):
        several = varied(own)
        settings = own.groupby("setting")[several].first()
        if set(several) == set(knobs) and not settings.duplicated().any():
            found[method] = own
    return found


def varied(own):
    """List the knobs that a method has several values of."""
    known = [name for name in (*KNOBS, "eta") if name in own]
    return [name for name in known if own[name].nunique() > 1]


def styles_of(names):
    """Return {name: its style}. A method of STYLES has the same colour and marker in every picture. Lines and
    fillings tell apart what has the same method but other settings."""
    methods = [re.split("[:,]| and ", name)[0] for name in names]
    others = [method for method in dict.fromkeys(methods) if method not in STYLES]
    known = STYLES | dict(zip(others, itertools.cycle(SPARE), strict=False))
    styles = {}
    for i, name in enumerate(names):
        color, marker = known[methods[i]]
        earlier = methods[:i].count(methods[i])
        line, filling = VARIANTS[earlier % len(VARIANTS)]
        styles[name] = dict(
            color=color,
            marker=marker,
            linestyle=line,
            fillstyle=filling,
        )
    return styles


def record_styles(record):
    """Return {method: its style}, the same in all pictures of a record. Plain PPO has one of its own."""
    return styles_of(["ppo", *record["summary"]["methods"].index])


def new_figure(width, height, columns=1):
    """Make a figure with panels side by side. Returns it, and its panels as a list."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)
    return figure, list(panels.flat)


def drift_axis(record):
    """Name a drift axis."""
    unit = UNITS.get(config_of(record)["task"])
    return f"drift ({unit})" if unit else "drift"


def means_of(ends):
    """Return a row for each setting: means over the seeds, and standard errors as reward_error."""
    grouped = ends.groupby("setting", sort=False)
    means = grouped.mean(numeric_only=True)
    errors = grouped[["reward", "drift"]].sem().fillna(0.0)  # a single seed has none
    means = means.join(errors.add_suffix("_error"))
    return means.join(grouped["method"].first())


def plot_tradeoff(record):
    """Draw reward against drift, a curve per method over its settings, the chosen one large; and, right, the
    drift of the chosen settings and of plain PPO over the updates. Means with standard errors. Of more than
    three methods only drawn_methods() are there; the tables have all."""
    summary = record["summary"]
    methods = summary["methods"].loc[drawn_methods(summary)]
    figure, (plane, over_time) = new_figure(9, 4.6, columns=2)
    styles = record_styles(record)
    draw_front(plane, summary, methods["chosen"], styles)
    method_by_setting = {"ppo": "ppo"} | {setting: method for method, setting in methods["chosen"].items()}
    shown = {}
    looks = {}
    for setting, runs in runs_by_setting(record).items():
        name = method_of(setting, {}) if is_baseline(setting) else setting
        if setting in method_by_setting:
            shown[name] = runs
            looks[name] = styles[method_by_setting[setting]]
    draw_over_time(over_time, shown, looks, summary["range"])
    plane.set(xlabel=drift_axis(record), ylabel="reward")
    over_time.set(xlabel="update", ylabel=drift_axis(record))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    return figure


def drawn_methods(summary):
    """List the methods of a picture: all, or of more than three the best with resets, the best without, and
    the best of what is made of runs of other methods: averages, mixtures, policies stopped early."""
    methods = summary["methods"]
    if len(methods) <= 3:
        return list(methods.index)
    areas = summary["ends"].groupby("setting")["area"].mean()
    area = methods["chosen"].map(areas)
    best = {}
    for method in area.sort_values(ascending=False).index:
        kind = "at the end" if ", " in method else "resets" if "reset" in method else "none"
        best.setdefault(kind, method)
    return list(best.values())


def draw_front(axes, summary, chosen, styles):
    """Draw the curves of some methods, given as {method: its chosen setting}. The panel has the upper half of
    the gain in reward, and the drift that counts; beyond stands a hatched strip."""
    means = means_of(summary["ends"])
    for method, setting in chosen.items():
        style = styles[method] | dict(linewidth=1.5)
        own = curve(means[means["method"] == method])
        axes.plot(own["drift"], own["reward"], **style, markersize=4)
        axes.errorbar(
            x=means.loc[setting, "drift"],
            y=means.loc[setting, "reward"],
            yerr=means.loc[setting, "reward_error"],
            xerr=means.loc[setting, "drift_error"],
            **style | dict(linestyle="", markersize=10),
        )
        axes.plot([], [], **style, markersize=7, label=method)  # for the legend
    known = means[means["method"].isin(chosen.index)]
    set_limits(axes, summary, known, means.loc[chosen])
    low, high = summary["range"]
    axes.set_title(f"hatched: beyond {high / low:.3g} times the start's drift", fontsize=11)
    axes.axvspan(
        high,
        axes.get_xlim()[1],
        facecolor="none",
        edgecolor="0.8",
        hatch="//",
        zorder=0,
    )
    axes.annotate(
        "better",
        xy=(0.5, 0.5),
        xytext=(0.65, 0.35),
        xycoords="axes fraction",
        arrowprops=dict(arrowstyle="->", color="0.4"),
        color="0.4",
        ha="center",
        fontsize=11,
    )


def set_limits(axes, summary, known, best):
    """Set the limits of a panel of reward and drift. `known`: the means of its settings. `best`: those of
    the chosen ones, which it must have."""
    low, high = summary["range"]
    counting = known["reward"][known["drift"] <= high]
    top = max([*counting, *best["reward"]])
    half = summary["floor"] + 0.5 * (top - summary["floor"])
    bottom = min(half, best["reward"].min())
    margin = 0.06 * (top - bottom or 1)
    axes.set_ylim(bottom - margin, top + margin)
    left = min(low, best["drift"].min())
    right = max(high, best["drift"].max())
    axes.set_xlim(left - 0.05 * (high - low), right + 0.15 * (high - low))


def curve(own):
    """Return those of a method's settings that a line joins: all, where only one knob varies; else those
    that no other one beats in both reward and drift."""
    if len(varied(own)) == 1:
        return own.sort_values(varied(own))
    own = own.sort_values(["drift", "reward"], ascending=[True, False])
    best = own["reward"].cummax()
    return own[own["reward"] > best.shift(fill_value=-math.inf)]


def over_updates(runs, name):
    """Return the metric's mean over the seeds and its standard error, a row for each evaluation that all
    seeds have."""
    columns = {}
    for seed, history in runs.items():
        training = pandas.DataFrame(during_training(history)).set_index(["update", "event"])
        columns[seed] = training[name]
    seeds = pandas.DataFrame(columns).reindex(training.index).dropna()
    means = pandas.DataFrame(dict(mean=seeds.mean(axis=1)))
    means["error"] = seeds.sem(axis=1).fillna(0.0)
    return means.reset_index()


def draw_over_time(axes, runs_of, styles, counting):
    """Draw drift over the updates, up to twice the range that counts. A curve that ends beyond says where."""
    low, high = counting
    limit = low + 2 * (high - low)
    ends = {}
    least = low
    for label, runs in runs_of.items():
        drift = over_updates(runs, "drift")
        look = styles[label] | dict(linewidth=1.5, markersize=4)
        axes.plot(drift["update"], drift["mean"], **look)
        axes.fill_between(
            drift["update"],
            drift["mean"] - drift["error"],
            drift["mean"] + drift["error"],
            color=look["color"],
            alpha=0.15,
            linewidth=0,
        )
        ends[label] = drift["mean"].iloc[-1]
        least = min(least, drift["mean"].min())
    axes.set_ylim(least - 0.1 * (high - low), limit)
    name_curves(axes, ends, styles)


def name_curves(axes, ends, styles):
    """Write the names of curves beside the panel, where each of them ends: {name: its last value}."""
    bottom, limit = axes.get_ylim()
    names = sorted(ends, key=ends.get)
    heights = [(ends[name] - bottom) / (limit - bottom) for name in names]
    for name, height in zip(names, spread(heights, 0.17), strict=True):
        words = name.replace(":", "\n", 1)
        if ends[name] > limit:
            words += f"\nends at {short(ends[name])}"
        axes.text(
            1.02,
            height,
            words,
            color=styles[name]["color"],
            fontsize=10,
            va="center",
            transform=axes.transAxes,
        )


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
    summary = record["summary"]
    figure, panels = new_figure(8.5, 4.4, columns=2)
    styles = record_styles(record)
    found = {}
    for method, own in methods_along(summary["ends"], "kl_coef").items():
        found[method] = with_zero(own, method, summary)
    coefs = pandas.concat(found.values())["kl_coef"]
    zero = coefs[coefs > 0].min() / 3  # where 0 stands
    for axes, name in zip(panels, ("reward", "drift"), strict=True):
        for method, own in found.items():
            means = means_of(own).sort_values("kl_coef")
            places = means["kl_coef"].replace(0.0, zero)
            look = styles[method] | dict(markersize=5, linewidth=1.2)
            axes.errorbar(places, means[name], means[f"{name}_error"], **look, label=method)
        axes.set(xscale="log", xlabel="KL coefficient", ylabel=name)
        name_coefs(axes, coefs, zero)
    low = summary["start"]["drift"]
    drift = panels[1]
    drift.axhline(low, color="0.4", linewidth=1, zorder=0)
    drift.annotate(
        "start",
        xy=(1.5 * coefs.max(), low),
        xytext=(4, -3),
        textcoords="offset points",
        color="0.4",
    )
    if drift.get_ylim()[1] > 5 * low:
        drift.set_yscale("log", nonpositive="clip")
    drift.set_ylabel(drift_axis(record))
    handles, labels = drift.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    return figure


def name_coefs(axes, coefs, zero):
    """Set the ticks and limits of a logarithmic axis of KL coefficients, on which 0 stands at `zero`."""
    from matplotlib.ticker import NullFormatter

    axes.xaxis.set_minor_formatter(NullFormatter())
    if (coefs == 0).any():
        others = [tick for tick in axes.get_xticks()[1:-1] if tick > 2 * zero]
        axes.set_xticks([zero, *others], ["0", *map("{:g}".format, others)])
    axes.set_xlim(zero / 1.5, 1.5 * coefs.max())


def with_zero(own, method, summary):
    """Return a method's rows and, where it has a penalty, those of the same method without one, if that has
    been run once, with the same other knobs."""
    ends = summary["ends"]
    plain = method.replace(" and a penalty", "")
    alone = ends[ends["method"] == plain]
    others = [name for name in KNOBS if name in own and name != "kl_coef"]
    same = all(set(alone[name].dropna()) == set(own[name].dropna()) for name in others)
    if plain != method and same and alone.index.unique("setting").size == 1:
        return pandas.concat([alone, own])
    return own


def grid_of(own, summary, row, column):
    """Return two tables of a method's means, drift and the share of the best gain in reward, with a row for
    each value of one knob and a column for each of another."""
    means = means_of(own)
    best = best_gain(summary)
    means["kept"] = (means["reward"] - summary["floor"]) / best if best > 0 else 0.0
    grid = means.pivot(index=row, columns=column)
    return grid["drift"], grid["kept"]


def best_gain(summary):
    """Return the best gain in reward of all settings that end with a drift that counts, NaN if none does."""
    means = means_of(summary["ends"])
    counts = means["drift"] <= summary["range"][1]
    return means["reward"][counts].max() - summary["floor"]


def plot_basin(record):
    """Draw a map per method, learning rate by KL coefficient, with each cell's drift and its share of the
    best gain in reward. Cells with nine tenths of that gain and a drift that counts end well."""
    from matplotlib.colors import ListedColormap

    summary = record["summary"]
    high = summary["range"][1]
    found = methods_along(summary["ends"], "kl_coef", "learning_rate")
    figure, panels = new_figure(4.2 * len(found), 4, columns=len(found))
    colors = ListedColormap(["#FFFFFF", "#A9C3E0", ORANGE])
    for axes, method in zip(panels, found, strict=True):
        drift, share = grid_of(found[method], summary, "learning_rate", "kl_coef")
        failure = (share < 0.9).astype(int)
        failure = failure.mask(drift > high, 2)
        failure = failure.mask(drift.isna())
        look = dict(origin="lower", aspect="auto")
        axes.imshow(failure, cmap=colors, vmin=-0.5, vmax=2.5, **look)
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
    high = summary["range"][1]
    found = methods_along(summary["ends"], "reset_every", "share")
    figure, panels = new_figure(5.5 * len(found), 4.4, columns=len(found))
    for axes, method in zip(panels, found, strict=True):
        drift, share = grid_of(found[method], summary, "reset_every", "share")
        look = dict(origin="upper", aspect="auto")
        image = axes.imshow(share, cmap="Blues", alpha=0.6, vmin=0, vmax=1, **look)
        axes.imshow(drift.where(drift > high), cmap=ListedColormap([ORANGE]), **look)
        write_cells(axes, drift, share)
        words = {config_of(record)["updates"]: "\nonce, at the end"}
        rows = [f"{every:g}{words.get(every, '')}" for every in drift.index]
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel("how far back: the start's share of a reset")
        axes.set_ylabel("how often: updates between resets")
        axes.set_title(method, fontsize=10)
    figure.colorbar(image, ax=panels, label="gain, of the best one whose drift counts")
    words = "in each cell: drift; gain, of the best one whose drift counts\norange: drift too large to count"
    figure.supxlabel(words, fontsize=9)
    return figure


def short(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def write_cells(axes, drift, share):
    """Write drift and share of the gain into each cell, and the knobs at the edges."""
    look = dict(ha="center", va="center", fontsize=8)
    rows, columns = drift.shape
    for row, column in itertools.product(range(rows), range(columns)):
        words = "not run"
        if not math.isnan(drift.iloc[row, column]):
            words = f"{short(drift.iloc[row, column])}\n{share.iloc[row, column]:.0%}"
        axes.text(column, row, words, **look)
    axes.set_xticks(range(columns), drift.columns.map("{:g}".format))
    axes.set_yticks(range(rows), drift.index.map("{:g}".format))
