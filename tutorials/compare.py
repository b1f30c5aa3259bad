"""Compares methods by the drift that they pay for their reward, each on several seeds.

    python tutorials/compare.py --task imdb --methods elastic-reset,ppo,ppo-kl:kl_coef=0.1 --seeds 5 --jobs 2
    python tutorials/compare.py --read runs/imdb/compare    # table and picture of a recorded comparison again

Every run is a process of elastic_reset.py with a folder of its own, OUTPUT_DIR/METHOD/seedN; what it prints
is in seedN.log beside it. Finished runs stay as they are and interrupted ones go on, so the same command can
be given again, also with more seeds or methods. OUTPUT_DIR (default runs/TASK/compare) gets

    tradeoff.json   every evaluation of every run, and the numbers of the table
    summary.md      the table: mean +- standard error over the seeds
    tradeoff.png    left, reward against drift; right, drift over the updates

A method may have settings of its own, behind colons. One of them is known here alone: with ppo:mixtures=9
each run of ppo is followed by nine evaluations without further training, at theta_0 + eta (theta - theta_0)
for nine eta between the start (0) and the end (1). That is the last stage of WARP (arXiv 2406.16768). Runs
are shared with plain ppo, and the evaluations are kept in mixtures.jsonl in the run's folder."""

import argparse
import contextlib
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


def compare(labels, seeds, jobs, given, command=()):
    """Trains every method on every seed, unless that is done, and writes the three files. Returns the
    summary.

    `labels`: methods as in --methods. `given`: settings that all of them share. Raises ValueError for
    settings that cannot be used, ChildProcessError when runs failed, KeyboardInterrupt when asked to stop."""
    task, first = given.get("task", "missing"), given.get("seed", 0)
    if task not in elastic_reset.TASKS:
        raise ValueError(f"--task is {task}; expected one of {', '.join(elastic_reset.TASKS)}")
    if "method" in given:
        raise ValueError("--method or --config names a single method; expected --methods alone to name them")
    if not all(labels) or len(set(labels)) < len(labels):
        raise ValueError(f"--methods {','.join(labels)}: expected different ones, such as ppo,elastic-reset")
    folder = Path(given.get("output_dir") or f"runs/{task}/compare")
    pairs = itertools.product(labels, range(first, first + seeds))
    runs = {(label, seed): settings_of(label, seed, given, folder) for label, seed in pairs}
    run_all([config for config, _ in runs.values()], jobs)
    histories, configs = {label: {} for label in labels}, {}
    for (label, seed), (config, mixtures) in runs.items():
        lines = read_lines(Path(config.output_dir) / "metrics.jsonl")
        histories[label][seed] = lines + evaluate_mixtures(config, mixtures)
        configs.setdefault(label, asdict(config) | dict(mixtures=mixtures))
    record = dict(command=["tutorials/compare.py", *command], commit=commit(), torch=torch.__version__)
    record |= dict(summary=tradeoff(histories), configs=configs, runs=histories)
    write_text(folder / "tradeoff.json", json.dumps(record, indent=1))
    return write_results(record, folder)


def settings_of(label, seed, given, folder):
    """The Config of one run of a method, and the number of mixtures to evaluate after it."""
    method, *own = re.split(r":(?=\w+=)", label)
    names = {word.split("=")[0] for word in own}
    if taken := {"task", "seed", "method", "output_dir", "resume", "config"} & names:
        raise ValueError(f"--methods {label}: {min(taken)} is the comparison's, not a method's own")
    mixtures = next((word.split("=")[1] for word in own if word.startswith("mixtures=")), "0")
    if not re.fullmatch(r"\d\d?", mixtures):
        raise ValueError(f"--methods {label}: mixtures is {mixtures}; expected 0 to 99")
    own = [word for word in own if not word.startswith("mixtures=")]
    name = quote(",".join([method, *own]), safe=",=")  # a value may be a path
    place = dict(method=method, seed=seed, resume=True, output_dir=str(folder / name / f"seed{seed}"))
    return configure(**given | parse_flags([f"--{word}" for word in own]) | place), int(mixtures)


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
    same = {name for name in now if before.get(name) != now[name]} <= {"output_dir", "resume", "save_every"}
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
    words = [sys.executable, elastic_reset.__file__, *to_argv(asdict(config))]
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
        run.send_signal(signal.SIGINT)
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


# ==================================== Mixtures of the start and the end =====================================


def evaluate_mixtures(config, number):
    """The evaluations of `number` mixtures of a run's start and end, lines of a history with the event "eta
    0.30". The run's folder keeps them, and only those not there yet are computed."""
    path = Path(config.output_dir) / "mixtures.jsonl"
    lines = [line for line in read_lines(path) if line["update"] == config.updates] if path.exists() else []
    known = {line["event"]: line for line in lines}
    etas = {f"eta {eta:.2f}": eta for eta in (round(k / (number + 1), 2) for k in range(1, number + 1))}
    if missing := etas.keys() - known.keys():
        mixture = mixture_of(config)
        for event in sorted(missing):
            known[event] = dict(update=config.updates, event=event) | mixture(etas[event])
        write_text(path, "".join(json.dumps(line) + "\n" for line in known.values()))
    return [known[event] for event in etas]


def mixture_of(config):
    """A function that evaluates a finished run's policy at theta_0 + eta (theta - theta_0), given eta. What
    else the run has trained, in translation the receiver, is as at its end."""
    from accelerate import Accelerator

    task = elastic_reset.TASKS[config.task](config)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model, _ = elastic_reset.actor_critic(task.policy, config, accelerator)
    elastic = elastic_reset.ElasticReset(model.policy)  # its init is theta_0
    path = Path(config.output_dir) / "checkpoint" / "state.pt"
    saved = torch.load(path, map_location="cpu", weights_only=True)["parts"]
    for name, part in (dict(model=model) | task.trained).items():
        part.load_state_dict(part.state_dict() | saved[name])
    trained = [p.detach().to(i.dtype, copy=True) for p, i in zip(elastic.params, elastic.init, strict=True)]

    @torch.no_grad()
    def mixture(eta):
        for p, theta_0, theta in zip(elastic.params, elastic.init, trained, strict=True):
            p.copy_(torch.lerp(theta_0, theta, eta))
        metrics = elastic_reset.evaluate(task, model, elastic, config)
        return {name: value for name, value in metrics.items() if name != "samples"}

    return mixture


# =============================================== The numbers ================================================


def tradeoff(histories):
    """{"start", "range", "methods": {label: {reward, drift, area, passed}}}, each of the four with a value
    per seed.

    reward, drift: at the run's end. range: from the lowest drift of any run to 1.5 times the start's. area:
    the best reward at a drift of at most d, less the start's, averaged over d in the range. Only updates that
    all runs evaluated count, after a reset if there was one, since more looks would find more. (Mixtures
    count: they are what such a method delivers, but they are that many looks more.) passed: the first update
    that drifts beyond the range, or None."""
    all_runs = [history for runs in histories.values() for history in runs.values()]
    lines = [line for history in all_runs for line in history]
    low, high = min(line["drift"] for line in lines), 1.5 * lines[0]["drift"]
    shared = set.intersection(*({line["update"] for line in history} for history in all_runs))
    methods = {}
    for label, runs in histories.items():
        training = [during_training(history) for history in runs.values()]
        looks = [
            [e for e in h if e["update"] in shared and e["event"] != "before reset"] for h in runs.values()
        ]
        methods[label] = dict(
            reward=[history[-1]["reward"] for history in training],
            drift=[history[-1]["drift"] for history in training],
            area=[area_under_front(history, low, high) for history in looks],
            passed=[next((e["update"] for e in h if e["drift"] > high), None) for h in training],
        )
    return dict(start=lines[0], range=[low, high], methods=methods)


def during_training(history):
    """The evaluations during training, without those of mixtures after it."""
    return [line for line in history if not line["event"].startswith("eta")]


def area_under_front(history, low, high, steps=1000):
    """The best reward at a drift of at most d, less the first line's and at least 0, averaged over d from low
    to high."""
    start, area = history[0]["reward"], 0.0
    for i in range(steps):
        d = low + (high - low) * (i + 0.5) / steps
        area += max([0.0] + [line["reward"] - start for line in history if line["drift"] <= d])
    return area / steps


def mean_and_error(values):
    """Mean and standard error of a list of numbers; a single number has the error 0."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def seed_means(runs, name, logarithmic=False):
    """Of each evaluation's metric the mean over the seeds, and that less and plus one standard error. Where
    the axis is logarithmic, all three are those of the logarithm."""
    to, back = (math.log, math.exp) if logarithmic else (float, float)
    evaluations = zip(*common_evaluations(runs), strict=True)
    pairs = [mean_and_error([to(e[name]) for e in seeds]) for seeds in evaluations]
    return [[back(mean + sign * error) for mean, error in pairs] for sign in (0, -1, 1)]


def common_evaluations(runs):
    """The runs' histories, reduced to the evaluations (update and event) that all of them have."""
    keys = [{(e["update"], e["event"]) for e in history} for history in runs.values()]
    common = set.intersection(*keys)
    return [[e for e in history if (e["update"], e["event"]) in common] for history in runs.values()]


# ======================================== The table and the picture =========================================


def read_record(folder):
    """The tradeoff.json in a folder. ValueError if it is none."""
    path = Path(folder) / "tradeoff.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record | dict(summary=tradeoff(record["runs"]))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of a comparison ({error!r})") from error


def write_results(record, folder):
    """Writes summary.md and tradeoff.png; returns the summary."""
    with written_whole(folder / "tradeoff.png") as aside:
        plot_tradeoff(record["runs"], aside)
    write_text(folder / "summary.md", summary_text(record))
    return summary_text(record)


def summary_text(record):
    """summary.md: a row per method, mean +- standard error over the seeds; differences are paired by seed."""
    start, (low, high) = record["summary"]["start"], record["summary"]["range"]
    methods = record["summary"]["methods"]
    first = next(iter(methods))
    rows = [
        f"| method | reward | drift | area under the front | area less {first}'s | drift > {high:.3g} from |",
        "|---|---|---|---|---|---|",
    ]
    for label, numbers in methods.items():
        paired = [a - b for a, b in zip(numbers["area"], methods[first]["area"], strict=True)]
        passed = ", ".join("never" if update is None else str(update) for update in numbers["passed"])
        cells = [cell(numbers["reward"]), cell(numbers["drift"]), cell(numbers["area"]), cell(paired), passed]
        rows.append(" | ".join(["| " + label, *cells]) + " |")
    about = (
        f"Start: reward {start['reward']:.4g}, drift {start['drift']:.4g}. Reward and drift: the runs' ends, "
        f"mean +- standard error over {len(methods[first]['area'])} seeds. Area: the best reward at a drift "
        f"of at most d, less the start's, averaged over d from {low:.3g} to {high:.3g}. Last: by seed."
    )
    source = f"`{' '.join(record['command'])}`, commit {record['commit']}, torch {record['torch']}"
    return "\n".join([about, "", *rows, "", *other_metrics(record), "", source, ""])


def other_metrics(record):
    """The table of what else the task measures, at the start and at the runs' ends."""
    start, known = record["summary"]["start"], ("update", "event", "reward", "drift", "seconds")
    names = [name for name in start if name not in known]
    rows = ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    rows.append(" | ".join(["| start", *(f"{start[name]:.4g}" for name in names)]) + " |")
    for label, runs in record["runs"].items():
        ends = [during_training(history)[-1] for history in runs.values()]
        rows.append(" | ".join(["| " + label, *(cell([end[name] for end in ends]) for name in names)]) + " |")
    return rows


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


def styles_of(labels):
    """{label: its style}. A method has the same colour and marker in every picture; lines and fillings tell
    apart what has the same method but other settings."""
    methods = [label.split(":")[0] for label in labels]
    others = [method for method in dict.fromkeys(methods) if method not in STYLES]
    known, styles = STYLES | dict(zip(others, itertools.cycle(SPARE), strict=False)), {}
    for i, (label, method) in enumerate(zip(labels, methods, strict=True)):
        (color, marker), (line, filling) = known[method], VARIANTS[methods[:i].count(method) % len(VARIANTS)]
        styles[label] = dict(color=color, marker=marker, linestyle=line, fillstyle=filling)
    return styles


def plot_tradeoff(histories, path):
    """Left: reward against drift, at the runs' ends and on the way there. Right: drift over the updates, with
    the saw-tooth of the resets. Means over the seeds with standard errors, of the logarithm where the axis is
    logarithmic."""
    from matplotlib.figure import Figure

    figure, styles = Figure(figsize=(11, 5.6), layout="constrained"), styles_of(histories)
    plane, over_time = figure.subplots(1, 2)
    drifts = [e["drift"] for runs in histories.values() for h in runs.values() for e in during_training(h)]
    if logarithmic := max(drifts) > 20 * min(drifts) > 0:
        plane.set_xscale("log")
        over_time.set_yscale("log")
    draw_plane(plane, histories, styles, logarithmic)
    draw_over_time(over_time, histories, styles, logarithmic)
    plane.set(xlabel="drift (lower is better)", ylabel="reward (higher is better)")
    over_time.set(xlabel="update", ylabel="drift (lower is better)")
    n = len(next(iter(histories.values())))
    seeds = f"{n} seeds" if n > 1 else "1 seed"
    figure.suptitle(f"Means over {seeds}. Large marks: the ends. Bars and bands: standard errors.")
    rows = math.ceil(sum(len(label) + 7 for label in histories) / 120)  # of the legend, by its characters
    shown, columns = plane.get_legend_handles_labels(), math.ceil(len(histories) / rows)
    figure.legend(*shown, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, format="png", dpi=150)


def draw_plane(axes, histories, styles, logarithmic):
    seen = []
    for label, runs in histories.items():
        drift, *drift_band = seed_means(runs, "drift", logarithmic)
        reward, *reward_band = seed_means(runs, "reward")
        end = len(during_training(common_evaluations(runs)[0])) - 1
        seen += reward[1:]
        style, small = styles[label], styles[label] | dict(linewidth=0.8, markersize=3, alpha=0.5)
        axes.plot(drift[1 : end + 1], reward[1 : end + 1], **small)
        axes.plot(drift[end + 1 :] + [drift[end]], reward[end + 1 :] + [reward[end]], **small)  # mixtures
        xerr, yerr = (
            [[abs(edge[end] - mean[end])] for edge in band]
            for mean, band in ((drift, drift_band), (reward, reward_band))
        )
        axes.errorbar(drift[end], reward[end], yerr, xerr, fmt="none", ecolor=style["color"], capsize=3)
        axes.plot(drift[end], reward[end], **style | dict(linestyle="", markersize=9))
        axes.plot([], [], **style, markersize=7, label=label)  # for the legend: marker and line
    edge = min(seen) - 0.1 * (max(seen) - min(seen))  # where a start far below is put
    place, text = (drift[0], max(reward[0], edge)), f"start, below: {reward[0]:.3g}"
    axes.plot(*place, "k*", markersize=8, zorder=4)
    axes.autoscale_view()
    left = (axes.transData + axes.transAxes.inverted()).transform(place)[0] < 0.5
    where = dict(xytext=(10 if left else -10, -4), textcoords="offset points", ha="left" if left else "right")
    axes.annotate("start" if reward[0] >= edge else text, place, **where)


def draw_over_time(axes, histories, styles, logarithmic):
    ends = []
    for label, runs in histories.items():
        updates = [line["update"] for line in during_training(common_evaluations(runs)[0])]
        drift, *band = (values[: len(updates)] for values in seed_means(runs, "drift", logarithmic))
        axes.plot(updates, drift, **styles[label], linewidth=1.2, markersize=4)
        axes.fill_between(updates, *band, color=styles[label]["color"], alpha=0.15, linewidth=0)
        ends.append((drift[-1], label))
    axes.margins(x=0.02)
    axes.autoscale_view()  # the limits, by which names are placed at the ends of their lines
    to_axes, ends = axes.transData + axes.transAxes.inverted(), sorted(ends)
    heights = spread([to_axes.transform((updates[-1], drift))[1] for drift, _ in ends], 0.05)
    for height, (_, label) in zip(heights, ends, strict=True):
        look = dict(color=styles[label]["color"], fontsize=9, va="center", transform=axes.transAxes)
        axes.text(1.01, height, label, **look)


def spread(heights, gap):
    """Ascending heights moved to at least `gap` from each other and to at most 1 - gap / 2."""
    heights = list(heights)
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    return [min(height, 1 - gap / 2 - i * gap) for i, height in enumerate(reversed(heights))][::-1]


# =============================================== Command line ===============================================


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; --help lists the flags")


def parser():
    more = "All other flags (--task, --config, --kl_coef ...) are those of `python elastic_reset.py --help`."
    style = argparse.RawDescriptionHelpFormatter
    flags = Parser("compare.py", description=__doc__, epilog=more, formatter_class=style, allow_abbrev=False)
    flags.add_argument("--methods", metavar="LIST", help="methods, as ppo,elastic-reset,ppo-kl:kl_coef=0.1")
    flags.add_argument("--seeds", metavar="N", type=int, default=5, help="runs a method, from --seed on (5)")
    flags.add_argument("--jobs", metavar="N", type=int, default=1, help="runs at a time (1)")
    flags.add_argument("--read", metavar="FOLDER", help="run nothing, show the tradeoff.json in FOLDER again")
    return flags


def main(argv=None) -> int:
    """0: done; 1: a run failed; 2: flags or data that cannot be used; 128 + the signal's number: stopped."""
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
            labels = [label.strip() for label in own.methods.split(",")]
            print(compare(labels, own.seeds, own.jobs, parse_flags(rest), argv))
        return 0
    except ChildProcessError as error:
        message, code = error, 1
    except Exception as error:  # of flags, files or data
        message, code = error, 2
    except KeyboardInterrupt as stop:
        message, code = "stopped; the same command goes on", 128 + (stop.args or (signal.SIGINT,))[0]
    print(f"compare.py: {' '.join(str(message).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
