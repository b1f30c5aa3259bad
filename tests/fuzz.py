"""Throws random command lines, damaged data folders and damaged runs at elastic_reset.py.

    python tests/fuzz.py --cases 1000 --seed 0           # and cases // 5 data folders, cases // 5 checkpoints
    python tests/fuzz.py --seed 0 --only checkpoint:17   # one case again, with all that it wrote to stderr

No part of the suite. A case may end with exit code 0, or with 2 (1: FloatingPointError) and one line on
stderr beside progress bars. Findings: a traceback; a crash of Python; a hang; code of a file that was
executed; other lines; exit code 0 for a damage that must be noticed, whose name begins with "!" (silent); a
plain run refused; a file, not the program's own, that was there before and is lost. Then it ends with 1.
"""

import argparse
import gzip
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import elastic_reset  # noqa: E402
from elastic_reset import METHODS, TASKS, Config, fields  # noqa: E402
from tutorials.compare import to_argv  # noqa: E402

TEMP = Path(tempfile.mkdtemp(prefix="fuzz"))
HERE, TRACE = TEMP / "case", TEMP / "trace"  # a case's working folder; what executed code leaves
torch.set_printoptions(threshold=10**9)
RUN, DATA, THEIRS = HERE / "run", HERE / "data", HERE / "theirs"
CONFIG, CHECKPOINT, MODEL = RUN / "config.json", RUN / "checkpoint", RUN / "model"
TINY = dict(
    updates=1, batch_size=4, mini_batch_size=4, eval_every=1, eval_size=4, save_every=1, reset_every=2,
    d_model=8, layers=1, pretrain_updates=2, pretrain_batch_size=4, reward_updates=2, max_length=64,
    prompt_length=48, response_length=8, min_response_length=0, program_length=8, output_dir="run",
)  # fmt: skip


def tiny(task, **flags):
    """Flags of a run that takes moments, without those of other tasks, which are refused."""
    own = {f.name for f in fields(Config) if task in (f.metadata["tasks"] or TASKS)}
    return {
        name: value for name, value in (TINY | flags | dict(task=task)).items() if name in own | {"config"}
    }


class Hang(BaseException):
    """A case's time is over."""


class Code:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {TRACE}",)


def put(path, content="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def contents():
    """{path: link, bytes or None} of everything below the working folder."""
    paths = [Path(root, name) for root, folders, files in os.walk(HERE) for name in folders + files]
    return {p: p.readlink() if p.is_symlink() else p.read_bytes() if p.is_file() else None for p in paths}


def spoiled(rng, good):
    """One damage to the bytes of a file: its name and the bytes."""
    i = rng.randrange(len(good))
    flipped = good[:i] + bytes([good[i] ^ 1 << rng.randrange(8)]) + good[i + 1 :]
    return rng.choice([
        ("!empty", b""), ("truncated", good[:i]), ("flipped", flipped), ("!noise", rng.randbytes(300)),
        ("!code", pickle.dumps(dict(history=Code()))), ("!brackets", b"[" * 99_999), ("!null", b"null"),
        ("!3", b"3"), ("NULs", good[:i] + bytes(9) + good[i:]), ("BOM", b"\xef\xbb\xbf" + good),
        ("!not UTF-8", b"\xff" + good), ("more", good + b"x"), ("flipped", flipped), ("truncated", good[:i]),
    ])  # fmt: skip


def mutate(rng, tree, deepest=99):
    """Damages one place in a tree of dicts, lists, tensors and plain values. Returns where and how. At a
    depth of 1 something is removed or gets another name."""
    path, node, dtypes = [], tree, {}
    while isinstance(node, (dict, list)) and node and (not path or rng.random() < 0.85):
        if len(path) == deepest:
            break
        parent, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = parent[key]
        path.append(key)
    others = dict(none=None, list=[], dict={}, text="3", surrogate="\ud800")
    if isinstance(node, torch.Tensor):
        dtypes = dict(dtype=node.bool() if node.dtype == torch.int64 else node.long())
        dtypes |= dict(nan=torch.full_like(node, math.nan)) if node.is_floating_point() else {}
        shapes = dict(one=torch.ones(1), empty=torch.zeros(0), scalar=torch.tensor(1.0), wider=node[None])
        others |= dtypes | {name: new for name, new in shapes.items() if new.shape != node.shape}
    elif isinstance(node, (int, float)):
        others |= dict(negative=-1, nan=math.nan, huge=10**30, half=node + 0.5, infinite=math.inf)
    how = rng.choice(["removed", "renamed", *others] if deepest > 1 else ["removed", "renamed"])
    if how in others:
        parent[key] = others[how]
    else:
        del parent[key]
    if how == "renamed" and isinstance(parent, dict):
        parent["other"] = node
    return path, how


def fixture(task, **flags):
    """The folder of a tiny finished run."""
    folder = TEMP / "-".join(map(str, [task, *flags.values()]))
    if not folder.exists():
        end, text = call(to_argv(tiny(task, output_dir=str(folder)) | flags), 300)
        assert end == 0, (end, text)
    return folder


def a_run(task):
    """Puts a copy of a finished run at output_dir; returns what is the program's own there."""
    shutil.copytree(fixture(task), RUN)
    put(CONFIG, json.dumps(json.loads(CONFIG.read_text()) | dict(output_dir="run"), indent=2))
    return set(contents())


# ---- command lines

LONG = "updates pretrain_updates reward_updates num_ppo_epochs batch_size pretrain_batch_size layers".split()
LONG += ["program_samples"]  # a large number here asks for a long run, and is no mistake
TEXTS = ["", " ", "a\nb", "\udcff", "é" * 300, "/", ".", "..", "/dev/null", "~", "-", "%s{}", "a:train[", ":"]
TEXTS += ["a:b:c", "hf://", "hf://datasets/a/b", "http://localhost:1/x", "json", "text:train", "*", "run"]
STRAY = ["--no_such_flag", "--Updates", "-x", "stray", "--update", "--=", "--updates=", "é", "--seed"]
YAML = [  # contents of --config that must be refused
    "updates: [", "- updates", "", "null", "3", "updates:", "updates: ~", "updates: {a: 1}", "1: 2", "'': 2",
    "updates: [1, 2]", "updates: [[1]]", "updates: 1.5", "? [a]\n: 1", "updates: true", "null: 2", "\0",
    "updates: 2020-01-01", "a b: 2", "help: 1", "help: []", "config: other.yaml", "updates=1: 1", "seed: []",
    "model: --help", "model: []", "model: [[]]", "resume: 1", "resume: maybe", "a: &a [*a]", "seed: !!int x",
    f"!!python/object/apply:os.system ['touch {TRACE}']", "model: '\ud800'", "[" * 99_999, "{a: " * 5000,
    'output_dir: "a\\0b"', 'data: "a\\0b"', 'model: "a\\0b"', "kl_coef: -.inf", "output_dir: [a, b]",
    "model: &a [*a]", "seed: -1",
]  # fmt: skip
FOLDERS = {  # what is at output_dir, and flags to run with
    "!a file": lambda: put(RUN), "!below a file": lambda: put(RUN) or dict(output_dir="run/a/b"),
    "!a link to itself": lambda: RUN.symlink_to("run"), "a dead link": lambda: RUN.symlink_to("nothing"),
    "!a link to others' files": lambda: put(THEIRS / "a") or RUN.symlink_to("theirs"),
    "!a device": lambda: dict(output_dir="/dev/null"), "!/proc": lambda: dict(output_dir="/proc/run"),
    "!a long name": lambda: dict(output_dir="a" * 300), "!others' files": lambda: put(RUN / "thesis.tex"),
    "!a hidden file": lambda: put(RUN / ".a"), "others' .partial": lambda: put(RUN / "thesis.partial"),
    "!others' empty folder": lambda: (RUN / "photos").mkdir(parents=True),
    "!a model": lambda: put(CONFIG, '{"model_type": "marian"}'),
    "!read-only": lambda: RUN.mkdir() or RUN.chmod(0o555),
    "!config.json is a folder": lambda: CONFIG.mkdir(parents=True),
    "!config.json is a pipe": lambda: RUN.mkdir() or os.mkfifo(CONFIG),
}  # fmt: skip
INSIDE = {  # what is in the folder of a run that is to go on, and flags to go on with
    "!no --resume": lambda: dict(resume=False), "!another setting": lambda: dict(seed=1),
    "!another method": lambda: dict(method="ppo"), "!below a run": lambda: dict(output_dir="run/model"),
    "!its own model": lambda: dict(model="run/model"), "!no config.json": lambda: CONFIG.unlink(),
    "a note": lambda: put(RUN / "notes.txt"), "a note in model/": lambda: put(MODEL / "notes.txt"),
    "a note in checkpoint/": lambda: put(CHECKPOINT / "notes.txt"),
    "curve.png is a folder": lambda: (RUN / "curve.png").unlink() or put(RUN / "curve.png" / "a"),
    "samples.md is a folder": lambda: (RUN / "samples.md").unlink() or put(RUN / "samples.md" / "a"),
    "model/ is a file": lambda: shutil.rmtree(MODEL) or put(MODEL),
    "checkpoint/ is a file": lambda: shutil.rmtree(CHECKPOINT) or put(CHECKPOINT),
    "model/ is a link": lambda: MODEL.rename(THEIRS) and MODEL.symlink_to(THEIRS),
    "checkpoint/ is a link": lambda: CHECKPOINT.rename(THEIRS) and CHECKPOINT.symlink_to(THEIRS),
    "config.json is a link": lambda: CONFIG.rename(THEIRS) and CONFIG.symlink_to(THEIRS),
    "!a folder for a checkpoint": lambda: [p.unlink() or p.mkdir() for p in CHECKPOINT.glob("*.pt")] and {},
    "!a pipe for a checkpoint": lambda: [p.unlink() or os.mkfifo(p) for p in CHECKPOINT.glob("*.pt")] and {},
}  # fmt: skip


def flags_case(rng):
    """Random flags, a random file of flags, or something at output_dir."""
    task = rng.choice(list(TASKS))
    flags, kind, own, f = tiny(task), rng.random(), (), rng.choice(fields(Config))
    low, high, choices = f.metadata["low"], f.metadata["high"], list(f.metadata["choices"])
    texts = f.type in (str, list) and not choices
    if kind < 0.03:
        return "plain run", to_argv(flags | dict(method=rng.choice(list(METHODS)))), ()
    if kind < 0.13:  # the ends of ranges and strange texts, which may be taken
        words = TEXTS if texts else choices or ["true", "false"]
        if f.type in (int, float):
            large = [2**31, 2**63, 10**30] if f.type is int else ["1e308", "5e-324", high]
            words = [low] + large * (f.name not in LONG)
        return f"end of {f.name}", [*to_argv(flags), f"--{f.name}={rng.choice(words)}"], ()
    if kind < 0.4:
        name, words = "method" if texts else f.name, ["", "None", "no such", "0x1", "1,5", "ten"]
        if f.type in (int, float):
            words += [repr(low - 1), "nan"] + ["1.1", "inf"] * (high == 1) + ["2.5", "1e3"] * (f.type is int)
        word = rng.choice(words)
        return f"!{name}", to_argv(flags) + rng.choice([[f"--{name}={word}"], [f"--{name}", word]]), ()
    if kind < 0.5:
        words = to_argv(flags)
        words.insert(rng.randrange(0, len(words) + 1, 2), rng.choice(STRAY))
        return "!stray word", words, ()
    if kind < 0.75:
        text = rng.choice(YAML)
        name, content = spoiled(rng, json.dumps(flags).encode()) if kind < 0.55 else (f"!{text[:40]!r}", text)
        put(HERE / "flags.yaml", content)
        flags = {k: v for k, v in flags.items() if not text.startswith(f"{k}:")}
        flags |= dict(config="flags.yaml")
    elif kind < 0.86:
        name = rng.choice(list(FOLDERS))
        flags |= FOLDERS[name]() or {}
    else:
        flags, own = flags | dict(task="translation", resume=True, updates=2), a_run("translation")
        name, content = spoiled(rng, CONFIG.read_bytes())
        name = rng.choice([name, *INSIDE])
        flags |= INSIDE[name]() or {} if name in INSIDE else put(CONFIG, content) or {}
    return name, to_argv(flags), own


# ---- data folders, checkpoints and saved models

ROWS = dict(
    translation=[dict(fr=f"un chien {i}", en=f"a dog {i}", de=f"ein Hund {i}") for i in range(8)],
    imdb=[dict(text=f"a fine film {i}", label=i % 2) for i in range(8)],
    qa=[dict(question=f"why {i}?", response_j=f"because {i}", response_k=f"no {i}") for i in range(30)],
)
CARDS = [
    "[",
    "- a",
    "3",
    "null",
    "a: b: c",
    "\0",
    "configs: 3",
    "configs:\n- a",
    "dataset_info: 3",
    "&a [*a]",
]
CARDS += ["configs:\n- config_name: a\n  data_files: 3", "configs:\n- config_name: a\n  data_files: none.csv"]
CARDS += ["dataset_info:\n  features: a", "dataset_info:\n  features:\n  - name: fr\n    dtype: int32"]
CARDS += ["configs:\n- config_name: a\n  data_dir: ../..", "dataset_info:\n- config_name: [1]", "{" * 9999]
SPECS = ["!:train[abc]", "!:train[:0]", "!:none", "!:train[5:2]", "!/none", "!:train[", ":train[-3:]", "!\n"]
SPECS += [
    ":train[:50%]",
    ":train+validation",
    "/train.*",
    ":all",
    ":train[:99999999999999999999]",
    "!:train[::2]",
]
CELLS = ["a\0b", "word " * 99_999, "w" * 999_999, "\ud800", "a\n\r\nb", "NA", '"', "\u200d\ufeff", " \t", 2]


def write_rows(path, rows):
    """JSONL, CSV or Parquet by the path's suffix; JSONL in any case where the rows fit into no table."""
    from pyarrow import ArrowException, Table, csv, parquet

    put(path, "".join(json.dumps(row) + "\n" for row in rows))
    try:
        if path.suffix != ".jsonl":
            (csv.write_csv if path.suffix == ".csv" else parquet.write_table)(Table.from_pylist(rows), path)
    except (ArrowException, UnicodeError, TypeError, AttributeError, OverflowError):
        put(path, "".join(json.dumps(row) + "\n" for row in rows))


def folder_case(rng):
    """A data folder with one damage, and a command line that trains on it."""
    task, suffix, kind, spec = (
        rng.choice(list(ROWS)),
        rng.choice([".jsonl", ".csv", ".parquet"]),
        rng.random(),
        "",
    )
    files, rows = [DATA / f"{split}{suffix}" for split in ("train", "validation")], ROWS[task]
    [write_rows(file, rows) for file in files]
    file, rows, column = rng.choice(files), [dict(row) for row in rows], rng.choice(list(rows[0])[:2])
    good, text = file.read_bytes(), suffix != ".parquet"
    head, *lines = good.splitlines(True)
    if kind < 0.2:
        path, how = mutate(rng, rows)
        needed = len(path) == 2 and path[1] != "response_k" and suffix == ".jsonl"
        name = "!" * (needed and how in ("removed", "renamed", "none")) + f"{path}: {how}"
        write_rows(file, rows)
    elif kind < 0.3:
        cell = rows[rng.randrange(8)][column] = rng.choice(CELLS)
        name = "!" * (column == "label" or cell == " \t" and text) + f"{column} is {str(cell)[:9]!r}"
        write_rows(file, rows)
    elif kind < 0.4:
        name = f"!no column {column}"
        write_rows(file, [{k: v for k, v in row.items() if k != column} for row in rows])
    elif kind < 0.6:
        name, content = spoiled(rng, good)
        if suffix == ".csv" and kind < 0.54:
            name, content = rng.choice([
                ("!a row with more cells", good + b"a,b,c,d,e\n"), ("!a row with fewer cells", good + b"a\n"),
                ("!rows with more cells", head + b"".join(b"x," + line for line in lines)),
                ("!no header", b"".join(lines)), ("!an open quote", good + b'"a'), ("blank", good + b"\n\n"),
                ("!;", good.replace(b",", b";")), ("header twice", head + good),
            ])  # fmt: skip
        put(file, content)
    elif kind < 0.75:
        card = rng.choice(CARDS)
        name = f"card {card[:50]!r}"
        put(DATA / "README.md", f"---\n{card}\n---\n")
    elif kind < 0.85:
        spec = rng.choice(SPECS)
        name = "!" * spec.startswith("!") + f"spec {spec.strip('!')!r}"
    else:
        name, act = rng.choice([
            ("!torn .gz", lambda: file.unlink() or put(Path(f"{file}.gz"), gzip.compress(good)[:-9])),
            ("!torn .zip", lambda: file.unlink() or put(Path(f"{file}.zip"), b"PK\3\4" + good)),
            ("no .tar", lambda: file.unlink() or put(Path(f"{file}.tar"), good)),
            ("beside", lambda: put(file.with_suffix(rng.choice([".csv", ".json", ".txt"])), "{")),
            ("!no files", lambda: [path.unlink() for path in files]), ("!no split", file.unlink),
            ("!a link to itself", lambda: file.unlink() or file.symlink_to(file.name)),
            ("!a folder", lambda: file.unlink() or file.mkdir()),
            ("!a pipe", lambda: file.unlink() or os.mkfifo(file)),
            ("a script", lambda: put(DATA / "data.py", f"open({str(TRACE)!r}, 'w')\n")),
            ("infos", lambda: put(DATA / "dataset_infos.json", rng.choice(["{", "[]", '{"a": 3}']))),
            ("dict", lambda: put(DATA / "dataset_dict.json", "{")),
            ("!.pkl", lambda: file.unlink() or put(file.with_suffix(".pkl"), pickle.dumps(Code()))),
        ])  # fmt: skip
        act()
    flags = tiny(task, data="data" + spec.strip("!"), validation_data="data:validation")
    flags |= dict(sender_data=["data"], receiver_data=["data"]) if task == "translation" else {}
    return f"{name} in {file.name}", to_argv(flags), ()


FORMATS = {  # how to read and to write a file
    ".pt": (lambda path: torch.load(path, weights_only=True), torch.save),
    ".json": (lambda path: json.loads(path.read_bytes()), lambda tree, path: put(path, json.dumps(tree))),
    ".safetensors": (load_file, lambda tree, path: save_file(tree, path, dict(format="pt"))),
}


def checkpoint_case(rng):
    """A run whose checkpoint, or a saved model, has one damage, and a command line that goes on with it."""
    task, kind = rng.choice(["translation", "translation", "imdb", "qa"]), rng.random()
    flags, own = tiny(task, resume=True, updates=3), a_run(task)
    files = [*CHECKPOINT.glob("*.pt")]
    if rng.random() < 0.3:
        shutil.move(MODEL, HERE / "model"), shutil.rmtree(RUN)
        flags, own = tiny(task, model="model"), ()
        files = [rng.choice(sorted(p for p in (HERE / "model").iterdir() if p.suffix in FORMATS))]
    read, write = FORMATS[files[0].suffix]
    good, tree, state = files[0].read_bytes(), read(files[0]), files[0].suffix == ".pt"
    if kind < 0.6:
        vague = files[0].suffix == ".json"
        if not state:
            path, how = mutate(rng, tree)
            vague |= files[0].suffix == ".safetensors" and how == "dtype"
        elif rng.random() < 0.3:  # of a checkpoint, names and shapes are looked at, and no other values
            path, how = mutate(rng, rng.choice([tree, tree["parts"]]), deepest=1)
        else:
            path, how = mutate(rng, tree["parts"][rng.choice(["model", "elastic"])])
            vague |= how in ("nan", "dtype")
        name = "!" * (not vague) + f"{path}: {how}"
        if files[0].suffix == ".safetensors":
            tree = {k: v.contiguous() for k, v in tree.items() if isinstance(v, torch.Tensor)}
        [write(tree, file) for file in files]
    elif kind < 0.7 and state:
        other = rng.choice([fixture("translation", d_model=16), fixture("imdb")])
        name = "!" * (other != fixture(task)) + f"of run {other.name}"
        [shutil.copy(other / "checkpoint" / file.name, file) for file in files]
    elif kind < 0.75 and state:
        name = "!code among tensors"
        [torch.save(tree | dict(history=Code()), file) for file in files]
    else:
        name, content = spoiled(rng, good)
        name = name.strip("!") if files[0].suffix == ".json" else "!" * (name == "truncated") + name
        [put(file, content) for file in files]
        if name == "flipped" and state:
            try:
                name += f", reads {'the same' if repr(read(files[0])) == repr(tree) else 'with other values'}"
            except Exception:
                name += ", does not read"
    return f"{name} in {files[0].name}", to_argv(flags), own


# ---- running a case, and judging it


def call(argv, seconds):
    """main(argv): its exit code or exception, and what the process wrote to stderr; stdout is dropped."""

    def ring(*_):
        raise Hang(f"still at work after {seconds} s")

    with tempfile.TemporaryFile() as err, open(os.devnull, "w") as out:
        kept = [(os.dup(fd), fd) for fd in (1, 2)]
        signal.signal(signal.SIGALRM, ring)
        try:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            signal.setitimer(signal.ITIMER_REAL, seconds, 5)
            end = elastic_reset.main(argv)
        except SystemExit as error:
            end = error.code or 0
        except BaseException as error:
            end = error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.stdout.flush(), sys.stderr.flush()
            [os.dup2(*pair) and os.close(pair[0]) for pair in kept]
        err.seek(0)
        return end, err.read().decode(errors="replace")


def findings(damage, end, text, before, own):
    """(kind, what was seen) of everything that is wrong."""
    lines, after = [line.rsplit("\r")[-1] for line in text.split("\n")], contents()
    lines = [line for line in lines if line.strip() and not re.search(r"\d+%\||\d+it \[|\?it/s", line)]
    if isinstance(end, BaseException):
        place, step = "", end.__traceback__
        while step:
            code, step = step.tb_frame.f_code, step.tb_next
            place = f" in {code.co_name}" if code.co_filename == elastic_reset.__file__ else place
        yield "hang" if isinstance(end, Hang) else "traceback", f"{type(end).__name__}{place}: {end}"
    elif end not in (0, 1, 2) or end and len(lines) != 1:
        yield "lines", f"exit code {end}, {len(lines)} lines: {lines[:1]}"
    elif end and damage == "plain run":
        yield "refused", lines[0]
    if end == 0 and damage.startswith("!"):
        yield "silent", "exit code 0"
    if lost := [path for path in before if path not in own and after.get(path, 0) != before[path]]:
        yield "lost", ", ".join(str(path.relative_to(HERE)) for path in lost)
    if TRACE.exists():
        TRACE.unlink()
        yield "executed", "the code of a file"


MAKERS = dict(flags=flags_case, folder=folder_case, checkpoint=checkpoint_case)


def run_case(kind, number, options):
    """Makes a case, runs it and prints a line for each finding. Returns what to count."""
    shutil.rmtree(HERE, ignore_errors=True)
    for name in ("beside.txt", "run.txt", ".hidden"):
        put(HERE / name)
    os.chdir(HERE)
    damage, argv, own = MAKERS[kind](random.Random(f"{options.seed} {kind} {number}"))
    put(TEMP / "damage", damage)
    before, root = contents(), os.geteuid()
    os.seteuid(65534 if damage == "!read-only" and root == 0 else root)  # root may write everywhere
    end, text = call(argv, options.seconds)
    os.seteuid(root)
    os.chdir(TEMP)
    found = list(findings(damage, end, text, before, own))
    rest = argv[2 * len(TINY) - 8 :]
    words = [word if word.strip() and word.isprintable() else repr(word) for word in rest]
    for what, seen in found:
        line = [f"{kind}:{number}", what, damage, " ".join(words)[:120], " ".join(seen.split())[:200]]
        print(" | ".join(line).replace(str(TEMP), "TEMP"), flush=True)
    if options.only:
        print(text, argv, end, sep="\n")
    ended = f"end {end if isinstance(end, int) else type(end).__name__}"
    return [what for what, _ in found] + [ended] + [f"end {damage}"] * damage.startswith("flipped, ")


def run_cases(cases, options, log):
    """Runs them one by one; a line of the log for each that is over."""
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    for name in ("toy_translations", "toy_reviews", "toy_qa"):  # small, and made once
        world = getattr(elastic_reset, name)().items()
        world = {key: part[:300] if isinstance(part, list) else part for key, part in world}
        setattr(elastic_reset, name, lambda world=world: dict(world))
    for task in TASKS:
        fixture(task)
    for kind, number in cases:
        kinds = run_case(kind, number, options)
        with log.open("a") as file:
            print("|".join(kinds), file=file)


def main():
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--cases", type=int, default=1000, help="command lines")
    parser.add_argument("--folders", type=int, help="data folders; default: cases // 5")
    parser.add_argument("--checkpoints", type=int, help="damaged runs and models; default: cases // 5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=10, help="a case that takes longer hangs")
    parser.add_argument("--only", help="one case: flags:N, folder:N or checkpoint:N")
    options = parser.parse_args()
    counts = zip(MAKERS, (options.cases, options.folders, options.checkpoints), strict=True)
    cases = [(kind, i) for kind, n in counts for i in range(options.cases // 5 if n is None else n)]
    if options.only:
        cases = [(kind, int(number)) for kind, number in [options.only.split(":")]]
    os.environ |= dict(XDG_CACHE_HOME=str(TEMP / "cache"), HF_DATASETS_CACHE=str(TEMP / "datasets"))
    TEMP.chmod(0o755)
    began, kinds, log, total = time.monotonic(), Counter(), TEMP / "log", len(cases)
    while cases:  # in a child process, and the rest in another one if that crashes
        put(log, "")
        child = os.fork()
        if not child:
            run_cases(cases, options, log)
            os._exit(0)
        status, done = os.waitpid(child, 0)[1], log.read_text().splitlines()
        assert os.WIFSIGNALED(status) or len(done) == len(cases), "this program has an error, see above"
        kinds.update(kind for line in done for kind in line.split("|"))
        for kind, number in cases[len(done) : len(done) + 1]:
            seen = signal.strsignal(os.WTERMSIG(status))
            print(f"{kind}:{number} | crash | {(TEMP / 'damage').read_text()} | {seen}", flush=True)
            kinds.update(["crash"])
        cases = cases[len(done) + 1 :]
    shutil.rmtree(TEMP)
    print(f"{total} cases in {time.monotonic() - began:.0f} s: {dict(sorted(kinds.items()))}")
    return int(any(not kind.startswith("end ") for kind in kinds))


if __name__ == "__main__":
    sys.exit(main())
