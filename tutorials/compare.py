"""Compares methods by the drift that they pay for their reward, over their settings and several seeds.

    python tutorials/compare.py --task imdb --methods elastic-reset,ppo,ppo-kl:kl_coef=0.1 --seeds 5 --jobs 2
    python tutorials/compare.py --task imdb --methods "ppo-kl:kl_coef=0.01|0.02|0.03|0.05" --seeds 5
    python tutorials/compare.py --read runs/imdb/compare    # tables and pictures of a record again

Every run is a process of elastic_reset.py with a folder of its own, OUTPUT_DIR/METHOD/seedN; what it prints
is in seedN.log beside it. Finished runs stay as they are and interrupted ones go on, so the same command can
be given again, also with more seeds or methods. OUTPUT_DIR (default runs/TASK/compare) gets

    tradeoff.json   every evaluation of every run
    summary.md      the tables: mean +- standard error over the seeds
    tradeoff.png    left, reward against drift; right, drift over the updates
    choice.png      reward and drift against the KL coefficient, if a method has several
    basin.png       which learning rates and KL coefficients end well, if a method has several of both

A method may have settings of its own, behind colons; a setting with several values, divided by |, stands for
as many methods. What a file of --config says, a method overrides; what other flags say, all methods share.
What differs in kl_coef and learning_rate alone is one curve, and `ppo` is the curve of `ppo-kl` at the
coefficient 0. Plain `ppo` also gives the curve of a policy that is stopped early, at each of its evaluations.
Three settings are known here only. The first one sets ema_decay, the others take evaluations without
further training:

    elastic-reset:share=0.35   how far back a reset goes: the share of theta_0 in the weights that it gives,
                               ema_decay to the power of reset_every
    ppo-kl:average=1   at the end, the moving average of the policy is evaluated too (Polyak averaging)
    ppo:mixtures=9     so are nine mixtures theta_0 + eta (theta - theta_0) of start and end, the last stage
                       of WARP (arXiv 2406.16768)

A method of a program of its own is named by file and method: tutorials/baselines.py:S2P:s2p_coef=1. All its
settings together are one method. With --tuned_on FOLDER each method's setting is chosen by the record in
FOLDER, made with other seeds."""

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import elastic_reset
from elastic_reset import configure, parse_flags, write_text, written_whole

GRACE = 30  # seconds that a run has to end its update and save a checkpoint when the comparison is stopped


# =========================================== Running the methods ============================================


def compare(labels, seeds, jobs, shared, command=(), chosen=None):
    """Trains every method on every seed, unless that is done, and writes the files. Returns the summary.

    `labels`: methods as in --methods. `shared`: the flags that all of them share, a list of words. `chosen`:
    {method: the setting that was chosen for it before}. Raises ValueError for settings that cannot be used,
    ChildProcessError when runs failed, KeyboardInterrupt when asked to stop."""
    given = parse_flags(shared)
    task, first = given.get("task", "missing"), given.get("seed", 0)
    if task not in elastic_reset.TASKS:
        raise ValueError(f"--task is {task}; expected one of {', '.join(elastic_reset.TASKS)}")
    if "method" in given:
        raise ValueError("--method or --config names a single method; expected --methods alone to name them")
    if not all(labels) or len(set(labels)) < len(labels):
        raise ValueError(f"--methods {','.join(labels)}: expected different ones, such as ppo,elastic-reset")
    folder = Path(given.get("output_dir") or f"runs/{task}/compare")
    pairs = itertools.product(labels, range(first, first + seeds))
    runs = {(label, seed): settings_of(label, seed, shared, folder) for label, seed in pairs}
    run_all([config for config, _ in runs.values()], jobs)
    histories, configs = {label: {} for label in labels}, {}
    for (label, seed), (config, afterwards) in runs.items():
        lines = read_lines(Path(config.output_dir) / "metrics.jsonl")
        histories[label][seed] = lines + evaluate_afterwards(config, afterwards)
        configs.setdefault(label, asdict(config))
    record = dict(command=["tutorials/compare.py", *command], commit=commit(), torch=torch.__version__)
    record |= dict(chosen=chosen or {}, configs=configs, runs=rounded(histories))
    write_text(folder / "tradeoff.json", json.dumps(record))
    return write_results(record | dict(summary=tradeoff(record)), folder)


def expanded(methods):
    """--methods as a list of labels; a setting with several values gives one for each."""
    labels = []
    for label in methods.split(","):
        method, *own = split_label(label.strip())
        choices = [[(name, value) for value in values.split("|")] for name, values in own]
        labels += [join_label(method, settings) for settings in itertools.product(*choices)]
    return labels


def split_label(label):
    """ "ppo-kl:kl_coef=0.1" -> ["ppo-kl", ("kl_coef", "0.1")]"""
    method, *own = re.split(r":(?=\w+=)", label)
    return [method, *(tuple(setting.split("=", 1)) for setting in own)]


def join_label(method, own, separator=":"):
    """The inverse of split_label()."""
    return separator.join([method, *(f"{name}={value}" for name, value in own)])


def settings_of(label, seed, shared, folder):
    """The Config of one run of a method, and {event: eta} to evaluate after it, None for the average."""
    method, *own = split_label(label)
    own = dict(own)
    if taken := {"task", "seed", "method", "output_dir", "resume", "config"} & own.keys():
        raise ValueError(f"--methods {label}: {min(taken)} is the comparison's, not a method's own")
    mixtures, average = own.pop("mixtures", "0"), own.pop("average", "0")
    if not re.fullmatch(r"\d\d?", mixtures) or average not in ("0", "1"):
        raise ValueError(f"--methods {label}: mixtures is {mixtures}; expected 0 to 99, and average 0 or 1")
    etas = [round(k / (int(mixtures) + 1), 2) for k in range(1, int(mixtures) + 1)]
    afterwards = {f"eta {eta:.2f}": eta for eta in etas} | ({"average": None} if average == "1" else {})
    file, _, baseline = method.rpartition(":")
    name = quote(join_label(baseline, own.items(), ","), safe=",=")  # a value may be a path
    share = own.pop("share", "")
    if share:
        own["ema_decay"] = decay_of(share, label, own, shared)
    flags = [*shared, *(f"--{name}={value}" for name, value in own.items())]
    place = dict(seed=seed, resume=True, output_dir=str(folder / name / f"seed{seed}"))
    if not file:
        return configure(**parse_flags([*flags, f"--method={method}"]) | place), afterwards
    program = program_at(file)
    _, given = program.parse([baseline, *flags])
    return program.configure_baseline(baseline, **given | place), afterwards


def decay_of(share, label, own, shared):
    """The ema_decay at which theta_0 has this share, a word of the label, in the weights after a reset."""
    if not re.fullmatch(r"0?[.]\d+", share) or float(share) == 0:
        raise ValueError(f"--methods {label}: share is {share}; expected a number between 0 and 1, as 0.35")
    given = parse_flags([*shared, *(f"--{name}={value}" for name, value in own.items())])
    return round(float(share) ** (1 / configure(**given).reset_every), 6)


def program_at(file):
    """The program of a method that is not one of elastic_reset.py's, as a module."""
    path = Path(file).resolve()
    if not path.is_file():
        raise ValueError(f"--methods: there is no {file}")
    sys.path.append(str(path.parent))
    return importlib.import_module(path.stem)


def run_all(configs, jobs):
    """Trains what is not finished, `jobs` runs at a time. A run that fails does not stop the others, and none
    is left behind when this program has to stop."""
    from tqdm import tqdm

    waiting = {config.output_dir: config for config in configs if not finished(config)}
    if not waiting:
        return
    by_settings = {Path(folder).parent.name.partition(",")[2]: waiting[folder] for folder in waiting}
    for config in by_settings.values():  # pretrains here and once what is not in the cache
        elastic_reset.TASKS[config.task](config)
    running, failed, total = {}, [], len(waiting)
    with stop_signals() as stops, tqdm(total=total, desc="runs", dynamic_ncols=True) as bar:
        try:
            while (waiting or running) and not stops:
                while waiting and len(running) < jobs:
                    folder = next(iter(waiting))
                    running[folder] = start(waiting.pop(folder), jobs)
                time.sleep(0.1)
                for folder in [folder for folder, run in running.items() if run.poll() is not None]:
                    if code := running.pop(folder).returncode:
                        failed.append(f"{folder}: {last_words(folder, code)} (more in {folder}.log)")
                    bar.update()
        finally:
            end(running.values(), stops)
    if stops:
        raise KeyboardInterrupt(stops[0])
    if failed:
        raise ChildProcessError(f"{len(failed)} of {total} runs failed, the first in {failed[0]}")


def finished(config):
    """Whether the run's folder holds this very run, complete. A run writes samples.md last."""
    folder = Path(config.output_dir)
    try:
        before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        last = read_lines(folder / "metrics.jsonl")[-1]
    except (OSError, ValueError, IndexError):
        return False  # if something is wrong there, the run itself will say what
    now = json.loads(json.dumps(asdict(config)))
    may_differ = {"output_dir", "resume", "save_every", "report_to"}
    same = {name for name in now if before.get(name) != now[name]} <= may_differ
    return same and last["update"] == config.updates and (folder / "samples.md").exists()


def to_argv(flags):
    """{"resume": True, "sender_data": ["a", "b"]} -> --resume true --sender_data a b, a list of words"""
    argv = []
    for name, value in flags.items():
        words = [str(word) for word in (value if isinstance(value, (list, tuple)) else [value])]
        words = [words[0].lower()] if isinstance(value, bool) else words
        argv += [f"--{name}", *words] if words else []
    return argv


def start(config, jobs):
    """Begins a run, or goes on with it, in a process of its own, which Ctrl-C in a terminal does not
    reach."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    Path(config.output_dir).parent.mkdir(parents=True, exist_ok=True)
    program = sys.modules[type(config).__module__].__file__  # a baseline's settings have a class of their own
    name = [] if type(config) is elastic_reset.Config else [type(config).__name__]
    words = [sys.executable, program, *name, *to_argv(asdict(config))]
    with open(f"{config.output_dir}.log", "w", encoding="utf-8") as log:
        env = {"OMP_NUM_THREADS": str(threads)} | os.environ
        return subprocess.Popen(words, stdout=log, stderr=log, env=env, start_new_session=True)


@contextlib.contextmanager
def stop_signals():
    """Yields a list. Signals that ask this program to stop add their numbers to it and do nothing else. A
    signal that is ignored already, as SIGHUP under nohup, stays ignored."""
    stops, numbers = [], (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    heeded = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    for number in heeded:
        signal.signal(number, lambda number, frame: stops.append(number))
    try:
        yield stops
    finally:
        for number, handler in heeded.items():
            signal.signal(number, handler)


def end(running, stops):
    """Asks the runs to save a checkpoint and stop, and kills those that are still there after GRACE seconds
    or at the next signal."""
    alive, deadline, signals = list(running), time.monotonic() + GRACE, len(stops)
    for run in alive:
        run.send_signal(signal.SIGTERM)  # SIGINT is ignored in what a script starts behind &
    while alive and time.monotonic() < deadline and len(stops) == signals:
        time.sleep(0.1)
        alive = [run for run in alive if run.poll() is None]
    for run in alive:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def last_words(folder, code):
    lines = Path(f"{folder}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else f"exit code {code}, no message"


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def commit():
    """The commit of the repository this file lies in, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ========================================= Evaluated after a run ==========================================


def evaluate_afterwards(config, events):
    """The evaluations of what is made of a run's weights, lines of a history with the events "average" or
    "eta 0.30". The run's folder keeps them, and only those not there yet are computed."""
    path = Path(config.output_dir) / "afterwards.jsonl"
    lines = [line for line in read_lines(path) if line["update"] == config.updates] if path.exists() else []
    known = {line["event"]: line for line in lines}
    if missing := events.keys() - known.keys():
        evaluate = evaluation_of(config)
        for event in sorted(missing):
            known[event] = dict(update=config.updates, event=event) | evaluate(events[event])
        write_text(path, "".join(json.dumps(line) + "\n" for line in known.values()))
    return [known[event] for event in events]


def evaluation_of(config):
    """A function that evaluates a finished run's policy at theta_0 + eta (theta - theta_0), given eta, or at
    its moving average, given None. What else the run has trained, in translation the receiver, is as at its
    end."""
    task = elastic_reset.TASKS[config.task](config)
    model, _ = elastic_reset.prepare_policy(task.policy, config, elastic_reset.processes())
    elastic = elastic_reset.ElasticReset(model.policy)  # its init is theta_0
    path = Path(config.output_dir) / "checkpoint" / "state.pt"
    saved = torch.load(path, map_location="cpu", weights_only=True)["parts"]
    for name, part in elastic_reset.saved_parts(task, model=model, elastic=elastic).items():
        elastic_reset.load_part(part, saved[name])
    trained = [p.detach().to(i.dtype, copy=True) for p, i in zip(elastic.params, elastic.init, strict=True)]

    @torch.no_grad()
    def evaluation(eta):
        for p, start, end, average in zip(elastic.params, elastic.init, trained, elastic.ema, strict=True):
            p.copy_(average if eta is None else torch.lerp(start, end, eta))
        metrics = elastic_reset.evaluate(task, model, elastic, config)
        return {name: value for name, value in metrics.items() if name != "samples"}

    return evaluation


# =============================================== The numbers ================================================

KNOBS = ("kl_coef", "learning_rate")  # settings along which a method is a curve


def rounded(histories):
    """Six digits of every number; times and losses of single minibatches are left out."""
    names = ("seconds", "loss", "policy_loss", "value_loss", "policy_kl", "clipfrac", "gradient")

    def short(line):
        kept = {name: value for name, value in line.items() if name not in names}
        return {n: float(f"{v:.6g}") if isinstance(v, float) else v for n, v in kept.items()}

    return {
        label: {str(seed): [short(line) for line in history] for seed, history in runs.items()}
        for label, runs in histories.items()
    }


def tradeoff(record):
    """{"start", "floor", "range", "settings": {label: numbers}, "methods": {method: numbers}}.

    A setting has the evaluation of each seed that it delivers, `ends`, and per seed reward, drift and area:
    the gain in reward over `floor` at a drift of at most d, averaged over d in the range, from the start's
    drift to the WORST that counts. The floor is the start's reward or, in the game, that of the sender that
    stays fixed, because what the receiver gains alone is not a method's. A method is made of all settings
    that differ in KNOBS alone. It has `labels`, their areas taken together (`best`, the better of them at
    each drift, per seed), the label `chosen`, as given or else that of the largest mean area, and the
    `worst`."""
    histories, chosen = record["runs"], record.get("chosen", {})
    start, settings = next(iter(next(iter(histories.values())).values()))[0], {}
    low, task = start["drift"], next(iter(record["configs"].values())).get("task")
    high = WORST.get(task, 1.5) * low
    fixed = [history[-1]["reward"] for history in histories.get("fixed-sender", {}).values()]
    floor = mean_and_error(fixed or [start["reward"]])[0]
    for label, method, knobs, ends in delivered(histories, record["configs"]):
        areas = [area_under_front([end], floor, low, high) for end in ends.values()]
        numbers = {name: [end[name] for end in ends.values()] for name in ("reward", "drift")}
        settings[label] = dict(label=label, method=method, knobs=knobs, ends=ends, area=areas) | numbers
    methods = {}
    for method in dict.fromkeys(setting["method"] for setting in settings.values()):
        own = {label: s for label, s in settings.items() if s["method"] == method}
        ranked = sorted(own, key=lambda label: mean_and_error(own[label]["area"])[0])
        together = zip(*(setting["ends"].values() for setting in own.values()), strict=True)
        best = [area_under_front(ends, floor, low, high) for ends in together]
        choice = chosen.get(method, ranked[-1])
        if choice not in own:
            raise ValueError(f"{choice}, chosen for {method}, is not among the settings that were run")
        methods[method] = dict(labels=list(own), best=best, chosen=choice, worst=ranked[0])
    return dict(start=start, floor=floor, range=[low, high], settings=settings, methods=methods)


def delivered(histories, configs):
    """What every method delivers: (label, method, {knob: value}, {seed: evaluation}) tuples."""
    for label, runs in histories.items():
        config, label = configs[label], without(("average", "mixtures"), label)
        own = [name for name, _ in split_label(label)[1:]] if is_baseline(label) else []
        method, knobs = method_of(label), {knob: config[knob] for knob in (*KNOBS, *own)}
        yield label, method, knobs, {seed: during_training(h)[-1] for seed, h in runs.items()}
        for event in [line["event"] for line in next(iter(runs.values())) if is_after(line)]:
            ends = {seed: next(e for e in h if e["event"] == event) for seed, h in runs.items()}
            name = "averaged at the end" if event == "average" else "mixed with the start"
            more = {} if event == "average" else dict(eta=float(event.split()[1]))
            yield f"{label}, {event}", f"{method}, {name}", knobs | more, ends
        if label == "ppo":
            for i, line in enumerate(during_training(next(iter(runs.values())))[1:-1], 1):
                ends = {seed: h[i] for seed, h in runs.items()}
                stopped = knobs | dict(update=line["update"])
                yield f"ppo at {line['update']}", "ppo, stopped early", stopped, ends


def method_of(label):
    """The method that a label is a setting of: its name without values of the knobs, which for a baseline are
    all its settings."""
    method, *own = split_label(without((*KNOBS, "average", "mixtures"), label))
    if is_baseline(label):
        return method.rpartition(":")[2]
    return join_label("ppo-kl" if method == "ppo" else method, own)


def is_baseline(label):
    """Whether a label names a method of a program of its own, by its file."""
    return ":" in split_label(label)[0]


def without(names, label):
    """A label without some of its settings."""
    method, *own = split_label(label)
    return join_label(method, [(name, value) for name, value in own if name not in names])


def is_after(line):
    return line["event"] == "average" or line["event"].startswith("eta")


def during_training(history):
    """The evaluations during training, without what was evaluated after it."""
    return [line for line in history if not is_after(line)]


def area_under_front(ends, floor, low, high):
    """The best reward among `ends` at a drift of at most d, less `floor` and at least 0, averaged over d from
    low to high."""
    area, best = 0.0, 0.0
    places = sorted((max(low, end["drift"]), end["reward"] - floor) for end in ends)
    for drift, gain in places:
        area += max(0.0, gain - best) * max(0.0, high - drift) / (high - low)
        best = max(best, gain)
    return area


def mean_and_error(values):
    """Mean and standard error of a list of numbers; a single number has the error 0."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def seed_means(runs, name):
    """Of each evaluation's metric the mean over the seeds, and its standard errors."""
    evaluations = zip(*(during_training(history) for history in runs.values()), strict=True)
    pairs = [mean_and_error([e[name] for e in seeds]) for seeds in evaluations]
    return [mean for mean, _ in pairs], [error for _, error in pairs]


# ======================================== The tables and the pictures =======================================


def read_record(folder):
    """The tradeoff.json in a folder. ValueError if it is none."""
    path = Path(folder) / "tradeoff.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record | dict(summary=tradeoff(record))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of a comparison ({error!r})") from error


def write_results(record, folder):
    """Writes summary.md and the pictures; returns the summary."""
    pictures = {"tradeoff.png": plot_tradeoff}
    if methods_along(record["summary"], "kl_coef"):
        pictures["choice.png"] = plot_choice
    if methods_along(record["summary"], "kl_coef", "learning_rate"):
        pictures["basin.png"] = plot_basin
    for name, plot in pictures.items():
        with written_whole(folder / name) as aside:
            plot(record, aside)
    write_text(folder / "summary.md", summary_text(record))
    return summary_text(record)


def methods_along(summary, *knobs):
    """The methods that have at least two values of each of the knobs, {method: its settings}."""
    found = {}
    for method, numbers in summary["methods"].items():
        own = [summary["settings"][label] for label in numbers["labels"]]
        if all(len({s["knobs"][knob] for s in own}) > 1 for knob in knobs):
            found[method] = own
    return found


def summary_text(record):
    """summary.md: a row per method, a row per setting; differences are paired by seed."""
    summary, methods = record["summary"], record["summary"]["methods"]
    start, (low, high), settings = summary["start"], summary["range"], summary["settings"]
    first, rows = next(iter(methods)), []
    yardstick = settings[methods[first]["chosen"]]["area"]
    for method, numbers in methods.items():
        chosen, worst = (settings[numbers[which]] for which in ("chosen", "worst"))
        less = [a - b for a, b in zip(chosen["area"], yardstick, strict=True)]
        ends = [cell(chosen[name]) for name in ("reward", "drift", "area")]
        about = [method, len(numbers["labels"]), cell(numbers["best"]), numbers["chosen"], *ends, cell(less)]
        rows.append([*about, cell(worst["area"])])
    names = ["method", "settings", "area, all settings", "chosen setting", "reward", "drift", "area"]
    names += [f"area less {first}'s", "worst setting's area"]
    others = [name for name in start if name not in ("update", "event", "reward", "drift", "seconds")]
    at_start = {name: f"{start[name]:.4g}" for name in ("reward", "drift", *others)}
    each = [["start", at_start.pop("reward"), at_start.pop("drift"), "", *at_start.values()]]
    for label, setting in settings.items():
        numbers = [setting["reward"], setting["drift"], setting["area"]]
        numbers += [[end[name] for end in setting["ends"].values()] for name in others]
        each.append([label, *map(cell, numbers)])
    seeds = len(yardstick)
    floor = "the fixed sender's" if "fixed-sender" in settings else "the start's"
    chosen_by = "runs with other seeds" if record.get("chosen") else "these runs themselves"
    about = (
        f"Reward and drift are those of what a setting delivers: mean +- standard error over {seeds} seeds. "
        f"Its area is its gain in reward over {summary['floor']:.4g}, {floor}, at a drift of at most d, "
        f"averaged over d from the start's {low:.4g} to {high / low:.3g} times that, {high:.4g}. A method's "
        f"area over all settings takes the best of them at each d. Settings were chosen by {chosen_by}."
    )
    source = f"`{' '.join(record['command'])}`, commit {record['commit']}, torch {record['torch']}"
    tables = [*table(names, rows), "", *table(["setting", "reward", "drift", "area", *others], each)]
    return "\n".join([about, "", *tables, "", source, ""])


def table(names, rows):
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def cell(values):
    return "{:.4g} +- {:.2g}".format(*mean_and_error(values))


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
# Up to which drift a model counts, as a multiple of the start's. In qa pass@1 breaks down beyond.
WORST = dict(qa=1.15)  # in other tasks 1.5
UNITS = dict(
    translation="nats per token of human English",
    imdb="perplexity under another language model",
    qa="perplexity of human answers",
)


def styles_of(names):
    """{name: its style}. A method has the same colour and marker in every picture; lines and fillings tell
    apart what has the same method but other settings."""
    methods = [re.split("[:,]", name)[0] for name in names]
    others = [method for method in dict.fromkeys(methods) if method not in STYLES]
    known, styles = STYLES | dict(zip(others, itertools.cycle(SPARE), strict=False)), {}
    for i, (name, method) in enumerate(zip(names, methods, strict=True)):
        (color, marker), (line, filling) = known[method], VARIANTS[methods[:i].count(method) % len(VARIANTS)]
        styles[name] = dict(color=color, marker=marker, linestyle=line, fillstyle=filling)
    return styles


def drift_axis(record):
    """What a drift axis is called; all methods of a record have the same task."""
    return f"drift ({UNITS[next(iter(record['configs'].values()))['task']]})"


def plot_tradeoff(record, path):
    """Left: reward against drift, a curve per method over its settings, the chosen one large. Right: the
    drift of the chosen settings and of plain PPO over the updates. Means over the seeds with standard errors.
    """
    from matplotlib.figure import Figure

    summary = record["summary"]
    figure, styles = Figure(figsize=(11, 5.6), layout="constrained"), styles_of(summary["methods"])
    plane, over_time = figure.subplots(1, 2)
    draw_front(plane, summary, styles)
    runs = {without(("average", "mixtures"), label): runs for label, runs in record["runs"].items()}
    labels = dict.fromkeys(["ppo", *(numbers["chosen"] for numbers in summary["methods"].values())])
    names = {label: method_of(label) if is_baseline(label) else label for label in labels if label in runs}
    draw_over_time(over_time, {name: runs[label] for label, name in names.items()}, styles_of(names.values()))
    plane.set(xlabel=drift_axis(record), ylabel="reward")
    over_time.set(xlabel="update", ylabel=drift_axis(record))
    rows = math.ceil(sum(len(method) + 7 for method in styles) / 120)  # of the legend, by its characters
    shown, columns = plane.get_legend_handles_labels(), math.ceil(len(styles) / rows)
    how = dict(loc="outside lower center", ncols=columns, frameon=False, title_fontsize=9)
    figure.legend(*shown, title="large: the setting that was chosen", **how)
    figure.savefig(path, format="png", dpi=200)


def draw_front(axes, summary, styles):
    """The panel ends where drift has grown twice as far as the range; what lies beyond is listed in it."""
    start, (low, high) = summary["start"], summary["range"]
    limit, shown, beyond = low + 2 * (high - low), [], []
    for method, numbers in summary["methods"].items():
        style, own = styles[method], [summary["settings"][label] for label in numbers["labels"]]
        own.sort(key=lambda setting: list(setting["knobs"].values()))
        curve = own[0]["knobs"].keys() <= {*KNOBS, "update"}
        own = own if curve else undominated(own)  # of mixtures, for instance, which are many
        axes.plot([], [], **style, markersize=7, label=method)  # for the legend
        places = []
        for setting in own:
            (drift, drift_error), (reward, reward_error) = (
                mean_and_error(setting[name]) for name in ("drift", "reward")
            )
            if drift > limit:
                beyond += [f"{setting['label']}: {reward:.3g} at {drift:.3g}"] * (setting is own[0])
                continue
            places.append((drift, reward))
            alone = setting["label"] == "ppo" and "ppo" not in styles  # it is the first point of ppo-kl
            look = style | (dict(zip(("color", "marker"), STYLES["ppo"], strict=True)) if alone else {})
            look |= dict(markersize=10 if setting["label"] == numbers["chosen"] else 4, linestyle="")
            axes.errorbar(drift, reward, reward_error, drift_error, elinewidth=0.7, **look)
        line = zip(*places, strict=True) if places else ([], [])
        axes.plot(*line, **style | dict(marker=""), linewidth=1)
        shown += places
    drifts, rewards = zip(*(shown or [(low, start["reward"])]), strict=True)
    left, bottom, top = min(low, *drifts), min(rewards), max(rewards)
    far = start["reward"] < bottom - (top - bottom)  # then its star stands at the lower edge
    floor = bottom - 0.1 * (top - bottom or 1) if far else min(bottom, start["reward"])
    margin = 0.06 * (top - floor or 1)
    axes.set(xlim=(left - 0.06 * (limit - left), limit), ylim=(floor - margin, top + margin))
    axes.plot(low, max(floor, start["reward"]), "k*", markersize=10, zorder=4)
    text = f"start, far below: {start['reward']:.3g}" if far else "start"
    axes.annotate(text, (low, max(floor, start["reward"])), (9, -3), textcoords="offset points")
    axes.axvline(high, color="0.8", linewidth=1, zorder=0)
    look = dict(transform=axes.get_xaxis_transform(), va="top", fontsize=8)
    axes.text(high, 0.99, f" {high / low:.3g} times the start's drift", **look)
    arrow = dict(arrowprops=dict(arrowstyle="->", color="0.4"), color="0.4", ha="center")
    axes.annotate("better", (0.42, 0.62), (0.54, 0.52), "axes fraction", **arrow)
    text = "\n".join(["beyond this panel", *beyond]) if beyond else ""
    axes.text(0.98, 0.02, text, transform=axes.transAxes, ha="right", fontsize=8)


def undominated(settings):
    """Those that no other one of them beats in both reward and drift, from the least drift on."""
    means = [[mean_and_error(s[name])[0] for name in ("drift", "reward")] for s in settings]
    ranked = sorted(zip(means, range(len(settings)), strict=True), key=lambda x: (x[0][0], -x[0][1]))
    best, found = -math.inf, []
    for (_, reward), i in ranked:
        if reward > best:
            best, found = reward, [*found, settings[i]]
    return found


def draw_over_time(axes, runs_of, styles):
    ends = []
    for label, runs in runs_of.items():
        updates = [line["update"] for line in during_training(next(iter(runs.values())))]
        drift, error = seed_means(runs, "drift")
        axes.plot(updates, drift, **styles[label], linewidth=1.2, markersize=4)
        band = [[d + sign * e for d, e in zip(drift, error, strict=True)] for sign in (-1, 1)]
        axes.fill_between(updates, *band, color=styles[label]["color"], alpha=0.15, linewidth=0)
        ends.append((drift[-1], label))
    if max(ends)[0] > 20 * min(ends)[0]:
        axes.set_yscale("log", nonpositive="clip")
    axes.margins(x=0.02)
    axes.autoscale_view()  # the limits, by which names are placed at the ends of their lines
    to_axes, ends = axes.transData + axes.transAxes.inverted(), sorted(ends)
    heights = spread([to_axes.transform((updates[-1], drift))[1] for drift, _ in ends], 0.05)
    for height, (_, label) in zip(heights, ends, strict=True):
        look = dict(color=styles[label]["color"], fontsize=8, va="center", transform=axes.transAxes)
        axes.text(1.01, height, label, **look)


def plot_choice(record, path):
    """Reward and drift against the KL coefficient, a line per method; 0 stands left of the others."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    summary = record["summary"]
    found, low = methods_along(summary, "kl_coef"), summary["start"]["drift"]
    figure, styles = Figure(figsize=(11, 4.6), layout="constrained"), styles_of(summary["methods"])
    panels, values = figure.subplots(1, 2), {s["knobs"]["kl_coef"] for own in found.values() for s in own}
    zero = min(values - {0.0}) / 3
    found = {method: own for method, own in found.items() if "eta" not in own[0]["knobs"]}  # one each
    for axes, name in zip(panels, ("reward", "drift"), strict=True):
        for method, own in found.items():
            own = sorted(own, key=lambda setting: setting["knobs"]["kl_coef"])
            mean, error = zip(*(mean_and_error(setting[name]) for setting in own), strict=True)
            places = [setting["knobs"]["kl_coef"] or zero for setting in own]
            axes.errorbar(places, mean, error, **styles[method], label=method, markersize=5, linewidth=1.2)
        axes.set(xscale="log", xlabel="KL coefficient", ylabel=name)
        axes.xaxis.set_minor_formatter(NullFormatter())
        if 0.0 in values:
            axes.set_xticks([zero, *axes.get_xticks()[1:-1]])
            axes.set_xticklabels(["0", *(f"{tick:g}" for tick in axes.get_xticks()[1:])])
        axes.set_xlim(zero / 1.5, 1.5 * max(values))
    panels[1].axhline(low, color="0.4", linewidth=1, zorder=0)
    panels[1].annotate("start", (1.5 * max(values), low), (4, -3), textcoords="offset points", color="0.4")
    if panels[1].get_ylim()[1] > 5 * low:
        panels[1].set_yscale("log", nonpositive="clip")
    panels[1].set_ylabel(drift_axis(record))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, format="png", dpi=200)


def plot_basin(record, path):
    """A map per method, KL coefficient by learning rate, with each cell's drift and its share of the best
    gain in reward. Cells with nine tenths of that gain and a drift that counts end well, and are white."""
    from matplotlib.figure import Figure

    summary = record["summary"]
    found = methods_along(summary, "kl_coef", "learning_rate")
    figure = Figure(figsize=(4.2 * len(found), 4), layout="constrained")
    floor, high = summary["floor"], summary["range"][1]
    means = {
        (method, s["knobs"]["learning_rate"], s["knobs"]["kl_coef"]): [
            mean_and_error(s[name])[0] for name in ("reward", "drift")
        ]
        for method, own in found.items()
        for s in own
    }
    best = max(reward - floor for reward, drift in means.values() if drift <= high)
    rates, coefs = (sorted({key[i] for key in means}) for i in (1, 2))
    for axes, method in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        well = [[False] * len(coefs) for _ in rates]
        for (row, rate), (column, coef) in itertools.product(enumerate(rates), enumerate(coefs)):
            reward, drift = means.get((method, rate, coef), (math.nan, math.inf))
            share = (reward - floor) / best
            well[row][column] = drift <= high and share >= 0.9
            words = f"{drift:.3g}\n{share:.0%}" if math.isfinite(drift) else "not run"
            axes.text(column, row, words, ha="center", va="center", fontsize=8)
        axes.imshow(well, origin="lower", cmap="Oranges_r", vmin=-2, vmax=1, aspect="auto")
        axes.set_xticks(range(len(coefs)), [f"{coef:g}" for coef in coefs])
        axes.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set(xlabel="KL coefficient", ylabel="learning rate")
        count = f"{sum(map(sum, well))} of {len(rates) * len(coefs)} cells end well"
        axes.set_title(f"{method}\n{count}", fontsize=10)
    figure.savefig(path, format="png", dpi=200)


def spread(heights, gap):
    """Ascending heights moved to at least `gap` from each other and to at most 1 - gap / 2."""
    heights = list(heights)
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    return [min(height, 1 - gap / 2 - i * gap) for i, height in enumerate(reversed(heights))][::-1]


# =============================================== Command line ===============================================


def parser():
    flags = argparse.ArgumentParser(
        "compare.py",
        usage=argparse.SUPPRESS,
        description=__doc__,
        epilog="All other flags (--task, --config, --kl_coef ...) are those of `elastic_reset.py --help`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flags.add_argument("--methods", metavar="LIST", help="methods, as ppo,elastic-reset,ppo-kl:kl_coef=0.1")
    flags.add_argument("--seeds", metavar="N", type=int, default=5, help="runs a method, from --seed on (5)")
    flags.add_argument("--jobs", metavar="N", type=int, default=1, help="runs at a time (1)")
    flags.add_argument("--tuned_on", metavar="FOLDER", help="of the record by which settings are chosen")
    flags.add_argument("--read", metavar="FOLDER", help="run nothing, show the tradeoff.json in FOLDER again")
    return flags


def main(argv=None) -> int:
    """0: done; 1: a run failed; 2: flags or data that cannot be used; 128 + the signal's number: stopped.
    Anything else is a mistake in a program, and Python shows where."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        own, rest = parser().parse_known_args(argv)
        if (own.methods is None) == (own.read is None) or (own.read is not None and rest):
            raise ValueError("expected --methods and what its runs need, or --read FOLDER alone")
        if min(own.seeds, own.jobs) < 1:
            raise ValueError(f"--seeds is {own.seeds} and --jobs {own.jobs}; expected 1 or more")
        if own.read is not None:
            print(write_results(read_record(own.read), Path(own.read)))
        else:
            before = read_record(own.tuned_on)["summary"]["methods"] if own.tuned_on else {}
            chosen = {method: numbers["chosen"] for method, numbers in before.items()}
            print(compare(expanded(own.methods), own.seeds, own.jobs, rest, argv, chosen))
        return 0
    except (ChildProcessError, FloatingPointError) as error:
        message, code = error, 1
    except (ValueError, OSError) as error:  # of flags, files or data
        message, code = error, 2
    except KeyboardInterrupt as stop:
        message, code = "stopped; the same command goes on", 128 + (stop.args or (signal.SIGINT,))[0]
    print(f"compare.py: {' '.join(str(message).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
