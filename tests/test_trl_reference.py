"""Sections 3 and 4 against TRL 1.12.0: one PPO update of a tiny model, recorded by trl_reference.py, term by
term.

Differences by design, and how the terms are compared all the same:

- TRL counts one position more, the one after an early EOS (`mask_p1`): its state has a value, and the score
  is given there. Ours gives the score at the EOS, where the episode ends. Given `mask_p1`, our functions do
  as TRL's; given `mask`, they agree where no response ends early (the run "full") or nothing is discounted
  (the run "undiscounted").
- TRL's value loss is a mean over `mask_p1`, its policy loss one over `mask`; ours has one mask for both.
- TRL's approxkl and entropy are means over all positions, padding included; ours are over `mask`, and the
  entropy is computed where the loss has a bonus for it: with a coefficient of 1 it is what the loss loses.
- TRL's clipfrac counts the tokens whose loss is clipped, ours those whose ratio is out of range: never fewer.
- TRL's old logprobs are those of generate(); ours come from a forward pass. They differ by rounding.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_ppo import tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from elastic_reset import (
    ActorCritic,
    ElasticReset,
    gae,
    gather_logprobs,
    ppo_loss,
    reference_logprobs,
    respond,
    shape_rewards,
    whiten,
)

with safe_open(Path(__file__).with_name("trl_reference.safetensors"), "pt") as file:
    ABOUT = json.loads(file.metadata()["about"])
    FIGURES = {name: file.get_tensor(name) for name in file.keys()}

every_run = pytest.mark.parametrize("run", ABOUT["settings"])
PER_TOKEN = "logprobs values advantages returns mask mask_p1 responses".split()


def close(ours, theirs, mask=None, atol=1e-6, rtol=1e-5):
    if mask is not None:
        ours, theirs = ours[mask], theirs[mask]
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), atol=atol, rtol=rtol)


nearly = functools.partial(close, atol=1e-5)  # after whole models and steps, whose rounding adds up


def part(prefix):
    """The figures whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in FIGURES.items() if name.startswith(prefix)}


def setting(run, *names):
    return [ABOUT["settings"][run][name] for name in names]


def clips(run):
    names = "cliprange", "cliprange_value", "vf_coef"
    return dict(zip(names, setting(run, *names), strict=True), entropy_coef=0.0)


def actor_critic(run):
    """Our model with TRL's weights: its value model has a head without a bias."""
    policy = GPT2LMHeadModel(GPT2Config(**ABOUT["gpt2"]))
    policy.load_state_dict(part("policy/"))
    model = ActorCritic(policy, *setting(run, "temperature"), separate_value_model=True)
    model.value["model"].load_state_dict(part("value/transformer."))
    model.value["head"].load_state_dict({"weight": FIGURES["value/score.weight"], "bias": torch.zeros(1)})
    model.value["head"].bias.requires_grad_(False)
    return model


def batch_of(trl):
    attention_mask = (trl["queries"] != ABOUT["gpt2"]["pad_token_id"]).long()
    return dict(input_ids=trl["queries"], attention_mask=attention_mask) | {
        name: trl[name] for name in PER_TOKEN
    }


def scored(model, batch):
    """model(batch), with the values' mask that of TRL."""
    logprobs, _, entropy = model(batch)
    _, values, _ = model(batch | dict(mask=batch["mask_p1"]))
    return logprobs, values, entropy


def reference(model, batch):
    """The log-probabilities under TRL's reference model, whose weights ours takes for the time of a pass."""
    elastic, weights = ElasticReset(model.policy), part("reference/")
    return reference_logprobs(model, elastic, [weights[name] for name in elastic.names], batch)


def loss_over_two_masks(new, batch, clips):
    """Our policy loss over `mask` and our value loss over `mask_p1`, in two calls."""
    policy_loss, policy_watch = ppo_loss(*new, batch, **clips | dict(vf_coef=0.0))
    no_policy = dict(advantages=torch.zeros_like(batch["advantages"]), mask=batch["mask_p1"])
    value_loss, value_watch = ppo_loss(*new, batch | no_policy, **clips)
    return policy_loss + value_loss, policy_watch | dict(value_loss=value_watch["value_loss"])


def minibatches(run):
    """Pairs of TRL's figures of a step and the rows of the batch that it took."""
    trl = part(f"{run}/")
    names = "new_logprobs vpred logits ratio pg_loss vf_loss loss".split()
    names += "approxkl_stats pg_clipfrac_stats entropy_stats".split()
    for step, rows in enumerate(trl["micro_batch_inds"]):
        yield {name: trl[name][step] for name in names}, {name: trl[name][rows] for name in PER_TOKEN}


def test_mask():
    trl, policy = part("ended/"), actor_critic("ended").policy
    policy.generate = lambda input_ids, **_: torch.cat([input_ids, trl["responses"]], 1)
    prompts = tokenizer().batch_decode(trl["queries"], skip_special_tokens=True)
    batch, _ = respond(policy, tokenizer(), prompts, response_length=trl["responses"].shape[1])
    for ours, theirs in dict(input_ids="queries", responses="responses", mask="mask").items():
        assert batch[ours].equal(trl[theirs])


@every_run
def test_gather_logprobs(run):
    trl = part(f"{run}/")
    close(gather_logprobs(trl["sampling_logits"], trl["responses"]), trl["logprobs"], trl["mask"])
    for step, rows in minibatches(run):
        close(gather_logprobs(step["logits"], rows["responses"]), step["new_logprobs"], rows["mask"])


@every_run
def test_forward_pass(run):
    trl, model = part(f"{run}/"), actor_critic(run)
    logprobs, values, _ = scored(model, batch_of(trl))
    nearly(logprobs, trl["logprobs"], trl["mask"])
    nearly(values, trl["values"])
    nearly(reference(model, batch_of(trl)), trl["ref_logprobs"], trl["mask"])


@every_run
def test_rewards(run):
    trl = part(f"{run}/")
    inputs = trl["scores"], trl["logprobs"], trl["ref_logprobs"]
    close(shape_rewards(*inputs, trl["mask_p1"], *setting(run, "kl_coef")), trl["rewards"])
    ours = shape_rewards(*inputs, trl["mask"], *setting(run, "kl_coef"))
    close(ours.sum(1), trl["rewards"].sum(1))
    longest = trl["mask"].all(1)
    close(ours[longest], trl["rewards"][longest])


@every_run
def test_gae(run):
    trl = part(f"{run}/")
    advantages, returns = gae(trl["rewards"], trl["values"], trl["mask_p1"], *setting(run, "gamma", "lam"))
    close(advantages, trl["unwhitened_advantages"])
    close(returns, trl["returns"])


@every_run
def test_gae_of_episodes_that_end_with_the_eos(run):
    """Ours end with the score s; TRL's go on to a state worth V' and get s there. That much, and no more, are
    the advantages off; in the runs "full" and "undiscounted" it is 0."""
    trl, (gamma, lam, kl_coef) = part(f"{run}/"), setting(run, "gamma", "lam", "kl_coef")
    rewards = shape_rewards(trl["scores"], trl["logprobs"], trl["ref_logprobs"], trl["mask"], kl_coef)
    ours, _ = gae(rewards, trl["values"], trl["mask"], gamma, lam)
    after = trl["mask_p1"] & ~trl["mask"]
    early, last = after.any(1), trl["mask"].sum(1, keepdim=True) - 1
    value_after = (trl["values"] * after).sum(1)
    off = (gamma * (1 - lam) * value_after - (1 - gamma * lam) * trl["scores"]) * early
    decay = (gamma * lam) ** (last - torch.arange(ours.shape[1]))
    close(ours + off.unsqueeze(1) * decay, trl["unwhitened_advantages"], trl["mask"])
    if run != "ended":
        close(ours, trl["unwhitened_advantages"], trl["mask"])


@every_run
def test_whiten(run):
    trl = part(f"{run}/")
    close(whiten(trl["unwhitened_advantages"], trl["mask"]), trl["advantages"])


@every_run
def test_loss(run):
    for trl, rows in minibatches(run):
        new = trl["new_logprobs"], trl["vpred"], torch.zeros_like(trl["vpred"])
        loss, watch = loss_over_two_masks(new, rows, clips(run))
        close(loss, trl["loss"])
        close(watch["policy_loss"], trl["pg_loss"])
        close(watch["value_loss"], trl["vf_loss"])
        close(watch["policy_kl"] * rows["mask"].float().mean(), trl["approxkl_stats"])
        out_of_range = (trl["ratio"] - 1).abs() > clips(run)["cliprange"]
        with_effect = out_of_range & ((trl["ratio"] > 1) == (rows["advantages"] > 0))
        close(watch["clipfrac"], out_of_range[rows["mask"]].float().mean())
        close(with_effect[rows["mask"]].float().mean(), trl["pg_clipfrac_stats"])


def test_loss_in_one_call():
    """Where no response ends early the masks are one, and so is the call."""
    for trl, rows in minibatches("full"):
        entropy = torch.distributions.Categorical(logits=trl["logits"]).entropy()
        new = trl["new_logprobs"], trl["vpred"], entropy
        loss, watch = ppo_loss(*new, rows, **clips("full"))
        close(loss, trl["loss"])
        with_bonus, _ = ppo_loss(*new, rows, **clips("full") | dict(entropy_coef=1.0))
        close(loss - with_bonus, trl["entropy_stats"])
        close(watch["policy_loss"], trl["pg_loss"])
        close(watch["value_loss"], trl["vf_loss"])
        close(watch["policy_kl"], trl["approxkl_stats"])


@every_run
def test_figures_hold_what_they_should_test(run):
    trl = part(f"{run}/")
    assert trl["mask"].equal(trl["mask_p1"]) == (run == "full")
    assert (trl["logprobs"] - trl["ref_logprobs"]).abs().max() > 0.1
    for clipped in ("pg_clipfrac_stats", "vf_clipfrac_stats"):
        assert 0.05 < trl[clipped].max() < 0.95


@every_run
def test_whole_update(run):
    """From TRL's first weights, tokens and scores alone, our functions get to its last weights."""
    trl, model = part(f"{run}/"), actor_critic(run)
    gamma, lam, kl_coef, learning_rate = setting(run, "gamma", "lam", "kl_coef", "learning_rate")
    batch = batch_of(trl)
    with torch.no_grad():
        logprobs, values, _ = scored(model, batch)
    ref_logprobs = reference(model, batch)
    rewards = shape_rewards(trl["scores"], logprobs, ref_logprobs, batch["mask_p1"], kl_coef)
    advantages, returns = gae(rewards, values, batch["mask_p1"], gamma, lam)
    advantages = whiten(advantages, batch["mask"])
    batch |= dict(logprobs=logprobs, values=values, advantages=advantages, returns=returns)

    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    for step, rows in enumerate(trl["micro_batch_inds"]):
        minibatch = {name: tensor[rows] for name, tensor in batch.items()}
        new = scored(model, minibatch)
        nearly(new[0], trl["new_logprobs"][step], minibatch["mask"])
        nearly(new[1], trl["vpred"][step])
        loss, _ = loss_over_two_masks(new, minibatch, clips(run))
        nearly(loss, trl["loss"][step])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, tensor in part(f"{run}/after/policy/").items():
        nearly(model.policy.state_dict()[name], tensor)
    for name, tensor in part(f"{run}/after/value/transformer.").items():
        nearly(model.value["model"].state_dict()[name], tensor)
    nearly(model.value["head"].weight, trl["after/value/score.weight"])
