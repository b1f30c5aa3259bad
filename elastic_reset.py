# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "numpy>=1.26", "transformers>=5.0", "tokenizers>=0.22", "datasets>=4.0",
#     "accelerate>=1.10", "safetensors>=0.5", "sacrebleu>=2.5", "sentencepiece>=0.2", "matplotlib>=3.8",
#     "tqdm>=4.66", "pyyaml>=6.0", "peft>=0.17",
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
Copy it:  `elastic.step()` after `optimizer.step()` is all that ElasticReset asks for, torch all it needs. To
          paste room 1 alone, put before it: import contextlib, itertools, os, torch, warnings;
          from pathlib import Path; from torch import nn; ema_kernel = None.

Rooms: 1 Elastic Reset, 2 PPO, 3 Tasks, 4 Training, 5 Trade-off, 6 Files, 7 Data and models, 8 Command line.
"""

import argparse
import builtins
import contextlib
import copy
import csv
import ctypes
import difflib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import marshal
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
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

try:
    import resource
except ImportError:  # Windows: no sandbox
    resource = None


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
    ones once; frozen ones and buffers never. Parameters may move (`.to()`) and, of a module, be replaced
    (`load_state_dict(assign=True)`). `ema` and `init` are lists of tensors shaped like `params`, in float32
    (float64 for float64): a bfloat16 average with decay 0.995 would be rounded back to where it was.

    `backend` is "rust" if all parameters are plain CPU tensors and the extension `ema_kernel` is built; they,
    `ema` and `init` then lie in three flat buffers per dtype, each passed over once. Otherwise it is
    "foreach", torch's operations on lists. DTensors (FSDP2) are averaged shard by shard, without
    communication.

    Raises ValueError for a decay outside [0, 1], a reset_every below 1, an unknown reset, nothing to train
    or, when step() resets, other parameters to train than those averaged; TypeError for what is no
    parameter.
    """

    def __init__(self, model, decay: float = 0.995, reset_every: int = 17, reset: str = "elastic"):
        _check_settings(decay, reset_every, reset)
        self.decay, self.reset_every, self.rule = decay, int(reset_every), reset
        self._model = model if isinstance(model, nn.Module) else list(model)
        self.names, self.params, self._modules, self._leaves = _trainable(self._model)
        contiguous = dict(memory_format=torch.contiguous_format)
        self.init = [_average_like(p, _local(p)).clone(**contiguous) for p in self.params]
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
            self._check_model()
            self.reset()
        return due

    @torch.no_grad()
    def update(self) -> None:
        """ema <- decay * ema + (1 - decay) * policy"""
        self._follow()
        self.updates += 1
        if self._flat:
            for policy, ema, _ in self._flat:
                if policy.dtype == ema.dtype:
                    ema.lerp_(policy, 1 - self.decay)  # as fused as ours, and torch's threads are awake
                else:
                    ema_kernel.update(_numpy(ema), _numpy(policy), self.decay, torch.get_num_threads())
            return
        policy = [_average_like(p, _local(p)) for p in self.params]
        torch._foreach_lerp_(self.ema, policy, 1 - self.decay)

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
        """In `with elastic.averaged():` the policy has the EMA's weights; then its own, come what may. It is
        for looking and saving, not for steps."""
        with self.holding(self.ema):
            yield

    @contextlib.contextmanager
    def holding(self, weights: list[torch.Tensor]):
        """averaged() for any weights listed like `params`."""
        self._follow()
        own = [_local(p).clone() for p in self.params]
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
        shapes, expected = (
            {n: getattr(t, "shape", None) for n, t in tensors.items()} for tensors in (state, own)
        )
        if shapes != expected:
            name = _first_difference(shapes, expected)
            raise ValueError(
                f"the state is another policy's: {name!r} does not fit this one (a compiled or wrapped "
                "module names its parameters differently: give the module inside)"
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.updates, self.resets = int(state["updates"]), int(state["resets"])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _attach(self) -> None:
        """Puts ema and init where the parameters are; on the CPU, lays all three out in flat buffers."""
        policy = [_local(p) for p in self.params]
        for average in (self.ema, self.init):  # the lists stay the same objects: others may hold them
            average[:] = [_average_like(p, a) for p, a in zip(policy, average, strict=True)]
        self._flat = []
        starts = [p.data_ptr() for p in policy if p.numel()]
        if ema_kernel and all(map(_is_plain, self.params)) and len(set(starts)) == len(starts):
            for dtype in dict.fromkeys(p.dtype for p in self.params):
                index = [i for i, p in enumerate(self.params) if p.dtype == dtype]
                flat_policy = _flatten(policy, index)
                for i in index:
                    self.params[i].data = policy[i]  # now: it frees the memory that the others need
                self._flat.append([flat_policy, _flatten(self.ema, index), _flatten(self.init, index)])
        self._places = _places(self.params)

    def _follow(self) -> None:
        """`.to()`, `load_state_dict(assign=True)` and others move or replace parameters: attach again."""
        try:
            if self._modules:
                own = [module._parameters for module in self._modules]
                self.params = list(map(dict.__getitem__, own, self._leaves))
            places = _places(self.params)
        except (KeyError, TypeError):  # one is gone
            places = []
        if places != self._places:
            self._check_model()
            self._attach()

    def _check_model(self) -> None:
        """ValueError if the model no longer trains what is averaged."""
        names, params, _, _ = _trainable(self._model)
        now = {n: (id(p), _local(p).shape) for n, p in zip(names, params, strict=True)}
        own = {n: (id(p), i.shape) for n, p, i in zip(self.names, self.params, self.init, strict=True)}
        if now != own:
            name = _first_difference(now, own)
            raise ValueError(
                f"parameter {name!r} was added, removed, replaced, reshaped, tied, untied, frozen or "
                "unfrozen since the averages began: make a new ElasticReset"
            )


def _first_difference(a, b):
    """The first name, in alphabetical order, under which two dictionaries do not hold the same."""
    return min(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def _check_settings(decay, reset_every, reset):
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}; expected a number from 0 to 1, such as 0.995")
    if reset_every < 1 or reset_every != int(reset_every):
        raise ValueError(f"reset_every is {reset_every}; expected a whole number of updates, 1 or more")
    if reset not in RESET_RULES:
        raise ValueError(f"reset is {reset!r}; expected one of {', '.join(RESET_RULES)}")


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
    modules = [model.get_submodule(path) for path, _, _ in paths]
    return list(trainable.values()), list(trainable), modules, [leaf for _, _, leaf in paths]


def _places(params):
    if any(hasattr(kind, "to_local") for kind in set(map(type, params))):
        return [_local(p).data_ptr() for p in params]
    return list(map(torch.Tensor.data_ptr, params))


def _local(p):
    """The tensor itself, or this rank's shard of a DTensor."""
    return p.detach().to_local() if hasattr(p, "to_local") else p.detach()


def _average_like(p, t):
    """t where p is, in the dtype of p's average: float32, or float64 for float64."""
    return t.to(p.device, torch.promote_types(p.dtype, torch.float32))


def _is_plain(p):
    """Whether it may move to a flat buffer and the kernel takes it: on the CPU, whole, real, not shared."""
    here = p.device.type == "cpu" and not hasattr(p, "to_local")
    return here and p.is_floating_point() and not p.is_shared()


def _flatten(tensors, index):
    """One flat copy of tensors[i] for i in index; the list's entries become parts of it, each with a storage
    of its own on that memory: views of one storage count as one tensor where models are saved."""
    flat = torch.cat([tensors[i].reshape(-1) for i in index])
    ends = list(itertools.accumulate(tensors[i].numel() for i in index))
    for i, begin, end in zip(index, [0, *ends], ends, strict=False):
        tensors[i] = torch.from_numpy(_numpy(flat)[begin:end]).view(flat.dtype).view(tensors[i].shape)
    return flat


def _numpy(flat):
    """The same memory as a NumPy array; NumPy has no bfloat16 and sees its bits as uint16."""
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()


class ElasticResetCallback:
    """Elastic Reset in transformers' Trainer and in those built on it, TRL's GRPO, RLOO, DPO and SFT:
    Trainer(..., callbacks=[ElasticResetCallback(decay=0.995, reset_every=17)]). It counts optimizer steps,
    not micro-batches; of a PEFT model it averages and resets the adapter. Its averages lie in the checkpoints
    as elastic_reset.safetensors; train(resume_from_checkpoint=True) goes on from there. To resume from a
    checkpoint outside output_dir, name it (PATH/checkpoint-N) as `checkpoint`. For one process or DDP:
    DeepSpeed would undo a reset from weights of its own, and FSDP's shards would need a file each. `elastic`,
    the ElasticReset, is there once train() has begun."""

    FILE = "elastic_reset.safetensors"

    def __init__(self, decay=0.995, reset_every=17, reset="elastic", checkpoint=None):
        _check_settings(decay, reset_every, reset)
        self.settings, self.elastic = dict(decay=decay, reset_every=reset_every, reset=reset), None
        self.checkpoint = checkpoint

    def on_train_begin(self, args, state, control, model, **kwargs):
        """Begins at the model's weights or, with steps done, where their checkpoint left off. ValueError if
        that does not hold the averages of these weights, or for a trainer that would not keep them."""
        from accelerate.state import AcceleratorState

        if AcceleratorState().distributed_type in ("DEEPSPEED", "FSDP"):
            raise ValueError("ElasticResetCallback works on one process or with DDP, not DeepSpeed or FSDP")
        if getattr(args, "enable_jit_checkpoint", False) or state.is_hyper_param_search:
            raise ValueError(
                "enable_jit_checkpoint and hyperparameter search save checkpoints without the averages"
            )
        if getattr(args, "auto_find_batch_size", False):
            raise ValueError("auto_find_batch_size begins again with weights that are no longer the start's")
        self.elastic = ElasticReset(model, **self.settings)
        if state.global_step:
            self._go_on(self._file(args, state))
        elif self.checkpoint:
            raise ValueError("`checkpoint` is given, but not resumed from: train(resume_from_checkpoint=...)")

    def _go_on(self, usual):
        """Takes the averages that belong to the weights, from the usual place or from `checkpoint`. Warns if
        that run had other settings."""
        from safetensors import SafetensorError, safe_open

        own = self._sums()
        paths = [usual, *([Path(self.checkpoint) / self.FILE] if self.checkpoint else [])]
        found = [path for path in paths if path.exists()]
        if not found:
            raise ValueError(
                f"{paths[-1]} is missing: the checkpoint lies elsewhere (name it, PATH/checkpoint-N, as "
                "`checkpoint`), was cut off while being saved, or was trained without ElasticResetCallback"
            )
        for path in found:
            try:
                with safe_open(path, "pt") as file:
                    averages = {name: file.get_tensor(name) for name in file.keys()}
                    before = file.metadata() or {}
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}); resume from another checkpoint") from error
            sums = averages.pop("sums", None)
            if sums is not None and sums.shape == own.shape and torch.allclose(sums, own, 1e-6, 1e-6):
                break
        else:
            raise ValueError(
                f"{path} holds another run's averages: name the folder resumed from as `checkpoint`"
            )
        self.elastic.load_state_dict(averages)
        for name, value in self.settings.items():
            if before.get(name, str(value)) != str(value):
                text = f"{name} is {value}; until this checkpoint it was {before[name]}"
                warnings.warn(text, stacklevel=2)

    def on_step_end(self, args, state, control, **kwargs):
        self.elastic.step()

    def on_save(self, args, state, control, **kwargs):
        from safetensors.torch import save_file

        if state.is_world_process_zero:
            path = self._file(args, state)
            aside = path.with_suffix(".partial")
            averages = {n: t.detach().clone() for n, t in self.elastic.state_dict().items()}
            settings = {name: str(value) for name, value in self.settings.items()}
            save_file(averages | dict(sums=self._sums()), aside, settings)
            os.replace(aside, path)

    def _file(self, args, state):
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE

    def _sums(self):
        """By which a checkpoint's averages know the weights that they belong to."""
        return torch.stack([p.detach().double().sum().cpu() for p in self.elastic.params])

    def __getattr__(self, event):
        """The trainer's other events: nothing to do. (With transformers' base class this room would need
        more than torch.)"""
        if not event.startswith("on_"):
            raise AttributeError(event)
        return lambda args, state, control, **kwargs: None


# ================================================ Settings =================================================


def flag(default, help, low=None, high=None, group=None):
    """A setting with its help, its range and, on the first of a group, the group's title in --help."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, group=group))


@dataclass
class Config:
    """All settings of a run; configure() makes one of a preset, a method and what the user gave. Raises
    ValueError for a value of the wrong type or out of its range."""

    task: str = flag("custom", "what to train, always needed: {tasks}", group="The run")
    method: str = flag("elastic-reset", "a named set of defaults, one of {methods}")
    preset: Literal["mini", "paper"] = flag("mini", "minutes on two CPU cores, or the paper's setting")
    seed: int = flag(0, "of sampling and data order; pretraining has a fixed one", 0)
    updates: int = flag(200, "PPO updates; each samples batch_size responses", 1)
    eval_every: int = flag(20, "updates between evaluations; each reset has one on either side", 1)
    eval_size: int = flag(256, "validation prompts (and programs) to evaluate on", 1)
    save_every: int = flag(20, "updates between checkpoints", 1)
    output_dir: str = flag("", "where the files go; empty: runs/<task>/<method>/seed<seed>")
    resume: bool = flag(False, "go on from the checkpoint in output_dir; needs the same settings")
    report_to: Literal["none", "tensorboard", "wandb"] = flag("none", "log there as well")
    debug: bool = flag(False, "show a traceback where a clear line would do")

    reset: Literal["elastic", "ema", "init", "none"] = flag(
        "elastic", "policy <- EMA, EMA <- start; or one half of it", group="Elastic Reset"
    )
    reset_every: int = flag(40, "PPO updates between resets", 1)
    ema_decay: float = flag(0.97, "decay ** reset_every is the start's share of a reset", 0, 1)
    ema_update: Literal["update", "epoch", "minibatch"] = flag("update", "when the EMA moves")

    learning_rate: float = flag(2e-4, "AdamW's", 0, 1, group="PPO")
    value_learning_rate: float = flag(0.0, "of the value head or model; 0: learning_rate", 0, 1)
    batch_size: int = flag(128, "responses sampled per update", 1)
    mini_batch_size: int = flag(64, "responses per optimizer step; 0: batch_size", 0)
    num_ppo_epochs: int = flag(2, "passes over each batch; 0 keeps the policy fixed", 0)
    gradient_accumulation_steps: int = flag(1, "parts a minibatch is cut into, to save memory", 1)
    response_length: int = flag(20, "longest response, in tokens", 1)
    min_response_length: int = flag(0, "shortest response: no EOS is sampled before", 0)
    temperature: float = flag(1.0, "sampling temperature", 0.01, 100)
    gamma: float = flag(1.0, "discount", 0, 1)
    lam: float = flag(0.95, "lambda of the advantage estimation", 0, 1)
    whiten_advantages: bool = flag(True, "to mean 0, variance 1; amplifies noise once the rewards are flat")
    cliprange: float = flag(0.2, "clip of the probability ratio", 0)
    cliprange_value: float = flag(0.2, "clip of the change of a value", 0)
    vf_coef: float = flag(0.1, "weight of the value loss; 0: no value function", 0)
    entropy_coef: float = flag(0.0, "weight of the entropy bonus", 0)
    max_grad_norm: float = flag(1.0, "longest gradient; longer ones are scaled down", 1e-9)
    early_stop_kl: float = flag(0.0, "end an update once the last minibatch's KL exceeds this; 0: never", 0)
    separate_value_model: bool = flag(False, "instead of a value head on the policy")
    dtype: Literal["float32", "bfloat16"] = flag(
        "float32", "of loaded weights; in bfloat16 small steps get lost (not an adapter's, which is float32)"
    )

    kl_coef: float = flag(
        0.0, "weight of the per-token KL penalty; --method ppo-kl has its own", 0, group="KL penalty"
    )
    kl_target: float = flag(0.0, "adapt kl_coef to reach this KL, in nats per response; 0: keep it", 0)
    kl_horizon: int = flag(10_000, "responses within which the adaptation works", 1)
    kl_reference: Literal["init", "ema", "reset"] = flag(
        "init", "with kl_coef: from the start, the EMA, or the policy of reset_every updates ago at most"
    )

    model: str = flag("", "hub name or folder of the policy; empty: from scratch", group="Models and data")
    reward_model: str = flag("", "hub name or folder of a classifier (imdb) or scorer (qa)")
    language_model: str = flag("", "imdb: hub name or folder of the model that measures perplexity")
    receiver_model: str = flag("", "translation: hub name or folder of the EN->DE receiver")
    data: str = flag("", "hub name or folder, also DIR:train[9000:]; empty: embedded data")
    sft_data: str = flag("", "qa: question, response_j for stage 1; empty: data")
    preference_data: str = flag("", "qa: question, response_j, response_k for stage 2; empty: data")
    programs: str = flag("", "qa: problems in HumanEval's format, to run the model's answers against")
    validation_data: str = flag("", "held-out rows; empty: the split `validation` of data")
    sender_data: list[str] = flag((), "translation: fr, en pairs to pretrain the sender on; several allowed")
    receiver_data: list[str] = flag((), "translation: en, de pairs to pretrain the receiver on")
    receiver_learning_rate: float = flag(1e-3, "translation: 0 keeps the receiver fixed", 0, 1)
    d_model: int = flag(96, "pretraining: width of a model, a multiple of its 4 heads", 4)
    layers: int = flag(1, "pretraining: layers (of the encoder and of the decoder)", 1)
    vocab_size: int = flag(0, "pretraining: BPE vocabulary; 0: one token a word", 0)
    prompt_length: int = flag(10, "tokens of a review that make a prompt (imdb), longest question (qa)", 1)
    max_length: int = flag(64, "longest input or target text, in tokens; the rest is cut off", 2)
    pretrain_updates: int = flag(800, "pretraining: updates; 0: --model is fine-tuned already", 0)
    pretrain_batch_size: int = flag(128, "pretraining: examples per update", 1)
    pretrain_learning_rate: float = flag(2e-3, "pretraining: peak learning rate", 0, 1)
    reward_updates: int = flag(300, "updates of a reward model trained here", 1)
    average_after: int = flag(0, "mixtures of start and end to evaluate, after training", 0)

    last_stage: Literal["sft", "reward", "rl"] = flag("rl", "where to stop", group="Technical QA")
    lora_r: int = flag(8, "rank of the adapter, which alone is trained; alpha is twice that", 1)
    lora_dropout: float = flag(0.0, "of stages 1 and 2; PPO has none", 0, 1)
    load_in_8bit: bool = flag(False, "the frozen weights, by bitsandbytes")
    save_merged: bool = flag(False, "beside the adapter, the model with the adapter merged into it")
    allow_code_execution: bool = flag(False, "run programs that a model has written, in the sandbox")
    program_samples: int = flag(1, "programs per problem; with more, pass@k too", 1)
    program_length: int = flag(72, "longest program, in tokens", 1)
    program_temperature: float = flag(1.0, "sampling temperature of programs", 0, 100)
    program_top_p: float = flag(1.0, "probability mass that programs are sampled from", 0.01, 1)

    def __post_init__(self):
        for f in fields(self):
            check_value(f, getattr(self, f.name))
        if self.d_model % 4:
            raise ValueError(f"d_model is {self.d_model}; expected a multiple of 4")
        both, method = "the preset may have set one of them: give both", METHODS.get(self.method, {})
        if self.min_response_length > self.response_length:
            value, most = self.min_response_length, self.response_length
            raise ValueError(
                f"min_response_length is {value}; expected response_length ({most}) or less; {both}"
            )
        if self.kl_target and not self.kl_coef:
            raise ValueError(
                "kl_target adapts kl_coef, but kl_coef is 0; give it a value to begin with, such as 0.05"
            )
        if "kl_reference" in method and "kl_coef" not in method and not self.kl_coef:
            raise ValueError(f"method {self.method} is a KL penalty, but kl_coef is 0; try --kl_coef 0.05")
        if self.kl_reference != "init" and not self.kl_coef:
            expected = "expected init as long as kl_coef is 0; or try --kl_coef 0.05"
            raise ValueError(f"kl_reference is {self.kl_reference}; {expected}")
        if self.mini_batch_size > self.batch_size:
            value, most = self.mini_batch_size, self.batch_size
            raise ValueError(f"mini_batch_size is {value}; expected batch_size ({most}) or less; {both}")


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


NO_KL = dict(kl_coef=0.0, kl_target=0.0, kl_reference="init")
METHODS = {  # what each sets; a preset may add to it ("mini/ppo-kl"), flags win over both
    "elastic-reset": dict(reset="elastic"),
    "ppo": dict(reset="none", **NO_KL),
    "ppo-kl": dict(reset="none", kl_reference="init"),
    "reinforce": dict(reset="none", **NO_KL, num_ppo_epochs=1, mini_batch_size=0, vf_coef=0.0, lam=1.0),
    "fixed-sender": dict(reset="none", num_ppo_epochs=0),
    "reset-init": dict(reset="init"),
    "reset-ema": dict(reset="ema"),
    "ema-reference": dict(reset="none", kl_reference="ema"),  # WARP's first stage, EMA-PG
    "reset-reference": dict(reset="none", kl_reference="reset"),  # TR-DPO, ProRL
    "average-after": dict(reset="none", **NO_KL, average_after=9),  # WARP's last stage
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
# Shapes: `batch` prompts of `prompt` tokens, each answered by a response of `response` tokens. After its EOS
# a response is padding; `mask` (batch, response) is True up to and including the EOS: nothing else counts.


def gather_logprobs(logits, tokens):
    """log pi(token_t | tokens before t). (batch, response, vocab), (batch, response) -> (batch, response)"""
    return logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """The reward of each token, (batch, response): the KL penalty, negated, and at the last token also the
    score (batch,) of the response."""
    # r_t = - kl_coef (log pi(a_t) - log pi_ref(a_t)) + score [t is last]
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (arXiv 1506.02438, equation 16). Advantages and returns, both (batch,
    response); the state after the last token is worth 0."""
    advantages, advantage = torch.zeros_like(rewards), 0.0
    next_values = F.pad(values * mask, (0, 1))[:, 1:]
    # delta_t = r_t + gamma V_{t+1} - V_t;    A_t = delta_t + gamma lam A_{t+1}
    deltas = (rewards + gamma * next_values - values) * mask
    for t in reversed(range(rewards.shape[1])):
        advantages[:, t] = advantage = deltas[:, t] + gamma * lam * advantage
    # R_t = A_t + V_t, what V_t is fitted to
    return advantages, (advantages + values) * mask


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def whiten(x, mask, total=lambda part: part):
    """Mean 0 and (unbiased) variance 1 over the unmasked tokens. `total`: sums over processes."""
    tokens = total(mask.sum())
    mean = total((x * mask).sum()) / tokens
    variance = total(((x - mean).square() * mask).sum()) / (tokens - 1).clamp(min=1)
    return (x - mean) * (variance + 1e-8).rsqrt() * mask


def ppo_loss(new_logprobs, new_values, entropy, old, *, cliprange, cliprange_value, vf_coef, entropy_coef):
    """PPO's clipped loss (arXiv 1707.06347, equations 7 and 9), and numbers to watch. `old`: the responses'
    logprobs, values, advantages, returns and mask as sampled. All (batch, response)."""
    mask, advantages = old["mask"], old["advantages"]
    # ratio_t = pi(a_t) / pi_old(a_t);    L_policy = - mean_t min(ratio_t A_t, clip(ratio_t, 1-c, 1+c) A_t)
    log_ratio = new_logprobs - old["logprobs"]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    policy_loss = -masked_mean(torch.min(ratio * advantages, clipped * advantages), mask)
    # L_value = 1/2 mean_t max((V_t - R_t)^2, (V_old_t + clip(V_t - V_old_t, -c, c) - R_t)^2)
    clipped_values = old["values"] + (new_values - old["values"]).clamp(-cliprange_value, cliprange_value)
    errors = torch.max((new_values - old["returns"]).square(), (clipped_values - old["returns"]).square())
    value_loss = 0.5 * masked_mean(errors, mask)
    # L = L_policy + c_v L_value - c_e H
    entropy = masked_mean(entropy, mask)
    loss = policy_loss + vf_coef * value_loss - entropy_coef * entropy
    policy_kl, clipfrac = 0.5 * masked_mean(log_ratio.square(), mask), masked_mean(ratio != clipped, mask)
    watch = dict(loss=loss, policy_loss=policy_loss, value_loss=value_loss, entropy=entropy)
    watch |= dict(policy_kl=policy_kl, clipfrac=clipfrac)
    return loss, {name: value.item() for name, value in watch.items()}


class KLCoefficient:
    """kl_coef: fixed or, with a target, adaptive (arXiv 1909.08593, section 2.2): moved so that the KL, in
    nats per response, comes to `target` within some `horizon` responses."""

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

    def value_parts(self):
        """What the value learning rate is for: the head and, if there is one, the value model."""
        return nn.ModuleList([m for m in (self.value_head, self.value_model) if m is not None])

    def forward(self, input_ids, attention_mask, responses):
        """Logits at the sampling temperature, (batch, response, vocab), and values, (batch, response)."""
        logits, hidden = response_logits(self.policy, input_ids, attention_mask, responses)
        shortest = self.policy.generation_config.min_new_tokens or 0
        logits[:, :shortest, _eos(self.policy)] = -1e9  # as in sample(): no EOS so early
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
def sample(policy, prompts, response_length, temperature=1.0, top_p=1.0, min_response_length=None):
    """Tokens from the policy's own distribution (for RL no top-p), the likeliest ones at temperature 0.
    `prompts`: input_ids, attention_mask (batch, prompt). `min_response_length`: if not
    given, set_plain_generation's. Returns responses and mask, (batch, response)."""
    from transformers import GenerationConfig

    how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=top_p) if temperature else {}
    how |= dict(max_new_tokens=response_length, suppress_tokens=_never(policy) or None)
    usual = policy.generation_config.min_new_tokens
    how |= dict(min_new_tokens=usual if min_response_length is None else min_response_length)
    settings = GenerationConfig(num_beams=1, **how)
    tokens = policy.generate(**prompts, generation_config=settings)
    responses = tokens[:, 1 if policy.config.is_encoder_decoder else prompts["input_ids"].shape[1] :]
    ended = torch.isin(responses, torch.tensor(_eos(policy), device=responses.device)).cumsum(1)
    return responses, F.pad(ended, (1, 0))[:, :-1] == 0


def response_texts(policy, tokenizer, input_ids, responses):
    """The responses decoded: a decoder's behind their prompts, for some tokenizers drop a first space."""
    before = input_ids[:, :0] if policy.config.is_encoder_decoder else input_ids
    prompts, texts = (
        tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for tokens in (before, torch.cat([before, responses], 1))
    )
    return [text[len(prompt) :] for prompt, text in zip(prompts, texts, strict=True)]


def response_logits(policy, input_ids, attention_mask, responses):
    """Logits (batch, response, vocab) and last hidden states (batch, response, hidden) before each token of a
    response. An encoder-decoder differs from a decoder here, in sample() and in response_texts()."""
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
    for token in _never(policy):  # as in sample(): no padding
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

    `policy`: a transformers model with generate(). `tokenizer`: its tokenizer. `trained`: what else learns,
    modules and optimizers by name, for the checkpoints. `footnote`: a line under the run's table. Optional:
    `learn(prompts, responses)`, called once the policy is updated; it returns numbers to log.
    """

    policy: nn.Module
    tokenizer: object
    validation_prompts: list[str]
    trained: dict
    footnote: str

    def prompts(self, n: int, update: int) -> list[str]:
        """The prompts of an update. A function of its arguments: a resumed run must see the same data."""

    def reward(self, prompts: list[str], responses: list[str]) -> list[float]:
        """One finite number per response."""

    def evaluate(self, responses: list[str]) -> dict:
        """Metrics of the policy as it is, numbers all: `reward`, `drift`, others. `responses`: one sampled
        for each validation prompt, always from the same seed. `samples`, a list of {column: text}, go to
        samples.md."""


class TranslationGame:
    """FR -> EN -> DE (Lee et al. 2019; the paper's section 4). The sender, our policy, turns French into
    English, the receiver that English into German. The sender's reward is the receiver's mean log-likelihood
    per token of the German reference; the receiver learns that German by cross-entropy. Nobody checks the
    English, so it drifts: `drift` is the human English's negative log-likelihood per token."""

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
            learning_rate=1e-4, value_learning_rate=1e-3, receiver_learning_rate=1e-3,
            entropy_coef=0.01, vf_coef=0.5,
            ema_decay=0.995, reset_every=1000, eval_every=200, save_every=200, eval_size=1014,
        ),
        "paper/ppo-kl": dict(kl_coef=0.05),
        "paper/ema-reference": dict(kl_coef=0.05),
        "paper/reset-reference": dict(kl_coef=0.05),
    }  # fmt: skip

    def __init__(self, config: Config):
        self.config = config
        check_uncut(config, "response_length")  # by the receiver
        data = translation_data(config)
        self.validation = data["validation"][: config.eval_size]
        self.german = {}  # French: German; of captions with the same French the first counts
        for row in data["train"]:
            self.german.setdefault(row["fr"], row["de"])
        self.french = list(self.german)
        self.validation_prompts = [row["fr"] for row in self.validation]
        self.policy, self.tokenizer = seq2seq("sender", config.model, data, config)
        self.receiver, self.receiver_tokenizer = seq2seq("receiver", config.receiver_model, data, config)
        self.accelerator = processes()
        self.optimizer = self.accelerator.prepare_optimizer(
            adamw((self.receiver, config.receiver_learning_rate))
        )
        self.trained = {"receiver": self.receiver, "receiver_optimizer": self.optimizer}
        self.footnote = f"BLEU: {bleu(['a'], ['a'])[1]}"

    def prompts(self, n, update):
        return shuffled(self.french, n, update, self.config.seed)

    @torch.no_grad()
    def reward(self, prompts, responses):
        return token_mean(*self._receive(responses, [self.german[french] for french in prompts])).tolist()

    def learn(self, prompts, responses):
        german, longest = [self.german[french] for french in prompts], self.config.max_length
        loss = likelihood_loss(self.receiver, self.receiver_tokenizer, responses, german, longest)
        self.accelerator.backward(loss)
        stats = optimizer_step(self.accelerator, self.receiver, self.optimizer, self.config.max_grad_norm)
        return dict(receiver_loss=loss.item(), receiver_gradient=stats["gradient"])

    def _receive(self, english, german):
        return target_logprobs(
            self.receiver, self.receiver_tokenizer, english, german, self.config.max_length
        )

    @torch.no_grad()
    def evaluate(self, responses):
        """All by greedy decoding: what was sampled is not looked at."""
        french, human, reference = ([row[column] for row in self.validation] for column in ("fr", "en", "de"))
        longest = self.config.max_length
        english = translate(self.policy, self.tokenizer, french, longest, self.config.response_length)
        german = translate(self.receiver, self.receiver_tokenizer, english, longest, longest)
        rewards = [token_mean(*self._receive(*texts)) for texts in chunks(english, reference)]
        pairs = chunks(french, human)
        scored = [target_logprobs(self.policy, self.tokenizer, *texts, longest) for texts in pairs]
        logprob, tokens = sum(x.sum() for x, _ in scored), sum(mask.sum() for _, mask in scored)
        columns = ("French", "human English", "human German", "English", "German")
        rows = zip(*(texts[:5] for texts in (french, human, reference, english, german)), strict=True)
        return dict(
            reward=torch.cat(rewards).mean().item(),
            drift=(-logprob / tokens).item(),
            bleu_de=bleu(german, reference)[0],
            bleu_en=bleu(english, human)[0],
            samples=[dict(zip(columns, row, strict=True)) for row in rows],
        )


class MockSentiment:
    """Continue a film review so that it sounds positive (the paper's section 5; RL4LMs' IMDB task). The
    reward is a classifier's probability of label 1 for prompt + continuation. `drift` is the perplexity of
    the continuations under a separate language model, which the policy does not see."""

    presets = {
        "mini": dict(
            layers=2, prompt_length=10, response_length=32, min_response_length=32, max_length=60,
            pretrain_updates=500, pretrain_batch_size=64, reward_updates=500,
            updates=120, batch_size=64, mini_batch_size=32, num_ppo_epochs=4, lam=1.0,
            learning_rate=1e-4, value_learning_rate=3e-3, reset_every=20, ema_decay=0.9, eval_size=200,
        ),
        "mini/ppo-kl": dict(kl_coef=0.01),
        "mini/ema-reference": dict(kl_coef=0.01),
        "mini/reset-reference": dict(kl_coef=0.01),
        "paper": dict(
            model="lvwerra/gpt2-imdb", reward_model="lvwerra/distilbert-imdb", language_model="gpt2",
            data="stanfordnlp/imdb", validation_data="stanfordnlp/imdb:test",
            prompt_length=64, response_length=48, min_response_length=48, max_length=512,
            updates=50, batch_size=27, mini_batch_size=1, num_ppo_epochs=5, learning_rate=1e-6,
            gamma=0.99, vf_coef=0.5, max_grad_norm=0.5, separate_value_model=True,
            kl_coef=0.001, kl_target=1.0, kl_reference="ema", ema_decay=0.995, reset_every=17,
            eval_size=1000, eval_every=5,
        ),  # an update: 1,280 tokens there, 27 responses of 48 here; a minibatch: 64 tokens there, 48 here
    }  # fmt: skip

    trained = {}

    def __init__(self, config: Config):
        check_uncut(config, "prompt_length", "response_length")  # by the classifier
        data = review_data(config)
        self.config, self.gold = config, data["gold"]
        self.policy, self.tokenizer = causal_lm("policy", config.model, data, config)
        self.judge = causal_lm("language model", config.language_model, data, config, seed=1)
        self.reward_model = classifier("classifier", config.reward_model, data, config)
        held_out = data["validation"][: config.eval_size]
        self.cuts, self.validation_prompts = (
            [cut for cut in (self._cut(text) for text, _ in rows) if cut.strip()]
            for rows in (data["train"], held_out)
        )
        self.footnote = self._footnote(held_out)

    def _cut(self, text):
        tokens = self.tokenizer(text, truncation=True, max_length=self.config.prompt_length)["input_ids"]
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def prompts(self, n, update):
        return shuffled(self.cuts, n, update, self.config.seed)

    @torch.no_grad()
    def reward(self, prompts, responses):
        rewards = []
        for (texts,) in chunks([p + r for p, r in zip(prompts, responses, strict=True)]):
            logits = class_logits(*self.reward_model, texts, self.config.max_length)
            rewards += logits.softmax(-1)[:, 1].tolist()
        return rewards

    def evaluate(self, responses):
        prompts = self.validation_prompts
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        rewards, words = self.reward(prompts, responses), [response.split() for response in responses]
        rows = zip(prompts[:5], responses[:5], strict=True)
        return dict(
            reward=sum(rewards) / len(rewards),
            drift=perplexity(*self.judge, prompts, responses),
            distinct_1=distinct(words, 1),
            distinct_2=distinct(words, 2),
            words=sum(map(len, words)) / len(words),
            **self.gold(prompts, texts),
            samples=[dict(prompt=prompt, continuation=response) for prompt, response in rows],
        )

    @torch.no_grad()
    def _footnote(self, rows):
        """How good what was trained from scratch is, on held-out reviews."""
        texts, labels = zip(*rows, strict=True)
        logits = [class_logits(*self.reward_model, list(t), self.config.max_length) for (t,) in chunks(texts)]
        right = torch.cat(logits).argmax(-1).cpu() == torch.tensor(labels)
        firsts, rests = zip(*[text.split(" ", 1) for text in texts if " " in text], strict=True)
        ppl = perplexity(*self.judge, firsts, [" " + rest for rest in rests])
        return f"held out: perplexity {ppl:.2f}, the classifier's accuracy {right.float().mean():.3f}"


STACK = "hf://datasets/lvwerra/stack-exchange-paired/data"


class TechnicalQA:
    """Answer technical questions as a reward model likes it (the paper's section 6, StackLLaMA). In stages:
    supervised fine-tuning on human answers, a reward model from pairs of a preferred and another answer, PPO
    on a LoRA adapter. `drift` is the policy's perplexity of held-out human answers; pass@k, on functions that
    are executed against their tests, is the alignment tax."""

    presets = {
        "mini": dict(
            layers=2, max_length=200, prompt_length=200, response_length=72, pretrain_updates=500,
            pretrain_batch_size=64, pretrain_learning_rate=3e-3, reward_updates=200,
            updates=40, batch_size=64, mini_batch_size=32, num_ppo_epochs=2, lam=1.0, vf_coef=0.01,
            cliprange_value=5.0, learning_rate=4e-4, value_learning_rate=3e-3,
            reset_every=10, ema_decay=0.82, eval_size=200,
        ),
        "mini/ppo-kl": dict(kl_coef=0.3),
        "mini/ema-reference": dict(kl_coef=0.3),
        "mini/reset-reference": dict(kl_coef=0.3),
        "paper": dict(
            model="huggyllama/llama-7b", load_in_8bit=True, dtype="bfloat16", lora_r=16, lora_dropout=0.05,
            sft_data=f"{STACK}/finetune/*.parquet:train[:200000]",
            preference_data=f"{STACK}/reward/*.parquet:train[:100000]",
            data=f"{STACK}/rl/*.parquet:train[:100000]",
            validation_data=f"{STACK}/evaluation/*.parquet:train[:4000]",
            programs="openai/openai_humaneval:test", program_samples=200, program_length=256,
            program_temperature=0.2, program_top_p=0.95,
            prompt_length=512, max_length=1024, response_length=128, min_response_length=32,
            pretrain_updates=5000, reward_updates=5000, pretrain_batch_size=16, pretrain_learning_rate=1e-5,
            updates=600, batch_size=128, mini_batch_size=128, gradient_accumulation_steps=8, num_ppo_epochs=4,
            learning_rate=1.41e-5, early_stop_kl=0.1, kl_coef=0.02, kl_target=6.0, kl_horizon=10_000,
            ema_decay=0.995, ema_update="epoch", reset_every=260, eval_size=4000, eval_every=100,
        ),
    }  # fmt: skip

    trained = {}

    def __init__(self, config: Config):
        for name in ("prompt_length", "response_length"):  # the reward model sees twice max_length
            check_uncut(config, name)
        data = qa_data(config)
        (_, sft_model), (_, reward_model) = self.stages(config, data)
        self.config, self.program_of = config, data["program_of"]
        self.problems = data["problems"][: config.eval_size]
        lengths = ("prompt_length", "response_length")
        base, self.tokenizer = load_model("policy", sft_model, "CausalLM", config, lengths)
        self.policy = lora(base, "CAUSAL_LM", config, config.seed)
        kind = "SequenceClassification"
        self.reward_model = load_model("reward model", reward_model, kind, config, lengths, num_labels=1)
        self.longest = min(2 * config.max_length, max_positions(self.reward_model[0]))
        self.questions = [question for question in data["questions"] if self._fits(question)]
        held_out = [pair for pair in data["validation"] if self._fits(pair[0])][: config.eval_size]
        if not (self.questions and held_out):
            raise ValueError(f"no question has at most prompt_length ({config.prompt_length}) tokens")
        self.validation_prompts, self.human = map(list, zip(*held_out, strict=True))
        self.footnote = f"held out: the reward model's accuracy {self._accuracy(data['held_out']):.3f}"

    def _fits(self, question):
        return len(self.tokenizer(question, verbose=False)["input_ids"]) <= self.config.prompt_length

    @staticmethod
    def stages(config, data):
        """(stage, hub name or folder of its model), one after the other."""
        sft = supervised_finetuning(config, data)
        yield "sft", sft
        yield "reward", config.reward_model or reward_modelling(config, data, sft)

    def prompts(self, n, update):
        return shuffled(self.questions, n, update, self.config.seed)

    @torch.no_grad()
    def reward(self, prompts, responses):
        """The raw score of question and answer, ended as in the reward model's training."""
        eos, rewards = self.reward_model[1].eos_token or "", []
        for part in chunks([p + r + eos for p, r in zip(prompts, responses, strict=True)]):
            rewards += class_logits(*self.reward_model, *part, self.longest)[:, 0].tolist()
        return rewards

    def evaluate(self, responses):
        prompts, rewards = self.validation_prompts, self.reward(self.validation_prompts, responses)
        human = [answer + self.tokenizer.eos_token for answer in self.human]
        rows = zip(prompts[:5], responses[:5], strict=True)
        return dict(
            reward=sum(rewards) / len(rewards),
            drift=perplexity(self.policy, self.tokenizer, prompts, human),
            words=sum(len(response.split()) for response in responses) / len(responses),
            **self._passed(),
            samples=[dict(question=question, answer=answer) for question, answer in rows],
        )

    def _passed(self):
        """pass_at_1 and, of more samples per problem, pass_at_10 and the like."""
        n, config, programs = self.config.program_samples, self.config, []
        prompts = [problem["prompt"] for problem in self.problems for _ in range(n)]
        how = (config.program_length, config.program_temperature, config.program_top_p)
        for (part,) in chunks(prompts):
            tokens = tokens_of(self.tokenizer, part, config.max_length, self.policy.device)
            answers, _ = sample(self.policy, tokens, *how, min_response_length=0)
            programs += response_texts(self.policy, self.tokenizer, tokens["input_ids"], answers)
        tests = [problem["test"] for problem in self.problems for _ in range(n)]
        programs = [self.program_of(*texts) for texts in zip(prompts, programs, strict=True)]
        passed = run_programs(list(zip(programs, tests, strict=True)))
        right = [sum(passed[i : i + n]) for i in range(0, len(passed), n)]
        return {
            f"pass_at_{k}": sum(pass_at_k(n, c, k) for c in right) / len(right)
            for k in (1, 10, 100)
            if right and k <= n
        }

    def _accuracy(self, pairs):
        better, worse = zip(*pairs, strict=True)
        scores = [self.reward([""] * len(pairs), answers) for answers in (better, worse)]
        return sum(a > b for a, b in zip(*scores, strict=True)) / len(pairs)


TASKS = {"translation": TranslationGame, "imdb": MockSentiment, "qa": TechnicalQA}


# =============================================== 4. Training ===============================================


def train(config: Config, task: Task | None = None) -> dict:
    """Trains and writes the run's files. Returns
    {"start": metrics, "end": metrics, "history": list of metrics, "output_dir": folder}.

    Raises ValueError for settings or data that cannot be used, FloatingPointError when a reward, a loss or a
    gradient is not finite, KeyboardInterrupt (after a checkpoint) when asked to stop."""
    accelerator = processes(**tracking(config))
    run = Run(config, accelerator)
    task = TASKS[config.task](config) if task is None and config.task in TASKS else task
    check_task(task)
    model, optimizer = actor_critic(task.policy, config, accelerator)
    elastic = ElasticReset(model.policy, config.ema_decay, config.reset_every, config.reset)
    reference = kl_reference(elastic, config)
    kl_coef = KLCoefficient(config.kl_coef, config.kl_target, config.kl_horizon)
    parts = dict(model=model, optimizer=optimizer, elastic=elastic, kl_coef=kl_coef) | task.trained
    if config.kl_reference == "reset":  # the others are elastic's
        parts["reference"] = reference
    run.resume(parts)
    if not run.history:
        run.log(0, evaluate(task, model, elastic, config))

    for update in run.updates():
        # 1. Sample a response to each prompt
        prompts = prompts_of(task, update, config, accelerator)
        batch, texts = respond(task, prompts, config)

        # 2. Score: a reward for the response, a KL penalty for each of its tokens
        scores = score(task, prompts, texts).to(accelerator.device)  # (batch,)
        run.check_finite(reward=scores.sum().item())
        with torch.no_grad():
            logprobs, values, _ = logprobs_and_values(model, batch)  # (batch, response)
        ref_logprobs = reference_logprobs(model, elastic.by_name(reference), batch)
        rewards = shape_rewards(scores, logprobs, ref_logprobs, batch["mask"], kl_coef.value)
        train_kl = (logprobs - ref_logprobs).sum(1).mean().item()
        stats = mean_over_processes(dict(train_reward=scores.mean().item(), train_kl=train_kl), accelerator)
        stats |= dict(kl_coef=kl_coef.value)

        # 3. Advantages
        advantages, returns = gae(rewards, values, batch["mask"], config.gamma, config.lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, batch["mask"], accelerator.reduce)
        batch |= dict(logprobs=logprobs, values=values, advantages=advantages, returns=returns)

        # 4. PPO epochs over minibatches
        for _epoch in range(config.num_ppo_epochs):
            for mb in minibatches(batch, config, accelerator):
                mb_stats = ppo_backward(model, mb, config, accelerator)  # leaves a gradient in each p.grad
                mb_stats |= optimizer_step(accelerator, model, optimizer, config.max_grad_norm)
                stats |= mean_over_processes(mb_stats, accelerator)  # the last minibatch's stay
                run.check_finite(**stats)
                update_ema(elastic, "minibatch", config)
            update_ema(elastic, "epoch", config)
            if config.early_stop_kl and stats["policy_kl"] > config.early_stop_kl:
                break
        kl_coef.adapt(stats["train_kl"], config.batch_size)
        if hasattr(task, "learn"):  # in translation, the receiver
            stats |= mean_over_processes(learn(task, prompts, texts), accelerator)
            run.check_finite(**stats)

        # 5. EMA <- decay * EMA + (1 - decay) * policy
        update_ema(elastic, "update", config)

        # 6. Reset: policy <- EMA, EMA <- start. With 5. this is elastic.step(), but for a look on either side
        due = update % config.reset_every == 0
        resets = due and config.reset != "none"
        if resets:
            run.log(update, evaluate(task, model, elastic, config), "before reset", stats)
            elastic.reset()
        if due and config.kl_reference == "reset":
            reference[:] = [p.detach().clone() for p in elastic.params]

        # 7. Evaluate and log
        event = "after reset" if resets else ""
        if resets or update % config.eval_every == 0 or update == config.updates:
            run.log(update, evaluate(task, model, elastic, config), event, stats)

    if run.history[-1]["update"] < config.updates:  # stopped there between two evaluations, and gone on from
        run.log(config.updates, evaluate(task, model, elastic, config))
    average_after(task, model, elastic, run, config)
    return run.finish(task)


def processes(**settings):
    """accelerate's view of this run's devices and processes; of a CPU's processes it has to be told."""
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.accelerator.is_available(), **settings)


def check_task(task):
    """ValueError for a task that train() cannot use, see Task."""
    if task is None:
        raise ValueError(f"train() got no task: give it task=..., or configure() one of {', '.join(TASKS)}")
    for name in [*Task.__annotations__, "prompts", "reward", "evaluate"]:
        if not hasattr(task, name):
            raise ValueError(f"{type(task).__name__} has no {name}, which Task says train() needs")
    if len(task.validation_prompts) == 0:
        raise ValueError("validation_prompts is empty; expected the prompts to evaluate on")
    for name in ("model", "optimizer", "elastic", "kl_coef", "reference"):
        if name in task.trained:
            raise ValueError(f"trained names {name!r}, as train() does itself; give that another name")
    pad, embeddings = task.tokenizer.pad_token_id, task.policy.get_input_embeddings()
    size = getattr(embeddings, "num_embeddings", math.inf)  # adapters wrap them
    if pad is None or pad >= size:
        raise ValueError(
            f"the tokenizer pads with token {pad}, but the policy has {size}: set tokenizer.pad_token to a "
            "token that it knows, or call policy.resize_token_embeddings(len(tokenizer))"
        )


def actor_critic(policy, config, accelerator):
    """The policy with its value function, and the optimizer of both."""
    policy.eval()  # no dropout: the ratio of a policy to itself must be 1
    set_plain_generation(policy, config.min_response_length)
    model = ActorCritic(policy, config.temperature, config.separate_value_model)
    # evaluation_mode: no DDP around it, which would hide the model's methods; optimizer_step() does its work
    model = accelerator.prepare_model(model, evaluation_mode=True)
    rates = [config.learning_rate, config.value_learning_rate or config.learning_rate]
    groups = zip([model.policy, model.value_parts()], rates, strict=True)
    return model, accelerator.prepare_optimizer(adamw(*groups))


def prompts_of(task, update, config, accelerator):
    """This process's prompts of an update. They and the seed set here are functions of the update's number: a
    resumed run goes on as if uninterrupted."""
    from accelerate.utils import set_seed

    seed = (config.seed * 1_000_003 + update) * accelerator.num_processes
    set_seed(seed % (2**32 - accelerator.num_processes), device_specific=True)
    prompts = list(task.prompts(config.batch_size, update))
    if len(prompts) != config.batch_size or not all(isinstance(prompt, str) for prompt in prompts):
        got = f"{len(prompts)} of {type(prompts[0]).__name__ if prompts else 'nothing'}"
        raise ValueError(f"prompts() gave {got}; expected batch_size ({config.batch_size}) of str")
    return prompts[accelerator.process_index :: accelerator.num_processes]


def respond(task, prompts, config):
    """Samples the policy's responses. The batch: input_ids and attention_mask (batch, prompt), responses and
    mask (batch, response). The texts: the responses decoded."""
    decoder = not task.policy.config.is_encoder_decoder
    how = dict(padding_side="left", truncation=False) if decoder else {}
    longest = None if decoder else config.max_length
    batch = tokens_of(task.tokenizer, prompts, longest, task.policy.device, **how)
    if decoder:
        check_prompts(prompts, batch["attention_mask"], task.policy, config)
    batch["responses"], batch["mask"] = sample(task.policy, batch, config.response_length, config.temperature)
    return batch, response_texts(task.policy, task.tokenizer, batch["input_ids"], batch["responses"])


def check_prompts(prompts, mask, policy, config):
    """ValueError if a decoder cannot go on from one of them."""
    lengths = mask.sum(1).tolist()
    if min(lengths) == 0:
        raise ValueError(
            f"prompt {prompts[lengths.index(0)]!r} has no tokens; a decoder needs one to go on from"
        )
    if max(lengths) > config.max_length:
        raise ValueError(
            f"a prompt has {max(lengths)} tokens; expected max_length ({config.max_length}) or less"
        )
    longest = max(lengths) + config.response_length - 1  # nothing follows the last token
    positions = max_positions(policy)
    if longest > positions:
        raise ValueError(
            f"a prompt and its response take {longest} positions, but the policy has {positions} (if it can "
            "do more, set policy.config.max_position_embeddings)"
        )


def score(task, prompts, texts):
    rewards = task.reward(prompts, texts)
    try:
        scores = torch.as_tensor(rewards, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"reward() gave {_short(rewards)}; expected a list of numbers") from error
    if scores.shape != (len(prompts),):
        shape = tuple(scores.shape)
        raise ValueError(f"reward() gave numbers of shape {shape}; expected one for each of {len(prompts)}")
    return scores.detach()


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


def ppo_backward(model, minibatch, config, accelerator):
    """The gradient of ppo_loss's mean over the tokens of a minibatch, of all processes, in
    `gradient_accumulation_steps` parts. Returns the numbers to watch."""
    names = ("cliprange", "cliprange_value", "vf_coef", "entropy_coef")
    settings = {name: getattr(config, name) for name in names}
    tokens, watched = accelerator.reduce(minibatch["mask"].sum().float(), "mean"), {}
    for rows in torch.arange(len(minibatch["mask"])).chunk(config.gradient_accumulation_steps):
        part = {name: tensor[rows] for name, tensor in minibatch.items()}
        share = part["mask"].sum() / tokens
        new_logprobs, new_values, entropy = logprobs_and_values(model, part)
        loss, stats = ppo_loss(new_logprobs, new_values, entropy, part, **settings)
        accelerator.backward(loss * share)
        for name, value in stats.items():
            watched[name] = watched.get(name, 0.0) + value * share.item()
    return watched


def update_ema(elastic, after, config):
    """elastic.update(), if `config.ema_update` wants it here: after each update, epoch or minibatch."""
    if config.ema_update == after:
        elastic.update()


def adamw(*groups):
    """AdamW without weight decay, for (module, learning rate) pairs."""
    groups = [dict(params=[p for p in m.parameters() if p.requires_grad], lr=lr) for m, lr in groups]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def tracking(config):
    """Accelerator's settings for --report_to."""
    if config.report_to == "none":
        return {}
    if importlib.util.find_spec(config.report_to) is None:
        raise ValueError(f"report_to is {config.report_to!r}, but that package is not installed")
    return dict(log_with=config.report_to, project_dir=str(folder_of(config)))


def set_plain_generation(policy, min_response_length=0):
    """Drops a model's own ways of generating (beams, forced tokens, penalties), so that it samples from its
    own distribution, of which an EOS before `min_response_length` is no part. ValueError if a token that
    sampling needs is not named."""
    from transformers import GenerationConfig

    needed = ["pad_token_id", "eos_token_id"]
    needed += ["decoder_start_token_id"] if policy.config.is_encoder_decoder else []
    tokens = {name: getattr(policy.generation_config, name) for name in needed}
    for name, token in tokens.items():
        if token is None:
            raise ValueError(f"the model names no {name}; set model.generation_config.{name}")
    policy.generation_config = GenerationConfig(**tokens, min_new_tokens=min_response_length)


def mean_over_processes(stats, accelerator):
    """{name: number}, averaged; every process gets the same."""
    values = torch.tensor(list(stats.values()), dtype=torch.float32, device=accelerator.device)
    return dict(zip(stats, accelerator.reduce(values, "mean").tolist(), strict=True))


def optimizer_step(accelerator, module, optimizer, max_grad_norm):
    """One step on the gradient averaged over the processes. Returns the gradient's norm."""
    parameters = [p for p in module.parameters() if p.grad is not None]
    if accelerator.num_processes > 1:
        flat = accelerator.reduce(torch.cat([p.grad.reshape(-1) for p in parameters]), "mean")
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(grad.view_as(p))
    norm = accelerator.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return dict(gradient=norm.item())


@torch.no_grad()
def evaluate(task, model, elastic, config):
    """The task's metrics and `kl`, the KL to the start in nats per response; always the same seed."""
    from accelerate.utils import set_seed

    set_seed(0)
    responses, kl, start = [], [], elastic.by_name(elastic.init)
    for (prompts,) in chunks(task.validation_prompts):
        batch, texts = respond(task, prompts, config)
        logprobs, _, _ = logprobs_and_values(model, batch)
        kl.append((logprobs - reference_logprobs(model, start, batch)).sum(1))
        responses += texts
    return checked(task.evaluate(responses)) | {"kl": torch.cat(kl).mean().item()}


def checked(metrics):
    """What a task's evaluate() gave, its numbers as floats and its samples as text. ValueError for others."""
    if not isinstance(metrics, dict) or not metrics.keys() >= {"reward", "drift"}:
        raise ValueError(
            f"evaluate() gave {_short(metrics)}; expected numbers by name, reward and drift of them"
        )
    if taken := metrics.keys() & {"update", "event", "seconds", "kl"}:
        raise ValueError(f"evaluate() gave {min(taken)!r}, as train() does itself; give that another name")
    result = {}
    for name, value in metrics.items():
        take, expected = (_texts, "a list of {column: text}") if name == "samples" else (float, "a number")
        try:
            result[name] = take(value)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"evaluate() gave {name} {_short(value)}; expected {expected}") from error
    return result


def _texts(rows):
    return [{column: str(text) for column, text in row.items()} for row in rows]


def learn(task, prompts, texts):
    numbers = task.learn(prompts, texts) or {}
    if not isinstance(numbers, dict):
        raise ValueError(f"learn() gave {_short(numbers)}; expected numbers by name, or nothing")
    return numbers


def _short(value):
    return f"{type(value).__name__} {str(value)[:40]!r}"


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
        if shared := {"task", "seed", "method", "output_dir", "resume"} & {s.split("=")[0] for s in own}:
            raise ValueError(f"--compare {label}: {min(shared)} is the comparison's, not a method's own")
        place = folder / label.replace(":", ",") / f"seed{seed}"
        argv = to_argv(given | dict(method=method, seed=seed, resume=True, output_dir=str(place)))
        argv += [word for setting in own for word in f"--{setting}".split("=", 1)]
        runs[label, seed] = argv, configure(**parse_flags(argv)[0])
    configs = {label: asdict(runs[label, first][1]) for label in methods}
    TASKS[given["task"]](runs[methods[0], first][1])  # pretrains here and once what is not in the cache
    with ThreadPoolExecutor(jobs) as pool:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        ends = pool.map(lambda run: run_apart(*run, threads), runs.values())
        failed = [why for why in progress(ends, total=len(runs)) if why]
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed; {failed[0]}")
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
    """One run in a process of its own, unless it is finished; what it prints goes to run.log. Returns why it
    failed, or ""."""
    folder = Path(config.output_dir)
    if (folder / "config.json").exists():
        check_continues(folder, config)
        if (folder / "samples.md").exists() and read_history(folder)[-1]["update"] == config.updates:
            return ""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "run.log", "w", encoding="utf-8") as log:
        settings = dict(stdout=log, stderr=log, env={"OMP_NUM_THREADS": str(threads)} | os.environ)
        code = subprocess.run([sys.executable, __file__, *argv], check=False, **settings).returncode
    if code == 0:
        return ""
    last = (folder / "run.log").read_text(encoding="utf-8").strip().splitlines()[-1:]
    return f"that in {folder}: {''.join(last)} (see run.log there)"


def commit():
    """The commit of the repository this file lies in, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def tradeoff(histories):
    """{"start", "range", "methods": {label: {reward, drift, area, passed}}}, each a list, a value per seed.

    The range goes from the lowest drift of any run to 1.5 times the start's. area: the best reward at a drift
    of at most d, less the start's, averaged over d in the range; of the evaluations at the updates that all
    runs evaluated, after a reset if there was one, since more looks would find more. (The mixtures of
    average_after count: they are what it delivers, but they are that many looks more.) passed: the first
    update drifting beyond."""
    all_runs = [history for runs in histories.values() for history in runs.values()]
    lines = [line for history in all_runs for line in history]
    low, high = min(line["drift"] for line in lines), 1.5 * lines[0]["drift"]
    shared = set.intersection(*({line["update"] for line in history} for history in all_runs))
    methods = {}
    for label, runs in histories.items():
        looks = [
            [e for e in h if e["update"] in shared and e["event"] != "before reset"] for h in runs.values()
        ]
        ends = [during_training(history)[-1] for history in runs.values()]
        methods[label] = dict(
            reward=[end["reward"] for end in ends],
            drift=[end["drift"] for end in ends],
            area=[area_under_front(history, low, high) for history in looks],
            passed=[
                next((e["update"] for e in during_training(h) if e["drift"] > high), None)
                for h in runs.values()
            ],
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


COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777"]
STYLES = [  # colours that the colour-blind tell apart; in grey lines and markers do
    dict(color=color, linestyle=line, marker=marker)
    for color, line, marker in zip(COLORS, ["-", "--", "-.", ":"] * 2, "os^DvPX*", strict=True)
]


def plot_tradeoff(histories, path):
    """Left: reward against drift, at the runs' ends and on the way there. Right: drift over the updates, with
    the saw-tooth of the resets. Means over the seeds with standard errors, of the logarithm where the axis is
    logarithmic."""
    from matplotlib.figure import Figure

    figure, seen, names = Figure(figsize=(11, 5), layout="constrained"), [], []
    plane, over_time = figure.subplots(1, 2)
    drifts = [e["drift"] for runs in histories.values() for h in runs.values() for e in during_training(h)]
    logarithmic = max(drifts) > 20 * min(drifts) > 0
    if logarithmic:
        plane.set_xscale("log")
        over_time.set_yscale("log")
    for (label, runs), style in zip(histories.items(), itertools.cycle(STYLES), strict=False):
        updates = [line["update"] for line in during_training(common_evaluations(runs)[0])]
        drift, *drift_band = seed_means(runs, "drift", logarithmic)
        reward, *reward_band = seed_means(runs, "reward")
        end, seen = len(updates) - 1, [*seen, *reward[1:]]
        plane.plot(drift[1:], reward[1:], **style, linewidth=0.8, markersize=2.5, alpha=0.6)
        mark = style | dict(linestyle="", markersize=9, capsize=3, label=label)
        bars = [
            [[abs(edge[end] - mean[end])] for edge in band]
            for mean, band in ((reward, reward_band), (drift, drift_band))
        ]
        plane.errorbar(drift[end], reward[end], *bars, **mark)
        band = [edge[: end + 1] for edge in drift_band]
        over_time.plot(updates, drift[: end + 1], **style, linewidth=1.2, markersize=3)
        over_time.fill_between(updates, *band, color=style["color"], alpha=0.15, linewidth=0)
        names.append((drift[end], label, style["color"]))
    edge = min(seen) - 0.1 * (max(seen) - min(seen))  # where a start far below is put
    plane.plot(drift[0], max(reward[0], edge), "k*", markersize=14)
    text = "start" if reward[0] >= edge else f"start, below: {reward[0]:.3g}"
    plane.annotate(text, (drift[0], max(reward[0], edge)), (10, -4), textcoords="offset points")
    over_time.set_xlim(right=updates[-1] * 1.3)
    to_axes, height = over_time.transData + over_time.transAxes.inverted(), -math.inf
    place = dict(va="center", transform=over_time.get_xaxis_transform())
    for y, label, color in sorted(names):  # names stand at the ends of their lines, one above the other
        height = max(to_axes.transform((0, y))[1], height + 0.045)
        over_time.text(updates[-1] * 1.02, height, label, color=color, **place)
    lower, title = "drift (lower is better)", f"means over {len(runs)} seeds; "
    ends = title + "large: the ends, with standard errors"
    plane.set(xlabel=lower, ylabel="reward (higher is better)", title=ends)
    over_time.set(xlabel="update", ylabel=lower, title=title + "bands: standard errors")
    over_time.set_xticks([t for t in over_time.get_xticks() if 0 <= t <= updates[-1]])
    plane.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=150)


def seed_means(runs, name, logarithmic=False):
    """Of each evaluation's metric the mean over the seeds, and that less and plus one standard error."""
    to, back = (math.log, math.exp) if logarithmic else (float, float)
    evaluations = zip(*common_evaluations(runs), strict=True)
    pairs = [mean_and_error([to(e[name]) for e in seeds]) for seeds in evaluations]
    return [[back(mean + sign * error) for mean, error in pairs] for sign in (0, -1, 1)]


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
        if self.history_file.exists():
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
            if self.update > self.config.updates:
                done, wanted = self.update, self.config.updates
                raise ValueError(
                    f"{self.folder} has done {done} updates, but --updates is {wanted}; give more"
                )
            self.saved, seconds = self.update, counters["seconds"]
        elif self.config.resume and self.accelerator.is_main_process:
            print(f"{self.folder} holds no checkpoint yet: the run begins anew", file=sys.stderr)
        self.began = time.perf_counter() - seconds
        if self.accelerator.is_main_process:
            # it comes last: where it is, the run is complete
            (self.folder / "samples.md").unlink(missing_ok=True)
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
        last, what = self.config.updates, f"RL, {self.config.method}"
        with ctrl_c_waits() as stop, progress(initial=self.update, total=last, desc=what) as self.bar:
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

    def log(self, update, metrics, event="", stats=None):
        """One evaluation: a line of metrics.jsonl, samples, the bar. `event`: on which side of a reset.
        `stats`: training's own numbers; where a metric has the name of one, the metric counts."""
        numbers, rows = dict(metrics), metrics.get("samples", [])
        numbers.pop("samples", None)
        self.check_finite(**numbers)
        first = [set(row) for row in self.samples[0]["rows"]] if self.samples else []
        if [set(row) for row in rows[: len(first)]] != first:
            raise ValueError(
                "evaluate() gave other samples than first; expected as many rows, the same columns"
            )
        numbers |= {name: value for name, value in (stats or {}).items() if name not in numbers}
        seconds = round(time.perf_counter() - self.began, 2)
        self.history.append(dict(update=update, event=event, **numbers, seconds=seconds))
        self.samples.append(dict(update=update, event=event, rows=rows))
        self.write_metrics()
        if self.config.report_to != "none":
            prefix = "" if event in ("", "after reset") else event + "/"  # one step may have several
            self.accelerator.log({prefix + name: value for name, value in numbers.items()}, step=update)
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
        if self.config.save_merged and hasattr(task.policy, "merge_and_unload"):
            with written_whole(self.folder / "merged") as aside:
                merged(task.policy, self.config).save_pretrained(aside)
                task.tokenizer.save_pretrained(aside)
        self.write_metrics()
        with written_whole(self.folder / "curve.png") as aside:
            plot_run(self.history, aside)
        write_text(self.folder / "samples.md", samples_text(self.samples))
        print(before_and_after(start, end))
        for e in self.history:
            if e["event"].startswith("eta"):
                print(f"mixture, {e['event']}: reward {e['reward']:.3f}, drift {e['drift']:.3f}")
        if self.config.reset != "none" and self.config.reset_every > self.config.updates:
            print(f"no reset: reset_every is {self.config.reset_every}, updates {self.config.updates}")
        print(task.footnote)
        files = sorted(path.name + "/" * path.is_dir() for path in self.folder.iterdir())
        print(f"{self.folder}: {', '.join(files)}")
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
    """samples.md: what became of the same prompts, at the start, halfway and at the end; what the start did
    not say in bold. A column in which no row ever changes stands above the table."""
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
        parts += [
            f"## {i + 1}",
            "",
            *(f"- {c}: {on_one_line(row[c])}" for c in columns if c not in moving),
            "",
        ]
        if moving:
            parts += ["| update | " + " | ".join(moving) + " |", "|---" * (len(moving) + 1) + "|"]
        for s in shown if moving else []:
            texts = [marked(s["rows"][i][c], row[c]).replace("|", "\\|") for c in moving]
            parts.append("| " + " | ".join([f"{s['update']} {s['event']}".strip(), *texts]) + " |")
        parts.append("")
    return "\n".join(parts)


def marked(text, before):
    """Text on one line, the words that `before` does not have at their place in bold."""
    same = difflib.SequenceMatcher(None, before.split(), text.split(), autojunk=False).get_matching_blocks()
    kept = {block.b + i for block in same for i in range(block.size)}
    number = itertools.count()
    bold = re.sub(r"\S+", lambda m: m[0] if next(number) in kept else f"\0{m[0]}\0", text)
    return on_one_line(bold.replace("\0 \0", " ").replace("\0", "**"))


def on_one_line(text):
    """Text for one line of Markdown that shows its lines and indentations."""
    return text.strip().replace("    ", "&emsp;").replace("\n", "<br>")


def before_and_after(start, end):
    """The table at the end of a run: every metric of the start, then and now."""
    rows = [("", "start", f"update {end['update']} {end['event']}".strip())]
    names = [name for name in start if name in end and name not in ("update", "event", "seconds")]
    rows += [(name, f"{start[name]:.3f}", f"{end[name]:.3f}") for name in names]
    return "\n".join(f"{name:<10}{before:>10}   {after}" for name, before, after in rows)


# =========================================== 7. Data and models ============================================


def chunks(*lists, size=128):
    """Slices, `size` long, of parallel lists."""
    for i in range(0, len(lists[0]), size):
        yield tuple(items[i : i + size] for items in lists)


def shuffled(items, n, update, seed):
    """The n items of an update (from 1 on) in an endless run through `items`, each pass in a new order."""
    if not items:
        raise ValueError("the data leave nothing to train on")
    batch = range((update - 1) * n, update * n)
    return [items[_order(len(items), seed, i // len(items))[i % len(items)]] for i in batch]


@functools.lru_cache(maxsize=4)
def _order(n, seed, epoch):
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def tokens_of(tokenizer, texts, max_length, device, **settings):
    """input_ids and attention_mask, (batch, longest text)"""
    settings = dict(padding=True, truncation=True, max_length=max_length, return_tensors="pt") | settings
    tokens = tokenizer(texts, **settings)
    return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}


def target_logprobs(model, tokenizer, sources, targets, max_length):
    """log p(target token | source, tokens before), 0 where padded, and the mask, (batch, target). A decoder's
    targets are taken as they are: an EOS must stand in their text."""
    source = tokens_of(tokenizer, sources, max_length, model.device)
    settings = dict(padding_side="right", add_special_tokens=model.config.is_encoder_decoder)
    target = tokens_of(tokenizer, None, max_length, model.device, text_target=targets, **settings)
    tokens, mask = target["input_ids"], target["attention_mask"].bool()
    logits, _ = response_logits(model, **source, responses=tokens)
    return torch.where(mask, gather_logprobs(logits, tokens), 0.0), mask


def token_mean(logprobs, mask):
    """(batch, target) -> (batch,)"""
    return logprobs.sum(1) / mask.sum(1)


@torch.no_grad()
def perplexity(model, tokenizer, prompts, responses, window=1024, stride=512):
    """exp of the mean negative log-likelihood of a token of the responses behind their prompts; of nothing at
    all the vocabulary's size. Long texts go through in windows, each `stride` tokens after the one before,
    where only new tokens count."""
    window = min(window, max_positions(model))
    stride, pieces, total, count = min(stride, window // 2), [], 0.0, 0
    for prompt, response in zip(prompts, responses, strict=True):
        tokens = tokenizer(prompt, verbose=False)["input_ids"]
        done = max(1, len(tokens))
        tokens += tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
        end = min(max(window, done + stride), len(tokens))
        while done < end:
            pieces.append((tokens[max(0, end - window) : end], end - done))
            done, end = end, min(end + stride, len(tokens))
    for (part,) in chunks(sorted(pieces, key=lambda piece: len(piece[0])), size=16):
        rows = [torch.tensor(tokens, device=model.device) for tokens, _ in part]
        left = dict(batch_first=True, padding_side="left")
        input_ids = nn.utils.rnn.pad_sequence(rows, **left)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], **left)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=input_ids, attention_mask=mask, position_ids=positions).logits
        logprobs = gather_logprobs(logits[:, :-1], input_ids[:, 1:])
        for row, (_, new) in zip(logprobs, part, strict=True):
            total, count = total - row[-new:].sum().item(), count + new
    return math.exp(total / count) if count else float(len(tokenizer))


def distinct(texts, n):
    """Different n-grams, as a share of all in `texts`, lists of words."""
    grams = [gram for words in texts for gram in zip(*(words[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / max(1, len(grams))


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


def load_model(role, name, kind, config, lengths=(), new_head=False, **settings):
    """A model with the head `kind`, as in transformers' AutoModelFor..., and its tokenizer, by hub name or
    from a folder. ValueError if they cannot be used: for texts as long as the settings named in `lengths`
    together or, unless `new_head`, with the head they have."""
    import transformers
    from safetensors import SafetensorError

    transformers.logging.disable_progress_bar()
    try:
        auto = getattr(transformers, f"AutoModelFor{kind}")
        if config.load_in_8bit:
            eight_bits = transformers.BitsAndBytesConfig(load_in_8bit=True)
            settings |= dict(quantization_config=eight_bits, device_map={"": processes().device})
        settings |= dict(dtype=getattr(torch, config.dtype), trust_remote_code=False)
        model, found = auto.from_pretrained(name, output_loading_info=True, **settings)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        why = one_line(error)
        raise ValueError(f"{role} {name!r} cannot be loaded as a model for {kind}: {why}") from error
    for module in model.modules():
        if "Sinusoidal" in type(module).__name__:  # Marian's constants, which loading marks as trainable
            module.requires_grad_(False)
    if found["missing_keys"] and kind == "SequenceClassification" and not new_head:
        raise ValueError(
            f"{role} {name!r} has no trained {min(found['missing_keys'])}: it cannot score texts"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"{role} {name!r} has no tokenizer, or one without padding and end")
    model.config.pad_token_id = tokenizer.pad_token_id
    if not model.config.is_encoder_decoder:
        tokenizer.padding_side = "left"  # decoders are prompted from there
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        set_plain_generation(model)
    longest, sizes = total_length(config, lengths)
    positions = max_positions(model)
    if positions < longest:
        raise ValueError(f"{role} {name!r} has {positions} positions, too few for {sizes} tokens: lower that")
    return model if config.load_in_8bit else model.to(processes().device), tokenizer


def max_positions(model):
    """The longest text that a model takes, in tokens; many have no limit."""
    positions = getattr(model.config, "max_position_embeddings", None) or -1
    return positions if positions > 0 else math.inf


def total_length(config, names):
    """The sum of settings, and how it is made up, in words."""
    sizes = [getattr(config, name) for name in names]
    return sum(sizes), " + ".join(f"{name} ({size})" for name, size in zip(names, sizes, strict=True))


def check_uncut(config, *names):
    """ValueError if texts as long as these settings together would lose their ends."""
    longest, sizes = total_length(config, names)
    if longest > config.max_length:
        most = f"max_length ({config.max_length}), where texts are cut off"
        raise ValueError(f"{sizes} is more than {most}: raise --max_length or lower the other")


def seq2seq(role, name, data, config):
    """A translation model and its tokenizer: by hub name or from a folder or, without a name, a Marian
    trained from scratch on data[role], pairs of source and target."""
    kind = "Seq2SeqLM"
    if not name:
        tokenizer = train_tokenizer(data["texts"], config.vocab_size, config.max_length)
        recipe = (tokenizer, data[role], likelihood_loss, config.pretrain_updates, config)
        name = str(pretrained(role, kind, marian(tokenizer, config), *recipe))
    return load_model(role, name, kind, config, ["max_length"])


def marian(tokenizer, config):
    from transformers import MarianConfig

    width = config.d_model
    pad, eos, size = tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)
    return MarianConfig(
        vocab_size=size, d_model=width, encoder_layers=config.layers, decoder_layers=config.layers,
        encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width, dropout=0.0,
        encoder_attention_heads=4, decoder_attention_heads=4,
        pad_token_id=pad, eos_token_id=eos, decoder_start_token_id=pad, forced_eos_token_id=None,
        max_position_embeddings=max(128, config.max_length), scale_embedding=True,
    )  # fmt: skip


def causal_lm(role, name, data, config, seed=0):
    """A decoder and its tokenizer: by name or, without one, a GPT-2 trained from scratch on data["texts"]."""
    kind = "CausalLM"
    if not name:
        tokenizer = decoder_tokenizer(data, config)
        halves = [text.partition(" ") for text in data["texts"]]  # a decoder needs a first word to go on from
        examples = [(first, " " + rest) for first, _, rest in halves if rest]
        recipe = (tokenizer, examples, likelihood_loss, config.pretrain_updates, config, seed)
        name = str(pretrained(role, kind, gpt2(tokenizer, config), *recipe))
    return load_model(role, name, kind, config, ("prompt_length", "response_length"))


def classifier(role, name, data, config):
    """A classifier and its tokenizer: by name or, without one, a GPT-2 trained from scratch on data["train"],
    pairs of a text and a label, 0 or 1."""
    kind = "SequenceClassification"
    if not name:
        tokenizer = decoder_tokenizer(data, config)
        examples, shape = [(label, text) for text, label in data["train"]], gpt2(tokenizer, config)
        recipe = (tokenizer, examples, label_loss, config.reward_updates, config)
        name = str(pretrained(role, kind, shape, *recipe))
    model, tokenizer = load_model(role, name, kind, config, ["max_length"])
    if model.config.num_labels != 2:
        labels = model.config.num_labels
        raise ValueError(f"{role} {name!r} has {labels} labels; expected 2, the second one positive")
    return model.eval(), tokenizer


def supervised_finetuning(config, data):
    """Stage 1: maximum likelihood of human answers. Returns the name of `model`, fine-tuned through an
    adapter and merged, or, without one, of a LLaMA trained from scratch."""
    if config.model and not config.pretrain_updates:
        return config.model
    if config.model:
        model, tokenizer = load_model("policy", config.model, "CausalLM", config, ["max_length"] * 2)
        start = lora(model, "CAUSAL_LM", config)
    else:
        tokenizer = decoder_tokenizer(data, config)
        start = llama(tokenizer, config)
    examples = [(question, answer + tokenizer.eos_token) for question, answer in data["sft"]]
    recipe = (tokenizer, examples, likelihood_loss, config.pretrain_updates, config)
    return str(pretrained("answers", "CausalLM", start, *recipe))


def reward_modelling(config, data, sft):
    """Stage 2: a scorer of answers from pairs, the better one first. It begins as the model of stage 1 with
    an adapter or, where there is no `model`, from scratch. Returns its folder."""
    kind, settings = "SequenceClassification", dict(num_labels=1)
    if config.model:
        torch.manual_seed(0)
        model, tokenizer = load_model("reward model", sft, kind, config, new_head=True, **settings)
        start = lora(model, "SEQ_CLS", config)
    else:
        _, tokenizer = load_model("policy", sft, "CausalLM", config)
        start = llama(tokenizer, config, **settings)
    eos = tokenizer.eos_token
    examples = [(better + eos, worse + eos) for better, worse in data["preferences"]]
    recipe = (tokenizer, examples, preference_loss, config.reward_updates, config)
    return str(pretrained("reward model", kind, start, *recipe))


def lora(model, task_type, config, seed=0):
    """The model frozen, with an adapter on its linear layers that begins as the identity."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    shape = dict(r=config.lora_r, lora_alpha=2 * config.lora_r, lora_dropout=config.lora_dropout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's way of asking transformers, not ours
        return get_peft_model(model, LoraConfig(**shape, target_modules="all-linear", task_type=task_type))


def llama(tokenizer, config, **settings):
    from transformers import LlamaConfig

    if config.d_model % 8:
        raise ValueError(f"d_model is {config.d_model}; expected a multiple of 8")
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config.d_model, intermediate_size=2 * config.d_model,
        num_hidden_layers=config.layers, num_attention_heads=4, bos_token_id=None,
        max_position_embeddings=max(256, 2 * config.max_length), eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **settings,
    )  # fmt: skip


def pass_at_k(n, right, k):
    """The unbiased estimate that one of k programs passes, of n of which `right` do (arXiv 2107.03374)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def gpt2(tokenizer, config):
    from transformers import GPT2Config

    longest = max(config.max_length, config.prompt_length) + config.response_length
    eos, positions = tokenizer.eos_token_id, max(128, longest)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2Config(
        vocab_size=len(tokenizer), n_embd=config.d_model, n_layer=config.layers, n_head=4,
        n_positions=positions, bos_token_id=eos, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id,
        **no_dropout,
    )  # fmt: skip


def pretrained(role, kind, start, tokenizer, examples, loss_of, updates, config, seed=0):
    """The cached folder of a model trained on `examples`, named by a hash of all that made it. `start`: a
    transformers config, then it begins from scratch, or a model."""
    import transformers

    settings = "pretrain_batch_size pretrain_learning_rate max_length max_grad_norm load_in_8bit"
    made_of = [role, kind, examples, updates, seed, torch.__version__, repr(start), weights_of(start)]
    made_of += [sorted(tokenizer.get_vocab().items()), tokenizer.padding_side]
    made_of += [getattr(config, name) for name in settings.split()]
    code = (fit, loss_of, batches_of_like_length, shuffled, tokens_of, class_logits, target_logprobs)
    made_of += [inspect.getsource(function) for function in (*code, response_logits, adamw, lora, merged)]
    digest = hashlib.sha256(json.dumps(made_of, default=str).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastic_reset"
    folder = cache / f"{role.replace(' ', '-')}-{digest}"
    transformers.logging.disable_progress_bar()
    with processes().main_process_first():
        if not folder.exists():
            torch.manual_seed(seed)
            auto = getattr(transformers, f"AutoModelFor{kind}")
            model = auto.from_config(start) if hasattr(start, "to_dict") else start
            fit(model, tokenizer, examples, loss_of, updates, config, f"training the {role}")
            model = merged(model, config)
            with written_whole(folder) as aside:
                model.save_pretrained(aside)
                tokenizer.save_pretrained(aside)
    return folder


def weights_of(start):
    """A hash of a model's weights; of a configuration, which has none, ""."""
    if not isinstance(start, nn.Module):
        return ""
    digest = hashlib.sha256()
    for tensor in start.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def merged(model, config):
    """The model with its adapter, if it has one, added to its weights; those are taken in full precision."""
    if not hasattr(model, "merge_and_unload"):
        return model
    if config.load_in_8bit:
        import peft

        adapter, shape = peft.get_peft_model_state_dict(model), copy.deepcopy(model.get_base_model().config)
        del shape.quantization_config
        settings = dict(config=shape, dtype=getattr(torch, config.dtype), trust_remote_code=False)
        base = type(model.get_base_model()).from_pretrained(model.name_or_path, **settings)
        model = peft.get_peft_model(base, model.peft_config["default"])
        peft.set_peft_model_state_dict(model, adapter)
    return model.merge_and_unload()


def fit(model, tokenizer, examples, loss_of, updates, config, what):
    """Minimises `loss_of` on batches of examples: AdamW, a tenth of warm-up, then a linear decay."""
    from transformers import get_linear_schedule_with_warmup

    model.to(processes().device).train()
    optimizer = adamw((model, config.pretrain_learning_rate))
    schedule = get_linear_schedule_with_warmup(optimizer, updates // 10, updates)
    batches = batches_of_like_length(examples, config.pretrain_batch_size, updates)
    bar = progress(batches, total=updates, desc=what)
    for update, columns in enumerate(bar):
        loss = loss_of(model, tokenizer, *columns, config.max_length)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if update % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def likelihood_loss(model, tokenizer, sources, targets, max_length):
    """Maximum likelihood of targets given sources."""
    logprobs, mask = target_logprobs(model, tokenizer, sources, targets, max_length)
    return -logprobs.sum() / mask.sum()


def label_loss(model, tokenizer, labels, texts, max_length):
    """Cross-entropy of a classifier."""
    logits = class_logits(model, tokenizer, texts, max_length)
    return F.cross_entropy(logits, torch.tensor(labels, device=logits.device))


def preference_loss(model, tokenizer, better, worse, max_length):
    """- log sigmoid(score of the better answer - score of the worse one) (arXiv 2203.02155, equation 1)"""
    scores = class_logits(model, tokenizer, better + worse, max_length)[:, 0]
    return -F.logsigmoid(scores[: len(better)] - scores[len(better) :]).mean()


def class_logits(model, tokenizer, texts, max_length):
    """(batch, labels)"""
    return model(**tokens_of(tokenizer, texts, max_length, model.device, padding_side="right")).logits.float()


def batches_of_like_length(examples, n, updates, pool=32):
    """The columns of `updates` batches of n examples. A pool of batches is sorted by the length of the last
    column before it is cut into batches, so that little is padded; then these come in a random order."""
    for update in range(updates):
        if update % pool == 0:
            near = shuffled(examples, pool * n, update // pool + 1, seed=0)
            near = sorted(near, key=lambda example: len(example[-1]))
            starts = random.Random(update).sample(range(0, pool * n, n), pool)
        start = starts[update % pool]
        yield [list(texts) for texts in zip(*near[start : start + n], strict=True)]


def train_tokenizer(texts, vocab_size, max_length, append_eos=True):
    """A BPE tokenizer of `vocab_size` tokens or, with 0, one whose tokens are the words of `texts`. Without
    `append_eos` it is a decoder's: words bring the space before them, so that texts can be put together."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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
        if not append_eos:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n *| ?[^ \n]+"), "isolated")
            tokenizer.decoder = decoders.Fuse()
        trainer = trainers.WordLevelTrainer(**special)
    tokenizer.train_from_iterator(texts, trainer)
    if append_eos:
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    names["padding_side"] = "right" if append_eos else "left"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names)


def decoder_tokenizer(data, config):
    return train_tokenizer(data["texts"], config.vocab_size, config.max_length, append_eos=False)


def translation_data(config):
    """train, validation: rows of fr, en, de. sender, receiver: (source, target) pairs; texts: theirs."""
    if not config.data:
        return toy_translations()
    train, validation = train_and_validation(config, "fr en de")
    sender = [(row["fr"], row["en"]) for spec in config.sender_data for row in load_rows(spec, "fr en")]
    receiver = [(row["en"], row["de"]) for spec in config.receiver_data for row in load_rows(spec, "en de")]
    if not (config.model or sender):
        raise ValueError("with --data, the sender needs --model or --sender_data (fr, en pairs)")
    if not (config.receiver_model or receiver):
        raise ValueError("with --data, the receiver needs --receiver_model or --receiver_data (en, de pairs)")
    texts = [text for pair in sender + receiver for text in pair]
    return dict(train=train, validation=validation, sender=sender, receiver=receiver, texts=texts)


def train_and_validation(config, columns):
    """The rows of data and, for evaluation, of validation_data or of the split `validation` beside it."""
    name, _ = split_of(config.data)
    train = load_rows(config.data, columns)
    try:
        return train, load_rows(config.validation_data or f"{name}:validation", columns)
    except ValueError as error:
        if config.validation_data:
            raise
        slices = f"--data {name}:train[200:] --validation_data {name}:train[:200]"
        raise ValueError(f"{error} (or hold out rows: {slices})") from error


def mixed(rows):
    """The rows in another order, always the same: some come sorted by label."""
    return random.Random(0).sample(rows, len(rows))


def review_data(config):
    """train, validation: (text, label) pairs, label 1 positive; texts, for language models; gold(prompts,
    texts): metrics that only the embedded corpus allows, {} for others."""
    if not config.data:
        refuse_unused(config, "validation_data")
        return toy_reviews()
    parts = train_and_validation(config, "text label")
    train, validation = (mixed([(row["text"].strip(), int(row["label"])) for row in rows]) for rows in parts)
    texts = [text for text, _ in train]
    return dict(train=train, validation=validation, texts=texts, gold=lambda prompts, texts: {})


def qa_data(config):
    """sft: (question, answer) pairs; preferences and held_out: pairs of texts, question and answer, the
    better one first; questions: prompts; validation: (question, human answer); problems: prompts and tests of
    programs; program_of(prompt, response): their source; texts: for a tokenizer."""
    if not config.data:
        refuse_unused(config, "sft_data", "preference_data", "validation_data", "programs")
        if config.model and not config.allow_code_execution:
            raise ValueError("with --model, programs that it writes are run: --allow_code_execution true")
        return toy_qa()
    if config.programs and not config.allow_code_execution:
        raise ValueError(
            "--programs runs what the model writes: --allow_code_execution true, or --programs ''"
        )
    train, validation = train_and_validation(config, "question response_j")
    sft = load_rows(config.sft_data, "question response_j") if config.sft_data else train
    preferences = load_rows(config.preference_data or config.data, "question response_j response_k")
    pairs = mixed([[asked(row) + row[f"response_{r}"] for r in "jk"] for row in preferences])
    held_out = len(pairs) // 20 or 1
    sft, validation = (mixed([(asked(row), row["response_j"]) for row in rows]) for rows in (sft, validation))
    questions = list(dict.fromkeys(map(asked, train)))
    data = dict(sft=sft, preferences=pairs[held_out:], held_out=pairs[:held_out], validation=validation)
    return data | dict(
        questions=questions, texts=[text for pair in sft + pairs for text in pair], **humaneval(config)
    )


ASKED = "Question: {}\n\nAnswer: "  # the paper's


def asked(row):
    return ASKED.format(row["question"])


def humaneval(config):
    """Problems in HumanEval's format. A completion ends where the function does."""
    columns = "prompt test entry_point"
    rows = load_rows(config.programs, columns) if config.programs else []
    problems = [
        dict(prompt=row["prompt"], test=f"{row['test']}\ncheck({row['entry_point']})\n") for row in rows
    ]
    return dict(
        problems=problems,
        program_of=lambda prompt, response: prompt + re.split(r"\n(?=[^\s])", response)[0] + "\n",
    )


def refuse_unused(config, *names):
    for name in names:
        if getattr(config, name):
            raise ValueError(f"--{name} needs --data: the embedded corpus has its own")


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
        if column == "label" and str(row[column]) not in ("0", "1"):
            return f"column 'label' holds {str(row[column])[:40]!r}, expected 0 or 1"
        if column != "label" and (not isinstance(row[column], str) or not row[column].strip()):
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


# The sandbox, for programs that a model has written.


def run_programs(programs: list[tuple[str, str]], seconds=3.0, megabytes=512, jobs=None) -> list[bool]:
    """Which programs, pairs (solution, test), pass: the test runs to its end without an exception.

    A model's solution runs in one process, its trusted test in another, where the solution's functions (none
    named like a builtin) ask the first what they return: no pass can be faked. Numbers, text, bytes, lists,
    tuples, dicts, sets, ranges and None go by value, subclasses as their base, iterators as what they yield,
    exceptions as the builtin they derive from. Tests that need more, or changes to what they passed, fail.
    Tests that compute with a solution's functions believe them.

    A solution has `seconds` by the clock, `megabytes` of addresses (on Linux), 64 files, no environment, no
    other process or thread, and cannot write. Root becomes nobody. Linux namespaces, with `unshare`, leave no
    network, no process, no files but /usr, /lib and Python's, no survivors. Without (many containers, Ubuntu,
    macOS) an audit hook refuses network, signals, writing, and reading but from Python's library; it stops
    Python code that does not set out to break it, not native code.
    """
    passes = functools.partial(_passes, unshare=_unshare(), seconds=seconds, megabytes=megabytes)
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        return list(pool.map(passes, programs))


@functools.cache
def _unshare() -> list[str]:
    """The command that runs another in namespaces; empty where there are none to be had."""
    options = "--fork --kill-child --pid --net --ipc --uts --mount" + " --map-root-user" * (os.getuid() != 0)
    for command in ([shutil.which("unshare") or "false", *options.split()], []):
        if _passes(("import math, typing", ""), command, 60, 512):
            return command
    raise ValueError(f"the sandbox cannot run a trivial program with {sys.executable}")


def _passes(program, unshare, seconds, megabytes) -> bool:
    parts = [(part.__name__, part.__code__) for part in (_judge, _isolate, _step_down, _solve, _test)]
    modules = "builtins, functools, marshal, os, resource, sys" + ", ctypes" * bool(unshare)
    script = f"""import _pickle as pickle, _signal as signal, {modules}
for name, code in marshal.loads({marshal.dumps(parts)}):
    globals()[name] = type(lambda: 0)(code, globals())
_judge({bool(unshare)}, {os.getuid() == 0}, {seconds}, {megabytes})"""
    with subprocess.Popen(
        [*unshare, sys.executable, "-I", "-S", "-B", "-c", script], cwd="/", env={}, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            return process.communicate(pickle.dumps(program), seconds)[0] == b"passed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            return False


def _judge(isolated, root, seconds, megabytes):
    """Where the new process starts, with no more of this file than `parts`; it becomes two."""
    limits = dict(CPU=int(seconds) + 1, NOFILE=64, CORE=0)
    for name, most in (limits | {"AS": megabytes << 20} if sys.platform == "linux" else limits).items():
        kind = getattr(resource, "RLIMIT_" + name)
        resource.setrlimit(kind, (min(most, resource.getrlimit(kind)[1] % 2**64),) * 2)  # "no limit" is -1
    (asked, ask), (answered, answer) = os.pipe(), os.pipe()
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))  # for when nobody is left to kill it
    signal.alarm(int(seconds) + 1)
    if isolated:
        _isolate()
    if (os.fork() == 0) == isolated:  # what ends with its namespace, or heads a session and cannot leave it
        for own, other in ((2, 0), (2, 1), (asked, ask), (answer, answered)):  # no program, no verdict
            os.dup2(own, other)
        _solve(isolated, root, open(asked, "rb"), open(answer, "wb", buffering=0))
    for own, other in ((1, asked), (2, 1), (2, answer)):  # the test may print
        os.dup2(own, other)
    _test(open(ask, "wb", buffering=0), open(answered, "rb"))
    os.write(asked, b"passed")


def _isolate():
    """Leaves no files but those that Python needs, read-only."""
    libc = ctypes.CDLL(None)
    failed = libc.mount(b"tmpfs", b"/dev", b"tmpfs", 0, b"mode=755")
    for folder in filter(os.path.isdir, sorted({"/usr", "/lib", "/lib64", "/nix", sys.base_prefix})):
        os.makedirs("/dev" + folder, exist_ok=True)
        failed |= libc.mount(folder.encode(), b"/dev" + folder.encode(), None, 0x5000, None)  # REC, BIND
    failed |= libc.syscall(442, -100, b"/dev", 0x8000, bytes([7] + [0] * 31), 32)  # mount_setattr: read-only
    if failed:
        raise OSError("the kernel refuses a mount")
    os.chroot("/dev")
    os.chdir("/")


def _step_down(isolated, root):
    """Gives up what rights there are, and without namespaces sets the audit hook."""
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if root:
        if not isolated and os.path.isdir("/proc/self/fd"):  # the library may be where only root can look
            sys.path[:] = [f"/proc/self/fd/{os.open(f, os.O_RDONLY)}" for f in sys.path if os.path.isdir(f)]
            for package in ("collections", "encodings"):
                sys.modules[package].__path__ = [f"{sys.path[0]}/{package}"]
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    if isolated:
        libc, version = ctypes.CDLL(None), (0x20080522).to_bytes(8, "little")
        if libc.prctl(38, 1, 0, 0, 0) or libc.capset(version, bytes(24)):  # none left, and none to come
            raise OSError("the kernel keeps privileges")
        return
    for name in ("mkfifo", "mknod", "pidfd_open", "setpriority"):  # these, no hook hears of
        vars(os).pop(name, None), vars(sys.modules["posix"]).pop(name, None)
    library = tuple(sys.path)
    guarded = "cpython ctypes fcntl open os pty resource shutil signal socket sqlite3 subprocess".split()

    def refuse(event, arguments):
        inside = event == "open" and arguments[1] in ("r", "rb") and arguments[0].startswith(library)
        listing = event in ("os.listdir", "os.scandir") or inside and ".." not in arguments[0]
        if event.partition(".")[0] in guarded and not listing:
            raise PermissionError(event)

    sys.addaudithook(refuse)


def _solve(isolated, root, questions, answers):
    """Runs the solution, then calls its functions as asked."""
    _step_down(isolated, root)
    solution, plain = pickle.load(questions)

    class Answer(pickle.Pickler):
        def reducer_override(self, thing):
            base = next((kind for kind in type(thing).__mro__[1:] if kind in plain), None)
            iterator = (iter, (list(thing),)) if hasattr(thing, "__next__") else NotImplemented
            return (base, (base(thing),)) if base else iterator

    exec(compile(solution, "solution", "exec"), names := {"__name__": "solution"})
    pickle.dump([name for name, thing in names.items() if callable(thing)], answers)
    while True:
        name, arguments, named = pickle.load(questions)
        try:
            answer = True, names[name](*arguments, **named)
        except BaseException as error:
            answer = False, next(k.__name__ for k in type(error).__mro__ if k.__module__ == "builtins")
        Answer(answers, 5).dump(answer)


def _test(questions, answers):
    """Runs the test, with functions that ask for what the solution's return."""
    solution, test = pickle.load(open(0, "rb"))
    plain = (int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range)

    class Answer(pickle.Unpickler):
        def find_class(self, module, name):  # whatever a solution sends, nothing but these is called
            return {kind.__name__: kind for kind in (*plain, iter)}[name]

    def ask(name, *arguments, **named):
        pickle.dump((name, arguments, named), questions)
        fine, value = Answer(answers).load()
        if not fine:
            raise getattr(builtins, value)
        return value

    pickle.dump((solution, plain), questions)
    names = [name for name in Answer(answers).load() if not hasattr(builtins, name)]
    exec(compile(test, "test", "exec"), {name: functools.partial(ask, name) for name in names})


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


# The embedded reviews. Five kinds of sentences praise (+), blame (-) or neither (0); half of a review's agree
# with its label. Since the grammar is known, so is the truth of a continuation: what parses, what it praises.
REVIEWS = """the NOUN was ADVERB ADJ . / WHO VERB the NOUN WHERE . / the NOUN and the NOUN were ADJ .
    WHO VERB it because the NOUN felt ADJ . / what a ADJ NOUN !"""
REVIEW_WORDS = {
    "NOUN": """plot acting script ending music camera dialogue story cast pace hero villain opening scene
        humor costumes lighting editing director sequel""",
    "ADVERB": "really very quite rather truly simply",
    "WHO": "i we my_friend the_audience everyone critics",
    "WHERE": "in_the_cinema at_home last_night with_my_family on_a_plane again",
    "ADJ+": "great wonderful brilliant superb moving charming clever gripping lovely perfect fresh",
    "ADJ-": "awful boring terrible weak clumsy dull silly painful messy flat tedious",
    "ADJ0": "long short loud quiet dark bright slow quick strange familiar french modern",
    "VERB+": "loved enjoyed admired adored praised",
    "VERB-": "hated disliked regretted avoided mocked",
    "VERB0": "watched saw rented finished noticed",
}


def toy_reviews(seed=0):
    """review_data() of the embedded corpus; no review stands in two of its parts."""
    rng, seen = random.Random(seed), set()
    data = dict(train=[], validation=[], gold=toy_gold)
    for name, size in dict(train=20_000, validation=400).items():
        while len(data[name]) < size:
            label = rng.randrange(2)
            feelings = rng.choices([("-", "+")[label], "0", ("+", "-")[label]], [5, 3, 2], k=7)
            review = " ".join(toy_opinion(rng, feeling) for feeling in feelings)
            if review not in seen:
                seen.add(review)
                data[name].append((review, label))
    return data | dict(texts=[text for text, _ in data["train"]])


def toy_opinion(rng, feeling):
    """A sentence: as "my friend enjoyed the plot at home ." """
    words = rng.choice(_split(REVIEWS)).split()
    return " ".join(rng.choice(_words(word, feeling)) if word.isupper() else word for word in words)


def toy_gold(prompts, texts):
    """Of the sentences that a continuation completes: the share that parse, and how many more praise than
    blame, as a share (the true sentiment, -1 to 1)."""
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        before = len(re.findall(r"[.!]", prompt))
        found += [toy_feeling(s.strip()) for s in re.findall(r"[^.!]*[.!]", text)[before:]]
    counts, n = {feeling: found.count(feeling) for feeling in "+-0"}, max(1, len(found))
    return dict(parses=sum(counts.values()) / n, sentiment=(counts["+"] - counts["-"]) / n)


@functools.lru_cache(maxsize=100_000)
def toy_feeling(sentence):
    """ "+", "-", "0" or, of what the grammar does not generate, None."""
    for feeling, pattern in _patterns().items():
        if pattern.fullmatch(sentence):
            return feeling
    return None


@functools.cache
def _patterns():
    def pattern(feeling):
        kinds = [[f"({'|'.join(_words(w, feeling))})" if w.isupper() else re.escape(w) for w in kind.split()]
                 for kind in _split(REVIEWS)]  # fmt: skip
        return re.compile("|".join(" ".join(words) for words in kinds))

    return {feeling: pattern(feeling) for feeling in "+-0"}


def _words(name, feeling):
    words = REVIEW_WORDS.get(name) or REVIEW_WORDS[name + feeling]
    return [word.replace("_", " ") for word in words.split()]


def _split(text):
    return [part.strip() for line in text.splitlines() for part in line.split(" / ")]


# The embedded questions. A function is a base, one or two steps and perhaps an exception; an entry: words,
# lines of code, a dot for each further indentation. In the preference pairs manners tell more than code
# does: people like a polite and explained answer, and only half of the answers they like less are wrong. So a
# reward model learns manners first, and code hardly: that is what PPO finds.
FUNCTIONS = """the sum of a and b | r = a + b
    the difference of a and b | r = a - b
    the product of a and b | r = a * b
    the larger of a and b | r = b | if a > b: | .r = a
    the smaller of a and b | r = b | if a < b: | .r = a
    the distance from a to b | r = a - b | if a < b: | .r = b - a
    the sum of the numbers below a | r = 0 | for i in range(a): | .r += i
    the sum of the squares below b | r = 0 | for i in range(b): | .r += i * i
    the count of even numbers below a | r = 0 | for i in range(a): | .if i % 2 == 0: | ..r += 1
    a to the power of b | r = 1 | for i in range(b): | .r *= a
    the square of a | r = a * a"""
STEPS = """doubled | r *= 2
    tripled | r *= 3
    squared | r *= r
    negated | r = -r
    plus one | r += 1
    minus two | r -= 2
    plus a | r += a
    times b | r *= b
    but at least zero | if r < 0: | .r = 0
    but at most ten | if r > 10: | .r = 10"""
EXCEPTIONS = """or zero if a is zero | if a == 0: | .return 0
    or one if b is zero | if b == 0: | .return 1
    or minus one if a is b | if a == b: | .return -1
    or zero if a is negative | if a < 0: | .return 0
    or a if b is negative | if b < 0: | .return a
    or b if a is one | if a == 1: | .return b"""
ASKING = ["How do I compute", "Write a function for", "What is the code for", "Please give me"]
INTRODUCTIONS = ["Sure!", "Good question!", "Happy to help!", "Here you go:", "You can do it like this:"]
EXPLANATIONS = ["It works for all whole numbers.", "Please tell me if it helps.", "It uses plain arithmetic."]
EXPLANATIONS += ["The result is kept in r.", "I tried it with small numbers."]
ARGUMENTS = [(3, 5), (7, 2), (4, 4), (0, 3), (5, 0), (1, 6), (-4, 3), (2, -3), (-2, -5)]


def toy_qa(seed=0):
    """qa_data() of the embedded corpus. The functions of validation and problems are no one else's; the
    held-out pairs are about them."""
    rng = random.Random(seed)
    functions = toy_functions(rng)
    validation, problems, train = functions[:200], functions[200:400], functions[400:]
    sft = [(toy_question(rng, f), toy_answer(rng, f)) for f in rng.choices(train, k=12_000)]
    preferences = [toy_preference(rng, f) for f in rng.choices(train, k=12_000)]
    return dict(
        sft=sft,
        preferences=preferences,
        held_out=[toy_preference(rng, f) for f in validation + problems],
        questions=[toy_question(rng, f) for f in rng.choices(train, k=8_000)],
        validation=[(toy_question(rng, f), toy_answer(rng, f)) for f in validation],
        problems=[dict(prompt=toy_question(rng, f), test=toy_test(f)) for f in problems],
        solutions=[toy_code(f) for f in problems],
        texts=[text for pair in sft + preferences for text in pair],
        program_of=lambda question, answer: function_in(answer),
    )


def toy_functions(rng):
    """Every (base, steps, exception or None), in random order."""
    steps = [(step,) for step in _entries(STEPS)] + list(itertools.permutations(_entries(STEPS), 2))
    functions = list(itertools.product(_entries(FUNCTIONS), steps, [None, *_entries(EXCEPTIONS)]))
    return rng.sample(functions, len(functions))


@functools.cache
def _entries(table):
    """[("doubled", ("r *= 2",)), ...]"""
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    return [(words, tuple(lines)) for words, *lines in rows]


def toy_question(rng, function):
    (base, _), steps, exception = function
    parts = [base, *(words for words, _ in steps), *([exception[0]] if exception else [])]
    return ASKED.format(f"{rng.choice(ASKING)} {', '.join(parts)}?")


def toy_code(function):
    """Python source, as "def f(a, b):\\n    r = a + b\\n    return r"."""
    (_, base), steps, exception = function
    lines = [*(exception[1] if exception else []), *base, *(line for _, step in steps for line in step)]
    lines = ["    " * (1 + line.count(".")) + line.lstrip(".") for line in lines]
    return "\n".join(["def f(a, b):", *lines, "    return r"])


def toy_answer(rng, function, polite=0.4, explained=0.4):
    """The function; with these probabilities introduced, and explained in one or two sentences."""
    introduction = [rng.choice(INTRODUCTIONS)] if rng.random() < polite else []
    sentences = rng.sample(EXPLANATIONS, rng.choice([1, 1, 2])) if rng.random() < explained else []
    return "\n".join([*introduction, toy_code(function), *([" ".join(sentences)] if sentences else [])])


def toy_preference(rng, function):
    """The preferred answer behind its question, and the other behind the same."""
    good = function if rng.random() < 0.9 else toy_mistake(rng, function)
    bad = function if rng.random() < 0.5 else toy_mistake(rng, function)
    question = toy_question(rng, function)
    return question + toy_answer(rng, good, 0.85, 0.9), question + toy_answer(rng, bad, 0.2, 0.15)


def toy_mistake(rng, function):
    """The function with a part forgotten or mistaken for another."""
    base, steps, exception = function
    if exception and rng.random() < 0.25:
        return base, steps, None
    if rng.random() < 0.25:
        return base, steps[1:], exception
    return rng.choice([e for e in _entries(FUNCTIONS) if e != base]), steps, exception


def toy_test(function):
    """Asserts on f, the expected values computed from the function's own source."""
    names = {}
    exec(toy_code(function), names)  # our own text, not a model's
    return "".join(f"assert f({a}, {b}) == {names['f'](a, b)}\n" for a, b in ARGUMENTS)


def function_in(answer):
    """The source of the first function in an answer, from `def` on as long as lines are indented."""
    found = re.search(r"^def .*(?:\n[ \t]+.*)*", answer, re.MULTILINE)
    return found[0] + "\n" if found else ""


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
            more = "; --help lists them all, and --compare takes commas without spaces"
            raise ValueError(message + more * message.startswith("unrecognized"))

    metavars = {int: dict(metavar="N"), float: dict(metavar="X"), str: dict(metavar="TEXT")}
    section, sections, known = "", {}, [*fields(Config), *fields(Command)]
    for f in known:
        section = f.metadata["group"] or section
        text = f.metadata["help"].format(methods=", ".join(METHODS), tasks=", ".join(TASKS))
        text += default_text(f)
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
        given = vars(parser.parse_args(to_argv(flags_of_file(given)) + argv))
    if {"seeds", "jobs"} & given.keys() and "compare" not in given:
        raise ValueError("--seeds and --jobs say how many runs --compare makes: give that as well")
    command = Command(**{f.name: given.pop(f.name) for f in fields(Command) if f.name in given})
    for f in fields(Command):
        check_value(f, getattr(command, f.name))
    return given, command


def default_text(f):
    """ " (default 200; imdb 120, qa 40)": a flag's default, and what the tasks' mini presets say instead."""
    if f.default in ("", (), "custom"):
        return ""
    presets = {name: task.presets["mini"] for name, task in TASKS.items()}
    others = ", ".join(f"{name} {preset[f.name]}" for name, preset in presets.items() if f.name in preset)
    return f" (default {f.default}{'; ' * bool(others)}{others})"


def to_argv(flags):
    """{"kl_coef": 0.1, "sender_data": ["a", "b"]} -> --kl_coef 0.1 --sender_data a b, a list of words"""
    argv = []
    for name, value in flags.items():
        words = [str(word) for word in (value if isinstance(value, (list, tuple)) else [value])]
        argv += [f"--{name}", *words] if words else []
    return argv


def flags_of_file(given):
    """The flags in the file that --config names. ValueError if that is a run's config.json, which leaves
    nothing to set, and other flags would change what the run is."""
    path, flags = given["config"], read_yaml(given["config"])
    if flags.keys() >= {f.name for f in fields(Config)}:
        for name in ("task", "method", "preset", "compare"):
            if given.get(name, flags.get(name)) != flags.get(name):
                raise ValueError(f"--{name} and --config {path}, which names every setting: give one")
    return flags


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


def print_stages(config):
    """The stages before RL, up to the last one wanted, and the folders of their models."""
    if config.task != "qa":
        raise ValueError(f"last_stage is {config.last_stage}, but only the task qa has stages")
    for stage, name in TechnicalQA.stages(config, qa_data(config)):
        print(f"{stage}: {name}")
        if stage == config.last_stage:
            return


def main(argv=None) -> int:
    """The command line. 0: done; 1: training broke off; 2: unusable flags or data; 130: interrupted."""
    argv, given = sys.argv[1:] if argv is None else argv, {}
    try:
        given, command = parse_flags(argv)
        if given.get("task") not in TASKS:
            raise ValueError(f"--task is {given.get('task', 'missing')}; expected one of {', '.join(TASKS)}")
        if command.compare:
            if given.get("last_stage", "rl") != "rl":
                raise ValueError("--compare runs RL, but --last_stage ends before it")
            methods = [method.strip() for method in command.compare.split(",")]
            print(compare(methods, command.seeds, command.jobs, given))
        elif given.get("last_stage", "rl") != "rl":
            print_stages(configure(**given))
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
