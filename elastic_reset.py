# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "numpy>=1.26", "transformers>=5.0", "tokenizers>=0.22", "datasets>=4.0",
#     "accelerate>=1.10", "safetensors>=0.5", "sacrebleu>=2.5", "sentencepiece>=0.2", "matplotlib>=3.8",
#     "tqdm>=4.66", "pyyaml>=6.0",
# ]
# ///
"""Elastic Reset: fine-tune a language model with PPO and keep its language. One file, read from the top.

The method (Noukhovitch, Lavoie, Strub, Courville: "Language Model Alignment with Elastic Reset", NeurIPS
2023, arXiv 2312.07551). theta: the policy's weights; theta_0: those it starts with; theta_bar: their average.

    theta_bar <- theta_0
    for update = 1, 2, ...:
        theta     <- one PPO update of theta, on responses that theta has just sampled
        theta_bar <- decay * theta_bar + (1 - decay) * theta           # the EMA
        every n updates:                                               # the reset
            theta     <- theta_bar
            theta_bar <- theta_0

The loss is PPO's and stays so. The value head and the optimizer's moments live through a reset.

Run it:   python elastic_reset.py --task translation       (offline, minutes on two CPU cores; see --help)
Copy it:  room 1 needs nothing but torch; `elastic.step()` after `optimizer.step()` is all it asks for.

Rooms: 1 Elastic Reset, 2 PPO, 3 Tasks, 4 Training, 5 Trade-off, 6 Files, 7 Data and models, 8 Command line.
"""

import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Literal, Protocol, get_origin

import torch
import torch.nn.functional as F
from torch import nn

try:
    import ema_kernel
except ImportError:  # not built: averages take the torch._foreach path
    ema_kernel = None


# ============================================ 1. Elastic Reset ============================================

RESET_RULES = {  # rule: what the policy becomes, what the EMA becomes
    "elastic": ("ema", "init"),  # the paper's
    "ema": ("ema", "ema"),  # its ablation "reset to EMA"; also Hare & Tortoise, Switch EMA
    "init": ("init", "ema"),  # its ablation "reset to init"
    "none": ("policy", "ema"),  # plain RL
}


class ElasticReset:
    """The moving average of a policy's weights, and the reset of the policy to it (the paper's section 3).

        elastic = ElasticReset(model, decay=0.995, reset_every=17)
        ...
        optimizer.step()
        elastic.step()

    `model` is a module or an iterable of parameters. Those with `requires_grad` are averaged and reset, tied
    ones once; frozen ones and buffers never. `ema` and `init` are lists of tensors shaped like `params`, in
    float32 (float64 for float64): a bfloat16 average with decay 0.995 would be rounded back to where it was.

    `backend` is "rust" if all parameters are plain CPU tensors and the extension `ema_kernel` is built; they,
    `ema` and `init` are then views of one flat buffer a dtype, which the kernel passes over once. Otherwise
    it is "foreach", torch's operations on lists. DTensors (FSDP2) are averaged shard by shard, without
    communication.

    Raises ValueError for a decay outside [0, 1], a reset_every below 1, an unknown reset or nothing to train;
    TypeError for things that are no parameters.
    """

    def __init__(self, model, decay: float = 0.995, reset_every: int = 17, reset: str = "elastic"):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; expected a number from 0 to 1, such as 0.995")
        if reset_every < 1 or reset_every != int(reset_every):
            raise ValueError(f"reset_every is {reset_every}; expected a whole number of updates, 1 or more")
        if reset not in RESET_RULES:
            raise ValueError(f"reset is {reset!r}; expected one of {', '.join(RESET_RULES)}")
        self.decay, self.reset_every, self.rule = decay, int(reset_every), reset
        self.names, self.params, self._owners = _trainable(model)
        self.init = [_average_like(p, _local(p)).clone() for p in self.params]
        self.ema = [i.clone() for i in self.init]
        self.updates = self.resets = 0
        self._attach()

    @property
    def backend(self) -> str:
        return "rust" if self._flat else "foreach"

    @torch.no_grad()
    def step(self) -> bool:
        """update(), and reset() every `reset_every`-th time. Call after each step. True if it reset."""
        self.update()
        due = self.rule != "none" and self.updates % self.reset_every == 0
        if due:
            self.reset()
        return due

    @torch.no_grad()
    def update(self) -> None:
        """ema <- decay * ema + (1 - decay) * policy"""
        self._follow()
        self.updates += 1
        if not self._flat:
            policy = [_average_like(p, _local(p)) for p in self.params]
            torch._foreach_lerp_(self.ema, policy, 1 - self.decay)
        for policy, ema, _ in self._flat:
            ema_kernel.update(_numpy(ema), _numpy(policy), self.decay, torch.get_num_threads())

    @torch.no_grad()
    def reset(self) -> None:
        """policy <- ema, rounded once to the policy's dtype; ema <- init. Other rules: see RESET_RULES."""
        self._follow()
        self.resets += 1
        if self._flat and self.rule == "elastic":
            for policy, ema, init in self._flat:
                ema_kernel.reset(_numpy(policy), _numpy(ema), _numpy(init), torch.get_num_threads())
            return
        policy = [_local(p) for p in self.params]
        weights = {"policy": policy, "ema": self.ema, "init": self.init}
        policy_becomes, ema_becomes = (weights[source] for source in RESET_RULES[self.rule])
        torch._foreach_copy_(policy, policy_becomes)
        torch._foreach_copy_(self.ema, ema_becomes)

    @contextlib.contextmanager
    def averaged(self):
        """In `with elastic.averaged():` the policy has the EMA's weights; then its own, come what may."""
        with self.holding(self.ema):
            yield

    @contextlib.contextmanager
    def holding(self, weights: list[torch.Tensor]):
        """averaged() for any weights listed like `params`."""
        self._follow()
        own = [_local(p).detach().clone() for p in self.params]
        try:
            self._set_policy(weights)
            yield
        finally:
            self._set_policy(own)

    @torch.no_grad()
    def _set_policy(self, weights) -> None:
        self._follow()
        torch._foreach_copy_([_local(p) for p in self.params], weights)

    def by_name(self, weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """`weights`, listed like `params`, by name and in the policy's dtypes, for functional_call."""
        self._follow()
        return {n: w.to(p.dtype) for n, p, w in zip(self.names, self.params, weights, strict=True)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`ema.<name>`, `init.<name>` and the counters `updates`, `resets`, as tensors for safetensors.
        They are live, as in torch.optim: clone what must not change with the next update."""
        state = {f"ema.{n}": t for n, t in zip(self.names, self.ema, strict=True)}
        state |= {f"init.{n}": t for n, t in zip(self.names, self.init, strict=True)}
        return state | {"updates": torch.tensor(self.updates), "resets": torch.tensor(self.resets)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copies a state_dict() in. Raises ValueError, with nothing changed, if a name or a shape differs."""
        own = self.state_dict()
        shapes, expected = ({n: t.shape for n, t in tensors.items()} for tensors in (state, own))
        if shapes != expected:
            name = min(shapes.items() ^ expected.items())[0]
            raise ValueError(f"the state is another policy's: {name!r} does not fit this one")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.updates, self.resets = int(state["updates"]), int(state["resets"])

    @torch.no_grad()
    def _attach(self) -> None:
        """Puts ema and init where the parameters are; on the CPU, lays all three out in flat buffers."""
        policy = [_local(p) for p in self.params]
        for average in (self.ema, self.init):  # the lists stay the same objects: others may hold them
            average[:] = [_average_like(p, a) for p, a in zip(policy, average, strict=True)]
        self._flat = []
        if ema_kernel and all(p.device.type == "cpu" and not hasattr(p, "to_local") for p in self.params):
            for dtype in dict.fromkeys(p.dtype for p in self.params):
                index = [i for i, p in enumerate(self.params) if p.dtype == dtype]
                self._flat.append([_flatten(tensors, index) for tensors in (policy, self.ema, self.init)])
            for p, view in zip(self.params, policy, strict=True):
                p.data = view
        self._places = _places(self.params)

    def _follow(self) -> None:
        """`.to()`, `load_state_dict(assign=True)` and others move or replace parameters: attach again."""
        self.params = [getattr(module, leaf) for module, leaf in self._owners] or self.params
        if self._places != _places(self.params):
            self._attach()


def _trainable(model):
    """Names and parameters of what is trained, each once, and the places in a module where they are found."""
    named = model.named_parameters() if isinstance(model, nn.Module) else enumerate(model)
    trainable = {}
    for name, p in named:
        if not isinstance(p, torch.Tensor) or not p.is_leaf:
            raise TypeError(f"expected a module or an iterable of its parameters, but item {name} is neither")
        if p.requires_grad:
            trainable.setdefault(p, str(name))
    if not trainable:
        raise ValueError("no parameter has requires_grad=True, so there is nothing to average or reset")
    paths = [n.rpartition(".") for n in trainable.values()] if isinstance(model, nn.Module) else []
    owners = [(model.get_submodule(path), leaf) for path, _, leaf in paths]
    return list(trainable.values()), list(trainable), owners


def _places(params):
    return [(p.data_ptr(), p.dtype, p.device) for p in map(_local, params)]


def _local(p):
    """The tensor itself, or this rank's shard of a DTensor."""
    return p.to_local() if hasattr(p, "to_local") else p.detach()


def _average_like(p, t):
    """t where p is, in the dtype of p's average: float32, or float64 for float64."""
    return t.to(p.device, torch.promote_types(p.dtype, torch.float32))


def _flatten(tensors, index):
    """One flat copy of tensors[i] for i in index; the list's entries become views of it."""
    flat = torch.cat([tensors[i].reshape(-1) for i in index])
    for i, part in zip(index, flat.split([tensors[i].numel() for i in index]), strict=True):
        tensors[i] = part.view(tensors[i].shape)
    return flat


def _numpy(flat):
    """The same memory as a NumPy array; NumPy has no bfloat16 and sees its bits as uint16."""
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()


# ================================================ Settings =================================================


def flag(default, help, low=None, high=None, group=None):
    """A setting with its help, its range and, on the first of a group, the group's title in --help."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, group=group))


@dataclass
class Config:
    """All settings of a run; configure() makes one of a preset, a method and what the user gave. Raises
    ValueError for a value of the wrong type or out of its range."""

    task: str = flag("custom", "what to train: {tasks}", group="The run")
    method: str = flag("elastic-reset", "a named set of defaults, one of {methods}")
    preset: Literal["mini", "paper"] = flag("mini", "minutes on two CPU cores, or the paper's setting")
    seed: int = flag(0, "of sampling and data order; pretraining has a fixed one", 0)
    updates: int = flag(200, "PPO updates; each samples batch_size responses", 1)
    eval_every: int = flag(20, "updates between evaluations; each reset has one on either side", 1)
    eval_size: int = flag(256, "validation prompts to evaluate on", 1)
    save_every: int = flag(20, "updates between checkpoints", 1)
    output_dir: str = flag("", "where the files go; empty: runs/<task>/<method>/seed<seed>")
    resume: bool = flag(False, "go on from the checkpoint in output_dir; needs the same settings")
    report_to: Literal["none", "tensorboard", "wandb"] = flag("none", "log there as well")
    debug: bool = flag(False, "show a traceback where a clear line would do")

    reset: Literal["elastic", "ema", "init", "none"] = flag(
        "elastic", "policy <- EMA, EMA <- start; or one half of it", group="Elastic Reset"
    )
    reset_every: int = flag(40, "updates between resets", 1)
    ema_decay: float = flag(0.97, "the EMA's decay", 0, 1)
    ema_update: Literal["update", "epoch", "minibatch"] = flag("update", "how often the EMA is updated")

    learning_rate: float = flag(2e-4, "AdamW's, for policy and value head", 0, 1, group="PPO")
    batch_size: int = flag(128, "responses sampled an update", 1)
    mini_batch_size: int = flag(64, "responses an optimizer step; 0: batch_size", 0)
    num_ppo_epochs: int = flag(2, "passes over each batch; 0 keeps the policy fixed", 0)
    response_length: int = flag(20, "longest response, in tokens", 1)
    temperature: float = flag(1.0, "sampling temperature", 0.01, 100)
    gamma: float = flag(1.0, "discount", 0, 1)
    lam: float = flag(0.95, "lambda of the advantage estimation", 0, 1)
    whiten_advantages: bool = flag(True, "it amplifies noise once the rewards are flat")
    cliprange: float = flag(0.2, "clip of the probability ratio", 0)
    cliprange_value: float = flag(0.2, "clip of the change of a value", 0)
    vf_coef: float = flag(0.1, "weight of the value loss; 0: no value function", 0)
    entropy_coef: float = flag(0.0, "weight of the entropy bonus", 0)
    max_grad_norm: float = flag(1.0, "longest gradient; longer ones are scaled down", 1e-9)
    early_stop_kl: float = flag(0.0, "end an update's epochs once the policy KL exceeds this; 0: never", 0)
    separate_value_model: bool = flag(False, "instead of a value head on the policy")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "of loaded weights")

    kl_coef: float = flag(0.0, "weight of the per-token KL penalty", 0, group="KL penalty")
    kl_target: float = flag(0.0, "adapt kl_coef to reach this KL, in nats a response; 0: keep it", 0)
    kl_horizon: int = flag(10_000, "responses within which the adaptation works", 1)
    kl_reference: Literal["init", "ema", "reset"] = flag("init", "start, EMA, or last reset")

    model: str = flag("", "hub name or folder of the policy (FR->EN sender)", group="Models and data")
    receiver_model: str = flag("", "hub name or folder of the EN->DE receiver")
    data: str = flag("", "hub name or folder, also DIR:train[9000:]; empty: embedded data")
    sender_data: list[str] = flag((), "fr, en pairs to pretrain the sender on; several allowed")
    receiver_data: list[str] = flag((), "en, de pairs to pretrain the receiver on; several allowed")
    receiver_learning_rate: float = flag(1e-3, "0 keeps the receiver fixed", 0, 1)
    d_model: int = flag(96, "pretraining: width of a model, a multiple of its 4 heads", 4)
    layers: int = flag(1, "pretraining: layers of the encoder and of the decoder", 1)
    vocab_size: int = flag(0, "pretraining: BPE vocabulary; 0: one token a word", 0)
    max_length: int = flag(64, "longest input or target text, in tokens; the rest is cut off", 2)
    pretrain_updates: int = flag(800, "pretraining: updates", 1)
    pretrain_batch_size: int = flag(128, "pretraining: sentence pairs an update", 1)
    pretrain_learning_rate: float = flag(2e-3, "pretraining: peak learning rate", 0, 1)
    average_after: int = flag(0, "mixtures of start and end to evaluate, after training", 0)

    def __post_init__(self):
        for f in fields(self):
            check_value(f, getattr(self, f.name))
        if self.d_model % 4:
            raise ValueError(f"d_model is {self.d_model}; expected a multiple of 4")
        if self.kl_target and not self.kl_coef:
            raise ValueError(
                "kl_target adapts kl_coef, but kl_coef is 0; give it a value to begin with, such as 0.05"
            )
        if self.mini_batch_size > self.batch_size:
            expected = f"batch_size ({self.batch_size}) or less"
            raise ValueError(f"mini_batch_size is {self.mini_batch_size}; expected {expected}")


def check_value(f, value):
    """ValueError if a setting is of the wrong type, not among its choices or out of its range."""
    low, high = f.metadata["low"], f.metadata["high"]
    choices = f.type.__args__ if get_origin(f.type) is Literal else ()
    kinds = {int: int, float: (int, float), bool: bool, list[str]: (list, tuple)}.get(f.type, str)
    if not isinstance(value, kinds) or (isinstance(value, bool) and f.type is not bool):
        kind = "str" if choices else getattr(f.type, "__name__", f.type)
        raise ValueError(f"{f.name} is {value!r}; expected a value of type {kind}")
    if choices and value not in choices:
        raise ValueError(f"{f.name} is {value!r}; expected one of {', '.join(choices)}")
    if low is not None and not low <= value <= (math.inf if high is None else high):
        expected = f"{low} or more" if high is None else f"{low} to {high}"
        raise ValueError(f"{f.name} is {value}; expected {expected}")


METHODS = {  # what each sets; a preset may add to it ("mini/ppo-kl"), flags win over both
    "elastic-reset": dict(reset="elastic"),
    "ppo": dict(reset="none", kl_coef=0.0),
    "ppo-kl": dict(reset="none"),
    "reinforce": dict(reset="none", kl_coef=0.0, num_ppo_epochs=1, mini_batch_size=0, vf_coef=0.0, lam=1.0),
    "fixed-sender": dict(reset="none", num_ppo_epochs=0),
    "reset-init": dict(reset="init"),
    "reset-ema": dict(reset="ema"),
    "ema-reference": dict(reset="none", kl_reference="ema"),  # WARP's first stage, EMA-PG
    "reset-reference": dict(reset="none", kl_reference="reset"),  # TR-DPO, ProRL
    "average-after": dict(reset="none", kl_coef=0.0, average_after=9),  # WARP's last stage
}


def configure(task="custom", method="elastic-reset", preset="mini", **given) -> Config:
    """Defaults < the task's preset < the method < the preset's word on that method < `given`."""
    presets = getattr(TASKS.get(task), "presets", {})
    for name, value, known in [("method", method, METHODS), ("preset", preset, ("mini", "paper"))]:
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    if unknown := given.keys() - {f.name for f in fields(Config)}:
        raise ValueError(f"unknown setting {min(unknown)!r}; --help lists them all")
    layers = presets.get(preset, {}) | METHODS[method] | presets.get(f"{preset}/{method}", {}) | given
    return Config(task=task, method=method, preset=preset, **layers)


# ================================================= 2. PPO ==================================================
# Shapes: `batch` prompts of `prompt` tokens, each answered by a response of `response` tokens. Behind its EOS
# a response is padding; `mask` (batch, response) is True up to and including the EOS: nothing else counts.


def gather_logprobs(logits, tokens):
    """log pi(token_t | tokens before t). (batch, response, vocab), (batch, response) -> (batch, response)"""
    return logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """The reward of each token, (batch, response): minus the KL penalty and, at the last one, plus the score
    (batch,) of the response."""
    # r_t = - kl_coef (log pi(a_t) - log pi_ref(a_t)) + score [t is last]
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (arXiv 1506.02438, equation 16). Advantages and returns, both (batch,
    response); the state behind the last token is worth 0."""
    advantages, advantage = torch.zeros_like(rewards), 0.0
    next_values = F.pad(values * mask, (0, 1))[:, 1:]
    # delta_t = r_t + gamma V_{t+1} - V_t;    A_t = delta_t + gamma lam A_{t+1}
    deltas = (rewards + gamma * next_values - values) * mask
    for t in reversed(range(rewards.shape[1])):
        advantages[:, t] = advantage = deltas[:, t] + gamma * lam * advantage
    return advantages, (advantages + values) * mask


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """Mean 0 and (unbiased) variance 1 over the unmasked tokens."""
    mean = masked_mean(x, mask)
    variance = ((x - mean).square() * mask).sum() / (mask.sum() - 1).clamp(min=1)
    return (x - mean) * (variance + 1e-8).rsqrt() * mask


def ppo_loss(new_logprobs, new_values, entropy, old, *, cliprange, cliprange_value, vf_coef, entropy_coef):
    """PPO's clipped loss (arXiv 1707.06347, equations 7 and 9), and numbers to watch. `old`: the rollout's
    logprobs, values, advantages, returns and mask. All (batch, response)."""
    mask, advantages = old["mask"], old["advantages"]
    # ratio_t = pi(a_t) / pi_old(a_t);    L_policy = - mean_t min(ratio_t A_t, clip(ratio_t, 1-c, 1+c) A_t)
    log_ratio = new_logprobs - old["logprobs"]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    policy_loss = -masked_mean(torch.min(ratio * advantages, clipped * advantages), mask)
    # L_value = 1/2 mean_t max((V_t - R_t)^2, (V_old_t + clip(V_t - V_old_t, -c, c) - R_t)^2)
    near = old["values"] + (new_values - old["values"]).clamp(-cliprange_value, cliprange_value)
    errors = torch.max((new_values - old["returns"]).square(), (near - old["returns"]).square())
    value_loss = 0.5 * masked_mean(errors, mask)
    # L = L_policy + c_v L_value - c_e H
    entropy = masked_mean(entropy, mask)
    loss = policy_loss + vf_coef * value_loss - entropy_coef * entropy
    policy_kl, clipfrac = 0.5 * masked_mean(log_ratio.square(), mask), masked_mean(ratio != clipped, mask)
    watch = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy)
    watch |= dict(policy_kl=policy_kl, clipfrac=clipfrac)
    return loss, {name: value.item() for name, value in watch.items()}


class KLCoefficient:
    """kl_coef: fixed or, with a target, adaptive (arXiv 1909.08593, section 2.2): moved so that the KL, in
    nats a response, comes to `target` within some `horizon` responses."""

    def __init__(self, value, target=0.0, horizon=10_000):
        self.value, self.target, self.horizon = value, target, horizon

    def adapt(self, kl, responses):
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * responses / self.horizon

    def state_dict(self):
        return {"value": torch.tensor(self.value, dtype=torch.float64)}

    def load_state_dict(self, state):
        self.value = state["value"].item()


class ActorCritic(nn.Module):
    """The policy with a value function: a linear head on the policy's last hidden state or, as a
    `separate_value_model`, on that of a copy. The head starts at zero: without a value loss (vf_coef 0, as in
    REINFORCE) every value is and stays 0."""

    def __init__(self, policy, temperature=1.0, separate_value_model=False):
        super().__init__()
        self.policy, self.temperature = policy, temperature
        self.value_model = copy.deepcopy(policy) if separate_value_model else None
        self.value_head = nn.Linear(policy.get_output_embeddings().in_features, 1, device=policy.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, input_ids, attention_mask, responses):
        """Logits at the sampling temperature, (batch, response, vocab), and values, (batch, response)."""
        logits, hidden = response_logits(self.policy, input_ids, attention_mask, responses)
        if self.value_model is not None:
            _, hidden = response_logits(self.value_model, input_ids, attention_mask, responses)
        return logits / self.temperature, self.value_head(hidden.float()).squeeze(-1)


def logprobs_and_values(model, batch):
    """The responses' log-probabilities, values and entropies, (batch, response); 0 where masked.

    generate()'s own scores will not do: they come from another path (a token at a time, cached), so that
    ratio_t would not start at 1, and they carry no gradient. The temperature is the one sampled at: that
    distribution, not the untempered one, is the policy that acted.
    """
    logits, values = model(batch["input_ids"], batch["attention_mask"], batch["responses"])
    logprobs = gather_logprobs(logits, batch["responses"])
    entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
    return [torch.where(batch["mask"], x, 0.0) for x in (logprobs, values, entropy)]


@torch.no_grad()
def reference_logprobs(model, weights, batch):
    """The responses' log-probabilities under other weights {name: tensor} of the policy. The KL penalty's
    reference is made of weights that ElasticReset keeps anyway, not of another model. (batch, response)"""
    weights = {f"policy.{name}": tensor for name, tensor in weights.items()}
    inputs = (batch["input_ids"], batch["attention_mask"], batch["responses"])
    logits, _ = torch.func.functional_call(model, weights, inputs)
    return torch.where(batch["mask"], gather_logprobs(logits, batch["responses"]), 0.0)


@torch.no_grad()
def sample(policy, prompts, response_length, temperature=1.0):
    """Tokens from the policy's own distribution (no top-k, no top-p), the likeliest ones at temperature 0.
    `prompts`: input_ids, attention_mask (batch, prompt). Returns responses and mask, (batch, response)."""
    from transformers import GenerationConfig

    how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else {}
    how |= dict(max_new_tokens=response_length, suppress_tokens=_never(policy) or None)
    settings = GenerationConfig(num_beams=1, **how)
    tokens = policy.generate(**prompts, generation_config=settings)
    responses = tokens[:, 1 if policy.config.is_encoder_decoder else prompts["input_ids"].shape[1] :]
    ended = torch.isin(responses, torch.tensor(_eos(policy), device=responses.device)).cumsum(1)
    return responses, F.pad(ended, (1, 0))[:, :-1] == 0


def response_logits(policy, input_ids, attention_mask, responses):
    """Logits (batch, response, vocab) and last hidden states (batch, response, hidden) before each token of a
    response. Here and in sample(), and nowhere else, an encoder-decoder differs from a decoder."""
    if policy.config.is_encoder_decoder:
        start = torch.full_like(responses[:, :1], policy.generation_config.decoder_start_token_id)
        inputs = dict(input_ids=input_ids, decoder_input_ids=torch.cat([start, responses[:, :-1]], 1))
    else:
        inputs = dict(input_ids=torch.cat([input_ids, responses], 1)[:, :-1])
        attention_mask = F.pad(attention_mask, (0, responses.shape[1] - 1), value=1)
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    output = policy(**inputs, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
    hidden = output.decoder_hidden_states if policy.config.is_encoder_decoder else output.hidden_states
    logits = output.logits[:, -responses.shape[1] :].float()
    for token in _never(policy):  # as in sample()
        logits[..., token] = -1e9
    return logits, hidden[-1][:, -responses.shape[1] :]


def _eos(policy):
    eos = policy.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [eos]


def _never(policy):
    """Tokens that no response holds before its end: the padding, unless a model pads with its EOS."""
    pad = policy.generation_config.pad_token_id
    return [] if pad in _eos(policy) else [pad]


# ================================================ 3. Tasks =================================================


class Task(Protocol):
    """What train() needs of a task; write your own and call train(config, task=MyTask(...)).

    `policy`: a transformers model with generate(). `tokenizer`: its tokenizer (for a decoder, one that pads
    on the left). `trained`: what else learns, modules and optimizers by name, for the checkpoints.
    `footnote`: a line under the run's table. Optional: `learn(prompts, responses)`, called once the policy is
    updated; it returns numbers to log.
    """

    policy: nn.Module
    tokenizer: object
    validation_prompts: list[str]
    trained: dict
    footnote: str

    def prompts(self, n: int, update: int) -> list[str]:
        """The prompts of an update. A function of its arguments: a resumed run must see the same data."""

    def reward(self, prompts: list[str], responses: list[str]) -> list[float]:
        """One finite number a response."""

    def evaluate(self) -> dict:
        """Metrics of the policy as it is, numbers all: `reward`, `drift`, others. If it has `samples`, a list
        of {column: text}, they go to samples.md."""


class TranslationGame:
    """FR -> EN -> DE (Lee et al. 2019; the paper's section 4). The sender, our policy, turns French into
    English, the receiver that English into German. The sender's reward is the receiver's mean log-likelihood
    a token of the German reference; the receiver learns that German by cross-entropy. Nobody checks the
    English, so it drifts: `drift` is the human English's negative log-likelihood a token under the sender."""

    iwslt = "hf://datasets/IWSLT/iwslt2017@refs%2Fconvert%2Fparquet/iwslt2017-{}-en/train/*.parquet"
    presets = {
        "mini": {},
        "mini/ppo-kl": dict(kl_coef=0.02),
        "mini/ema-reference": dict(kl_coef=0.02),
        "mini/reset-reference": dict(kl_coef=0.02),
        "paper": dict(  # what is known of it; decay and period are not (README, "What is not reproduced")
            data="romrawinjp/multi30k", sender_data=[iwslt.format("fr")], receiver_data=[iwslt.format("de")],
            d_model=256, layers=2, vocab_size=25_000, max_length=80, response_length=60,
            pretrain_updates=50_000, pretrain_batch_size=256, pretrain_learning_rate=5e-4,
            updates=10_000, batch_size=256, mini_batch_size=64, num_ppo_epochs=2, cliprange=0.1,
            learning_rate=1e-4, receiver_learning_rate=1e-3, entropy_coef=0.01, vf_coef=0.5,
            ema_decay=0.995, reset_every=1000, eval_every=200, save_every=200, eval_size=1014,
        ),
        "paper/ppo-kl": dict(kl_coef=0.05),
    }  # fmt: skip

    def __init__(self, config: Config):
        from accelerate import Accelerator

        self.config = config
        data = translation_data(config)
        self.validation = data["validation"][: config.eval_size]
        self.german = {}  # French: German; of captions with the same French the first counts
        for row in data["train"]:
            self.german.setdefault(row["fr"], row["de"])
        self.french = list(self.german)
        self.validation_prompts = [row["fr"] for row in self.validation]
        self.policy, self.tokenizer = seq2seq("sender", config.model, data, config)
        self.receiver, self.receiver_tokenizer = seq2seq("receiver", config.receiver_model, data, config)
        self.accelerator = Accelerator()
        self.optimizer = self.accelerator.prepare_optimizer(
            adamw(self.receiver, config.receiver_learning_rate)
        )
        self.trained = {"receiver": self.receiver, "receiver_optimizer": self.optimizer}
        self.footnote = f"BLEU: {bleu(['a'], ['a'])[1]}"

    def prompts(self, n, update):
        return shuffled(self.french, n, update, self.config.seed)

    @torch.no_grad()
    def reward(self, prompts, responses):
        return token_mean(*self._receive(responses, [self.german[french] for french in prompts])).tolist()

    def learn(self, prompts, responses):
        logprobs, mask = self._receive(responses, [self.german[french] for french in prompts])
        loss = -logprobs.sum() / mask.sum()
        stats = optimizer_step(
            self.accelerator, loss, self.receiver, self.optimizer, self.config.max_grad_norm
        )
        return {f"receiver_{name}": value for name, value in stats.items()}

    def _receive(self, english, german):
        return target_logprobs(
            self.receiver, self.receiver_tokenizer, english, german, self.config.max_length
        )

    @torch.no_grad()
    def evaluate(self):
        french, human, reference = ([row[column] for row in self.validation] for column in ("fr", "en", "de"))
        longest = self.config.max_length
        english = translate(self.policy, self.tokenizer, french, longest, self.config.response_length)
        german = translate(self.receiver, self.receiver_tokenizer, english, longest, longest)
        rewards = [token_mean(*self._receive(*texts)) for texts in chunks(english, reference)]
        pairs = chunks(french, human)
        scored = [target_logprobs(self.policy, self.tokenizer, *texts, longest) for texts in pairs]
        logprob, tokens = sum(x.sum() for x, _ in scored), sum(mask.sum() for _, mask in scored)
        columns, shown = ("French", "human English", "English", "German"), (french, human, english, german)
        rows = zip(*(texts[:5] for texts in shown), strict=True)
        return dict(
            reward=torch.cat(rewards).mean().item(),
            drift=(-logprob / tokens).item(),
            bleu_de=bleu(german, reference)[0],
            bleu_en=bleu(english, human)[0],
            samples=[dict(zip(columns, row, strict=True)) for row in rows],
        )


TASKS = {"translation": TranslationGame}


# =============================================== 4. Training ===============================================


def train(config: Config, task: Task | None = None) -> dict:
    """Trains and writes the run's files. Returns
    {"start": metrics, "end": metrics, "history": list of metrics, "output_dir": folder}.

    Raises ValueError for settings or data that cannot be used, FloatingPointError when a reward, a loss or a
    gradient is not finite, KeyboardInterrupt (after a checkpoint) when asked to stop."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    accelerator = Accelerator(**tracking(config))
    run = Run(config, accelerator)
    task = task or TASKS[config.task](config)
    task.policy.eval()  # no dropout: the ratio of a policy to itself must be 1
    sample_plainly(task.policy)
    model = ActorCritic(task.policy, config.temperature, config.separate_value_model)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    optimizer = accelerator.prepare_optimizer(adamw(model, config.learning_rate))
    elastic = ElasticReset(model.policy, config.ema_decay, config.reset_every, config.reset)
    reference = kl_reference(elastic, config)
    kl_coef = KLCoefficient(config.kl_coef, config.kl_target, config.kl_horizon)
    own_reference = dict(reference=reference) if config.kl_reference == "reset" else {}
    parts = dict(model=model, optimizer=optimizer, elastic=elastic, kl_coef=kl_coef)
    run.resume(parts | own_reference | task.trained)
    if not run.history:
        run.log(0, evaluate(task, model, elastic, config))

    for update in run.updates():
        # Seed and prompts are functions of the update's number: a resumed run goes on as if uninterrupted
        seed = (config.seed * 1_000_003 + update) * accelerator.num_processes
        set_seed(seed % (2**32 - accelerator.num_processes), device_specific=True)

        # 1. Sample a response to each prompt
        prompts = task.prompts(config.batch_size, update)
        prompts = prompts[accelerator.process_index :: accelerator.num_processes]
        batch, texts = respond(task, prompts, config)

        # 2. Score: a reward for the response, a KL penalty for each of its tokens
        scores = score(task, prompts, texts).to(accelerator.device)  # (batch,)
        run.check_finite(reward=scores.sum().item())
        with torch.no_grad():
            logprobs, values, _ = logprobs_and_values(model, batch)  # (batch, response)
        ref_logprobs = reference_logprobs(model, elastic.by_name(reference), batch)
        rewards = shape_rewards(scores, logprobs, ref_logprobs, batch["mask"], kl_coef.value)

        # 3. Advantages
        advantages, returns = gae(rewards, values, batch["mask"], config.gamma, config.lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, batch["mask"])
        batch |= dict(logprobs=logprobs, values=values, advantages=advantages, returns=returns)

        # 4. PPO epochs over minibatches
        train_kl = accelerator.reduce((logprobs - ref_logprobs).sum(1).mean(), "mean").item()
        stats = dict(train_reward=scores.mean().item(), train_kl=train_kl, kl_coef=kl_coef.value)
        for _epoch in range(config.num_ppo_epochs):
            for mb in minibatches(batch, config, accelerator):
                loss, mb_stats = ppo_loss(*logprobs_and_values(model, mb), mb, **loss_settings(config))
                mb_stats |= optimizer_step(accelerator, loss, model, optimizer, config.max_grad_norm)
                stats |= mean_over_processes(mb_stats, accelerator)
                run.check_finite(**stats)
                if config.ema_update == "minibatch":
                    elastic.update()
            if config.ema_update == "epoch":
                elastic.update()
            if config.early_stop_kl and stats["policy_kl"] > config.early_stop_kl:
                break
        kl_coef.adapt(train_kl, config.batch_size)
        if hasattr(task, "learn"):
            stats |= mean_over_processes(task.learn(prompts, texts) or {}, accelerator)
            run.check_finite(**stats)

        # 5. EMA <- decay * EMA + (1 - decay) * policy
        if config.ema_update == "update":
            elastic.update()

        # 6. Reset: policy <- EMA, EMA <- start
        reset_due = config.reset != "none" and update % config.reset_every == 0
        if reset_due:
            run.log(update, evaluate(task, model, elastic, config) | stats, "before reset")
            elastic.reset()
        if config.kl_reference == "reset" and update % config.reset_every == 0:
            reference[:] = [p.detach().clone() for p in elastic.params]

        # 7. Evaluate and log
        if reset_due or update % config.eval_every == 0 or update == config.updates:
            event = "after reset" if reset_due else ""
            run.log(update, evaluate(task, model, elastic, config) | stats, event)

    average_after(task, model, elastic, run, config)
    return run.finish(task)


def respond(task, prompts, config):
    """Samples the policy's responses. The batch: input_ids and attention_mask (batch, prompt), responses and
    mask (batch, response). The texts: the responses decoded."""
    batch = tokens_of(task.tokenizer, prompts, config.max_length, task.policy.device)
    batch["responses"], batch["mask"] = sample(task.policy, batch, config.response_length, config.temperature)
    return batch, task.tokenizer.batch_decode(batch["responses"], skip_special_tokens=True)


def score(task, prompts, texts):
    scores = torch.tensor(task.reward(prompts, texts), dtype=torch.float32)
    if scores.shape != (len(prompts),):
        shape = tuple(scores.shape)
        raise ValueError(f"reward() gave numbers of shape {shape}; expected one for each of {len(prompts)}")
    return scores


def kl_reference(elastic, config):
    """The weights the KL penalty is measured from: a list of ElasticReset's, which goes on changing, or a
    copy that train() renews at each reset."""
    if config.kl_reference == "reset":
        return [p.detach().clone() for p in elastic.params]
    return {"init": elastic.init, "ema": elastic.ema}[config.kl_reference]


def minibatches(batch, config, accelerator):
    """The batch's rows in a new order, `mini_batch_size` (over all processes) at a time."""
    size = max(1, (config.mini_batch_size or config.batch_size) // accelerator.num_processes)
    for rows in torch.randperm(len(batch["mask"])).split(size):
        yield {name: tensor[rows] for name, tensor in batch.items()}


def loss_settings(config):
    names = ("cliprange", "cliprange_value", "vf_coef", "entropy_coef")
    return {name: getattr(config, name) for name in names}


def adamw(module, learning_rate):
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)


def tracking(config):
    """Accelerator's settings for --report_to."""
    if config.report_to == "none":
        return {}
    if importlib.util.find_spec(config.report_to) is None:
        raise ValueError(f"report_to is {config.report_to!r}, but that package is not installed")
    return dict(log_with=config.report_to, project_dir=str(folder_of(config)))


def sample_plainly(policy):
    """Drops a model's own ways of generating (beams, forced tokens, penalties): a policy is its distribution.
    ValueError if a token that sampling needs is not named."""
    from transformers import GenerationConfig

    needed = ["pad_token_id", "eos_token_id"]
    needed += ["decoder_start_token_id"] if policy.config.is_encoder_decoder else []
    tokens = {name: getattr(policy.generation_config, name) for name in needed}
    for name, token in tokens.items():
        if token is None:
            raise ValueError(f"the model names no {name}; set model.generation_config.{name}")
    policy.generation_config = GenerationConfig(**tokens)


def mean_over_processes(stats, accelerator):
    """{name: number}, averaged; every process gets the same."""
    values = torch.tensor(list(stats.values()), dtype=torch.float32, device=accelerator.device)
    return dict(zip(stats, accelerator.reduce(values, "mean").tolist(), strict=True))


def optimizer_step(accelerator, loss, module, optimizer, max_grad_norm):
    """One step on the gradient averaged over the processes. Returns the loss and the gradient's norm."""
    accelerator.backward(loss)
    parameters = [p for p in module.parameters() if p.grad is not None]
    if accelerator.num_processes > 1:
        flat = accelerator.reduce(torch.cat([p.grad.reshape(-1) for p in parameters]), "mean")
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(grad.view_as(p))
    norm = accelerator.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return dict(loss=loss.item(), gradient=norm.item())


@torch.no_grad()
def evaluate(task, model, elastic, config):
    """The task's metrics and `kl`, the policy's KL to the start in nats a response; always the same seed."""
    from accelerate.utils import set_seed

    set_seed(0)
    metrics, kl, start = task.evaluate(), [], elastic.by_name(elastic.init)
    for (prompts,) in chunks(task.validation_prompts):
        batch, _ = respond(task, prompts, config)
        logprobs, _, _ = logprobs_and_values(model, batch)
        kl.append((logprobs - reference_logprobs(model, start, batch)).sum(1))
    return metrics | {"kl": torch.cat(kl).mean().item()}


def average_after(task, model, elastic, run, config):
    """Model averaging (WARP's last stage, arXiv 2406.16768): theta_0 + eta (theta - theta_0), no training."""
    trained = [p.detach().to(i.dtype) for p, i in zip(elastic.params, elastic.init, strict=True)]
    for k in range(1, config.average_after + 1):
        eta = k / (config.average_after + 1)
        with elastic.holding(torch._foreach_lerp(elastic.init, trained, eta)):
            run.log(config.updates, evaluate(task, model, elastic, config), f"eta {eta:.2f}")


# ============================================== 5. Trade-off ===============================================
# The paper's first claim: a reward alone says little; compare methods by the drift they pay for it.


def compare(methods, seeds, jobs, given):
    """Trains every method on every seed, each run a process of its own and finished ones left as they are;
    writes tradeoff.json, tradeoff.png and summary.md to output_dir. Returns the summary.

    `methods`: names, with settings of their own if need be, "ppo-kl:kl_coef=0.1". `given`: everyone's."""
    if not all(methods) or len(set(methods)) < len(methods):
        raise ValueError(
            f"--compare {','.join(methods)}: expected different methods, such as ppo,elastic-reset"
        )
    folder = Path(given.get("output_dir") or f"runs/{given['task']}/compare")
    first, runs = given.get("seed", 0), {}
    for label, seed in itertools.product(methods, range(first, first + seeds)):
        method, *own = label.split(":")
        place = folder / label.replace(":", ",") / f"seed{seed}"
        argv = to_argv(given | dict(method=method, seed=seed, resume=True, output_dir=str(place)))
        argv += [word for setting in own for word in f"--{setting}".split("=", 1)]
        runs[label, seed] = argv, configure(**parse_flags(argv)[0])
    configs = {label: asdict(runs[label, first][1]) for label in methods}
    TASKS[given["task"]](runs[methods[0], first][1])  # pretrains here and once what is not in the cache
    with ThreadPoolExecutor(jobs) as pool:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        list(progress(pool.map(lambda run: run_apart(*run, threads), runs.values()), total=len(runs)))
    histories = {label: {} for label in methods}
    for (label, seed), (_, config) in runs.items():
        histories[label][seed] = read_history(Path(config.output_dir))
    record = dict(command=["elastic_reset.py", *sys.argv[1:]], commit=commit(), torch=torch.__version__)
    record |= dict(summary=tradeoff(histories), configs=configs, runs=histories)
    write_text(folder / "tradeoff.json", json.dumps(record, indent=1))
    with written_whole(folder / "tradeoff.png") as aside:
        plot_tradeoff(histories, aside)
    write_text(folder / "summary.md", summary_text(record))
    return summary_text(record)


def run_apart(argv, config, threads):
    """One run in a process of its own, unless it is finished; what it prints goes to run.log."""
    folder = Path(config.output_dir)
    if (folder / "config.json").exists():
        check_continues(folder, config)
        if (folder / "samples.md").exists() and read_history(folder)[-1]["update"] == config.updates:
            return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "run.log", "w", encoding="utf-8") as log:
        settings = dict(stdout=log, stderr=log, env={"OMP_NUM_THREADS": str(threads)} | os.environ)
        code = subprocess.run([sys.executable, __file__, *argv], check=False, **settings).returncode
    if code:
        last = (folder / "run.log").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise ValueError(f"the run in {folder} failed: {''.join(last)} (see run.log there)")


def commit():
    """The commit of the repository this file lies in, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def tradeoff(histories):
    """{"start", "range", "methods": {label: {reward, drift, area, passed}}}, each a list of a value a seed.

    The range goes from the lowest drift of any run to 1.5 times the start's. area: the best reward at a drift
    of at most d, less the start's, averaged over d in the range. passed: the first update drifting beyond."""
    lines = [line for runs in histories.values() for history in runs.values() for line in history]
    low, high = min(line["drift"] for line in lines), 1.5 * lines[0]["drift"]
    methods = {}
    for label, runs in histories.items():
        ends = [during_training(history)[-1] for history in runs.values()]
        methods[label] = dict(
            reward=[end["reward"] for end in ends],
            drift=[end["drift"] for end in ends],
            area=[area_under_front(history, low, high) for history in runs.values()],
            passed=[next((e["update"] for e in h if e["drift"] > high), None) for h in runs.values()],
        )
    return dict(start=lines[0], range=[low, high], methods=methods)


def during_training(history):
    """The evaluations during training, without those of mixtures after it."""
    return [line for line in history if not line["event"].startswith("eta")]


def area_under_front(history, low, high, steps=1000):
    start, area = history[0]["reward"], 0.0
    for i in range(steps):
        d = low + (high - low) * (i + 0.5) / steps
        area += max([0.0] + [line["reward"] - start for line in history if line["drift"] <= d])
    return area / steps


def mean_and_error(values):
    """Mean and standard error of a list of numbers."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def summary_text(record):
    """summary.md: a row a method, mean +- standard error over the seeds; differences are paired by seed."""

    def cell(values):
        return "{:.4g} +- {:.2g}".format(*mean_and_error(values))

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
    return "\n".join([about, "", *rows, "", source, ""])


COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777"]
STYLES = [  # colours that the colour-blind tell apart; in grey lines and markers do
    dict(color=color, linestyle=line, marker=marker)
    for color, line, marker in zip(COLORS, ["-", "--", "-.", ":"] * 2, "os^DvPX*", strict=True)
]


def plot_tradeoff(histories, path):
    """Left: reward against drift, at the runs' ends and on the way there. Right: drift over the updates, with
    the saw-tooth of the resets. Means over the seeds with standard errors."""
    from matplotlib.figure import Figure

    figure, seen, names = Figure(figsize=(11, 5), layout="constrained"), [], []
    plane, over_time = figure.subplots(1, 2)
    for (label, runs), style in zip(histories.items(), itertools.cycle(STYLES), strict=False):
        updates = [line["update"] for line in during_training(common_evaluations(runs)[0])]
        drift, drift_error = seed_means(runs, "drift")
        reward, reward_error = seed_means(runs, "reward")
        end, seen = len(updates) - 1, [*seen, *reward[1:]]
        plane.plot(drift[1:], reward[1:], **style, linewidth=0.8, markersize=2.5, alpha=0.6)
        mark = style | dict(linestyle="", markersize=9, capsize=3, label=label)
        plane.errorbar(drift[end], reward[end], reward_error[end], drift_error[end], **mark)
        band = [
            [m + sign * e for m, e in zip(drift, drift_error, strict=True)][: end + 1] for sign in (-1, 1)
        ]
        over_time.plot(updates, drift[: end + 1], **style, linewidth=1.2, markersize=3)
        over_time.fill_between(updates, *band, color=style["color"], alpha=0.15, linewidth=0)
        names.append((drift[end], label, style["color"]))
    edge = min(seen) - 0.1 * (max(seen) - min(seen))  # where a start far below is put
    plane.plot(drift[0], max(reward[0], edge), "k*", markersize=14)
    text = f"start, reward {reward[0]:.3g}"
    plane.annotate(text, (drift[0], max(reward[0], edge)), (10, -4), textcoords="offset points")
    over_time.set_xlim(right=updates[-1] * 1.3)
    gap, height = 0.045 * (over_time.get_ylim()[1] - over_time.get_ylim()[0]), -math.inf
    for y, label, color in sorted(names):  # names stand at the ends of their lines, one above the other
        height = max(y, height + gap)
        over_time.text(updates[-1] * 1.02, height, label, color=color, va="center")
    plane.set(xlabel="drift", ylabel="reward", title="trade-off; large marks: the ends")
    over_time.set(xlabel="update", ylabel="drift", title=f"drift, {len(runs)} seeds")
    plane.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=150)


def seed_means(runs, name):
    """Means and standard errors over the seeds of each evaluation's metric."""
    evaluations = zip(*common_evaluations(runs), strict=True)
    return list(zip(*[mean_and_error([e[name] for e in seeds]) for seeds in evaluations], strict=True))


def common_evaluations(runs):
    """The runs' histories, reduced to the evaluations (update and event) that all of them have."""
    keys = [{(e["update"], e["event"]) for e in history} for history in runs.values()]
    common = set.intersection(*keys)
    return [[e for e in history if (e["update"], e["event"]) in common] for history in runs.values()]


def plot_run(history, path):
    """Reward and drift over the updates, the resets marked."""
    from matplotlib.figure import Figure

    figure, lines = Figure(figsize=(8, 5), layout="constrained"), during_training(history)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, name, style in zip(panels, ("reward", "drift"), STYLES[:2], strict=True):
        axes.plot([e["update"] for e in lines], [e[name] for e in lines], **style, markersize=4)
        for e in lines:
            if e["event"] == "after reset":
                axes.axvline(e["update"], color="0.7", linewidth=1, zorder=0)
        axes.set_ylabel(name)
    axes.set_xlabel("update (vertical lines: resets)")
    figure.savefig(path, format="png", dpi=150)


# ================================================= 6. Files ================================================


class Run:
    """What a run leaves behind, each file written whole or not at all; its checkpoints; its progress bar. Of
    several processes the main one writes."""

    def __init__(self, config, accelerator):
        self.config, self.accelerator = config, accelerator
        self.folder = folder_of(config)
        self.checkpoint = self.folder / "checkpoint" / "state.safetensors"
        self.history_file = self.folder / "metrics.jsonl"
        self.update, self.history, self.samples = 0, [], []
        self.parts, self.bar, self.saved, self.began = {}, None, None, time.perf_counter()
        for name in ("batch_size", "mini_batch_size"):
            if getattr(config, name) % accelerator.num_processes:
                value, n = getattr(config, name), accelerator.num_processes
                raise ValueError(f"{name} is {value}; expected a multiple of the {n} processes")
        if (self.folder / "config.json").exists():
            check_continues(self.folder, config)

    def resume(self, parts):
        """Takes the parts that checkpoints hold (see tensors_of); if asked to, fills them from the last."""
        self.parts, seconds = parts, 0.0
        if self.config.resume and self.checkpoint.exists():
            counters, tensors = read_checkpoint(self.checkpoint)
            for name, part in parts.items():
                own = {k.partition("/")[2]: t for k, t in tensors.items() if k.startswith(name + "/")}
                load_tensors(part, own)
            self.update, self.history, self.samples = (counters[k] for k in ("update", "history", "samples"))
            self.saved, seconds = self.update, counters["seconds"]
        elif self.config.resume and self.history_file.exists() and self.accelerator.is_main_process:
            print(f"{self.folder} holds no checkpoint yet: the run begins anew", file=sys.stderr)
        self.began = time.perf_counter() - seconds
        if self.accelerator.is_main_process:
            (self.folder / "samples.md").unlink(
                missing_ok=True
            )  # it comes last: where it is, the run is complete
            for left_over in self.folder.rglob(".*.partial"):
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
            write_text(self.folder / "config.json", json.dumps(asdict(self.config), indent=2))
        if self.config.report_to != "none":
            self.accelerator.init_trackers(
                "elastic-reset", {k: str(v) for k, v in asdict(self.config).items()}
            )

    def updates(self):
        """The numbers of the updates to do. Saves after each `save_every`-th and the last. Ctrl-C lets an
        update end, saves, and raises KeyboardInterrupt."""
        last, name = self.config.updates, self.config.method
        with ctrl_c_waits() as stop, progress(initial=self.update, total=last, desc=name) as self.bar:
            for update in range(self.update + 1, last + 1):
                self.update = update
                yield update
                self.bar.update()
                if stop.is_set() or self.update % self.config.save_every == 0 or self.update == last:
                    self.save()
                if stop.is_set():
                    raise KeyboardInterrupt(f"stopped after update {self.update}; --resume true goes on")

    def save(self):
        counters = dict(update=self.update, history=self.history, samples=self.samples)
        counters["seconds"] = time.perf_counter() - self.began
        tensors = {f"{name}/{k}": t for name, part in self.parts.items() for k, t in tensors_of(part).items()}
        if self.accelerator.is_main_process:
            write_safetensors(self.checkpoint, tensors, counters)
        self.saved = self.update

    def check_finite(self, **quantities):
        """FloatingPointError naming the update, the quantity and the last good checkpoint."""
        for name, value in quantities.items():
            if not math.isfinite(value):
                good = f"the last good checkpoint is that of update {self.saved}, {self.checkpoint}"
                good = good if self.saved else "there is no checkpoint yet"
                raise FloatingPointError(f"update {self.update}: {name} is {value}; {good}")

    def log(self, update, metrics, event=""):
        """One evaluation: a line of metrics.jsonl, samples, the bar. `event`: on which side of a reset."""
        numbers = {name: value for name, value in metrics.items() if name != "samples"}
        seconds = round(time.perf_counter() - self.began, 2)
        self.history.append(dict(update=update, event=event, **numbers, seconds=seconds))
        self.samples.append(dict(update=update, event=event, rows=metrics.get("samples", [])))
        self.write_metrics()
        if self.config.report_to != "none":
            self.accelerator.log(numbers, step=update)
        if self.bar is not None:
            shown = {"reward": ".3f", "drift": ".3f", "kl": ".1f"}
            text = ", ".join(f"{name} {metrics[name]:{digits}}" for name, digits in shown.items())
            resets = sum(e["event"] == "after reset" for e in self.history)
            self.bar.set_postfix_str(f"{text}, resets {resets}")

    def write_metrics(self):
        if self.accelerator.is_main_process:
            write_text(self.history_file, "".join(json.dumps(e) + "\n" for e in self.history))

    def finish(self, task):
        """Writes models, samples, curve; prints the table of before and after; returns train()'s result."""
        start, end = during_training(self.history)[0], during_training(self.history)[-1]
        result = dict(start=start, end=end, history=self.history, output_dir=str(self.folder))
        self.accelerator.end_training()
        if not self.accelerator.is_main_process:
            return result
        for name, model in dict(model=task.policy, **task.trained).items():
            if hasattr(model, "save_pretrained"):
                with written_whole(self.folder / name) as aside:
                    model.save_pretrained(aside)
                    getattr(task, f"{name}_tokenizer", task.tokenizer).save_pretrained(aside)
        self.write_metrics()
        with written_whole(self.folder / "curve.png") as aside:
            plot_run(self.history, aside)
        write_text(self.folder / "samples.md", samples_text(self.samples))
        print(before_and_after(start, end))
        print(task.footnote)
        print(f"{self.folder}: metrics.jsonl, samples.md, curve.png, model/, checkpoint/")
        return result


def folder_of(config):
    return Path(config.output_dir or f"runs/{config.task}/{config.method}/seed{config.seed}")


def check_continues(folder, config):
    """ValueError if `folder` holds a run that this one would overwrite, or that had other settings."""
    if not config.resume:
        raise ValueError(f"{folder} holds a run: go on with --resume true or choose another --output_dir")
    before = read_json(folder / "config.json")
    free = ("resume", "debug", "report_to", "output_dir", "updates", "save_every")
    for name, value in json.loads(json.dumps(asdict(config))).items():
        if name not in free and before.get(name) != value:
            raise ValueError(f"{folder} holds a run with {name} {before.get(name)!r}, not {value!r}")


def read_json(path):
    """An object from a JSON file. ValueError naming the file if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove the folder to begin anew") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (no object); remove the folder to begin anew")
    return value


def read_history(folder):
    """The lines of metrics.jsonl. ValueError naming the file if it is damaged or empty."""
    path = folder / "metrics.jsonl"
    rows = [row for _, row in numbered_rows(path)]
    if not rows or any(isinstance(row, str) for row in rows):
        raise ValueError(f"{path} is damaged; remove the folder to begin anew")
    return rows


@contextlib.contextmanager
def written_whole(path):
    """Yields a place beside `path`; what is written there, a file or a folder, becomes `path` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield aside
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)
        raise


def write_text(path, text):
    with written_whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_safetensors(path, tensors, counters):
    from safetensors.torch import save_file

    with written_whole(path) as aside:
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, aside, {"counters": json.dumps(counters)})


def read_checkpoint(path):
    """The counters and the tensors of a checkpoint. ValueError if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return json.loads(file.metadata()["counters"]), tensors
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"the checkpoint {path} is damaged ({error}); delete it to begin anew") from error


def tensors_of(part):
    """What a checkpoint keeps of a part: the trained parameters and the buffers of a module, the state of an
    optimizer, the items of a list, or a state_dict."""
    if isinstance(part, nn.Module):
        return {n: p for n, p in part.named_parameters() if p.requires_grad} | dict(part.named_buffers())
    if isinstance(part, list):
        return {str(i): tensor for i, tensor in enumerate(part)}
    state = part.state_dict()
    if "param_groups" in state:
        return {f"{i}.{name}": t for i, slots in state["state"].items() for name, t in slots.items()}
    return state


@torch.no_grad()
def load_tensors(part, tensors):
    """The inverse of tensors_of."""
    if isinstance(part, (nn.Module, list)):
        for name, tensor in tensors_of(part).items():
            tensor.copy_(tensors[name])
    elif "param_groups" in part.state_dict():
        state = {}
        for name, tensor in tensors.items():
            i, slot = name.split(".")
            state.setdefault(int(i), {})[slot] = tensor
        part.load_state_dict(dict(state=state, param_groups=part.state_dict()["param_groups"]))
    else:
        part.load_state_dict(tensors)


@contextlib.contextmanager
def ctrl_c_waits():
    """Yields an event that the first Ctrl-C sets; a second one interrupts at once."""
    stop = threading.Event()

    def handler(signum, frame):
        if stop.is_set():
            raise KeyboardInterrupt("stopped at once")
        stop.set()
        print("\nstopping after this update; Ctrl-C again stops at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield stop
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def progress(*iterable, **settings):
    from tqdm import tqdm

    return tqdm(*iterable, dynamic_ncols=True, disable=os.environ.get("LOCAL_RANK", "0") != "0", **settings)


def samples_text(samples):
    """samples.md: what became of the same prompts, at the start, halfway and at the end. A column in which no
    row ever changes stands above the table."""
    samples = during_training(samples)
    shown = [samples[i] for i in sorted({0, len(samples) // 2, len(samples) - 1})]
    columns = list(shown[0]["rows"][0]) if shown[0]["rows"] else []
    moving = [
        c
        for c in columns
        if any(s["rows"][i][c] != r[c] for s in shown for i, r in enumerate(shown[0]["rows"]))
    ]
    parts = []
    for i, row in enumerate(shown[0]["rows"]):
        parts += [f"## {i + 1}", "", *(f"- {c}: {one_line(row[c])}" for c in columns if c not in moving), ""]
        if moving:
            parts += ["| update | " + " | ".join(moving) + " |", "|---" * (len(moving) + 1) + "|"]
        for s in shown if moving else []:
            texts = [one_line(s["rows"][i][c]).replace("|", "\\|") for c in moving]
            parts.append("| " + " | ".join([f"{s['update']} {s['event']}".strip(), *texts]) + " |")
        parts.append("")
    return "\n".join(parts)


def before_and_after(start, end):
    """The table at the end of a run: every metric of the start, then and now."""
    rows = [("", "start", f"update {end['update']} {end['event']}".strip())]
    names = [name for name in start if name not in ("update", "event", "seconds")]
    rows += [(name, f"{start[name]:.3f}", f"{end[name]:.3f}") for name in names]
    return "\n".join(f"{name:<10}{before:>10}   {after}" for name, before, after in rows)


# =========================================== 7. Data and models ============================================


def chunks(*lists, size=128):
    """Slices, `size` long, of parallel lists."""
    for i in range(0, len(lists[0]), size):
        yield tuple(items[i : i + size] for items in lists)


def shuffled(items, n, update, seed):
    """The n items of an update (from 1 on) in an endless run through `items`, each pass in a new order."""
    batch = range((update - 1) * n, update * n)
    return [items[_order(len(items), seed, i // len(items))[i % len(items)]] for i in batch]


@functools.lru_cache(maxsize=4)
def _order(n, seed, epoch):
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def tokens_of(tokenizer, texts, max_length, device):
    """input_ids and attention_mask, (batch, longest text)"""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}


def target_logprobs(model, tokenizer, sources, targets, max_length):
    """log p(target token | source, tokens before), 0 where padded, and the mask, (batch, target)."""
    source = tokens_of(tokenizer, sources, max_length, model.device)
    settings = dict(padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    target = tokenizer(text_target=targets, **settings)
    tokens, mask = target["input_ids"].to(model.device), target["attention_mask"].to(model.device).bool()
    logits, _ = response_logits(model, **source, responses=tokens)
    return torch.where(mask, gather_logprobs(logits, tokens), 0.0), mask


def token_mean(logprobs, mask):
    """(batch, target) -> (batch,)"""
    return logprobs.sum(1) / mask.sum(1)


def translate(model, tokenizer, texts, max_length, response_length):
    """Greedy translations, a list of strings."""
    translations = []
    for (part,) in chunks(texts):
        prompts = tokens_of(tokenizer, part, max_length, model.device)
        tokens, _ = sample(model, prompts, response_length, temperature=0)
        translations += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return translations


def bleu(translations, references):
    """Corpus BLEU, 0 to 100, and sacrebleu's signature: how it was computed."""
    import sacrebleu

    metric = sacrebleu.BLEU()
    return metric.corpus_score(translations, [references]).score, str(metric.get_signature())


def seq2seq(role, name, data, config):
    """A translation model and its tokenizer: by hub name or from a folder or, without a name, a Marian
    trained from scratch on data[role], pairs of source and target."""
    import transformers
    from accelerate import Accelerator
    from safetensors import SafetensorError

    name = name or str(pretrained_marian(role, data, config))
    transformers.logging.disable_progress_bar()
    try:
        dtype = getattr(torch, config.dtype)
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(name, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        why = one_line(error)
        raise ValueError(f"{role} {name!r} is no seq2seq model that can be loaded: {why}") from error
    for module in model.modules():
        if "Sinusoidal" in type(module).__name__:  # Marian's constants, which loading marks as trainable
            module.requires_grad_(False)
    sample_plainly(model)
    if tokenizer.pad_token is None:
        raise ValueError(f"{role} {name!r}: its tokenizer has no padding token")
    positions, longest = getattr(model.config, "max_position_embeddings", None), config.response_length
    if positions and positions < max(longest, config.max_length):
        raise ValueError(f"{role} {name!r} has {positions} positions: lower max_length or response_length")
    return model.to(Accelerator().device), tokenizer


def pretrained_marian(role, data, config):
    """The cached folder of a Marian trained by maximum likelihood, named by a hash of all that made it."""
    from accelerate import Accelerator
    from transformers import MarianConfig, MarianMTModel

    tokenizer, width = train_tokenizer(data["texts"], config.vocab_size, config.max_length), config.d_model
    pad, eos, size = tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)
    shape = MarianConfig(
        vocab_size=size, d_model=width, encoder_layers=config.layers, decoder_layers=config.layers,
        encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width, dropout=0.0,
        encoder_attention_heads=4, decoder_attention_heads=4,
        pad_token_id=pad, eos_token_id=eos, decoder_start_token_id=pad, forced_eos_token_id=None,
        max_position_embeddings=max(128, config.max_length, config.response_length), scale_embedding=True,
    )  # fmt: skip
    recipe = [role, data[role], tokenizer.backend_tokenizer.to_str(), shape.to_dict(), torch.__version__]
    settings = "pretrain_updates pretrain_batch_size pretrain_learning_rate max_length max_grad_norm"
    recipe += [getattr(config, name) for name in settings.split()]
    code = (fit, batches_of_like_length, shuffled, target_logprobs, response_logits, adamw)
    recipe += [inspect.getsource(function) for function in code]
    digest = hashlib.sha256(json.dumps(recipe, default=str).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastic_reset"
    folder = cache / f"{role}-{digest}"
    with Accelerator().main_process_first():
        if not folder.exists():
            torch.manual_seed(0)
            model = MarianMTModel(shape)
            fit(model, tokenizer, data[role], config, f"pretraining the {role}")
            with written_whole(folder) as aside:
                model.save_pretrained(aside)
                tokenizer.save_pretrained(aside)
    return folder


def fit(model, tokenizer, pairs, config, what):
    """Maximum likelihood on pairs (source, target): AdamW, a tenth of warm-up, then a linear decay."""
    from accelerate import Accelerator
    from transformers import get_linear_schedule_with_warmup

    model.to(Accelerator().device).train()
    optimizer, updates = adamw(model, config.pretrain_learning_rate), config.pretrain_updates
    schedule = get_linear_schedule_with_warmup(optimizer, updates // 10, updates)
    bar = progress(
        batches_of_like_length(pairs, config.pretrain_batch_size, updates), total=updates, desc=what
    )
    for update, (sources, targets) in enumerate(bar):
        logprobs, mask = target_logprobs(model, tokenizer, sources, targets, config.max_length)
        loss = -logprobs.sum() / mask.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if update % 20 == 0:
            bar.set_postfix(nll=f"{loss.item():.3f}")


def batches_of_like_length(pairs, n, updates, pool=32):
    """Sources and targets of `updates` batches of n pairs. A pool of batches is sorted by length before it is
    cut into batches, so that little is padded; then these come in a random order."""
    for update in range(updates):
        if update % pool == 0:
            near = sorted(
                shuffled(pairs, pool * n, update // pool + 1, seed=0), key=lambda pair: len(pair[1])
            )
            starts = random.Random(update).sample(range(0, pool * n, n), pool)
        start = starts[update % pool]
        yield [list(texts) for texts in zip(*near[start : start + n], strict=True)]


def train_tokenizer(texts, vocab_size, max_length):
    """A BPE tokenizer of `vocab_size` tokens or, with 0, one whose tokens are the words of `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = dict(special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    if vocab_size:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=letters, **special)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(**special)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names)


def translation_data(config):
    """train, validation: rows of fr, en, de. sender, receiver: (source, target) pairs; texts: theirs."""
    if not config.data:
        return toy_translations()
    name, _ = split_of(config.data)
    train, validation = load_rows(config.data, "fr en de"), load_rows(f"{name}:validation", "fr en de")
    sender = [(row["fr"], row["en"]) for spec in config.sender_data for row in load_rows(spec, "fr en")]
    receiver = [(row["en"], row["de"]) for spec in config.receiver_data for row in load_rows(spec, "en de")]
    if not (config.model or sender):
        raise ValueError("with --data, the sender needs --model or --sender_data (fr, en pairs)")
    if not (config.receiver_model or receiver):
        raise ValueError("with --data, the receiver needs --receiver_model or --receiver_data (en, de pairs)")
    texts = [text for pair in sender + receiver for text in pair]
    return dict(train=train, validation=validation, sender=sender, receiver=receiver, texts=texts)


def split_of(spec):
    """("DIR", "train[:9000]") of "DIR:train[:9000]"; without a split it is "train"."""
    match = re.fullmatch(r"(.+?):(\w+(?:\[[^\]]*\])?)", spec)
    return match.groups() if match else (spec, "train")


def load_rows(spec, columns):
    """Rows {column: text} of a hub dataset or a local folder of JSONL, CSV or Parquet; `translation: {..}` is
    unpacked. ValueError saying what is wrong and where: in local text files by file, line and column."""
    from datasets import disable_progress_bar, exceptions, load_dataset, logging

    name, split = split_of(spec)
    source = dict(path="parquet", data_files=name) if name.startswith("hf://") else dict(path=name)
    disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said below, in one line
    try:
        rows = load_dataset(**source, split=split).to_list()
    except (OSError, ValueError, StopIteration, exceptions.DatasetsError) as error:
        why = find_fault(name, split, columns) or one_line(error.__cause__ or error) or "it holds no rows"
        raise ValueError(f"data {spec} cannot be read: {why}") from error
    if not rows:
        raise ValueError(f"data {spec} holds no rows")
    rows = [unpacked(row) for row in rows]
    for i, row in enumerate(rows):
        if fault := fault_of(row, columns):
            raise ValueError(f"data {spec}: {find_fault(name, split, columns) or f'row {i}: {fault}'}")
    return rows


def unpacked(row):
    """The columns of a row, also where they lie in one called `translation`, as in many hub datasets."""
    return row["translation"] if isinstance(row.get("translation"), dict) else row


def fault_of(row, columns):
    """What keeps a row from having text in all columns, in words; "" if nothing does."""
    for column in columns.split():
        if column not in row:
            return f"no column {column!r} (found {', '.join(map(str, row))})"
        if not isinstance(row[column], str) or not row[column].strip():
            return f"column {column!r} holds {str(row[column])[:40]!r}, expected text"
    return ""


def find_fault(name, split, columns):
    """The first fault in the JSONL and CSV files of a local folder, by file and line; "" if there is none."""
    base = re.match(r"\w+", split)[0]
    for path in sorted(Path(name).rglob("*"), key=lambda path: (base not in path.name, path)):
        for line, row in numbered_rows(path):
            fault = row if isinstance(row, str) else fault_of(unpacked(row), columns)
            if fault:
                return f"{path}, line {line}: {fault}"
    return ""


def numbered_rows(path):
    """(line, row) of a JSONL or CSV file; in place of a row that cannot be read, a string that says why."""
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            reader = csv.DictReader(file)
            yield from ((reader.line_num, row) for row in reader)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                row = f"column {getattr(error, 'colno', 1)}: not JSON ({getattr(error, 'msg', error)})"
            yield number, row if isinstance(row, (str, dict)) else f"no object but {str(row)[:40]}"


# The embedded corpus. English has no gender where French and German mark it, knows synonyms and puts the time
# first or last. The sender learns from a noisy corpus, as if mined from the web: every second word of a class
# comes out as its neighbour more often than not. The receiver's corpus is clean. So the sender has something
# to gain, the right words, and something to lose: English. An entry: English (synonyms), French, German.
PEOPLE = """neighbor voisin voisine Nachbar Nachbarin / teacher professeur professeure Lehrer Lehrerin
    singer chanteur chanteuse Sänger Sängerin / dancer danseur danseuse Tänzer Tänzerin
    farmer fermier fermière Bauer Bäuerin / baker boulanger boulangère Bäcker Bäckerin
    swimmer nageur nageuse Schwimmer Schwimmerin / cook cuisinier cuisinière Koch Köchin
    driver conducteur conductrice Fahrer Fahrerin / server serveur serveuse Kellner Kellnerin
    gardener jardinier jardinière Gärtner Gärtnerin / seller vendeur vendeuse Verkäufer Verkäuferin"""
QUALITIES = """small|little petit petite klein / big|tall grand grande groß / old|elderly vieux vieille alt
    pretty|lovely joli jolie hübsch / young jeune jeune jung / kind gentil gentille nett
    good bon bonne gut / stout gros grosse dick"""
ACTIONS = """sees voit sieht / likes aime mag / finds trouve findet / buys achète kauft
    draws dessine zeichnet / wants veut will / takes prend nimmt / sells vend verkauft"""
THINGS = """apple pomme f Apfel m / book livre m Buch n / table table f Tisch m / lamp lampe f Lampe f
    car voiture f Auto n / dog chien m Hund m / cat chat m Katze f / flower fleur f Blume f
    bike vélo m Fahrrad n / ball ballon m Ball m / letter lettre f Brief m / hat chapeau m Hut m
    house maison f Haus n / tree arbre m Baum m"""
COLORS_OF_THINGS = """red rouge rouge rot / green vert verte grün / blue bleu bleue blau
    white blanc blanche weiß / black noir noire schwarz / gray gris grise grau"""
PLACES = """in_the_garden dans_le_jardin im_Garten / on_the_street dans_la_rue auf_der_Straße
    at_the_market au_marché auf_dem_Markt / near_the_river près_de_la_rivière am_Fluss
    at_home à_la_maison zu_Hause / _ _ _"""
TIMES = """today|now aujourd'hui heute / again|anew encore wieder / often|frequently souvent oft / _ _ _"""


def toy_translations(seed=0):
    """translation_data() of the embedded corpus; no sentence stands in two of its parts."""
    rng = random.Random(seed)
    sizes = dict(train=20_000, validation=512, receiver=20_000, sender=20_000)
    seen, data = set(), {name: [] for name in sizes}
    for name, size in sizes.items():
        while len(data[name]) < size:
            row = toy_sentence(rng, noise=0.6 if name == "sender" else 0.0)
            if row["fr"] not in seen:
                seen.add(row["fr"])
                data[name].append(row)
    texts = [text for row in data["receiver"] for text in row.values()]
    data["sender"] = [(row["fr"], row["en"]) for row in data["sender"]]
    data["receiver"] = [(row["en"], row["de"]) for row in data["receiver"]]
    return data | dict(texts=texts)


def toy_sentence(rng, noise):
    """A row: as "la petite voisine voit un chien noir", "die kleine Nachbarin sieht einen schwarzen Hund"."""

    def draw(words, noise=0.0):
        entries = toy_entries(words)
        i = rng.randrange(len(entries))
        said = entries[i - 1] if i % 2 and rng.random() < noise else entries[i]
        return entries[i], rng.choice(said[0].split("|"))

    (who, en_who), (how, en_how), (does, en_does) = (draw(w, noise) for w in (PEOPLE, QUALITIES, ACTIONS))
    (what, en_what), (color, en_color) = draw(THINGS, noise), draw(COLORS_OF_THINGS, noise)
    (place, en_place), (when, en_when) = draw(PLACES), draw(TIMES)
    she, fr, de = rng.random() < 0.5, what[2], what[4]  # genders of the person and of the thing
    core = [rng.choice(["the", "this"]), en_how, en_who, en_does, "a", en_color, en_what, en_place]
    english = core + [en_when] if rng.random() < 0.5 else [en_when] + core
    french = ["la" if she else "le", how[1 + she], who[1 + she], does[1], "une" if fr == "f" else "un"]
    french += [what[1], color[1 + (fr == "f")], place[1], when[1]]
    german = ["die" if she else "der", how[3] + "e", who[3 + she], does[2], when[2]]
    german += [dict(m="einen", f="eine", n="ein")[de], color[3] + dict(m="en", f="e", n="es")[de]]
    german += [what[3], place[2]]
    row = dict(fr=french, en=english, de=german)
    return {language: " ".join(" ".join(words).replace("_", " ").split()) for language, words in row.items()}


@functools.cache
def toy_entries(words):
    return [entry.split() for line in words.splitlines() for entry in line.split("/") if entry.strip()]


# ============================================= 8. Command line =============================================


@dataclass
class Command:
    """The flags that are no settings of a run."""

    config: str = flag(
        "", "a YAML file of flags; those given here win over it", group="Many flags, many runs"
    )
    compare: str = flag("", "methods to run side by side, as ppo,elastic-reset,ppo-kl:kl_coef=0.1")
    seeds: int = flag(5, "with --compare: runs a method, on the seeds from --seed on", 1)
    jobs: int = flag(1, "with --compare: runs at a time", 1)


def parse_flags(argv):
    """The settings given, {name: value}, and the Command. ValueError for flags that cannot be used."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message):
            raise ValueError(message)

    metavars = {int: dict(metavar="N"), float: dict(metavar="X"), str: dict(metavar="TEXT")}
    section, sections, known = "", {}, [*fields(Config), *fields(Command)]
    for f in known:
        section = f.metadata["group"] or section
        text = f.metadata["help"].format(methods=", ".join(METHODS), tasks=", ".join(TASKS))
        text += "" if f.default in ("", ()) else f" (default {f.default})"
        absent = dict(default=argparse.SUPPRESS)  # a flag not given leaves no trace
        if f.type == list[str]:
            absent = dict(default_factory=lambda: argparse.SUPPRESS)
        shown = field(**absent, metadata=dict(help=text) | metavars.get(f.type, {}))
        sections.setdefault(section, []).append((f.name, f.type, shown))
    groups = [
        make_dataclass("Flags", settings, namespace={"_argument_group_name": title})
        for title, settings in sections.items()
    ]
    style = argparse.RawDescriptionHelpFormatter
    about = dict(prog="elastic_reset.py", description=__doc__, formatter_class=style, allow_abbrev=False)
    parser = Parser(groups, **about)
    given = vars(parser.parse_args(argv))
    if given.get("config"):
        given = vars(parser.parse_args(to_argv(read_yaml(given["config"])) + argv))
    command = Command(**{f.name: given.pop(f.name) for f in fields(Command) if f.name in given})
    for f in fields(Command):
        check_value(f, getattr(command, f.name))
    return given, command


def to_argv(flags):
    """{"kl_coef": 0.1, "sender_data": ["a", "b"]} -> --kl_coef 0.1 --sender_data a b, a list of words"""
    argv = []
    for name, value in flags.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return argv


def read_yaml(path):
    import yaml

    try:
        flags = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {one_line(error)}") from error
    if not isinstance(flags, dict):
        raise ValueError(f"--config {path}: expected lines like kl_coef: 0.05")
    return flags


def one_line(error):
    return " ".join(str(error).split())


def main(argv=None) -> int:
    """The command line. 0: done; 1: training broke off; 2: unusable flags or data; 130: interrupted."""
    argv, given = sys.argv[1:] if argv is None else argv, {}
    try:
        given, command = parse_flags(argv)
        if given.get("task") not in TASKS:
            raise ValueError(f"--task is {given.get('task', 'missing')}; expected one of {', '.join(TASKS)}")
        if command.compare:
            methods = [method.strip() for method in command.compare.split(",")]
            print(compare(methods, command.seeds, command.jobs, given))
        else:
            train(configure(**given))
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        if given.get("debug"):
            raise
        print(f"elastic_reset.py: {one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt as interrupt:
        print(f"elastic_reset.py: {one_line(interrupt) or 'stopped; --resume true goes on'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
