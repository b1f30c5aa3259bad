"""Sections 6 to 9: data and models from folders like the hub's, training from scratch, small worlds."""

import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, before_training
from transformers import MarianConfig, MarianMTModel, MarianTokenizer, T5Config, T5ForConditionalGeneration

import elastic_reset
from elastic_reset import (
    TranslationGame,
    batches_of_like_length,
    configure,
    fit,
    likelihood_loss,
    load_model,
    load_rows,
    mean_nll,
    pretrained,
    shuffled,
    toy_qa,
    toy_reviews,
    toy_sentence,
    toy_translations,
    train,
    train_tokenizer,
    translate,
    translation_data,
)

ROWS = [dict(en=f"a dog {i}", fr=f"un chien {i}", de=f"ein Hund {i}") for i in range(20)]
REAL = ROOT.parent / "shared" / "data"


def write(folder, kind, rows, split="train"):
    import datasets

    folder.mkdir(exist_ok=True)
    path = folder / f"{split}.{kind}"
    table = datasets.Dataset.from_list(rows)
    dict(jsonl=table.to_json, csv=table.to_csv, parquet=table.to_parquet)[kind](str(path))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_every_format_and_slices(tmp_path, kind):
    write(tmp_path / "data", kind, ROWS)
    assert load_rows(str(tmp_path / "data"), "en fr de") == ROWS
    assert load_rows(f"{tmp_path / 'data'}:train[15:]", "en fr de") == ROWS[15:]
    assert load_rows(f"{tmp_path / 'data'}:train[:25%]", "en fr") == ROWS[:5]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nested_translations(tmp_path, kind):
    write(tmp_path / "data", kind, [dict(id=str(i), translation=row) for i, row in enumerate(ROWS)])
    assert load_rows(str(tmp_path / "data"), "en fr de") == ROWS


def test_several_pair_sources(tmp_path):
    for name, columns in dict(one=("fr", "en"), two=("fr", "en"), three=("en", "de")).items():
        write(tmp_path / name, "jsonl", [{c: row[c] for c in columns} for row in ROWS])
    for split in ("train", "validation"):
        write(tmp_path / "game", "jsonl", ROWS, split)
    config = configure(
        task="translation", data=f"{tmp_path}/game:train[5:]", receiver_data=[f"{tmp_path}/three"],
        sender_data=[f"{tmp_path}/one", f"{tmp_path}/two:train[:3]"],
    )  # fmt: skip
    data = translation_data(config)
    assert len(data["train"]) == 15 and len(data["validation"]) == 20
    assert len(data["sender"]) == 23 and data["sender"][0] == ("un chien 0", "a dog 0")
    assert data["receiver"][-1] == ("a dog 19", "ein Hund 19")


def marian_folder(path, french, english):
    """An untrained Marian as Helsinki-NLP's: a SentencePiece model for each language, one vocabulary."""
    import sentencepiece

    path.mkdir()
    vocabulary = {"</s>": 0, "<unk>": 1}
    for name, texts in dict(source=french, target=english).items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=str(path / name), vocab_size=90, minloglevel=2
        )
        (path / f"{name}.model").rename(path / f"{name}.spm")
        for line in (path / f"{name}.vocab").read_text(encoding="utf-8").splitlines():
            vocabulary.setdefault(line.split("\t")[0], len(vocabulary))
        (path / f"{name}.vocab").unlink()
    vocabulary["<pad>"] = len(vocabulary)
    (path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    files = dict(source_spm=str(path / "source.spm"), target_spm=str(path / "target.spm"))
    tokenizer = MarianTokenizer(vocab=str(path / "vocab.json"), **files, source_lang="fr", target_lang="en")
    pad = vocabulary["<pad>"]
    torch.manual_seed(0)
    shape = dict(d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16)
    shape |= dict(decoder_ffn_dim=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=128)
    ids = dict(pad_token_id=pad, eos_token_id=0, forced_eos_token_id=0, decoder_start_token_id=pad)
    model = MarianMTModel(MarianConfig(vocab_size=len(vocabulary), **shape, **ids))
    model.generation_config.num_beams = 4  # beams and forced tokens of a loaded model must not reach the game
    model.generation_config.bad_words_ids = [[pad]]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def t5_folder(path, words):
    tokenizer = train_tokenizer(words, configure(vocab_size=300))
    shape = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **shape)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_game_between_loaded_models_of_different_kinds(tmp_path, tiny, dtype):
    rows = toy_translations()["train"][:300]
    for split in ("train", "validation"):
        write(tmp_path / "game", "jsonl", rows, split)
    models = dict(
        model=marian_folder(tmp_path / "opus", [r["fr"] for r in rows], [r["en"] for r in rows]),
        receiver_model=t5_folder(tmp_path / "t5", [text for row in rows for text in row.values()]),
    )
    flags = tiny | models | dict(data=str(tmp_path / "game"), dtype=dtype, learning_rate=1e-2)
    task = TranslationGame(configure(**flags))
    assert task.policy.dtype == task.receiver.dtype == getattr(torch, dtype)
    english = " ".join(rows[0]["en"].split())
    assert task.tokenizer.decode(task.tokenizer(text_target=english)["input_ids"][:-1]) == english
    history = train(configure(**flags))["history"]
    assert history[-1]["update"] == 4 and history[1]["kl"] != 0
    again, _ = load_model("sender", str(tmp_path / "run" / "model"), "Seq2SeqLM", configure())
    assert again.config.model_type == "marian"


PAIRS = [("a b", "c d"), ("b a", "d c")]


def pretrained_folder(
    pairs=PAIRS, updates=1, seed=0, loss=likelihood_loss, head=None, d_model=16, **settings
):
    """The folder of a tiny translator that is trained on pairs, or found in the cache."""
    config = configure(d_model=d_model, **settings)
    path = pretrained(
        "sender", "Seq2SeqLM", pairs, loss, updates=updates, config=config, family="marian",
        texts=["a b c d"], seed=seed, **(head or {}),
    )  # fmt: skip
    assert {"config.json", "model.safetensors"} <= {file.name for file in Path(path).iterdir()}
    return path


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache, and a list that grows with each model that is trained."""
    trained = []
    before_training(monkeypatch, lambda: trained.append(1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return trained


def test_pretraining_is_cached_by_what_made_it(own_cache):
    first = pretrained_folder()
    same = [pretrained_folder(), pretrained_folder(learning_rate=0.1), pretrained_folder(batch_size=64)]
    assert set(same) == {first} and len(own_cache) == 1
    others = [
        pretrained_folder(d_model=24), pretrained_folder(updates=2), pretrained_folder(pairs=PAIRS[1:]),
        pretrained_folder(seed=1), pretrained_folder(head=dict(decoder_layerdrop=0.1)),
        pretrained_folder(head=dict(decoder_layerdrop=0.2)),
    ]  # fmt: skip
    assert len({first, *others}) == 7 == len(own_cache)
    with pytest.raises(ValueError, match="neither a model nor data to train one for the sender"):
        pretrained_folder(pairs=[])


def functions_of(folder, source):
    """The module in a file of its own with this source, as someone would write it who changes a function."""
    number = len(list(folder.glob("own*.py")))
    path = folder / f"own{number}.py"
    path.write_text(
        "from elastic_reset import fit, likelihood_loss, small_shape, target_logprobs, train_tokenizer\n"
        + source
    )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


LOSS = """
WEIGHT = {weight}

def weighted(loss):
    return {formula}

def own_loss(model, tokenizer, sources, targets, max_length):
    return weighted(likelihood_loss(model, tokenizer, sources, targets, max_length))
"""


def test_pretraining_is_cached_by_the_code_of_its_loss(tmp_path, own_cache):
    """And by that of what the loss calls and reads."""
    folders = [pretrained_folder()]
    for formula, weight in [("WEIGHT * loss", 1.0), ("WEIGHT * loss + 1", 1.0), ("WEIGHT * loss", 2.0)]:
        source = LOSS.format(formula=formula, weight=weight)
        folders.append(pretrained_folder(loss=functions_of(tmp_path, source).own_loss))
        assert pretrained_folder(loss=functions_of(tmp_path, source).own_loss) == folders[-1]
    assert len(set(folders)) == 4 == len(own_cache)


OTHERS = """
def own(*args, **head):
    made = {name}(*args, **head)
    assert {number}
    return made
"""


WRAPPED = """
import functools
from elastic_reset import likelihood_loss

def twice(function):
    @functools.wraps(function)
    def both(*args):
        return {number} * function(*args)
    return both

own_loss = twice(likelihood_loss)
"""


def test_pretraining_is_cached_by_the_code_of_a_decorator(tmp_path, own_cache):
    """inspect sees through functools.wraps; what the wrapper does is part of the loss."""
    folders = []
    for number in (2, 3):
        source = WRAPPED.format(number=number)
        folders.append(pretrained_folder(loss=functions_of(tmp_path, source).own_loss))
        assert pretrained_folder(loss=functions_of(tmp_path, source).own_loss) == folders[-1]
    assert len(set(folders)) == 2 == len(own_cache)


@pytest.mark.parametrize("name", ["small_shape", "train_tokenizer", "target_logprobs", "fit"])
def test_pretraining_is_cached_by_the_code_of_its_parts(name, tmp_path, own_cache, monkeypatch):
    """Functions that stand in for ours, in files of their own."""
    folders, modules = [pretrained_folder()], []
    for number in (1, 2):
        modules.append(functions_of(tmp_path, OTHERS.format(name=name, number=number)))
    for module in modules:
        monkeypatch.setattr(elastic_reset, name, module.own)
        folders.append(pretrained_folder())
        assert pretrained_folder() == folders[-1]
    assert len(set(folders)) == 3 == len(own_cache)


WAITING = """
import os, sys, time
from pathlib import Path
import pytest
from conftest import before_training
from elastic_reset import configure, likelihood_loss, load_model, pretrained
place, name = Path(sys.argv[1]), sys.argv[2]
def wait():
    (place / f"trains {name}").touch()
    while len(list(place.glob("asks *"))) < 2:
        time.sleep(0.01)
    time.sleep(1)  # the other one has asked, too
before_training(pytest.MonkeyPatch(), wait)
config = configure(d_model=16)
(place / f"asks {name}").touch()
folder = pretrained(
    "sender", "Seq2SeqLM", [("a b", "c d")], likelihood_loss, updates=1, config=config, family="marian",
    texts=["a b c d"]
)
load_model("sender", folder, "Seq2SeqLM", config)
print(folder)
"""


def test_of_two_processes_one_trains_and_the_other_waits(tmp_path):
    environment = os.environ | dict(
        XDG_CACHE_HOME=str(tmp_path / "cache"), PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"
    )
    how = dict(env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    words = [sys.executable, "-c", WAITING, str(tmp_path)]
    both = [subprocess.Popen([*words, name], **how) for name in "ab"]
    try:
        texts = [process.communicate(timeout=200) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], texts
    assert texts[0][0] == texts[1][0] and Path(texts[0][0].strip()).is_dir()
    assert len(list(tmp_path.glob("trains *"))) == 1 and len(list(tmp_path.glob("asks *"))) == 2
    cached = [path.name for path in (tmp_path / "cache" / "elastic_reset").iterdir() if path.is_dir()]
    assert len(cached) == 1 and not cached[0].endswith(".partial")


def test_pretraining_learns():
    torch.manual_seed(0)
    config = configure(d_model=16, pretrain_learning_rate=1e-2, pretrain_batch_size=16)
    tokenizer = train_tokenizer(["a b c d"], config)
    model = MarianMTModel(elastic_reset.small_shape("marian", tokenizer, config))
    pairs = [("a a", "c c"), ("b b", "d d")] * 50
    fit(model, tokenizer, pairs, likelihood_loss, 200, config, "")
    model.eval()
    assert translate(model, tokenizer, ["a a", "b b"], 16, response_length=8) == ["c c", "d d"]
    right, wrong = (mean_nll(model, tokenizer, ["a a"], [german], 16) for german in ("c c", "d d"))
    assert right < 0.1 < wrong


def test_shuffled_runs_through_everything():
    items = list(range(10))
    seen = [x for update in range(1, 6) for x in shuffled(items, 4, update, seed=1)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == items and seen[:10] != seen[10:]
    assert shuffled(items, 4, 3, seed=1) == seen[8:12] != shuffled(items, 4, 3, seed=2)


def test_batches_of_like_length_lose_nothing():
    pairs = [(str(i), "x" * (i % 7)) for i in range(40)]
    batches = list(batches_of_like_length(pairs, 5, 8, pool=4))
    assert sorted(source for sources, _ in batches for source in sources) == sorted(s for s, _ in pairs)
    spread = [len(max(targets)) - len(min(targets)) for _, targets in batches]
    assert sum(spread) < 8 * 3 and all(len(sources) == 5 for sources, _ in batches)


@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("size", [0, 300])
def test_tokenizers_give_back_the_text(size, append_eos):
    text = "Der Hund mag die Ärztin, l'été !"
    tokenizer = train_tokenizer([text], configure(vocab_size=size), append_eos=append_eos)
    ids = tokenizer(text)["input_ids"]
    assert (ids[-1] == tokenizer.eos_token_id) is append_eos
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


# ---- the small worlds


def digest(data):
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def test_small_worlds_are_those_of_the_recorded_results():
    """tutorials/results/ hold what was measured on these very texts, and so do the README's tables."""
    game, reviews, qa = toy_translations(), toy_reviews(), toy_qa()
    parts = ("train", "validation", "sender", "receiver", "texts")
    expected = "40ffd971873f48b1edf558e319a15f4afd8bb7eb0bbffd4623242ff73c0a223f"
    assert digest({name: game[name] for name in parts}) == expected
    expected = "49722b42b59429304d543dec4fe907ce2e54bb05dee3585a7c943960758afd86"
    assert digest({name: reviews[name] for name in ("train", "validation")}) == expected
    parts = ("sft", "preferences", "held_out", "questions", "validation", "texts")
    prompts = dict(problems=[problem["prompt"] for problem in qa["problems"]])
    expected = "5a13f754febd97af69c42a373e96a7e2ab2ae94c9a521696923e771bd92aad7c"
    assert digest({name: qa[name] for name in parts} | prompts) == expected
    expected = "a10fc9dfccb77410be6441d11756f9fbd23cc73087722c5b6cf34505ceec7642"
    assert digest([json.loads(problem["expected"]) for problem in qa["problems"]]) == expected


def test_embedded_translations():
    data = toy_translations()
    french = {name: {row["fr"] for row in data[name]} for name in ("train", "validation")}
    french["sender"] = {source for source, _ in data["sender"]}
    assert not french["train"] & french["validation"] and not french["train"] & french["sender"]
    clean, noisy = (toy_sentence(random.Random(3), noise) for noise in (0.0, 1.0))
    assert clean["fr"] == noisy["fr"] and clean["de"] == noisy["de"] and clean["en"] != noisy["en"]


@pytest.mark.skipif(not REAL.exists(), reason="the real corpora are not beside the repository")
def test_real_corpora():
    rows = load_rows(f"{REAL}/multi30k:train[28990:]", "en fr de")
    assert len(rows) == 10 and all(len(row["fr"].split()) > 2 for row in rows)
    assert len(load_rows(f"{REAL}/tatoeba-en-fr:validation", "fr en")) == 1000
