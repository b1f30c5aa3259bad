"""How fast is a PPO update on the CPU, and how much memory does it take, next to TRL's PPOTrainer?

    python tests/trl_speed.py --json speed.json

installs TRL 1.12.0 (the last with PPO, in trl.experimental.ppo) into a virtual environment of its own, which
later calls use again, with the torch and the transformers of the Python that runs this program. It then
measures, in rounds, our train() with a value head, our train() with a value model (as TRL has) and TRL. With
--model FOLDER it measures with the decoder in FOLDER, else with a small GPT-2 of each --vocabulary.

All three do the same work: they sample --batch responses of exactly 32 tokens to prompts of 16 tokens, score
them by counting tokens, and make 4 passes over them, in 2 minibatches each. Model, precision, loss, learning
rate and KL coefficient are the same. Each program's own ways stay as they are. TRL takes the
log-probabilities of the sampled tokens from generate() and has a reference model. Ours takes them from a
forward pass, runs the reference with weights that it keeps anyway, clips the gradient and keeps the EMA.

Each measurement is a process of its own, so that its peak of memory is its own. The first update is not
counted. Speed is in response tokens a second, sampling included. The figures are medians over the rounds.
"""

import argparse
import importlib
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from importlib.metadata import version
from pathlib import Path

TRL = "1.12.0"
SHARED = "torch transformers accelerate tokenizers numpy".split()  # of one version on either side

PROMPT, RESPONSE, EPOCHS, MINIBATCHES = 16, 32, 4, 2
PAD, EOS = 0, 1
GPT2 = dict(n_positions=PROMPT + RESPONSE, n_embd=256, n_layer=4, n_head=4)
GPT2 |= dict(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None)
GPT2 |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
SETTINGS = dict(num_ppo_epochs=EPOCHS, response_length=RESPONSE, temperature=1.0, learning_rate=1e-5)
SETTINGS |= dict(kl_coef=0.05, gamma=1.0, lam=0.95, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1)
FIGURES = {"speed": "tokens/s", "peak": "peak, MB", "above_imports": "above imports, MB"}
PROGRAMS = {"head": "ours, value head", "model": "ours, value model", "trl": f"TRL {TRL}"}


def main():
    args = flags()
    if args.measure:
        print(json.dumps(measure(args.measure, args.vocabulary[0], args)))
        return
    if args.model:
        args.vocabulary = [language_model(0, args).config.vocab_size]
    pythons = dict.fromkeys(PROGRAMS, sys.executable) | dict(trl=trl_python(args.environment))
    cases = list(itertools.product(args.vocabulary, PROGRAMS))
    runs = {case: [] for case in cases}
    for _, (vocabulary, program) in itertools.product(range(args.rounds), cases):
        runs[vocabulary, program].append(measured_apart(pythons[program], program, vocabulary, args))
    results = [summary(*case, runs[case]) for case in cases]
    print(table(results))
    if args.json:
        about = dict(versions=versions(*SHARED), trl=TRL, threads=args.threads, updates=args.updates)
        about |= dict(batch=args.batch, prompt=PROMPT, minibatches=MINIBATCHES, settings=SETTINGS)
        about["model"] = str(args.model) if args.model else GPT2
        args.json.write_text(json.dumps(about | dict(results=results), indent=2) + "\n")


def flags():
    here, cache = Path(__file__).resolve(), Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--file", type=Path, default=here.parents[1] / "elastic_reset.py", help="what to measure of ours")
    add("--environment", type=Path, default=cache / "elastic_reset" / f"trl-{TRL}", help="TRL's folder")
    add("--vocabulary", type=int, nargs="+", default=[2000, 32000], help="sizes to measure with")
    add("--model", type=Path, help="a decoder's folder, to measure with it and its vocabulary")
    add("--batch", type=int, default=64, help="responses of an update")
    add("--rounds", type=int, default=3, help="measurements of each program")
    add("--updates", type=int, default=4, help="PPO updates counted in a measurement")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads that torch uses")
    add("--json", type=Path, help="write the figures there")
    add("--measure", choices=PROGRAMS, help="measure that once, in this process (used by the program itself)")
    args = parser.parse_args()
    if min(args.rounds, args.updates, args.threads, args.batch) < 1:
        parser.error("--rounds, --updates, --threads and --batch: expected 1 or more")
    if args.batch % MINIBATCHES:
        parser.error(f"--batch is {args.batch}; expected a multiple of {MINIBATCHES}")
    return args


def trl_python(folder):
    """The Python of an environment with TRL, which is made if it is not there."""
    programs = folder.resolve() / "bin"
    if not (programs / "pip").exists():
        print(f"installing TRL {TRL} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
    packages = [f"trl=={TRL}"] + [f"{name}=={number}" for name, number in versions(*SHARED).items()]
    install = [programs / "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    if subprocess.run(install, check=False).returncode:  # does nothing when all is there
        sys.exit(f"TRL {TRL} cannot be installed into {folder}, see above")
    return programs / "python"


def versions(*packages):
    return {package: version(package) for package in packages}


def measured_apart(python, program, vocabulary, args):
    """What measure() returns in a process of that Python, on the CPU."""
    words = ["--measure", program, "--vocabulary", vocabulary, "--updates", args.updates]
    words += ["--threads", args.threads, "--file", args.file.resolve(), "--batch", args.batch]
    if args.model:
        words += ["--model", args.model.resolve()]
    environment = os.environ | dict(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true")
    command = [python, __file__, *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\n{PROGRAMS[program]} failed with a vocabulary of {vocabulary}, see above")
    return json.loads(done.stdout.splitlines()[-1])


def summary(vocabulary, program, runs):
    """One row of the table: the medians, with the single figures beside them."""
    medians = {name: statistics.median(run[name] for run in runs) for name in FIGURES}
    return dict(vocabulary=vocabulary, program=program, **medians, runs=runs)


def table(results):
    trl = {row["vocabulary"]: row for row in results if row["program"] == "trl"}
    heads = ["vocabulary", "program"] + [f"{title} | TRL = 1" for title in FIGURES.values()]
    lines = [f"| {' | '.join(heads)} |", "|--:|---|--:|--:|--:|--:|--:|--:|"]
    for row in results:
        cells = [f"{row['vocabulary']:,}", PROGRAMS[row["program"]]]
        for name in FIGURES:
            cells += [f"{row[name]:,.0f}", f"{row[name] / trl[row['vocabulary']][name]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# What follows runs in the measuring processes.


def measure(program, vocabulary, args):
    """Response tokens a second, and the peak of memory in MB, of --updates updates after a first one."""
    import torch

    torch.set_num_threads(args.threads)
    tokenizer(8), gpt2(8)  # transformers imports late
    run = ready_trl(args) if program == "trl" else ready_ours(args, separate_value_model=program == "model")
    imported, clock = peak_memory(), Clock()
    run(vocabulary, args.updates + 2, clock)
    seconds = seconds_of_updates(clock.times, looked_at_ends=program == "trl")[: args.updates]
    speed = args.updates * args.batch * RESPONSE / sum(seconds)
    figures = dict(speed=speed, seconds=seconds, peak=clock.peak)
    return figures | dict(above_imports=clock.peak - imported, rewards=clock.rewards)


def seconds_of_updates(times, looked_at_ends):
    """What each update took, from the second one on. Ours looks at the clock as an update begins, TRL as one
    ends, so that its first interval is the second update."""
    intervals = [after - before for before, after in itertools.pairwise(times)]
    return intervals if looked_at_ends else intervals[1:]


class Clock:
    """Looked at once an update, always at the same place."""

    def __init__(self):
        self.times, self.peak, self.rewards = [], 0.0, []

    def look(self):
        self.times.append(time.perf_counter())
        self.peak = peak_memory()


def peak_memory():
    """The most memory that this process has had, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def gpt2(vocabulary, kind="GPT2LMHeadModel", **settings):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=vocabulary, **GPT2, **settings)
    return getattr(transformers, kind)(config)


def language_model(vocabulary, args, kind="GPT2LMHeadModel", auto="AutoModelForCausalLM", **settings):
    """The decoder of --model, with the padding and end of our tokenizer, or else a small GPT-2."""
    import torch
    import transformers

    if not args.model:
        return gpt2(vocabulary, kind, **settings)
    torch.manual_seed(0)
    ends = dict(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None)
    model = getattr(transformers, auto).from_pretrained(args.model, dtype=torch.float32, **ends, **settings)
    model.generation_config = transformers.GenerationConfig(**ends)
    return model


def tokenizer(vocabulary):
    """A word is w and its token's number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, vocabulary)}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def prompts(n, vocabulary, seed):
    """`n` prompts of odd tokens. A response's reward is its share of even ones."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocabulary, 2) for _ in range(PROMPT)] for _ in range(n)]


def ready_ours(args, **settings):
    """Return run(vocabulary, updates, clock), which trains with our train()."""
    import accelerate  # noqa: F401  train() would import it itself, after the memory of imports is taken

    sys.path.insert(0, str(args.file.parent))
    elastic_reset = importlib.import_module(args.file.stem)

    def run(vocabulary, updates, clock):
        own = settings | dict(batch_size=args.batch, mini_batch_size=args.batch // MINIBATCHES)
        own |= dict(min_response_length=RESPONSE)  # no EOS before it
        own |= dict(updates=updates, eval_every=updates, save_every=updates, output_dir="run")
        config = elastic_reset.configure(method="ppo-kl", **SETTINGS, **own)
        elastic_reset.train(config, task=Counting(vocabulary, clock, args))

    return run


class Counting:
    """Our side's task. An update begins with a call of prompts()."""

    validation_prompts = ["w3 w5"]

    def __init__(self, vocabulary, clock, args):
        self.vocabulary, self.clock = vocabulary, clock
        self.policy, self.tokenizer = language_model(vocabulary, args), tokenizer(vocabulary)

    def prompts(self, n, update):
        self.clock.look()
        return [" ".join(f"w{token}" for token in row) for row in prompts(n, self.vocabulary, update)]

    def reward(self, prompts, responses):
        tokens = [[int(word[1:]) for word in text.split()] for text in responses]
        assert {len(row) for row in tokens} == {RESPONSE}, "a response is shorter than the others"
        rewards = [sum(token % 2 == 0 for token in row) / RESPONSE for row in tokens]
        self.clock.rewards.append(statistics.mean(rewards))
        return rewards

    def evaluate(self, responses):
        return dict(reward=0.0, drift=0.0)


def ready_trl(args):
    """Return run(vocabulary, updates, clock), which trains with TRL's PPOTrainer."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from transformers.modeling_outputs import BaseModelOutput
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class CountingModel(torch.nn.Module):
        """Plays a reward model. Its state is the share of even tokens so far: the last one is the reward."""

        base_model_prefix, score = "counter", torch.nn.Identity()

        def __init__(self):
            super().__init__()
            self.counter = self.count

        def count(self, input_ids, **_):
            counts = (input_ids % 2 == 0).cumsum(1).unsqueeze(-1)
            return BaseModelOutput(hidden_states=(counts / RESPONSE,))

    class Watch(TrainerCallback):
        """Looks at the clock at the end of each update."""

        def __init__(self, clock):
            self.clock = clock

        def on_log(self, args, state, control, logs, **_):
            self.clock.rewards.append(logs["objective/scores"])

        def on_step_end(self, *_, **__):
            self.clock.look()

    def run(vocabulary, updates, clock):
        plain = dict(bf16=False, gradient_checkpointing=False, use_cpu=True, output_dir="run")
        plain |= dict(report_to="none", save_strategy="no", disable_tqdm=True, num_sample_generations=0)
        plain |= dict(lr_scheduler_type="constant", weight_decay=0.0, num_mini_batches=MINIBATCHES)
        plain |= dict(per_device_train_batch_size=args.batch, local_rollout_forward_batch_size=args.batch)
        plain |= dict(total_episodes=args.batch * updates)
        rows = [row for update in range(updates) for row in prompts(args.batch, vocabulary, update)]
        kind = dict(kind="GPT2ForSequenceClassification", auto="AutoModelForSequenceClassification")
        trainer = PPOTrainer(
            args=PPOConfig(**plain, **SETTINGS),
            processing_class=tokenizer(vocabulary),
            model=language_model(vocabulary, args),
            ref_model=None,  # a copy of the model
            reward_model=CountingModel(),
            value_model=language_model(vocabulary, args, **kind, num_labels=1),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            callbacks=[Watch(clock)],
        )
        trainer.train()

    return run


if __name__ == "__main__":
    main()
