"""Room 2: PPO's mathematics, each function against a slower or independent way to the same number."""

import copy
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MarianConfig, MarianMTModel

from elastic_reset import (
    ActorCritic,
    ElasticReset,
    KLCoefficient,
    gae,
    gather_logprobs,
    logprobs_and_values,
    masked_mean,
    ppo_loss,
    reference_logprobs,
    response_logits,
    sample,
    set_plain_generation,
    shape_rewards,
    whiten,
)

CLIP = dict(cliprange=0.2, cliprange_value=0.2, vf_coef=0.5, entropy_coef=0.0)


def marian(**settings):
    torch.manual_seed(0)
    shape = dict(vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    shape |= dict(
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32
    )
    ids = dict(pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None)
    return MarianMTModel(MarianConfig(**shape | ids | settings)).eval()


def gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    return model


@pytest.fixture(params=[marian, gpt2])
def policy(request):
    return request.param()


def prompts_for(policy, batch=6):
    ids = torch.randint(2, 30, (batch, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    if not policy.config.is_encoder_decoder:
        mask = mask.flip(1)
    return dict(input_ids=torch.where(mask.bool(), ids, 0), attention_mask=mask)


def rollout(policy, temperature=1.0):
    torch.manual_seed(2)
    batch = prompts_for(policy, 64)
    batch["responses"], batch["mask"] = sample(policy, batch, 12, temperature)
    return batch


def random_mask(batch=5, response=7):
    lengths = torch.randint(1, response + 1, (batch, 1), generator=torch.Generator().manual_seed(3))
    return torch.arange(response) < lengths


def test_gather_logprobs():
    logits, tokens = torch.randn(3, 4, 9), torch.randint(9, (3, 4))
    expected = torch.stack([logits.softmax(-1)[i, t, tokens[i, t]].log() for i in range(3) for t in range(4)])
    torch.testing.assert_close(gather_logprobs(logits, tokens).reshape(-1), expected)


def test_mask_ends_with_the_first_eos(policy):
    batch = rollout(policy)
    responses, mask = batch["responses"], batch["mask"]
    lengths = set()
    for row, m in zip(responses.tolist(), mask.tolist(), strict=True):
        length = row.index(1) + 1 if 1 in row else len(row)
        assert m == [i < length for i in range(len(row))]
        assert 0 not in row[:length]  # the padding is never sampled
        lengths.add(length)
    assert len(lengths) > 3


def test_sampling_follows_the_scored_distribution(policy):
    """First tokens of many samples against the scoring pass, both at temperature 2: a chi-square test."""
    one = {name: tensor[:1] for name, tensor in prompts_for(policy).items()}
    many = {name: tensor.expand(4000, -1) for name, tensor in one.items()}
    torch.manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(4)  # a distribution that is far from uniform
        responses, _ = sample(policy, many, 1, temperature=2.0)
        logits, _ = ActorCritic(policy, temperature=2.0)(**one, responses=responses[:1])
    expected = logits[0, 0].softmax(-1) * 4000
    counts = torch.bincount(responses[:, 0], minlength=30)
    seen = expected > 5
    chi_square = ((counts - expected)[seen].square() / expected[seen]).sum().item()
    assert counts[0] == 0 and chi_square < 2 * seen.sum().item() + 20


@pytest.mark.parametrize("shortest", [3, 8])
def test_no_eos_before_the_shortest_response(policy, shortest):
    """What may not be sampled has probability 0, and the rest of the distribution is that sampled from."""
    set_plain_generation(policy, shortest)
    with torch.no_grad():
        policy.get_output_embeddings().weight[1] += 1.0  # EOS becomes frequent
        prompts = prompts_for(policy, 400)
        responses, mask = sample(policy, prompts, 8)
        logits, _ = ActorCritic(policy)(**prompts, responses=responses)
    assert mask.sum(1).min() >= shortest
    assert not logits.softmax(-1)[:, :shortest, 1].any()
    if shortest < 8:
        ends = (responses[:, shortest] == 1) & mask[:, shortest]
        expected = logits.softmax(-1)[:, shortest, 1].mean().item()
        assert 0.02 < expected and ends.float().mean().item() == pytest.approx(expected, abs=0.08)


def test_padding_of_prompts_and_responses_does_not_matter(policy):
    """Each row scored alone, without any padding, gives the same log-probabilities."""
    batch = rollout(policy)
    model = ActorCritic(policy)
    together, _, entropy = logprobs_and_values(model, batch)
    assert (together[~batch["mask"]] == 0).all() and (entropy[~batch["mask"]] == 0).all()
    for i in range(8):
        real = batch["attention_mask"][i].bool()
        length = batch["mask"][i].sum()
        alone = dict(
            input_ids=batch["input_ids"][i : i + 1, real], attention_mask=torch.ones(1, real.sum(), dtype=int)
        )
        alone |= dict(
            responses=batch["responses"][i : i + 1, :length], mask=torch.ones(1, length, dtype=bool)
        )
        torch.testing.assert_close(
            logprobs_and_values(model, alone)[0][0], together[i, :length], rtol=1e-4, atol=1e-5
        )


def test_ratio_is_one_before_the_first_step(policy):
    batch = rollout(policy, temperature=0.7)
    model = ActorCritic(policy, temperature=0.7)
    first, again = logprobs_and_values(model, batch)[0], logprobs_and_values(model, batch)[0]
    assert torch.equal(first, again)
    sequence = first.sum(1)
    assert (sequence < 0).all() and torch.isfinite(sequence).all()


def test_rewards_sum_to_the_penalised_score():
    mask, scores = random_mask(), torch.randn(5)
    logprobs, ref_logprobs = torch.randn(5, 7) * mask, torch.randn(5, 7) * mask
    rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, 0.3)
    kl = (logprobs - ref_logprobs).sum(1)
    torch.testing.assert_close(rewards.sum(1), scores - 0.3 * kl)
    assert (rewards[~mask] == 0).all()
    for i, length in enumerate(mask.sum(1).tolist()):
        expected = scores[i] - 0.3 * (logprobs - ref_logprobs)[i, length - 1]
        torch.testing.assert_close(rewards[i, length - 1], expected)


def test_a_policy_surer_than_the_reference_is_punished():
    ones = torch.ones(1, 1, dtype=bool)
    rewards = shape_rewards(torch.zeros(1), torch.tensor([[-0.1]]), torch.tensor([[-2.0]]), ones, 0.5)
    assert rewards.item() == pytest.approx(-0.5 * 1.9)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.5, 0.3)])
def test_gae_against_the_double_sum(gamma, lam):
    mask = random_mask()
    rewards, values = torch.randn(5, 7) * mask, torch.randn(5, 7)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i, length in enumerate(mask.sum(1).tolist()):
        value = [*values[i, :length].tolist(), 0.0]
        for t in range(length):
            expected = sum(
                (gamma * lam) ** k * (rewards[i, t + k].item() + gamma * value[t + k + 1] - value[t + k])
                for k in range(length - t)
            )
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[i, t].item() == pytest.approx(expected + value[t], abs=1e-5)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_whiten_looks_at_unmasked_tokens_only():
    mask = random_mask()
    x = torch.randn(5, 7) * 3 + 2
    white = whiten(x, mask)
    torch.testing.assert_close(white[mask].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(white[mask].std(), torch.tensor(1.0))
    assert torch.equal(white, whiten(torch.where(mask, x, 1e6), mask))


def old_batch(mask, logprobs=None):
    draw = lambda: torch.randn(mask.shape) * mask  # noqa: E731
    return dict(
        logprobs=draw() if logprobs is None else logprobs,
        values=draw(),
        advantages=draw(),
        returns=draw(),
        mask=mask,
    )


def test_gradient_at_ratio_one_is_the_policy_gradient():
    mask = random_mask()
    logprobs = (torch.randn(5, 7) * mask).requires_grad_()
    old = old_batch(mask, logprobs.detach().clone())
    loss, watch = ppo_loss(logprobs, old["values"], torch.zeros(5, 7), old, **CLIP | dict(vf_coef=0.0))
    gradient = torch.autograd.grad(loss, logprobs)[0]
    torch.testing.assert_close(gradient, -old["advantages"] * mask / mask.sum())
    assert watch["clipfrac"] == 0 and watch["policy_kl"] == 0


def test_clipping_by_hand():
    """Advantage +1 at ratio 1.5 and -1 at ratio 0.5 are clipped: no gradient. The other two signs are not."""
    mask = torch.ones(1, 4, dtype=bool)
    logprobs = torch.tensor([[1.5, 0.5, 1.5, 0.5]]).log().requires_grad_()
    old = old_batch(mask, torch.zeros(1, 4)) | dict(advantages=torch.tensor([[1.0, -1.0, -1.0, 1.0]]))
    loss, watch = ppo_loss(logprobs, old["values"], torch.zeros(1, 4), old, **CLIP | dict(vf_coef=0.0))
    assert loss.item() == pytest.approx(-(1.2 - 0.8 - 1.5 + 0.5) / 4)
    assert (torch.autograd.grad(loss, logprobs)[0] != 0).tolist() == [[False, False, True, True]]
    assert watch["clipfrac"] == 1


def test_value_loss_by_hand():
    mask = torch.tensor([[True, True, False]])
    old = old_batch(mask, torch.zeros(1, 3))
    old |= dict(
        values=torch.zeros(1, 3), returns=torch.tensor([[1.0, 0.0, 9.0]]), advantages=torch.zeros(1, 3)
    )
    values = torch.tensor([[0.5, 0.1, 7.0]])  # the first is clipped to 0.2: the larger error counts
    loss, _ = ppo_loss(torch.zeros(1, 3), values, torch.zeros(1, 3), old, **CLIP)
    assert loss.item() == pytest.approx(0.5 * 0.5 * (0.8**2 + 0.1**2) / 2)


def test_entropy_is_a_bonus():
    mask = random_mask()
    old, entropy = old_batch(mask), torch.rand(5, 7) * mask
    without, _ = ppo_loss(old["logprobs"], old["values"], entropy, old, **CLIP)
    with_bonus, _ = ppo_loss(old["logprobs"], old["values"], entropy, old, **CLIP | dict(entropy_coef=0.1))
    torch.testing.assert_close(without - with_bonus, 0.1 * masked_mean(entropy, mask))


def test_entropy_of_the_policy(policy):
    batch = rollout(policy)
    model = ActorCritic(policy)
    logits, _ = model(batch["input_ids"], batch["attention_mask"], batch["responses"])
    p = logits.double().softmax(-1)
    expected = -(p * p.clamp(min=1e-300).log()).sum(-1) * batch["mask"]
    torch.testing.assert_close(logprobs_and_values(model, batch)[2].double(), expected, rtol=1e-5, atol=1e-5)


def test_what_lies_behind_the_eos_changes_nothing(policy):
    """Rewards, advantages, loss and gradients stay the same whatever tokens stand after the EOS."""
    batch, results = rollout(policy), []
    for filler in (0, 7):
        other = batch | dict(responses=torch.where(batch["mask"], batch["responses"], filler))
        model = ActorCritic(copy.deepcopy(policy))
        torch.nn.init.ones_(model.value_head.weight)
        logprobs, values, entropy = logprobs_and_values(model, other)
        rewards = shape_rewards(
            torch.ones(64), logprobs.detach(), torch.zeros_like(logprobs), batch["mask"], 0.1
        )
        advantages, returns = gae(rewards, values.detach(), batch["mask"], 0.9, 0.9)
        old = dict(
            logprobs=logprobs.detach() - 0.1, values=values.detach(), advantages=advantages, returns=returns
        )
        loss, _ = ppo_loss(
            logprobs, values, entropy, old | dict(mask=batch["mask"]), **CLIP | dict(entropy_coef=0.1)
        )
        loss.backward()
        results.append(
            [loss.detach(), advantages, *(p.grad for p in model.parameters() if p.grad is not None)]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("which", ["init", "ema"])
def test_reference_logprobs_against_a_real_copy(policy, which):
    model = ActorCritic(policy)
    frozen = copy.deepcopy(model)
    elastic = ElasticReset(policy, decay=0.5)
    batch = rollout(policy)
    with torch.no_grad():
        for p in elastic.params:
            p.add_(0.1 * torch.randn_like(p))
    elastic.update()
    if which == "ema":
        with elastic.averaged():
            frozen = copy.deepcopy(model)
    expected = logprobs_and_values(frozen, batch)[0]
    actual = reference_logprobs(model, elastic.by_name(getattr(elastic, which)), batch)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected)
    assert (logprobs_and_values(model, batch)[0] - expected).abs().max() > 0.01


def test_values_start_at_zero_and_do_not_see_the_token_they_judge(policy):
    batch = rollout(policy)
    model = ActorCritic(policy)
    assert (logprobs_and_values(model, batch)[1] == 0).all()
    torch.nn.init.normal_(model.value_head.weight)
    values = logprobs_and_values(model, batch)[1]
    changed = batch["responses"].clone()
    changed[:, 4] = 5
    again = logprobs_and_values(model, batch | dict(responses=changed))[1]
    torch.testing.assert_close(values[:, :5], again[:, :5])
    assert not torch.allclose(values[:, 5:], again[:, 5:])


def test_separate_value_model_leaves_the_policy_alone(policy):
    batch = rollout(policy)
    for separate in (False, True):
        model = ActorCritic(copy.deepcopy(policy), separate_value_model=separate)
        torch.nn.init.normal_(model.value_head.weight)
        logprobs_and_values(model, batch)[1].sum().backward()
        touched = any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.policy.parameters())
        assert touched is not separate


def test_adaptive_kl_coefficient():
    fixed, adaptive = KLCoefficient(0.1), KLCoefficient(0.1, target=6.0, horizon=1000)
    for coefficient in (fixed, adaptive):
        coefficient.adapt(kl=6.6, responses=100)
    assert fixed.value == 0.1 and adaptive.value == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    adaptive.adapt(kl=1e9, responses=100)  # an error counts 0.2 at most
    assert adaptive.value == pytest.approx(0.1 * 1.01 * 1.02)
    other = KLCoefficient(0.0, 6.0)
    other.load_state_dict(adaptive.state_dict())
    assert other.value == adaptive.value


def test_greedy_takes_the_most_likely_token(policy):
    batch = prompts_for(policy)
    responses, _ = sample(policy, batch, 4, temperature=0)
    logits, _ = response_logits(policy, **batch, responses=responses)
    assert torch.equal(responses[:, 0], logits[:, 0].argmax(-1))
    assert math.isfinite(gather_logprobs(logits, responses).sum().item())
