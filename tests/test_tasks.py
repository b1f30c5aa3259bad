"""Room 3: mock sentiment and technical QA, on the embedded corpora and on folders shaped like the hub's."""

import itertools
import json
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
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
    configure,
    distinct,
    function_in,
    pass_at_k,
    perplexity,
    toy_feeling,
    toy_gold,
    toy_qa,
    toy_reviews,
    train,
    train_tokenizer,
)

SMALL = dict(
    d_model=16, layers=1, pretrain_updates=20, reward_updates=20, pretrain_batch_size=16, updates=2,
    batch_size=8, mini_batch_size=4, num_ppo_epochs=1, reset_every=1, eval_every=2, eval_size=8, save_every=1,
)  # fmt: skip


@pytest.fixture(params=["imdb", "qa"])
def small(request, tmp_path):
    """Flags of a run of an embedded task that takes seconds."""
    return SMALL | dict(task=request.param, output_dir=str(tmp_path / "run"))


def history_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_embedded_tasks_run_and_resume(small, tmp_path):
    whole = train(configure(**small | dict(updates=4)))
    assert {"reward", "drift", "kl"} <= whole["end"].keys() and whole["start"]["kl"] == 0
    assert "held out" in elastic_reset.TASKS[small["task"]](configure(**small)).footnote
    part = small | dict(output_dir=str(tmp_path / "part"))
    train(configure(**part))
    train(configure(**part | dict(updates=4, resume=True)))
    assert history_of(tmp_path / "part") == history_of(tmp_path / "run")


def test_ppo_moves_the_reward(small):
    """Both tasks give the policy a reward that it can raise."""
    quick = dict(
        pretrain_updates=60,
        reward_updates=400,
        updates=12,
        batch_size=32,
        mini_batch_size=16,
        num_ppo_epochs=4,
    )
    quick |= dict(learning_rate=3e-3, value_learning_rate=3e-3, reset="none", eval_every=12, eval_size=64)
    result = train(configure(**small | quick))
    assert result["end"]["reward"] > result["start"]["reward"] + 0.05


# ---- mock sentiment


def test_continuations_have_a_fixed_length(tmp_path):
    settings = SMALL | dict(task="imdb", output_dir=str(tmp_path))
    task = MockSentiment(configure(**settings))
    elastic_reset.set_plain_generation(task.policy, 32)
    batch, texts = elastic_reset.respond(task, task.validation_prompts, configure(**settings))
    assert batch["mask"].all() and batch["mask"].shape == (8, 32)
    assert all(len(prompt.split()) == 10 for prompt in task.validation_prompts)


def test_the_grammar_knows_its_own_sentences():
    reviews = toy_reviews()
    for text, _ in reviews["train"][:200]:
        sentences = [f"{s.strip()} {end}" for s, end in _sentences(text)]
        feelings = [toy_feeling(s) for s in sentences]
        assert len(feelings) == 7 and None not in feelings
    parts = [{text for text, _ in reviews[name]} for name in ("train", "validation")]
    assert not parts[0] & parts[1]
    liked = [toy_gold([""], [text])["sentiment"] for text, label in reviews["train"][:2000] if label]
    assert sum(liked) / len(liked) == pytest.approx(0.3, abs=0.03)


def _sentences(text):
    ends = [i for i, c in enumerate(text) if c in ".!"]
    return [(text[a:b], text[b]) for a, b in zip([0, *(e + 1 for e in ends)], ends, strict=False)]


def test_gold_counts_what_a_continuation_completes():
    prompt, text = (
        "what a great plot ! the cast was",
        "what a great plot ! the cast was really dull . plot ! i",
    )
    assert toy_gold([prompt], [text]) == dict(parses=0.5, sentiment=-0.5)
    assert toy_feeling("what a great plot !") == "+" and toy_feeling("what a plot great !") is None


def gpt2_folder(path, texts, **settings):
    tokenizer = train_tokenizer(texts, 300, 512, append_eos=False)
    torch.manual_seed(1)
    ids = dict(bos_token_id=1, eos_token_id=1)
    shape = dict(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64) | ids | settings
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("window, stride", [(16, 8), (16, 16), (64, 64), (8, 3)])
def test_perplexity_against_one_token_at_a_time(tmp_path, window, stride):
    texts = [text for text, _ in toy_reviews()["train"][:40]]
    folder = gpt2_folder(tmp_path, texts)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    prompts = [text[:20] for text in texts[:5]]
    ours = perplexity(model, tokenizer, prompts, [text[20:] for text in texts[:5]], window, stride)
    total, count = 0.0, 0
    for prompt, text in zip(prompts, texts, strict=False):
        start = len(tokenizer(prompt)["input_ids"])
        tokens = tokenizer(prompt)["input_ids"] + tokenizer(text[20:], add_special_tokens=False)["input_ids"]
        stride = min(stride, window // 2)
        end = min(max(window, start + stride), len(tokens))
        for t in range(start, len(tokens)):
            while t >= end:
                end = min(end + stride, len(tokens))
            seen = torch.tensor([tokens[max(0, end - window) : t]])
            total -= model(seen).logits[0, -1].log_softmax(-1)[tokens[t]].item()
            count += 1
    assert ours == pytest.approx(math.exp(total / count), rel=1e-4)


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
def test_prompt_and_response_make_one_text(kind):
    """Wherever a text is cut into prompt and response, decoded they make it again."""
    text = "def f(a):    return a  or  film"
    if kind == "sentencepiece":
        tokenizer = sentencepiece_like([text])
    else:
        tokenizer = train_tokenizer([text], 0 if kind == "words" else 300, 64, append_eos=False)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1, n_positions=64))
    tokens = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    whole = tokenizer.decode(tokens[0])
    for cut in range(1, tokens.shape[1]):
        [response] = elastic_reset.response_texts(model, tokenizer, tokens[:, :cut], tokens[:, cut:])
        assert tokenizer.decode(tokens[0, :cut]) + response == whole


def reviews_folder(path, n=24):
    path.mkdir()
    rows = [dict(text=text, label=label) for text, label in toy_reviews()["train"][:n]]
    for split in ("train", "validation"):
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path), [row["text"] for row in rows]


def test_sentiment_with_models_from_folders(tmp_path):
    """As with lvwerra/gpt2-imdb, lvwerra/distilbert-imdb and gpt2: three tokenizers, texts in between."""
    data, texts = reviews_folder(tmp_path / "data")
    policy = gpt2_folder(tmp_path / "gpt2-imdb", texts)
    language_model = gpt2_folder(tmp_path / "gpt2", texts[:3], n_layer=2)
    tokenizer = train_tokenizer(texts, 400, 512)
    shape = dict(vocab_size=len(tokenizer), dim=16, n_layers=1, n_heads=2, hidden_dim=32, pad_token_id=0)
    DistilBertForSequenceClassification(DistilBertConfig(**shape)).save_pretrained(tmp_path / "distilbert")
    tokenizer.save_pretrained(tmp_path / "distilbert")
    models = dict(model=policy, language_model=language_model, reward_model=str(tmp_path / "distilbert"))
    flags = SMALL | models | dict(task="imdb", data=data, max_length=48, response_length=12, prompt_length=8)
    flags |= dict(min_response_length=12, separate_value_model=True, kl_reference="ema", kl_coef=0.1)
    result = train(configure(**flags, output_dir=str(tmp_path / "run")))
    assert 0 < result["end"]["reward"] < 1 and "parses" not in result["end"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert again.config.vocab_size == AutoTokenizer.from_pretrained(policy).vocab_size


def test_sentiment_from_text_alone(tmp_path):
    data, _ = reviews_folder(tmp_path / "data")
    flags = SMALL | dict(task="imdb", data=data, vocab_size=300, max_length=48, response_length=12)
    result = train(configure(**flags | dict(min_response_length=12, output_dir=str(tmp_path / "run"))))
    assert result["end"]["drift"] > 1


def test_a_label_is_0_or_1(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n')
    with pytest.raises(ValueError, match="train.jsonl, line 2: column 'label' holds '2', expected 0 or 1"):
        MockSentiment(configure(task="imdb", data=str(tmp_path), validation_data=str(tmp_path)))


def test_a_reward_model_with_other_labels_is_refused(tmp_path):
    data, texts = reviews_folder(tmp_path / "data")
    tokenizer = train_tokenizer(texts, 400, 512)
    shape = dict(vocab_size=len(tokenizer), dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=5)
    DistilBertForSequenceClassification(DistilBertConfig(**shape)).save_pretrained(tmp_path / "five")
    tokenizer.save_pretrained(tmp_path / "five")
    with pytest.raises(ValueError, match="has 5 labels; expected 2"):
        MockSentiment(configure(**SMALL | dict(task="imdb", data=data, reward_model=str(tmp_path / "five"))))


# ---- technical QA


def test_pass_at_k_is_unbiased():
    """Against all ways to choose k of n programs."""
    for n, right, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (7, 3, 7)]:
        draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_embedded_answers_are_right_and_parts_share_no_function():
    data = toy_qa()
    for problem, answer in list(zip(data["problems"], data["solutions"], strict=True))[:60]:
        names = {}
        exec(function_in(answer) + problem["test"], names)
        with pytest.raises(AssertionError):
            exec("def f(a, b):\n    return 123456\n" + problem["test"], {})
    prompts = {problem["prompt"] for problem in data["problems"]}
    assert not prompts & set(data["questions"]) and not prompts & {q for q, _ in data["validation"]}


def llama_folder(path, texts):
    tokenizer = train_tokenizer(texts, 300, 512, append_eos=False)
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
    flags = SMALL | dict(task="qa", data=str(tmp_path / "pairs"), programs=str(tmp_path / "programs"))
    flags |= dict(model=llama_folder(tmp_path / "llama", [r["response_j"] for r in rows]))
    flags |= dict(max_length=200, response_length=12, program_length=12, allow_code_execution=True)
    return flags | dict(prompt_length=200, output_dir=str(tmp_path / "run"), lora_dropout=0.05)


def test_three_stages_with_a_model_from_a_folder(stack, tmp_path):
    from peft import AutoPeftModelForCausalLM

    task = TechnicalQA(configure(**stack))
    trainable = [name for name, p in task.policy.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    result = train(configure(**stack | dict(program_samples=10, save_merged=True)))
    assert result["end"]["pass_at_1"] == 0 and "pass_at_10" in result["end"]
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged").eval()
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.allclose(adapted(tokens).logits, alone(tokens).logits, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(stack["model"])
    assert not torch.allclose(base(tokens).logits, alone(tokens).logits, atol=1e-3)


def test_reference_is_the_model_with_its_adapter_off(stack):
    task = TechnicalQA(configure(**stack))
    elastic_reset.set_plain_generation(task.policy)
    model = elastic_reset.ActorCritic(task.policy)
    elastic = elastic_reset.ElasticReset(task.policy)
    with torch.no_grad():
        for p in elastic.params:
            p.add_(0.1 * torch.randn_like(p))
    batch, _ = elastic_reset.respond(task, task.questions[:4], configure(**stack))
    ours = elastic_reset.reference_logprobs(model, elastic.by_name(elastic.init), batch)
    with task.policy.disable_adapter():
        theirs, _, _ = elastic_reset.logprobs_and_values(model, batch)
    changed, _, _ = elastic_reset.logprobs_and_values(model, batch)
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(ours, changed, atol=1e-2)


def test_stages_stop_where_asked(stack, capsys):
    for stage, kind in (("sft", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        flags = {k: v for k, v in stack.items() if k != "output_dir"} | dict(last_stage=stage)
        assert elastic_reset.main(elastic_reset.to_argv(flags)) == 0
        found, folder = capsys.readouterr().out.strip().splitlines()[-1].split(": ")
        assert found == stage and kind.from_pretrained(folder).config.model_type == "llama"


@pytest.mark.parametrize("flags, message", [
    (dict(task="qa", sft_data="x"), "--sft_data needs --data"),
    (dict(task="imdb", validation_data="x"), "--validation_data needs --data"),
    (dict(task="qa", d_model=20), "d_model is 20; expected a multiple of 8"),
    (dict(task="qa", model="x"), "--allow_code_execution true"),
    (dict(task="imdb", min_response_length=30, response_length=20), "min_response_length is 30"),
    (dict(task="imdb", last_stage="sft"), "only the task qa has stages"),
])  # fmt: skip
def test_bad_flags_end_in_one_line(flags, message, tmp_path, capsys):
    assert elastic_reset.main(elastic_reset.to_argv(flags | dict(output_dir=str(tmp_path / "run")))) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_model_without_a_trained_head_is_no_reward_model(stack, tmp_path):
    with pytest.raises(ValueError, match="has no trained score.weight"):
        TechnicalQA(configure(**stack | dict(reward_model=stack["model"])))


def test_long_questions_are_left_out(stack):
    lengths = [len(TechnicalQA(configure(**stack | dict(prompt_length=n))).questions) for n in (200, 90)]
    assert lengths[0] > lengths[1] > 0
    with pytest.raises(ValueError, match="at most prompt_length"):
        TechnicalQA(configure(**stack | dict(prompt_length=3)))


def test_first_stage_sees_prompts_as_sampling_does(tmp_path):
    """Of a short and a long question in one batch, the answer's likelihood is as if alone."""
    tokenizer = train_tokenizer(["a b c d", " a b c d"], 0, 32, append_eos=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=1, pad_token_id=0,
    )).eval()  # fmt: skip
    both, _ = elastic_reset.target_logprobs(model, tokenizer, ["a", "a b c d"], [" b", " b"], 32)
    alone, _ = elastic_reset.target_logprobs(model, tokenizer, ["a"], [" b"], 32)
    assert torch.allclose(both[0], alone[0], atol=1e-5)


def test_programs_run_only_when_allowed(stack):
    with pytest.raises(ValueError, match="--allow_code_execution true"):
        TechnicalQA(configure(**stack | dict(allow_code_execution=False)))
