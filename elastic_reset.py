# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "numpy>=1.26", "transformers>=5.0", "tokenizers>=0.22", "datasets>=4.0",
#     "accelerate>=1.10", "safetensors>=0.5", "sacrebleu>=2.5", "sentencepiece>=0.2", "matplotlib>=3.8",
#     "tqdm>=4.66", "pyyaml>=6.0", "filelock>=3.16", "peft>=0.17", "pydantic-monty>=1.4",
# ]
# ///
"""Elastic Reset: fine-tune a language model with PPO and keep its language. One file, read from the top.

The method (Noukhovitch, Lavoie, Strub, Courville: "Language Model Alignment with Elastic Reset", NeurIPS
2023, arXiv 2312.07551). theta: weights of the policy (the model); theta_0: at the start; theta_bar: average.

    theta_bar <- theta_0
    for update = 1, 2, ...:
        theta     <- one PPO update of theta, on responses that theta has just sampled
        theta_bar <- decay * theta_bar + (1 - decay) * theta           # the EMA
        every n updates:                                               # the reset
            theta     <- theta_bar
            theta_bar <- theta_0

Elastic Reset does not change PPO's loss. A reset leaves the value head and the optimizer's moments alone.

Run it:   python elastic_reset.py --task translation       (offline, minutes on two CPU cores; see --help)
Copy it:  ElasticReset needs torch alone and asks for one line in a training loop, `elastic.step()`. To paste
          section 1 by itself, put before it: import contextlib, itertools, torch; from torch import nn;
          ema_kernel = None.

Sections: 1 Elastic Reset, 2 PPO, 3 Training (the algorithm is complete here), 4 Tasks, 5 Settings, 6 Models
and data, 7 Three small worlds, 8 Files and command line, 9 Other people's trainers.
"""

import argparse
import atexit
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, Protocol, get_args

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
        elastic.step()  # after every PPO update or, in other training, after every optimizer.step()

    `model` is a module (with FSDP2 the root) or an iterable of parameters. As an optimizer does, it holds
    those that have `requires_grad` now, tied ones once, and never moves or replaces them: make it where you
    make the optimizer, after adapters and `fully_shard`. Of a DTensor each rank averages its own shard.

    `ema` and `init` are lists of tensors shaped like `params`: float32 (float64 for float64), because a
    bfloat16 average with decay 0.995 would be rounded back to where it was. `backend` is "rust" if the
    extension `ema_kernel` is built and all parameters are contiguous CPU tensors, each with memory of its
    own; else "foreach", torch's operations on lists.
    """

    def __init__(self, model, decay: float = 0.995, reset_every: int = 17, reset: str = "elastic"):
        if not 0 <= decay <= 1 or not reset_every >= 1 or reset_every % 1 or reset not in RESET_RULES:
            settings = f"decay {decay}, reset_every {reset_every}, reset {reset!r}"
            raise ValueError(f"{settings}; expected 0 to 1, 1 or more, one of {', '.join(RESET_RULES)}")
        self.decay, self.reset_every, self.rule = decay, int(reset_every), reset
        whole, names = isinstance(model, nn.Module), {}
        self._fsdp = [module for module in model.modules() if hasattr(module, "reshard")] if whole else []
        self._drop_whole_copies()
        for name, p in model.named_parameters() if whole else enumerate(model):
            if p.requires_grad and (p.is_meta or p.layout != torch.strided or p.element_size() < 2):
                raise TypeError(f"parameter {name} is not a dense one in memory of 16 bits or more")
            if p.requires_grad:
                names.setdefault(p, str(name))
        if not names:
            raise ValueError("no parameter has requires_grad=True, so there is nothing to average or reset")
        self.params, self.names = list(names), list(names.values())
        self.ema, self.init = ([local(p) for p in self.params] for _ in range(2))  # _follow() puts in copies
        self.updates = self.resets = 0
        self._places = None
        self._follow()

    @property
    def backend(self) -> str:
        return "rust" if self._flat else "foreach"

    def step(self) -> bool:
        """update() and, every `reset_every`-th time, reset(). Returns whether it has reset."""
        self.update()
        due = self.rule != "none" and self.updates % self.reset_every == 0
        if due:
            self.reset()
        return due

    @torch.no_grad()
    def update(self) -> None:
        """ema <- decay * ema + (1 - decay) * policy"""
        policy = self._follow()
        self.updates += 1
        for policies, ema, _ in self._flat:
            ema_kernel.update(ema, policies, self.decay, torch.get_num_threads())
        if self.backend == "foreach":
            wide = [p.to(ema.dtype) for p, ema in zip(policy, self.ema, strict=True)]
            torch._foreach_lerp_(self.ema, wide, 1 - self.decay)

    @torch.no_grad()
    def reset(self) -> None:
        """policy <- ema, rounded once to the policy's dtype; ema <- init. Other rules: see RESET_RULES."""
        weights = dict(policy=self._follow(), ema=self.ema, init=self.init)
        self.resets += 1
        if self.backend == "rust" and self.rule == "elastic":
            for policies, ema, init in self._flat:
                ema_kernel.reset(policies, ema, init, torch.get_num_threads())
            return
        policy_becomes, ema_becomes = RESET_RULES[self.rule]
        torch._foreach_copy_(weights["policy"], weights[policy_becomes])
        torch._foreach_copy_(weights["ema"], weights[ema_becomes])
        self._drop_whole_copies()

    @contextlib.contextmanager
    def averaged(self):
        """Within `with elastic.averaged():` the policy has the EMA's weights, to be evaluated or saved."""
        policy = self._follow()
        own = [p.clone() for p in policy]
        try:
            torch._foreach_copy_(policy, self.ema)
            self._drop_whole_copies()
            yield
        finally:
            torch._foreach_copy_(self._follow(), own)
            self._drop_whole_copies()

    def by_name(self, weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """`weights`, listed like `params`, by name and in the policy's dtypes, for functional_call."""
        return {n: w.to(p.dtype) for n, p, w in zip(self.names, self.params, weights, strict=True)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`ema.<name>`, `init.<name>`, `updates`, `resets`: tensors, DTensors where the parameters are. They
        are live, as in torch.optim: clone what must not change with the next update."""
        self._follow()
        state = {"updates": torch.tensor(self.updates), "resets": torch.tensor(self.resets)}
        for name, p, ema, init in zip(self.names, self.params, self.ema, self.init, strict=True):
            state |= {f"ema.{name}": as_dtensor(p, ema), f"init.{name}": as_dtensor(p, init)}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copies a state_dict() in; full tensors will do for DTensors. ValueError, with nothing changed, if a
        name, a shape or a dtype differs."""
        own = self.state_dict()
        compare_layout(own, dict(state), "not this policy's state: it")
        for name, tensor in own.items():
            tensor.copy_(as_dtensor(tensor, state[name], whole=True))
        self.updates, self.resets = int(state["updates"]), int(state["resets"])

    def _drop_whole_copies(self) -> None:
        """Between passes FSDP2 may keep gathered copies of the parameters, which are stale now."""
        for module in self._fsdp:
            module.reshard()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _follow(self) -> list[torch.Tensor]:
        """The parameters as plain tensors, a DTensor as this rank's shard. Where `.to()` has moved them, ema
        and init are laid out anew beside them: in flat buffers, one each per dtype and device. For the kernel
        it keeps these and the parameters as flat arrays."""
        policy, groups = [local(p) for p in self.params], {}
        places = [p.data_ptr() for p in policy]
        if places == self._places:
            return policy
        self._places, self._flat = places, []
        ends = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in policy if p.numel())
        takes = ema_kernel is not None
        takes &= all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
        for p in self.params:
            takes &= p.device.type == "cpu" and not hasattr(p, "to_local") and p.is_contiguous()
            takes &= p.is_floating_point() and p.data_ptr() % p.element_size() == 0
        for i, p in enumerate(policy):
            groups.setdefault((p.device, p.dtype), []).append(i)
        for (device, dtype), members in groups.items():
            sizes, wide = [policy[i].numel() for i in members], torch.promote_types(dtype, torch.float32)
            arrays = [[as_array(policy[i].view(-1)) for i in members]] if takes else []
            for averages in (self.ema, self.init):
                flat = torch.empty(sum(sizes), dtype=wide, device=device)
                for i, part in zip(members, flat.split(sizes), strict=True):
                    averages[i] = part.view(policy[i].shape).copy_(averages[i])
                arrays += [as_array(flat)] if takes else []
            self._flat += [arrays] if takes else []
        return policy


def compare_layout(own, other, place):
    """ValueError unless both have the same names, types, shapes and dtypes, at every depth."""
    kinds = [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else type(x) for x in (own, other)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{place} is missing, unknown or of another type, shape or dtype")
    if isinstance(own, list) and own:  # a new run's lists are empty
        own, other = dict(enumerate(own)), dict(enumerate(other))
    if isinstance(own, dict):
        for name in [*own, *other]:
            compare_layout(own.get(name), other.get(name), f"{place}[{name!r}]")


def local(p):
    """The tensor itself, or this rank's shard of a DTensor."""
    return p.detach().to_local() if hasattr(p, "to_local") else p.detach()


def as_dtensor(p, tensor, whole=False):
    """This rank's shard of a tensor, or the whole one, as a DTensor like p; as it is where p is none."""
    if not hasattr(p, "to_local") or hasattr(tensor, "to_local"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if whole:
        return distribute_tensor(tensor, p.device_mesh, p.placements)
    shape = dict(shape=p.shape, stride=p.stride())
    return DTensor.from_local(tensor, p.device_mesh, p.placements, run_check=False, **shape)


def as_array(flat):
    """The same memory as a NumPy array; NumPy has no bfloat16 and sees its bits as uint16."""
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()


# ================================================= 2. PPO ==================================================
# Shapes: `batch` prompts of `prompt` tokens, each answered by a response of `response` tokens. After its EOS
# a response is padding; `mask` (batch, response) is True up to and including the EOS: nothing else counts.


def gather_logprobs(logits, tokens):
    """log pi(a_t | before), a_t a token. (batch, response, vocab), (batch, response) -> (batch, response)"""
    return logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """The reward of each token, (batch, response): the KL penalty, negated, and at the last token also the
    score (batch,) of the response."""
    # r_t = - kl_coef (log pi(a_t) - log pi_ref(a_t)) + score [t is last]
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (arXiv 1506.02438, equation 16): the advantages, how far rewards went
    above the guess, and the returns. (batch, response) each."""
    advantages, advantage = torch.zeros_like(rewards), 0.0
    next_values = F.pad(values * mask, (0, 1))[:, 1:]  # after the last token 0
    # delta_t = r_t + gamma V_{t+1} - V_t;    A_t = delta_t + gamma lam A_{t+1}
    deltas = (rewards + gamma * next_values - values) * mask
    for t in reversed(range(rewards.shape[1])):
        advantages[:, t] = advantage = deltas[:, t] + gamma * lam * advantage
    # R_t = A_t + V_t, what V_t is fitted to
    return advantages, (advantages + values) * mask


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """Mean 0 and (unbiased) variance 1 over the unmasked tokens."""
    centred = (x - masked_mean(x, mask)) * mask
    variance = centred.square().sum() / (mask.sum() - 1).clamp(min=1)
    return centred * (variance + 1e-8).rsqrt()


def ppo_loss(new_logprobs, new_values, entropy, old, *, cliprange, cliprange_value, vf_coef, entropy_coef):
    """PPO's clipped loss (arXiv 1707.06347, equations 7 and 9; the values' clip is OpenAI Baselines'), and
    numbers to watch. `old`: the responses' logprobs, values, advantages, returns and mask as sampled. All
    (batch, response)."""
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
    loss = policy_loss + vf_coef * value_loss - entropy_coef * masked_mean(entropy, mask)
    watch = dict(loss=loss, policy_loss=policy_loss, value_loss=value_loss)
    watch["policy_kl"] = 0.5 * masked_mean(log_ratio.square(), mask)
    watch["clipfrac"] = masked_mean(ratio != clipped, mask)
    return loss, {name: value.item() for name, value in watch.items()}


class ActorCritic(nn.Module):
    """The policy with a value function: a linear head on the policy's last hidden state or, as a
    `separate_value_model`, on that of a copy. The head starts at zero, and without a value loss (vf_coef 0)
    stays there. The policy acts at `temperature` and ends no response before its `shortest` length."""

    def __init__(self, policy, temperature=1.0, separate_value_model=False, shortest=0):
        super().__init__()
        self.policy, self.temperature, self.shortest = policy, temperature, shortest
        self.value = nn.ModuleDict()
        if separate_value_model:
            whole = policy.get_base_model() if hasattr(policy, "get_base_model") else policy  # of an adapter
            self.value["model"] = copy.deepcopy(whole.base_model)  # without the output layer
        self.value["head"] = nn.Linear(policy.get_output_embeddings().in_features, 1, device=policy.device)
        for p in self.value["head"].parameters():
            nn.init.zeros_(p)

    def forward(self, batch, with_entropy=False, with_values=True):
        """The responses' log-probabilities, values and, if asked for, entropies, (batch, response); 0 where
        masked. (generate()'s scores will not do: computed a token at a time, they would not give the same
        numbers, so that ratio_t would not start at 1.)"""
        responses, mask = batch["responses"], batch["mask"]
        inputs = response_inputs(self.policy, batch["input_ids"], batch["attention_mask"], responses)
        logits, hidden = logits_and_states(self.policy, inputs, responses.shape[1])
        logits = logits if self.temperature == 1 else logits / self.temperature
        forbid(logits, self.policy, self.shortest)
        all_logprobs = logits.log_softmax(-1)  # (batch, response, vocab)
        logprobs = all_logprobs.gather(-1, responses.unsqueeze(-1)).squeeze(-1)
        # H = - sum_a pi(a) log pi(a)
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1) if with_entropy else torch.zeros_like(logprobs)
        if "model" in self.value and with_values:
            whole = self.value["model"](**inputs, use_cache=False)
            hidden = whole.last_hidden_state[:, -responses.shape[1] :]
        values = self.value["head"](hidden.float()).squeeze(-1)
        return [torch.where(mask, x, 0.0) for x in (logprobs, values, entropy)]


@torch.no_grad()
def reference_logprobs(model, weights, batch):
    """The responses' log-probabilities under other weights {name: tensor} of the policy, (batch, response).
    The KL penalty's reference is weights that ElasticReset keeps anyway, not another model."""
    weights = {f"policy.{name}": tensor for name, tensor in weights.items()}
    return torch.func.functional_call(model, weights, (batch,), dict(with_values=False))[0]


@torch.no_grad()
def forbid(logits, policy, shortest=0, first=0):
    """Masks in logits (batch, n, vocab), in place, the tokens that are never sampled: padding, and EOS among
    the first `shortest` of a response. The n begin at its place `first`. Sampling and scoring use this."""
    eos, pad = policy.generation_config.eos_token_id, policy.generation_config.pad_token_id
    if pad not in eos:  # some models pad with their EOS
        logits[..., pad] = -1e9
    logits[:, : max(0, shortest - first), eos] = -1e9


@torch.no_grad()
def respond(
    policy, tokenizer, prompts, response_length, temperature=1, shortest=0, max_length=None, rows=slice(None)
):
    """Samples a response to each prompt or, of several processes, to its own `rows` of them; at temperature
    0, the likeliest tokens. An encoder's prompts are cut to max_length. Returns the batch, input_ids and
    attention_mask (batch, prompt), responses and mask (batch, response), and the responses as texts."""
    from transformers import GenerationConfig

    decoder = not policy.config.is_encoder_decoder
    side = dict(padding_side="left", truncation=False) if decoder else {}
    tokens = tokens_of(tokenizer, prompts, None if decoder else max_length, policy.device, **side)
    batch = {name: tensor[rows] for name, tensor in tokens.items()}
    # Every process cuts its rows from the same tokens and random numbers, so that several do what one does.
    uniform = torch.rand(response_length, len(prompts), 1, device=policy.device)[:, rows]
    before = batch["input_ids"] if decoder else batch["input_ids"][:, :0]
    lengths, most = tokens["attention_mask"].sum(1), max_positions(policy) - response_length
    if decoder and not 1 <= lengths.min() <= lengths.max() <= most:
        raise ValueError(f"prompts have {lengths.min()} to {lengths.max()} tokens; expected 1 to {most}")
    start = before.shape[1] + (not decoder)

    def drawn(tokens, scores):  # (batch, so far), (batch, vocab)
        place = tokens.shape[1] - start
        forbid(scores.unsqueeze(1), policy, shortest, place)
        if not temperature:
            return scores
        # By inverse CDF, many times faster than torch.multinomial over a real vocabulary.
        cumulative = (scores.float() / temperature).softmax(-1).cumsum(-1)
        tokens = torch.searchsorted(cumulative, uniform[place] * cumulative[:, -1:], right=True)
        tokens = tokens.clamp(max=scores.shape[1] - 1)
        return torch.zeros_like(scores).scatter_(1, tokens, 1.0)  # so that generate() takes these

    settings = GenerationConfig(max_new_tokens=response_length, do_sample=False, num_beams=1)
    responses = policy.generate(**batch, generation_config=settings, logits_processor=[drawn])[:, start:]
    ended = torch.isin(responses, torch.tensor(policy.generation_config.eos_token_id, device=policy.device))
    batch |= dict(responses=responses, mask=F.pad(ended.cumsum(1), (1, 0))[:, :-1] == 0)
    # Some tokenizers drop a first space, so a decoder's response is decoded behind its prompt.
    asked = tokenizer.batch_decode(before, skip_special_tokens=True)
    whole = tokenizer.batch_decode(torch.cat([before, responses], 1), skip_special_tokens=True)
    return batch, [text[len(prompt) :] for prompt, text in zip(asked, whole, strict=True)]


def response_inputs(policy, input_ids, attention_mask, responses):
    """The model's inputs. An encoder-decoder differs from a decoder here and in respond()."""
    if policy.config.is_encoder_decoder:
        start = torch.full_like(responses[:, :1], policy.generation_config.decoder_start_token_id)
        shifted = torch.cat([start, responses[:, :-1]], 1)
        return dict(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=shifted)
    attention_mask = F.pad(attention_mask, (0, responses.shape[1] - 1), value=1)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    input_ids = torch.cat([input_ids, responses], 1)[:, :-1]
    return dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions)


def logits_and_states(policy, inputs, n):
    """Logits (batch, n, vocab) at the last n positions alone, in float32, and the output layer's input."""
    states = []

    def keep_last(output_layer, arguments):
        states.append(arguments[0][:, -n:])
        return states[0]

    with policy.get_output_embeddings().register_forward_pre_hook(keep_last):
        return policy(**inputs, use_cache=False).logits.float(), states[0]


# =============================================== 3. Training ===============================================


def train(config: "Config", task: "Task | None" = None) -> dict:
    """Trains and writes the run's files. Returns {"start": metrics, "end": metrics, "history": list of
    metrics, "output_dir": folder}. Raises FloatingPointError when a reward, a loss or a gradient is not
    finite, KeyboardInterrupt (after a checkpoint) when asked to stop."""
    if task is None and config.task not in TASKS:
        raise ValueError(f"--task is {config.task}; expected one of {', '.join(TASKS)}, or your own")
    run = Run(config)  # section 8: folder, log, checkpoints, processes and the current KL coefficient
    task = task or TASKS[config.task](config)
    model, optimizer = actor_critic(task.policy, config, run.accelerator)
    elastic = ElasticReset(model.policy, config.ema_decay, config.reset_every, config.reset)
    reference = elastic.ema if config.kl_reference == "ema" else elastic.init
    run.begin(dict(model=model, optimizer=optimizer, elastic=elastic, **task.trained))
    if not run.history:
        run.log(evaluate(task, model, elastic, config))

    for update in run.updates():
        # 1. Sample a response to each prompt
        prompts = prompts_of(task, update, config)
        batch, texts = respond(task.policy, task.tokenizer, prompts, **config.sampling, rows=run.rows)
        prompts = prompts[run.rows]  # this process's

        # 2. Score: a reward for the response, a KL penalty for each of its tokens
        scores = torch.as_tensor(task.reward(prompts, texts), dtype=torch.float32).detach()
        scores = scores.to(model.policy.device).reshape(len(prompts))  # one each
        with torch.no_grad():
            logprobs, values, _ = model(batch)  # (batch, response)
        ref_logprobs = logprobs
        if run.kl_coef:
            ref_logprobs = reference_logprobs(model, elastic.by_name(reference), batch)
        batch |= dict(scores=scores, logprobs=logprobs, values=values, ref_logprobs=ref_logprobs)
        batch = run.gathered(batch)  # from here on each process has all rows
        logprobs, ref_logprobs, mask = batch["logprobs"], batch["ref_logprobs"], batch["mask"]
        rewards = shape_rewards(batch["scores"], logprobs, ref_logprobs, mask, run.kl_coef)
        stats = dict(train_reward=batch["scores"].mean(), entropy=-masked_mean(logprobs, mask))
        if run.kl_coef:
            stats |= dict(train_kl=(logprobs - ref_logprobs).sum(1).mean(), kl_coef=run.kl_coef)
        stats = run.mean_over_processes(stats)

        # 3. Advantages
        advantages, returns = gae(rewards, batch["values"], mask, config.gamma, config.lam)
        batch |= dict(advantages=whiten(advantages, mask), returns=returns)

        # 4. PPO epochs over minibatches, which are rows of the batch in a random order
        for _epoch in range(config.num_ppo_epochs):
            for rows in torch.randperm(config.batch_size).split(config.mini_batch_size or config.batch_size):
                minibatch = {name: tensor[rows[run.rows]] for name, tensor in batch.items()}
                minibatch_stats = ppo_backward(model, minibatch, config, run.accelerator)  # fills each p.grad
                minibatch_stats |= task.backward(len(rows)) if hasattr(task, "backward") else {}
                minibatch_stats |= optimizer_step(model, optimizer, config, run.accelerator)
                stats |= run.mean_over_processes(minibatch_stats)  # the last minibatch's stay
            if config.ema_update == "epoch":
                run.timed(elastic.update)
            if config.early_stop_kl and stats["policy_kl"] > config.early_stop_kl:
                break
        if hasattr(task, "learn"):  # in translation, the receiver
            stats = dict(**stats, **run.mean_over_processes(task.learn(prompts, texts) or {}))
        if config.kl_target:  # adapt it, at most 20 per cent in 10,000 responses (arXiv 1909.08593, 2.2)
            error = min(max(stats["train_kl"] / config.kl_target - 1, -0.2), 0.2)
            run.kl_coef *= 1 + error * config.batch_size / 10_000

        # 5. EMA <- decay * EMA + (1 - decay) * policy
        if config.ema_update == "update":
            run.timed(elastic.update)

        # 6. Reset: policy <- EMA, EMA <- start. (In a loop of your own, elastic.step() does 5 and 6.)
        resets = config.reset != "none" and update % config.reset_every == 0
        if resets:
            run.log(evaluate(task, model, elastic, config), "before reset", stats)
            run.timed(elastic.reset)

        # 7. Evaluate and log
        if resets or update % config.eval_every == 0 or update == config.updates:
            run.log(evaluate(task, model, elastic, config), "after reset" if resets else "", stats)
        run.save_if_due()

    if run.history[-1]["update"] < run.update:  # resumed with `updates` set to where it was stopped
        run.log(evaluate(task, model, elastic, config))
    return run.finish(task)


def actor_critic(policy, config, accelerator):
    """The policy with its value function, and the optimizer of both."""
    policy.eval()  # no dropout: the ratio of a policy to itself must be 1
    set_plain_generation(policy)
    model = ActorCritic(policy, config.temperature, config.separate_value_model, config.min_response_length)
    # evaluation_mode: no DDP around it, which would hide model.policy; optimizer_step() averages gradients
    model = accelerator.prepare_model(model, evaluation_mode=True)
    rate = config.learning_rate
    optimizer = adamw((model.policy, rate), (model.value, config.value_learning_rate or rate))
    return model, accelerator.prepare_optimizer(optimizer)


def adamw(*groups):
    """AdamW without weight decay, for (module, learning rate) pairs."""
    groups = [dict(params=[p for p in m.parameters() if p.requires_grad], lr=lr) for m, lr in groups]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def prompts_of(task, update, config):
    """The prompts of an update. They and torch's seed, set here, depend on the run's seed and the update's
    number, so that a resumed run goes on as if it had not been interrupted, and all processes draw alike."""
    torch.manual_seed((config.seed * 1_000_003 + update) % (2**32 - 1))
    prompts = list(task.prompts(config.batch_size, update))
    if len(prompts) != config.batch_size:
        raise ValueError(f"prompts() gave {len(prompts)}; expected {config.batch_size} (batch_size)")
    return prompts


def ppo_backward(model, minibatch, config, accelerator):
    """The gradient of ppo_loss, in `gradient_accumulation_steps` parts. Returns the numbers to watch."""
    clip = dict(cliprange=config.cliprange, cliprange_value=config.cliprange_value)
    settings = clip | dict(vf_coef=config.vf_coef, entropy_coef=config.entropy_coef)
    tokens, watched = accelerator.reduce(minibatch["mask"].sum().float(), "mean"), {}
    for rows in torch.arange(len(minibatch["mask"])).chunk(config.gradient_accumulation_steps):
        part = {name: tensor[rows] for name, tensor in minibatch.items()}
        share = part["mask"].sum() / tokens
        new = model(part, with_entropy=config.entropy_coef > 0)
        loss, stats = ppo_loss(*new, part, **settings)
        accelerator.backward(loss * share)
        for name, value in stats.items():
            watched[name] = watched.get(name, 0.0) + value * share.item()
    return watched


def optimizer_step(module, optimizer, config, accelerator):
    """One step on the gradient averaged over the processes. Returns the gradient's norm."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:  # one that had no part in the loss has a gradient of 0, on every process
        p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")
    norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return dict(gradient=norm.item())


@torch.no_grad()
def evaluate(task, model, elastic, config):
    """The task's metrics and `kl`, the KL to the start in nats per response; always the same seed, and the
    same on every process."""
    torch.manual_seed(0)
    responses, kl, start = [], [], elastic.by_name(elastic.init)
    for (prompts,) in chunks(task.validation_prompts):
        batch, texts = respond(task.policy, task.tokenizer, prompts, **config.sampling)
        logprobs, _, _ = model(batch, with_values=False)
        kl.append((logprobs - reference_logprobs(model, start, batch)).sum(1))
        responses += texts
    metrics = task.evaluate(responses)
    if not {"reward", "drift"} <= metrics.keys():
        raise ValueError(f"evaluate() gave {', '.join(metrics)}; expected reward, drift and other numbers")
    return dict(**metrics, kl=torch.cat(kl).mean().item())


# ================================================= 4. Tasks ================================================


class Task(Protocol):
    """What train() needs of a task; write your own and call train(config, task=MyTask(...)).

    `policy`: a transformers model with generate(). `trained`: what else learns, modules and optimizers by
    name, for the checkpoints. Optional: `learn(prompts, responses)`, called once the policy is updated, and
    `backward(n)`, which adds to the gradient of a minibatch of n responses; both return numbers to log.
    `footnote`, printed at the end."""

    policy: nn.Module
    tokenizer: object
    validation_prompts: list[str]
    trained: dict

    def prompts(self, n: int, update: int) -> list[str]:
        """The prompts of an update. A function of its arguments: a resumed run must see the same data."""

    def reward(self, prompts: list[str], responses: list[str]) -> list[float]:
        """One finite number per response."""

    def evaluate(self, responses: list[str]) -> dict:
        """Numbers: `reward`, `drift`, others. `responses`: one for each validation prompt, always sampled
        from the same seed. `samples`, {column: list of texts}, go to samples.md."""


class TranslationGame:
    """FR -> EN -> DE (Lee et al. 2019; the paper's section 4). The reward of the sender, our policy, is the
    receiver's mean log-likelihood per token of the German reference, which the receiver learns. Nobody checks
    the English between, so it drifts: `drift` is the human English's negative log-likelihood per token, in
    the embedded game only of sentences whose words the start translates rightly, and can only unlearn."""

    def __init__(self, config: "Config"):
        self.config, data, kind = config, translation_data(config), "Seq2SeqLM"
        self.sender_pairs, self.validation = data["sender"], data["validation"][: config.eval_size]
        self.known = data.get("known", data["validation"])[: config.eval_size]
        self.validation_prompts = [row["fr"] for row in self.validation]
        self.german = {row["fr"]: row["de"] for row in reversed(data["train"])}  # the first one counts
        french = list(dict.fromkeys(row["fr"] for row in data["train"]))
        self.prompts = functools.partial(shuffled, french, seed=config.seed)
        how = (likelihood_loss, config.pretrain_updates, config)
        sender, receiver = config.model, config.receiver_model
        sender = sender or pretrained("sender", kind, "marian", data["texts"], data["sender"], *how)
        self.policy, self.tokenizer = load_model("sender", sender, kind, config, config.max_length)
        receiver = receiver or pretrained("receiver", kind, "marian", data["texts"], data["receiver"], *how)
        self.receiver = load_model("receiver", receiver, kind, config, config.max_length)
        self.receiver_tokenizer, self.accelerator = self.receiver[1], processes()
        optimizer = adamw((self.receiver[0], config.receiver_learning_rate))
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.trained = {"receiver": self.receiver[0], "receiver_optimizer": self.optimizer}
        self.footnote = f"BLEU: {bleu(['a'], ['a'])[1]}"

    def reward(self, prompts, responses):
        german = [self.german[french] for french in prompts]
        return mean_logprobs(*self.receiver, responses, german, self.config.max_length)

    def learn(self, prompts, responses):
        german = [self.german[french] for french in prompts]
        logprobs, mask = target_logprobs(*self.receiver, responses, german, self.config.max_length)
        loss = -logprobs.sum() / self.accelerator.reduce(mask.sum().float(), "mean")  # of all processes
        self.accelerator.backward(loss)
        stats = optimizer_step(self.receiver[0], self.optimizer, self.config, self.accelerator)
        return dict(receiver_loss=loss.item(), receiver_gradient=stats["gradient"])

    def evaluate(self, responses):
        """Everything by greedy decoding. The sampled `responses` are not used."""
        french, human, reference = ([row[column] for row in self.validation] for column in ("fr", "en", "de"))
        known = [row["fr"] for row in self.known], [row["en"] for row in self.known]
        longest = self.config.max_length
        english = translate(self.policy, self.tokenizer, french, longest, self.config.response_length)
        german = translate(*self.receiver, english, longest, longest)
        rewards = mean_logprobs(*self.receiver, english, reference, longest)
        samples = {"French": french, "human English": human, "human German": reference}
        return dict(
            reward=sum(rewards) / len(rewards),
            drift=mean_nll(self.policy, self.tokenizer, *known, longest),
            bleu_de=bleu(german, reference)[0],
            bleu_en=bleu(english, human)[0],
            samples=samples | {"English": english, "German": german},
        )


class MockSentiment:
    """Continue a film review so that it sounds positive (the paper's section 5; RL4LMs' IMDB task), to a
    classifier. `drift` is the continuations' perplexity under another language model."""

    trained = {}

    def __init__(self, config: "Config"):
        self.config, data = config, review_data(config)
        held_out, texts = data["validation"][: config.eval_size], [text for text, _ in data["train"]]
        pairs = [(first, " " + rest) for first, _, rest in (t.partition(" ") for t in texts) if rest]
        how, longest = (texts, pairs, likelihood_loss, config.pretrain_updates, config), 2 * config.max_length
        self.longest = max(config.max_length, config.prompt_length + config.response_length)
        policy = config.model or pretrained("policy", "CausalLM", "gpt2", *how)
        self.policy, self.tokenizer = load_model("policy", policy, "CausalLM", config, longest)
        judge = config.language_model or pretrained("language model", "CausalLM", "gpt2", *how, seed=1)
        self.judge = load_model("language model", judge, "CausalLM", config, longest)
        labelled, kind = [(label, text) for text, label in data["train"]], "SequenceClassification"
        how = (texts, labelled, label_loss, config.reward_updates, config)
        scorer = config.reward_model or pretrained("classifier", kind, "gpt2", *how)
        self.classifier = load_model("classifier", scorer, kind, config, self.longest)
        if self.classifier[0].config.num_labels != 2:
            raise ValueError(f"reward_model {scorer!r} must have 2 labels, the second one positive")
        cuts, self.validation_prompts = (self._cut(rows) for rows in (data["train"], held_out))
        self.prompts = functools.partial(shuffled, cuts, seed=config.seed)
        self.gold, scores = data["gold"], self._positive([text for text, _ in held_out])
        right = sum((p > 0.5) == label for p, (_, label) in zip(scores, held_out, strict=True))
        self.footnote = f"held out: the classifier's accuracy {right / len(held_out):.3f}"

    def _cut(self, rows):
        """The first tokens of each review, as text."""
        texts, longest = [text for text, _ in rows], self.config.prompt_length
        tokens = self.tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        return [cut for cut in self.tokenizer.batch_decode(tokens, skip_special_tokens=True) if cut.strip()]

    def reward(self, prompts, responses):
        return self._positive([prompt + text for prompt, text in zip(prompts, responses, strict=True)])

    @torch.no_grad()
    def _positive(self, texts):
        """The classifier's probability of label 1."""
        return class_logits(*self.classifier, texts, self.longest).softmax(-1)[:, 1].tolist()

    def evaluate(self, responses):
        prompts, rewards = self.validation_prompts, self.reward(self.validation_prompts, responses)
        words = [response.split() for response in responses]
        return dict(
            reward=sum(rewards) / len(rewards),
            drift=math.exp(mean_nll(*self.judge, prompts, responses, self.config.max_length)),
            distinct_1=distinct(words, 1),
            distinct_2=distinct(words, 2),
            words=sum(map(len, words)) / len(words),
            **self.gold(prompts, responses),
            samples=dict(prompt=prompts, continuation=responses),
        )


class TechnicalQA:
    """Answer technical questions as a reward model likes it (the paper's section 6, StackLLaMA). `drift` is
    the policy's perplexity of human answers; pass@k, of functions that are run, is the alignment tax, which
    `pass_at_1_elsewhere` measures on prompts that RL never sees, in the embedded corpus."""

    trained = {}

    def __init__(self, config: "Config"):
        self.config, data = config, qa_data(config)
        # 1. Supervised fine-tuning on human answers
        sft, texts, start = config.model, data["texts"], config.model or "llama"
        if config.pretrain_updates:
            how = (texts, data["sft"], answer_loss, config.pretrain_updates, config)
            sft = pretrained("answers", "CausalLM", start, *how)
        # 2. A reward model from pairs: a new head on stage 1's model or, without --model, from scratch
        start, kind = sft if config.model else "llama", "SequenceClassification"
        how = (texts, data["preferences"], preference_loss, config.reward_updates, config)
        scorer = config.reward_model or pretrained("reward model", kind, start, *how, num_labels=1)
        # 3. The policy of RL: an adapter on stage 1's model
        longest = 2 * config.max_length
        self.scorer = load_model("reward model", scorer, kind, config, longest, num_labels=1)
        base, self.tokenizer = load_model("policy", sft, "CausalLM", config, longest)
        self.policy = lora(base, "CausalLM", config, config.seed)
        questions = self._fitting(data["questions"])
        self.problems, self.elsewhere = (data[kind][: config.eval_size] for kind in ("problems", "elsewhere"))
        self.prompts = functools.partial(shuffled, questions, seed=config.seed)
        self.human = dict(data["validation"])
        self.validation_prompts = self._fitting(list(self.human))[: config.eval_size]
        better, worse = (self._scores(answers) for answers in zip(*data["held_out"], strict=True))
        right = sum(a > b for a, b in zip(better, worse, strict=True))
        self.footnote = f"held out: the reward model's accuracy {right / len(better):.3f}"

    def _fitting(self, questions):
        """The questions of at most prompt_length tokens."""
        lengths, longest = map(len, self.tokenizer(questions)["input_ids"]), self.config.prompt_length
        fitting = [q for q, length in zip(questions, lengths, strict=True) if length <= longest]
        if not fitting:
            raise ValueError(f"no question has at most prompt_length ({longest}) tokens")
        return fitting

    def reward(self, prompts, responses):
        return self._scores([prompt + text for prompt, text in zip(prompts, responses, strict=True)])

    @torch.no_grad()
    def _scores(self, texts):
        """The raw scores of texts, question and answer, ended as in the reward model's training."""
        ended = [text + (self.scorer[1].eos_token or "") for text in texts]
        return class_logits(*self.scorer, ended, 2 * self.config.max_length)[:, 0].tolist()

    def evaluate(self, responses):
        prompts, rewards = self.validation_prompts, self.reward(self.validation_prompts, responses)
        human, longest = [self.human[p] + self.tokenizer.eos_token for p in prompts], self.config.max_length
        tax = pass_at_k(self.policy, self.tokenizer, self.problems, self.config)
        elsewhere = pass_at_k(self.policy, self.tokenizer, self.elsewhere, self.config)
        return dict(
            reward=sum(rewards) / len(rewards),
            drift=math.exp(mean_nll(self.policy, self.tokenizer, prompts, human, longest)),
            words=sum(len(response.split()) for response in responses) / len(responses),
            **tax,
            **{f"{name}_elsewhere": value for name, value in elsewhere.items()},
            samples=dict(question=prompts, answer=responses),
        )


TASKS = {"translation": TranslationGame, "imdb": MockSentiment, "qa": TechnicalQA}


# =============================================== 5. Settings ===============================================


NO_KL = dict(kl_coef=0.0, kl_target=0.0, kl_reference="init")
METHODS = {  # what each sets over the preset; for KL penalties see KL_COEFS too
    "elastic-reset": dict(reset="elastic"),
    "ppo": dict(reset="none", **NO_KL),
    "ppo-kl": dict(reset="none", kl_reference="init"),
    "reinforce": dict(reset="none", **NO_KL, num_ppo_epochs=1, mini_batch_size=0, vf_coef=0.0, lam=1.0),
    "fixed-sender": dict(reset="none", num_ppo_epochs=0),
    "reset-init": dict(reset="init"),
    "reset-ema": dict(reset="ema"),
    "ema-reference": dict(reset="none", kl_reference="ema"),  # WARP's first stage, EMA-PG
}


def expected(f):
    return "|".join(get_args(f.type)) or f.type.__name__


def tasks_of(f):
    """The tasks that a setting is for, which its help names first, as in "imdb, qa: ..."; else all."""
    tasks = f.metadata["help"].partition(": ")[0].split(", ")
    return tasks if {*tasks} <= TASKS.keys() else [*TASKS]


def flag(default, help, low=None, high=10**9, group=None):
    """A setting: its help, its range, which may end at another setting, and, on the first of a group, the
    group's title in --help."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, group=group))


@dataclass
class Config:
    """All settings of a run; configure() makes one of a preset, a method and what the user gave."""

    task: str = flag("custom", "what to train: translation, imdb or qa", group="The run")
    method: Literal[tuple(METHODS)] = flag("elastic-reset", "a named set of defaults")
    preset: Literal["mini", "paper"] = flag("mini", "minutes on two CPU cores, or the paper's setting")
    seed: int = flag(0, "of sampling and data order; pretraining has a fixed one", 0, 10**18)
    updates: int = flag(200, "PPO updates; each samples batch_size responses", 1)
    eval_every: int = flag(20, "updates between evaluations; each reset has one on either side", 1)
    eval_size: int = flag(256, "validation prompts (and programs) to evaluate on", 1)
    save_every: int = flag(20, "updates between checkpoints", 1)
    output_dir: str = flag("", "where the files go; empty: runs/<task>/<method>/seed<seed>")
    resume: bool = flag(False, "true: go on from the checkpoint in output_dir; needs the same settings")

    reset: Literal[tuple(RESET_RULES)] = flag("elastic", "a rule", group="Elastic Reset")
    reset_every: int = flag(40, "PPO updates between resets", 1)
    ema_decay: float = flag(0.97, "decay ** reset_every is the start's share of a reset", 0, 1)
    ema_update: Literal["update", "epoch"] = flag("update", "when the EMA moves")

    learning_rate: float = flag(2e-4, "AdamW's", 0, 1, group="PPO")
    value_learning_rate: float = flag(0.0, "of the value head or model; 0: learning_rate", 0, 1)
    batch_size: int = flag(128, "responses sampled per update", 1)
    mini_batch_size: int = flag(64, "responses per optimizer step; 0: batch_size", 0, "batch_size")
    num_ppo_epochs: int = flag(2, "passes over each batch; 0 keeps the policy fixed", 0)
    gradient_accumulation_steps: int = flag(1, "parts a minibatch is cut into, to save memory", 1)
    max_length: int = flag(64, "longest input or target text, in tokens; the rest is cut off", 2)
    response_length: int = flag(20, "longest response, in tokens", 1, "max_length")
    min_response_length: int = flag(0, "shortest: no EOS is sampled before", 0, "response_length")
    temperature: float = flag(1.0, "sampling temperature", 0.01, 100)
    gamma: float = flag(1.0, "discount", 0, 1)
    lam: float = flag(0.95, "lambda of the advantage estimation", 0, 1)
    cliprange: float = flag(0.2, "clip of the probability ratio", 0)
    cliprange_value: float = flag(0.2, "clip of the change of a value", 0)
    vf_coef: float = flag(0.1, "weight of the value loss; 0: no value function", 0)
    entropy_coef: float = flag(0.0, "weight of the entropy bonus", 0)
    max_grad_norm: float = flag(1.0, "longest gradient; longer ones are scaled down", 1e-9)
    early_stop_kl: float = flag(0.0, "end an update once the last minibatch's KL exceeds this; 0: never", 0)
    separate_value_model: bool = flag(False, "true: instead of a value head on the policy")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "of loaded weights; bfloat16 loses small steps")

    kl_coef: float = flag(0.0, "weight of the per-token KL penalty", 0, group="KL penalty")
    kl_target: float = flag(0.0, "adapt kl_coef to reach this KL, in nats per response; 0: keep it", 0)
    kl_reference: Literal["init", "ema"] = flag("init", "the penalty is measured from the start or the EMA")

    model: str = flag("", "hub name or folder of the policy; empty: from scratch", group="Models and data")
    reward_model: str = flag("", "imdb, qa: hub name or folder of a classifier or scorer")
    language_model: str = flag("", "imdb: hub name or folder of the model that measures perplexity")
    receiver_model: str = flag("", "translation: hub name or folder of the EN->DE receiver")
    data: str = flag("", "hub name or folder, also DIR:train[9000:]; empty: embedded data")
    validation_data: str = flag("", "held-out rows, as DIR:train[:200]; empty: data's split `validation`")
    sender_data: list = flag((), "translation: fr, en pairs to pretrain the sender on; several allowed")
    receiver_data: list = flag((), "translation: en, de pairs to pretrain the receiver on")
    sft_data: str = flag("", "qa: question, response_j for stage 1; empty: data")
    preference_data: str = flag("", "qa: question, response_j, response_k for stage 2; empty: data")
    programs: str = flag("", "qa: problems in HumanEval's format, to run the model's answers against")
    receiver_learning_rate: float = flag(1e-3, "translation: 0 keeps the receiver fixed", 0, 1)
    d_model: int = flag(96, "pretraining: width of a model, a multiple of 8", 8)
    layers: int = flag(1, "pretraining: layers (of the encoder and of the decoder)", 1)
    vocab_size: int = flag(0, "pretraining: BPE vocabulary; 0: one token a word", 0)
    prompt_length: int = flag(10, "imdb, qa: longest question, or cut of a review", 1, "max_length")
    pretrain_updates: int = flag(800, "pretraining: updates; 0: --model is fine-tuned already", 0)
    pretrain_batch_size: int = flag(128, "pretraining: examples per update", 1)
    pretrain_learning_rate: float = flag(2e-3, "pretraining: peak learning rate", 0, 1)
    reward_updates: int = flag(300, "imdb, qa: updates of a reward model trained here", 1)
    lora_r: int = flag(8, "qa: rank of the adapter, which alone is trained; alpha is twice that", 1)
    lora_dropout: float = flag(0.0, "qa: of stages 1 and 2; PPO has none", 0, 1)
    program_samples: int = flag(1, "qa: programs per problem; with more, pass@k too", 1)
    program_length: int = flag(72, "qa: longest program, in tokens", 1)
    program_temperature: float = flag(1.0, "qa: sampling temperature of programs", 0, 100)

    def __post_init__(self):
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            most, words = getattr(self, high) if isinstance(high, str) else high, get_args(f.type)
            types = {float: (int, float), list: (list, tuple)}.get(f.type) or (str if words else f.type)
            fine = isinstance(value, types) and isinstance(value, bool) == (f.type is bool)
            fine = fine and (low is None or low <= value <= most) and (not words or value in words)
            if not fine:
                limits = "" if low is None else f" from {low} to {most:,}" + f" ({high})" * (most != high)
                raise ValueError(f"{f.name} is {value!r}; expected {expected(f)}{limits}")
            if self.task in TASKS and self.task not in tasks_of(f) and value not in (f.default, []):
                raise ValueError(f"{f.name} is a setting of {', '.join(tasks_of(f))}, not of {self.task}")
        if self.d_model % 8:
            raise ValueError(f"d_model is {self.d_model}; expected a multiple of 8")
        if not self.kl_coef and (self.kl_target or self.kl_reference != "init" or self.method == "ppo-kl"):
            raise ValueError("kl_coef is 0, so there is no KL penalty to adapt or measure; try kl_coef 0.05")

    @property
    def sampling(self):
        """The settings of respond() that RL samples with."""
        how = dict(shortest=self.min_response_length, max_length=self.max_length)
        return dict(response_length=self.response_length, temperature=self.temperature, **how)


IWSLT = "hf://datasets/IWSLT/iwslt2017@refs%2Fconvert%2Fparquet/iwslt2017-{}-en/train/*.parquet"
STACK = "hf://datasets/lvwerra/stack-exchange-paired/data"
PRESETS = {
    "translation/mini": dict(
        updates=400, batch_size=16, mini_batch_size=16, reset_every=50, ema_decay=0.96, kl_coef=0.03,
        eval_every=50,
    ),
    "translation/paper": dict(  # what is known of it; decay and period are not
        data="romrawinjp/multi30k", sender_data=[IWSLT.format("fr")], receiver_data=[IWSLT.format("de")],
        d_model=256, layers=2, vocab_size=25_000, max_length=80, response_length=60, pretrain_updates=50_000,
        pretrain_batch_size=256, pretrain_learning_rate=5e-4, updates=10_000, batch_size=256,
        mini_batch_size=64, num_ppo_epochs=2, cliprange=0.1, learning_rate=1e-4, value_learning_rate=1e-3,
        receiver_learning_rate=1e-3, entropy_coef=0.01, vf_coef=0.5, ema_decay=0.995, reset_every=1000,
        eval_every=200, save_every=200, eval_size=1014,
    ),
    "imdb/mini": dict(
        layers=2, response_length=32, min_response_length=32, max_length=60, pretrain_updates=500,
        pretrain_batch_size=64, reward_updates=500, updates=240, batch_size=16, mini_batch_size=16,
        num_ppo_epochs=4, lam=1.0, learning_rate=1e-4, value_learning_rate=3e-3, reset_every=40,
        ema_decay=0.95, kl_coef=0.01, eval_size=200,
    ),
    "imdb/paper": dict(
        model="lvwerra/gpt2-imdb", reward_model="lvwerra/distilbert-imdb", language_model="gpt2",
        data="stanfordnlp/imdb", validation_data="stanfordnlp/imdb:test", prompt_length=64,
        response_length=48, min_response_length=48, max_length=512, updates=50, batch_size=27,
        mini_batch_size=1, num_ppo_epochs=5, learning_rate=1e-6, gamma=0.99, vf_coef=0.5, max_grad_norm=0.5,
        separate_value_model=True, kl_coef=0.001, kl_target=1.0, kl_reference="ema", ema_decay=0.995,
        reset_every=17, eval_size=1000, eval_every=5,
    ),  # an update: 1,280 tokens there, 27 responses of 48 here; a minibatch: 64 tokens there, 48 here
    "qa/mini": dict(
        layers=2, max_length=200, prompt_length=200, response_length=72, pretrain_updates=500,
        pretrain_batch_size=64, pretrain_learning_rate=3e-3, reward_updates=200, updates=120, batch_size=16,
        mini_batch_size=16, num_ppo_epochs=2, lam=1.0, vf_coef=0.01, cliprange_value=5.0, learning_rate=4e-4,
        value_learning_rate=3e-3, reset_every=30, ema_decay=0.93, kl_coef=0.1, eval_size=200, eval_every=15,
    ),
    "qa/paper": dict(
        model="huggyllama/llama-7b", dtype="bfloat16", lora_r=16, lora_dropout=0.05,
        sft_data=f"{STACK}/finetune/*.parquet:train[:200000]", data=f"{STACK}/rl/*.parquet:train[:100000]",
        preference_data=f"{STACK}/reward/*.parquet:train[:100000]",
        validation_data=f"{STACK}/evaluation/*.parquet:train[:4000]", programs="openai/openai_humaneval:test",
        program_samples=200, program_length=256, program_temperature=0.2, prompt_length=512, max_length=1024,
        response_length=128, min_response_length=32, pretrain_updates=5000, reward_updates=5000,
        pretrain_batch_size=16, pretrain_learning_rate=1e-5, updates=600, batch_size=128, mini_batch_size=128,
        gradient_accumulation_steps=8, num_ppo_epochs=4, learning_rate=1.41e-5, early_stop_kl=0.1,
        kl_coef=0.02, kl_target=6.0, ema_decay=0.995, ema_update="epoch", reset_every=260, eval_size=4000,
        eval_every=100,
    ),
}  # fmt: skip
KL_COEFS = {"translation/mini": 0.045, "translation/paper": 0.05, "qa/mini": 0.3}  # in place of resets


def configure(task="custom", method="elastic-reset", preset="mini", **given) -> Config:
    """Defaults < the task's preset < the method < `given`."""
    layers = PRESETS.get(f"{task}/{preset}", {}) | METHODS.get(method, {})
    if method in ("ppo-kl", "ema-reference"):
        layers["kl_coef"] = KL_COEFS.get(f"{task}/{preset}", layers.get("kl_coef", 0.0))
    return Config(task, method, preset, **layers | given)


# ========================================== 6. Models and data ============================================


def processes():
    """accelerate's view of this run's devices and processes. It has to be told to share work on the CPU."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    atexit.register(accelerator.end_training)  # a process that ends within a group may abort
    return accelerator


def progress(iterable, **settings):
    from tqdm import tqdm

    return tqdm(iterable, dynamic_ncols=True, disable=os.environ.get("LOCAL_RANK", "0") != "0", **settings)


def chunks(*lists, size=128):
    """Slices, `size` long, of parallel lists."""
    for i in range(0, len(lists[0]), size):
        yield tuple(items[i : i + size] for items in lists)


def shuffled(items, n, update, seed):
    """The n items of an update (from 1 on) in an endless run through `items`, each pass in a new order."""
    places = range((update - 1) * n, update * n)
    return [items[order(len(items), seed, i // len(items))[i % len(items)]] for i in places]


@functools.lru_cache(maxsize=4)
def order(n, seed, number):
    return random.Random(f"{seed} {number}").sample(range(n), n)


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
    logits, _ = logits_and_states(model, response_inputs(model, **source, responses=tokens), tokens.shape[1])
    forbid(logits, model)
    return torch.where(mask, gather_logprobs(logits, tokens), 0.0), mask


@torch.no_grad()
def mean_logprobs(model, tokenizer, sources, targets, max_length):
    """The mean log-likelihood of a token of each target, a list."""
    scored = [target_logprobs(model, tokenizer, *texts, max_length) for texts in chunks(sources, targets)]
    return [mean for logprobs, mask in scored for mean in (logprobs.sum(1) / mask.sum(1)).tolist()]


@torch.no_grad()
def mean_nll(model, tokenizer, sources, targets, max_length):
    """The targets' mean negative log-likelihood per token (of no token: of a uniform guess)."""
    parts = chunks(sources, targets, size=32)  # long texts over a large vocabulary take much memory
    scored = [target_logprobs(model, tokenizer, *texts, max_length) for texts in parts]
    tokens = sum(mask.sum().item() for _, mask in scored)
    return -sum(x.sum().item() for x, _ in scored) / tokens if tokens else math.log(len(tokenizer))


def class_logits(model, tokenizer, texts, max_length):
    """(batch, labels)"""
    how = dict(padding_side="right")
    parts = [tokens_of(tokenizer, part, max_length, model.device, **how) for (part,) in chunks(texts)]
    return torch.cat([model(**part).logits.float() for part in parts])


def translate(model, tokenizer, texts, max_length, response_length):
    """Greedy translations, a list of strings."""
    how = dict(response_length=response_length, temperature=0, max_length=max_length)
    return [text for (part,) in chunks(texts) for text in respond(model, tokenizer, part, **how)[1]]


def bleu(translations, references):
    """Corpus BLEU, 0 to 100, and sacrebleu's signature: how it was computed."""
    import sacrebleu

    metric = sacrebleu.BLEU()
    return metric.corpus_score(translations, [references]).score, str(metric.get_signature())


def distinct(texts, n):
    """Different n-grams, as a share of all in `texts`, lists of words."""
    grams = [gram for words in texts for gram in zip(*(words[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / max(1, len(grams))


def pass_at_k(policy, tokenizer, problems, config):
    """The unbiased estimate that one of k programs passes, of n of which c do (arXiv 2107.03374)."""
    n, programs = config.program_samples, []
    problems = [problem for problem in problems for _ in range(n)]
    for (part,) in chunks(problems):
        prompts, how = [p["prompt"] for p in part], (config.program_length, config.program_temperature)
        _, answers = respond(policy, tokenizer, prompts, *how)
        programs += [p["program_of"](answer) for p, answer in zip(part, answers, strict=True)]
    values = zip(run_programs(programs), problems, strict=True)
    right = [value == problem["expected"] for value, problem in values]
    counts = [sum(part) for (part,) in chunks(right, size=n)]
    chances = {k: [1 - math.comb(n - c, k) / math.comb(n, k) for c in counts] for k in (1, 10, 100) if k <= n}
    return {f"pass_at_{k}": sum(values) / len(values) for k, values in chances.items() if values}


def run_programs(programs: list[str], seconds=3.0, megabytes=256) -> list:
    """The value of the expression that ends each program, a text of Python; None where an exception or a
    limit ends it. Monty, a Python interpreter in Rust, runs them where no file, network or process is to be
    reached. It measures and must not be a reward: a solution that sets out to fake its own test can."""
    import string
    from concurrent.futures import ThreadPoolExecutor

    from pydantic_monty import ExternalModule, Monty, MontyCrashedError

    limits = dict(max_feed_duration_secs=seconds, max_memory=megabytes << 20, max_recursion_depth=1000)
    policy = dict(sleep="zero", random_start=dict(seed=0))  # a sleep would not count as time
    constants = ExternalModule({n: value for n, value in vars(string).items() if isinstance(value, str)})
    session = dict(limits=limits, os_policy=policy, external_modules=dict(string=constants))

    def value_of(program, again=True):
        try:
            with pool.checkout(**session) as interpreter:
                return interpreter.feed_run(program, print_callback=lambda stream, text: None)
        except Exception as error:  # the program's, a limit's, or that of a value which Python cannot hold
            killed = isinstance(error, MontyCrashedError) and not error.timed_out  # as by Ctrl-C
            return value_of(program, again=False) if again and killed else None

    with Monty() as pool, ThreadPoolExecutor() as threads:
        return list(threads.map(value_of, programs))


# Models are loaded by name, or trained here first and cached.
CACHE_VERSION = 2  # raise it when pretraining changes what it makes


def load_model(role, name, kind, config, longest=0, **settings):
    """A model with the head `kind`, as in transformers' AutoModelFor..., and its tokenizer, by hub name or
    from a folder. ValueError if it cannot be used for texts of `longest` tokens."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    settings |= dict(dtype=config.dtype, output_loading_info=True, trust_remote_code=False)
    try:
        model, found = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(name, **settings)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if hasattr(model, "peft_config"):
            raise ValueError("it is an adapter; merge it into its model first (merge_and_unload)")
        if found["missing_keys"] and (longest or kind != "SequenceClassification"):  # else a head to train
            raise ValueError(f"{min(found['missing_keys'])} is not trained")
        if max_positions(model) < longest:
            raise ValueError(f"it has {max_positions(model)} positions; {longest} are needed")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        if model.can_generate():
            model.generation_config.pad_token_id = tokenizer.pad_token_id
            set_plain_generation(model)
    except Exception as error:  # there is no end to what may be wrong with files
        raise ValueError(f"{role} {name!r} cannot be used as a {kind} model: {error}") from error
    tokenizer.padding_side = "right" if model.config.is_encoder_decoder else "left"  # where decoders go on
    for module in model.modules():
        if "Sinusoidal" in type(module).__name__:  # Marian's constants, which loading marks as trainable
            module.requires_grad_(False)
    return model.to(processes().device).eval(), tokenizer


def max_positions(model):
    """The longest text that a model takes, in tokens; many have no limit."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def set_plain_generation(policy):
    """Drops a model's beams, forced tokens and penalties, so that it samples from its own distribution."""
    from transformers import GenerationConfig

    names = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
    tokens = {name: getattr(policy.generation_config, name) for name in names}
    eos = tokens["eos_token_id"]
    if eos is None or tokens["pad_token_id"] is None:
        raise ValueError(f"model.generation_config names {tokens}; expected numbers")
    tokens["eos_token_id"] = eos if isinstance(eos, list) else [eos]
    policy.generation_config = GenerationConfig(**tokens)


def lora(model, kind, config, seed=0):
    """The model frozen, with an adapter on its linear layers that begins as the identity."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    task_type = dict(CausalLM="CAUSAL_LM", SequenceClassification="SEQ_CLS")[kind]
    shape = dict(r=config.lora_r, lora_alpha=2 * config.lora_r, lora_dropout=config.lora_dropout)
    return get_peft_model(model, LoraConfig(**shape, target_modules="all-linear", task_type=task_type))


def small_shape(family, tokenizer, config, **settings):
    """The transformers configuration of a small marian, gpt2 or llama."""
    from transformers import AutoConfig

    layers, wide, pad, eos = config.layers, 2 * config.d_model, tokenizer.pad_token_id, tokenizer.eos_token_id
    shape = dict(hidden_size=config.d_model, num_hidden_layers=layers, num_attention_heads=4)
    shape |= dict(max_position_embeddings=max(128, 2 * config.max_length), vocab_size=len(tokenizer))
    shape |= dict(pad_token_id=pad, eos_token_id=eos, bos_token_id=None)
    marian = dict(encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=wide, decoder_ffn_dim=wide)
    marian |= dict(decoder_attention_heads=4, decoder_start_token_id=pad, dropout=0.0, scale_embedding=True)
    gpt2 = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu")
    own = dict(marian=marian, gpt2=gpt2, llama=dict(intermediate_size=wide))
    return AutoConfig.for_model(family, **shape, **own[family], **settings)


def pretrained(role, kind, start, texts, examples, loss_of, updates, config, seed=0, **head):
    """The cached folder of a model fitted to `examples`. `start`: a family of small_shape() to train from
    scratch, with a tokenizer made of `texts`, or else a model that is trained through an adapter."""
    import transformers

    transformers.logging.disable_progress_bar()
    if not examples:
        raise ValueError(f"there are neither a model nor data to train one for the {role}")
    names = "d_model layers vocab_size max_length pretrain_batch_size pretrain_learning_rate max_grad_norm "
    names += "lora_r lora_dropout dtype"
    changed = [p.stat().st_mtime for p in sorted(Path(start).glob("*"))]  # of a model in a folder
    made_of = [CACHE_VERSION, torch.__version__, role, kind, start, changed, texts, examples, updates, seed]
    made_of += [getattr(config, name) for name in names.split()]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastic_reset"
    folder = cache / f"{role.replace(' ', '-')}-{digest}"
    with processes().main_process_first():
        if not folder.exists():
            torch.manual_seed(seed)
            if start in ("marian", "gpt2", "llama"):
                tokenizer = train_tokenizer(texts, config, append_eos=start == "marian")
                shape = small_shape(start, tokenizer, config, **head)
                model = getattr(transformers, f"AutoModelFor{kind}").from_config(shape)
            else:
                model, tokenizer = load_model(role, start, kind, config, **head)
                model = lora(model, kind, config)
            fit(model, tokenizer, examples, loss_of, updates, config, f"training the {role}")
            save_model(getattr(model, "merge_and_unload", lambda: model)(), tokenizer, folder)
    return str(folder)


def fit(model, tokenizer, examples, loss_of, updates, config, what):
    """Minimises `loss_of` on batches of examples: AdamW, a tenth of warm-up, then a linear decay."""
    from transformers import get_linear_schedule_with_warmup

    if model.can_generate():
        set_plain_generation(model)
    model.to(processes().device).train()
    optimizer = adamw((model, config.pretrain_learning_rate))
    schedule = get_linear_schedule_with_warmup(optimizer, updates // 10, updates)
    batches = batches_of_like_length(examples, config.pretrain_batch_size, updates)
    for columns in progress(batches, total=updates, desc=what):
        loss_of(model, tokenizer, *columns, config.max_length).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def batches_of_like_length(examples, n, updates, pool=32):
    """The columns of `updates` batches of n examples. A pool of batches is sorted by the length of the last
    column before it is cut into batches, so that little is padded; then these come in a random order."""
    for update in range(updates):
        if update % pool == 0:
            near = shuffled(examples, pool * n, update // pool + 1, seed=0)
            near.sort(key=lambda example: len(example[-1]))
            starts = random.Random(update).sample(range(0, pool * n, n), pool)
        start = starts[update % pool]
        yield list(zip(*near[start : start + n], strict=True))


def likelihood_loss(model, tokenizer, sources, targets, max_length):
    logprobs, mask = target_logprobs(model, tokenizer, sources, targets, max_length)
    return -logprobs.sum() / mask.sum()


def answer_loss(model, tokenizer, questions, answers, max_length):
    """Maximum likelihood of answers and their ends."""
    ended = [answer + tokenizer.eos_token for answer in answers]
    return likelihood_loss(model, tokenizer, questions, ended, max_length)


def label_loss(model, tokenizer, labels, texts, max_length):
    logits = class_logits(model, tokenizer, texts, max_length)
    return F.cross_entropy(logits, torch.tensor(labels, device=logits.device))


def preference_loss(model, tokenizer, better, worse, max_length):
    """- log sigmoid(score of the better answer - score of the worse one) (arXiv 2203.02155, equation 1)"""
    ended = [text + tokenizer.eos_token for text in better + worse]
    better, worse = class_logits(model, tokenizer, ended, max_length)[:, 0].chunk(2)
    return -F.logsigmoid(better - worse).mean()


def train_tokenizer(texts, config, append_eos=True):
    """A BPE tokenizer of `vocab_size` tokens or, with 0, one whose tokens are the words of `texts`. Without
    `append_eos` it is a decoder's: words bring the space before them, so that texts can be put together."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = dict(special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    if config.vocab_size:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=config.vocab_size, initial_alphabet=letters, **special)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=10**7, **special)
        if not append_eos:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n *| ?[^ \n]+"), "isolated")
            tokenizer.decoder = decoders.Fuse()
    tokenizer.train_from_iterator(texts, trainer)
    if append_eos:
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    names["padding_side"] = "right" if append_eos else "left"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=config.max_length, **names)


# Data are rows of a hub dataset or of a local folder, or one of the small worlds of section 7.
ASKED = "Question: {}\n\nAnswer: "  # the paper's


def name_and_split(spec):
    """ "DIR:train[:9000]" -> "DIR", "train[:9000]", which may be None"""
    return re.fullmatch(r"(.*?)(?::(\w+(?:\[[^\]]*\])?))?", spec, re.DOTALL).groups()


def load_rows(spec, columns):
    """Rows {column: text} of a hub dataset or a local folder of JSONL, CSV or Parquet, "DIR" or
    "DIR:train[:9000]"; `translation: {..}` is unpacked."""
    from datasets import disable_progress_bar, load_dataset, logging

    name, split = name_and_split(spec)
    source = dict(path="parquet", data_files=name) if name.startswith("hf://") else dict(path=name)
    disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said below, in one line
    try:
        rows = load_dataset(**source, split=split or "train").to_list() or [{}]  # which has no column
        kinds = {file.suffix for file in Path(name).rglob("*")} & {".csv", ".jsonl", ".parquet"}
        if len(kinds) > 1 or ".csv" in kinds and "__index_level_0__" in rows[0]:
            raise ValueError(f"it holds {' and '.join(sorted(kinds))} files, or columns without a name")
    except Exception as error:  # there is no end to what may be wrong with files
        why = str(error.__cause__ or error) or "it holds no rows"
        raise ValueError(f"data {spec} cannot be read: {why}") from error
    rows = [row["translation"] if isinstance(row.get("translation"), dict) else row for row in rows]
    for (number, row), column in itertools.product(enumerate(rows, 1), columns.split()):
        value, expected = row.get(column), "0 or 1" if column == "label" else "text"
        if not (str(value) in ("0", "1") if column == "label" else isinstance(value, str) and value.strip()):
            found = f"data {spec}, row {number}: {column} is {value!r:.40}"
            raise ValueError(f"{found}; expected {expected}; the columns are {', '.join(row)}")
    return rows


def mixed(rows):
    """The rows in another order, always the same: some come sorted by label."""
    return random.Random(0).sample(rows, len(rows))


def train_and_held_out(config, columns):
    """The rows of data, and those to evaluate on: of validation_data or of data's split `validation`."""
    beside = name_and_split(config.data)[0] + ":validation"
    return load_rows(config.data, columns), load_rows(config.validation_data or beside, columns)


def translation_data(config):
    """train, validation: rows of fr, en, de. sender, receiver: (source, target) pairs; texts: theirs."""
    if not config.data:
        return toy_translations()
    train, validation = train_and_held_out(config, "fr en de")
    sender = [(row["fr"], row["en"]) for spec in config.sender_data for row in load_rows(spec, "fr en")]
    receiver = [(row["en"], row["de"]) for spec in config.receiver_data for row in load_rows(spec, "en de")]
    texts = [text for pair in sender + receiver for text in pair]
    return dict(train=train, validation=validation, sender=sender, receiver=receiver, texts=texts)


def review_data(config):
    """train, validation: (text, label) pairs. gold(prompts, responses): metrics of the embedded corpus."""
    if not config.data:
        return toy_reviews()
    parts = train_and_held_out(config, "text label")
    train, validation = (mixed([(row["text"].strip(), int(row["label"])) for row in rows]) for rows in parts)
    return dict(train=train, validation=validation, gold=lambda prompts, responses: {})


def qa_data(config):
    """sft, validation: (question, human answer) pairs. preferences, held_out: pairs of texts, the better one
    first. problems and, with prompts unlike RL's, elsewhere: a prompt, program_of(response), and the value
    that run_programs() shall give it."""
    if not config.data:
        return toy_qa()
    train, validation = train_and_held_out(config, "question response_j")
    sft = load_rows(config.sft_data, "question response_j") if config.sft_data else train
    preferences = load_rows(config.preference_data or config.data, "question response_j response_k")
    problems = load_rows(config.programs, "prompt test entry_point") if config.programs else []
    for row in itertools.chain(train, validation, sft, preferences):
        row["prompt"] = ASKED.format(row["question"])
    pairs = mixed([[row["prompt"] + row[f"response_{r}"] for r in "jk"] for row in preferences])
    sft, validation = (mixed([(r["prompt"], r["response_j"]) for r in rows]) for rows in (sft, validation))
    held_out, questions = len(pairs) // 20 or 1, dict.fromkeys(row["prompt"] for row in train)
    return dict(
        sft=sft, preferences=pairs[held_out:], held_out=pairs[:held_out], validation=validation,
        questions=list(questions), texts=[t for pair in sft + pairs for t in pair],
        problems=list(map(humaneval, problems)), elsewhere=[],
    )  # fmt: skip


def humaneval(row):
    """A problem of HumanEval's. A completion ends where the function does."""

    def program_of(response):
        body = re.split(r"\n(?=[^\s])", response)[0]
        return f"{row['prompt']}{body}\n{row['test']}\ncheck({row['entry_point']})\n'passed'"

    return dict(prompt=row["prompt"], program_of=program_of, expected="passed")


# ========================================= 7. Three small worlds ==========================================


@functools.cache
def table(text, cell=None):
    """The rows of a text, divided by line ends or slashes, as lists of cells, divided by `cell` or blanks."""
    return [[c.strip() for c in row.split(cell)] for row in re.split(r"\n| / ", text)]


# The embedded game. English has no gender where French and German mark it, knows synonyms and puts the time
# first or last. The sender learns from a noisy corpus, as if mined from the web: every second word of a class
# comes out as its neighbour more often than not. The receiver's corpus is clean. So the sender has something
# to gain, the right words, and something to lose: English. Sentences of the other words alone, which the
# start knows, measure that loss. An entry: English (synonyms), French, German.
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
    """translation_data() of the embedded game; no sentence stands in two of its parts. `known`: sentences
    made of the words that the sender's corpus has right."""
    rng, rows, data = random.Random(seed), {}, {}
    for name, size in dict(train=20_000, validation=512, receiver=20_000, sender=20_000, known=512).items():
        before = len(rows)
        while len(rows) < before + size:
            row = toy_sentence(rng, 0.6 if name == "sender" else 0.0, every=2 if name == "known" else 1)
            rows.setdefault(row["fr"], row)
        data[name] = list(rows.values())[before:]
    texts = [text for row in data["receiver"] for text in row.values()]
    data["sender"] = [(row["fr"], row["en"]) for row in data["sender"]]
    data["receiver"] = [(row["en"], row["de"]) for row in data["receiver"]]
    return data | dict(texts=texts)


def toy_sentence(rng, noise, every=1):
    """A row: as "la petite voisine voit un chien noir", "die kleine Nachbarin sieht einen schwarzen Hund". It
    is made of every word of the tables or, with 2, of every second, those that noise leaves alone."""

    def draw(words, noise=0.0):
        entries = table(words)
        i = rng.randrange(0, len(entries), every)
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
    row = dict(fr=french, en=english, de=[*german, what[3], place[2]])
    return {language: " ".join(" ".join(words).replace("_", " ").split()) for language, words in row.items()}


# The embedded reviews. Five kinds of sentences praise (+), blame (-) or neither (0), which decides on the
# words where * is; half of a review's agree with its label. Since the grammar is known, so is the truth of a
# continuation: what parses, what it praises.
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
    """review_data() of the embedded corpus; no review stands in two of its parts."""
    rng, labels, data = random.Random(seed), {}, {}
    for name, size in dict(train=20_000, validation=400).items():
        before = len(labels)
        while len(labels) < before + size:
            label = rng.randrange(2)
            feelings = rng.choices([("-", "+")[label], "0", ("+", "-")[label]], [5, 3, 2], k=7)
            labels.setdefault(" ".join(toy_opinion(rng, feeling) for feeling in feelings), label)
        data[name] = list(labels.items())[before:]
    return data | dict(gold=toy_gold)


def toy_opinion(rng, feeling):
    """As "my friend enjoyed the plot at home ." """
    return filled(rng.choice(table(REVIEWS, "|"))[0], feeling, rng.choice)


def filled(sentence, feeling, choose):
    """The sentence with what `choose` makes of the words for each of its places."""
    places = sentence.replace("*", feeling)
    text = re.sub("[A-Z]+[-+0]?", lambda place: choose(REVIEW_WORDS[place[0]].split()), places)
    return text.replace("_", " ")


@functools.cache
def grammar(feeling):
    """What matches the sentences of a feeling."""
    sentences = "|".join(sentence for [sentence] in table(REVIEWS, "|")).replace(".", "[.]")
    return re.compile(filled(sentences, feeling, lambda words: f"({'|'.join(words)})"))


def toy_feeling(sentence):
    """ "+", "-", "0" or, of what the grammar does not generate, None."""
    return next((feeling for feeling in "+-0" if grammar(feeling).fullmatch(sentence)), None)


def toy_gold(prompts, responses):
    """Of the sentences that continuations complete: the share that parse, and how many more praise than
    blame, as a share (the true sentiment, -1 to 1)."""
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        complete = len(re.findall(r"[.!]", prompt))
        sentences = re.findall(r"[^.!]*[.!]", prompt + response)[complete:]
        found += [toy_feeling(sentence.strip()) for sentence in sentences]
    counts, n = {feeling: found.count(feeling) for feeling in "+-0"}, max(1, len(found))
    return dict(parses=sum(counts.values()) / n, sentiment=(counts["+"] - counts["-"]) / n)


# The embedded questions. A function is a base, one or two steps and perhaps an exception; an entry: words,
# lines of code, a dot for each further indentation. In the preference pairs manners tell more than code
# does: people like a polite and explained answer, and only half of the answers they like less are wrong. So a
# reward model learns manners first, and code hardly: that is what PPO finds. A quarter of the texts to learn
# from ask for a function by a comment and its first line, as no prompt of RL does.
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
EXPLANATIONS = ["It works for all whole numbers.", "Please tell me if it helps.", "It uses plain arithmetic."]
EXPLANATIONS += ["The result is kept in r.", "I tried it with small numbers."]
SIGNATURE = "def f(a, b):"
ARGUMENTS = [(3, 5), (7, 2), (4, 4), (0, 3), (5, 0), (1, 6), (-4, 3), (2, -3), (-2, -5)]


def toy_qa(seed=0):
    """qa_data() of the embedded corpus. The functions of validation and problems are no one else's; the
    held-out pairs and `elsewhere` are about them."""
    rng = random.Random(seed)
    steps = [some for n in (1, 2) for some in itertools.permutations(table(STEPS, "|"), n)]
    functions = list(itertools.product(table(FUNCTIONS, "|"), steps, [None, *table(EXCEPTIONS, "|")]))
    functions = rng.sample(functions, len(functions))
    validation, problems, train = functions[:200], functions[200:400], functions[400:]
    sft = [(toy_question(rng, f), toy_answer(rng, f)) for f in rng.choices(train, k=12_000)]
    bare = [(toy_comment(f), toy_code(f).removeprefix(SIGNATURE)) for f in rng.choices(train, k=4_000)]
    preferences = [toy_preference(rng, f) for f in rng.choices(train, k=12_000)]
    return dict(
        sft=sft + bare,
        preferences=preferences,
        held_out=[toy_preference(rng, f) for f in validation + problems],
        questions=[toy_question(rng, f) for f in rng.choices(train, k=8_000)],
        validation=[(toy_question(rng, f), toy_answer(rng, f)) for f in validation],
        problems=[toy_problem(f, toy_question(rng, f)) for f in problems],
        elsewhere=[toy_problem(f, toy_comment(f), SIGNATURE) for f in problems],
        texts=[text for pair in sft + bare + preferences for text in pair],
    )


def toy_words(function):
    """As "the sum of a and b, doubled"."""
    base, steps, exception = function
    return ", ".join(part[0] for part in (base, *steps, exception) if part)


def toy_question(rng, function):
    return ASKED.format(f"{rng.choice(ASKING)} {toy_words(function)}?")


def toy_comment(function):
    return f"# {toy_words(function)}\n{SIGNATURE}"


def toy_code(function):
    """Python source, as "def f(a, b):\\n    r = a + b\\n    return r"."""
    base, steps, exception = function
    lines = [line.replace(".", "    ") for part in (exception, base, *steps) if part for line in part[1:]]
    return "\n    ".join([SIGNATURE, *lines, "return r"])


def toy_answer(rng, function, polite=0.4, explained=0.4):
    """The function; with these probabilities introduced, and explained in one or two sentences."""
    lines = [rng.choice(INTRODUCTIONS)] if rng.random() < polite else []
    lines.append(toy_code(function))
    if rng.random() < explained:
        lines.append(" ".join(rng.sample(EXPLANATIONS, rng.choice([1, 1, 2]))))
    return "\n".join(lines)


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
    return rng.choice([entry for entry in table(FUNCTIONS, "|") if entry != base]), steps, exception


def toy_problem(function, prompt, begun=""):
    """A prompt, and what f returns for ARGUMENTS. An answer's first function counts, from `def` on as long as
    lines are indented; the prompt may have `begun` it."""
    names = {}
    exec(toy_code(function), names)  # our own text, not a model's

    def program_of(answer):  # Monty writes the values as text, which is safe to compare
        found = re.search(r"^def .*(?:\n[ \t]+.*)*", begun + answer, re.MULTILINE)
        return f"{found[0] if found else ''}\nf'{{[f(a, b) for a, b in {ARGUMENTS}]}}'"

    expected = str([names["f"](a, b) for a, b in ARGUMENTS])
    return dict(prompt=prompt, program_of=program_of, expected=expected)


# ====================================== 8. Files and command line =========================================


class Run:
    """A run's folder, log, checkpoints and progress. Of several processes the main one writes."""

    COUNTERS = ("update", "kl_coef", "history", "samples", "averaging")

    def __init__(self, config):
        self.config, self.accelerator = config, processes()
        self.folder = Path(config.output_dir or f"runs/{config.task}/{config.method}/seed{config.seed}")
        self.main, n = self.accelerator.is_main_process, self.accelerator.num_processes
        self.lock = claim(self.folder, config) if self.main else None
        if config.batch_size % n or config.mini_batch_size % n:
            raise ValueError(f"batch_size and mini_batch_size must be multiples of the {n} processes")
        self.rows = slice(self.accelerator.process_index, None, n)  # of a batch, this process's share
        self.checkpoints = [self.folder / "checkpoint" / name for name in ("state.pt", "previous.pt")]
        self.update, self.kl_coef, self.history, self.samples = 0, config.kl_coef, [], []
        self.averaging, self.began, self.stop, self.bar = 0.0, time.perf_counter(), 0, None

    def begin(self, parts):
        """Names the parts that checkpoints hold; when resuming, fills them from the last whole one."""
        self.parts, saved, problems = parts, None, []
        for path in filter(Path.is_file, self.checkpoints if self.config.resume else ()):
            try:
                saved = saved or self._read(path)
            except Exception as error:  # there is no end to what may be wrong with a file
                problems.append(f"checkpoint {path} is damaged or another's: {error}")
        if problems and not saved:
            raise ValueError("; ".join(problems))
        for problem in problems:
            print(f"{problem}; the one before is used", file=sys.stderr)
        if saved:
            if saved["update"] > self.config.updates:
                raise ValueError(f"{self.folder} has done {saved['update']} updates; set updates to more")
            for name, part in parts.items():
                part.load_state_dict(part.state_dict() | saved["parts"][name])
            vars(self).update({name: saved[name] for name in self.COUNTERS})
            self.began -= self.history[-1]["seconds"]
        if self.main:
            (self.folder / "samples.md").unlink(missing_ok=True)  # where it is, the run is complete
            write_text(self.folder / "config.json", json.dumps(asdict(self.config), indent=2))

    def _read(self, path):
        """A checkpoint. Raises an error unless it has the names, types, shapes and dtypes of this run's."""
        if zipfile.ZipFile(path).testzip():  # torch does not look at the checksums
            raise ValueError("a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            stepped = name == "optimizer" and self.config.num_ppo_epochs
            if isinstance(part, torch.optim.Optimizer) and (stepped or saved["parts"][name]["state"]):
                for p in [p for group in part.param_groups for p in group["params"]]:
                    p.grad = torch.zeros_like(p)
                part.step()  # along a gradient of 0, for the slots that are to be compared
                part.zero_grad()
        compare_layout(self._state(), saved, "it")
        return saved

    def _state(self):
        """What a checkpoint holds: the counters, and of each part everything but frozen weights."""
        state = {name: getattr(self, name) for name in self.COUNTERS} | dict(parts={})
        for name, part in self.parts.items():
            frozen = [n for n, p in getattr(part, "named_parameters", list)() if not p.requires_grad]
            state["parts"][name] = {n: x for n, x in part.state_dict().items() if n not in frozen}
        return state

    def updates(self):
        """The numbers of the updates to do. A signal to stop lets an update end; the same again does not."""

        def stop(signum, frame):
            self.stop = signum
            signal.signal(signum, before[signum])  # of a second one

        main_thread = threading.current_thread() is threading.main_thread()  # only there may handlers be set
        signals = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP") and main_thread]
        heeded = [s for s in signals if signal.getsignal(s) != signal.SIG_IGN]  # as nohup sets SIGHUP
        before = {s: signal.signal(s, stop) for s in heeded}
        how = dict(desc=f"RL, {self.config.method}", initial=self.update, total=self.config.updates)
        try:
            with progress(range(self.update + 1, self.config.updates + 1), **how) as self.bar:
                for update in self.bar:
                    self.update = update
                    yield update
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def save_if_due(self):
        """A checkpoint if it is time for one or the run was asked to stop, which raises KeyboardInterrupt."""
        stop = self.mean_over_processes(dict(stop=self.stop))["stop"]
        due = stop or self.update % self.config.save_every == 0 or self.update == self.config.updates
        if due and self.main:
            newest, previous = self.checkpoints
            with written_whole(newest) as aside, open(aside, "wb") as file:
                try:
                    torch.save(self._state(), file)
                except RuntimeError as error:  # behind which torch hides that a disk is full
                    raise error.__context__ or error from None
                if newest.exists():
                    os.replace(newest, previous)
        if stop:
            stopped = KeyboardInterrupt(f"stopped after update {self.update}; --resume true goes on")
            stopped.signum = self.stop or signal.SIGTERM  # of another process
            raise stopped

    def timed(self, work):
        """Does some work of the averages, and counts its seconds."""
        began = time.perf_counter()
        work()
        self.averaging += time.perf_counter() - began

    def gathered(self, batch):
        """A batch of this process's rows as that of all processes, in the order of the prompts."""
        batch = batch | dict(mask=batch["mask"].long())  # bool would not stay bool where it is padded
        whole = self.accelerator.gather(self.accelerator.pad_across_processes(batch, dim=1))
        n = self.accelerator.num_processes
        whole = {name: torch.stack(x.chunk(n), 1).flatten(0, 1) for name, x in whole.items()}
        return whole | dict(mask=whole["mask"].bool())

    def mean_over_processes(self, stats):
        """{name: number}, the mean over the processes. FloatingPointError if one is not finite."""
        values = torch.tensor([float(value) for value in stats.values()], device=self.accelerator.device)
        stats = dict(zip(stats, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        for name, value in stats.items():
            if not math.isfinite(value):
                where = f"checkpoints, if any yet, are in {self.folder}"
                raise FloatingPointError(f"update {self.update}: {name} is {value}; {where}")
        return stats

    def log(self, metrics, event="", stats=None):
        """One evaluation: a line of metrics.jsonl, samples, the bar. `event`: on which side of a reset."""
        columns = metrics.pop("samples", {})
        rows = list(zip(*columns.values(), strict=True))[:5]
        self.samples = [*self.samples[:1], [dict(zip(columns, map(str, row), strict=True)) for row in rows]]
        line = dict(update=self.update, event=event, seconds=round(time.perf_counter() - self.began, 2))
        line = dict(**line, **(stats or {}), **self.mean_over_processes(metrics))
        self.history.append(line)
        if self.main:
            write_text(self.folder / "metrics.jsonl", "".join(json.dumps(e) + "\n" for e in self.history))
        if self.bar is not None:
            numbers = f"reward {line['reward']:.3f}, drift {line['drift']:.3f}, kl {line['kl']:.1f}"
            self.bar.set_postfix_str(f"{numbers}, resets {self.parts['elastic'].resets}")

    def finish(self, task):
        """Writes models, samples, curve; prints the table of before and after; returns train()'s result."""
        start, end, elastic = self.history[0], self.history[-1], self.parts["elastic"]
        if self.main:
            for name, model in dict(model=task.policy, **task.trained).items():
                if hasattr(model, "save_pretrained"):
                    save_model(model, getattr(task, f"{name}_tokenizer", task.tokenizer), self.folder / name)
            with written_whole(self.folder / "curve.png") as aside:
                plot_run(self.history, aside)
            write_text(self.folder / "samples.md", samples_text(*self.samples, end["update"]))
            print(f"{'':<10}{'start':>10}   update {end['update']} {end['event']}")
            for name in [*start][3:]:  # after update, event, seconds
                print(f"{name:<10}{start[name]:>10.3f}   {end.get(name, math.nan):.3f}")
            share = f"{self.averaging / (time.perf_counter() - self.began):.2%} of the time"
            path = f"averages: {elastic.backend}, {share}"
            print(f"resets: {elastic.resets}; {path}; {getattr(task, 'footnote', '')}")
            print(f"files: {self.folder}")
            self.lock.release()
        return dict(start=start, end=end, history=self.history, output_dir=str(self.folder))


def claim(folder, config):
    """Makes the folder and returns a lock on it. ValueError or OSError if it is not this run's alone."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    now, file = json.loads(json.dumps(asdict(config))), folder / "config.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for path in folder.iterdir():  # through a link, files elsewhere would be replaced
        known = "reset_every" in before or path.name == ".lock" or path.suffix == ".partial"
        if path.is_symlink() or not known:
            raise ValueError(f"output_dir {folder} holds {path.name}, a link or a file of others")
    if before and not config.resume:
        raise ValueError(f"{folder} holds a run: go on with --resume true, or choose another output_dir")
    for name in now.keys() - {"resume", "output_dir", "updates", "save_every"}:
        if before and before.get(name) != now[name]:
            raise ValueError(f"{folder} holds a run with {name} {before.get(name)!r}, not {now[name]!r}")
    if (folder / "samples.md").exists() and not any(map(Path.is_file, folder.glob("checkpoint/*.pt"))):
        raise ValueError(f"{folder} holds a complete run without its checkpoint")
    lock = FileLock(folder / ".lock", is_singleton=True, thread_local=False)
    lock.acquire(timeout=0)  # another process may work there
    return lock


@contextlib.contextmanager
def written_whole(path):
    """Yields a place beside `path` for a file or a folder of files, which at the end take their places."""
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
    """Reward and drift over the updates, the resets marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    for axes, name in zip(figure.subplots(2, 1, sharex=True), ("reward", "drift"), strict=True):
        axes.plot([e["update"] for e in history], [e[name] for e in history], marker=".")
        for update in [e["update"] for e in history if e["event"] == "after reset"]:
            axes.axvline(update, color="0.7", linewidth=1, zorder=0)
        axes.set_ylabel(name)
    axes.set_xlabel("update (vertical lines: resets)")
    figure.savefig(path, format="png", dpi=150)


def samples_text(start, end, update):
    """samples.md: what became of the same prompts. Texts keep their lines and indentation."""
    lines = []
    for number, (before, after) in enumerate(zip(start, end, strict=True), 1):
        lines += [f"## {number}", ""]
        for column in before:
            lines.append(f"- {column}: {before[column]}")
            if after[column] != before[column]:
                lines.append(f"- {column}, **update {update}**: {after[column]}")
        lines.append("")
    return "\n".join(line.strip().replace("    ", "&emsp;").replace("\n", "<br>") for line in lines)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; --help lists all flags")  # in one line, without the usage


def parse_flags(argv):
    """The settings given, {name: value}, by flags and by the file of --config. Config checks them."""
    style = argparse.RawDescriptionHelpFormatter
    how = dict(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser = Parser("elastic_reset.py", description=__doc__, formatter_class=style, **how)
    parser.add_argument("--config", metavar="FILE", help="YAML of flags, or a run's config.json; flags win")
    group, presets = parser, {task: PRESETS[f"{task}/mini"] for task in TASKS}
    for f in fields(Config):
        group = parser.add_argument_group(f.metadata["group"]) if f.metadata["group"] else group
        others = "".join(f"; {task} {preset[f.name]}" for task, preset in presets.items() if f.name in preset)
        default = f" (default {f.default}{others})" if f.default not in ("", (), "custom") else ""
        how = dict(metavar=expected(f), nargs="+" if f.type is list else None)
        group.add_argument(f"--{f.name}", help=f.metadata["help"] + default, **how)
    given = vars(parser.parse_args(argv))
    if path := given.pop("config", None):
        import yaml

        with open(path, encoding="utf-8") as file:
            known = yaml.safe_load(file)  # JSON is YAML too
        if not isinstance(known, dict):
            raise ValueError(f"{path}: expected lines like kl_coef: 0.05")
        if {"method", "reset"} <= known.keys() and given.get("method", known["method"]) != known["method"]:
            raise ValueError(f"--method and --config {path}, which sets all that a method does: give one")
        given = known | given
    for name in given.keys() & {f.name for f in fields(Config) if f.type in (int, float, bool)}:
        with contextlib.suppress(AttributeError, ValueError):
            given[name] = json.loads(given[name].lower())  # True too
    return given


def main(argv=None) -> int:
    """The command line. Exit codes are 0 when done, 2 for unusable flags, data or files, 1 when training
    broke off, and 128 + n when signal n stopped it. Call train() from Python to see where an error arose."""
    try:
        warnings.simplefilter("ignore")  # other people's; what concerns the user is an error here
        train(configure(**parse_flags(sys.argv[1:] if argv is None else argv)))
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message = " ".join(str(error).split()) or type(error).__name__  # in one line
        print(f"elastic_reset.py: {message}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 128 + getattr(error, "signum", signal.SIGINT)
        return 1 if isinstance(error, (FloatingPointError, RuntimeError)) else 2


# ===================================== 9. Other people's trainers =========================================


class ElasticResetCallback:
    """Elastic Reset in transformers' Trainer and in those built on it, TRL's GRPO, RLOO, DPO and SFT:
    Trainer(..., callbacks=[ElasticResetCallback(decay=0.995, reset_every=17)]). It counts optimizer steps; of
    a PEFT model it averages and resets the adapter. It works on one process, with DDP and with FSDP2.
    `elastic`, the ElasticReset, is there once train() has begun.

    Checkpoints hold the averages in elastic_reset.safetensors, full tensors. A callback is not told what
    folder train(resume_from_checkpoint=...) goes on from: if it is not in output_dir, name it in
    TrainingArguments as well, as resume_from_checkpoint."""

    def __init__(self, decay=0.995, reset_every=17, reset="elastic"):
        self.settings, self.elastic = (decay, reset_every, reset), None

    def on_train_begin(self, args, state, control, model, **kwargs):
        """Begins at the model's weights or, with steps done, where their checkpoint left off."""
        from accelerate.state import AcceleratorState
        from safetensors import safe_open

        shared = AcceleratorState()
        fsdp1 = shared.distributed_type == "FSDP" and shared.fsdp_plugin.fsdp_version == 1
        if fsdp1 or shared.distributed_type == "DEEPSPEED" or args.auto_find_batch_size:
            raise ValueError("ElasticResetCallback works without DeepSpeed, FSDP1 and auto_find_batch_size")
        self.elastic = ElasticReset(model, *self.settings)
        if state.global_step:
            folder = args.resume_from_checkpoint or f"{args.output_dir}/checkpoint-{state.global_step}"
            with safe_open(f"{folder}/elastic_reset.safetensors", "pt") as file:
                if file.metadata() != dict(run=state.stateful_callbacks.get("elastic_reset_run")):
                    hint = "name the one resumed from in TrainingArguments(resume_from_checkpoint=...)"
                    raise ValueError(f"{folder} holds another run's averages; {hint}")
                self.elastic.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        self.run = state.stateful_callbacks["elastic_reset_run"] = os.urandom(8).hex()

    def on_step_end(self, args, state, control, **kwargs):
        self.elastic.step()

    def on_save(self, args, state, control, **kwargs):
        from safetensors.torch import save_file

        averages = {}
        for name, tensor in self.elastic.state_dict().items():
            if hasattr(tensor, "full_tensor"):  # all processes take part, for one parameter at a time
                tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()
            if args.should_save:
                averages[name] = tensor.cpu()
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            with written_whole(folder / "elastic_reset.safetensors") as aside:
                save_file(averages, aside, metadata=dict(run=self.run))

    def __getattr__(self, event):
        """The trainer's other events: nothing to do. (With transformers' base class, importing this file
        would need more than torch.)"""
        if not event.startswith("on_"):
            raise AttributeError(event)
        return lambda args, state, control, **kwargs: None


if __name__ == "__main__":
    sys.exit(main())
