"""Compares methods by the drift that they pay for their reward, over their settings and several seeds.

    python tutorials/compare.py --task imdb --methods elastic-reset,ppo,ppo-kl:kl_coef=0.1 --seeds 5 --jobs 2
    python tutorials/compare.py --task imdb --methods "ppo-kl:kl_coef=0.01|0.02|0.03|0.05" --seeds 5
    python tutorials/compare.py --read runs/imdb/compare    # tables and pictures of a record again

Every run is a process of elastic_reset.py with a folder of its own, OUTPUT_DIR/METHOD/seedN. What it prints
is in seedN.log beside it. Finished runs stay as they are and interrupted ones go on, so the same command can
be given again, also with more seeds or methods. OUTPUT_DIR (default runs/TASK/compare) gets

    tradeoff.json   every evaluation of every run
    summary.md      the tables: mean +- standard error over the seeds, differences with 95 per cent intervals
    tradeoff.png    left, reward against drift; right, drift over the updates
    choice.png      reward and drift against the KL coefficient
    basin.png       which learning rates and KL coefficients end well
    map.png         how often and how far back to reset

The last three are drawn for methods that have several of these values and differ in nothing else.

A method may have settings of its own, behind colons. A setting with several values, divided by |, stands for
as many methods. What a file of --config says, a method overrides. What other flags say, all methods share.
Three settings are known here only. The first one sets ema_decay, the others take evaluations without further
training:

    elastic-reset:share=0.35   how far back a reset goes: the share of theta_0 in the weights that it gives,
                               ema_decay to the power of reset_every
    ppo-kl:average=1   at the end, the moving average of the policy is evaluated too (Polyak averaging)
    ppo:mixtures=9     so are nine mixtures theta_0 + eta (theta - theta_0) of start and end, the last stage
                       of WARP (arXiv 2406.16768)

All settings that differ in kl_coef, learning_rate, reset_every and share are one method. Resets without a
KL penalty are a method apart from resets with one, and `ppo` is `ppo-kl` at the coefficient 0. Plain `ppo`
also gives a policy that is stopped early, at each of its evaluations. A method of a program of its own is
named by file and method: tutorials/baselines.py:S2P:s2p_coef=1. All its settings together are one method.

With --tuned_on FOLDER each method's setting is chosen by the record in FOLDER, made with other seeds. Of
several folders the last one that has a method chooses for it.
It needs pandas and scipy: pip install '.[compare]'"""

import argparse
import contextlib
import importlib.util
import itertools
import json
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
from elastic_reset import configure, parse_flags, write_text
from tutorials.pictures import write_pictures
from tutorials.tradeoff import (
    join_label,
    method_of,
    read_record,
    setting_of,
    split_label,
    summary_text,
    tradeoff,
)

GRACE = 30  # seconds that a run has to end its update and save a checkpoint when the comparison is stopped


# =========================================== Running the methods ============================================


def compare(labels, seeds, jobs, shared, command=(), chosen=None):
    """Train every method on every seed, unless that is done, and write the files. Returns the text of
    summary.md.

    `labels`: methods as in --methods. `shared`: the flags that all of them share, a list of words. `chosen`:
    {method: the setting that was chosen for it before}. Raises ValueError for settings that cannot be used,
    ChildProcessError when runs failed, KeyboardInterrupt when asked to stop."""
    given = parse_flags(shared)
    task = given.get("task", "missing")
    first = first_seed(given)
    if task not in list(elastic_reset.TASKS):  # a file may give what no dict can look up
        raise ValueError(f"--task is {task}; expected one of {', '.join(elastic_reset.TASKS)}")
    if "method" in given:
        raise ValueError("--method or --config names a single method; expected --methods alone to name them")
    if not all(labels) or len(set(labels)) < len(labels):
        raise ValueError(f"--methods {','.join(labels)}: expected different ones, such as ppo,elastic-reset")
    folder = Path(str(given.get("output_dir") or f"runs/{task}/compare"))
    runs = {}
    for label, seed in itertools.product(labels, range(first, first + seeds)):
        runs[label, seed] = settings_of(label, seed, shared, folder)
    check_folders(runs)
    check_chosen(runs, chosen or {})
    run_all([config for config, _ in runs.values()], jobs)
    configs = {}
    histories = {label: {} for label in labels}
    for (label, seed), (config, afterwards) in runs.items():
        lines = read_lines(Path(config.output_dir) / "metrics.jsonl")
        lines += evaluate_afterwards(config, afterwards)
        histories[label][str(seed)] = [short_line(line) for line in lines]
        configs.setdefault(label, asdict(config))
    record = dict(
        command=["tutorials/compare.py", *command],
        commit=commit(),
        torch=torch.__version__,
        chosen=chosen or {},
        configs=configs,
        runs=histories,
    )
    write_text(folder / "tradeoff.json", json.dumps(record))
    return write_results(record | dict(summary=tradeoff(record)), folder)


def write_results(record, folder):
    """Write summary.md and the pictures of a record. Returns the text of summary.md."""
    text = summary_text(record)
    write_text(folder / "summary.md", text)
    write_pictures(record, folder)
    return text


def first_seed(given):
    """Return the seed of the first run."""
    seed = given.get("seed", 0)
    if type(seed) is not int:
        raise ValueError(f"--seed is {seed!r}; expected a whole number")
    return seed


def check_folders(runs):
    """Raise ValueError if two settings would train in the same folder. What is evaluated after a run is none
    of its settings."""
    owners = {}
    for (label, _), (config, _) in runs.items():
        setting = setting_of(label)
        owner = owners.setdefault(config.output_dir, setting)
        if owner != setting:
            raise ValueError(f"--methods {owner} and {setting} have the same folder, {config.output_dir}")


def check_chosen(runs, chosen):
    """Raise ValueError if a setting that was chosen elsewhere is none of those that will be trained. What
    is made of a run when it has ended, or before, is known only later."""
    planned = {}
    for (label, _), (config, _) in runs.items():
        setting = setting_of(label)
        planned.setdefault(method_of(setting, asdict(config)), set()).add(setting)
    for method, settings in planned.items():
        if method in chosen and chosen[method] not in settings:
            raise ValueError(f"--tuned_on chose {chosen[method]}, which is not among --methods")


def expanded(methods):
    """Read --methods as a list of labels. A setting with several values gives one for each."""
    labels = []
    for label in methods.split(","):
        method, own = split_label(label.strip())
        for values in itertools.product(*(values.split("|") for values in own.values())):
            labels.append(join_label(method, dict(zip(own, values, strict=True))))
    return labels


def settings_of(label, seed, shared, folder):
    """Return the Config of one run of a method, and what is to be evaluated after it, {event: eta}, where
    None stands for the average."""
    method, own = split_label(label)
    if taken := {"task", "seed", "method", "output_dir", "resume", "config"} & own.keys():
        raise ValueError(f"--methods {label}: {min(taken)} is the comparison's, not a method's own")
    file, _, baseline = method.rpartition(":")
    name = split_label(setting_of(label))[1]
    name = quote(join_label(baseline, name, ","), safe=",=")  # a value may be a path
    afterwards = events_of(own.pop("average", "0"), own.pop("mixtures", "0"), label)
    place = dict(seed=seed, resume=True, output_dir=str(folder / name / f"seed{seed}"))
    if not file:
        share = own.pop("share", "")
        if share and "ema_decay" in own:
            raise ValueError(f"--methods {label}: share sets ema_decay; expected one of the two")
        given = parse_flags([*shared, *to_argv(own), f"--method={method}"]) | place
        if share:
            given["ema_decay"] = decay_of(share, label, configure(**given))
        config = configure(**given)
        if "average" in afterwards and config.reset == "elastic" and config.updates % config.reset_every == 0:
            raise ValueError(
                f"--methods {label}: the last update resets the average to the start; mixtures work"
            )
        return config, afterwards
    program = program_at(file)
    _, given = program.parse([baseline, *shared, *to_argv(own)])
    return program.configure_baseline(baseline, **given | place), afterwards


def events_of(average, mixtures, label):
    """Return what is evaluated after a run, {event: eta}."""
    if not re.fullmatch(r"\d\d?", mixtures):
        raise ValueError(f"--methods {label}: mixtures is {mixtures}; expected 0 to 99")
    if average not in ("0", "1"):
        raise ValueError(f"--methods {label}: average is {average}; expected 0 or 1")
    events = {}
    for k in range(1, int(mixtures) + 1):
        eta = round(k / (int(mixtures) + 1), 2)
        events[f"eta {eta:.2f}"] = eta
    if average == "1":
        events["average"] = None
    return events


def decay_of(share, label, config):
    """Return the ema_decay at which theta_0 has this share in the weights after a reset."""
    if not re.fullmatch(r"0?[.]\d+", share) or float(share) == 0:
        raise ValueError(f"--methods {label}: share is {share}; expected a number between 0 and 1, as 0.35")
    if config.reset != "elastic" or config.ema_update != "update":
        raise ValueError(
            f"--methods {label}: share is for elastic resets, with an EMA that moves once an update"
        )
    return round(float(share) ** (1 / config.reset_every), 6)


def program_at(file):
    """Import the program of a method that is not one of elastic_reset.py's. Its path is the module's name,
    because programs in two folders may have the same one."""
    path = Path(file).resolve()
    name = str(path)
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"--methods: there is no program {file}")
    if name not in sys.modules:
        sys.path.append(str(path.parent))  # of what it imports
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    program = sys.modules[name]
    if not (hasattr(program, "parse") and hasattr(program, "configure_baseline")):
        raise ValueError(f"--methods: {file} has no parse() and configure_baseline(), as baselines.py")
    return program


def run_all(configs, jobs):
    """Train what is not finished, `jobs` runs at a time. A run that fails does not stop the others, and none
    is left behind when this program has to stop."""
    from tqdm import tqdm

    waiting = {config.output_dir: config for config in configs if not finished(config)}
    if not waiting:
        return
    by_settings = {Path(folder).parent.name.partition(",")[2]: waiting[folder] for folder in waiting}
    for config in by_settings.values():  # pretrains here and once what is not in the cache
        elastic_reset.TASKS[config.task](config)
    running = {}
    failed = []
    total = len(waiting)
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
    """Say whether the run's folder holds this very run, complete. A run writes samples.md last."""
    folder = Path(config.output_dir)
    try:
        before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        last = read_lines(folder / "metrics.jsonl")[-1]
    except (OSError, ValueError, IndexError):
        return False  # if something is wrong there, the run itself will say what
    if not isinstance(before, dict):
        return False
    now = json.loads(json.dumps(asdict(config)))
    may_differ = {"output_dir", "resume", "save_every", "report_to"}
    same = {name for name in now if before.get(name) != now[name]} <= may_differ
    return same and last["update"] == config.updates and (folder / "samples.md").exists()


def to_argv(flags):
    """{"resume": True, "sender_data": ["a", "b"]} -> --resume true --sender_data a b, a list of words"""
    argv = []
    for name, value in flags.items():
        words = value if isinstance(value, (list, tuple)) else [value]
        if isinstance(value, bool):
            words = [str(value).lower()]
        if words:
            argv.append(f"--{name}")
            argv.extend(map(str, words))
    return argv


def start(config, jobs):
    """Begin a run, or go on with it, in a process of its own, which Ctrl-C in a terminal does not reach."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    Path(config.output_dir).parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, sys.modules[type(config).__module__].__file__]
    if type(config) is not elastic_reset.Config:  # a baseline's settings have a class of their own
        words.append(type(config).__name__)
    words += to_argv(asdict(config))
    with open(f"{config.output_dir}.log", "w", encoding="utf-8") as log:
        env = {"OMP_NUM_THREADS": str(threads)} | os.environ
        return subprocess.Popen(words, stdout=log, stderr=log, env=env, start_new_session=True)


@contextlib.contextmanager
def stop_signals():
    """Yield a list. Signals that ask this program to stop add their numbers to it and do nothing else. A
    signal that is ignored already, as SIGHUP under nohup, stays ignored."""
    stops = []
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            handlers[number] = signal.signal(number, lambda number, frame: stops.append(number))
    try:
        yield stops
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end(running, stops):
    """Ask the runs to save a checkpoint and stop, and kill those that are still there after GRACE seconds or
    at the next signal."""
    alive = list(running)
    deadline = time.monotonic() + GRACE
    signals = len(stops)
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
    """Return the commit of the repository that this file lies in, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ========================================= Evaluated after a run ==========================================


LEFT_OUT = "seconds loss policy_loss value_loss policy_kl clipfrac gradient".split()  # of single minibatches


def short_line(line):
    """Keep six digits of each number of an evaluation, without times and losses."""
    short = {}
    for name, value in line.items():
        if name not in LEFT_OUT:
            short[name] = float(f"{value:.6g}") if isinstance(value, float) else value
    return short


def evaluate_afterwards(config, events):
    """Evaluate what is made of a run's weights. Returns lines of a history with the events "average" or
    "eta 0.30". The run's folder keeps them, and only those not there yet are computed."""
    path = Path(config.output_dir) / "afterwards.jsonl"
    known = {}
    for line in read_lines(path) if path.exists() else []:
        if line["update"] == config.updates:
            known[line["event"]] = line
    if missing := events.keys() - known.keys():
        evaluate = evaluation_of(config)
        for event in sorted(missing):
            known[event] = dict(update=config.updates, event=event) | evaluate(events[event])
        write_text(path, "".join(json.dumps(line) + "\n" for line in known.values()))
    return [known[event] for event in events]


def evaluation_of(config):
    """Return a function that evaluates a finished run's policy at theta_0 + eta (theta - theta_0), given eta,
    or at its moving average, given None. What else the run has trained, in translation the receiver, is as at
    its end."""
    task = elastic_reset.TASKS[config.task](config)
    model, _ = elastic_reset.prepare_policy(task.policy, config, elastic_reset.processes())
    elastic = elastic_reset.ElasticReset(model.policy)  # its init is theta_0
    trained = elastic_reset.ElasticReset(model.policy, decay=0.0)
    path = Path(config.output_dir) / "checkpoint" / "state.pt"
    saved = torch.load(path, map_location="cpu", weights_only=True)["parts"]
    for name, part in elastic_reset.saved_parts(task, model=model, elastic=elastic).items():
        elastic_reset.load_part(part, saved[name])
    trained.load_state_dict(elastic.state_dict())
    trained.update()  # its average is what was trained

    def evaluation(eta):
        weights = elastic.averaged() if eta is None else trained.averaged(start=1 - eta)
        with weights:
            metrics = elastic_reset.evaluate(task, model, elastic, config)
        return {name: value for name, value in metrics.items() if name != "samples"}

    return evaluation


# =============================================== Command line ===============================================


def chosen_on(folder, seeds):
    """Return the settings that a record chooses, {method: setting}. Raises ValueError if it has one of these
    seeds."""
    summary = read_record(folder)["summary"]
    known = set(summary["ends"].index.unique("seed")) & set(seeds)
    if known:
        raise ValueError(
            f"--tuned_on {folder} has the seed {min(known)} too; report on other seeds, by --seed"
        )
    return summary["methods"]["chosen"].to_dict()


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
    words = "of the records by which settings are chosen"
    flags.add_argument("--tuned_on", metavar="FOLDER", nargs="+", default=[], help=words)
    flags.add_argument("--read", metavar="FOLDER", help="run nothing, show the tradeoff.json in FOLDER again")
    return flags


def main(argv=None) -> int:
    """0: done; 1: a run failed; 2: flags or data that cannot be used; 128 + the signal's number: stopped.
    Anything else is a mistake in a program, and Python shows where."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        own, rest = parser().parse_known_args(argv)
        if (own.methods is None) == (own.read is None) or (own.read is not None and (rest or own.tuned_on)):
            raise ValueError("expected --methods and what its runs need, or --read FOLDER alone")
        if min(own.seeds, own.jobs) < 1:
            raise ValueError(f"--seeds is {own.seeds} and --jobs {own.jobs}; expected 1 or more")
        if own.read is not None:
            print(write_results(read_record(own.read), Path(own.read)))
        else:
            first = first_seed(parse_flags(rest))
            chosen = {}
            for folder in own.tuned_on:
                chosen |= chosen_on(folder, range(first, first + own.seeds))
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
