"""Small random models that see, and what transformers itself makes of them.

A random model is blind unless made to see: with the usual small weights attention hardly matters, and tied embeddings
repeat the input whatever attention says. So embeddings are untied, and q and k are large.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isclose
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vattention.attention import choose
from vattention.attention.base import NAME, Attend, AttentionBatch, Features, Kernel, Segment, register
from vattention.cache import KVCache, PagedKVCache
from vattention.engine.engine import Engine
from vattention.engine.judge import judge
from vattention.engine.loading import LoadedModel, load_model
from vattention.engine.request import Request
from vattention.engine.runner import Runner
from vattention.engine.sampling_params import SamplingParams

# Waking a second thread costs more than such small work, and ten times more than that on a busy machine.
torch.set_num_threads(1)

TOLERANCE = 1e-4
"""Of float32 logits, as a share of their spread; a wrong scale or mask moves them by more than their spread."""

WINDOW = 16
"""Of every model that has sliding windows: prompts are several times longer."""

SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

_IF_IT_HAS: dict[str, Any] = {
    "sliding_window": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "moe_layer_interval": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
"""Sizes that only some types have."""

_LATENT: dict[str, Any] = {
    "num_key_value_heads": 6,
    "head_dim": 4,
    "qk_head_dim": 12,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}


def _yarn(**more: Any) -> dict[str, Any]:
    """YaRN from a context that the long prompts are beyond; by default types have it from thousands of tokens."""
    original = {"original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0}
    return {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **original, **more}


OPTIONS: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "biogpt": {"num_key_value_heads": 6},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.3},
    "cwm": {"bos_token_id": 1, "eos_token_id": 2},
    "deepseek_v2": {**_LATENT, "q_lora_rank": None},
    "deepseek_v3": _LATENT,
    "gemma2": {"attn_logit_softcapping": 0.8, "query_pre_attn_scalar": 4, "final_logit_softcapping": 3.0},
    "gemma3_text": {"query_pre_attn_scalar": 4},
    "gemma4_text": {
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 211,
    },
    "gemma4_unified_text": {"global_head_dim": 16, "num_kv_shared_layers": 0},
    "glm4_moe": {"use_qk_norm": True},
    "glm4_moe_lite": _LATENT,
    "gpt_oss": {"rope_parameters": _yarn(truncate=False)},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 3.0,
    },
    "granite_swa": {"attention_multiplier": 0.3, "layer_rope_theta": [1e4, 1e2, 1e4]},
    "granitemoe": {"attention_multiplier": 0.3},
    "granitemoe_swa": {"attention_multiplier": 0.3, "layer_rope_theta": [1e4, 1e2, 1e4]},
    "granitemoeshared": {"attention_multiplier": 0.3},
    "longcat_flash": _LATENT,
    "mimo_v2_flash": {
        "num_key_value_heads": 1,
        "v_head_dim": 6,
        "initializer_range": 0.15,
        "rope_parameters": {  # half of eight dimensions: of the third by default only one turns, alike at every theta
            "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    },
    "minicpm3": _LATENT,
    "ministral3": {"rope_parameters": _yarn(mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)},
    "modernbert-decoder": {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "local_attention": 2 * WINDOW,
    },
    "olmo": {"clip_qkv": 2.0},
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "phimoe": {"sliding_window": 256},
    "gpt_neox": {"rotary_pct": 0.5},
    "qwen2": {"use_sliding_window": True},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 256},
    "qwen3": {"use_sliding_window": True},
    "qwen3_moe": {"use_sliding_window": True},
    "smollm3": {"use_sliding_window": True, "no_rope_layers": [1, 0, 1]},
    "vaultgemma": {"attn_logit_softcapping": 0.8, "query_pre_attn_scalar": 4},
    "youtu": _LATENT,
}
"""What a type can do and its defaults leave off, or what it needs to be built small."""

COMMON = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "cohere", "gpt_neox", "gpt2"),
    *("starcoder2", "granite", "smollm3", "mixtral", "qwen3_moe", "gpt_oss"),
    *("mimo_v2_flash", "gemma4_text", "deepseek_v3"),  # layers of different shapes
)
"""The types that are compared in every way to run."""

_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The configuration of a small model of this type, with what it can do switched on."""
    own = OPTIONS.get(model_type, {})
    default = AutoConfig.for_model(model_type, **{name: own[name] for name in own if name.endswith("_token_id")})
    extra = {name: value for name, value in _IF_IT_HAS.items() if hasattr(default, name)}
    if "sliding_window" in extra and hasattr(default, "layer_types"):
        extra["layer_types"] = list(_ALTERNATING)  # Gemma 4 changes it in place
    return AutoConfig.for_model(model_type, **{**SIZES, **extra, **own, **changes})


_LOUD = ("q_proj.w", "k_proj.w", "qkv_proj.w", "query_key_value.w", "c_attn.w", "Wqkv.w", "q_b_proj.w", "kv_b_proj.w")
_LOUD_NORMS = ("q_norm", "k_norm", "query_layernorm", "key_layernorm")


def tiny_model(model_type: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model of this type, in eval mode, with an attention of transformers' own.

    The same seed and other `changes` that add no weights give the same weights.
    """
    config = tiny_config(model_type, **changes)
    torch.manual_seed(seed)
    # Eager, because sdpa refuses soft caps and sinks.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in (*_LOUD, *_LOUD_NORMS)):
                weight.mul_(2)  # normalised q and k forget the size of the weights before them
            elif "sink" in name:
                weight.uniform_(1, 3)
    return model


def prompts_of(*lengths: int, seed: int = 1, vocab_size: int = SIZES["vocab_size"]) -> list[tuple[int, ...]]:
    """Random prompts of these many tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(vocab_size, (n,), generator=generator).tolist()) for n in lengths]


def greedy(model: Any, prompt: Sequence[int], tokens: int) -> tuple[int, ...]:
    """What transformers' own generate says, with its own cache, alone."""
    ids = torch.tensor([prompt])
    # Without the mask, generate would guess that tokens equal to the padding token are padding.
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0
    )
    return tuple(out[0, len(prompt) :].tolist())


@torch.inference_mode()
def teacher_forced(model: Any, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    """The logits from which each token of `output` is chosen, `[output, vocabulary]`, by one pass without any cache."""
    ids = torch.tensor([[*prompt, *output[:-1]]])
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()


@dataclass
class Recorder:
    """Stands between an engine and its runner, and keeps the logits of every token by request."""

    runner: Any
    logits: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    passes: list[list[tuple[str, int, int]]] = field(default_factory=list)

    def forward(self, chunks: Sequence[Any]) -> torch.Tensor:
        logits = self.runner.forward(chunks)
        self.passes.append([(chunk.request.request_id, chunk.start, chunk.end) for chunk in chunks])
        places = [(chunk, position) for chunk in chunks for position in chunk.wanted]
        for (chunk, position), row in zip(places, logits, strict=True):
            if chunk.samples and position == chunk.end - 1:
                self.logits.setdefault(chunk.request.request_id, {})[chunk.end] = row.float().clone()
        return logits

    def get_ready(self, slot: int, *, wait: bool = True) -> None:
        self.runner.get_ready(slot, wait=wait)

    def of(self, request_id: str) -> torch.Tensor:
        """`[output, vocabulary]`, in order of position."""
        rows = self.logits[request_id]
        return torch.stack([rows[position] for position in sorted(rows)])


@functools.cache
def demo_model() -> LoadedModel:
    """SmolLM2-135M-Instruct in float32, read once a session."""
    return load_model(None, dtype="float32")


def loaded(model: Any, tokenizer: Any = None) -> LoadedModel:
    """A `tiny_model` as `load_model` would hand it over."""
    register()
    model.set_attn_implementation(NAME)
    size = sum(weight.nbytes for weight in model.parameters())
    return LoadedModel("tiny", model, tokenizer, judge(model.config), model.dtype, frozenset(), size)


@contextmanager
def as_transformers(model: Any) -> Iterator[Any]:
    """The same model computing attention the way transformers does, without this package."""
    model.set_attn_implementation("eager")
    try:
        yield model
    finally:
        model.set_attn_implementation(NAME)


def engine_for(model: LoadedModel, *, max_num_seqs: int = 4, max_model_len: int = 256, **options: Any) -> Engine:
    """An engine with a `Recorder` in it; options are those of KVLayout, of the cache and of Engine."""
    shape = model.geometry
    ours = {name: options.pop(name) for name in ("head_major", "layers_per_stream", "kv_together") if name in options}
    theirs = {"max_num_batched_tokens": options.pop("max_num_batched_tokens", 64)}
    theirs |= {name: options.pop(name) for name in ("seed", "eos_token_ids", "tokenizer") if name in options}
    layout = shape.layout(model.dtype, max_num_seqs, max_model_len, **ours)
    kind = {"virtual": KVCache, "paged": PagedKVCache}[options.pop("cache", "virtual")]
    cache = kind(layout, **{"memory": "256MiB", **options})
    return Engine(
        Recorder(Runner(model.model, cache)),  # type: ignore[arg-type]
        cache,
        vocab_size=shape.vocab_size,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        **theirs,
    )


def run(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[Request]:
    """Add all, step until nobody is left. Raises what a request fails of."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    requests = [engine.add_request(prompt, wanted) for prompt, wanted in zip(prompts, each, strict=True)]
    while engine.unfinished:
        for sample in engine.step():
            if sample.error is not None:
                raise sample.error
    return requests


@torch.inference_mode()
def one_pass(model: Any, tokens: Sequence[int], kernel: Kernel = choose.prepare) -> torch.Tensor:
    """The logits of all `tokens` `[tokens, vocabulary]` through our attention, on plain tensors in place of a cache."""
    shapes = judge(model.config).shapes
    sides = ((shape.num_kv_heads, width) for shape in shapes for width in (shape.key_dim, shape.value_dim))
    flat = [torch.zeros(1, len(tokens), heads, width) for heads, width in sides]
    batch = AttentionBatch.build(
        [Segment(0, 0, len(tokens), len(tokens))], list(zip(flat[::2], flat[1::2], strict=True)), kernel
    )
    register()
    before, _ = model.config._attn_implementation, model.set_attn_implementation(NAME)
    try:
        positions = torch.arange(len(tokens))[None]
        return model(input_ids=torch.tensor([tokens]), position_ids=positions, use_cache=False, **{NAME: batch}).logits[
            0
        ]
    finally:
        model.set_attn_implementation(before)


def watching(seen: set[str], **changes: Any) -> Kernel:
    """Our kernels, noting in `seen` which features layers ask for, with some of the features changed.

    `changes` are attributes of `Features`: a value, or a function of what the layer asks for.
    """

    def kernel(segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> Attend:
        attend = choose.prepare(segments, dtype=dtype, device=device)

        def watched(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
            asked = {name: getattr(features, name) for name in ("scaling", "window", "softcap", "sinks")}
            plain = features.scaling is None or isclose(features.scaling, keys.shape[3] ** -0.5, rel_tol=1e-6)
            seen.update(name for name in asked if asked[name] is not None and not (name == "scaling" and plain))
            if keys.shape[2] == 1 < q.shape[0]:
                seen.add("multi-query")
            elif keys.shape[2] < q.shape[0]:
                seen.add("grouped queries")
            if keys.shape[3] != values.shape[3]:
                seen.add("K and V of different width")
            new = {name: change(asked[name]) if callable(change) else change for name, change in changes.items()}
            return attend(q, keys, values, replace(features, **new))

        return watched

    return kernel


@functools.cache
def shared(model_type: str) -> Any:
    """The `tiny_model` of this type, made once a session. Skips the test where transformers has no such type."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    return tiny_model(model_type)


@functools.cache
def features_of(model_type: str) -> frozenset[str]:
    """What the layers of a small model of this type ask of attention."""
    seen: set[str] = set()
    one_pass(shared(model_type), prompts_of(40)[0], watching(seen))
    return frozenset(seen)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits, as a share of their spread."""
    return float((got - expected).abs().max() / expected.std())
