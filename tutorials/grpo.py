"""TRL's GRPO on the model of real_model.py, with resets and without.

    pip install 'trl>=1.10'
    python tutorials/real_model.py runs/real
    python tutorials/grpo.py runs/real --output_dir runs/grpo
    python tutorials/grpo.py runs/real --output_dir runs/grpo_without --reset none --mixtures 4

The classifier of FOLDER pays, as in `--task imdb`. There is no KL penalty (beta is 0, as by default in TRL).
Every --reset_every steps, and just after each reset, the policy is evaluated on held-out prompts. DIR gets
evaluations.json (what was found, with perplexities and the first texts), log.json (what the trainer logs at
each step) and checkpoints. With --resume it goes on from the last checkpoint in DIR. With --mixtures 4 the
weights theta_0 + eta (theta - theta_0) of start and end are evaluated too, for eta 0.2, 0.4, 0.6, 0.8."""

import importlib.util
import json
import resource
import sys
from pathlib import Path

import torch
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import elastic_reset
from elastic_reset import ActorCritic, ElasticResetCallback, MockSentiment, configure, write_text
from tutorials.real_model import REVIEWS, new_parser


class Evaluations(TrainerCallback):
    """Evaluates the policy every so many steps: reward, and KL to the start in nats per response."""

    def __init__(self, task, averages, every, lines, path, event=""):
        self.task = task
        self.averages = averages  # an ElasticResetCallback
        self.every = every
        self.lines = lines  # what was found is added there
        self.path = path  # of the file that keeps the lines
        self.event = event

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0 and not self.event:
            self.evaluate(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.evaluate(state.global_step)

    def evaluate(self, step):
        task = self.task
        was_training = task.policy.training
        task.policy.eval()
        with torch.random.fork_rng():  # the trainer draws the same numbers as without an evaluation
            model = ActorCritic(task.policy, min_response_length=task.config.min_response_length)
            metrics = elastic_reset.evaluate(task, model, self.averages.elastic, task.config)
        task.policy.train(was_training)
        line = dict(step=step, event=self.event)
        line |= {name: metrics[name] for name in ("reward", "kl", "human_perplexity")}
        line["samples"] = metrics["samples"]["continuation"][:3]
        self.lines.append(line)
        write_text(self.path, json.dumps(dict(lines=self.lines), indent=1))
        print(f"step {step} {self.event}: reward {line['reward']:.3f}, KL {line['kl']:.2f}")


class Bar(ProgressCallback):
    """The trainer's progress bar, without a line for each step: these go to log.json."""

    on_log = TrainerCallback.on_log


def lines_until_checkpoint(args):
    """Return the evaluations of an interrupted run up to its last checkpoint."""
    last = get_last_checkpoint(args.output_dir)
    if last is None:
        raise ValueError(f"--resume: there is no checkpoint in {args.output_dir}")
    step = int(last.rpartition("-")[2])
    lines = json.loads((args.output_dir / "evaluations.json").read_text(encoding="utf-8"))["lines"]
    return [line for line in lines if line["step"] <= step and not line["event"].startswith("eta")]


def evaluate_mixtures(at_end, elastic, n):
    """Evaluate n mixtures of the policy's weights and the start's, a line for each."""
    last = [p.detach().clone() for p in elastic.params]
    for k in range(1, n + 1):
        eta = k / (n + 1)  # the share of the end
        mixture = [torch.lerp(start.to(own), own, eta) for start, own in zip(elastic.init, last, strict=True)]
        at_end.event = f"eta {eta:.2f}"
        with elastic.holding(mixture):
            at_end.evaluate(elastic.updates)


def train(args):
    """Train as the arguments say. Returns the evaluations."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    lines = lines_until_checkpoint(args) if args.resume else []
    config = configure(
        "imdb",
        model=f"{args.folder}/policy",
        language_model=f"{args.folder}/policy",
        reward_model=f"{args.folder}/classifier",
        data=args.reviews,
        validation_data=f"{args.reviews}:{args.held_out}",
        prompt_length=args.prompt_length,
        response_length=args.response_length,
        min_response_length=args.response_length,
        eval_size=args.eval_size,
    )
    task = MockSentiment(config)

    def positive(prompts, completions, **kwargs):
        return task.reward(prompts, completions)

    decay = args.share ** (1 / args.reset_every)
    averages = ElasticResetCallback(decay=decay, reset_every=args.reset_every, reset=args.reset)
    shared = (task, averages, args.reset_every, lines, args.output_dir / "evaluations.json")
    callbacks = [Evaluations(*shared), averages]
    if args.reset != "none":
        callbacks.append(Evaluations(*shared, event="after reset"))
    arguments = GRPOConfig(
        str(args.output_dir),
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=args.batch_size,
        num_generations=args.num_generations,
        max_completion_length=args.response_length,
        generation_kwargs=dict(min_new_tokens=args.response_length),
        gradient_checkpointing=False,
        bf16=torch.accelerator.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=1,
        save_steps=args.save_steps,
        report_to="none",
        seed=args.seed,
    )
    prompts = task.prompts(args.steps * args.batch_size // args.num_generations, args.seed)
    trainer = GRPOTrainer(
        task.policy,
        args=arguments,
        reward_funcs=positive,
        processing_class=task.tokenizer,
        train_dataset=Dataset.from_list([dict(prompt=prompt) for prompt in prompts]),
        callbacks=callbacks,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    trainer.train(resume_from_checkpoint=args.resume or None)
    evaluate_mixtures(Evaluations(*shared), averages.elastic, args.mixtures)
    log = trainer.state.log_history
    seconds = sum(line.get("step_time", 0.0) for line in log)  # without evaluations
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gigabytes = peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
    print(f"{seconds:.0f} seconds for the steps, {gigabytes:.1f} GB at the most")
    about = dict(command=sys.argv, seconds=seconds, gigabytes=gigabytes)
    write_text(args.output_dir / "evaluations.json", json.dumps(about | dict(lines=lines), indent=1))
    write_text(args.output_dir / "log.json", json.dumps(log, indent=1))
    return lines


def parse(argv):
    flags = new_parser("grpo.py", __doc__)
    add = flags.add_argument
    add("folder", metavar="FOLDER", type=Path, help="with policy and classifier, made by real_model.py")
    add("--output_dir", metavar="DIR", type=Path, default=Path("runs/grpo"), help="(runs/grpo)")
    add("--reset", choices=("elastic", "none"), default="elastic", help="(elastic)")
    add("--reset_every", type=int, default=50, help="steps between resets, and between evaluations (50)")
    add("--share", type=float, default=0.6, help="the start's share of a reset (0.6)")
    add("--mixtures", type=int, default=0, help="how many mixtures with the start to evaluate at the end (0)")
    add("--steps", type=int, default=200, help="optimizer steps (200)")
    add("--batch_size", type=int, default=16, help="completions per step (16)")
    add("--num_generations", type=int, default=8, help="completions per prompt (8)")
    add("--learning_rate", type=float, default=5e-5, help="(5e-5)")
    add("--prompt_length", type=int, default=8, help="tokens of a review (8)")
    add("--response_length", type=int, default=24, help="tokens of each completion (24)")
    add("--eval_size", type=int, default=200, help="held-out prompts to evaluate on (200)")
    add("--save_steps", type=int, default=100, help="steps between checkpoints (100)")
    add("--reviews", default=REVIEWS, help=f"hub name or folder, with text and label ({REVIEWS})")
    add("--held_out", default="test", help="the split of reviews to evaluate on (test)")
    add("--seed", type=int, default=0, help="of sampling and data order (0)")
    add("--resume", action="store_true", help="go on from the last checkpoint in DIR")
    args = flags.parse_args(argv)
    if importlib.util.find_spec("trl") is None:
        raise ValueError("the package trl is missing: pip install 'trl>=1.10'")
    if args.reset_every < 1 or args.steps < 1:
        raise ValueError("--reset_every and --steps: expected 1 or more")
    if args.mixtures < 0:
        raise ValueError(f"--mixtures is {args.mixtures}; expected 0 or more")
    if not 0 <= args.share <= 1:
        raise ValueError(f"--share is {args.share}; expected 0 to 1")
    if args.num_generations < 2 or args.batch_size % args.num_generations:
        raise ValueError("--batch_size: expected a multiple of --num_generations, which is 2 or more")
    return args


def main(argv=None) -> int:
    """The command line; exit codes as those of elastic_reset.py."""
    return elastic_reset.exit_code("grpo.py", lambda: train(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
