"""Records what TRL's PPO computes in one update of a tiny model: tests/trl_reference.safetensors.

    python tests/trl_reference.py

makes a temporary virtual environment with TRL 1.12.0 (the last with PPO, in trl.experimental.ppo), runs its
PPOTrainer in it and copies the tensors of the loop. test_trl_reference.py compares ours with them.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

FIGURES = Path(__file__).with_suffix(".safetensors")
PACKAGES = (
    "trl==1.12.0 torch==2.15.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.4.6".split()
)

SEED, BATCH, VOCABULARY, PAD, EOS = 37, 8, 12, 0, 1
GPT2 = dict(
    vocab_size=VOCABULARY, n_positions=12, n_embd=8, n_layer=1, n_head=2, pad_token_id=PAD, eos_token_id=EOS
)
GPT2 |= dict(bos_token_id=None, initializer_range=0.4, tie_word_embeddings=False)
GPT2 |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)

SETTINGS = dict(
    kl_coef=0.15, cliprange=0.2, cliprange_value=0.2, vf_coef=0.5, temperature=0.7, learning_rate=0.1
)
SETTINGS |= dict(response_length=8, num_ppo_epochs=2, num_mini_batches=2)
RUNS = {
    "full": dict(stop_token=None, gamma=0.9, lam=0.8),  # EOS is a token like others: no response ends early
    "ended": dict(stop_token="eos", gamma=0.9, lam=0.8),
    "undiscounted": dict(stop_token="eos", gamma=1.0, lam=1.0),
}
# SGD: Adam's first steps blow rounding errors up to whole steps where a gradient is near 0.
PLAIN = dict(
    optim="sgd", lr_scheduler_type="constant", weight_decay=0.0, bf16=False, gradient_checkpointing=False
)
PLAIN |= dict(use_cpu=True, report_to="none", save_strategy="no", num_sample_generations=0, seed=SEED)
PLAIN |= dict(total_episodes=BATCH, per_device_train_batch_size=BATCH)

ROLLOUT = "queries responses scores logprobs ref_logprobs values rewards advantages returns".split()
MINIBATCH = "micro_batch_inds new_logprobs vpred logits ratio pg_loss vf_loss loss".split()
STATISTICS = "approxkl_stats pg_clipfrac_stats vf_clipfrac_stats entropy_stats".split()


def main():
    if "--inside" in sys.argv:
        return record()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "Scripts" if os.name == "nt" else "bin", "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        environment = os.environ | dict(TRL_EXPERIMENTAL_SILENCE="1", CUDA_VISIBLE_DEVICES="")
        subprocess.run([python, __file__, "--inside"], check=True, env=environment)
    print(f"wrote {FIGURES} ({FIGURES.stat().st_size // 1024} KB)")


def record():
    from safetensors.torch import save

    figures = weights(tiny_models(), "policy", "reference", "value")
    for run, own in RUNS.items():
        figures |= {f"{run}/{name}": tensor for name, tensor in one_update(**SETTINGS, **own).items()}
    check_cases(figures)
    versions = {package.split("==")[0]: version(package.split("==")[0]) for package in PACKAGES}
    about = dict(versions=versions, gpt2=GPT2, settings={run: SETTINGS | own for run, own in RUNS.items()})
    FIGURES.write_bytes(save(figures, {"about": json.dumps(about)}))


def check_cases(figures):
    """The responses of "ended" must be of every kind; if they are not, another SEED is needed."""
    lengths, ended = figures["ended/mask"].sum(1), (figures["ended/responses"] == EOS).any(1)
    longest = lengths == SETTINGS["response_length"]
    kinds = dict(
        at_once=lengths == 1, early=~longest, by_the_last_token=longest & ended, cut_off=longest & ~ended
    )
    missing = [kind for kind, rows in kinds.items() if not rows.any()]
    assert not missing, f"with SEED = {SEED} no response ends {missing}"


def tiny_models():
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    torch.manual_seed(SEED)
    config = GPT2Config(**GPT2, num_labels=1)
    policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    with torch.no_grad():  # near the policy but not the policy, so that there is a KL
        for p, r in zip(policy.parameters(), reference.parameters(), strict=True):
            r.copy_(p + 0.1 * torch.randn_like(p))
    for model in (policy, reference):
        model.register_forward_hook(never_pad)
    value, reward = GPT2ForSequenceClassification(config), GPT2ForSequenceClassification(config)
    return dict(policy=policy, reference=reference, value=value, reward=reward)


def never_pad(model, inputs, output):
    """TRL would sample padding inside a response, and take it for the response's end."""
    output.logits[..., PAD] = -1e9


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    special = dict(pad_token=f"w{PAD}", eos_token=f"w{EOS}", padding_side="left")
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def prompts():
    from datasets import Dataset

    return Dataset.from_list(
        [{"input_ids": [2 + (3 * i + j) % 10 for j in range(2 + i % 3)]} for i in range(BATCH)]
    )


def one_update(**settings):
    """The tensors of one PPOTrainer.train()."""
    from transformers import set_seed
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    models = tiny_models()
    set_seed(SEED)  # PPOTrainer seeds torch, but shuffles its minibatches with NumPy
    recording = Recording(ppo_trainer.masked_whiten)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(output_dir=folder, **PLAIN, **settings),
            processing_class=tokenizer(),
            model=models["policy"],
            ref_model=models["reference"],
            reward_model=models["reward"],
            value_model=models["value"],
            train_dataset=prompts(),
        )
        trainer.accelerator.backward, trainer.log = recording.backward, recording.log
        with patch.object(ppo_trainer, "masked_whiten", recording.whiten):
            trainer.train()
    after = {f"after/{name}": tensor for name, tensor in weights(models, "policy", "value").items()}
    return recording.rollout | recording.stacked_minibatches() | after


class Recording:
    """Stands in for functions that PPOTrainer.train() calls, and copies its local variables at each call."""

    def __init__(self, masked_whiten):
        self.masked_whiten = masked_whiten
        self.rollout, self.minibatches = {}, []

    def whiten(self, advantages, mask):
        self.rollout |= dict(unwhitened_advantages=copy_of(advantages), mask=copy_of(mask))
        return self.masked_whiten(advantages, mask)

    def backward(self, loss):
        train = sys._getframe(1).f_locals
        self.rollout |= {name: copy_of(train[name]) for name in ROLLOUT}
        self.rollout |= dict(
            sampling_logits=copy_of(train["logitss"]), mask_p1=copy_of(~train["padding_mask_p1"])
        )
        self.minibatches.append({name: copy_of(train[name]) for name in MINIBATCH})
        loss.backward()

    def log(self, metrics):
        train = sys._getframe(1).f_locals
        self.rollout |= {name: copy_of(train[name].flatten()) for name in STATISTICS}

    def stacked_minibatches(self):
        """In the order of the optimizer's steps."""
        import torch

        return {name: torch.stack([m[name] for m in self.minibatches]) for name in MINIBATCH}


def copy_of(array):
    import torch

    return torch.as_tensor(array).detach().clone(memory_format=torch.contiguous_format)


def weights(models, *roles):
    return {
        f"{role}/{name}": copy_of(tensor)
        for role in roles
        for name, tensor in models[role].state_dict().items()
    }


if __name__ == "__main__":
    main()
