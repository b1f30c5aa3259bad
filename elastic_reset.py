# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "numpy>=1.26", "transformers>=5.0", "tokenizers>=0.22", "datasets>=4.0",
#     "accelerate>=1.10", "safetensors>=0.5", "sacrebleu>=2.5", "sentencepiece>=0.2",
#     "matplotlib>=3.8", "tqdm>=4.66", "pyyaml>=6.0", "filelock>=3.16", "peft>=0.17",
#     "pydantic-monty>=1.4",
# ]
# ///
"""Elastic Reset: fine-tune a language model with PPO and keep its language. Read it from the top.

The method is "Language Model Alignment with Elastic Reset" (Noukhovitch, Lavoie, Strub, Courville,
NeurIPS 2023, arXiv 2312.07551). The policy is the model that is trained. PPO, proximal policy
optimization, raises in small steps the probability of responses that earned more than expected.
theta are the policy's weights, theta_0 those at the start (`init` in the code), and theta_bar is an
exponential moving average of theta (EMA, `ema` in the code).

    theta_bar <- theta_0
    for update = 1, 2, ...:
        theta     <- one PPO update of theta, on responses that theta has just sampled
        theta_bar <- decay * theta_bar + (1 - decay) * theta           # the EMA
        every n updates:                                               # the reset
            theta     <- theta_bar
            theta_bar <- theta_0

Elastic Reset does not change PPO's loss, its value head or the optimizer's moments. The preset
of imdb adds a small KL penalty, which `--kl_coef 0` turns off.

Run it:   python elastic_reset.py --task translation    (offline, minutes on two CPU cores; --help)
Copy it:  ElasticReset needs only torch and asks for one line in a training loop, `elastic.step()`.
          To paste section 1 by itself, put before it: import contextlib, itertools, torch;
          from torch import nn; ema_kernel = None.

Section                     what is there
 1 Elastic Reset            the average, the reset, its four rules: all that other loops need
 2 Settings                 every setting of a run, with its default and its range
 3 PPO's formulas           rewards, advantages, loss: functions of tensors, each with its equation
 4 The policy               how responses are sampled and scored
 5 Training                 train(), the whole algorithm in seven numbered steps
 6 The translation game     what a task is; FR -> EN -> DE, with its data
 7 Film reviews             mock sentiment, with its data
 8 Python questions         technical QA, with its data
 9 Models                   loading by name, training from scratch, LoRA, tokenizers
10 A run                    files, checkpoints, command line
11 Other people's trainers  a callback for transformers' Trainer and TRL
"""

import argparse
import ast
import atexit
import contextlib
import copy
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
import sys
import textwrap
import threading
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

try:
    import ema_kernel
except ImportError:  # The extension is not built, so averages take the torch._foreach path.
    ema_kernel = None


# ======================================== 1. Elastic Reset ========================================

RESET_RULES = {  # rule: (the weights copied into the policy, those copied into the EMA)
    "elastic": ("ema", "init"),  # the paper's reset
    "ema": ("ema", "ema"),  # the EMA goes on; also known as Hare & Tortoise and as Switch EMA
    "init": ("init", "ema"),  # back to the start, an ablation of the paper
    "none": ("policy", "ema"),  # plain RL
}


class ElasticReset:
    """Keep the moving average of a policy's weights, and reset the policy to it (the paper, section
    3).

        elastic = ElasticReset(model, decay=0.995, reset_every=17)
        ...
        elastic.step()  # after every PPO update or, in other training, after every optimizer.step()

    `model` is a module or an iterable of parameters. Averaged are the parameters that require a
    gradient when this object is made, with LoRA the adapter's. Tied parameters count once. Create
    the ElasticReset where you create the optimizer, after adapters and `fully_shard`, because it
    keeps references to the parameters, as an optimizer does. It never moves or replaces them.

    `ema` and `init` are lists of tensors shaped like `params`. `ema` is float32, or float64 for
    float64 parameters: with decay 0.995 each change is so small that bfloat16 would round it away.
    `init` has the parameters' own dtype, in which the start is known exactly. If you cast the
    policy to another dtype, the start is rounded with it.

    `device`: None keeps both beside the parameters. "cpu" keeps them in CPU memory, so that they
    take none of a GPU's. An update, or a reset of the rule "elastic", then copies the policy
    through two staging buffers in CPU memory. averaged() still needs room on the GPU for a second
    copy of the policy.

    `backend` is "rust" if the extension `ema_kernel` is built and can be used. It can if the
    parameters are staged, or are contiguous CPU tensors of which no two share memory. Else it is
    "foreach", torch's operations on lists of tensors.

    Where FSDP2 has split the parameters over processes, they are DTensors, and each process
    averages its own shards. `model` must be the root module then. On one device, skip what concerns
    that.

    The start's share of a reset is decay ** reset_every. To choose it, take decay = share ** (1 /
    reset_every). The defaults are the paper's for film reviews, where it is 0.92.

    Raises ValueError for settings out of range or if nothing requires a gradient, TypeError for
    parameters that are sparse, without memory (meta) or of 8 bits."""

    def __init__(
        self,
        model,
        decay: float = 0.995,
        reset_every: int = 17,
        reset: str = "elastic",
        device: str | None = None,
    ):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; expected a number from 0 to 1")
        if not (reset_every >= 1 and reset_every % 1 == 0):
            raise ValueError(f"reset_every is {reset_every}; expected a whole number of at least 1")
        if reset not in RESET_RULES:
            raise ValueError(f"reset is {reset!r}; expected one of {', '.join(RESET_RULES)}")
        if device not in (None, "cpu"):
            raise ValueError(f"device is {device!r}; expected 'cpu' or None, beside the parameters")
        self.decay = decay
        self.reset_every = int(reset_every)
        self.rule = reset
        self.device = device
        self.updates = 0
        self.resets = 0
        if isinstance(model, nn.Module):
            self._fsdp_modules = [m for m in model.modules() if hasattr(m, "reshard")]
            self._free_gathered_copies()
            named_parameters = model.named_parameters()
        else:
            self._fsdp_modules = []
            named_parameters = enumerate(model)
        names = {}  # {parameter: its first name}
        for name, p in named_parameters:
            if not p.requires_grad:
                continue
            if p.is_meta or p.layout != torch.strided or p.element_size() < 2:
                raise TypeError(f"parameter {name} is not a dense one in memory of 16 bits or more")
            names.setdefault(p, str(name))
        if not names:
            raise ValueError("no parameter requires a gradient, so there is nothing to average or reset")
        self.params = list(names)
        self.names = list(names.values())
        # Not copies yet. The first call of _current_policy() replaces them by copies in flat
        # buffers.
        self.ema = [local(p) for p in self.params]
        self.init = [local(p) for p in self.params]
        self._places = None
        self._flat = []
        self._staged = []
        self._current_policy()  # called for its effect: it lays the averages out

    @property
    def backend(self) -> str:
        return "rust" if self._flat else "foreach"

    def step(self) -> bool:
        """Call update() and, every `reset_every`-th time, reset(). Returns whether it has reset."""
        self.update()
        if not self.is_due(self.updates):
            return False
        self.reset()
        return True

    def is_due(self, updates: int) -> bool:
        """Say whether a reset follows this number of updates. train() counts PPO updates, in each
        of which the EMA may move several times."""
        return self.rule != "none" and updates % self.reset_every == 0

    @torch.no_grad()
    def update(self) -> None:
        """ema <- decay * ema + (1 - decay) * policy"""
        policy = self._current_policy()
        self.updates += 1
        if self.backend == "rust":
            for arrays, ema, _ in self._fetched(policy):
                ema_kernel.update(ema, arrays, self.decay, torch.get_num_threads())
            return
        wide_policy = [p.to(ema) for p, ema in zip(policy, self.ema, strict=True)]
        # ema += (1 - decay) * (policy - ema)
        torch._foreach_lerp_(self.ema, wide_policy, 1 - self.decay)

    @torch.no_grad()
    def reset(self) -> None:
        """policy <- ema, rounded once to the policy's dtype; ema <- init. Other rules: see
        RESET_RULES."""
        policy = self._current_policy()
        self.resets += 1
        if self.backend == "rust" and self.rule == "elastic":  # the kernel knows this rule only
            for arrays, ema, init in self._sent_back(policy):
                ema_kernel.reset(arrays, ema, init, torch.get_num_threads())
        else:
            weights = {"policy": policy, "ema": self.ema, "init": self.init}
            policy_becomes, ema_becomes = RESET_RULES[self.rule]
            torch._foreach_copy_(policy, weights[policy_becomes])
            torch._foreach_copy_(self.ema, weights[ema_becomes])
        self._free_gathered_copies()

    @torch.no_grad()
    def averaged(self, start: float = 0.0):
        """Give the policy the weights (1 - start) * ema + start * init inside
        `with elastic.averaged():`, to evaluate or save it. With the rule "none" a `start` above 0
        makes what others call a mixture with the start, or WARP's last step."""
        if not 0 <= start <= 1:
            raise ValueError(f"start is {start}; expected a share from 0 to 1")
        if start == 0:
            return self.holding(self.ema)
        self._current_policy()  # moves the averages if the parameters have moved
        mixed = []
        for ema, init in zip(self.ema, self.init, strict=True):
            mixed.append(torch.lerp(ema, init.to(ema.dtype), start).to(init.dtype))
        return self.holding(mixed)

    @contextlib.contextmanager
    def holding(self, weights: list[torch.Tensor]):
        """Give the policy other weights inside a `with` block, a list in the order of `params`.
        They are copied in, and afterwards the policy's own are copied back, so every parameter
        stays the object that it was."""
        policy = self._current_policy()
        own = [p.clone() for p in policy]
        try:
            torch._foreach_copy_(policy, weights)
            self._free_gathered_copies()
            yield
        finally:
            torch._foreach_copy_(self._current_policy(), own)
            self._free_gathered_copies()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return `ema.<name>`, `init.<name>`, `updates` and `resets`: tensors, or DTensors where
        the parameters are. The tensors are not copies. The next update changes them, so clone what
        you want to keep. (Of averages in CPU memory, DTensors on a GPU can only be copies.)"""
        return dict(self.named_state())

    def named_state(self):
        """Yield the pairs of state_dict() one at a time, for a model whose averages would not fit
        on its GPU together."""
        self._current_policy()  # moves the averages if the parameters have moved
        yield "updates", torch.tensor(self.updates)
        yield "resets", torch.tensor(self.resets)
        for name, p, ema, init in zip(self.names, self.params, self.ema, self.init, strict=True):
            yield f"ema.{name}", shard_like(p, ema)
            yield f"init.{name}", shard_like(p, init)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copy a state_dict() in. Full tensors will do where the parameters are DTensors. Raises
        ValueError, with nothing changed, if a name, a shape or a dtype differs."""
        self._current_policy()
        layouts = {"updates": (torch.Size(), torch.int64), "resets": (torch.Size(), torch.int64)}
        for name, p, ema, init in zip(self.names, self.params, self.ema, self.init, strict=True):
            layouts[f"ema.{name}"] = (p.shape, ema.dtype)
            layouts[f"init.{name}"] = (p.shape, init.dtype)
        if others := sorted(layouts.keys() ^ state.keys()):
            raise ValueError(f"not this policy's state: {others[0]} is missing or unknown")
        state = dict(state)
        for name, expected in layouts.items():  # in one order on all processes
            if name.startswith("init."):
                state[name] = without_loss(state[name], dtype=expected[1])
            if layout(state[name]) != expected:
                raise ValueError(f"not this policy's state: {name} has another shape or dtype")
        for name, p, ema, init in zip(self.names, self.params, self.ema, self.init, strict=True):
            ema.copy_(local(distributed_like(p, state[f"ema.{name}"])))
            init.copy_(local(distributed_like(p, state[f"init.{name}"])))
        self.updates = int(state["updates"])
        self.resets = int(state["resets"])

    # ---- how the averages are stored

    def __getstate__(self):
        """Leave the buffers out of copies and pickles. The copy builds new ones when it is first
        used. Averages are cloned, since pickle would write the whole buffer for each view of it."""
        own = vars(self) | {"_places": None, "_flat": [], "_staged": []}
        own["ema"] = [ema.clone() for ema in self.ema]
        own["init"] = [init.clone() for init in self.init]
        return own

    def _free_gathered_copies(self) -> None:
        """Make FSDP2 drop the gathered copies of the parameters that it may keep between passes.
        After a change they are out of date."""
        for module in self._fsdp_modules:
            module.reshard()

    def _current_policy(self) -> list[torch.Tensor]:
        """Return the parameters as plain tensors, of a DTensor this process's shard. Where `.to()`
        has moved them since the last call, build the averages anew beside them."""
        policy = [local(p) for p in self.params]
        places = [p.data_ptr() for p in policy]
        if places != self._places:
            self._lay_out(policy)
            self._places = places
        return policy

    @torch.inference_mode(False)  # averages made in inference mode could not change outside it
    @torch.no_grad()
    def _lay_out(self, policy: list[torch.Tensor]) -> None:
        """Copy ema and init into flat buffers, beside the parameters or in CPU memory, and prepare

        _flat: what the kernel gets, for each part of the parameters: a list of arrays of these, ema
            and init, which share memory with the tensors. Empty if the kernel cannot be used.
        _staged: for each part, which parameters are copied to which places of the buffer that the
            kernel gets instead. Empty if it works on the parameters themselves."""
        self._places = None
        self._flat = []
        self._staged = []
        staging = any(lies_elsewhere(p, self.device) for p in policy)
        kernel_works = self._kernel_can_work(in_place=not staging)
        parts = of_one_kind(policy)
        if staging and kernel_works:
            parts = divided(parts, policy)
            buffers = staging_buffers(parts, policy)
        for number, part in enumerate(parts):
            first = policy[part[0]]
            home = self.device or first.device
            average_dtype = torch.promote_types(first.dtype, torch.float32)
            ema = move_to_buffer(self.ema, part, average_dtype, home)
            init = move_to_buffer(self.init, part, first.dtype, home)
            if not kernel_works:
                continue
            if staging:
                buffer = buffers[number % 2]  # the parts take the two buffers in turn
                flat = buffer[: init.nbytes].view(init.dtype)  # init has the policy's dtype
                self._staged.append(views_of(flat, part, policy))
                arrays = [as_array(flat)]
            else:
                arrays = [as_array(policy[i].view(-1)) for i in part]
            self._flat.append((arrays, as_array(ema), as_array(init)))

    def _fetched(self, policy):
        """Yield what the kernel gets. A staged part is copied to its buffer first. While the kernel
        works on one part, the next one is on its way."""
        if not self._staged:
            yield from self._flat
            return
        wait_for_next = to_buffer(self._staged[0], policy)
        for arguments, following in itertools.zip_longest(self._flat, self._staged[1:]):
            wait = wait_for_next
            if following:
                wait_for_next = to_buffer(following, policy)
            wait()
            yield arguments

    def _sent_back(self, policy):
        """Yield what the kernel gets. A staged part is copied to the policy afterwards, while the
        kernel works on the next one."""
        if not self._staged:
            yield from self._flat
            return
        waits = []
        for arguments, staged in zip(self._flat, self._staged, strict=True):
            if len(waits) == 2:
                waits.pop(0)()  # this buffer's last part has left it
            yield arguments
            waits.append(to_policy(staged, policy))
        for wait in waits:
            wait()

    def _kernel_can_work(self, in_place: bool) -> bool:
        """Say whether all parameters are floating-point and, for work in place, contiguous, aligned
        CPU tensors of which no two share memory."""
        if ema_kernel is None or not all(p.is_floating_point() for p in self.params):
            return False
        if not in_place:
            return True
        spans = []
        for p in self.params:
            if p.device.type != "cpu" or hasattr(p, "to_local") or not p.is_contiguous():
                return False
            if p.data_ptr() % p.element_size() != 0:
                return False
            if p.numel():
                spans.append((p.data_ptr(), p.data_ptr() + p.nbytes))
        for (_, end), (next_start, _) in itertools.pairwise(sorted(spans)):
            if end > next_start:
                return False
        return True


def move_to_buffer(tensors, members, dtype, device):
    """Copy some members of a list of tensors into one flat buffer, replace each by a view of its
    part, and return the buffer, (number of all their elements,)."""
    sizes = [tensors[i].numel() for i in members]
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    for i, part in zip(members, flat.split(sizes), strict=True):
        view = part.view(tensors[i].shape)
        view.copy_(tensors[i])
        tensors[i] = view  # in the same list, which others may hold on to
    return flat


STAGING_BYTES = 128 << 20  # of each of the two buffers, or as many as the largest parameter has


def lies_elsewhere(p, device):
    """Say whether a parameter's averages are to be kept on another device."""
    return device is not None and p.device.type != device


def of_one_kind(tensors):
    """Group tensors by device and dtype. Returns lists of their places in `tensors`."""
    groups = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    return list(groups.values())


def divided(groups, policy):
    """Divide groups of a list's tensors into parts that fit into a staging buffer."""
    parts = []
    for members in groups:
        parts.append([])
        filled = 0
        for i in members:
            if parts[-1] and filled + policy[i].nbytes > STAGING_BYTES:
                parts.append([])
                filled = 0
            parts[-1].append(i)
            filled += policy[i].nbytes
    return parts


def staging_buffers(parts, policy):
    """Make two buffers of bytes in CPU memory, pinned for a GPU, which any part fits into."""
    largest = max(sum(policy[i].nbytes for i in part) for part in parts)
    look = dict(dtype=torch.uint8, device="cpu", pin_memory=any(p.is_cuda for p in policy))
    return [torch.empty(largest, **look) for _ in range(2)]


def views_of(buffer, part, policy):
    """Divide a buffer among a part's tensors. Returns pairs of a tensor's place in `policy` and its
    view."""
    views = buffer.split([policy[i].numel() for i in part])
    return [(i, view.view(policy[i].shape)) for i, view in zip(part, views, strict=True)]


def to_buffer(staged, policy):
    """Begin to copy parameters to a staging buffer. Returns a function that waits for the end."""
    for i, view in staged:
        view.copy_(policy[i], non_blocking=True)
    return end_of_copies(policy[staged[0][0]].device)


def to_policy(staged, policy):
    """Begin to copy a staging buffer to its parameters. Returns a function that waits for the
    end."""
    for i, view in staged:
        policy[i].copy_(view, non_blocking=True)
    return end_of_copies(policy[staged[0][0]].device)


def end_of_copies(device):
    """Return a function that waits until the copies just begun are done. On the CPU they are."""
    if device.type == "cpu":
        return lambda: None
    event = torch.accelerator.current_stream(device).record_event()
    return event.synchronize


def local(p):
    """Return the tensor itself or, if it is a DTensor, this process's shard of it."""
    return p.detach().to_local() if hasattr(p, "to_local") else p.detach()


def shard_like(p, shard):
    """Make this process's shard a DTensor like p. If p is not a DTensor, the tensor is returned
    unchanged."""
    if not hasattr(p, "to_local"):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def distributed_like(p, full):
    """Make a full tensor a DTensor like p. If p is not a DTensor, or `full` is one already, `full`
    is returned unchanged."""
    if not hasattr(p, "to_local") or hasattr(full, "to_local"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, p.device_mesh, p.placements)


def without_loss(tensor, dtype):
    """Return a start in the policy's dtype, or unchanged if that cannot hold it. (Earlier versions
    kept starts in float32.)"""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype == dtype:
        return tensor
    rounded = tensor.to(dtype)
    return rounded if torch.equal(rounded.to(tensor.dtype), tensor) else tensor


def layout(tensor):
    """Return a tensor's shape and dtype, or None for what is no tensor."""
    return (tensor.shape, tensor.dtype) if isinstance(tensor, torch.Tensor) else None


def as_array(flat):
    """View the same memory as a NumPy array. NumPy has no bfloat16 and sees its bits as uint16."""
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()


# ========================================== 2. Settings ===========================================

METHODS = {  # settings by which each differs from the task's preset, the task's own defaults
    "elastic-reset": dict(reset="elastic"),
    "ppo": dict(reset="none", kl_coef=0.0),
    "ppo-kl": dict(reset="none", kl_reference="init"),
    "reinforce": dict(reset="none", kl_coef=0.0, num_ppo_epochs=1, mini_batch_size=0, vf_coef=0.0, lam=1.0),
    "fixed-sender": dict(reset="none", num_ppo_epochs=0),  # the policy never learns
    "reset-init": dict(reset="init"),
    "reset-ema": dict(reset="ema"),
    "ema-reference": dict(reset="none", kl_reference="ema"),  # WARP's first stage, EMA-PG
}
PENALTY_METHODS = ("ppo-kl", "ema-reference")  # these limit drift by a KL penalty only
TRACKERS = ("tensorboard", "wandb", "trackio")
GAME, IMDB, QA = "translation", "imdb", "qa"
EMBEDDED_TASKS = (GAME, IMDB, QA)  # each refuses settings that only the others have


def setting(default, help, low=None, high=10**9, *, choices=(), tasks=(), group=None):
    """Describe one field of Config. `low`, `high`: its range; `high` may be the name of a setting
    that stands above. `choices`: the values that a text may have. `tasks`: those that have this
    setting; empty means all, also your own. `group`: a title in --help, on the first setting of a
    group."""
    about = dict(help=help, low=low, high=high, choices=choices, tasks=tasks, group=group)
    return field(default=default, metadata=about)


@dataclass
class Config:
    """Hold all settings of a run. configure() builds it from a preset, a method and the user's
    settings. Raises ValueError if a setting has another type, is out of its range or belongs to
    another task."""

    task: str = setting("custom", "translation, imdb, qa or another of TASKS", group="The run")
    method: str = setting("elastic-reset", "a named set of defaults", choices=METHODS)
    seed: int = setting(0, "of sampling and data order; pretraining always has the same", 0, 10**18)
    updates: int = setting(200, "PPO updates; each samples batch_size responses", 1)
    eval_every: int = setting(20, "updates between evaluations; one more on either side of a reset", 1)
    eval_size: int = setting(256, "validation prompts (and programs) to evaluate on", 1)
    save_every: int = setting(20, "updates between checkpoints", 1)
    output_dir: str = setting("", "where the files go; empty: runs/<task>/<method>/seed<seed>")
    resume: bool = setting(False, "true: go on from the checkpoint in output_dir, if there is one")
    report_to: str = setting("none", "a tracker to log to, too", choices=("none", *TRACKERS))

    reset: str = setting("elastic", "a reset rule", choices=RESET_RULES, group="Elastic Reset")
    reset_every: int = setting(40, "PPO updates between resets", 1)
    ema_decay: float = setting(0.97, "share of itself that the EMA keeps when it moves", 0, 1)
    ema_update: str = setting("update", "when the EMA moves", choices=("update", "epoch"))
    ema_device: str = setting("policy", "where EMA and start are kept", choices=("policy", "cpu"))

    learning_rate: float = setting(2e-4, "AdamW's", 0, 1, group="PPO")
    value_learning_rate: float = setting(0.0, "of the value function; 0: learning_rate", 0, 1)
    batch_size: int = setting(128, "responses sampled per update", 1)
    mini_batch_size: int = setting(64, "responses per optimizer step; 0: all", 0, "batch_size")
    num_ppo_epochs: int = setting(2, "passes over each batch; 0 keeps the policy fixed", 0)
    gradient_accumulation_steps: int = setting(1, "parts of a batch, to save memory", 1)
    max_length: int = setting(64, "longest source or target text, in tokens; more is cut off", 2)
    response_length: int = setting(20, "longest response, in tokens", 1, "max_length")
    min_response_length: int = setting(0, "EOS is forbidden before", 0, "response_length")
    temperature: float = setting(1.0, "sampling temperature", 0.01, 100)
    gamma: float = setting(1.0, "discount of later rewards", 0, 1)
    lam: float = setting(0.95, "GAE's lambda; 1 trusts rewards alone, 0 values", 0, 1)
    cliprange: float = setting(0.2, "how far a ratio of probabilities may move from 1", 0)
    cliprange_value: float = setting(0.2, "how far a value may move", 0)
    vf_coef: float = setting(0.1, "weight of the value function's loss; 0: none is learned", 0)
    entropy_coef: float = setting(0.0, "weight of a bonus for entropy, for spread-out choices", 0)
    max_grad_norm: float = setting(1.0, "longest gradient; longer ones are scaled down", 1e-9)
    early_stop_kl: float = setting(0.0, "end an update beyond this KL(old, new) per token; 0: never", 0)
    separate_value_model: bool = setting(False, "true: values from a copy of the policy")
    dtype: str = setting("float32", "of loaded weights", choices=("float32", "bfloat16"))

    kl_coef: float = setting(0.0, "price of moving from the reference", 0, group="KL penalty")
    kl_target: float = setting(0.0, "adapt kl_coef to this KL, nats per response; 0: do not", 0)
    kl_reference: str = setting("init", "the reference", choices=("init", "ema"))

    model: str = setting("", "hub name or folder; empty: train one", group="Models and data")
    reward_model: str = setting("", "hub name or folder of a classifier or scorer", tasks=(IMDB, QA))
    language_model: str = setting("", "hub name or folder of perplexity's model", tasks=(IMDB,))
    receiver_model: str = setting("", "hub name or folder of the EN->DE receiver", tasks=(GAME,))
    data: str = setting("", "hub name or folder, also DIR:train[9000:]; empty: embedded data")
    validation_data: str = setting("", "held-out rows, as DIR:train[:200]; empty: data:validation")
    sender_data: list = setting((), "fr, en pairs to pretrain the sender on", tasks=(GAME,))
    receiver_data: list = setting((), "en, de pairs to pretrain the receiver on", tasks=(GAME,))
    sft_data: str = setting("", "question, response_j for stage 1; empty: data", tasks=(QA,))
    preference_data: str = setting("", "the same with response_k, for stage 2", tasks=(QA,))
    programs: str = setting("", "problems in HumanEval's format to run answers on", tasks=(QA,))
    receiver_learning_rate: float = setting(1e-3, "0 keeps the receiver fixed", 0, 1, tasks=(GAME,))
    d_model: int = setting(96, "width of a model trained here, a multiple of 8", 8)
    layers: int = setting(1, "layers of a model trained here, of its encoder and decoder each", 1)
    vocab_size: int = setting(0, "BPE tokens of a model trained here; 0: one token a word", 0)
    prompt_length: int = setting(10, "cut of a prompt", 1, "max_length", tasks=(IMDB, QA))
    pretrain_updates: int = setting(800, "of pretraining; 0: --model is fine-tuned already", 0)
    pretrain_batch_size: int = setting(128, "examples per update of pretraining", 1)
    pretrain_learning_rate: float = setting(2e-3, "peak learning rate of pretraining", 0, 1)
    reward_updates: int = setting(300, "updates of a reward model trained here", 1, tasks=(IMDB, QA))
    lora_r: int = setting(8, "rank of the adapter; alpha is twice that", 1, tasks=(QA,))
    lora_dropout: float = setting(0.0, "of stages 1 and 2; PPO has none", 0, 1, tasks=(QA,))
    program_samples: int = setting(1, "programs per problem; with more, pass@k too", 1, tasks=(QA,))
    program_length: int = setting(72, "longest program, in tokens", 1, tasks=(QA,))
    program_temperature: float = setting(1.0, "of sampling programs", 0, 100, tasks=(QA,))

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is float and type(value) is int:
                setattr(self, f.name, float(value))  # so that a setting has one type everywhere
            elif f.type is list and isinstance(value, tuple):
                setattr(self, f.name, list(value))
            self._check(f, getattr(self, f.name))
        if self.d_model % 8:
            raise ValueError(f"d_model is {self.d_model}; expected a multiple of 8")
        needs_penalty = self.kl_target or self.kl_reference == "ema" or self.method in PENALTY_METHODS
        if needs_penalty and self.kl_coef == 0:
            raise ValueError("kl_coef is 0, so there is no KL penalty to adapt or measure; try 0.05")

    def _check(self, f, value):
        """Raise ValueError unless a setting has its type, lies in its range and is the task's."""
        low = f.metadata["low"]
        high = f.metadata["high"]
        choices = f.metadata["choices"]
        tasks = f.metadata["tasks"]
        if tasks and self.task in EMBEDDED_TASKS and self.task not in tasks:
            if value not in (f.default, []):  # [] is the default of a list
                raise ValueError(f"{f.name} is a setting of {', '.join(tasks)}, not of {self.task}")
            return
        expected = f.type.__name__
        fits = isinstance(value, f.type) and isinstance(value, bool) == (f.type is bool)
        if choices:
            expected = "|".join(choices)
            fits = fits and value in choices
        elif low is not None:
            largest = getattr(self, high) if isinstance(high, str) else high
            expected += f" from {low} to {largest:,}"
            if isinstance(high, str):
                expected += f" ({high})"
            fits = fits and low <= value <= largest
        if not fits:
            raise ValueError(f"{f.name} is {value!r}; expected {expected}")

    @property
    def averaging(self) -> dict:
        """Return the settings of ElasticReset."""
        return dict(
            decay=self.ema_decay,
            reset_every=self.reset_every,
            reset=self.reset,
            device="cpu" if self.ema_device == "cpu" else None,
        )

    @property
    def sampling(self) -> dict:
        """Return the arguments of respond() that RL samples with."""
        return dict(
            response_length=self.response_length,
            temperature=self.temperature,
            min_response_length=self.min_response_length,
            max_length=self.max_length,
        )


def merged(*layers: dict) -> dict:
    """Join layers of settings. A later layer wins. If it sets kl_coef to 0, it turns the whole KL
    penalty off: kl_target and kl_reference of earlier layers go, too."""
    settings = {}
    for layer in layers:
        if layer.get("kl_coef") == 0:
            settings.update(kl_target=0.0, kl_reference="init")
        settings.update(layer)
    return settings


def configure(task: str = "custom", method: str = "elastic-reset", **given) -> Config:
    """Make the settings of a run: defaults < the task's preset < the method < `given`, of which the
    later one wins. Raises ValueError for a value that cannot be used, TypeError for a name that no
    setting has."""
    task_class = TASKS.get(task) if isinstance(task, str) else None
    preset = getattr(task_class, "preset", {})
    if method in PENALTY_METHODS:
        preset = preset | getattr(task_class, "preset_without_resets", {})
    settings = merged(preset, METHODS.get(str(method), {}), given)
    return Config(task=task, method=method, **settings)


# ======================================= 3. PPO's formulas ========================================
#
# The policy pi has sampled tokens a_t. Each gets a reward r_t. The value V_t, computed before a_t
# is seen, guesses the sum of rewards from t on. The advantage A_t says how much better than V_t it
# went. The loss raises log pi(a_t) where A_t > 0 and lowers it where A_t < 0.
#
# A batch is a dict of tensors. Each row is one prompt with its response.
#
#   input_ids, attention_mask   (batch, prompt)     the prompts, padded
#   responses                   (batch, response)   the sampled tokens a_t; EOS ends them, then padding
#   mask                        (batch, response)   True up to and including EOS
#   scores                      (batch,)            what task.reward() says of the whole response
#   logprobs                    (batch, response)   log pi(a_t) of the policy that sampled
#   ref_logprobs                (batch, response)   the same under the reference of the KL penalty
#   values                      (batch, response)   V_t
#   advantages                  (batch, response)   A_t, whitened
#   returns                     (batch, response)   R_t, the targets of the values
#
# All sums and means below run over the tokens where the mask is True.


def gather_logprobs(logits, tokens):
    """Compute log pi(a_t) of each token. (batch, response, vocab), (batch, response) -> (batch,
    response)"""
    return logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Compute the reward of each token, (batch, response): -kl_coef (log pi - log pi_ref), and at
    the last token also the score (batch,). Averaged over samples of pi, that difference of
    logarithms is the KL divergence of pi from pi_ref, and so the policy pays for its distance (the
    estimator known as k1)."""
    # r_t = - kl_coef (log pi(a_t) - log pi_ref(a_t)) + score [t is last]
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.sum(1, keepdim=True) - 1  # (batch, 1)
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def gae(rewards, values, mask, gamma, lam):
    """Estimate advantages by GAE (arXiv 1506.02438, equation 16). Returns advantages, how much
    better it went than the values guessed, and returns, the targets that values learn: (batch,
    response) each."""
    # delta_t = r_t + gamma V_{t+1} - V_t;    A_t = delta_t + gamma lam A_{t+1}
    # A response that was cut off has no V behind it either: its score comes at its last token.
    next_values = F.pad(values * mask, (0, 1))[:, 1:]  # V_{t+1}, 0 after the last token
    deltas = (rewards + gamma * next_values - values) * mask
    advantages = torch.zeros_like(rewards)
    next_advantage = 0.0
    for t in reversed(range(rewards.shape[1])):
        advantages[:, t] = deltas[:, t] + gamma * lam * next_advantage
        next_advantage = advantages[:, t]
    returns = (advantages + values) * mask  # R_t = A_t + V_t
    return advantages, returns


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """Shift and scale to mean 0 and (unbiased) variance 1 where the mask is True; elsewhere 0."""
    centred = (x - masked_mean(x, mask)) * mask
    variance = centred.square().sum() / (mask.sum() - 1).clamp(min=1)
    return centred * (variance + 1e-8).rsqrt()


def ppo_loss(new_logprobs, new_values, entropy, old, *, cliprange, cliprange_value, vf_coef, entropy_coef):
    """Compute PPO's clipped loss (arXiv 1707.06347, equations 7 and 9), a scalar, and {name: number
    to log}. The clip of the values comes from OpenAI Baselines. `old` is the minibatch, with the
    logprobs and values of the policy that sampled, advantages, returns and mask. All tensors are
    (batch, response)."""
    mask = old["mask"]
    advantages = old["advantages"]
    # min: nothing is gained by moving a ratio beyond 1 - c or 1 + c.
    # ratio_t = pi(a_t) / pi_old(a_t);    L_policy = - mean_t min(ratio_t A_t, clip(ratio_t, 1-c, 1+c) A_t)
    log_ratio = new_logprobs - old["logprobs"]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    policy_loss = -masked_mean(torch.min(ratio * advantages, clipped * advantages), mask)
    # L_value = 1/2 mean_t max((V_t - R_t)^2, (V_old_t + clip(V_t - V_old_t, -c, c) - R_t)^2)
    change = (new_values - old["values"]).clamp(-cliprange_value, cliprange_value)
    clipped_values = old["values"] + change
    error = (new_values - old["returns"]).square()
    clipped_error = (clipped_values - old["returns"]).square()
    value_loss = 0.5 * masked_mean(torch.max(error, clipped_error), mask)
    # L = L_policy + c_v L_value - c_e H; c_v is vf_coef, c_e entropy_coef, H the entropy
    loss = policy_loss + vf_coef * value_loss - entropy_coef * masked_mean(entropy, mask)
    stats = {
        "loss": loss.item(),
        "policy_loss": policy_loss.item(),
        "value_loss": value_loss.item(),
        "policy_kl": 0.5 * masked_mean(log_ratio.square(), mask).item(),  # KL(old, new), estimator k2
        "clipfrac": masked_mean(ratio != clipped, mask).item(),
    }
    return loss, stats


# ========================================= 4. The policy ==========================================
# How a model samples and scores texts: the policy, and also the receiver of section 6.


class ActorCritic(nn.Module):
    """Hold the policy (actor) and its value function (critic): a linear head on the policy's last
    hidden states or, with `separate_value_model`, on those of a copy of the policy. The head starts
    at zero, and without a value loss (vf_coef 0) it stays there. The policy acts at `temperature`
    and ends no response before it has `min_response_length` tokens."""

    def __init__(self, policy, temperature=1.0, separate_value_model=False, min_response_length=0):
        super().__init__()
        self.policy = policy
        self.temperature = temperature
        self.min_response_length = min_response_length
        self.value = nn.ModuleDict()  # one module, because it has a learning rate of its own
        if separate_value_model:
            transformer = without_adapter(policy).base_model  # without the output layer
            self.value["model"] = copy.deepcopy(transformer)
        width = policy.get_output_embeddings().weight.shape[-1]
        self.value["head"] = nn.Linear(width, 1, device=policy.device)
        nn.init.zeros_(self.value["head"].weight)
        nn.init.zeros_(self.value["head"].bias)

    def forward(self, batch, with_entropy=False, with_values=True):
        """Compute log-probabilities, values and entropies of the responses, (batch, response) each,
        0 where the mask is False. Entropies and values are 0 unless asked for."""
        # The log-probabilities of generate() are not used. They are computed token by token and
        # differ from those of a whole pass, in bfloat16 visibly, so the first ratio would not be 1.
        responses = batch["responses"]
        mask = batch["mask"]
        length = responses.shape[1]
        inputs = response_inputs(self.policy, batch["input_ids"], batch["attention_mask"], responses)
        # logits[:, t] and hidden[:, t] are those from which token t of the response is predicted.
        logits, hidden = logits_and_states(self.policy, inputs, length)
        if self.temperature != 1:
            logits = logits / self.temperature
        forbid(logits, self.policy, self.min_response_length)
        all_logprobs = logits.log_softmax(-1)  # (batch, response, vocab)
        logprobs = all_logprobs.gather(-1, responses.unsqueeze(-1)).squeeze(-1)  # (batch, response)
        entropy = torch.zeros_like(logprobs)
        if with_entropy:  # H = - sum_a pi(a) log pi(a)
            entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
        values = torch.zeros_like(logprobs)
        if with_values:
            if "model" in self.value:
                with recomputed_layers(self.value):
                    states = self.value["model"](**inputs, use_cache=False).last_hidden_state
                hidden = states[:, -length:]  # (batch, response, width)
            values = self.value["head"](hidden.float()).squeeze(-1)
        return tuple(torch.where(mask, x, 0.0) for x in (logprobs, values, entropy))


def without_adapter(policy):
    """Return the model itself or, if it has a PEFT adapter, the model that has been adapted."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


@torch.no_grad()
def score_responses(model, batch, parts=1, with_values=True):
    """Compute the responses' log-probabilities and values, (batch, response) each, without
    gradients. The rows go in `parts` parts, to save memory."""
    logprobs = []
    values = []
    for rows in torch.arange(len(batch["mask"])).chunk(parts):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        part_logprobs, part_values, _ = model(part, with_values=with_values)
        logprobs.append(part_logprobs)
        values.append(part_values)
    return torch.cat(logprobs), torch.cat(values)


def reference_logprobs(model, elastic, weights, batch, *, parts=1):
    """Compute the log-probabilities, (batch, response), that the responses would have if the policy
    had other weights: elastic.init or elastic.ema. ElasticReset keeps these anyway, so no second
    model is needed."""
    with elastic.holding(weights):
        logprobs, _ = score_responses(model, batch, parts, with_values=False)
    return logprobs


@torch.no_grad()
def forbid(logits, policy, min_response_length=0, position=0):
    """Set to -1e9, in place, the logits of tokens that are never sampled: padding, EOS among the
    first `min_response_length` tokens of a response, and all but the first token that a translator
    is forced to begin with, its language's. logits: (batch, n, vocab), for n tokens of the response
    from number `position` on. Sampling and scoring both ask this function."""
    # No gradient is lost by that: a forbidden token is never one that is scored.
    ids = token_ids(policy)
    if ids["pad_token_id"] not in ids["eos_token_id"]:  # some models pad with their EOS
        logits[..., ids["pad_token_id"]] = -1e9
    logits[:, : max(0, min_response_length - position), ids["eos_token_id"]] = -1e9
    forced = ids.get("forced_bos_token_id")
    if forced is not None and position == 0:
        logits[:, 0] = -1e9
        logits[:, 0, forced] = 0


def token_ids(policy):
    """Return the ids that condition a model's text, which are those of its generation config, as in
    its own generate(). ValueError if one has no number."""
    own = policy.generation_config
    eos = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    pad = eos[0] if own.pad_token_id is None else own.pad_token_id
    ids = dict(eos_token_id=eos, pad_token_id=pad)
    if policy.config.is_encoder_decoder:
        start = own.decoder_start_token_id
        ids["decoder_start_token_id"] = own.bos_token_id if start is None else start
    if eos[0] is None or None in ids.values():
        raise ValueError(f"model.generation_config names {ids}; expected numbers")
    if policy.config.is_encoder_decoder:
        ids["forced_bos_token_id"] = own.forced_bos_token_id  # of the language to translate into
    return ids


@contextlib.contextmanager
def plain_generation(policy, response_length):
    """Replace the model's own settings for generate() (beams, penalties, top-p) by greedy ones.
    Yields those. At the end the model has its own again."""
    from transformers import GenerationConfig

    plain = GenerationConfig(**token_ids(policy), max_new_tokens=response_length, do_sample=False)
    base = without_adapter(policy)  # PEFT's generate() changes it, too
    own = policy.generation_config
    base_own = base.generation_config
    policy.generation_config = plain
    base.generation_config = plain
    try:
        yield plain
    finally:
        policy.generation_config = own
        base.generation_config = base_own


@torch.no_grad()
def respond(
    policy, tokenizer, prompts, *, response_length, temperature=1.0, min_response_length=0,
    max_length=None, rows=None, drawn_logprobs=None,
):  # fmt: skip
    """Sample one response for each prompt. Temperature 0 takes the most probable tokens. With
    several processes, each samples for its own `rows`, a slice. An encoder's prompts are cut to
    max_length. `drawn_logprobs`: a list to which log-probabilities (batch,) are added, token by
    token.

    Returns (batch, texts). The batch has input_ids and attention_mask, (batch, prompt), responses
    and mask, (batch, response). Raises ValueError for prompts that are empty or too long for the
    model."""
    is_decoder = not policy.config.is_encoder_decoder
    rows = rows or slice(None)
    batch = tokenize_prompts(policy, tokenizer, prompts, response_length, max_length=max_length)
    batch = {name: tensor[rows] for name, tensor in batch.items()}
    # All processes draw the same numbers for all rows and keep their own, so that several do what
    # one does.
    uniform = torch.rand(response_length, len(prompts), 1, device=policy.device)[:, rows]
    prompt_tokens = batch["input_ids"] if is_decoder else batch["input_ids"][:, :0]
    first = prompt_tokens.shape[1] if is_decoder else 1  # of the columns where the response stands

    # generate() is greedy. To sample, it gets scores in which the token that we have drawn is the
    # largest.
    def choose_next(tokens, logits):  # (batch, so far), (batch, vocab)
        position = tokens.shape[1] - first
        forbid(logits.unsqueeze(1), policy, min_response_length, position)
        if temperature == 0:
            return logits
        drawn = draw_tokens(logits / temperature, uniform[position])
        if drawn_logprobs is not None:
            drawn_logprobs.append(gather_logprobs(logits, drawn.squeeze(1)))
        return torch.zeros_like(logits).scatter_(1, drawn, 1.0)

    with plain_generation(policy, response_length) as plain:
        tokens = policy.generate(**batch, generation_config=plain, logits_processor=[choose_next])
    responses = tokens[:, first:]  # (batch, response)
    eos = torch.tensor(token_ids(policy)["eos_token_id"], device=policy.device)
    eos_count = torch.isin(responses, eos).cumsum(1)  # up to and including each token
    mask = F.pad(eos_count, (1, 0))[:, :-1] == 0  # True while no EOS came before
    batch.update(responses=responses, mask=mask)
    real = [response[kept] for response, kept in zip(responses, mask, strict=True)]
    return batch, response_texts(tokenizer, prompt_tokens, real)


def tokenize_prompts(policy, tokenizer, prompts, response_length, *, max_length):
    """Return input_ids and attention_mask of the prompts, (batch, prompt) each."""
    if policy.config.is_encoder_decoder:
        return padded(policy, source_tokens(policy, tokenizer, prompts, max_length))
    # A decoder goes on behind its prompt, so padding stands on the left, and nothing is cut off.
    batch = padded(policy, source_tokens(policy, tokenizer, prompts), side="left")
    lengths = batch["attention_mask"].sum(1)
    longest = max_positions(policy) - response_length
    if lengths.min() < 1 or lengths.max() > longest:
        found = f"{lengths.min()} to {lengths.max()}"
        raise ValueError(f"prompts have {found} tokens; expected 1 to {longest}")
    return batch


def draw_tokens(logits, uniform):
    """Draw one token, (batch, 1), from each row of logits (batch, vocab): the first at which the
    cumulative probability exceeds the random number in `uniform` (batch, 1). This is much faster
    than torch.multinomial over a large vocabulary."""
    cumulative = logits.float().softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]  # not exactly 1 in float32
    tokens = torch.searchsorted(cumulative, uniform * total, right=True)
    return tokens.clamp(max=logits.shape[1] - 1)


def response_texts(tokenizer, prompt_tokens, responses):
    """Decode the responses. Some tokenizers drop a first space, so a response is decoded together
    with its prompt, which is then cut off. If the prompt's own text changes by that, it is decoded
    alone."""
    together = [torch.cat(pair) for pair in zip(prompt_tokens, responses, strict=True)]
    prompts = tokenizer.batch_decode(prompt_tokens, skip_special_tokens=True)
    texts = tokenizer.batch_decode(together, skip_special_tokens=True)
    for i, prompt in enumerate(prompts):
        if texts[i].startswith(prompt):
            texts[i] = texts[i][len(prompt) :]
        else:
            texts[i] = tokenizer.decode(responses[i], skip_special_tokens=True)
    return texts


def response_inputs(policy, input_ids, attention_mask, responses):
    """Make the model's inputs to score responses behind their prompts."""
    if policy.config.is_encoder_decoder:
        start = torch.full_like(responses[:, :1], token_ids(policy)["decoder_start_token_id"])
        shifted = torch.cat([start, responses[:, :-1]], 1)  # a token is predicted from those before
        return dict(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=shifted)
    together = torch.cat([input_ids, responses], 1)
    # 1 also on padding behind EOS: no token where the mask is True looks at that.
    attention_mask = F.pad(attention_mask, (0, responses.shape[1]), value=1)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # 0 up to the first real token
    return dict(
        input_ids=together[:, :-1],  # the last token predicts nothing
        attention_mask=attention_mask[:, :-1],
        position_ids=positions[:, :-1],
    )


def logits_and_states(policy, inputs, n):
    """Compute the logits (batch, n, vocab), in float32, at the last n positions and the last hidden
    states (batch, n, width) that they are computed from."""
    kept = []

    def keep_last(output_layer, arguments):  # logits of the prompts would take much memory
        if arguments[0].ndim != 3:
            raise ValueError(f"{type(policy).__name__} predicts several tokens at once, not one")
        kept.append(arguments[0][:, -n:])
        return kept[0]

    with recomputed_layers(policy), policy.get_output_embeddings().register_forward_pre_hook(keep_last):
        logits = policy(**inputs, use_cache=False).logits
    return logits.float(), kept[0]


@contextlib.contextmanager
def recomputed_layers(model):
    """Let layers with gradient checkpointing be computed again in the backward pass. transformers
    does that in training mode alone, where there would be dropout, too."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    forwards = {}
    layers = model.modules() if torch.is_grad_enabled() else []  # else there is no backward pass
    for layer in layers:
        can_recompute = isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
        if can_recompute and not layer.training:
            forwards[layer] = layer.forward
            layer.forward = functools.partial(recomputed, layer, layer.forward)
    try:
        yield
    finally:
        for layer, forward in forwards.items():
            layer.forward = forward


def recomputed(layer, forward, *arguments, **named):
    return layer._gradient_checkpointing_func(functools.partial(forward, **named), *arguments)


def response_logprobs(policy, inputs, responses):
    """Compute the log-probabilities of responses, (batch, response), at temperature 1."""
    logits, _ = logits_and_states(policy, inputs, responses.shape[1])
    forbid(logits, policy)
    return gather_logprobs(logits, responses)


def target_logprobs(model, tokenizer, sources, targets, max_length):
    """Compute log p(target token | source, tokens before), 0 where padded, and the mask: (batch,
    target) each. For a decoder no EOS is added, so a target's text must end with it."""
    is_decoder = not model.config.is_encoder_decoder
    tokens_of = continuation_tokens if is_decoder else translation_tokens
    source = source_tokens(model, tokenizer, sources, max_length)
    source = padded(model, source, "left" if is_decoder else "right")
    target = padded(model, tokens_of(model, tokenizer, sources, targets, max_length))
    mask = target["attention_mask"].bool()
    inputs = response_inputs(model, **source, responses=target["input_ids"])
    logprobs = response_logprobs(model, inputs, target["input_ids"])
    return torch.where(mask, logprobs, 0.0), mask


@torch.no_grad()
def mean_logprobs(model, tokenizer, sources, targets, max_length):
    """Return the mean log-likelihood per token of each target, a list."""
    means = []
    for some_sources, some_targets in chunks(sources, targets):
        logprobs, mask = target_logprobs(model, tokenizer, some_sources, some_targets, max_length)
        means += (logprobs.sum(1) / mask.sum(1)).tolist()
    return means


@torch.no_grad()
def mean_nll(model, tokenizer, sources, targets, max_length):
    """Return the mean negative log-likelihood per token of all targets. If there is no token, that
    is log(vocabulary size), a uniform guess's."""
    total = 0.0
    tokens = 0
    for some_sources, some_targets in chunks(sources, targets, size=32):  # long texts' logits are large
        logprobs, mask = target_logprobs(model, tokenizer, some_sources, some_targets, max_length)
        total += logprobs.sum().item()
        tokens += mask.sum().item()
    return -total / tokens if tokens else math.log(len(tokenizer))


def class_logits(model, tokenizer, texts, max_length):
    """Compute a classifier's logits of texts, (batch, labels). Many a classifier reads a text at
    its last token that is not padding."""
    own_pad = getattr(model.config, "pad_token_id", None)
    ends_twice = [tokenizer.eos_token_id] * 2  # the text's own EOS and the tokenizer's
    logits = []
    for (some_texts,) in chunks(texts):
        tokens = tokenizer(some_texts, truncation=True, max_length=max_length)["input_ids"]
        tokens = [ids[:-1] if ids[-2:] == ends_twice else ids for ids in tokens]
        pad = own_pad
        if own_pad is None:  # an id that no text ends in
            ends = itertools.chain.from_iterable(ids[-1:] for ids in tokens)
            pad = min(set(range(len(tokens) + 1)).difference(ends))
        model.config.pad_token_id = pad
        try:
            logits.append(model(**padded(model, tokens, pad=pad)).logits.float())
        finally:
            model.config.pad_token_id = own_pad
    return torch.cat(logits)


def source_tokens(model, tokenizer, texts, max_length=None):
    """Tokenize prompts. Returns lists of ids. What a tokenizer puts behind a text, as an EOS, is
    dropped if a decoder is to go on there."""
    tokens = tokenizer(
        texts, truncation=bool(max_length), max_length=max_length, return_special_tokens_mask=True
    )
    rows = tokens["input_ids"]
    for ids, is_added in zip(rows, tokens["special_tokens_mask"], strict=True):
        if not model.config.is_encoder_decoder and len(ids) > 1 and is_added[-1]:
            ids.pop()
    return rows


def translation_tokens(model, tokenizer, sources, targets, max_length):
    """Tokenize an encoder-decoder's targets. Returns lists of ids, which begin with the token that
    the model is forced to begin with, if there is one."""
    tokens = tokenizer(
        text_target=targets, truncation=True, max_length=max_length, return_special_tokens_mask=True
    )
    rows = tokens["input_ids"]
    forced = token_ids(model)["forced_bos_token_id"]
    if forced is not None:
        for ids, is_added in zip(rows, tokens["special_tokens_mask"], strict=True):
            begins = len(ids) > 1 and is_added[0]  # with this tokenizer's language, or BOS
            ids[:] = [forced, *ids[begins:]][:max_length]
    return rows


def continuation_tokens(model, tokenizer, sources, targets, max_length):
    """Tokenize a decoder's targets. Returns lists of ids: those behind the source in both texts
    together or, where these begin with other tokens than the source, the target's alone."""
    before = source_tokens(model, tokenizer, sources)
    together = source_tokens(model, tokenizer, joined(sources, targets))
    rows = []
    for source, both, target in zip(before, together, targets, strict=True):
        if both[: len(source)] == source:
            ids = both[len(source) :]
        else:
            ids = tokenizer(target, add_special_tokens=False)["input_ids"]
        rows.append(ids[:max_length])
    return rows


def padded(model, rows, side="right", pad=None):
    """Fill up lists of ids, by the model's padding unless `pad` is given. Returns input_ids and
    attention_mask, (batch, longest row) each."""
    if pad is None:
        pad = token_ids(model)["pad_token_id"]
    ids = [torch.tensor(row, dtype=torch.long, device=model.device) for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    pad_sequence = nn.utils.rnn.pad_sequence
    return dict(
        input_ids=pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=side),
        attention_mask=pad_sequence(ones, batch_first=True, padding_side=side),
    )


def joined(prompts, responses):
    return [prompt + response for prompt, response in zip(prompts, responses, strict=True)]


def ended(tokenizer, texts):
    """Put the tokenizer's EOS, if it has one, behind each text."""
    return [text + (tokenizer.eos_token or "") for text in texts]


def chunks(*lists, size=128):
    """Yield slices, `size` long, of parallel lists."""
    for i in range(0, len(lists[0]), size):
        yield tuple(items[i : i + size] for items in lists)


def max_positions(model):
    """Return how many tokens a model takes at most; many have no limit, or say -1."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if limit and limit > 0 else math.inf


# ========================================== 5. Training ===========================================
# A Run (section 10) has a run's folder, log, checkpoints and processes, and the current KL
# coefficient. On one process run.share is everything, and run.gathered() and
# run.mean_over_processes() change nothing.


def train(config: Config, task: "Task | None" = None) -> dict:
    """Train, and write the run's files. `task` is your own, or None for the one of config.task.
    Returns {"start": metrics, "end": metrics, "history": list of metrics, "output_dir": folder}.
    Raises ValueError for what cannot be used, FloatingPointError when a reward, a loss or a
    gradient is not finite, KeyboardInterrupt (after a checkpoint) when asked to stop."""
    if task is None and config.task not in TASKS:
        raise ValueError(f"--task is {config.task}; expected {', '.join(TASKS)} or your own task")
    run = Run(config)
    task = task or TASKS[config.task](config)
    run.borrow(task.policy)
    check_sampling(task, config)
    model, optimizer = prepare_policy(task.policy, config, run.accelerator)  # with task.policy in it
    elastic = ElasticReset(model.policy, **config.averaging)
    reference = elastic.ema if config.kl_reference == "ema" else elastic.init
    parts = config.gradient_accumulation_steps
    run.begin(task, model, optimizer, elastic)
    if run.update in (0, config.updates) and not run.is_evaluated():
        run.log(evaluate(task, model, elastic, config))

    for update in run.updates():
        # What torch draws follows from the update's number, so a resumed run repeats it exactly.
        torch.manual_seed((config.seed * 1_000_003 + update) % (2**32 - 1))

        # 1. Sample a response to each prompt
        prompts = prompts_of(task, update, config)  # they, too, follow from the update's number
        batch, texts = respond(task.policy, task.tokenizer, prompts, rows=run.share, **config.sampling)
        prompts = prompts[run.share]  # each process goes on with its own rows
        orders = [torch.randperm(config.batch_size) for _ in range(config.num_ppo_epochs)]

        # 2. Score: a reward for each response, a KL penalty for each of its tokens
        batch["scores"] = scores_of(task, prompts, texts).to(model.policy.device)  # (batch,)
        batch["logprobs"], batch["values"] = score_responses(model, batch, parts)  # (batch, response)
        batch["ref_logprobs"] = batch["logprobs"]  # no penalty: nothing to measure from
        if run.kl_coef:
            batch["ref_logprobs"] = reference_logprobs(model, elastic, reference, batch, parts=parts)
        batch = run.gathered(batch)  # from here on each process has all rows
        scores, mask = batch["scores"], batch["mask"]
        logprobs, ref_logprobs = batch["logprobs"], batch["ref_logprobs"]
        rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=run.kl_coef)
        stats = dict(train_reward=scores.mean(), entropy=-masked_mean(logprobs, mask))
        if run.kl_coef:
            stats.update(train_kl=(logprobs - ref_logprobs).sum(1).mean(), kl_coef=run.kl_coef)
        stats = run.mean_over_processes(stats)

        # 3. Advantages, (batch, response), whitened over the whole batch
        advantages, returns = gae(rewards, batch["values"], mask, config.gamma, lam=config.lam)
        batch.update(advantages=whiten(advantages, mask), returns=returns)

        # 4. PPO epochs over minibatches
        for order in orders:
            epoch_kl = []
            for rows in order.split(config.mini_batch_size or config.batch_size):
                own_rows = rows[run.share]  # this process's part
                minibatch = {name: tensor[own_rows] for name, tensor in batch.items()}
                losses = ppo_backward(model, minibatch, config, run.accelerator)  # fills each p.grad
                if hasattr(task, "backward"):
                    losses.update(task.backward(len(rows)))  # adds to it; the rows of all processes
                losses.update(optimizer_step(model, optimizer, config, run.accelerator))
                stats.update(run.mean_over_processes(losses))  # the last minibatch's are logged
                epoch_kl.append(stats["policy_kl"])
            if config.ema_update == "epoch":
                elastic.update()
            if config.early_stop_kl and sum(epoch_kl) / len(epoch_kl) > config.early_stop_kl:
                break
        if hasattr(task, "learn"):  # in the translation game, the receiver learns
            stats.update(run.mean_over_processes(task.learn(prompts, texts) or {}))
        run.adapt_kl_coef(stats)

        # 5. EMA <- decay * EMA + (1 - decay) * policy
        if config.ema_update == "update":
            elastic.update()

        # 6. Reset: policy <- EMA, EMA <- start. (elastic.step() does 5 and 6 in other loops.)
        reset_is_due = elastic.is_due(update)
        if reset_is_due:
            run.log(evaluate(task, model, elastic, config), "before reset", stats)
            elastic.reset()

        # 7. Evaluate and log
        if reset_is_due or update % config.eval_every == 0 or update == config.updates:
            event = "after reset" if reset_is_due else ""
            run.log(evaluate(task, model, elastic, config), event, stats)
        run.save_if_due()

    return run.finish(task)


def prepare_policy(policy, config, accelerator):
    """Return the policy with its value function, an ActorCritic, and the optimizer of both."""
    policy.eval()  # no dropout
    token_ids(policy)  # raises ValueError if the policy cannot be sampled from
    separate = config.separate_value_model
    model = ActorCritic(policy, config.temperature, separate, config.min_response_length)
    # evaluation_mode keeps accelerate from wrapping it in DDP, which would hide model.policy.
    model = accelerator.prepare_model(model, evaluation_mode=True)
    value_rate = config.value_learning_rate or config.learning_rate
    optimizer = adamw((model.policy, config.learning_rate), (model.value, value_rate))
    return model, accelerator.prepare_optimizer(optimizer)


@torch.no_grad()
def check_sampling(task, config):
    """Raise ValueError unless a response's log-probabilities are the same when it is drawn, when it
    is scored beside a longer prompt and when the policy is given it alone, without padding."""
    torch.manual_seed(0)
    policy = task.policy
    texts = sorted(task.validation_prompts, key=len)
    drawn = []
    batch, _ = respond(
        policy,
        task.tokenizer,
        [texts[0], texts[-1]],
        response_length=min(16, config.response_length),
        max_length=config.max_length,
        drawn_logprobs=drawn,
    )
    ids = batch["input_ids"]
    attention = batch["attention_mask"]
    responses = batch["responses"]
    inputs = response_inputs(policy, ids, attention, responses)
    ways = dict(drawn=torch.stack(drawn, 1), scored=response_logprobs(policy, inputs, responses))
    alone = []
    for row, is_real, response in zip(ids, attention, responses.split(1), strict=True):
        row = row[is_real.bool()].unsqueeze(0)
        inputs = response_inputs(policy, row, torch.ones_like(row), response)
        for name in ("attention_mask", "position_ids"):  # the model has its own way without them
            inputs.pop(name, None)
        alone.append(response_logprobs(policy, inputs, response))
    for how, logprobs in ways.items():
        difference = masked_mean((logprobs - torch.cat(alone)).abs(), batch["mask"]).item()
        if not difference <= torch.finfo(policy.dtype).eps ** (1 / 3):  # float32 0.005, bfloat16 0.2
            raise ValueError(
                f"{type(policy).__name__} cannot be trained: log-probabilities of tokens {how} beside a "
                f"longer prompt are off by {difference:.2g} from the model's alone; likely causes: PEFT's "
                "prompt learning, no padding on the left, positions that do not begin at 0"
            )


def adamw(*groups):
    """Make AdamW without weight decay, for (module, learning rate) pairs."""
    param_groups = []
    for module, learning_rate in groups:
        trainable = [p for p in module.parameters() if p.requires_grad]
        param_groups.append(dict(params=trainable, lr=learning_rate))
    return torch.optim.AdamW(param_groups, weight_decay=0.0, fused=True)


def prompts_of(task, update, config):
    """Return the prompts of an update, batch_size texts."""
    prompts = list(task.prompts(config.batch_size, update))
    if len(prompts) != config.batch_size:
        raise ValueError(f"prompts() gave {len(prompts)}; expected {config.batch_size} (batch_size)")
    return prompts


def scores_of(task, prompts, responses):
    """Ask the task for the reward of each response. Returns a tensor (batch,)."""
    rewards = task.reward(prompts, responses)
    try:
        return torch.as_tensor(rewards, dtype=torch.float32).detach().reshape(len(prompts))
    except (TypeError, ValueError, RuntimeError) as error:
        expected = f"expected {len(prompts)} numbers, one for each response"
        raise ValueError(f"reward() gave something else: {error}; {expected}") from error


def ppo_backward(model, minibatch, config, accelerator):
    """Fill each p.grad with the gradient of ppo_loss, in `gradient_accumulation_steps` parts.
    Returns the numbers to log."""
    clips = dict(cliprange=config.cliprange, cliprange_value=config.cliprange_value)
    weights = dict(vf_coef=config.vf_coef, entropy_coef=config.entropy_coef)
    n_tokens = accelerator.reduce(minibatch["mask"].sum().float(), "mean")  # the processes' mean
    stats = {}
    for rows in torch.arange(len(minibatch["mask"])).chunk(config.gradient_accumulation_steps):
        part = {name: tensor[rows] for name, tensor in minibatch.items()}
        share = part["mask"].sum() / n_tokens  # so that the parts add up to the whole's gradient
        logprobs, values, entropy = model(part, with_entropy=config.entropy_coef > 0)
        loss, part_stats = ppo_loss(logprobs, values, entropy, part, **clips, **weights)
        accelerator.backward(loss * share)
        for name, value in part_stats.items():
            stats[name] = stats.get(name, 0.0) + value * share.item()
    return stats


def optimizer_step(module, optimizer, config, accelerator):
    """Step along the gradient averaged over the processes. Returns the gradient's norm, to be
    logged."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        if p.grad is None:  # it had no part in the loss; every process must reduce the same tensors
            p.grad = torch.zeros_like(p)
        p.grad = accelerator.reduce(p.grad, "mean")
    norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return dict(gradient=norm.item())


@torch.no_grad()
def evaluate(task, model, elastic, config) -> dict:
    """Return the task's metrics and `kl`, the KL to the start in nats per response. The seed is
    always the same, so evaluations can be compared, and every process gets the same numbers.
    Training sets its own seed in each update."""
    torch.manual_seed(0)
    parts = config.gradient_accumulation_steps
    responses = []
    kl = []
    for (prompts,) in chunks(task.validation_prompts):
        batch, texts = respond(task.policy, task.tokenizer, prompts, **config.sampling)
        logprobs, _ = score_responses(model, batch, parts, with_values=False)
        start_logprobs = reference_logprobs(model, elastic, elastic.init, batch, parts=parts)
        kl.append((logprobs - start_logprobs).sum(1))  # (prompts,)
        responses += texts
    metrics = task.evaluate(responses)
    if not ("reward" in metrics and "drift" in metrics):
        raise ValueError(f"evaluate() gave {', '.join(metrics)}; expected reward, drift and others")
    return metrics | dict(kl=torch.cat(kl).mean().item())


# ==================================== 6. The translation game =====================================


class Task(Protocol):
    """Say what train() needs of a task. Write your own and call train(config, task=MyTask(config)),
    or put its class into TASKS, with the settings that differ from Config's defaults as its
    `preset`, a dict.

    Optional methods return numbers to log, {name: number}:
        learn(prompts, responses)   called in every update, after the policy's steps, with the rows of
                                    this process
        backward(n)                 called in every minibatch of n responses, to add to the policy's
                                    gradients, which are averaged over the processes afterwards
    Optional attributes:
        trained        {name: module or optimizer}: what else learns, for the checkpoints
        saved_models   {name: (model, tokenizer)}: saved at the end, together with the policy
        footnote       a text that is printed at the end"""

    policy: nn.Module  # a transformers model with generate()
    tokenizer: object
    validation_prompts: list[str]

    def prompts(self, n: int, update: int) -> list[str]:
        """Return the n prompts of an update. They must follow from the arguments alone, because a
        resumed run has to see the same data."""

    def reward(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Return one finite number for each response."""

    def evaluate(self, responses: list[str]) -> dict:
        """Return numbers: `reward`, `drift` and others. `responses`: one for each validation
        prompt, always sampled from the same seed. `samples`, {column: list of texts}, goes to
        samples.md."""


# ---- what tasks share: rows of data, in a random order


def name_and_split(spec):
    """Divide "DIR:train[:9000]" into "DIR" and "train[:9000]", which may be None."""
    return re.fullmatch(r"(.*?)(?::(\w+(?:\[[^\]]*\])?))?", spec, re.DOTALL).groups()


def load_rows(spec, columns):
    """Load rows {column: text} of a hub dataset or of a local folder of JSONL, CSV or Parquet,
    "DIR" or "DIR:train[:9000]". A column `translation: {..}` is unpacked. Raises ValueError for
    what cannot be read, and for a row that lacks one of `columns`, names divided by blanks."""
    from datasets import disable_progress_bar, load_dataset, logging

    disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said below, in one line
    name, split = name_and_split(spec)
    source = dict(path="parquet", data_files=name) if name.startswith("hf://") else dict(path=name)
    try:
        rows = load_dataset(**source, split=split or "train").to_list() or [{}]  # without any column
        suffixes = {file.suffix for file in Path(name).rglob("*")}
        kinds = sorted(suffixes & {".csv", ".jsonl", ".parquet"})
        if len(kinds) > 1 or (".csv" in kinds and "__index_level_0__" in rows[0]):
            raise ValueError(f"it holds {' and '.join(kinds)} files, or columns without a name")
    except Exception as error:  # there is no end to what may be wrong with files
        why = str(error.__cause__ or error) or "it holds no rows"
        raise ValueError(f"data {spec} cannot be read: {why}") from error
    rows = [row["translation"] if isinstance(row.get("translation"), dict) else row for row in rows]
    for number, row in enumerate(rows, 1):
        for column in columns.split():
            check_cell(row, column, f"data {spec}, row {number}")
    return rows


def check_cell(row, column, place):
    """Raise ValueError unless the row has a text in this column or, in `label`, 0 or 1."""
    value = row.get(column)
    expected = "text"
    fits = isinstance(value, str) and value.strip()
    if column == "label":
        expected = "0 or 1"
        fits = str(value) in ("0", "1")
    if not fits:
        columns = ", ".join(row)
        raise ValueError(
            f"{place}: {column} is {value!r:.40}; expected {expected}; the columns are {columns}"
        )


def train_and_held_out(config, columns):
    """Load the rows of --data, and those to evaluate on: of --validation_data or of the data's own
    split."""
    held_out = config.validation_data or f"{name_and_split(config.data)[0]}:validation"
    return load_rows(config.data, columns), load_rows(held_out, columns)


def shuffled(items, n, update, seed):
    """Return the n items of an update, which counts from 1: `items` are gone through again and
    again, each time in a new order."""
    chosen = []
    for place in range((update - 1) * n, update * n):
        number, i = divmod(place, len(items))  # the pass through the items, and the place in it
        order = random_order(len(items), seed, number)
        chosen.append(items[order[i]])
    return chosen


@functools.lru_cache(maxsize=4)
def random_order(n, seed, number):
    return random.Random(f"{seed} {number}").sample(range(n), n)


def mixed(rows):
    """Return the rows in another order, always the same: some data come sorted by label."""
    return random.Random(0).sample(rows, len(rows))


@functools.cache
def table(text, separator=None):
    """Return the rows of a text, divided by line ends or slashes, as lists of cells, divided by
    `separator` or blanks."""
    return [[c.strip() for c in row.split(separator)] for row in re.split(r"\n| / ", text)]


# ---- the game


class TranslationGame:
    """Play the game FR -> EN -> DE (Lee et al. 2019; the paper's section 4). The sender, our
    policy, translates French into English. The receiver translates that into German. The sender's
    reward is the receiver's mean log-likelihood per token of the German reference, and the receiver
    learns that reference. Nobody checks the English between them, so it drifts.

    `drift` is how improbable human English is for the sender: its negative log-likelihood per
    token. In the embedded game it is measured on sentences whose words the start already translates
    correctly, so it can only get worse."""

    preset = dict(
        updates=400, batch_size=16, mini_batch_size=16, eval_every=50,
        reset_every=100, ema_decay=0.9949, kl_coef=0.0,  # 0.6 of a reset is the start
    )  # fmt: skip
    preset_without_resets = dict(kl_coef=0.03)  # the best coefficient of a penalty alone

    def __init__(self, config: Config):
        self.config = config
        data = translation_data(config)
        self.sender_pairs = data["sender"]
        self.validation = data["validation"][: config.eval_size]
        self.known = data.get("known", data["validation"])[: config.eval_size]
        self.validation_prompts = [row["fr"] for row in self.validation]
        self.german = {}  # the reference of each French sentence, the first if there are several
        for row in data["train"]:
            self.german.setdefault(row["fr"], row["de"])
        self.french = list(self.german)
        self.policy, self.tokenizer = self.translator("sender", config.model, data)
        self.receiver, self.receiver_tokenizer = self.translator("receiver", config.receiver_model, data)
        self.accelerator = processes()
        optimizer = adamw((self.receiver, config.receiver_learning_rate))
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.trained = dict(receiver=self.receiver, receiver_optimizer=self.optimizer)
        self.saved_models = dict(receiver=(self.receiver, self.receiver_tokenizer))
        self.footnote = f"BLEU: {bleu(['a'], ['a'])[1]}"

    def translator(self, role, name, data):
        """Return the sender or the receiver with its tokenizer, loaded by name or trained on the
        pairs of its role."""
        config = self.config
        if not name:
            name = pretrained(
                role,
                "Seq2SeqLM",
                data[role],
                likelihood_loss,
                family="marian",
                texts=data["texts"],
                updates=config.pretrain_updates,
                config=config,
            )
        return load_model(role, name, "Seq2SeqLM", config, longest=config.max_length)

    def prompts(self, n, update):
        return shuffled(self.french, n, update, self.config.seed)

    def reward(self, prompts, responses):
        german = [self.german[french] for french in prompts]
        longest = self.config.max_length
        return mean_logprobs(self.receiver, self.receiver_tokenizer, responses, german, longest)

    def learn(self, prompts, responses):
        """Take one step of the receiver towards the German reference of this batch's English."""
        german = [self.german[french] for french in prompts]
        longest = self.config.max_length
        logprobs, mask = target_logprobs(
            self.receiver, self.receiver_tokenizer, responses, german, longest
        )  # (batch, target) each
        tokens = self.accelerator.reduce(mask.sum().float(), "mean")  # the processes' mean
        loss = -logprobs.sum() / tokens
        self.accelerator.backward(loss)
        stats = optimizer_step(self.receiver, self.optimizer, self.config, self.accelerator)
        return dict(receiver_loss=loss.item(), receiver_gradient=stats["gradient"])

    def evaluate(self, responses):
        """Measure greedy translations. Only `kl` is about the sampled responses."""
        longest = self.config.max_length
        length = self.config.response_length
        french = self.validation_prompts
        human_english = [row["en"] for row in self.validation]
        human_german = [row["de"] for row in self.validation]
        english = translate(self.policy, self.tokenizer, french, longest, response_length=length)
        german = translate(self.receiver, self.receiver_tokenizer, english, longest, response_length=longest)
        rewards = mean_logprobs(self.receiver, self.receiver_tokenizer, english, human_german, longest)
        known_french = [row["fr"] for row in self.known]
        known_english = [row["en"] for row in self.known]
        samples = {"French": french, "human English": human_english, "human German": human_german}
        return dict(
            reward=sum(rewards) / len(rewards),
            drift=mean_nll(self.policy, self.tokenizer, known_french, known_english, longest),
            bleu_de=bleu(german, human_german)[0],
            bleu_en=bleu(english, human_english)[0],
            samples=samples | {"English": english, "German": german},
        )


def translate(model, tokenizer, texts, max_length, *, response_length):
    """Translate greedily. Returns a list of texts."""
    translations = []
    for (some_texts,) in chunks(texts):
        _, responses = respond(
            model,
            tokenizer,
            some_texts,
            response_length=response_length,
            temperature=0,
            max_length=max_length,
        )
        translations += responses
    return translations


def bleu(translations, references):
    """Compute corpus BLEU, 0 to 100, and sacrebleu's signature, which says how it was computed."""
    import sacrebleu

    metric = sacrebleu.BLEU()
    score = metric.corpus_score(translations, [references]).score
    return score, str(metric.get_signature())


def translation_data(config):
    """Return train, validation: rows {fr, en, de}. sender, receiver: (source, target) pairs for
    pretraining. texts: all texts of these pairs, for a tokenizer."""
    if not config.data:
        return toy_translations()
    train, validation = train_and_held_out(config, "fr en de")
    sender = []
    for spec in config.sender_data:
        sender += [(row["fr"], row["en"]) for row in load_rows(spec, "fr en")]
    receiver = []
    for spec in config.receiver_data:
        receiver += [(row["en"], row["de"]) for row in load_rows(spec, "en de")]
    texts = list(itertools.chain.from_iterable(sender + receiver))
    return dict(train=train, validation=validation, sender=sender, receiver=receiver, texts=texts)


# ---- its small world
#
# English has no gender where French and German mark it, knows synonyms and puts the time first or
# last. The sender learns from a noisy corpus, as if mined from the web: each use of a word at an
# even place of its list (the second, the fourth ...) is wrong with probability 0.6, being the
# English of the entry before it. The receiver's corpus is clean. So the sender has something to
# gain, the right words, and something to lose, English. Sentences of words that are never wrong,
# which the start knows, measure that loss. An entry: English (synonyms), French, German.

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
GERMAN_A = dict(m="einen", f="eine", n="ein")  # "a", in the accusative
GERMAN_ENDING = dict(m="en", f="e", n="es")  # of a colour behind it


def toy_translations(seed=0):
    """Make translation_data() of the embedded game; no sentence stands in two of its parts.
    `known`: sentences made of the words that the sender's corpus has right."""
    rng = random.Random(seed)
    rows = {}  # by French sentence
    train = new_sentences(rng, rows, 20_000)
    validation = new_sentences(rng, rows, 512)
    receiver = new_sentences(rng, rows, 20_000)
    sender = new_sentences(rng, rows, 20_000, noise=0.6)
    known = new_sentences(rng, rows, 512, every=2)
    return dict(
        train=train,
        validation=validation,
        receiver=[(row["en"], row["de"]) for row in receiver],
        sender=[(row["fr"], row["en"]) for row in sender],
        known=known,
        texts=[text for row in receiver for text in row.values()],
    )


def new_sentences(rng, rows, size, noise=0.0, every=1):
    """Add `size` sentences to `rows`, {French: row}, and return their rows."""
    before = len(rows)
    while len(rows) < before + size:
        row = toy_sentence(rng, noise, every)
        rows.setdefault(row["fr"], row)
    return list(rows.values())[before:]


def toy_sentence(rng, noise, every=1):
    """Make a row, as "la petite voisine voit un chien noir", "die kleine Nachbarin sieht einen
    schwarzen Hund". `every` is 1 for all words of the tables, 2 for those that noise leaves
    alone."""

    def draw(words, noise=0.0):
        """Draw an entry of a table, and the English said for it, which may be that of the entry
        before."""
        entries = table(words)
        i = rng.randrange(0, len(entries), every)
        wrong = i % 2 == 1 and rng.random() < noise  # with every=2 no i is odd
        synonyms = entries[i - 1][0] if wrong else entries[i][0]
        return entries[i], rng.choice(synonyms.split("|"))

    (_, person_fr, person_fr_f, person_de, person_de_f), person = draw(PEOPLE, noise)
    (_, quality_fr, quality_fr_f, quality_de), quality = draw(QUALITIES, noise)
    (_, action_fr, action_de), action = draw(ACTIONS, noise)
    (_, thing_fr, thing_gender_fr, thing_de, thing_gender_de), thing = draw(THINGS, noise)
    (_, color_fr, color_fr_f, color_de), color = draw(COLORS_OF_THINGS, noise)
    (_, place_fr, place_de), place = draw(PLACES)
    (_, moment_fr, moment_de), moment = draw(TIMES)
    french = ["le", quality_fr, person_fr, action_fr]
    german = ["der", quality_de + "e", person_de, action_de]
    if rng.random() < 0.5:
        french = ["la", quality_fr_f, person_fr_f, action_fr]
        german = ["die", quality_de + "e", person_de_f, action_de]
    the = rng.choice(["the", "this"])
    english = [the, quality, person, action, "a", color, thing, place]
    english = english + [moment] if rng.random() < 0.5 else [moment] + english
    french += ["une", thing_fr, color_fr_f] if thing_gender_fr == "f" else ["un", thing_fr, color_fr]
    french += [place_fr, moment_fr]
    german += [moment_de, GERMAN_A[thing_gender_de], color_de + GERMAN_ENDING[thing_gender_de]]
    german += [thing_de, place_de]
    return dict(fr=sentence(french), en=sentence(english), de=sentence(german))


def sentence(words):
    """Join the words; _ is a blank, or nothing if it stands alone."""
    return " ".join(" ".join(words).replace("_", " ").split())


# ======================================== 7. Film reviews =========================================


class MockSentiment:
    """Continue a film review so that a classifier finds it positive (the paper's section 5; RL4LMs'
    IMDB task). `drift` is the perplexity of the continuations under another language model, and
    `human_perplexity` the policy's of what people wrote."""

    preset = dict(
        updates=240, batch_size=16, mini_batch_size=16, num_ppo_epochs=4, eval_size=200,
        reset_every=40, ema_decay=0.95, kl_coef=0.01,
        learning_rate=1e-4, value_learning_rate=3e-3, lam=1.0,
        response_length=32, min_response_length=32, max_length=60,
        layers=2, pretrain_updates=500, pretrain_batch_size=64, reward_updates=500,
    )  # fmt: skip
    preset_without_resets = dict(kl_coef=0.015)

    def __init__(self, config: Config):
        self.config = config
        data = review_data(config)
        reviews = data["train"]
        held_out = data["validation"][: config.eval_size]
        self.gold = data["gold"]
        self.longest = max(config.max_length, config.prompt_length + config.response_length)
        self.policy, self.tokenizer = self.writer("policy", config.model, reviews)
        judge = self.writer("language model", config.language_model, reviews, seed=1)
        self.judge, self.judge_tokenizer = judge
        self.classifier, self.classifier_tokenizer = self.trained_classifier(reviews)
        self.beginnings, _ = self.cut(reviews)
        self.validation_prompts, self.human = self.cut(held_out)
        scores = self.positive([text for text, _ in held_out])
        right = sum((score > 0.5) == label for score, (_, label) in zip(scores, held_out, strict=True))
        self.footnote = f"held out: the classifier's accuracy {right / len(held_out):.3f}"

    def writer(self, role, name, reviews, seed=0):
        """Return a language model and its tokenizer, loaded by name or trained to continue first
        words."""
        config = self.config
        texts = [text for text, _ in reviews]
        pairs = []
        for text in texts:
            first, _, rest = text.partition(" ")
            if rest:
                pairs.append((first, " " + rest))
        if not name:
            name = pretrained(
                role, "CausalLM", pairs, likelihood_loss, family="gpt2", texts=texts, seed=seed,
                updates=config.pretrain_updates, config=config,
            )  # fmt: skip
        return load_model(role, name, "CausalLM", config, longest=2 * config.max_length)

    def trained_classifier(self, reviews):
        """Return the classifier that pays and its tokenizer, loaded by name or trained on
        labels."""
        config = self.config
        kind = "SequenceClassification"
        pairs = [(label, text) for text, label in reviews]
        texts = [text for text, _ in reviews]
        name = config.reward_model
        if not name:
            name = pretrained(
                "classifier", kind, pairs, label_loss, family="gpt2", texts=texts,
                updates=config.reward_updates, config=config,
            )  # fmt: skip
        classifier, tokenizer = load_model("classifier", name, kind, config, longest=self.longest)
        if classifier.config.num_labels != 2:
            raise ValueError(f"reward_model {name!r} must have 2 labels, the second one positive")
        return classifier, tokenizer

    def cut(self, reviews):
        """Return the first prompt_length tokens of each review, as text, and what follows them."""
        texts = [text for text, _ in reviews]
        tokens = self.tokenizer(texts, truncation=True, max_length=self.config.prompt_length)
        decoded = self.tokenizer.batch_decode(tokens["input_ids"], skip_special_tokens=True)
        beginnings = []
        rests = []
        for text, beginning in zip(texts, decoded, strict=True):
            if beginning.strip():
                beginnings.append(beginning)
                rests.append(text[len(beginning) :])
        return beginnings, rests

    def prompts(self, n, update):
        return shuffled(self.beginnings, n, update, self.config.seed)

    def reward(self, prompts, responses):
        return self.positive(joined(prompts, responses))

    @torch.no_grad()
    def positive(self, texts) -> list[float]:
        """Return the classifier's probability that each text is positive."""
        logits = class_logits(self.classifier, self.classifier_tokenizer, texts, self.longest)
        return logits.softmax(-1)[:, 1].tolist()

    def evaluate(self, responses):
        prompts = self.validation_prompts
        rewards = self.reward(prompts, responses)
        longest = self.config.max_length
        nll = mean_nll(self.judge, self.judge_tokenizer, prompts, responses, longest)
        human_nll = mean_nll(self.policy, self.tokenizer, prompts, self.human, longest)
        words = [response.split() for response in responses]
        metrics = dict(
            reward=sum(rewards) / len(rewards),
            drift=math.exp(nll),
            human_perplexity=math.exp(human_nll),
            distinct_1=distinct(words, 1),
            distinct_2=distinct(words, 2),
            words=sum(map(len, words)) / len(words),
        )
        metrics.update(self.gold(prompts, responses))
        return metrics | dict(samples=dict(prompt=prompts, continuation=responses))


def distinct(texts, n):
    """Count different n-grams, as a share of all in `texts`, lists of words."""
    grams = []
    for words in texts:
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def review_data(config):
    """Return train, validation: (text, label) pairs. gold(prompts, responses): metrics of the
    embedded corpus."""
    if not config.data:
        return toy_reviews()
    train, validation = train_and_held_out(config, "text label")
    return dict(train=labelled(train), validation=labelled(validation), gold=lambda prompts, responses: {})


def labelled(rows):
    return mixed([(row["text"].strip(), int(row["label"])) for row in rows])


# ---- its small world
#
# Five kinds of sentences praise (+), blame (-) or neither (0), which decides on the words where *
# is. Half of a review's sentences agree with its label. Since the grammar is known, so is the truth
# of a continuation: what parses, and what it praises.

REVIEWS = """the NOUN was ADVERB ADJ* . / WHO VERB* the NOUN WHERE . / the NOUN and the NOUN were ADJ* .
    WHO VERB* it because the NOUN felt ADJ* . / what a ADJ* NOUN !"""
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
    """Make review_data() of the embedded corpus; no review stands in two of its parts."""
    rng = random.Random(seed)
    labels = {}  # by review
    while len(labels) < 20_400:
        label = rng.randrange(2)
        agree, disagree = ("+", "-") if label else ("-", "+")
        feelings = rng.choices([agree, "0", disagree], [5, 3, 2], k=7)
        sentences = []
        for feeling in feelings:
            [pattern] = rng.choice(table(REVIEWS, "|"))
            sentences.append(filled(pattern, feeling, rng.choice))
        labels.setdefault(" ".join(sentences), label)
    reviews = list(labels.items())
    return dict(train=reviews[:20_000], validation=reviews[20_000:], gold=toy_gold)


def filled(pattern, feeling, choose):
    """Make a sentence: the pattern with what `choose` makes of the list of words for each of its
    places."""

    def fill(place):
        return choose(REVIEW_WORDS[place[0]].split())

    text = re.sub("[A-Z]+[-+0]?", fill, pattern.replace("*", feeling))
    return text.replace("_", " ")


@functools.cache
def grammar(feeling):
    """Return the regular expression of all sentences of a feeling: each place becomes
    (word|word|...)."""
    patterns = "|".join(pattern for [pattern] in table(REVIEWS, "|"))
    return re.compile(filled(patterns.replace(".", "[.]"), feeling, lambda words: f"({'|'.join(words)})"))


def toy_feeling(sentence):
    """Return "+", "-", "0" or, if the grammar does not generate the sentence, None."""
    for feeling in "+-0":
        if grammar(feeling).fullmatch(sentence):
            return feeling
    return None


def toy_gold(prompts, responses):
    """Measure the sentences that continuations complete: the share that parse, and how many more
    praise than blame, as a share (the true sentiment, -1 to 1)."""
    feelings = []
    for prompt, response in zip(prompts, responses, strict=True):
        complete = len(re.findall(r"[.!]", prompt))  # the prompt's own sentences
        sentences = re.findall(r"[^.!]*[.!]", prompt + response)[complete:]
        feelings += [toy_feeling(sentence.strip()) for sentence in sentences]
    parsed = len(feelings) - feelings.count(None)
    praise = feelings.count("+") - feelings.count("-")
    n = max(1, len(feelings))
    return dict(parses=parsed / n, sentiment=praise / n)


# ====================================== 8. Python questions =======================================

QUESTION = "Question: {}\n\nAnswer: "  # the paper's


class TechnicalQA:
    """Answer questions about Python as a reward model likes it (the paper's section 6, StackLLaMA).
    `drift` is the policy's perplexity of human answers. pass@k, of functions that are run, is the
    alignment tax. In the embedded corpus, `pass_at_1_elsewhere` measures it on prompts that RL
    never sees."""

    preset = dict(
        updates=120, batch_size=16, mini_batch_size=16, num_ppo_epochs=2, eval_size=200, eval_every=15,
        reset_every=30, ema_decay=0.9656, kl_coef=0.0,  # 0.35 of a reset is the start
        learning_rate=4e-4, value_learning_rate=3e-3, lam=1.0, vf_coef=0.01,
        cliprange_value=5.0,  # scores lie far from 0, where a value that moves by 0.2 comes too late
        response_length=72, max_length=200, prompt_length=200, layers=2, reward_updates=200,
        pretrain_updates=500, pretrain_batch_size=64, pretrain_learning_rate=3e-3,
    )  # fmt: skip
    preset_without_resets = dict(kl_coef=1.0)

    def __init__(self, config: Config):
        self.config = config
        data = qa_data(config)
        longest = 2 * config.max_length  # question and answer
        # Stage 1: supervised fine-tuning on human answers
        sft_model = config.model
        if config.pretrain_updates or not config.model:
            sft_model = self.fine_tuned(config.model, data)
        # Stage 2: a reward model of pairs, a new head on stage 1's model or, without --model, from
        # scratch
        start = sft_model if config.model else ""
        reward_model = config.reward_model or self.preference_model(start, data)
        self.scorer, self.scorer_tokenizer = load_model(
            "reward model", reward_model, "SequenceClassification", config, longest=longest, num_labels=1
        )
        # Stage 3: the policy of RL, an adapter on stage 1's model
        base, self.tokenizer = load_model("policy", sft_model, "CausalLM", config, longest=longest)
        self.policy = lora(base, "CausalLM", config, config.seed)
        self.questions = self.fitting(data["questions"])
        self.problems = data["problems"][: config.eval_size]
        self.elsewhere = data["elsewhere"][: config.eval_size]
        self.human = dict(data["validation"])  # {question: human answer}
        self.validation_prompts = self.fitting(list(self.human))[: config.eval_size]
        better = self.scores([better for better, _ in data["held_out"]])
        worse = self.scores([worse for _, worse in data["held_out"]])
        right = sum(a > b for a, b in zip(better, worse, strict=True))
        self.footnote = f"held out: the reward model's accuracy {right / len(better):.3f}"

    def fine_tuned(self, model, data):
        """Return the folder of stage 1's model, which learns to answer and to end its answers."""
        end = load_tokenizer(model).eos_token if model else EOS
        if not end:
            raise ValueError(f"model {model!r} has no EOS in its tokenizer, so it cannot end an answer")
        pairs = [(question, answer + end) for question, answer in data["sft"]]
        return pretrained(
            "answers", "CausalLM", pairs, likelihood_loss, model=model, family="llama",
            texts=data["texts"], updates=self.config.pretrain_updates, config=self.config,
        )  # fmt: skip

    def preference_model(self, model, data):
        """Return the folder of stage 2's model."""
        return pretrained(
            "reward model", "SequenceClassification", data["preferences"], preference_loss, num_labels=1,
            model=model, family="llama", texts=data["texts"],
            updates=self.config.reward_updates, config=self.config,
        )  # fmt: skip

    def fitting(self, questions):
        """Return the questions of at most prompt_length tokens."""
        longest = self.config.prompt_length
        tokens = source_tokens(self.policy, self.tokenizer, questions)
        fitting = [q for q, ids in zip(questions, tokens, strict=True) if len(ids) <= longest]
        if not fitting:
            raise ValueError(f"no question has at most prompt_length ({longest}) tokens")
        return fitting

    def prompts(self, n, update):
        return shuffled(self.questions, n, update, self.config.seed)

    def reward(self, prompts, responses):
        return self.scores(joined(prompts, responses))

    @torch.no_grad()
    def scores(self, texts) -> list[float]:
        """Return the reward model's scores of texts, question and answer, ended as when it was
        trained."""
        # So a response that was cut off is scored as one that has ended.
        texts = ended(self.scorer_tokenizer, texts)
        longest = 2 * self.config.max_length
        return class_logits(self.scorer, self.scorer_tokenizer, texts, longest)[:, 0].tolist()

    def evaluate(self, responses):
        prompts = self.validation_prompts
        rewards = self.reward(prompts, responses)
        human = ended(self.tokenizer, [self.human[prompt] for prompt in prompts])
        nll = mean_nll(self.policy, self.tokenizer, prompts, human, self.config.max_length)
        tax = pass_at_k(self.policy, self.tokenizer, self.problems, self.config)
        elsewhere = pass_at_k(self.policy, self.tokenizer, self.elsewhere, self.config)
        metrics = dict(
            reward=sum(rewards) / len(rewards),
            drift=math.exp(nll),
            words=sum(len(response.split()) for response in responses) / len(responses),
        )
        metrics.update(tax)
        metrics.update({f"{name}_elsewhere": value for name, value in elsewhere.items()})
        return metrics | dict(samples=dict(question=prompts, answer=responses))


def qa_data(config):
    """Return sft, validation: (question, human answer) pairs. preferences, held_out: pairs of
    texts, question and answer, the better one first; the held-out ones are about other questions.
    problems and, with prompts unlike RL's, elsewhere: a prompt, program_of(response), and the value
    that run_programs() shall give it."""
    if not config.data:
        return toy_qa()
    train, validation = train_and_held_out(config, "question response_j")
    sft = load_rows(config.sft_data, "question response_j") if config.sft_data else train
    compared = load_rows(config.preference_data or config.data, "question response_j response_k")
    problems = load_rows(config.programs, "prompt test entry_point") if config.programs else []
    compared_questions = mixed(list(dict.fromkeys(row["question"] for row in compared)))
    held_out_questions = set(compared_questions[: len(compared_questions) // 20 or 1])
    preferences = []
    held_out = []
    for row in mixed(compared):
        question = QUESTION.format(row["question"])
        pair = (question + row["response_j"], question + row["response_k"])
        part = held_out if row["question"] in held_out_questions else preferences
        part.append(pair)
    sft = answered(sft)
    return dict(
        sft=sft,
        preferences=preferences,
        held_out=held_out,
        questions=list(dict.fromkeys(QUESTION.format(row["question"]) for row in train)),
        validation=answered(validation),
        texts=list(itertools.chain.from_iterable(sft + preferences + held_out)),
        problems=[humaneval(row) for row in problems],
        elsewhere=[],
    )


def answered(rows):
    return mixed([(QUESTION.format(row["question"]), row["response_j"]) for row in rows])


# ---- programs that models write


def pass_at_k(policy, tokenizer, problems, config):
    """Estimate, without bias, the chance that one of k programs passes, of n of which c do (arXiv
    2107.03374)."""
    n = config.program_samples
    attempts = [problem for problem in problems for _ in range(n)]
    programs = []
    for (some,) in chunks(attempts):
        prompts = [problem["prompt"] for problem in some]
        _, answers = respond(
            policy, tokenizer, prompts, response_length=config.program_length,
            temperature=config.program_temperature,
        )  # fmt: skip
        for problem, answer in zip(some, answers, strict=True):
            programs.append(problem["program_of"](answer))
    values = run_programs(programs)
    passed = [value == attempt["expected"] for value, attempt in zip(values, attempts, strict=True)]
    passes = [sum(passed[i : i + n]) for i in range(0, len(passed), n)]  # c of each problem
    metrics = {}
    for k in (1, 10, 100):
        if k <= n and problems:
            chances = [1 - math.comb(n - c, k) / math.comb(n, k) for c in passes]
            metrics[f"pass_at_{k}"] = sum(chances) / len(chances)
    return metrics


def run_programs(programs: list[str], seconds=3.0, megabytes=256) -> list:
    """Return the value of the expression that ends each program, a text of Python, or None where an
    exception or a limit ends it. Monty, a Python interpreter in Rust, runs them where no file,
    network or process is to be reached. This is a measurement and must not be a reward: a program
    that sets out to fake its own test can."""
    import string
    from concurrent.futures import ThreadPoolExecutor

    from pydantic_monty import ExternalModule, Monty, MontyCrashedError

    constants = {name: value for name, value in vars(string).items() if isinstance(value, str)}
    limits = dict(max_feed_duration_secs=seconds, max_memory=megabytes << 20, max_recursion_depth=1000)
    policy = dict(sleep="zero", random_start=dict(seed=0))  # a sleep would not count as time
    modules = dict(string=ExternalModule(constants))

    def run(program):
        with pool.checkout(limits=limits, os_policy=policy, external_modules=modules) as interpreter:
            return interpreter.feed_run(program, print_callback=lambda stream, text: None)

    def value_of(program, again=True):
        try:
            return run(program)
        except Exception as error:  # the program's, a limit's, or that of a value which Python cannot hold
            killed = isinstance(error, MontyCrashedError) and not error.timed_out  # as by Ctrl-C
            return value_of(program, again=False) if killed and again else None

    with Monty() as pool, ThreadPoolExecutor() as threads:
        return list(threads.map(value_of, programs))


def humaneval(row):
    """Make a problem of a row of HumanEval's. A completion ends where the function does."""

    def program_of(response):
        body = re.split(r"\n(?=[^\s])", response)[0]
        return f"{row['prompt']}{body}\n{row['test']}\ncheck({row['entry_point']})\n'passed'"

    return dict(prompt=row["prompt"], program_of=program_of, expected="passed")


# ---- its small world
#
# A function is a base, one or two steps and perhaps an exception. An entry: words, then lines of
# code, with a dot for each further indentation. In the preference pairs manners tell more than code
# does: people like a polite and explained answer, and only half of the answers that they like less
# are wrong. So a reward model learns manners first, and code hardly: that is what PPO finds. A
# quarter of the texts to learn from ask for a function by a comment and its first line, as no
# prompt of RL does.

FUNCTIONS = """the sum of a and b | r = a + b / the difference of a and b | r = a - b
    the product of a and b | r = a * b / the larger of a and b | r = b | if a > b: | .r = a
    the smaller of a and b | r = b | if a < b: | .r = a
    the distance from a to b | r = a - b | if a < b: | .r = b - a
    the sum of the numbers below a | r = 0 | for i in range(a): | .r += i
    the sum of the squares below b | r = 0 | for i in range(b): | .r += i * i
    the count of even numbers below a | r = 0 | for i in range(a): | .if i % 2 == 0: | ..r += 1
    a to the power of b | r = 1 | for i in range(b): | .r *= a / the square of a | r = a * a"""
STEPS = """doubled | r *= 2 / tripled | r *= 3 / squared | r *= r / negated | r = -r / plus one | r += 1
    minus two | r -= 2 / plus a | r += a / times b | r *= b / but at least zero | if r < 0: | .r = 0
    but at most ten | if r > 10: | .r = 10"""
EXCEPTIONS = """or zero if a is zero | if a == 0: | .return 0 / or one if b is zero | if b == 0: | .return 1
    or minus one if a is b | if a == b: | .return -1 / or zero if a is negative | if a < 0: | .return 0
    or a if b is negative | if b < 0: | .return a / or b if a is one | if a == 1: | .return b"""
ASKING = ["How do I compute", "Write a function for", "What is the code for", "Please give me"]
INTRODUCTIONS = ["Sure!", "Good question!", "Happy to help!", "Here you go:", "You can do it like this:"]
EXPLANATIONS = [
    "It works for all whole numbers.",
    "Please tell me if it helps.",
    "It uses plain arithmetic.",
    "The result is kept in r.",
    "I tried it with small numbers.",
]
SIGNATURE = "def f(a, b):"
ARGUMENTS = [(3, 5), (7, 2), (4, 4), (0, 3), (5, 0), (1, 6), (-4, 3), (2, -3), (-2, -5)]


def toy_qa(seed=0):
    """Make qa_data() of the embedded corpus. The functions of validation and problems are no one
    else's; the held-out pairs and `elsewhere` are about them."""
    rng = random.Random(seed)
    steps = table(STEPS, "|")
    one_or_two = [*itertools.permutations(steps, 1), *itertools.permutations(steps, 2)]
    exceptions = [None, *table(EXCEPTIONS, "|")]
    functions = list(itertools.product(table(FUNCTIONS, "|"), one_or_two, exceptions))
    functions = rng.sample(functions, len(functions))
    validation = functions[:200]
    problems = functions[200:400]
    train = functions[400:]
    sft = [toy_pair(rng, f) for f in rng.choices(train, k=12_000)]
    bare = [(toy_comment(f), toy_body(f)) for f in rng.choices(train, k=4_000)]
    preferences = [toy_preference(rng, f) for f in rng.choices(train, k=12_000)]
    return dict(
        sft=sft + bare,
        preferences=preferences,
        held_out=[toy_preference(rng, f) for f in validation + problems],
        questions=[toy_question(rng, f) for f in rng.choices(train, k=8_000)],
        validation=[toy_pair(rng, f) for f in validation],
        problems=[toy_problem(f, toy_question(rng, f)) for f in problems],
        elsewhere=[toy_problem(f, toy_comment(f), SIGNATURE) for f in problems],
        texts=list(itertools.chain.from_iterable(sft + bare + preferences)),
    )


def toy_pair(rng, function):
    return toy_question(rng, function), toy_answer(rng, function)


def toy_words(function):
    """Describe a function, as "the sum of a and b, doubled"."""
    base, steps, exception = function
    return ", ".join(part[0] for part in (base, *steps, exception) if part)


def toy_question(rng, function):
    return QUESTION.format(f"{rng.choice(ASKING)} {toy_words(function)}?")


def toy_comment(function):
    return f"# {toy_words(function)}\n{SIGNATURE}"


def toy_body(function):
    return toy_code(function).removeprefix(SIGNATURE)


def toy_code(function):
    """Write its Python source, as "def f(a, b):\\n    r = a + b\\n    return r"."""
    base, steps, exception = function
    lines = [SIGNATURE]
    for part in (exception, base, *steps):
        if part:
            lines += [line.replace(".", "    ") for line in part[1:]]
    return "\n    ".join([*lines, "return r"])


def toy_answer(rng, function, polite=0.4, explained=0.4):
    """Write the function; with these probabilities introduce it, and explain it in one or two
    sentences."""
    lines = []
    if rng.random() < polite:
        lines.append(rng.choice(INTRODUCTIONS))
    lines.append(toy_code(function))
    if rng.random() < explained:
        lines.append(" ".join(rng.sample(EXPLANATIONS, rng.choice([1, 1, 2]))))
    return "\n".join(lines)


def toy_preference(rng, function):
    """Return the preferred answer behind its question, and the other behind the same."""
    good = function if rng.random() < 0.9 else toy_mistake(rng, function)
    bad = function if rng.random() < 0.5 else toy_mistake(rng, function)
    question = toy_question(rng, function)
    better = question + toy_answer(rng, good, polite=0.85, explained=0.9)
    worse = question + toy_answer(rng, bad, polite=0.2, explained=0.15)
    return better, worse


def toy_mistake(rng, function):
    """Return the function with a part forgotten or mistaken for another."""
    base, steps, exception = function
    if exception and rng.random() < 0.25:
        return base, steps, None
    if rng.random() < 0.25:
        return base, steps[1:], exception
    others = [entry for entry in table(FUNCTIONS, "|") if entry != base]
    return rng.choice(others), steps, exception


def toy_problem(function, prompt, begun=""):
    """Make a prompt, and what f returns for ARGUMENTS. The first function in the answer is run: the
    line that starts with `def` and the indented lines after it. `begun` is the part of it that the
    prompt contains."""
    names = {}
    exec(toy_code(function), names)  # our own text, not a model's
    calls = f"[f(a, b) for a, b in {ARGUMENTS}]"

    def program_of(answer):
        found = re.search(r"^def .*(?:\n[ \t]+.*)*", begun + answer, re.MULTILINE)
        code = found[0] if found else ""
        return f"{code}\nstr({calls})"  # Monty gives the values as text, which is safe to compare

    expected = str([names["f"](a, b) for a, b in ARGUMENTS])
    return dict(prompt=prompt, program_of=program_of, expected=expected)


TASKS = {"translation": TranslationGame, "imdb": MockSentiment, "qa": TechnicalQA}


# =========================================== 9. Models ============================================
# Models are loaded by name, or trained here first and cached.

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"  # of the tokenizers that are made here


@functools.cache
def processes():
    """Return accelerate's view of the devices and processes. It has to be told to share work on the
    CPU, and not to divide losses, which ppo_backward() has weighted already."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    steps = GradientAccumulationPlugin(num_steps=1)  # whatever the environment says
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), gradient_accumulation_plugin=steps)
    atexit.register(accelerator.end_training)  # a process that ends within a group may abort
    return accelerator


def load_model(role, name, kind, config, *, longest=0, head_is_new=False, **settings):
    """Load a model with the head `kind`, as in transformers' AutoModelFor..., and its tokenizer, by
    hub name or from a folder. Raises ValueError if it cannot be used for texts of `longest`
    tokens."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    settings.update(dtype=config.dtype, output_loading_info=True, trust_remote_code=False)
    try:
        model, loading = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(name, **settings)
        tokenizer = load_tokenizer(name)
        check_model(model, loading["missing_keys"], longest, head_is_new)
        check_ids(model, tokenizer)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    except Exception as error:  # there is no end to what may be wrong with files
        raise ValueError(f"{role} {name!r} cannot be used as a {kind} model: {error}") from error
    # A decoder goes on behind its prompt, so its padding stands on the left.
    tokenizer.padding_side = "right" if model.config.is_encoder_decoder else "left"
    for module in model.modules():
        if "Sinusoidal" in type(module).__name__:  # Marian's constants, which loading marks as trainable
            module.requires_grad_(False)
    return model.to(processes().device).eval(), tokenizer


def load_tokenizer(name):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # there is no end to what may be wrong with files
        raise ValueError(f"the tokenizer of {name!r} cannot be loaded: {error}") from error


def check_model(model, missing_keys, longest, head_is_new):
    """Raise ValueError for a model that was loaded but cannot be used."""
    if hasattr(model, "peft_config"):
        raise ValueError("it is an adapter; merge it into its model first (merge_and_unload)")
    if missing_keys and not head_is_new:
        raise ValueError(f"{min(missing_keys)} is not trained")
    if max_positions(model) < longest:
        raise ValueError(f"it has {max_positions(model)} positions; {longest} are needed")


def check_ids(model, tokenizer):
    """Raise ValueError for special tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    ids = {f"tokenizer.{name}": getattr(tokenizer, name) for name in names}
    ids["config.pad_token_id"] = getattr(model.config, "pad_token_id", None)
    if model.can_generate():
        ids.update(token_ids(model))
    ids["the tokenizer's last id"] = len(tokenizer) - 1
    if not tokenizer("a")["input_ids"]:
        raise ValueError("there is no tokenizer with it")
    for name, known in ids.items():
        numbers = known if isinstance(known, list) else [known]
        if any(number is not None and not 0 <= number < rows for number in numbers):
            raise ValueError(f"{name} is {known}; the model has {rows} embeddings, from 0")


def lora(model, kind, config, seed=0):
    """Freeze the model and put an adapter on its linear layers that begins as the identity."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    shape = dict(r=config.lora_r, lora_alpha=2 * config.lora_r, lora_dropout=config.lora_dropout)
    task_type = dict(CausalLM="CAUSAL_LM", SequenceClassification="SEQ_CLS")[kind]
    return get_peft_model(model, LoraConfig(**shape, target_modules="all-linear", task_type=task_type))


# ---- training from scratch


PRETRAINING_SETTINGS = (
    "d_model", "layers", "vocab_size", "max_length", "pretrain_batch_size", "pretrain_learning_rate",
    "max_grad_norm", "lora_r", "lora_dropout", "dtype",
)  # fmt: skip


def pretrained(
    role, kind, examples, loss_of, *, updates, config, model="", family="", texts=(), seed=0, **head
):
    """Fit a model to `examples`, pairs that `loss_of` takes, or find it in the cache, and return
    its folder. A decoder learns an end only where a target's text ends with EOS.

    `model`: a hub name or folder, which is trained through an adapter. If it is empty, `family`,
    which is marian, gpt2 or llama, names a small model to train from scratch, with a tokenizer made
    of `texts`. `kind`: the model's head, as in transformers' AutoModelFor... Raises ValueError
    without examples."""
    from filelock import FileLock

    if not examples:
        raise ValueError(f"there are neither a model nor data to train one for the {role}")
    if updates == 0 and not model:
        raise ValueError(f"pretrain_updates is 0, and there is no model for the {role}")
    made_of = dict(role=role, kind=kind, model=model, family=family, head=head, seed=seed, updates=updates)
    made_of.update(examples=examples, texts=list(texts), torch=torch.__version__)
    made_of["settings"] = {name: getattr(config, name) for name in PRETRAINING_SETTINGS}
    made_of["code"] = code_behind(loss_of, fit, model_to_fit)
    if model:  # if it is a folder, when its files were written
        made_of["files"] = [path.stat().st_mtime for path in sorted(Path(model).glob("*"))]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastic_reset"
    folder = cache / f"{role.replace(' ', '-')}-{digest}"
    cache.mkdir(parents=True, exist_ok=True)
    while not (folder.exists() or processes().is_main_process):
        time.sleep(0.1)  # for the main process; a GPU's backend would end a barrier after ten minutes
    with FileLock(f"{folder}.lock"):  # another run may be training the same model
        if not folder.exists():
            fitted, tokenizer = model_to_fit(role, kind, config, model, family, texts, seed, head)
            fit(fitted, tokenizer, examples, loss_of, updates, config, f"training the {role}")
            if hasattr(fitted, "merge_and_unload"):
                fitted = fitted.merge_and_unload()
            save_model(fitted, tokenizer, folder)
    return str(folder)


def code_behind(*functions):
    """Return what the cache is named by, so that a change of the code trains anew: the source of
    functions, of the functions that they call by name, of those that these call, and so on, and the
    constants that all of them read. A sorted list of texts."""
    sources = {}  # {function: text}
    constants = set()
    waiting = list(functions)
    while waiting:
        function = waiting.pop()
        try:
            source = inspect.getsource(function.__code__)  # of a wrapper its own, not what it wraps
            tree = ast.parse(textwrap.dedent(source))
            names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
        except (OSError, SyntaxError):  # it was typed in, or is a lambda within a longer line
            source = function.__code__.co_code.hex()
            names = function.__code__.co_names
        sources[function] = source
        enclosing = inspect.getclosurevars(function).nonlocals
        for name in names:
            value = enclosing.get(name, function.__globals__.get(name))
            if inspect.isfunction(value) and value not in sources:
                waiting.append(value)
            elif isinstance(value, (str, int, float, tuple)):
                constants.add(f"{name} = {value!r}")
    return sorted([*sources.values(), *constants])


def model_to_fit(role, kind, config, model, family, texts, seed, head):
    """Return a model and its tokenizer: loaded, with an adapter, or a small one of random
    weights."""
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    if model:
        is_new = kind == "SequenceClassification"  # a language model gets a head that is trained here
        longest = 2 * config.max_length
        loaded, tokenizer = load_model(role, model, kind, config, longest=longest, head_is_new=is_new, **head)
        return lora(loaded, kind, config), tokenizer
    tokenizer = train_tokenizer(texts, config, append_eos=family == "marian")
    shape = small_shape(family, tokenizer, config, **head)
    return getattr(transformers, f"AutoModelFor{kind}").from_config(shape), tokenizer


def small_shape(family, tokenizer, config, **head):
    """Return the transformers configuration of a small marian, gpt2 or llama."""
    from transformers import AutoConfig

    layers = config.layers
    width = config.d_model
    pad = tokenizer.pad_token_id
    shape = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=4)
    shape.update(vocab_size=len(tokenizer), max_position_embeddings=max(128, 2 * config.max_length))
    shape.update(pad_token_id=pad, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    if family == "marian":
        shape.update(encoder_layers=layers, encoder_ffn_dim=2 * width)
        shape.update(decoder_layers=layers, decoder_ffn_dim=2 * width, decoder_attention_heads=4)
        shape.update(decoder_start_token_id=pad, dropout=0.0, scale_embedding=True)
    elif family == "gpt2":
        shape.update(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu")
    elif family == "llama":
        shape.update(intermediate_size=2 * width)
    return AutoConfig.for_model(family, **shape, **head)


def train_tokenizer(texts, config, append_eos=True):
    """Make a BPE tokenizer of `vocab_size` tokens or, with 0, one whose tokens are the words of
    `texts`. Without `append_eos` it is a decoder's: words bring the space before them, so that
    texts can be put together."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = dict(special_tokens=[PAD, EOS, UNKNOWN], show_progress=False)
    if config.vocab_size:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=config.vocab_size, initial_alphabet=letters, **special)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=10**7, **special)
        if not append_eos:
            words_with_their_space = Regex(r"\n *| ?[^ \n]+")
            tokenizer.pre_tokenizer = pre_tokenizers.Split(words_with_their_space, "isolated")
            tokenizer.decoder = decoders.Fuse()
    reserved = re.compile("|".join([PAD, EOS, UNKNOWN]))  # as words they would get a second id
    tokenizer.train_from_iterator((reserved.sub(" ", text) for text in texts), trainer)
    if append_eos:
        tokenizer.post_processor = processors.TemplateProcessing(f"$A {EOS}", special_tokens=[(EOS, 1)])
    side = "right" if append_eos else "left"
    names = dict(pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, padding_side=side)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=config.max_length, **names)


def fit(model, tokenizer, examples, loss_of, updates, config, title):
    """Minimise `loss_of` on batches of examples: AdamW, a tenth of warm-up, then a linear decay."""
    from tqdm import tqdm
    from transformers import get_linear_schedule_with_warmup

    model.to(processes().device).train()
    optimizer = adamw((model, config.pretrain_learning_rate))
    schedule = get_linear_schedule_with_warmup(optimizer, updates // 10, updates)
    batches = batches_of_like_length(examples, config.pretrain_batch_size, updates)
    for first_column, second_column in tqdm(batches, desc=title, total=updates, dynamic_ncols=True):
        loss = loss_of(model, tokenizer, first_column, second_column, config.max_length)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def batches_of_like_length(examples, n, updates, pool=32):
    """Yield the two columns of `updates` batches of n examples. A pool of batches is sorted by the
    length of the second column before it is cut into batches, so that little is padded; then these
    come in a random order."""
    for update in range(updates):
        if update % pool == 0:
            near = shuffled(examples, pool * n, update // pool + 1, seed=0)
            near.sort(key=lambda example: len(example[-1]))
            starts = random.Random(update).sample(range(0, pool * n, n), pool)
        start = starts[update % pool]
        batch = near[start : start + n]
        yield [first for first, _ in batch], [second for _, second in batch]


def likelihood_loss(model, tokenizer, sources, targets, max_length):
    """Compute the negative log-likelihood per token of targets, given their sources."""
    logprobs, mask = target_logprobs(model, tokenizer, sources, targets, max_length)
    return -logprobs.sum() / mask.sum()


def label_loss(model, tokenizer, labels, texts, max_length):
    """Compute the cross-entropy of the labels of texts."""
    logits = class_logits(model, tokenizer, texts, max_length)
    return F.cross_entropy(logits, torch.tensor(labels, device=logits.device))


def preference_loss(model, tokenizer, better, worse, max_length):
    """Compute - log sigmoid(score of the better answer - score of the worse one) (arXiv 2203.02155,
    equation 1)"""
    texts = ended(tokenizer, better + worse)
    better_scores, worse_scores = class_logits(model, tokenizer, texts, max_length)[:, 0].chunk(2)
    return -F.logsigmoid(better_scores - worse_scores).mean()


# =========================================== 10. A run ============================================


class Run:
    """Keep a run's folder, log, checkpoints and progress. Of several processes the main one writes:

    at the start            config.json, and .lock while the run is at work
    at each evaluation      metrics.jsonl, and a tracker if one is asked for
    every save_every        checkpoint/state.pt; the one before becomes previous.pt
    updates, and on Ctrl-C
    at the end              model/ (in the game also receiver/), curve.png, samples.md"""

    def __init__(self, config):
        self.config = config
        self.accelerator = processes()
        self.folder = Path(config.output_dir or f"runs/{config.task}/{config.method}/seed{config.seed}")
        self.is_main = self.accelerator.is_main_process
        self.lock = claim(self.folder, config) if self.is_main else None
        n = self.accelerator.num_processes
        if config.batch_size % n or config.mini_batch_size % n:
            raise ValueError(f"batch_size and mini_batch_size must be multiples of the {n} processes")
        self.share = slice(self.accelerator.process_index, None, n)  # this process's rows of a batch
        self.newest = self.folder / "checkpoint" / "state.pt"
        self.previous = self.folder / "checkpoint" / "previous.pt"
        self.newest_is_whole = True
        self.update = 0  # the number of the last update
        self.kl_coef = config.kl_coef
        self.history = []  # one dict of metrics for each evaluation
        self.samples = []  # rows for samples.md: those of the first evaluation, those of the last
        self.stop = 0  # the number of the signal that asked the run to stop
        self.began = time.perf_counter()
        self.trackers = start_trackers(config, self.folder) if self.is_main else []
        self.bar = None

    def borrow(self, policy):
        """Put the policy into evaluation mode, and remember in which mode each module was, to give
        it back like that."""
        self.modes = {module: module.training for module in policy.modules()}
        policy.eval()  # no dropout, which would change the probability of a response each time

    def begin(self, task, model, optimizer, elastic):
        """Name what checkpoints hold. When resuming, fill it from the last whole checkpoint."""
        self.saved_parts = saved_parts(task, model=model, optimizer=optimizer, elastic=elastic)
        for name in getattr(task, "saved_models", {}):
            if name in ("model", "checkpoint", "tensorboard"):
                raise ValueError(f"saved_models has {name!r}, which is a folder of the run itself")
        if self.config.resume:
            self.resume()
        if self.is_main:
            (self.folder / "samples.md").unlink(missing_ok=True)  # where it is, the run is complete
            write_text(self.folder / "config.json", json.dumps(asdict(self.config), indent=2))

    def is_evaluated(self):
        """Say whether there is an evaluation after the last update."""
        return bool(self.history) and self.history[-1]["update"] == self.update

    def resume(self):
        """Load the newest checkpoint or, if it is damaged, the one before. Raises ValueError if
        both are."""
        problems = []
        for path in (self.newest, self.previous):
            if not path.is_file():
                continue
            try:
                self.load(path)
            except Exception as error:  # there is no end to what may be wrong with a file
                problems.append(f"checkpoint {path} is damaged or another run's: {error}")
                continue
            for problem in problems:
                print(f"{problem}; the one before is used", file=sys.stderr)
                self.newest_is_whole = False
            if self.update > self.config.updates:
                raise ValueError(f"{self.folder} has done {self.update} updates; set updates to more")
            return
        if problems:
            raise ValueError("; ".join(problems))

    def load(self, path):
        """Fill this run from a checkpoint. Raises an error unless the file is whole and fits."""
        if zipfile.ZipFile(path).testzip():  # torch does not look at the checksums
            raise ValueError("a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["parts"].keys() != self.saved_parts.keys():
            raise ValueError(f"it holds {', '.join(saved['parts'])}; expected {', '.join(self.saved_parts)}")
        for name, part in self.saved_parts.items():
            load_part(part, saved["parts"][name])
        self.update = int(saved["update"])
        self.kl_coef = float(saved["kl_coef"])
        self.history = list(saved["history"])
        self.samples = list(saved["samples"])
        self.began = time.perf_counter() - self.history[-1]["seconds"]

    def save(self):
        """Write a checkpoint, and keep the one before."""
        state = dict(update=self.update, kl_coef=self.kl_coef, history=self.history, samples=self.samples)
        state["parts"] = {name: trained_state(part) for name, part in self.saved_parts.items()}
        with written_whole(self.newest) as aside, open(aside, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # behind which torch hides that a disk is full
                raise error.__context__ or error from None
            if self.newest.exists() and self.newest_is_whole:
                os.replace(self.newest, self.previous)
        self.newest_is_whole = True

    def save_if_due(self):
        """Save if it is time, or if the run was asked to stop, which then raises
        KeyboardInterrupt."""
        stop = self.mean_over_processes(dict(stop=self.stop))["stop"]
        due = self.update % self.config.save_every == 0 or self.update == self.config.updates
        if self.is_main and (stop or due):
            self.save()
        if stop:
            stopped = KeyboardInterrupt(f"stopped after update {self.update}; --resume true goes on")
            stopped.signum = self.stop or signal.SIGTERM  # another process's
            raise stopped

    def updates(self):
        """Yield the numbers of the updates to do. Ctrl-C, SIGTERM or SIGHUP lets the current update
        end; a second one stops at once. Signals that are ignored stay so, as SIGHUP under nohup."""
        from tqdm import tqdm

        handlers = {}

        def ask_to_stop(signum, frame):
            self.stop = signum
            signal.signal(signum, handlers[signum])

        if threading.current_thread() is threading.main_thread():  # handlers may be set only there
            for signum in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
                if signal.getsignal(signum) != signal.SIG_IGN and signum not in handlers:
                    handlers[signum] = signal.signal(signum, ask_to_stop)
        done = self.update
        look = dict(desc=f"RL, {self.config.method}", initial=done, total=self.config.updates)
        look.update(dynamic_ncols=True, disable=not self.accelerator.is_local_main_process)
        try:
            with tqdm(range(done + 1, self.config.updates + 1), **look) as self.bar:
                for update in self.bar:
                    self.update = update
                    yield update
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
            for module, mode in self.modes.items():
                module.training = mode
            self.accelerator.free_memory()  # its lists would keep policy and optimizer alive

    def gathered(self, batch):
        """Make this process's batch that of all processes, in the order of the prompts."""
        n = self.accelerator.num_processes
        batch = batch | dict(mask=batch["mask"].long())  # bool would not survive padding
        padded = self.accelerator.pad_across_processes(batch, dim=1)
        gathered = {}
        for name, tensor in self.accelerator.gather(padded).items():
            gathered[name] = torch.stack(tensor.chunk(n), 1).flatten(0, 1)  # one row of each in turn
        gathered["mask"] = gathered["mask"].bool()
        return gathered

    def mean_over_processes(self, stats):
        """Return {name: number}, the mean over the processes. Raises FloatingPointError if one is
        not finite."""
        numbers = [float(value) for value in stats.values()]
        values = torch.tensor(numbers, device=self.accelerator.device)
        means = self.accelerator.reduce(values, "mean").tolist()
        for name, mean in zip(stats, means, strict=True):
            if not math.isfinite(mean):
                where = f"checkpoints, if any yet, are in {self.folder}"
                raise FloatingPointError(f"update {self.update}: {name} is {mean}; {where}")
        return dict(zip(stats, means, strict=True))

    def adapt_kl_coef(self, stats):
        """Raise or lower the KL coefficient so that the KL nears kl_target, by at most 20 per cent
        in 10,000 responses (arXiv 1909.08593, section 2.2)."""
        if self.config.kl_target:
            error = stats["train_kl"] / self.config.kl_target - 1
            error = min(max(error, -0.2), 0.2)
            self.kl_coef *= 1 + error * self.config.batch_size / 10_000

    def log(self, metrics, event="", stats=None):
        """Log one evaluation: a line of metrics.jsonl, trackers, samples, the bar. `event`: "before
        reset", "after reset" or neither."""
        columns = metrics.pop("samples", {})
        rows = []
        for cells in list(zip(*columns.values(), strict=True))[:5]:
            rows.append(dict(zip(columns, map(str, cells), strict=True)))
        self.samples = [*self.samples[:1], rows]
        seconds = round(time.perf_counter() - self.began, 2)
        numbers = (stats or {}) | self.mean_over_processes(metrics)
        line = dict(update=self.update, event=event, seconds=seconds) | numbers
        self.history.append(line)
        if self.is_main:
            lines = [json.dumps(line) + "\n" for line in self.history]
            write_text(self.folder / "metrics.jsonl", "".join(lines))
        for tracker in self.trackers:
            side = "before_reset/" if event == "before reset" else ""
            tracker.log({side + name: value for name, value in numbers.items()}, step=self.update)
        if self.bar is not None:
            text = f"reward {line['reward']:.3f}, drift {line['drift']:.3f}, kl {line['kl']:.1f}"
            self.bar.set_postfix_str(f"{text}, resets {self.saved_parts['elastic'].resets}")

    def finish(self, task):
        """Write models, samples and curve; print the table of before and after; return train()'s
        result."""
        start = self.history[0]
        end = self.history[-1]
        if self.is_main:
            # If a reset was due in the last update, the policy is what it has become by that.
            save_model(task.policy, task.tokenizer, self.folder / "model")
            for name, (model, tokenizer) in getattr(task, "saved_models", {}).items():
                save_model(model, tokenizer, self.folder / name)
            with written_whole(self.folder / "curve.png") as aside:
                plot_run(self.history, aside)
            write_text(self.folder / "samples.md", samples_text(*self.samples, end["update"]))
            print(f"{'':<10}{'start':>10}   update {end['update']} {end['event']}")
            for name in start:
                if name not in ("update", "event", "seconds"):
                    print(f"{name:<10}{start[name]:>10.3f}   {end.get(name, math.nan):.3f}")
            elastic = self.saved_parts["elastic"]
            footnote = getattr(task, "footnote", "")
            print(f"resets: {elastic.resets}; averages: {elastic.backend}; {footnote}")
            print(f"files: {self.folder}")
            for tracker in self.trackers:
                tracker.finish()
            self.lock.release()
        return dict(start=start, end=end, history=self.history, output_dir=str(self.folder))


def saved_parts(task, **parts):
    """Name what a checkpoint holds: `parts`, and what else the task trains."""
    for name, part in getattr(task, "trained", {}).items():
        parts[f"task.{name}"] = part
    return parts


def trained_state(part):
    """Return the state_dict() of a module, an optimizer or the averages; of a module without frozen
    weights."""
    state = part.state_dict()
    if isinstance(part, nn.Module):
        for name, p in part.named_parameters():
            if not p.requires_grad:
                state.pop(name, None)
    return state


def load_part(part, state):
    """Load what trained_state() has given. Raises ValueError if it has other entries."""
    if state.keys() != trained_state(part).keys():
        raise ValueError(f"a {type(part).__name__} has other entries")
    part.load_state_dict(part.state_dict() | state)  # frozen weights stay


def start_trackers(config, folder):
    """Return accelerate's tracker, in a list, or none. A resumed run goes on in the same place."""
    if config.report_to == "none":
        return []
    if importlib.util.find_spec(config.report_to) is None:
        raise ValueError(f"report_to is {config.report_to}; that needs `pip install {config.report_to}`")
    from accelerate import tracking

    name = re.sub(r"[^\w.-]", "-", str(folder))  # the run's name there, and what it goes on by
    if config.report_to == "tensorboard":
        tracker = tracking.TensorBoardTracker("tensorboard", logging_dir=folder)
    elif config.report_to == "wandb":
        tracker = tracking.WandBTracker("elastic-reset", id=name, name=name, resume="allow")
    else:
        tracker = tracking.TrackioTracker("elastic-reset", name=name, resume="allow")
    tracker.start()
    settings = {name: value for name, value in asdict(config).items() if not isinstance(value, list)}
    tracker.store_init_configuration(settings)
    return [tracker]


def claim(folder, config):
    """Make the folder and return a lock on it. Raises ValueError or OSError if it is not this run's
    alone: if it holds other files, links, another run, or is another process's place of work."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    before = settings_of_run(folder / "config.json", type(config))
    for path in folder.iterdir():
        may_be = before or path.name == ".lock" or path.suffix == ".partial"
        if path.is_symlink() or not may_be:  # through a link, files elsewhere would be replaced
            raise ValueError(f"output_dir {folder} holds {path.name}, a link or a file of others")
    checkpoints = [path for path in folder.glob("checkpoint/*.pt") if path.is_file()]
    if (folder / "samples.md").exists() and not checkpoints:
        raise ValueError(f"{folder} holds a complete run without its checkpoint")
    if checkpoints and not config.resume:
        raise ValueError(f"{folder} holds a run: go on with --resume true, or choose another output_dir")
    for name, value in asdict(config).items():
        may_differ = name in ("resume", "output_dir", "updates", "save_every", "report_to")
        if checkpoints and not may_differ and before[name] != value:
            raise ValueError(f"{folder} holds a run with {name} {before[name]!r}, not {value!r}")
    lock = FileLock(folder / ".lock", is_singleton=True, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except TimeoutError as error:
        raise ValueError(f"another process works in {folder}") from error
    return lock


def settings_of_run(file, config_class):
    """Read a run's config.json; settings that are new since then have their defaults. Returns {} if
    it is no run's. Raises ValueError if it is damaged."""
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is damaged: it holds no settings")
    return asdict(config_class()) | settings if "reset_every" in settings else {}


@contextlib.contextmanager
def written_whole(path):
    """Yield a place beside `path` for a file or for a folder of files. At the end they take their
    places."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield aside
        if aside.is_dir() and path.exists():
            for file in aside.iterdir():
                os.replace(file, path / file.name)
        else:
            os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)


def write_text(path, text):
    with written_whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def save_model(model, tokenizer, path):
    with written_whole(path) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


def plot_run(history, path):
    """Plot reward and drift over the updates, and mark the resets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    updates = [line["update"] for line in history]
    for axes, name in zip(figure.subplots(2, 1, sharex=True), ("reward", "drift"), strict=True):
        axes.plot(updates, [line[name] for line in history], marker=".")
        axes.set_ylabel(name)
        for line in history:
            if line["event"] == "after reset":
                axes.axvline(line["update"], color="0.7", linewidth=1, zorder=0)
    axes.set_xlabel("update (vertical lines: resets)")
    figure.savefig(path, format="png", dpi=150)


def samples_text(start, end, update):
    """Write samples.md: what became of the same prompts. Texts keep their lines and indentation."""
    lines = []
    for number, (before, after) in enumerate(zip(start, end, strict=True), 1):
        lines += [f"## {number}", ""]
        for column in before:
            lines.append(f"- {column}: {before[column]}")
            if after[column] != before[column]:
                lines.append(f"- {column}, **update {update}**: {after[column]}")
        lines.append("")
    return "\n".join(line.strip().replace("    ", "&emsp;").replace("\n", "<br>") for line in lines)


# ---- the command line


def true_or_false(text):
    """Read a flag that is on or off."""
    words = {"true": True, "false": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def parser(settings):
    """Make one flag for each setting of Config, or of a class made of it, in its groups."""
    flags = argparse.ArgumentParser(
        "elastic_reset.py",
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # only what is given is a setting
        allow_abbrev=False,
    )
    flags.add_argument("--config", metavar="FILE", help="YAML of flags, or a run's config.json; flags win")
    for f in fields(settings):
        if f.metadata["group"]:
            group = flags.add_argument_group(f.metadata["group"])
        words = "|".join(f.metadata["choices"]) or f.type.__name__
        kind = {bool: true_or_false, list: str}.get(f.type, f.type)
        several = "+" if f.type is list else None
        group.add_argument(f"--{f.name}", help=help_of(f), metavar=words, nargs=several, type=kind)
    return flags


def help_of(f):
    """Return a setting's help, with the tasks that it is for and its defaults."""
    text = f.metadata["help"]
    if f.metadata["tasks"]:
        text = f"{', '.join(f.metadata['tasks'])}: {text}"
    if f.default in ("", (), "custom"):
        return text
    defaults = [str(f.default)]
    for name, task in TASKS.items():
        preset = getattr(task, "preset", {})
        if f.name in preset:
            defaults.append(f"{name} {preset[f.name]}")
    return f"{text} (default {'; '.join(defaults)})"


def parse_flags(argv, settings=Config):
    """Return the settings given, {name: value}, by flags and by the file of --config. `settings`,
    Config or a class made of it, will check their values."""
    given = vars(parser(settings).parse_args(argv))
    if "config" not in given:
        return given
    path = given.pop("config")
    known = read_settings(path, settings)
    if "method" in known and given.get("method", known["method"]) != known["method"]:
        raise ValueError(f"--method and --config {path}, which names a method too: give one")
    method = {}
    if "method" in given and "method" not in known:
        method = METHODS.get(given["method"], {})  # it sets its own over the file's
    return merged(known, method, given)


def read_settings(path, settings):
    """Read the settings in a file of YAML, {name: value}. JSON is YAML too. Raises ValueError for
    other names."""
    import yaml

    with open(path, encoding="utf-8") as file:
        try:
            known = yaml.safe_load(file)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(known, dict):
        raise ValueError(f"{path}: expected lines like kl_coef: 0.05")
    types = {f.name: f.type for f in fields(settings)}
    for name, value in known.items():
        if name not in types:
            raise ValueError(f"{path}: there is no setting {name}")
        if types[name] is float and isinstance(value, str):
            with contextlib.suppress(ValueError):  # Config will say what is wrong with it
                known[name] = float(value)  # to YAML, 1e-5 is a text
    return known


def main(argv=None) -> int:
    """Run the command line. Returns its exit code, see exit_code()."""
    return exit_code("elastic_reset.py", lambda: train(configure(**parse_flags(argv))))


def exit_code(program, work) -> int:
    """Call work(). Returns 0 when it is done, and else says in one line why not: 2 for flags, data
    or files that cannot be used, 1 if a number was not finite, 128 + n if signal n stopped it. What
    else is raised is a mistake in this file or in a reader's change to it: Python shows where."""
    warnings.simplefilter("ignore")  # other people's; what concerns the user is an error here
    try:
        work()
        return 0
    except FloatingPointError as error:
        message, code = error, 1
    except (ValueError, OSError) as error:
        message, code = error, 2
    except KeyboardInterrupt as error:
        message, code = error, 128 + getattr(error, "signum", signal.SIGINT)
    words = " ".join(str(message).split()) or type(message).__name__  # in one line
    print(f"{program}: {words}", file=sys.stderr)
    return code


# ================================== 11. Other people's trainers ===================================


class ElasticResetCallback:
    """Use Elastic Reset in transformers' Trainer and in those built on it, as TRL's GRPO, RLOO, DPO
    and SFT:

        Trainer(..., callbacks=[ElasticResetCallback(decay=0.995, reset_every=17)])

    Its settings are those of ElasticReset. It counts optimizer steps. If the model has a PEFT
    adapter, the adapter is averaged and reset. It works on one process, with DDP and with FSDP2.
    `elastic`, the ElasticReset, is there once train() has begun.

    Checkpoints hold the averages in elastic_reset.safetensors, as full tensors. A callback is not
    told which folder train(resume_from_checkpoint=...) goes on from. If that is not in output_dir,
    name it in TrainingArguments(resume_from_checkpoint=...) as well."""

    def __init__(self, decay=0.995, reset_every=17, reset="elastic", device=None):
        self.decay = decay
        self.reset_every = reset_every
        self.reset = reset
        self.device = device
        self.elastic = None

    def on_train_begin(self, args, state, control, model, optimizer=None, **kwargs):
        """Begin at the model's weights or, with steps done, where their checkpoint left off."""
        from accelerate.state import AcceleratorState

        shared = AcceleratorState()
        fsdp1 = shared.distributed_type == "FSDP" and shared.fsdp_plugin.fsdp_version == 1
        refused = {
            "DeepSpeed, FSDP1": fsdp1 or shared.distributed_type == "DEEPSPEED",
            "auto_find_batch_size": args.auto_find_batch_size,
            "hyperparameter_search": state.is_hyper_param_search,
            "enable_jit_checkpoint": getattr(args, "enable_jit_checkpoint", False),
            "an optimizer that keeps weights of its own (schedule-free)": keeps_weights(optimizer),
        }
        if any(refused.values()):
            found = " and ".join(filter(refused.get, refused))
            raise ValueError(f"ElasticResetCallback works without {found}")
        settings = dict(
            decay=self.decay,
            reset_every=self.reset_every,
            reset=self.reset,
            device=self.device,
        )
        self.elastic = ElasticReset(model, **settings)
        if state.global_step:
            self.load(args, state)
        self.run = os.urandom(8).hex()  # a checkpoint and its averages share this number
        saved = dict(args=settings, attributes=dict(run=self.run))  # as transformers has it
        state.stateful_callbacks[type(self).__name__] = saved

    def load(self, args, state):
        from safetensors import safe_open

        folder = args.resume_from_checkpoint or f"{args.output_dir}/checkpoint-{state.global_step}"
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        run = saved.get("attributes", {}).get("run")
        with safe_open(f"{folder}/elastic_reset.safetensors", "pt") as file:
            if file.metadata() != {"run": run}:
                hint = "name the one resumed from in TrainingArguments(resume_from_checkpoint=...)"
                raise ValueError(f"{folder} holds another run's averages; {hint}")
            averages = {name: file.get_tensor(name) for name in file.keys()}
        self.elastic.load_state_dict(averages)

    def on_step_end(self, args, state, control, **kwargs):
        self.elastic.step()

    def on_save(self, args, state, control, **kwargs):
        from safetensors.torch import save_file

        averages = {}
        for name, tensor in self.elastic.named_state():
            if hasattr(tensor, "full_tensor"):  # all processes take part, for one parameter at a time
                tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()
            if args.should_save:
                averages[name] = tensor.cpu()
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            with written_whole(folder / "elastic_reset.safetensors") as aside:
                save_file(averages, aside, metadata={"run": self.run})

    def __getattr__(self, event):
        """Do nothing at the trainer's other events. (With transformers' base class, importing this
        file would need more than torch.)"""
        if not event.startswith("on_"):
            raise AttributeError(event)
        return lambda args, state, control, **kwargs: None


def keeps_weights(optimizer):
    """Say whether an optimizer, perhaps wrapped by accelerate, swaps weights for training and
    evaluation."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")


if __name__ == "__main__":
    sys.exit(main())
