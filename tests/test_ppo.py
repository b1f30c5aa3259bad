"""Sections 3 and 4: PPO's mathematics and the policy, each function against a slower or independent way to
the same number."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
)

from elastic_reset import (
    ActorCritic,
    ElasticReset,
    gae,
    gather_logprobs,
    logits_and_states,
    ppo_loss,
    reference_logprobs,
    respond,
    response_inputs,
    response_texts,
    score_responses,
    shape_rewards,
    whiten,
)

CLIP = dict(cliprange=0.2, cliprange_value=0.2, vf_coef=0.5, entropy_coef=0.0)
IDS = dict(vocab_size=30, pad_token_id=0, eos_token_id=1)


def tokenizer():
    """Its words are w00 to w29, the padding w00, the end w01."""
    words = Tokenizer(models.WordLevel({word(i): i for i in range(30)}, unk_token=word(2)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=word(0), eos_token=word(1))


def word(token):
    return f"w{token:02}"


def marian():
    shape = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    shape |= dict(decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
    shape |= dict(max_position_embeddings=32, decoder_start_token_id=0, forced_eos_token_id=1, num_beams=4)
    return MarianMTModel(MarianConfig(**IDS, **shape))


def gpt2(**settings):
    shape = dict(n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1)
    return GPT2LMHeadModel(GPT2Config(**IDS, **shape, **settings))


def prepared(make):
    torch.manual_seed(0)
    return make().eval()


@pytest.fixture(params=[marian, gpt2])
def policy(request):
    return prepared(request.param)


PROMPTS = [" ".join(map(word, [2 + i, 29 - i, 4, 5, 6][: 2 + i % 4])) for i in range(8)]  # of 2 to 5 words


def rollout(policy, n=8, response_length=12, **settings):
    """n responses to each prompt, and the texts."""
    torch.manual_seed(2)
    return respond(policy, tokenizer(), PROMPTS * n, response_length=response_length, **settings)


def random_mask(batch=5, response=7):
    lengths = torch.randint(1, response + 1, (batch, 1), generator=torch.Generator().manual_seed(3))
    return torch.arange(response) < lengths


# The functions of tensors.


def test_gather_logprobs():
    logits, tokens = torch.randn(3, 4, 9), torch.randint(9, (3, 4))
    expected = torch.stack([logits.softmax(-1)[i, t, tokens[i, t]].log() for i in range(3) for t in range(4)])
    torch.testing.assert_close(gather_logprobs(logits, tokens).reshape(-1), expected)


def test_rewards_are_the_penalties_and_at_the_last_token_the_score():
    mask, scores = random_mask(), torch.randn(5)
    logprobs, ref_logprobs = torch.randn(5, 7), torch.randn(5, 7)
    rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, 0.3)
    for i, length in enumerate(mask.sum(1).tolist()):
        for t in range(7):
            expected = -0.3 * (logprobs[i, t] - ref_logprobs[i, t]).item() if t < length else 0.0
            expected += scores[i].item() if t == length - 1 else 0.0
            assert rewards[i, t].item() == pytest.approx(expected, abs=1e-6)


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
    names = ("logprobs", "values", "advantages", "returns")
    old = {name: torch.randn(mask.shape) * mask for name in names} | dict(mask=mask)
    return old if logprobs is None else old | dict(logprobs=logprobs)


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
    old = dict(logprobs=torch.zeros(1, 3), values=torch.zeros(1, 3), advantages=torch.zeros(1, 3), mask=mask)
    old |= dict(returns=torch.tensor([[1.0, 0.0, 9.0]]))
    values = torch.tensor([[0.5, 0.1, 7.0]])  # the first is clipped to 0.2: the larger error counts
    loss, watch = ppo_loss(torch.zeros(1, 3), values, torch.zeros(1, 3), old, **CLIP)
    assert watch["value_loss"] == pytest.approx(0.5 * (0.8**2 + 0.1**2) / 2)
    assert loss.item() == watch["loss"] == pytest.approx(0.5 * watch["value_loss"])


def test_entropy_is_a_bonus():
    mask = random_mask()
    old, entropy = old_batch(mask), torch.rand(5, 7)
    without, _ = ppo_loss(old["logprobs"], old["values"], entropy, old, **CLIP)
    with_bonus, _ = ppo_loss(old["logprobs"], old["values"], entropy, old, **CLIP | dict(entropy_coef=0.1))
    torch.testing.assert_close(without - with_bonus, 0.1 * entropy[mask].mean())


# Sampling.


def test_texts_are_the_responses_up_to_their_ends(policy):
    """And the mask ends with the first EOS; the padding before that is never sampled."""
    batch, texts = rollout(policy)
    lengths = set()
    for row, mask, text in zip(batch["responses"].tolist(), batch["mask"].tolist(), texts, strict=True):
        length = row.index(1) + 1 if 1 in row else len(row)
        assert mask == [i < length for i in range(len(row))]
        assert text.split() == [word(token) for token in row[:length] if token != 1]
        assert 0 not in row[:length]
        lengths.add(length)
    assert len(lengths) > 3
    prompts = [[word(token) for token in row if token] for row in batch["input_ids"].tolist()]
    assert prompts == [prompt.split() for prompt in PROMPTS * 8]


def test_any_of_several_ends_ends_a_response(policy):
    policy.generation_config.eos_token_id = [1, 7, 8]
    batch, _ = rollout(policy)
    firsts = [row[mask].tolist() for row, mask in zip(batch["responses"], batch["mask"], strict=True)]
    assert {row[-1] for row in firsts} >= {1, 7, 8}
    assert not {1, 7, 8} & {token for row in firsts for token in row[:-1]}


def probabilities_of(model, batch):
    """Those that the model gives to each token at each place of the responses, (batch, response, vocab)."""
    with torch.no_grad():
        columns = []
        for t in range(batch["responses"].shape[1]):
            for token in range(30):
                changed = batch["responses"].clone()
                changed[:, t] = token
                everything = torch.ones_like(batch["mask"])
                columns.append(model(batch | dict(responses=changed, mask=everything))[0][:, t].exp())
    return torch.stack(columns, -1).unflatten(-1, (-1, 30))


def chi_square(tokens, probabilities):
    """Per degree of freedom: about 1 if the tokens were drawn with these probabilities."""
    expected = probabilities * len(tokens)
    seen = expected > 5
    counts = torch.bincount(tokens, minlength=len(expected))
    return ((counts - expected)[seen].square() / expected[seen]).sum().item() / seen.sum().item()


@pytest.mark.parametrize("temperature, shortest", [(2.0, 0), (0.5, 0), (1.0, 1)])
def test_sampling_follows_the_scored_distribution(policy, temperature, shortest):
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(4)  # a distribution that is far from uniform
        torch.manual_seed(0)
        how = dict(temperature=temperature, min_response_length=shortest)
        batch, _ = respond(policy, tokenizer(), PROMPTS[3:4] * 4000, response_length=1, **how)
        first = {name: tensor[:1] for name, tensor in batch.items()}
        probabilities = probabilities_of(ActorCritic(policy, **how), first)[0, 0]
        others = probabilities_of(ActorCritic(policy, temperature=1.5 * temperature), first)[0, 0]
    assert probabilities[0] == 0 and (probabilities[1] == 0) == (shortest > 0)
    assert chi_square(batch["responses"][:, 0], probabilities) < 2.5
    assert chi_square(batch["responses"][:, 0], others) > 2.5


def test_no_end_before_the_shortest_response(policy):
    layer = policy.get_output_embeddings()
    layer.bias = torch.nn.Parameter(2.0 * torch.eye(30)[1])  # EOS becomes frequent
    with torch.no_grad():
        batch, _ = rollout(policy, 50, 8, min_response_length=3)
        ends = probabilities_of(ActorCritic(policy, min_response_length=3), batch)[:, :, 1]
    assert batch["mask"].sum(1).min() == 4 and not ends[:, :3].any()
    expected = ends[:, 3].mean().item()
    assert 0.05 < expected < 0.95
    assert (batch["responses"][:, 3] == 1).float().mean().item() == pytest.approx(expected, abs=0.08)


def test_greedy_takes_the_likeliest_tokens(policy):
    batch, _ = rollout(policy, 1, 4, temperature=0)
    with torch.no_grad():
        likeliest = probabilities_of(ActorCritic(policy), batch).argmax(-1)
    assert torch.equal(likeliest[batch["mask"]], batch["responses"][batch["mask"]])


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_habits_of_the_model_below_an_adapter_are_dropped(task_type):
    """PEFT's generate() asks the model, the adapter or both, by the adapter's kind."""
    policy = prepared(gpt2)
    torch.nn.init.zeros_(policy.lm_head.weight)  # every token is as likely as any other
    own = policy.generation_config
    own.suppress_tokens, own.repetition_penalty = list(range(10, 20)), 100.0
    settings = dict(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type=task_type)
    adapted = get_peft_model(policy, LoraConfig(**settings)).eval()
    batch, _ = rollout(adapted)
    seen = batch["responses"][batch["mask"]]
    assert set(seen.tolist()) == set(range(1, 30)) and policy.generation_config is own
    probabilities = torch.tensor([0.0] + [1 / 29] * 29)
    assert chi_square(seen, probabilities) < 2.5


def test_a_response_is_decoded_alone_where_its_prompt_s_text_changes():
    """This tokenizer tidies "it 's" up to "it's", so behind the prompt "it '" no response would begin."""
    pieces = ["it", " '", "s", " fine", "!"]
    words = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="!"))
    words.decoder = decoders.Fuse()
    tidy = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=True)
    prompts, responses = torch.tensor([[0, 1], [0, 3]]), torch.tensor([[2, 3], [1, 2]])
    assert tidy.decode([0, 1]) == "it '" and tidy.decode([0, 1, 2, 3]) == "it's fine"
    assert response_texts(tidy, prompts, responses) == ["s fine", "'s"]


def test_prompts_that_do_not_fit():
    with pytest.raises(ValueError, match="prompts have 2 to 5 tokens; expected 1 to 4"):
        respond(prepared(gpt2), tokenizer(), PROMPTS, response_length=28)
    with pytest.raises(ValueError, match="prompts have 0 to 1 tokens"):
        respond(prepared(gpt2), tokenizer(), [word(5), ""], response_length=4)
    batch, _ = respond(prepared(marian), tokenizer(), PROMPTS, response_length=4, max_length=3)
    assert batch["attention_mask"].sum(1).tolist() == [min(3, len(prompt.split())) for prompt in PROMPTS]


# Scoring.


def test_padding_does_not_matter(policy):
    """Each row scored alone, without any padding, gives the same log-probabilities and values."""
    batch, _ = rollout(policy)
    model = ActorCritic(policy)
    torch.nn.init.normal_(model.value["head"].weight)
    together = model(batch, with_entropy=True)
    assert all((x[~batch["mask"]] == 0).all() for x in together) and not batch["mask"].all()
    for i in range(8):
        real, length = batch["attention_mask"][i].bool(), batch["mask"][i].sum()
        alone = dict(input_ids=batch["input_ids"][i : i + 1, real], mask=batch["mask"][i : i + 1, :length])
        alone |= dict(attention_mask=torch.ones_like(alone["input_ids"]))
        alone |= dict(responses=batch["responses"][i : i + 1, :length])
        for x, y in zip(model(alone, with_entropy=True), together, strict=True):
            torch.testing.assert_close(x[0], y[i, :length], rtol=1e-4, atol=1e-5)


def test_what_lies_behind_the_end_changes_no_loss_and_no_gradient(policy):
    (batch, _), results = rollout(policy), []
    for filler in (0, 7):
        other = batch | dict(responses=torch.where(batch["mask"], batch["responses"], filler))
        model = ActorCritic(copy.deepcopy(policy))
        torch.nn.init.ones_(model.value["head"].weight)
        new = model(other, with_entropy=True)
        logprobs, values, _ = (x.detach() for x in new)
        zeros = torch.zeros_like(logprobs)
        rewards = shape_rewards(torch.ones(64), logprobs, zeros, batch["mask"], 0.1)
        advantages, returns = gae(rewards, values, batch["mask"], 0.9, 0.9)
        old = other | dict(logprobs=logprobs - 0.1, values=values, advantages=advantages, returns=returns)
        loss, _ = ppo_loss(*new, old, **CLIP | dict(entropy_coef=0.1))
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert all(gradient.isfinite().all() for gradient in gradients.values()) and len(gradients) > 10
        results.append(dict(loss=loss.detach(), advantages=advantages) | gradients)
    torch.testing.assert_close(*results)


def test_ratio_is_one_before_the_first_step(policy):
    batch, _ = rollout(policy, temperature=0.7)
    model = ActorCritic(policy, temperature=0.7)
    first, again = (model(batch, entropy)[0] for entropy in (False, True))
    assert torch.equal(first, again) and (first.sum(1) < 0).all()


def test_entropy_where_it_is_asked_for(policy):
    batch, _ = rollout(policy)
    model = ActorCritic(policy, temperature=0.8, min_response_length=2)
    p = probabilities_of(model, batch).double()
    expected = -torch.special.xlogy(p, p).sum(-1) * batch["mask"]
    without, entropy = (model(batch, asked)[2] for asked in (False, True))
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)
    assert (without == 0).all() and not without.requires_grad


def test_gradient_is_that_of_logits_without_the_forbidden_tokens(policy):
    """forbid() writes into logits that autograd knows of: against log-softmax over the other tokens alone."""
    batch, _ = rollout(policy, 1, 6, min_response_length=6)
    own, slow = ActorCritic(policy, 0.7, min_response_length=6), copy.deepcopy(policy)
    own_logprobs, _, entropy = own(batch, with_entropy=True)
    inputs = response_inputs(slow, batch["input_ids"], batch["attention_mask"], batch["responses"])
    logits = slow(**inputs).logits[:, -6:, 2:] / 0.7
    slow_logprobs = gather_logprobs(logits, batch["responses"] - 2)
    torch.testing.assert_close(own_logprobs, slow_logprobs)
    (own_logprobs.sum() + entropy.sum()).backward()
    (slow_logprobs.sum() + torch.distributions.Categorical(logits=logits).entropy().sum()).backward()
    torch.testing.assert_close(
        {n: p.grad for n, p in policy.named_parameters() if p.grad is not None},
        {n: p.grad for n, p in slow.named_parameters() if p.grad is not None},
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_logits_are_computed_for_the_responses_alone(policy):
    batch, _ = rollout(policy)
    n, rows = batch["responses"].shape[1], []
    full = policy(**response_inputs(policy, batch["input_ids"], batch["attention_mask"], batch["responses"]))
    layer = policy.get_output_embeddings()
    layer.register_forward_hook(lambda module, arguments, logits: rows.append(logits.shape[1]))
    inputs = response_inputs(policy, batch["input_ids"], batch["attention_mask"], batch["responses"])
    logits, states = logits_and_states(policy, inputs, n)
    assert rows == [n] and states.shape == (64, n, 16)
    torch.testing.assert_close(logits, full.logits[:, -n:].float())
    policy(**inputs)
    assert rows[1] == full.logits.shape[1]  # other passes are as before


@pytest.mark.parametrize("which", ["init", "ema"])
def test_reference_logprobs_against_a_real_copy(policy, which):
    model = ActorCritic(policy, temperature=0.8, separate_value_model=True)
    frozen, elastic = copy.deepcopy(model), ElasticReset(policy, decay=0.5)
    batch, _ = rollout(policy)
    with torch.no_grad():
        for p in elastic.params:
            p.add_(0.1 * torch.randn_like(p))
    elastic.update()
    if which == "ema":
        with elastic.averaged():
            frozen = copy.deepcopy(model)
    expected, own = (m(batch)[0] for m in (frozen, model))
    actual = reference_logprobs(model, elastic, getattr(elastic, which), batch)
    assert not actual.requires_grad and (own - expected).abs().max() > 0.01
    torch.testing.assert_close(actual, expected.detach())
    assert torch.equal(model(batch)[0], own)  # the policy is as before


def test_scoring_in_parts_gives_the_same(policy):
    batch, _ = rollout(policy)
    model, sizes = ActorCritic(policy, temperature=0.8, separate_value_model=True), []
    torch.nn.init.normal_(model.value["head"].weight)
    logprobs, values, _ = model(batch)
    model.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0]["mask"])))
    own = score_responses(model, batch, 5)
    assert sizes == [13, 13, 13, 13, 12] and not own[0].requires_grad and not own[1].requires_grad
    torch.testing.assert_close(own, (logprobs.detach(), values.detach()), rtol=1e-4, atol=1e-5)
    without, _ = score_responses(model, batch, 5, with_values=False)
    torch.testing.assert_close(without, own[0])


def test_a_reference_leaves_every_parameter_the_object_it_was():
    """Also in a module under two names."""
    policy = prepared(gpt2)
    first, second = policy.transformer.h
    second.mlp = first.mlp
    model, elastic = ActorCritic(policy), ElasticReset(policy, decay=0.5)
    batch, _ = rollout(policy)
    start = model(batch)[0].detach()
    with torch.no_grad():
        for p in elastic.params:
            p.add_(0.1 * torch.randn_like(p))
    before = dict(model.named_parameters(remove_duplicate=False))
    values = {name: p.detach().clone() for name, p in before.items()}
    torch.testing.assert_close(reference_logprobs(model, elastic, elastic.init, batch, parts=3), start)
    for name, p in model.named_parameters(remove_duplicate=False):
        assert p is before[name] and torch.equal(p, values[name]), name
    assert second.mlp is first.mlp and not torch.allclose(model(batch)[0], start)


# The value function.


class Wrapped(torch.nn.Module):
    """An output layer that says its weight and nothing else of itself."""

    def __init__(self, layer):
        super().__init__()
        self.weight = layer.weight

    def forward(self, states):
        return torch.nn.functional.linear(states, self.weight)


def test_the_value_head_is_as_wide_as_the_output_layer():
    policy = prepared(gpt2)
    batch, _ = rollout(policy)
    expected = ActorCritic(policy)(batch)
    policy.set_output_embeddings(Wrapped(policy.get_output_embeddings()))
    model = ActorCritic(policy)
    assert model.value["head"].weight.shape == (1, 16)
    torch.testing.assert_close(model(batch), expected)


def test_values_start_at_zero_and_do_not_see_the_token_they_judge(policy):
    batch, _ = rollout(policy, min_response_length=12)
    model = ActorCritic(policy)
    assert (model(batch)[1] == 0).all()
    torch.nn.init.normal_(model.value["head"].weight)
    values = model(batch)[1]
    changed = batch["responses"].clone()
    changed[:, 4] = 5
    again = model(batch | dict(responses=changed))[1]
    torch.testing.assert_close(values[:, :5], again[:, :5])
    assert not torch.allclose(values[:, 5:], again[:, 5:])


def untied_gpt2():
    return gpt2(tie_word_embeddings=False)


@pytest.mark.parametrize("make", [marian, gpt2, untied_gpt2])
def test_separate_value_model_is_a_copy_without_the_output_layer(make):
    policy = prepared(make)
    batch, _ = rollout(policy, 1)
    model, whole = ActorCritic(policy, separate_value_model=True), copy.deepcopy(policy)
    torch.nn.init.normal_(model.value["head"].weight)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(2)  # the policy goes on, the value model does not follow
    values = model(batch)[1]
    inputs = response_inputs(whole, batch["input_ids"], batch["attention_mask"], batch["responses"])
    output = whole(**inputs, output_hidden_states=True)
    hidden = output.decoder_hidden_states if policy.config.is_encoder_decoder else output.hidden_states
    expected = hidden[-1][:, -values.shape[1] :] @ model.value["head"].weight[0]
    torch.testing.assert_close(values, expected * batch["mask"], rtol=1e-4, atol=1e-5)

    values.sum().backward()
    assert all(p.grad is None for p in model.policy.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.value["model"].parameters())
    assert not {id(p) for p in model.value.parameters()} & {id(p) for p in policy.parameters()}
    sizes = [p.numel() for name, p in whole.named_parameters() if not name.startswith("lm_head")]
    assert sum(p.numel() for p in model.value["model"].parameters()) == sum(sizes)


def test_value_head_teaches_the_policy(policy):
    batch, _ = rollout(policy, 1)
    model = ActorCritic(policy)
    torch.nn.init.normal_(model.value["head"].weight)
    model(batch)[1].sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())
