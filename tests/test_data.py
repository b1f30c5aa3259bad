"""Room 7: data from folders shaped like hub repositories, models from folders, the embedded corpus."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from elastic_reset import (
    TranslationGame,
    batches_of_like_length,
    configure,
    fit,
    likelihood_loss,
    load_rows,
    seq2seq,
    shuffled,
    target_logprobs,
    token_mean,
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


def models(tmp_path, words):
    """A BART sender and a T5 receiver with tokenizers of their own, untrained, saved like a hub's."""
    torch.manual_seed(0)
    small = dict(d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16)
    small |= dict(decoder_ffn_dim=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=64)
    one, other = train_tokenizer(words, 0, 32), train_tokenizer(words, 300, 32)
    ids = dict(pad_token_id=0, eos_token_id=1, decoder_start_token_id=1, bos_token_id=2)
    bart = BartForConditionalGeneration(
        BartConfig(vocab_size=len(one), **small, **ids, forced_eos_token_id=1)
    )
    bart.generation_config.num_beams = 4  # beams and forced tokens of a loaded model must not reach the game
    shape = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=len(other), **shape))
    for model, tokenizer, name in [(bart, one, "bart"), (t5, other, "t5")]:
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return str(tmp_path / "bart"), str(tmp_path / "t5")


def test_a_game_between_loaded_models_of_different_kinds(tmp_path, tiny):
    rows = toy_translations()["train"][:40]
    for split in ("train", "validation"):
        write(tmp_path / "game", "jsonl", rows, split)
    sender, receiver = models(tmp_path, [text for row in rows for text in row.values()])
    flags = tiny | dict(data=str(tmp_path / "game"), model=sender, receiver_model=receiver)
    task = TranslationGame(configure(**flags))
    assert task.tokenizer.get_vocab() != task.receiver_tokenizer.get_vocab()
    assert task.policy.generation_config.num_beams is None
    result = train(configure(**flags))
    assert result["end"]["update"] == 4 and result["history"][1]["kl"] != 0


def test_low_precision_weights(tiny, tmp_path):
    train(configure(**tiny))
    folders = dict(model=str(tmp_path / "run" / "model"), receiver_model=str(tmp_path / "run" / "receiver"))
    flags = tiny | folders | dict(dtype="bfloat16", output_dir=str(tmp_path / "half"))
    task = TranslationGame(configure(**flags))
    assert task.policy.dtype == torch.bfloat16
    assert train(configure(**flags))["end"]["update"] == 4


def test_pretraining_is_cached_by_what_made_it(tiny):
    data = toy_translations()

    def folder(data=data, **others):
        model, _ = seq2seq("sender", "", data, configure(**tiny | others))
        return Path(model.name_or_path)

    first = folder()
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert folder() == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    others = [folder(d_model=20), folder(pretrain_updates=21), folder(data | dict(sender=data["sender"][1:]))]
    assert len({first, *others}) == 4


def test_pretraining_learns(tiny):
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(0)
    pairs = [("a a", "c c"), ("b b", "d d")] * 50
    tokenizer = train_tokenizer(["a b c d"], 0, 16)
    shape = dict(vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, pad_token_id=0)
    shape |= dict(
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32
    )
    shape |= dict(eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None, dropout=0.0)
    model = MarianMTModel(MarianConfig(max_position_embeddings=32, **shape))
    fit(
        model,
        tokenizer,
        pairs,
        likelihood_loss,
        200,
        configure(**tiny | dict(pretrain_learning_rate=1e-2)),
        "",
    )
    model.eval()
    assert translate(model, tokenizer, ["a a", "b b"], 16, 8) == ["c c", "d d"]
    right = token_mean(*target_logprobs(model, tokenizer, ["a a"], ["c c"], 16)).item()
    wrong = token_mean(*target_logprobs(model, tokenizer, ["a a"], ["d d"], 16)).item()
    assert right > -0.1 > wrong


def test_shuffled_runs_through_everything():
    items = list(range(10))
    seen = [x for update in range(1, 6) for x in shuffled(items, 4, update, seed=1)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == items and seen[:10] != seen[10:]
    assert shuffled(items, 4, 3, seed=1) == seen[8:12] != shuffled(items, 4, 3, seed=2)


def test_batches_of_like_length_lose_nothing():
    pairs = [(str(i), "x" * (i % 7)) for i in range(40)]
    batches = list(batches_of_like_length(pairs, 5, 8, pool=4))
    assert sorted(source for sources, _ in batches for source in sources) == sorted(
        source for source, _ in pairs
    )
    spread = [len(max(targets)) - len(min(targets)) for _, targets in batches]
    assert sum(spread) < 8 * 3 and all(len(sources) == 5 for sources, _ in batches)


def test_bpe_and_word_tokenizers_give_back_the_text():
    text = "Der Hund mag die Ärztin, l'été !"
    for size in (0, 300):
        tokenizer = train_tokenizer([text], size, 64)
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_embedded_corpus():
    data = toy_translations()
    french = {name: {row["fr"] for row in data[name]} for name in ("train", "validation")}
    french["sender"] = {source for source, _ in data["sender"]}
    english = {row["en"]: row["de"] for row in data["train"]}
    assert not french["train"] & french["validation"] and not french["train"] & french["sender"]
    assert len(data["validation"]) == 512 and len(set(english.values())) > 15_000
    assert data["train"] == toy_translations()["train"]
    for row in data["train"][:50]:
        assert json.dumps(row) and all(row.values()) and "_" not in "".join(row.values())
    clean, noisy = (toy_sentence(random.Random(3), noise) for noise in (0.0, 1.0))
    assert clean["fr"] == noisy["fr"] and clean["de"] == noisy["de"]


@pytest.mark.skipif(
    not REAL.exists(), reason=f"the real corpora are not at {REAL.name}/ beside the repository"
)
def test_real_corpora():
    rows = load_rows(f"{REAL}/multi30k:train[28990:]", "en fr de")
    assert len(rows) == 10 and all(len(row["fr"].split()) > 2 for row in rows)
    assert len(load_rows(f"{REAL}/tatoeba-en-fr:validation", "fr en")) == 1000
