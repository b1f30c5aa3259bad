"""Models of many families in tiny form, and PEFT's methods: is what is sampled what is scored?

    python tests/families.py            # the table; exit code 1 if a model is silently off
    python tests/families.py gpt2 bart  # some of them

Each must be exact, that is within 1e-4 of the model alone, one row at a time, without padding, and no token
drawn otherwise than its scores say; or it must be refused by check_sampling() or load_model()'s checks."""

import sys
import types
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from elastic_reset import (  # noqa: E402
    ActorCritic,
    check_sampling,
    configure,
    draw_tokens,
    respond,
    score_responses,
    target_logprobs,
    token_ids,
)

VOCABULARY = 40
PROMPTS = ["w07", "w08 w10 w12", "w09 w11 w13 w15 w17 w19", "w20 w22 w24 w26 w28"]
TARGETS = ["w11 w12", "w13", "w14 w15 w16", "w17 w18 w19 w21"]
IDS = dict(vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, bos_token_id=3)
HIDDEN = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
KV = dict(num_key_value_heads=2)
LIKE_LLAMA = HIDDEN | KV | dict(max_position_embeddings=64)
HEADS = dict(head_dim=8)
BART = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, decoder_start_token_id=3,
    forced_bos_token_id=None, forced_eos_token_id=None,
)  # fmt: skip
T5 = dict(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
ALONE = dict(is_decoder=True)  # a model that also comes as an encoder

DECODERS = {
    "gpt2": GPT,
    "gpt_neo": dict(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    "gptj": GPT | dict(rotary_dim=4),
    "codegen": GPT | dict(rotary_dim=4),
    "gpt_neox": HIDDEN | dict(max_position_embeddings=64),
    "opt": HIDDEN | dict(ffn_dim=48, word_embed_proj_dim=32),
    "opt projected": HIDDEN | dict(ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "mpt": dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "falcon alibi": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True,
                         multi_query=False, new_decoder_architecture=False),
    "phi": HIDDEN | dict(max_position_embeddings=64),
    "phi3": LIKE_LLAMA,
    "llama": LIKE_LLAMA,
    "llama tied": LIKE_LLAMA | dict(tie_word_embeddings=True),
    "mistral": LIKE_LLAMA | dict(sliding_window=4),
    "mixtral": LIKE_LLAMA | dict(num_local_experts=4),
    "qwen2": LIKE_LLAMA | dict(tie_word_embeddings=True),
    "qwen3": LIKE_LLAMA | HEADS,
    "qwen3_moe": LIKE_LLAMA | HEADS | EXPERTS,
    "gemma": LIKE_LLAMA | HEADS,
    "gemma2": LIKE_LLAMA | HEADS | dict(sliding_window=4),
    "gemma3_text": LIKE_LLAMA | HEADS | dict(sliding_window=4),
    "stablelm": LIKE_LLAMA,
    "starcoder2": LIKE_LLAMA,
    "gpt_bigcode": GPT,
    "xglm": dict(d_model=32, num_layers=2, attention_heads=4, ffn_dim=48, max_position_embeddings=64),
    "biogpt": HIDDEN | dict(max_position_embeddings=64),
    "olmo": LIKE_LLAMA,
    "olmo2": LIKE_LLAMA,
    "cohere": LIKE_LLAMA,
    "granite": LIKE_LLAMA,
    "smollm3": LIKE_LLAMA,
    "glm": LIKE_LLAMA | HEADS,
    "nemotron": LIKE_LLAMA,
    "persimmon": HIDDEN | dict(max_position_embeddings=64),
    "mamba": dict(hidden_size=32, num_hidden_layers=2, state_size=4),
    "mamba2": dict(hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8, head_dim=8, n_groups=1),
    "openai-gpt": GPT,
    "ctrl": GPT | dict(dff=48),
    "bert": HIDDEN | ALONE,
    "electra": HIDDEN | ALONE | dict(embedding_size=32),
    "deepseek_v3": HIDDEN | dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                                 qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
                                 n_group=2, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1),
    "gpt_oss": LIKE_LLAMA | HEADS | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    "lfm2": LIKE_LLAMA | dict(layer_types=["conv", "full_attention"]),
    "jamba": LIKE_LLAMA | dict(use_mamba_kernels=False, mamba_d_state=4, attn_layer_period=2,
                               attn_layer_offset=1, num_experts=2),
    "rwkv": dict(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=64),
    "recurrent_gemma": LIKE_LLAMA | HEADS | dict(lru_width=32, attention_window_size=8,
                                                 block_types=["recurrent", "attention"]),
    "roberta": HIDDEN | ALONE | dict(max_position_embeddings=80, pad_token_id=0),
    "xlm-roberta": HIDDEN | ALONE | dict(max_position_embeddings=80, pad_token_id=0),
    "camembert": HIDDEN | ALONE | dict(max_position_embeddings=80, pad_token_id=0),
    "trocr": dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48),
    "xlnet": dict(d_model=32, n_layer=2, n_head=4, d_inner=48),
    "bart decoder": BART | ALONE,
    "mbart decoder": BART | ALONE,
    "blenderbot decoder": BART | ALONE,
    "pegasus decoder": BART | ALONE,
    "marian decoder": BART | ALONE,
}  # fmt: skip
TRANSLATORS = {
    "t5": T5,
    "t5 gated": T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "umt5": T5,
    "longt5": T5,
    "bart": BART,
    "mbart": BART | dict(forced_bos_token_id=5),
    "m2m_100": BART | dict(forced_bos_token_id=6),
    "pegasus": BART,
    "marian": BART,
    "led": BART | dict(attention_window=4, max_encoder_position_embeddings=64,
                       max_decoder_position_embeddings=64),
    "blenderbot": BART,
    "blenderbot-small": BART,
    "switch_transformers": T5 | dict(num_experts=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
                                     num_sparse_decoder_layers=1),
    "nllb-moe": BART | dict(num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2,
                            forced_bos_token_id=6),
    "pegasus_x": BART | dict(block_size=4, num_global_tokens=2),
    "bigbird_pegasus": BART | dict(attention_type="original_full"),
    "plbart": BART,
    "mvp": BART,
    "prophetnet": dict(hidden_size=32, num_encoder_layers=2, num_decoder_layers=2, encoder_ffn_dim=48,
                       decoder_ffn_dim=48, num_encoder_attention_heads=4, num_decoder_attention_heads=4,
                       decoder_start_token_id=3, max_position_embeddings=64),
}  # fmt: skip


def word_tokenizer(*, add_eos=False, pad=True, n=VOCABULARY):
    """A tokenizer of words w00, w01 ..., whose number is their id."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i:02}": i for i in range(n)}, unk_token="w02"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if add_eos:
        tokenizer.post_processor = processors.TemplateProcessing("$A w01", special_tokens=[("w01", 1)])
    names = dict(eos_token="w01", bos_token="w03") | (dict(pad_token="w00") if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def model_of(name, shape, kind):
    """A model of random weights, large enough that its choices differ."""
    from transformers import AutoConfig
    from transformers import models as families

    torch.manual_seed(0)
    family, _, form = name.partition(" ")
    forced = shape.get("forced_bos_token_id")
    shape = AutoConfig.for_model(family, **(IDS | shape))
    if form == "decoder":
        part = getattr(families, family)
        model = getattr(part, type(shape).__name__.replace("Config", "ForCausalLM"))(shape)
    else:
        import transformers

        model = getattr(transformers, f"AutoModelFor{kind}").from_config(shape)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.3)
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = 1
    model.generation_config.forced_bos_token_id = forced
    return model.eval()


def peft_policies():
    """PEFT's methods on an untied and on a tied Llama-like model."""
    import peft

    causal = dict(task_type="CAUSAL_LM")
    on = causal | dict(target_modules=["q_proj", "v_proj"])
    methods = {
        "LoRA": lambda: peft.LoraConfig(r=4, init_lora_weights=False, **on),
        "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, **on),
        "LoRA, lm_head saved": lambda: peft.LoraConfig(r=4, modules_to_save=["lm_head"], **on),
        "LoRA, embeddings saved": lambda: peft.LoraConfig(
            r=4, modules_to_save=["embed_tokens"], ensure_weight_tying=True, **on
        ),
        "LoRA, trainable tokens": lambda: peft.LoraConfig(r=4, trainable_token_indices=[7], **on),
        "LoRA on lm_head": lambda: peft.LoraConfig(r=4, target_modules=["lm_head"], **causal),
        "VB-LoRA": lambda: peft.VBLoRAConfig(r=2, topk=2, num_vectors=8, vector_length=16, **on),
        "VeRA": lambda: peft.VeraConfig(r=4, **on),
        "IA3": lambda: peft.IA3Config(feedforward_modules=[], **on),
        "AdaLoRA": lambda: peft.AdaLoraConfig(total_step=10, **on),
        "LoHa": lambda: peft.LoHaConfig(r=2, **on),
        "LoKr": lambda: peft.LoKrConfig(r=2, **on),
        "OFT": lambda: peft.OFTConfig(oft_block_size=8, **on),
        "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **causal),
        "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **causal),
        "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **causal),
    }
    for tied in (False, True):
        for name, settings in methods.items():
            family = "qwen2" if tied else "llama"
            shape = LIKE_LLAMA | dict(num_key_value_heads=4, tie_word_embeddings=tied)
            yield (f"{name} ({'tied' if tied else 'untied'})", lambda f=family, s=shape, p=settings:
                   peft.get_peft_model(model_of(f, s, "CausalLM"), p()).eval())  # fmt: skip


@torch.no_grad()
def by_hand(policy, prompt, response):
    """Logits from which each token of one row's response is predicted, by the model's own forward."""
    ids = token_ids(policy)
    if policy.config.is_encoder_decoder:
        start = torch.tensor([[ids["decoder_start_token_id"]]])
        decoder_input_ids = torch.cat([start, response[None, :-1]], 1)
        logits = policy(input_ids=prompt[None], decoder_input_ids=decoder_input_ids).logits[0]
    else:
        logits = policy(input_ids=torch.cat([prompt, response])[None, :]).logits[0, len(prompt) - 1 : -1]
    logits = logits.float()
    logits[:, ids["pad_token_id"]] = -1e9
    if ids.get("forced_bos_token_id") is not None:
        logits[0] = -1e9
        logits[0, ids["forced_bos_token_id"]] = 0
    return logits


def differences(policy, tokenizer):
    """The largest difference of a log-probability from those by hand, sampled and of targets; and the number
    of tokens drawn otherwise, of how many."""
    torch.manual_seed(1)
    batch, _ = respond(policy, tokenizer, PROMPTS, response_length=12, max_length=32)
    torch.manual_seed(1)
    uniform = torch.rand(12, len(PROMPTS), 1)
    logprobs, _ = score_responses(ActorCritic(policy), batch)
    worst = drawn_otherwise = n = 0
    for i in range(len(PROMPTS)):
        kept = batch["mask"][i]
        response = batch["responses"][i][kept]
        logits = by_hand(policy, batch["input_ids"][i][batch["attention_mask"][i].bool()], response)
        expected = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
        worst = max(worst, (expected - logprobs[i][kept]).abs().max().item())
        for t, token in enumerate(response):
            drawn_otherwise += int(draw_tokens(logits[t : t + 1], uniform[t, i : i + 1]).item() != token)
        n += len(response)
    return max(worst, target_difference(policy, tokenizer)), drawn_otherwise, n


def target_difference(policy, tokenizer):
    with torch.no_grad():
        logprobs, mask = target_logprobs(policy, tokenizer, PROMPTS, TARGETS, 32)
    worst = 0.0
    for i in range(len(PROMPTS)):
        source = torch.tensor(tokenizer(PROMPTS[i])["input_ids"])
        target = tokenizer(TARGETS[i])["input_ids"]
        forced = token_ids(policy).get("forced_bos_token_id")
        target = torch.tensor(target if forced is None else [forced, *target])
        logits = by_hand(policy, source, target)
        expected = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
        assert mask[i].sum() == len(target)
        worst = max(worst, (expected - logprobs[i][mask[i]]).abs().max().item())
    return worst


def verdict(make, add_eos=False):
    """Say whether a policy is exact or refused, and how far it is off."""
    tokenizer = word_tokenizer(add_eos=add_eos)
    try:
        policy = make()
    except Exception as error:  # noqa: BLE001
        return "not made", f"{type(error).__name__}: {str(error)[:110]}"
    frozen = {id(m): m for m in policy.modules() if isinstance(m, nn.Dropout)}
    assert not any(m.training for m in frozen.values())
    task = types.SimpleNamespace(policy=policy, tokenizer=tokenizer, validation_prompts=PROMPTS)
    refusal = ""
    try:
        check_sampling(task, configure(response_length=12, max_length=32))
    except ValueError as error:
        refusal = str(error)
    except Exception as error:  # noqa: BLE001
        return "ERROR", f"{type(error).__name__}: {str(error)[:110]}"
    try:
        worst, otherwise, n = differences(policy, tokenizer)
        numbers = f"off by {worst:.1e}, {otherwise} of {n} tokens drawn otherwise"
    except Exception as error:  # noqa: BLE001
        worst, otherwise = 1.0, 1
        numbers = f"{type(error).__name__}: {str(error)[:60]}"
    if refusal:
        return "refused", f"{numbers}; {refusal[:90]}"
    return ("exact" if worst < 1e-4 and not otherwise else "SILENTLY OFF"), numbers


def table(chosen=()):
    """Yield (name, verdict, numbers) of every model, or of those chosen."""
    for name, shape in DECODERS.items():
        if not chosen or name in chosen:
            yield name, *verdict(lambda n=name, s=shape: model_of(n, s, "CausalLM"))
    for name, shape in TRANSLATORS.items():
        if not chosen or name in chosen:
            yield name, *verdict(lambda n=name, s=shape: model_of(n, s, "Seq2SeqLM"), add_eos=True)
    for name, make in peft_policies():
        if not chosen or name in chosen:
            yield name, *verdict(make)


if __name__ == "__main__":
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    counts = {}
    for name, result, numbers in table(sys.argv[1:]):
        counts[result] = counts.get(result, 0) + 1
        print(f"{name:28} {result:13} {numbers}", flush=True)
    print(counts)
    sys.exit(1 if counts.keys() & {"SILENTLY OFF", "ERROR"} else 0)
