"""Which architectures of transformers are computed exactly, which are not, and why: the tables behind `judge`.

A model type is accepted when tests/engine/test_models.py builds it small, with weights that see, and finds the same
logits and tokens as transformers. Every other causal language model of transformers is refused by name, here, with the
reason; a test walks them all. docs/models.md is written from these tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vattention.cache.layout import LayerShape

Shapes = Callable[[Any], tuple[LayerShape, ...]]
"""From a configuration to what one token leaves in each layer."""


def _grouped(config: Any) -> tuple[LayerShape, ...]:
    heads = config.num_attention_heads
    return _same(config, getattr(config, "num_key_value_heads", None) or heads, _head_dim(config))


def _ungrouped(config: Any) -> tuple[LayerShape, ...]:
    return _same(config, config.num_attention_heads, config.hidden_size // config.num_attention_heads)


def _multi_query(config: Any) -> tuple[LayerShape, ...]:
    heads = 1 if config.multi_query else config.num_attention_heads
    return _same(config, heads, config.hidden_size // config.num_attention_heads)


def _mixture_of_attention(config: Any) -> tuple[LayerShape, ...]:
    # Each of the experts a token goes to reads the K and V heads again; transformers repeats them before attention.
    return _same(config, config.num_key_value_heads * config.num_experts_per_tok, config.kv_channels)


def _latent(config: Any) -> tuple[LayerShape, ...]:
    # transformers expands the latent before it calls attention, so what is cached are K and V of every head.
    key_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    return (LayerShape(config.num_attention_heads, key_dim, config.v_head_dim),) * config.num_hidden_layers


def _latent_twice(config: Any) -> tuple[LayerShape, ...]:
    key_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    return (LayerShape(config.num_attention_heads, key_dim, config.v_head_dim),) * (2 * config.num_layers)


def _mimo(config: Any) -> tuple[LayerShape, ...]:
    heads = {"full_attention": config.num_key_value_heads, "sliding_attention": 2 * config.num_key_value_heads}
    return tuple(LayerShape(heads[kind], config.head_dim, config.v_head_dim) for kind in config.layer_types)


def _by_layer(config: Any) -> tuple[LayerShape, ...]:
    layers = (config.per_layer_config[layer] for layer in range(config.num_hidden_layers))
    return tuple(LayerShape(layer.num_key_value_heads, layer.head_dim, layer.head_dim) for layer in layers)


def _same(config: Any, heads: int, width: int) -> tuple[LayerShape, ...]:
    return (LayerShape(heads, width, width),) * config.num_hidden_layers


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


_PLAIN = """
    afmoe apertus arcee aria_text beam bitnet cohere cohere2 cohere2_moe cwm dots1 ernie4_5 ernie4_5_moe exaone4
    exaone_moe flex_olmo flint gemma gemma2 gemma3_text glm glm4 glm4_moe gpt_oss granite granite_swa granitemoe
    granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder
    jais2 kolibri1 laguna llama mellum minimax_m2 ministral ministral3 mistral mixtral nanochat olmo olmo2
    olmo3 olmoe phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open starcoder2 vaultgemma
"""

ACCEPTED: dict[str, Shapes] = {
    **dict.fromkeys(_PLAIN.split(), _grouped),
    **dict.fromkeys(("biogpt", "ctrl", "gpt2", "gpt_neox", "modernbert-decoder", "opt", "persimmon"), _ungrouped),
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), _latent),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _by_layer),
    "gpt_bigcode": _multi_query,
    "jetmoe": _mixture_of_attention,
    "longcat_flash": _latent_twice,
    "mimo_v2_flash": _mimo,
}
"""Model type -> the shapes of its layers."""

WINDOW_IN_MASK = frozenset({"phimoe", "qwen2_moe"})
"""Accepted, but their window is in transformers' mask alone and attention is not told of it: served up to the window,
where it changes nothing."""

_REASONS: dict[str, str] = {
    "it keeps recurrent or convolution state from token to token, which a flat batch would mix between requests": """
        bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm3 mamba mamba2
        minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp
        qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2 zaya
    """,
    "an indexer or compressor with a cache of its own picks the keys of each token, and a flat batch would mix it": """
        axk2 deepseek_v32 deepseek_v4 dots3_note dots3_note_text glm_moe_dsa hy_v4 minimax_m3_vl_text
    """,
    "its chunked attention is in transformers' mask alone, and packing requests loses the mask": "llama4 llama4_text",
    "it builds a mask of its own from learned values, and packing requests loses the mask": "doge",
    "it is a patch-based byte model: several transformers of different lengths, with cross-attention": "blt",
    "it adds a learned position bias to the scores, which no kernel here does, and keeps convolution state besides": """
        inkling2_text inkling_text
    """,
    "it computes attention in its own code and not through transformers' attention interface": """
        codegen gpt_neo gpt_neox_japanese gptj openai-gpt reformer xglm xlm
    """,
    "it adds a position bias to the scores (ALiBi, or falcon's by configuration), in code of its own and not through"
    " transformers' attention interface": "bloom falcon mpt",
    "it adds a learned position bias to the scores, in code of its own and not through transformers' attention"
    " interface": "cpmant xlnet",
    "it does not pass forward arguments on to attention, which would not learn where the batch's requests are": """
        nemotron stablelm
    """,
    "its layers compute attention several times a pass, and each layer has room for one K and V": "diffllama hrm_text",
    "its later layers read K and V of earlier ones out of transformers' own cache": "gemma3n_text",
    "it drafts for another model, and reads that model's K and V": "gemma4_assistant gemma4_unified_assistant",
    "it is one half of an encoder-decoder model or attends to another input (cross-attention)": """
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart mllama moshi musicgen musicgen_melody mvp pegasus
        plbart prophetnet trocr whisper
    """,
    "it is an encoder, bidirectional unless configured as a decoder, and nobody has compared that": """
        bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert
        roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod
    """,
    "it is a multimodal model: images or sound come with masks and positions that packing loses": """
        emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified git got_ocr2 moss_transcribe_diarize phi4_multimodal
    """,
    "its configuration keeps attention or positions in parts of its own, and nobody has compared it": """
        cohere_compass_text dbrx
    """,
}

REFUSED: dict[str, str] = {kind: reason for reason, kinds in _REASONS.items() for kind in kinds.split()}
"""Model type -> why this engine would not compute it exactly."""
