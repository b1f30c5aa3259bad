"""Every EMA that people use, side by side, against the speed of memory.

    python ema_kernel/bench.py                                   all of it: an hour or two on two cores
    python ema_kernel/bench.py --cases small,lora --rounds 5     a first look
    python ema_kernel/bench.py --device cuda --dtypes bfloat16   averages beside a policy on a GPU, and off it
    python ema_kernel/bench.py --json FILE --plot FILE.png       keep the figures, draw them
    python ema_kernel/bench.py --read FILE --plot FILE.png       draw kept figures again

Each round builds every competitor anew on a model of its own, in shuffled order, warms it up, times it, and
drops it, so that all of them meet the same machine. Reported are the median over rounds of the seconds a call
takes, the gigabytes a second over the bytes that a fused update must move, and the share of the limit. The
limit is the fastest of several kernels that read two buffers and write one, over as many bytes, in the same
rounds. A second set of tables times each update once per step of a training loop, where torch's threads have
just worked and are still awake. "Staged" averages lie in CPU memory while the policy may be on a GPU; without
one its copies are made all the same. On a GPU the peak of its memory is reported too, above the policy. Peers
that are not installed (pip install '.[bench]') and models too large
for the free memory are listed as skipped; models above half a billion parameters have three rounds.
"""

import argparse
import ctypes
import gc
import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

DECAY = 0.995
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# --------------------------------------------------------------------------------------------------- cases


def gpt2(vocabulary: int, positions: int, width: int, layers: int) -> list[tuple[int, ...]]:
    """Shapes of a GPT-2's parameters."""
    norm = [(width,), (width,)]
    dense = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    layer = norm * 2 + dense + [(rows,) for rows, _ in dense]
    return [(vocabulary, width), (positions, width), *layer * layers, *norm]


CASES = {
    "small": ("a 1M-parameter GPT-2", gpt2(512, 128, 128, 5)),
    "lora": ("LoRA r16 on a 7B model", [(16, 4096), (4096, 16)] * 64),
    "gpt2": ("GPT-2 124M", gpt2(50257, 1024, 768, 12)),
    "1b": ("a 1B-parameter GPT-2", gpt2(50257, 1024, 1536, 34)),
    "7b": ("a 7B-parameter GPT-2", gpt2(50257, 2048, 4096, 33)),
}
ON_A_GPU = ["gpt2", "1b", "7b"]
LOOPS = {
    "1M": gpt2(512, 128, 128, 5),
    "10M": gpt2(2000, 256, 320, 7),
    "30M": gpt2(6000, 512, 512, 8),
    "124M": gpt2(50257, 1024, 768, 12),
}
LARGE = 500_000_000  # parameters from which a model has few rounds
GROWTH = [1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000, 300_000_000, 1_000_000_000]


class Policy(nn.Module):
    """Parameters and nothing else, each with memory of its own."""

    def __init__(self, shapes, dtype, device):
        super().__init__()
        self.weights = nn.ParameterList(torch.full(s, 0.5, dtype=dtype, device=device) for s in shapes)


def count(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


# --------------------------------------------------------------------------------------------- competitors
# Each takes a policy and returns the function of no arguments that is timed. The average is float32, but
# torch's AveragedModel keeps it in the policy's dtype: in bfloat16 it moves fewer bytes, and stands still.


def ours(policy):
    return elastic(policy).update


def elastic(policy):
    from elastic_reset import ElasticReset

    elastic = ElasticReset(policy, decay=DECAY)
    if elastic.backend != "rust" and next(policy.parameters()).device.type == "cpu":
        raise SystemExit("ElasticReset does not use the kernel: build it first (pip install .)")
    return elastic


def staged(policy):
    """The averages in CPU memory, with the copies that a policy on a GPU needs, also if it is on the CPU."""
    import elastic_reset

    elsewhere = elastic_reset.lies_elsewhere
    elastic_reset.lies_elsewhere = lambda p, device: True
    try:
        return elastic_reset.ElasticReset(policy, decay=DECAY, device="cpu")
    finally:
        elastic_reset.lies_elsewhere = elsewhere


def our_staged(policy):
    return staged(policy).update


def copies(policy):
    return [p.detach().float().clone() for p in policy.parameters()]


def flat(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def foreach_lerp(policy):
    ema, params = copies(policy), [p.detach() for p in policy.parameters()]
    return lambda: torch._foreach_lerp_(ema, [p.float() for p in params], 1 - DECAY)


def flat_lerp(policy):
    params = flat(policy)
    ema = params.float().clone()
    return lambda: ema.lerp_(params.float(), 1 - DECAY)


def averaged_model(policy, device=None):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    averaged = AveragedModel(policy, device=device, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return lambda: averaged.update_parameters(policy)


def averaged_model_on_the_cpu(policy):
    return averaged_model(policy, "cpu")


def torch_ema(policy):
    from torch_ema import ExponentialMovingAverage

    params = list(policy.parameters())
    ema = ExponentialMovingAverage(params, DECAY, use_num_updates=False)
    ema.to(dtype=torch.float32)
    return lambda: ema.update(params)


def timm(policy, device=None):
    from timm.utils import ModelEmaV3

    ema = ModelEmaV3(policy, DECAY, device=device, dtype=torch.float32)
    return lambda: ema.update(policy)


def timm_on_the_cpu(policy):
    return timm(policy, "cpu")


def diffusers(policy):
    from diffusers.training_utils import EMAModel

    params = list(policy.parameters())
    ema = EMAModel(params, decay=DECAY, foreach=True)
    ema.to(dtype=torch.float32)
    return torch.no_grad()(lambda: ema.step(params))


def ema_pytorch(policy):
    from ema_pytorch import EMA

    options = {"update_after_step": 0, "update_every": 1, "include_online_model": False, "use_foreach": True}
    ema = EMA(policy, beta=DECAY, coerce_dtype=True, **options)
    ema.ema_model.float()
    return ema.update


UPDATES = {
    "ElasticReset": ours,
    "ElasticReset, staged": our_staged,
    "torch._foreach_lerp_": foreach_lerp,
    "lerp_ on flat buffers": flat_lerp,
    "torch AveragedModel": averaged_model,
    "timm ModelEmaV3": timm,
    "diffusers EMAModel": diffusers,
    "torch_ema": torch_ema,
    "ema-pytorch": ema_pytorch,
}


OFF_THE_GPU = {
    "AveragedModel, on the CPU": averaged_model_on_the_cpu,
    "timm, on the CPU": timm_on_the_cpu,
}


def our_reset(policy):
    return elastic(policy).reset


def our_staged_reset(policy):
    return staged(policy).reset


def two_copies(policy):
    params = flat(policy)
    ema = params.float().clone()
    init = params.clone()
    return lambda: (params.copy_(ema), ema.copy_(init))


def two_foreach_copies(policy):
    params, ema = [p.detach() for p in policy.parameters()], copies(policy)
    init = [p.clone() for p in params]
    return lambda: (torch._foreach_copy_(params, ema), torch._foreach_copy_(ema, init))


IN_A_LOOP = ["ElasticReset", "torch._foreach_lerp_", "lerp_ on flat buffers"]
RESETS = {
    "ElasticReset": our_reset,
    "ElasticReset, staged": our_staged_reset,
    "copy_ twice, flat": two_copies,
    "_foreach_copy_ twice": two_foreach_copies,
}


def limits(bytes_moved: int, device: str) -> dict:
    """Kernels that read two float32 buffers and write one, together as many bytes as a fused update moves."""

    def over(kernel):
        def build(_):
            a, b = (torch.full((bytes_moved // 12,), 0.5, device=device) for _ in range(2))
            return lambda: kernel(a, b)

        return build

    kernels = {
        "limit: add_": lambda a, b: a.add_(b, alpha=0.0),
        "limit: lerp_": lambda a, b: a.lerp_(b, 1 - DECAY),
        "limit: maximum": lambda a, b: torch.maximum(a, b, out=a),
    }
    if device == "cpu":
        from ema_kernel import update

        threads = torch.get_num_threads()
        kernels["limit: ema_kernel"] = lambda a, b: update(a.numpy(), [b.numpy()], DECAY, threads)
    return {name: over(kernel) for name, kernel in kernels.items()}


# ---------------------------------------------------------------------------------------------- measuring


def seconds_of(step, device: str, at_least: float = 0.03) -> float:
    """Seconds a call, over so many calls that they fill a few hundredths of a second."""

    def run(calls):
        started = time.perf_counter()
        for _ in range(calls):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / calls

    run(2)
    calls = max(1, round(at_least / run(1)))
    run(calls)  # until torch's threads, which building the model woke, sleep again or are at work
    return run(calls)


def interleaved(competitors: dict, shapes, dtype, device: str, rounds: int, peaks=None) -> tuple[dict, dict]:
    """Seconds a call of each competitor, one sample a round, and why some have none. `peaks` gets the bytes
    of GPU memory that each takes above the policy."""
    parameters = count(shapes)
    if device == "cpu" and 20 * parameters > (free := status("MemAvailable", "/proc/meminfo")):
        needs = f"needs about {20 * parameters / 1e9:.0f} GB, free are {free / 1e9:.0f}"
        return {}, dict.fromkeys(competitors, needs)
    samples, skipped = {name: [] for name in competitors}, {}
    for turn in range(rounds if parameters < LARGE else min(rounds, 3)):
        order = list(samples)
        random.Random(turn).shuffle(order)
        for name in order:
            try:
                policy = Policy(shapes, dtype, device)
                before = gpu_memory(device)
                step = competitors[name](policy)
                samples[name].append(seconds_of(step, device))
                if peaks is not None and device == "cuda":
                    peaks[name] = torch.cuda.max_memory_allocated() - before
            except (ImportError, torch.OutOfMemoryError) as error:
                skipped[name] = str(error).strip().split("\n")[0]
                del samples[name]
            step = policy = None
            free_memory()
    return samples, skipped


def gpu_memory(device: str) -> int:
    """Bytes of GPU memory in use. The peak is counted from here on."""
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def free_memory() -> None:
    """What glibc keeps of freed memory would look as if it were in use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def compare(what: str, case: str, dtype: str, threads: int, device: str, rounds: int) -> tuple[list, dict]:
    """One table: every competitor on one case, fastest first."""
    torch.set_num_threads(threads)
    title, shapes = CASES[case]
    itemsize = DTYPES[dtype].itemsize
    bytes_moved = count(shapes) * (8 + itemsize if what == "update" else 8 + 2 * itemsize)
    competitors = UPDATES | limits(bytes_moved, device) if what == "update" else RESETS
    if device == "cuda" and what == "update":
        competitors = competitors | OFF_THE_GPU
    peaks = {}
    samples, skipped = interleaved(competitors, shapes, DTYPES[dtype], device, rounds, peaks)
    setting = {"what": what, "case": case, "title": title, "parameters": count(shapes)}
    setting |= {"dtype": dtype, "device": device, "threads": threads}
    rows = ranked(setting, samples, bytes_moved)
    for row in rows:
        row["gpu_bytes_a_parameter"] = peaks.get(row["name"], 0) / count(shapes)
    return rows, skipped


def ranked(setting: dict, samples: dict, bytes_moved: int) -> list[dict]:
    """One row of figures for each competitor, fastest first."""
    seconds = {name: statistics.median(times) for name, times in samples.items()}
    limit = min((seconds[name] for name in seconds if name.startswith("limit")), default=math.nan)
    return [
        setting
        | {"name": name, "seconds": seconds[name], "samples": samples[name]}
        | {"gigabytes_per_second": bytes_moved / seconds[name] / 1e9, "of_limit": limit / seconds[name]}
        for name in sorted(seconds, key=seconds.get)
    ]


def loop(size: str, dtype: str, threads: int, rounds: int) -> list[dict]:
    """One table: an update where it really stands, behind matrix products and an optimizer's step."""
    torch.set_num_threads(threads)
    policy = Policy(LOOPS[size], DTYPES[dtype], "cpu")
    for p in policy.parameters():
        p.grad = torch.full_like(p, 0.01)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    steps = {name: UPDATES[name](policy) for name in IN_A_LOOP}
    samples, batch = {name: [] for name in steps}, torch.randn(512, 512)
    parameters = count(LOOPS[size])
    calls = rounds * max(3, 30_000_000 // parameters)
    for turn in range(calls):
        for name in random.Random(turn).sample(list(steps), len(steps)):
            for _ in range(3):
                batch = (batch @ batch).clamp(-1, 1)  # the forward and backward passes
            optimizer.step()
            started = time.perf_counter()
            steps[name]()
            samples[name].append(time.perf_counter() - started)
    setting = {"what": "loop", "case": size, "title": f"a GPT-2 of {size} in a training loop"}
    setting |= {"parameters": parameters, "dtype": dtype, "device": "cpu", "threads": threads}
    return ranked(setting, samples, parameters * (8 + DTYPES[dtype].itemsize))


def growth(sizes: list[int], threads: int, rounds: int) -> list[dict]:
    """Time a parameter as the model grows."""
    torch.set_num_threads(threads)
    rows = []
    for size in sizes:
        samples, skipped = interleaved({"ElasticReset": ours}, [(size,)], torch.float32, "cpu", rounds)
        if skipped:
            print(f"  {size:>13,} parameters skipped: {skipped['ElasticReset']}")
            continue
        times = samples["ElasticReset"]
        seconds = statistics.median(times)
        rows.append({"parameters": size, "threads": threads, "seconds": seconds, "samples": times})
        print(f"  {size:>13,} parameters {seconds * 1e3:9.3f} ms {seconds / size * 1e9:6.3f} ns each")
    return rows


def status(key: str, path: str = "/proc/self/status"):
    """Bytes from Linux's account of this process or of all memory; elsewhere infinity: nobody knows."""
    if not os.path.exists(path):
        return math.inf
    with open(path) as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def memory(size: int = 100_000_000) -> dict:
    """Bytes a parameter that ElasticReset keeps, and that an update and a reset need for a moment."""
    policy = Policy([(1000, size // 1000)], torch.float32, "cpu")
    before = status("VmRSS")
    average = elastic(policy)
    average.update()
    kept = status("VmRSS") - before
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = status("VmRSS")
    average.update()
    average.reset()
    return {"kept": kept / size, "temporary": (status("VmHWM") - before) / size}


def machine() -> dict:
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__, "decay": DECAY}


# ---------------------------------------------------------------------------------------------- reporting


def show(rows: list[dict], skipped: dict) -> None:
    for name, reason in skipped.items():
        print(f"  {name:24} skipped: {reason}")
    for row in rows:
        of_limit = "" if math.isnan(row["of_limit"]) else f"{row['of_limit']:6.2f} of the limit"
        print(
            f"  {row['name']:24} {row['seconds'] * 1e3:10.3f} ms {row['gigabytes_per_second']:7.1f} GB/s"
            f" {row['seconds'] / rows[0]['seconds']:6.2f} x the fastest {of_limit}{gpu_bytes(row)}"
        )


def gpu_bytes(row: dict) -> str:
    return f" {row['gpu_bytes_a_parameter']:5.2f} B a parameter" if row["device"] == "cuda" else ""


def plot(report: dict, path: str) -> None:
    """Milliseconds of an update of the largest model, in float32 and bfloat16, and the ratio to torch's
    _foreach_lerp_ in a training loop. On the CPU, at the largest number of threads."""
    from matplotlib.figure import Figure

    rows = [row for row in report["results"] if row["what"] != "reset" and row["device"] == "cpu"]
    threads = max(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == threads]
    alone = [row for row in rows if "loop" not in row["title"]]
    largest = [row for row in alone if row["parameters"] == max(row["parameters"] for row in alone)]
    inside = [row for row in rows if "loop" in row["title"]]
    dtypes = list(dict.fromkeys(row["dtype"] for row in largest))
    panels = len(dtypes) + bool(inside)
    figure = Figure(figsize=(1 + 4 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel, dtype in zip(axes, dtypes, strict=False):
        draw_bars(panel, [row for row in largest if row["dtype"] == dtype])
        panel.set_title(f"{largest[0]['title']}, {dtype} policy, alone")
    if inside:
        draw_loop(axes[-1], inside)
    cpu = report["machine"]["cpu"]
    figure.suptitle(f"One update of the average on {cpu}, {threads} threads: less is better")
    figure.savefig(path, dpi=200)


def draw_loop(axes, rows: list[dict]) -> None:
    """The time of ElasticReset over that of _foreach_lerp_, against the size of the model."""
    for dtype, color in zip(
        dict.fromkeys(row["dtype"] for row in rows), ("#0072B2", "#56B4E9"), strict=False
    ):
        own = [row for row in rows if row["dtype"] == dtype]
        seconds = {(row["name"], row["parameters"]): row["seconds"] for row in own}
        sizes = sorted({row["parameters"] for row in own})
        ratios = [seconds["ElasticReset", n] / seconds["torch._foreach_lerp_", n] for n in sizes]
        axes.plot(sizes, ratios, "o-", color=color, linewidth=2, label=f"{dtype} policy")
    axes.axhline(1, color="0.5", linestyle="--", linewidth=1)
    axes.set(xscale="log", ylim=(0, None), xlabel="parameters", ylabel="time, _foreach_lerp_ = 1")
    axes.set_title("ElasticReset in a training loop")
    axes.legend(frameon=False)


def draw_bars(axes, rows: list[dict]) -> None:
    """Milliseconds, the fastest at the top; a dashed line is the time in which memory could do it."""
    peers = [row for row in rows if not row["name"].startswith("limit")][::-1]
    times = [1e3 * row["seconds"] for row in peers]
    colors = ["#0072B2" if row["name"] == "ElasticReset" else "#BBBBBB" for row in peers]
    smaller = ("torch AveragedModel", "bfloat16")  # its average has the policy's precision
    names = [row["name"] + " *" * ((row["name"], row["dtype"]) == smaller) for row in peers]
    axes.bar_label(axes.barh(names, times, color=colors), fmt="%.0f", padding=3)
    limits = [1e3 * row["seconds"] for row in rows if row["name"].startswith("limit")]
    if limits:
        axes.axvline(min(limits), color="black", linestyle="--", linewidth=1)
    axes.set_xlim(0, 1.15 * max(times))
    marked = any(name.endswith(" *") for name in names)
    note = "* keeps a bfloat16 average, of half the size" if marked else ""
    axes.set_xlabel(f"milliseconds (dashed: the limit of memory)\n{note}")


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    parts = [*CASES, "loop", "growth"]
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the policy is (cpu)")
    add(
        "--cases",
        type=lambda text: text.split(","),
        help=f"of {','.join(parts)}; default: what fits the device",
    )
    add("--dtypes", type=lambda text: text.split(","), default=list(DTYPES), help=f"of {','.join(DTYPES)}")
    add("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2], help="such as 1,2")
    add("--rounds", type=int, default=11, help="samples of each competitor")
    add("--largest", type=int, default=GROWTH[-1], help="parameters at which the series of sizes ends")
    add("--json", metavar="FILE", help="write every sample")
    add("--plot", metavar="FILE", help="draw the updates on the CPU")
    add("--read", metavar="FILE", help="take figures written by --json instead of measuring")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU that torch can use")
    args.cases = args.cases or (
        ON_A_GPU if args.device == "cuda" else [part for part in parts if part != "7b"]
    )
    for given, known in (("cases", parts), ("dtypes", DTYPES)):
        if odd := set(getattr(args, given)) - set(known):
            parser.error(f"unknown --{given} {','.join(sorted(odd))}; choose of {','.join(known)}")
    if min(args.threads) < 1 or args.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    return args


def tables(args, report: dict) -> None:
    device = args.device
    for threads in args.threads if device == "cpu" else [max(args.threads)]:
        cases = [case for case in args.cases if case in CASES]
        for case, dtype, what in itertools.product(cases, args.dtypes, ("update", "reset")):
            title, shapes = CASES[case]
            print(f"\n{what}, {title} ({count(shapes):,} parameters), ", end="")
            print(f"{dtype} policy, {device}, {threads} thread(s)")
            rows, skipped = compare(what, case, dtype, threads, device, args.rounds)
            report["results"] += rows
            report["skipped"] |= {f"{name}, {case}": reason for name, reason in skipped.items()}
            show(rows, skipped)


def loops(args, report: dict) -> None:
    threads = max(args.threads)
    for size, dtype in itertools.product(LOOPS, args.dtypes):
        if (parameters := count(LOOPS[size])) > args.largest:
            continue
        print(f"\nupdate, a GPT-2 of {size} in a training loop ({parameters:,} parameters), ", end="")
        print(f"{dtype} policy, cpu, {threads} thread(s)")
        rows = loop(size, dtype, threads, args.rounds)
        report["results"] += rows
        show(rows, {})


def commit() -> str | None:
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None


def measure(args) -> dict:
    report = {"command": ["ema_kernel/bench.py", *sys.argv[1:]], "commit": commit()}
    report |= {"machine": machine(), "results": [], "skipped": {}}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items() if value is not None))
    if os.path.exists("/proc/self/clear_refs"):
        used = report["bytes_a_parameter"] = memory()
        print(f"\nbytes a parameter: {used['kept']:.2f} kept, {used['temporary']:.2f} for a moment")
    tables(args, report)
    if "loop" in args.cases and args.device == "cpu":
        loops(args, report)
    if "growth" in args.cases and args.device == "cpu":
        threads = max(args.threads)
        print(f"\nElasticReset.update() as the model grows, float32, {threads} thread(s)")
        report["growth"] = growth([n for n in GROWTH if n <= args.largest], threads, args.rounds)
    return report


def main():
    args = parse()
    if args.read:
        with open(args.read) as file:
            report = json.load(file)
    else:
        report = measure(args)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)
    if args.plot:
        plot(report, args.plot)


if __name__ == "__main__":
    main()
