"""Sections 6 to 8: the three tasks, on the embedded data and on folders shaped like the hub's."""

import itertools
import json
import math
import random
import re

import pytest
import torch
from conftest import metrics_of, refuse_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import elastic_reset
from elastic_reset import (
    MockSentiment,
    TechnicalQA,
    TranslationGame,
    configure,
    distinct,
    mean_nll,
    pass_at_k,
    qa_data,
    respond,
    toy_answer,
    toy_feeling,
    toy_gold,
    toy_mistake,
    toy_problem,
    toy_qa,
    toy_reviews,
    train,
    train_tokenizer,
)

SMALL = dict(
    d_model=16, layers=1, pretrain_updates=40, reward_updates=200, pretrain_batch_size=16, updates=2,
    batch_size=8, mini_batch_size=4, num_ppo_epochs=1, reset_every=1, eval_every=2, eval_size=8, save_every=1,
)  # fmt: skip


@pytest.fixture(params=["imdb", "qa"])
def small(request, tmp_path):
    """Flags of a run of an embedded task that takes seconds."""
    return SMALL | dict(task=request.param, output_dir=str(tmp_path / "run"))


def test_embedded_tasks_run_and_resume(small, tmp_path, capsys):
    whole = train(configure(**small | dict(updates=4)))
    own = dict(imdb={"distinct_1", "words", "parses", "sentiment", "human_perplexity"})
    named = own.get(small["task"], {"words", "pass_at_1"})
    assert {"reward", "drift", "kl"} | named <= whole["end"].keys() and whole["start"]["kl"] == 0
    assert "held out: the " in capsys.readouterr().out
    part = small | dict(output_dir=str(tmp_path / "part"))
    train(configure(**part))
    train(configure(**part | dict(updates=4, resume=True)))
    assert metrics_of(tmp_path / "part") == metrics_of(tmp_path / "run")


def test_the_policy_s_perplexity_of_human_reviews():
    """A beginning and what follows it are the review, and only what follows is counted."""
    task = elastic_reset.MockSentiment(configure("imdb", **SMALL))
    reviews = [text for text, _ in toy_reviews()["validation"][:8]]
    assert elastic_reset.joined(task.validation_prompts, task.human) == reviews
    assert all(
        len(begin.split()) <= len(review.split()) / 2
        for begin, review in zip(task.validation_prompts, reviews, strict=True)
    )
    nll = elastic_reset.mean_nll(task.policy, task.tokenizer, task.validation_prompts, task.human, 60)
    found = task.evaluate([" the plot was good ."] * 8)
    assert found["human_perplexity"] == pytest.approx(math.exp(nll)) != found["drift"]


def test_ppo_moves_the_reward(small):
    """Both tasks give the policy a reward that it can raise."""
    quick = dict(
        updates=12, batch_size=32, mini_batch_size=16, num_ppo_epochs=4, learning_rate=3e-3,
        value_learning_rate=3e-3, reset="none", eval_every=12, eval_size=64,
    )  # fmt: skip
    result = train(configure(**small | quick))
    assert result["end"]["reward"] > result["start"]["reward"] + 0.05


# ---- translation


def test_the_first_translation_of_a_sentence_counts(tiny, monkeypatch):
    rows = [dict(fr="un chien", en="", de="ein Hund"), dict(fr="un chien", en="", de="eine Katze")]
    data = elastic_reset.toy_translations() | dict(train=rows)
    monkeypatch.setattr(elastic_reset, "toy_translations", lambda: data)
    task = TranslationGame(configure(**tiny))
    assert task.german == {"un chien": "ein Hund"} and task.prompts(2, 1) == ["un chien"] * 2


# ---- mock sentiment


def test_continuations_have_a_fixed_length(tmp_path):
    config = configure(**SMALL | dict(task="imdb", output_dir=str(tmp_path)))
    task = MockSentiment(config)
    batch, texts = respond(task.policy, task.tokenizer, task.validation_prompts, **config.sampling)
    assert batch["mask"].all() and batch["mask"].shape == (8, 32)
    assert all(len(prompt.split()) == 10 for prompt in task.validation_prompts)


def test_the_grammar_knows_its_own_reviews():
    reviews = toy_reviews()
    for text, _ in reviews["train"][:200]:
        sentences = text.replace("!", ".").split(" .")[:-1]
        ends = [c for c in text if c in ".!"]
        feelings = [toy_feeling(f"{s.strip()} {end}") for s, end in zip(sentences, ends, strict=True)]
        assert len(feelings) == 7 and None not in feelings
    parts = [{text for text, _ in reviews[name]} for name in ("train", "validation")]
    assert not parts[0] & parts[1]
    liked = [toy_gold([""], [text])["sentiment"] for text, label in reviews["train"][:2000] if label]
    assert sum(liked) / len(liked) == pytest.approx(0.3, abs=0.03)


def test_gold_counts_what_a_continuation_completes():
    assert toy_gold(["what a great plot ! the cast was"], [" really dull . plot ! i"]) == dict(
        parses=0.5, sentiment=-0.5
    )
    assert toy_gold(["i loved the"], [" plot"]) == dict(parses=0, sentiment=0)
    assert toy_feeling("what a great plot !") == "+" and toy_feeling("what a plot great !") is None


def gpt2_folder(path, texts, **settings):
    tokenizer = train_tokenizer(texts, configure(vocab_size=300), append_eos=False)
    torch.manual_seed(1)
    ids = dict(bos_token_id=1, eos_token_id=1)
    shape = dict(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64) | ids | settings
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@torch.no_grad()
def test_mean_nll_against_one_token_at_a_time(tmp_path):
    """Of prompts of several lengths in one batch, and of answers too long to be read to their ends."""
    texts = [text for text, _ in toy_reviews()["train"][:5]]
    words = [text.split() for text in texts]
    prompts = [" ".join(text[: 2 + i]) for i, text in enumerate(words)]
    answers = [" " + " ".join(text[2 + i :]) for i, text in enumerate(words)]
    config = configure(task="imdb")
    folder = gpt2_folder(tmp_path, texts)
    model, tokenizer = elastic_reset.load_model("judge", folder, "CausalLM", config)
    ours = mean_nll(model, tokenizer, prompts, answers, 30)
    nll = []
    for prompt, answer in zip(prompts, answers, strict=True):
        before = tokenizer(prompt)["input_ids"]
        seen = before[:30]
        for token in tokenizer(prompt + answer)["input_ids"][len(before) :][:30]:
            logits = model(torch.tensor([seen])).logits[0, -1]
            nll.append(-logits.log_softmax(-1)[token].item())
            seen = [*seen, token]
    assert len(nll) == 5 * 30 and ours == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert mean_nll(model, tokenizer, prompts, [""] * 5, 30) == pytest.approx(math.log(len(tokenizer)))


def test_distinct_by_hand():
    assert distinct([["a", "b", "a"], ["a"]], 1) == 2 / 4
    assert distinct([["a", "b", "a", "b"]], 2) == 2 / 3 and distinct([["a"]], 2) == 0


def sentencepiece_like(texts):
    """A tokenizer as LLaMA's: words carry a mark for their space; decoding drops a first space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>", padding_side="left")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.parametrize("kind", ["words", "pieces", "sentencepiece"])
def test_prompt_and_response_make_one_text(kind, monkeypatch):
    """Wherever a policy takes over in a text, its response put behind the prompt makes that text again."""
    text = "def f(a):    return a  or  film"
    if kind == "sentencepiece":
        tokenizer = sentencepiece_like([text])
    else:
        config = configure(vocab_size=0 if kind == "words" else 300)
        tokenizer = train_tokenizer([text], config, append_eos=False)
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1, n_positions=64))
    policy.generation_config.eos_token_id, policy.generation_config.pad_token_id = [299], 298
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    for cut in range(1, tokens.shape[1]):
        prompt, rest = tokenizer.decode(tokens[0, :cut]), tokens[:, cut:]
        monkeypatch.setattr(
            policy, "generate", lambda input_ids, rest=rest, **_: torch.cat([input_ids, rest], 1)
        )
        _, [response] = respond(policy, tokenizer, [prompt], response_length=rest.shape[1])
        assert (prompt + response).strip() == text


def reviews_folder(path, n=24):
    path.mkdir()
    rows = [dict(text=text, label=label) for text, label in toy_reviews()["train"][:n]]
    for split in ("train", "validation"):
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path), [row["text"] for row in rows]


def distilbert_folder(path, texts, **settings):
    tokenizer = train_tokenizer(texts, configure(vocab_size=400))
    shape = dict(vocab_size=len(tokenizer), dim=16, n_layers=1, n_heads=2, hidden_dim=32, pad_token_id=0)
    DistilBertForSequenceClassification(DistilBertConfig(**shape | settings)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_sentiment_with_models_from_folders(tmp_path):
    """As with lvwerra/gpt2-imdb, lvwerra/distilbert-imdb and gpt2: three tokenizers, texts in between."""
    data, texts = reviews_folder(tmp_path / "data")
    policy = gpt2_folder(tmp_path / "gpt2-imdb", texts, n_positions=96)
    language_model = gpt2_folder(tmp_path / "gpt2", texts[:3], n_positions=96, n_layer=2)
    models = dict(model=policy, language_model=language_model)
    models |= dict(reward_model=distilbert_folder(tmp_path / "distilbert", texts))
    flags = SMALL | models | dict(task="imdb", data=data, max_length=48, response_length=12, prompt_length=8)
    flags |= dict(min_response_length=12, separate_value_model=True, kl_reference="ema", kl_coef=0.1)
    result = train(configure(**flags, output_dir=str(tmp_path / "run")))
    assert 0 < result["end"]["reward"] < 1 and "parses" not in result["end"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert again.config.vocab_size == AutoTokenizer.from_pretrained(policy).vocab_size
    five = distilbert_folder(tmp_path / "five", texts, num_labels=5)
    with pytest.raises(ValueError, match="five' must have 2 labels"):
        MockSentiment(configure(**flags | dict(reward_model=five)))
    with pytest.raises(ValueError, match="has 96 positions; 160 are needed"):
        MockSentiment(configure(**flags | dict(max_length=80)))


def test_sentiment_from_text_alone(tmp_path):
    data, _ = reviews_folder(tmp_path / "data")
    flags = SMALL | dict(task="imdb", data=data, vocab_size=300, max_length=48, response_length=12)
    result = train(configure(**flags | dict(min_response_length=12, output_dir=str(tmp_path / "run"))))
    assert result["end"]["drift"] > 1


# ---- technical QA


def answering(monkeypatch, answers):
    """Sampling gives these answers, one after the other."""
    given = iter(answers)

    def respond(policy, tokenizer, prompts, **how):
        return None, [next(given) for _ in prompts]

    monkeypatch.setattr(elastic_reset, "respond", respond)


def test_pass_at_k_is_unbiased(monkeypatch):
    """Against all ways to choose k of n programs."""
    n, right = 12, [0, 3, 12]
    problem = dict(prompt="", program_of=lambda answer: answer, expected=1)
    answering(monkeypatch, ["1"] * 0 + ["2"] * 12 + ["1"] * 3 + ["2"] * 9 + ["1"] * 12)
    found = pass_at_k(None, None, [problem] * 3, configure(program_samples=n))
    for k in (1, 10):
        chances = []
        for c in right:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            chances.append(sum(map(any, draws)) / len(draws))
        assert found[f"pass_at_{k}"] == pytest.approx(sum(chances) / 3)
    assert found.keys() == {"pass_at_1", "pass_at_10"}


def test_right_answers_pass_and_mistaken_ones_do_not(monkeypatch):
    rng = random.Random(0)
    rows, steps, exceptions = (
        elastic_reset.table(text, "|")
        for text in (elastic_reset.FUNCTIONS, elastic_reset.STEPS, elastic_reset.EXCEPTIONS)
    )
    functions = [(rng.choice(rows), (rng.choice(steps),), rng.choice(exceptions)) for _ in range(40)]
    problems, config = [toy_problem(function, "a question") for function in functions], configure()

    def passes(answers):
        answering(monkeypatch, answers)
        return pass_at_k(None, None, problems, config)["pass_at_1"]

    assert passes([toy_answer(rng, function, polite=1, explained=1) for function in functions]) == 1
    assert passes([toy_answer(rng, toy_mistake(rng, function)) for function in functions]) < 0.2
    assert passes(["def f(a, b):\n    return 123456"] * 40) == 0
    assert passes(["Good question! It uses plain arithmetic."] * 40) == 0


def test_problems_are_functions_that_training_does_not_show():
    data = toy_qa()
    parts = [
        [problem["prompt"] for problem in data["problems"]], data["questions"],
        [question for question, _ in data["sft"]], [question for question, _ in data["validation"]],
    ]  # fmt: skip
    parts.append([problem["prompt"] for problem in data["elsewhere"]])
    opening = re.compile("|".join([*elastic_reset.ASKING, "^#"]))
    asked = [{re.split(r"[?\n]", opening.split(question)[1])[0] for question in part} for part in parts]
    assert len(asked[0]) == 200 and asked[0] == asked[4]
    assert not asked[0] & (asked[1] | asked[2] | asked[3])


def llama_folder(path, texts):
    tokenizer = train_tokenizer(texts, configure(vocab_size=300), append_eos=False)
    torch.manual_seed(1)
    shape = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    ids = dict(bos_token_id=None, eos_token_id=1, num_attention_heads=2, max_position_embeddings=400)
    LlamaForCausalLM(LlamaConfig(**shape, **ids)).save_pretrained(path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def stack(tmp_path):
    """Flags for a folder shaped like lvwerra/stack-exchange-paired, HumanEval and a LLaMA, all tiny."""
    rows = [dict(question=q, response_j=a, response_k="no") for q, a in toy_qa()["sft"][:24]]
    problem = dict(task_id="t/0", prompt="def g(x):\n", canonical_solution="    return x\n", entry_point="g")
    problem |= dict(test="def check(candidate):\n    assert candidate(1) == 1\n")
    for name, lines in dict(pairs=rows, programs=[problem] * 3).items():
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    flags = SMALL | dict(
        reward_updates=20, task="qa", data=str(tmp_path / "pairs"), programs=str(tmp_path / "programs")
    )
    flags |= dict(model=llama_folder(tmp_path / "llama", [r["response_j"] for r in rows]))
    flags |= dict(max_length=200, response_length=12, program_length=12, lora_dropout=0.05)
    return flags | dict(prompt_length=200, output_dir=str(tmp_path / "run"))


def test_three_stages_with_a_model_from_a_folder(stack, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    task = TechnicalQA(configure(**stack))
    trainable = [name for name, p in task.policy.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    result = train(configure(**stack | dict(program_samples=10)))
    assert result["end"]["pass_at_1"] == 0 and "pass_at_10" in result["end"]
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    base = AutoModelForCausalLM.from_pretrained(stack["model"])
    tokens = torch.tensor([[5, 6, 7]])
    assert not torch.allclose(base(tokens).logits, adapted(tokens).logits, atol=1e-3)
    answering(monkeypatch, ["    return x\nprint(x)\n", "    return 2\n", "    return x"])
    assert pass_at_k(None, None, task.problems, configure(**stack))["pass_at_1"] == pytest.approx(2 / 3)


def test_reference_is_the_model_with_its_adapter_off(stack):
    task, config = TechnicalQA(configure(**stack)), configure(**stack)
    model = elastic_reset.ActorCritic(task.policy)
    elastic = elastic_reset.ElasticReset(task.policy)
    with torch.no_grad():
        for p in elastic.params:
            p.add_(0.1 * torch.randn_like(p))
    batch, _ = respond(task.policy, task.tokenizer, task.prompts(4, 1), **config.sampling)
    ours = elastic_reset.reference_logprobs(model, elastic, elastic.init, batch)
    with task.policy.disable_adapter():
        theirs, _, _ = model(batch)
    changed, _, _ = model(batch)
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(ours, changed, atol=1e-2)


def test_a_model_without_a_trained_head_is_no_reward_model(stack):
    with pytest.raises(ValueError, match="score.weight is not trained"):
        TechnicalQA(configure(**stack | dict(reward_model=stack["model"])))


@pytest.mark.parametrize("name", ["gpt2", "marian", "llama"])
def test_a_folder_named_like_a_family_is_a_model(name, stack, tmp_path, monkeypatch):
    """Nothing is trained from scratch in its place."""
    monkeypatch.chdir(tmp_path)
    vocabulary = AutoTokenizer.from_pretrained("llama").get_vocab()
    (tmp_path / "llama").rename(name)
    monkeypatch.setattr(elastic_reset, "train_tokenizer", lambda *_, **__: pytest.fail("from scratch"))
    task = TechnicalQA(configure(**stack | dict(model=name)))
    assert task.tokenizer.get_vocab() == task.scorer_tokenizer.get_vocab() == vocabulary
    assert task.policy.config.model_type == task.scorer.config.model_type == "llama"


@pytest.mark.parametrize("name", ["gpt2", "marian", "llama"])
@pytest.mark.parametrize("task", ["translation", "imdb", "qa"])
def test_a_family_is_no_model(name, task, tmp_path, capsys, monkeypatch):
    """Without a folder it is a hub name, like any other, and here the hub is out of reach."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    refuse_training(monkeypatch)
    assert elastic_reset.main(["--task", task, "--model", name]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"'{name}'" in line and "couldn't find them in the cached files" in line


def test_held_out_preferences_are_about_other_questions(tmp_path):
    rows = [
        dict(question=f"why {q}?", response_j=f"because {q} {i}", response_k=f"no {q} {i}")
        for i in range(4)
        for q in range(60)
    ]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = qa_data(configure(task="qa", data=str(tmp_path)))
    asked = {
        part: {text.split("\n")[0] for pair in data[part] for text in pair}
        for part in ("preferences", "held_out")
    }
    assert not asked["preferences"] & asked["held_out"]
    assert len(asked["held_out"]) == 3 and len(asked["preferences"]) == 57
    assert len(data["held_out"]) == 12 and len(set(data["held_out"] + data["preferences"])) == 240
    assert all("because" in better and "no" in worse for better, worse in data["held_out"])


def test_long_questions_are_left_out(stack):
    tasks = [TechnicalQA(configure(**stack | dict(prompt_length=n))) for n in (200, 90)]
    every, short = (set(task.prompts(100, 1)) for task in tasks)
    assert len(every) > len(short) > 0
    assert short == {q for q in every if len(tasks[0].tokenizer(q)["input_ids"]) <= 90}
    with pytest.raises(ValueError, match="no question has at most prompt_length"):
        TechnicalQA(configure(**stack | dict(prompt_length=3)))
