"""Models that people bring. Most cases were reported of other libraries; F1 to F15 are what happened here."""

import contextlib
import copy
import gc
import io
import json
import types
import weakref

import pytest
import torch
import transformers
from families import (
    DECODERS,
    HIDDEN,
    TRANSLATORS,
    model_of,
    peft_policies,
    verdict,
    word_tokenizer,
)

from elastic_reset import (
    ActorCritic,
    ElasticReset,
    ElasticResetCallback,
    TechnicalQA,
    check_sampling,
    class_logits,
    configure,
    load_model,
    mean_nll,
    recomputed_layers,
    reference_logprobs,
    respond,
    response_texts,
    score_responses,
    shuffled,
    target_logprobs,
    token_ids,
    train,
    translate,
)

PROMPTS = [f"w{5 + i:02} " * (1 + i % 4) for i in range(6)]
GPT2 = DECODERS["gpt2"]


def small(family="gpt2", kind="CausalLM", **more):
    shape = DECODERS.get(family) or TRANSLATORS[family]
    return model_of(family, shape | more, kind)


class Own:
    """A task of one's own: the more words of 10 to 19, the better."""

    def __init__(self, policy, tokenizer=None):
        self.policy = policy
        self.tokenizer = tokenizer or word_tokenizer()
        self.validation_prompts = PROMPTS[:4]

    def prompts(self, n, update):
        return shuffled(PROMPTS, n, update, 0)

    def reward(self, prompts, responses):
        return [float(response.count("w1")) for response in responses]

    def evaluate(self, responses):
        return dict(reward=sum(self.reward(None, responses)), drift=0.0)


def run(task, folder, **more):
    settings = dict(updates=2, batch_size=6, mini_batch_size=6, eval_every=1, save_every=1, reset_every=2)
    settings |= dict(response_length=5, learning_rate=1e-2, output_dir=str(folder)) | more
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return train(configure(**settings), task=task)


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


PEFT = dict(peft_policies())


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_decoders_are_exact(name):
    assert verdict(lambda: small(name))[0] == "exact"


@pytest.mark.parametrize("name", ["bart", "t5", "mbart"])
def test_translators_are_exact(name):
    assert verdict(lambda: small(name, "Seq2SeqLM"), add_eos=True)[0] == "exact"


@pytest.mark.parametrize("name", ["LoRA (untied)", "VB-LoRA (untied)", "LoRA, trainable tokens (tied)"])
def test_adapters_are_exact(name):
    assert verdict(PEFT[name])[0] == "exact"


@pytest.mark.parametrize("name", ["prompt tuning (untied)", "roberta", "rwkv", "prophetnet", "bart decoder"])
def test_what_is_sampled_otherwise_than_scored_is_refused(name):
    """F6, F13"""
    make = PEFT.get(name)
    if make is None:
        kind = "CausalLM" if name in DECODERS else "Seq2SeqLM"
        make = lambda: small(name, kind)  # noqa: E731
    assert verdict(make, add_eos=name == "prophetnet")[0] == "refused"


def test_a_refusal_comes_before_the_run_and_names_causes(tmp_path):
    """F6"""
    policy = PEFT["prompt tuning (untied)"]()
    still_there = weakref.ref(policy)
    with pytest.raises(ValueError, match="PeftModelForCausalLM cannot be trained.*prompt learning"):
        run(Own(policy), tmp_path / "run")
    del policy
    gc.collect()
    assert still_there() is None  # nothing holds what was refused


def test_dropout_is_off_when_a_policy_comes_in_training_mode(tmp_path):
    run(Own(small().train()), tmp_path / "run")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_comparison_lets_rounding_pass_and_leaves_the_model(dtype):
    policy = small("llama").to(dtype)
    before = copy.deepcopy(policy.state_dict())
    check_sampling(Own(policy), configure(response_length=12))
    assert all(torch.equal(before[name], p) for name, p in policy.state_dict().items())


def test_modules_with_two_names_learn(tmp_path):
    """F1: a VB-LoRA bank."""
    policy = PEFT["VB-LoRA (untied)"]()
    before = {p: p.detach().clone() for p in policy.parameters() if p.requires_grad}
    run(Own(policy), tmp_path / "run", updates=1)
    after = [p for p in policy.parameters() if p.requires_grad]
    assert all(p in before for p in after)
    assert all(not torch.equal(p, before[p]) for p in after if p.shape[-1] == 16)
    assert any(p.shape[-1] == 16 for p in after)


def test_the_reference_leaves_modules_with_two_names():
    """F1: a block that stands at two places."""
    policy = small()
    policy.transformer.h[1].mlp = policy.transformer.h[0].mlp
    before = {name: (p, p.detach().clone()) for name, p in policy.named_parameters()}
    elastic = ElasticReset(policy)
    batch, _ = respond(policy, word_tokenizer(), PROMPTS, response_length=4)
    start, _ = score_responses(ActorCritic(policy), batch)
    for p in elastic.init:
        p.mul_(0.5)
    assert not torch.allclose(reference_logprobs(ActorCritic(policy), elastic, elastic.init, batch), start)
    for name, p in policy.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1])


# ---- F2: a classifier's padding


TEXTS = ["w07 w08", "w09 w10 w11 w12 w13", "w14", "w04 w15 w04"]


def llama_classifier(pad):
    shape = transformers.LlamaConfig(
        **HIDDEN, max_position_embeddings=512, vocab_size=40, pad_token_id=pad, eos_token_id=1, num_labels=1
    )
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(shape).eval()


@pytest.mark.parametrize("tokenizer_pad", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("pad", [None, 1, 4])
def test_a_classifier_scores_as_it_does_alone(tmp_path, pad, add_eos, tokenizer_pad):
    tokenizer = word_tokenizer(pad=tokenizer_pad, add_eos=add_eos)
    folder = saved(llama_classifier(pad), tokenizer, tmp_path)
    config = configure("qa")
    scorer, loaded = load_model("reward model", folder, "SequenceClassification", config, longest=64)
    own = llama_classifier(pad)
    own.load_state_dict(scorer.state_dict())
    plain = word_tokenizer()
    task = types.SimpleNamespace(scorer=scorer, scorer_tokenizer=loaded, config=config)
    scores = TechnicalQA.scores(task, [text + " " for text in TEXTS])
    for text, score in zip(TEXTS, scores, strict=True):
        expected = own(**plain(text + " w01", return_tensors="pt")).logits.item()
        assert score == pytest.approx(expected, abs=1e-5)
    assert scorer.config.pad_token_id == pad


def test_texts_that_end_in_all_kinds_of_tokens_need_one_more_for_padding():
    model = llama_classifier(None)
    texts = [f"w{i:02} " * (1 + i % 3) for i in range(3, 39)]
    together = class_logits(model, word_tokenizer(pad=False), texts, 64)
    for text, logits in zip(texts, together, strict=True):
        alone = model(**word_tokenizer()(text, return_tensors="pt")).logits[0]
        assert torch.allclose(alone, logits, atol=1e-5)


# ---- F3: forced first tokens


@pytest.mark.parametrize("name", ["mbart", "m2m_100"])
def test_a_translator_answers_in_its_language(tmp_path, name):
    language = TRANSLATORS[name]["forced_bos_token_id"]
    tokenizer = word_tokenizer(add_eos=True)
    folder = saved(small(name, "Seq2SeqLM"), tokenizer, tmp_path / "in")
    config = configure(response_length=6, max_length=32)
    policy, tokenizer = load_model("policy", folder, "Seq2SeqLM", config, longest=32)
    batch, _ = respond(policy, tokenizer, PROMPTS, response_length=6, max_length=32)
    assert (batch["responses"][:, 0] == language).all()
    logprobs, _ = score_responses(ActorCritic(policy, temperature=0.5), batch)
    assert (logprobs[:, 0] == 0).all() and (logprobs[:, 1] < 0).all()
    own = policy.generate(**tokenizer(PROMPTS, padding=True, return_tensors="pt"), max_new_tokens=6)
    expected = tokenizer.batch_decode(own[:, 1:], skip_special_tokens=True)
    assert translate(policy, tokenizer, PROMPTS, 32, response_length=6) == expected
    logprobs, mask = target_logprobs(policy, tokenizer, PROMPTS, ["w11 w12"] * 6, 32)
    assert mask.sum(1).tolist() == [4] * 6 and (logprobs[:, 0] == 0).all() and logprobs.min() > -100
    run(Own(policy, tokenizer), tmp_path / "run", max_length=32)
    before, after = (tmp_path / f / "generation_config.json" for f in ("in", "run/model"))
    assert json.loads(after.read_text()) == json.loads(before.read_text())
    assert json.loads(after.read_text())["forced_bos_token_id"] == language


def test_a_target_begins_with_the_forced_token_once():
    """Whatever the tokenizer puts there."""
    from tokenizers import processors

    policy = small("mbart", "Seq2SeqLM")
    alone, _ = target_logprobs(policy, word_tokenizer(add_eos=True), PROMPTS, ["w11 w12"] * 6, 32)
    tokenizer = word_tokenizer(add_eos=True)
    with_language = processors.TemplateProcessing("w09 $A w01", special_tokens=[("w09", 9), ("w01", 1)])
    sources = target_logprobs(policy, tokenizer, PROMPTS, ["w11 w12"] * 6, 32)[0]
    assert torch.equal(alone, sources)
    tokenizer.backend_tokenizer.post_processor = with_language
    _, mask = target_logprobs(policy, tokenizer, PROMPTS, ["w11 w12"] * 6, 32)
    assert mask.sum(1).tolist() == [4] * 6


# ---- F4: settings of generation; a policy is given back


def test_a_policy_is_given_back_as_it_was(tmp_path):
    policy = small()
    policy.generation_config.update(temperature=0.6, top_p=0.9, repetition_penalty=1.3, do_sample=True)
    policy.generation_config.bad_words_ids = [[7]]
    policy.train()
    policy.transformer.h[0].eval()
    modes = [module.training for module in policy.modules()]
    settings = policy.generation_config.to_dict()
    task = Own(policy)
    task.tokenizer.padding_side = "right"
    run(task, tmp_path / "run")
    assert [module.training for module in policy.modules()] == modes
    assert policy.generation_config.to_dict() == settings
    assert task.tokenizer.padding_side == "right"
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "run/model").to_dict()["top_p"] == 0.9
    stored = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert (stored["temperature"], stored["bad_words_ids"], stored["bos_token_id"]) == (0.6, [[7]], 3)


# ---- F5: one text is tokenized once


def test_a_prompt_that_is_continued_does_not_end_in_eos():
    tokenizer = word_tokenizer(add_eos=True)
    batch, _ = respond(small(), tokenizer, ["w07", "w08 w01", "w09 w10"], response_length=2)
    real = [ids[kept.bool()].tolist() for ids, kept in zip(*list(batch.values())[:2], strict=True)]
    assert real == [[7], [8, 1], [9, 10]]  # an EOS of the text's own stays


def test_targets_are_those_behind_their_prompt():
    """A tokenizer that puts a blank before each text, as SentencePiece's do."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<s>", "<unk>", "▁the", "▁film", "▁was", "▁good", "▁"]
    scores = [(word, 0.0 if i < 4 else -1.0 - 5 * (word == "▁")) for i, word in enumerate(words)]
    backend = Tokenizer(models.Unigram(scores, unk_id=3))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    assert tokenizer.tokenize(" was good")[0] == "▁"  # alone it would begin with a blank of its own
    policy = small()
    logits = policy(input_ids=torch.tensor([[4, 5, 6, 7]])).logits[0]
    logits[:, 0] = -1e9
    expected = -logits.log_softmax(-1)[[1, 2], [6, 7]].mean().item()
    assert mean_nll(policy, tokenizer, ["the film"], [" was good"], 32) == pytest.approx(expected, abs=1e-5)


def test_a_tokenizers_padding_side_does_not_matter():
    policy = small()
    numbers = []
    for side in ("left", "right"):
        tokenizer = word_tokenizer()
        tokenizer.padding_side = side
        numbers.append(mean_nll(policy, tokenizer, PROMPTS, ["w11 w12"] * 6, 32))
    assert numbers[0] == numbers[1]


# ---- F7: memory


def test_runs_leave_nothing_behind(tmp_path):
    """Ten runs in one process: no policy lives on, and the number of tensors is the same."""
    policies, counts = [], []
    for i in range(10):
        task = Own(small())
        policies.append(weakref.ref(task.policy))
        run(task, tmp_path / str(i), updates=1)
        del task
        gc.collect()
        counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert not any(policy() for policy in policies)
    assert counts[1:] == [counts[1]] * 9


# ---- F9, F11, F12, F13


def test_wrappers_of_a_tied_output_layer_have_its_width():
    """F9"""
    for name in ("LoRA, embeddings saved (tied)", "LoRA, trainable tokens (tied)", "LoRA on lm_head (tied)"):
        assert ActorCritic(PEFT[name]()).value["head"].in_features == 32


def test_averages_survive_a_round_trip_through_a_file():
    """F11"""
    for n in (300, 400, 500):
        model = torch.nn.Linear(n, n, bias=False)
        elastic = ElasticReset(model, 0.5, 3)
        buffer = io.BytesIO()
        torch.save((model, elastic), buffer)
        del model, elastic
        gc.collect()
        buffer.seek(0)
        model, elastic = torch.load(buffer, weights_only=False)
        before = elastic.ema[0].clone()
        model.weight.data += 1
        elastic.update()
        assert torch.allclose(elastic.ema[0], before + 0.5)


def test_a_cut_off_character_is_the_responses_own():
    """F12: bytes that do not make a character are replaced as one run, with those of the prompt."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "a": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    prompt = torch.tensor([[2, *tokenizer("😀")["input_ids"]]])
    assert prompt.shape == (1, 5)
    texts = response_texts(tokenizer, prompt, prompt[:, 1:3])
    assert texts == [tokenizer.decode(prompt[0, 1:3])]


@pytest.mark.parametrize("rewards", [None, ["much"] * 6, [1.0], [[1.0, 2.0]] * 6, [None] * 6])
def test_a_reward_of_another_form_names_reward(tmp_path, rewards):
    """F14"""
    task = Own(small())
    task.reward = lambda prompts, responses: rewards
    task.evaluate = lambda responses: dict(reward=0.0, drift=0.0)
    with pytest.raises(ValueError, match=r"reward\(\) gave .*; expected 6 numbers"):
        run(task, tmp_path / "run")


def test_a_policy_that_names_no_eos_is_refused_and_padding_is_eos_without_a_name(tmp_path):
    policy = small()
    policy.generation_config.pad_token_id = None
    assert token_ids(policy) == dict(eos_token_id=[1], pad_token_id=1)
    policy.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="model.generation_config names .*; expected numbers"):
        run(Own(policy), tmp_path / "run")


@pytest.mark.parametrize("name", ["pad", "eos", "bos"])
def test_ids_that_a_model_has_no_embedding_for_are_named(tmp_path, name):
    """F13"""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({f"{name}_token": "[NEW]"})
    folder = saved(small(), tokenizer, tmp_path)
    with pytest.raises(ValueError, match=f"tokenizer.{name}_token_id is 40; the model has 40 embeddings"):
        load_model("policy", folder, "CausalLM", configure(), longest=8)


def test_a_limit_of_minus_one_is_none(tmp_path):
    policy = small("mpt")
    policy.config.max_position_embeddings = -1
    assert respond(policy, word_tokenizer(), PROMPTS, response_length=2)[1]


def test_padding_that_is_nobodys_special_token_is_not_in_a_response():
    """A model's own padding may be a word to the tokenizer."""
    policy = small(pad_token_id=9)
    torch.manual_seed(0)
    batch, texts = respond(policy, word_tokenizer(pad=False), PROMPTS * 4, response_length=12)
    assert not batch["mask"].all() and not any("w09" in text for text in texts)


# ---- F15: gradient checkpointing


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart", "t5"])
def test_gradient_checkpointing_computes_layers_again_and_the_same(name):
    kind = "CausalLM" if name in DECODERS else "Seq2SeqLM"
    policy = small(name, kind)
    assert any(p.p > 0 for p in policy.modules() if isinstance(p, torch.nn.Dropout)) or name in (
        "llama",
        "bart",
    )
    batch, _ = respond(policy, word_tokenizer(), PROMPTS, response_length=4, max_length=32)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            policy.gradient_checkpointing_enable()
        calls = counted_layers(policy)
        model = ActorCritic(policy, separate_value_model=name != "t5")
        logprobs, _, _ = model(batch)
        before = len(calls)
        logprobs.sum().backward()
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        results.append((logprobs.detach(), [g.clone() for g in gradients], len(calls) - before))
        policy.zero_grad()
    (logprobs, gradients, none), (logprobs_again, gradients_again, recomputed) = results
    assert none == 0 and recomputed >= 2
    assert torch.equal(logprobs, logprobs_again)
    for a, b in zip(gradients, gradients_again, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert not any(
        "forward" in vars(layer) and "recomputed" in repr(layer.forward) for layer in policy.modules()
    )


def counted_layers(policy):
    """A list that grows whenever an attention runs."""
    calls = []
    for name, module in policy.named_modules():
        if name.endswith(("attn", "Attention")):
            module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_layers_are_not_computed_again_without_gradients_or_in_training():
    policy = small()
    policy.gradient_checkpointing_enable()
    layer = policy.transformer.h[0]
    with torch.no_grad(), recomputed_layers(policy):
        assert "forward" not in vars(layer)
    policy.train()
    with recomputed_layers(policy):  # transformers does it
        assert "forward" not in vars(layer)


def test_a_run_with_gradient_checkpointing_is_the_run_without(tmp_path):
    plain, checkpointed = (run(Own(small()), tmp_path / "a"), None)
    policy = small()
    policy.gradient_checkpointing_enable()
    checkpointed = run(Own(policy), tmp_path / "b")
    for a, b in zip(plain["history"], checkpointed["history"], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in b.items() if k != "seconds"}, abs=1e-5
        )


# ---- F8, F10: the callback


class ScheduleFree(torch.optim.SGD):
    def train(self):
        pass

    def eval(self):
        pass


def trainer(tmp_path, optimizer=None, callback=None, **settings):
    policy = small()
    rows = [dict(input_ids=[5, 6, 7], labels=[5, 6, 7])] * 8
    arguments = dict(output_dir=str(tmp_path), max_steps=2, save_steps=1, report_to=[], use_cpu=True)
    arguments |= dict(per_device_train_batch_size=2, disable_tqdm=True) | settings
    optimizers = (optimizer(policy.parameters(), lr=0.1) if optimizer else None, None)
    return transformers.Trainer(
        policy,
        transformers.TrainingArguments(**arguments),
        train_dataset=rows,
        optimizers=optimizers,
        callbacks=[callback or ElasticResetCallback(0.5, 2)],
    )


def test_the_callback_refuses_optimizers_with_weights_of_their_own(tmp_path):
    """F8"""
    with pytest.raises(ValueError, match="works without an optimizer that keeps weights of its own"):
        trainer(tmp_path, ScheduleFree).train()
    trainer(tmp_path, torch.optim.SGD).train()


def test_the_callback_refuses_searches_and_jit_checkpoints(tmp_path):
    """F10"""
    callback = ElasticResetCallback()
    arguments = types.SimpleNamespace(auto_find_batch_size=False, enable_jit_checkpoint=False)
    state = transformers.TrainerState(is_hyper_param_search=True)
    trainer(tmp_path / "warm").train()  # so that there is accelerate's state
    with pytest.raises(ValueError, match="works without hyperparameter_search$"):
        callback.on_train_begin(arguments, state, None, model=small())
    with pytest.raises(ValueError, match="works without enable_jit_checkpoint$"):
        trainer(tmp_path / "jit", enable_jit_checkpoint=True).train()
    assert not list((tmp_path / "jit").glob("*"))


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_trainer_says_nothing_of_a_missing_callback(tmp_path, restore, caplog, monkeypatch):
    """F10"""
    trainer(tmp_path).train()
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    again = trainer(tmp_path, max_steps=4, restore_callback_states_from_checkpoint=restore)
    again.train(resume_from_checkpoint=True)
    assert "not included" not in caplog.text
    callbacks = [c for c in again.callback_handler.callbacks if isinstance(c, ElasticResetCallback)]
    assert len(callbacks) == 1
    assert (callbacks[0].decay, callbacks[0].elastic.updates, callbacks[0].elastic.resets) == (0.5, 4, 2)
