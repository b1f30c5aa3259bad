"""What a comparison says: the numbers and tables of a record that compare.py has made.

    from tutorials import tradeoff

    record = tradeoff.read_record("tutorials/results/imdb")
    record["summary"]["ends"].loc["ppo"]         # a pandas table: what a setting delivers, a row per seed
    record["summary"]["methods"]                 # a row per method, with the setting that was chosen

A record, tradeoff.json, has every evaluation of every run, {label: {seed: [evaluation, ...]}}, and the
settings of each label. A label is a method with settings of its own, as ppo-kl:kl_coef=0.1. All settings
that differ in KNOBS only are one method."""

import json
import math
import re
from pathlib import Path

import pandas
from scipy import stats

# =============================================== The numbers ================================================

# The settings along which a method is one. The share is how far back a reset goes: ema_decay ** reset_every.
KNOBS = ["kl_coef", "learning_rate", "reset_every", "share"]
# Up to which drift a model counts, as a multiple of the start's. In qa pass@1 breaks down beyond.
WORST = dict(qa=1.15)  # in other tasks 1.5
# What a record says of its making.
ABOUT = ["command", "commit", "torch"]
# What drift is measured in.
UNITS = dict(
    translation="nats per token of human English",
    imdb="perplexity under another language model",
    qa="perplexity of human answers",
)


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

    start: the first evaluation of the first run, which stands for that of all. range: its drift, and the
        largest one that counts.
    floor, floor_of: the reward from which gains are counted, and whose it is: the start's or, in the game,
        that of the sender that stays fixed, because what the receiver gains without the policy is not a
        method's.
    ends: a row for each setting and seed, see delivered(), with its area, see area_under_front().
    methods: a row for each method: settings (how many), chosen (as given, or that of the largest mean area),
        worst (that of the smallest).
    together: the area of all settings of a method taken together, the better of them at each drift, a row
        for each method and seed."""
    histories = record["runs"]
    first_runs = next(iter(histories.values()))
    start = next(iter(first_runs.values()))[0]
    low = start["drift"]
    if low <= 0:
        raise ValueError(f"the start's drift is {low}; drift is measured in multiples of it")
    high = WORST.get(config_of(record).get("task"), 1.5) * low
    ends = pandas.DataFrame(delivered(record))
    ends = ends.drop_duplicates(["setting", "seed"]).set_index(["setting", "seed"])
    check_numbers(ends)
    floor, floor_of = start["reward"], "the start's"
    fixed = ends[ends["method"].str.fullmatch("fixed-sender(:.*)?")]
    if len(fixed):
        floor, floor_of = fixed["reward"].mean(), "the fixed sender's"

    def area(rows):
        return area_under_front(rows["drift"], rows["reward"], floor, low, high)

    numbers = ends[["drift", "reward"]]
    ends["area"] = numbers.groupby(level=["setting", "seed"], sort=False).apply(area)
    together = numbers.groupby([ends["method"], "seed"], sort=False).apply(area)
    return dict(
        start=start,
        floor=floor,
        floor_of=floor_of,
        range=[low, high],
        ends=ends,
        methods=methods_of(ends, record.get("chosen", {})),
        together=together,
    )


def check_numbers(ends):
    """Raise ValueError if a reward or a drift is no number."""
    for name in ("reward", "drift"):
        missing = ends.index[ends[name].isna()]
        if len(missing):
            setting, seed = missing[0]
            raise ValueError(f"{setting}, seed {seed}: {name} is no number")


def methods_of(ends, chosen):
    """Tabulate the methods: how many settings each has, the chosen one, whether that was chosen by another
    record, and the worst one. Where the setting chosen elsewhere was not run, these runs choose."""
    areas = ends.groupby("setting", sort=False)["area"].mean()
    rows = {}
    for method, own in ends.groupby("method", sort=False):
        own = areas[own.index.unique("setting")]
        elsewhere = chosen.get(method) in own
        choice = chosen[method] if elsewhere else own.idxmax()
        rows[method] = dict(settings=len(own), chosen=choice, worst=own.idxmin())
        rows[method]["chosen_elsewhere"] = elsewhere
    return pandas.DataFrame.from_dict(rows, orient="index")


def delivered(record):
    """List what every setting delivers, a row for each seed: its last evaluation, the knobs, the largest
    drift of any evaluation (largest), and that just before the last reset (before)."""
    rows = []
    for label, runs in record["runs"].items():
        config = record["configs"][label]
        setting = setting_of(label)
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
    """Return {setting: {seed: its evaluations}}."""
    return {setting_of(label): runs for label, runs in record["runs"].items()}


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


def setting_of(label):
    """Return a label without what is evaluated after training. Labels with the same setting share a run."""
    return without(("average", "mixtures"), label)


def config_of(record):
    """Return the settings of a record's first label. All have the same task."""
    return next(iter(record["configs"].values()))


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
    (Student's t, paired), and a verdict in words. Fewer than three seeds give no interval and no verdict."""
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
        missing = [name for name in ABOUT if name not in record]
        if missing:
            raise KeyError(missing[0])
        return record | dict(summary=tradeoff(record))
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"{path} is no record of a comparison ({error!r})") from error


def summary_text(record):
    """Write summary.md: a row per method, a row per setting."""
    summary = record["summary"]
    ends = summary["ends"]
    low, high = summary["range"]
    chosen_by = "runs with other seeds" if record.get("chosen") else "these runs themselves"
    seeds = f"{'at most ' if is_uneven(ends) else ''}{ends.index.unique('seed').size} seeds"
    floor = f"{summary['floor']:.4g}, {summary['floor_of']}"
    about = (
        f"Reward and drift are those of what a setting delivers: mean +- standard error over {seeds}. "
        f"Its area is its gain in reward over "
        f"{floor}, at a drift of at most d, averaged over d from the start's "
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


def is_uneven(ends):
    """Say whether some settings have more seeds than others."""
    return ends.groupby("setting").size().nunique() > 1


def settings_table(summary):
    """Return the lines of a table with a row per setting, and one for the start. Where some have more seeds
    than others, their number stands behind the setting's name."""
    start = summary["start"]
    ends = summary["ends"]
    others = [name for name in start if name not in ("update", "event", "reward", "drift", "seconds")]
    rows = [["start", f"{start['reward']:.4g}", f"{start['drift']:.4g}", "", "", ""]]
    rows[0] += [f"{start[name]:.4g}" for name in others]
    names = ["reward", "drift", "largest", "before", "area", *others]
    with_seeds = is_uneven(ends)
    for setting, own in ends.groupby("setting", sort=False):
        title = f"{setting} (seeds: {len(own)})" if with_seeds else setting
        rows.append([title, *(cell(own[name]) for name in names)])
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
