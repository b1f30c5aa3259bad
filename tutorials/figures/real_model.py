"""Draws real_model.png and grpo.png, and prints the tables of tutorials/results/real_model.md from records.

    python tutorials/figures/real_model.py                     # draw and print
    python tutorials/figures/real_model.py --samples RUNS --settings ppo,ppo-kl:kl_coef=0.1
                                                               # first copy the texts of these from RUNS

They are in tutorials/results/real_model. compare.py has made tradeoff.json in RUNS, its --output_dir. grpo.py
has made the two runs of GRPO, whose evaluations.json, with commit and versions, are beside it."""

import argparse
import json
import re
import sys
from pathlib import Path

import pandas
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from elastic_reset import write_text  # noqa: E402
from tutorials import pictures, tradeoff  # noqa: E402
from tutorials.figures.evidence import rounded, with_error  # noqa: E402

RECORD = HERE.parent / "results" / "real_model"
COLUMNS = {  # of the table
    "reward": "reward",
    "kl": "KL to the start",
    "largest_kl": "largest KL",
    "human_perplexity": "perplexity of human reviews",
    "distinct_2": "different pairs of words",
}
GRPO = {"without resets": "grpo_without.json", "with resets": "grpo.json"}  # {words: file}
GRPO_COLUMNS = {"reward": "reward", "kl": "KL", "human_perplexity": "perplexity of human reviews"}
KINDS = {  # {words: how a setting of it is drawn}
    "plain PPO": dict(color="#D55E00", marker="s"),
    "plain PPO, mixed with the start": dict(color="#D55E00", marker="s", fillstyle="none", linestyle=":"),
    "KL penalty": dict(color="#009E73", marker="^"),
    "KL penalty, mixed with the start": dict(color="#009E73", marker="^", linestyle="", fillstyle="none"),
    "resets": dict(color="#0072B2", marker="o", linestyle=""),
    "resets with a KL penalty": dict(color="#0072B2", marker="o", linestyle="", fillstyle="none"),
}
SHOWN = 3  # prompts whose texts the page has, the first ones of those to evaluate on


def kind_of(setting):
    """The words for a setting's kind, one of KINDS if it is drawn."""
    label, _, afterwards = setting.partition(", ")
    method, own = tradeoff.split_label(label)
    name = {"ppo": "plain PPO", "ppo-kl": "KL penalty", "elastic-reset": "resets"}[method]
    if method == "elastic-reset" and own.get("kl_coef") != "0":
        name = "resets with a KL penalty"
    if afterwards.startswith("eta"):
        return f"{name}, mixed with the start"
    return f"{name}, {afterwards}" if afterwards else name


def ends_of(record):
    """The table of what each setting delivers, a row for each setting and seed, with the largest KL of any
    evaluation. Plain PPO that is stopped early is left out."""
    largest = {}
    for setting, runs in tradeoff.runs_by_setting(record).items():
        for seed, history in runs.items():
            kls = [line["kl"] for line in tradeoff.during_training(history)]
            largest[setting, int(seed)] = max(kls)
    ends = record["summary"]["ends"]
    ends = ends[[" at " not in setting for setting in ends.index.get_level_values("setting")]].copy()
    keys = [(setting.partition(", ")[0], seed) for setting, seed in ends.index]
    ends["largest_kl"] = [largest[key] for key in keys]
    return ends


def starts_of(record):
    """The table of the evaluations before training, a row for each seed."""
    runs = max(record["runs"].values(), key=len)
    starts = pandas.DataFrame([history[0] for history in runs.values()])
    return starts.assign(largest_kl=0.0)


def table(record):
    """A row for the start and for each setting, means with standard errors where there are several seeds."""
    starts = starts_of(record)
    rows = [["start", *(with_error(starts[name]) for name in COLUMNS)]]
    for setting, own in ends_of(record).groupby("setting", sort=False):
        rows.append([setting, *(with_error(own[name]) for name in COLUMNS)])
    return "\n".join(tradeoff.table(["setting", *COLUMNS.values()], rows))


def read_json(name):
    return json.loads((RECORD / name).read_text(encoding="utf-8"))


def titled(title, line):
    """The title of an evaluation, with its event if it has one."""
    return f"{title}, {line['event']}" if line["event"] else title


def grpo_table():
    """A row for each evaluation of GRPO, without resets and with them. Just after a reset there is one only
    with resets, and mixtures only without."""
    names = ["step"]
    rows = {}  # {(step, event): cells}
    for words, file in GRPO.items():
        width = len(names)  # of the columns so far
        names += [f"{name}, {words}" for name in GRPO_COLUMNS.values()]
        for line in read_json(file)["lines"]:
            row = rows.setdefault((line["step"], line["event"]), [titled(line["step"], line)])
            row += [""] * (width - len(row))  # of the run that was not evaluated here
            row += [rounded(line[name], line[name]) for name in GRPO_COLUMNS]
    for row in rows.values():
        row += [""] * (len(names) - len(row))
    return "\n".join(tradeoff.table(names, [rows[key] for key in sorted(rows)]))


def grpo_samples():
    """A table of how the start and GRPO's ends continue the first prompt."""
    rows = []
    for words, file in GRPO.items():
        lines = read_json(file)["lines"]
        if not rows:  # both runs have the same start
            rows.append(["start", lines[0]["samples"][0]])
        for line in lines:
            if line["step"] == lines[-1]["step"]:
                rows.append([titled(f"GRPO {words}", line), line["samples"][0]])
    return continuations(read_json("samples.json")["prompt"][0], rows)


def picture(record):
    """Reward against KL to the start, on a scale of square roots: what each setting delivers and, as a line,
    the way of plain PPO."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    means = ends_of(record).groupby("setting", sort=False)[["reward", "kl"]].mean()
    start = starts_of(record)["reward"].mean()
    for words, look in KINDS.items():
        if words == "plain PPO":
            own = way_of(record, "ppo")
        else:
            own = means[[kind_of(setting) == words for setting in means.index]].sort_values("kl")
        axes.plot(own["kl"], own["reward"], **look, markersize=7, label=words)
    axes.plot(0, start, "k*", markersize=13)
    axes.annotate("start", (0, start), (10, -4), textcoords="offset points")
    axes.set_xscale("function", functions=(lambda kl: kl.clip(0) ** 0.5, lambda root: root**2))
    axes.set_xticks([0, 1, 5, 10, 20, 30, 40, 50])
    axes.set(xlabel="KL to the start, in nats per response", ylabel="reward")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def grpo_picture():
    """Reward and KL to the start over the steps of GRPO, without resets and with them."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for (words, file), kind in zip(GRPO.items(), ("plain PPO", "resets"), strict=True):
        training = tradeoff.during_training(read_json(file)["lines"])
        steps = [line["step"] for line in training]
        look = KINDS[kind] | dict(linestyle="-", label=f"GRPO {words}")
        for axes, name in zip(panels, ("reward", "kl"), strict=True):
            axes.plot(steps, [line[name] for line in training], **look)
    panels[0].set(xlabel="step", ylabel="reward")
    panels[1].set(xlabel="step", ylabel="KL to the start, in nats per response")
    panels[1].legend(frameon=False)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def way_of(record, setting):
    """Reward and KL of a setting's evaluations, means over the seeds."""
    runs = tradeoff.runs_by_setting(record)[setting]
    return pandas.DataFrame({name: pictures.over_updates(runs, name)["mean"] for name in ("kl", "reward")})


def copy_samples(runs, settings):
    """Write samples.json: the texts of some settings for the first prompts, with the smallest seed."""
    texts = {}
    for setting in settings:
        folder = runs / setting.replace(":", ",")
        files = sorted(folder.glob("seed*/samples.md"), key=seed_of)
        if not files:
            raise ValueError(f"{folder} has no finished run")
        prompts, before, after = [], [], []
        for example in files[0].read_text(encoding="utf-8").split("## ")[1 : SHOWN + 1]:
            prompts += re.findall(r"^- prompt: (.*)$", example, re.MULTILINE)
            start, *end = re.findall(r"^- continuation(?:, \*\*.*?\*\*)?: (.*)$", example, re.MULTILINE)
            before.append(start)
            after.append(end[0] if end else start)  # a text that has not changed stands there once
        texts |= {"prompt": prompts, "start": before, setting: after}
    write_text(RECORD / "samples.json", json.dumps(texts, indent=1, ensure_ascii=False) + "\n")


def seed_of(file):
    return int(file.parent.name.removeprefix("seed"))


def sample_tables():
    """For each prompt a table of how the start and the settings continue it."""
    texts = read_json("samples.json")
    prompts = texts.pop("prompt")
    tables = []
    for i, prompt in enumerate(prompts):
        tables.append(continuations(prompt, [[name, own[i]] for name, own in texts.items()]))
    return tables


def continuations(prompt, rows):
    """A table of how a prompt goes on, given pairs of a name and a text."""
    cells = [[name, in_a_cell(text)] for name, text in rows]
    return "\n".join(tradeoff.table([f"*{in_a_cell(prompt)}* ...", "continuation"], cells))


def in_a_cell(text):
    """A text as it can stand in a table of Markdown. Lines that end are marked by a slash."""
    return re.sub(r"(<br>|\n)+", " / ", text.strip()).replace("|", "\\|").replace("<", "&lt;")


def page_tables():
    """{name: table} of tutorials/results/real_model.md"""
    tables = {"settings": table(tradeoff.read_record(RECORD))}
    tables |= {"grpo": grpo_table(), "grpo samples": grpo_samples()}
    return tables | {f"sample {i}": text for i, text in enumerate(sample_tables())}


if __name__ == "__main__":
    flags = argparse.ArgumentParser("real_model.py", description=__doc__.partition("\n")[0])
    flags.add_argument("--samples", metavar="RUNS", type=Path, help="copy texts of the runs in RUNS first")
    flags.add_argument("--settings", help="whose texts, a comma between them")
    given = flags.parse_args()
    if (given.samples is None) != (given.settings is None):
        flags.error("expected --samples and --settings together")
    if given.samples:
        copy_samples(given.samples, given.settings.split(","))
    picture(tradeoff.read_record(RECORD)).savefig(HERE / "real_model.png", dpi=200)
    grpo_picture().savefig(HERE / "grpo.png", dpi=200)
    for name, text in page_tables().items():
        print(f"\n{name}\n{text}")
