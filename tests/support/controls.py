"""The controls: the reference computed without one feature of the model, which our comparison has to notice.

A random model may be blind to a feature: the logits would be equal though we computed it wrong. So each feature that
the configuration of a small model switches on is switched off once, in transformers and not in this package, and the
logits must move by far more than what the comparison passes. `controls_of` says which features a type has.
"""

import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from support.models import features_of, prompts_of, shared, tiny_model
from vattention.engine.judge import judge

LONG, SHORT = prompts_of(90, 12)
"""Longer than windows and than the context RoPE was scaled from; and shorter than every window."""

Prompt = tuple[int, ...]
Control = Callable[[], tuple[Prompt, Tensor]]
"""A prompt, and transformers' logits `[1, vocabulary]` after it without the feature."""

EVERYWHERE = ("positions", "causality", "requests apart")
"""The features of every type."""

_MULTIPLIERS = (
    *("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_value_scale"),
    *("scale_emb", "scale_depth", "routed_scaling_factor", "router_scaling_factor"),
)
_EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
_WITHOUT_EFFECT = frozenset({("beam", "routed_scaling_factor"), ("minicpm3", "logits_scaling")})
"""Beam normalises what the experts say, whatever its size; MiniCPM3 computes its scaling from another number."""
_TOP_2 = frozenset({"phimoe"})
"""Routers that take two experts whatever the configuration says."""
_NORMS = frozenset(
    {"q_norm", "k_norm", "query_layernorm", "key_layernorm", "q_layernorm", "k_layernorm", "qk_norm", "v_norm"}
)
_NAME = "without one feature"


def controls_of(model_type: str) -> dict[str, Control]:
    """Feature -> its control, for every feature that the small model of this type has."""
    model = shared(model_type)
    changes = dict(_changes(model.config, features_of(model_type)))
    found: dict[str, Control] = {name: partial(rebuilt, model_type, new) for name, new in changes.items()}
    found |= {name: partial(patched, model_type, patch) for name, patch in _patches(model)}
    asks = features_of(model_type)
    calls = {"scaling": _plain_scaling, "grouped queries": _other_head, "K and V of different width": _narrow_value}
    found |= {name: partial(called, model_type, change) for name, change in calls.items() if name in asks}
    return found | {name: partial(_asked, model_type, way) for name, way in _WAYS.items()}


# -- in the configuration: the same weights in a model configured otherwise -------------------------------------------


def _changes(config: Any, asks: frozenset[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    def has(name: str, *off: Any) -> bool:
        return getattr(config, name, None) not in (None, *off)

    if "window" in asks:
        yield "sliding window", {"sliding_window": 256} | ({"local_attention": 512} if has("local_attention") else {})
        # Where full and sliding layers have different shapes, their weights would not fit.
        if len(set(getattr(config, "layer_types", None) or ())) > 1 and len(set(judge(config).shapes)) == 1:
            yield "full layers between", {"layer_types": ["sliding_attention"] * len(config.layer_types)}
    if has("attn_logit_softcapping"):
        yield "soft cap", {"attn_logit_softcapping": 1e6}
    if has("final_logit_softcapping"):
        yield "soft cap of logits", {"final_logit_softcapping": 1e6}
    if has("clip_qkv"):
        yield "clipped q, k, v", {"clip_qkv": None}
    if has("no_rope_layers") and 0 in config.no_rope_layers:
        yield "layers without RoPE", {"no_rope_layers": [1] * len(config.no_rope_layers)}
    if has("layer_rope_theta") and len(set(config.layer_rope_theta)) > 1:
        yield "RoPE by layer", {"layer_rope_theta": [config.layer_rope_theta[0]] * len(config.layer_rope_theta)}
    for name in _MULTIPLIERS:
        if has(name, 1.0) and (config.model_type, name) not in _WITHOUT_EFFECT:
            yield name, {name: 1.0}
    if has("dim_model_base"):
        yield "logits_scaling", {"dim_model_base": config.hidden_size}
    if (experts := [name for name in _EXPERTS if has(name)]) and config.model_type not in _TOP_2:
        yield "top-k of experts", dict.fromkeys(experts, 3)
    if has("rope_interleave", False):
        yield "interleaved RoPE", {"rope_interleave": False}
    if has("rope_parameters"):
        yield from _rope(config.rope_parameters)


def _rope(parameters: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """RoPE has one set of parameters, or one a kind of layer; None there means no RoPE."""
    nested = any(isinstance(value, dict) for value in parameters.values())
    sets = dict(parameters) if nested else {"": dict(parameters)}

    def changed(change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        new = {kind: one and change(deepcopy(one)) for kind, one in sets.items()}
        return {"rope_parameters": new if nested else new[""]}

    given = [one for one in sets.values() if one]
    if any(one.get("rope_type", "default") not in ("default", "proportional") for one in given):
        yield "RoPE kind", changed(lambda one: {**one, "rope_type": "default"})
    if any(one.get("partial_rotary_factor", 1.0) != 1.0 for one in given):
        yield "partial RoPE", {**changed(lambda one: {**one, "partial_rotary_factor": 1.0}), "rotary_pct": 1.0}
    if any(one.get("llama_4_scaling_beta") for one in given):
        yield "scaling by position", changed(lambda one: {**one, "llama_4_scaling_beta": 0.0})
    if len({str(one) for one in sets.values()}) > 1:
        yield "RoPE by layer", {"rope_parameters": dict.fromkeys(sets, sets["sliding_attention"])}


def rebuilt(model_type: str, changes: dict[str, Any]) -> tuple[Prompt, Tensor]:
    other = tiny_model(model_type, **changes)
    other.load_state_dict(shared(model_type).state_dict())  # which fails for a feature that has weights
    return LONG, reference(other, LONG)


# -- in the modules ---------------------------------------------------------------------------------------------------


def _patches(model: Any) -> Iterator[tuple[str, Callable[[Any], None]]]:
    if any("sink" in name for name, _ in model.named_parameters()):
        yield "sinks", _without_sinks
    if any(name.rpartition(".")[2] in _NORMS for name, _ in model.named_modules()):
        yield "norms of q and k", _without_norms


@torch.no_grad()
def _without_sinks(model: Any) -> None:
    for name, weight in model.named_parameters():
        if "sink" in name:
            weight.fill_(-1e4)


def _without_norms(model: Any) -> None:
    for name, _ in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if own in _NORMS:
            setattr(model.get_submodule(parent), own, torch.nn.Identity())


def patched(model_type: str, patch: Callable[[Any], None]) -> tuple[Prompt, Tensor]:
    other = deepcopy(shared(model_type))
    patch(other)
    return LONG, reference(other, LONG)


# -- in the call of attention -----------------------------------------------------------------------------------------

Call = dict[str, Any]
"""query, key and value `[1, heads, rows, width]` and the keyword arguments of transformers' eager attention."""


def _plain_scaling(call: Call) -> Call:
    return {**call, "scaling": call["key"].shape[-1] ** -0.5}


def _other_head(call: Call) -> Call:
    return {**call, "key": call["key"].roll(1, 1), "value": call["value"].roll(1, 1)}


def _narrow_value(call: Call) -> Call:
    value = call["value"].clone()
    value[..., -1] = 0
    return {**call, "value": value}


def called(model_type: str, change: Callable[[Call], Call]) -> tuple[Prompt, Tensor]:
    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        call = change({"query": query, "key": key, "value": value, **kwargs})
        return eager(module, attention_mask=attention_mask, **call)

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, eager_mask)
    return LONG, reference(shared(model_type), LONG, _NAME)


# -- in what the model is asked ---------------------------------------------------------------------------------------


def _nowhere(model: Any) -> tuple[Prompt, Tensor]:
    """Every token at the first position. The mask of ones says that they are one text all the same."""
    ones = torch.ones(1, len(LONG), dtype=torch.long)
    return LONG, reference(model, LONG, attention_mask=ones, position_ids=ones - 1)


def _seeing_all(model: Any) -> tuple[Prompt, Tensor]:
    """Every token sees every other: the mask adds nothing to any score."""
    mask, positions = torch.zeros(1, 1, len(SHORT), len(SHORT)), torch.arange(len(SHORT))[None]
    return SHORT, reference(model, SHORT, attention_mask=mask, position_ids=positions)


def _in_company(model: Any) -> tuple[Prompt, Tensor]:
    """Two requests as one long text, which is what a kernel without segments would compute."""
    both = (*LONG, *SHORT)
    positions = torch.tensor([[*range(len(LONG)), *range(len(SHORT))]])
    return SHORT, reference(model, both, attention_mask=torch.ones(1, len(both)), position_ids=positions)


def _asked(model_type: str, way: Callable[[Any], tuple[Prompt, Tensor]]) -> tuple[Prompt, Tensor]:
    return way(shared(model_type))


_WAYS = dict(zip(EVERYWHERE, (_nowhere, _seeing_all, _in_company), strict=True))


@torch.inference_mode()
def reference(model: Any, tokens: Prompt, implementation: str = "eager", **arguments: Any) -> Tensor:
    """transformers' logits `[1, vocabulary]` after the last token, in one pass without a cache."""
    before, _ = model.config._attn_implementation, model.set_attn_implementation(implementation)
    try:
        return model(input_ids=torch.tensor([tokens]), use_cache=False, **arguments).logits[0, -1:].float()
    finally:
        model.set_attn_implementation(before)
