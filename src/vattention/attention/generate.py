"""Attention for transformers' own `model.generate()` and `model(...)`, with any of its caches and without the engine.

    import vattention.attention

    vattention.attention.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="vattention")

It computes what `attn_implementation="sdpa"` computes, from the same masks, and also soft caps and sinks, which sdpa
has not. K and V are read where the cache keeps them, whatever their strides: they are never copied or repeated for
grouped heads. On a CPU decoding is faster: `cpu_decode` reads every byte of K and V once for the whole group. Without
it (no compiler), and for a few new tokens, the queries that share a KV head become rows of one small query, which has
the same effect. What gains nothing from that (prompts, other devices, compiled models, training) goes to the kernel
that "sdpa" would use.

The engine has a name of its own (`attention.base`), for which transformers builds no mask: a flat batch of requests
would get one of rows x rows. Here masks arrive as they do for "sdpa": boolean, `[batch, 1, rows, tokens]`, True where a
row may look; or None, where a single row sees every token and several see those up to their own.

Source: https://huggingface.co/docs/transformers/main/en/attention_interface
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from vattention.attention import cpu_decode
from vattention.attention.base import Features
from vattention.attention.blocked import SCORE_BYTES
from vattention.errors import UnsupportedModel

NAME = "vattention"
"""What `attn_implementation` is called."""

_FOLDED_ROWS = 8
"""Up to this many new tokens (assisted decoding) it pays to make rows of a group; beyond, there are enough rows."""

_ROWS = 256
"""The most rows of a block in `_by_definition`."""


def register() -> None:
    """Make `attn_implementation="vattention"` known to transformers. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask)


def mask(*args: Any, config: Any = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> torch.Tensor | None:
    """The mask of one forward pass, as transformers' `sdpa_mask` makes it.

    Raises:
        UnsupportedModel: the model's code computes attention itself and would never call `attention_forward`.
    """
    from transformers.masking_utils import sdpa_mask

    _check_calls_us(type(config).__module__)
    if getattr(config, "num_kv_shared_layers", None):
        # Gemma 4 drops rows of a prompt between layers, and then a causal mask that was left out cannot be guessed.
        allow_is_causal_skip = False
    made: torch.Tensor | None = sdpa_mask(*args, config=config, allow_is_causal_skip=allow_is_causal_skip, **kwargs)
    return made


@functools.cache
def _check_calls_us(module: str) -> None:
    """That the models whose configuration is in `module` ask transformers which attention to call."""
    code = sys.modules.get(module.replace(".configuration_", ".modeling_"))
    if code is None or hasattr(code, "ALL_ATTENTION_FUNCTIONS"):
        return
    # Without attention of its own (a model that puts others together) it may still call us.
    if any("Attention" in name and getattr(own, "__module__", "") == code.__name__ for name, own in vars(code).items()):
        raise UnsupportedModel(
            f"{code.__name__} computes attention itself, and not through transformers' attention interface: use"
            ' attn_implementation="sdpa" or "eager"'
        )


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, with the signature that transformers calls.

    Args:
        module: the model's attention module; its `is_causal` counts where the argument is None.
        query: `[batch, q_heads, rows, width]`.
        key: `[batch, kv_heads, tokens, width]`, with any strides, the new tokens included; `value` may be of another
            width.
        attention_mask: broadcast to `[batch, q_heads, rows, tokens]`: boolean (True: look), or added to the scores.
        softcap, s_aux: see `attention.base.Features`. Sliding windows are in the mask.
        indices, block_indices: the keys that sparse attention has picked, which transformers leaves to any
            implementation but its own two.
        kwargs: as for "sdpa": `position_bias` is added to the scores, others change nothing.

    Returns:
        `[batch, rows, q_heads, width of V]` and None (there are no attention weights to show).

    Raises:
        UnsupportedModel: soft caps or sinks together with dropout or a position bias.
    """
    rows, q_heads, kv_heads = query.shape[2], query.shape[1], key.shape[1]
    if indices is not None:
        attention_mask = _only(indices, attention_mask, key.shape[2])
    elif block_indices is not None:
        attention_mask = _only_blocks(module, block_indices, attention_mask, query, key, kwargs.get("position_ids"))
    bias = kwargs.get("position_bias")
    if softcap is not None or s_aux is not None:
        if dropout or bias is not None:
            raise UnsupportedModel(
                f"the model passes {'dropout' if dropout else 'a position bias'} together with a soft cap or sinks: use"
                ' attn_implementation="eager" for that'
            )
    elif (
        query.device.type != "cpu"
        or dropout
        or bias is not None
        or "cache" in kwargs
        or query.shape[0] != key.shape[0]
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
    ):
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)

    if rows == 1 and _by_token(attention_mask, key) and cpu_decode.can(query, key, value):
        features = Features(scaling, softcap=softcap, sinks=s_aux)
        return _decoded(query, key, value, attention_mask, features), None
    causal = rows > 1 and attention_mask is None and _is_causal(module, is_causal)
    if causal:
        # As torch aligns it, row i sees keys 0..i: there is no mask only where nothing was cached before, and what a
        # static cache has behind the new tokens is not to be seen.
        key, value = key[:, :, :rows], value[:, :, :rows]
    if softcap is not None or s_aux is not None or value.shape[3] != key.shape[3]:
        # sdpa has neither of the first two, and for the third it allocates heads x rows x tokens at once.
        out = _by_definition(query, key, value, attention_mask, causal, scaling, softcap, s_aux)
    elif q_heads > kv_heads and rows <= _FOLDED_ROWS and not causal:
        out = _folded(query, key, value, attention_mask, scaling)
    else:
        out = scaled_dot_product_attention(
            query, key, value, attention_mask, is_causal=causal, scale=scaling, enable_gqa=q_heads > kv_heads
        )
    return out.transpose(1, 2).contiguous(), None


def _is_causal(module: torch.nn.Module, given: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """What `attn_implementation="sdpa"` would do."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    result: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return result


def _by_token(mask: torch.Tensor | None, key: torch.Tensor) -> bool:
    """Whether a mask says of each token whether it counts, the same for all heads."""
    if mask is None:
        return True
    return mask.dtype == torch.bool and mask.shape[1:] == (1, 1, key.shape[2]) and mask.stride(3) == 1


def _decoded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, features: Features
) -> torch.Tensor:
    """One row of each sequence, `[batch, 1, q_heads, width of V]`."""
    batch, tokens = key.shape[0], key.shape[2]
    rows = torch.arange(batch)
    requests = cpu_decode.Requests(rows, rows, torch.full((batch,), tokens))
    out = query.new_empty((batch, query.shape[1], value.shape[3]))
    if mask is not None:
        mask = mask[:, 0, 0].expand(batch, -1)
    cpu_decode.decode(query[:, :, 0], key.transpose(1, 2), value.transpose(1, 2), features, requests, out, mask=mask)
    return out[:, None]


def _folded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Few rows: the heads of a group and their rows are rows of one query, `[batch, kv_heads, group * rows, width]`."""
    batch, q_heads, rows, width = query.shape
    kv_heads = key.shape[1]
    group = q_heads // kv_heads
    if mask is not None and (rows > 1 or mask.shape[1] > 1):
        heads = (kv_heads, group) if mask.shape[1] > 1 else (1, group)
        mask = mask.expand(-1, heads[0] * group if mask.shape[1] > 1 else 1, rows, -1)
        mask = mask.unflatten(1, (heads[0], -1)).expand(-1, -1, group, -1, -1).flatten(2, 3)
    folded = query.reshape(batch, kv_heads, group * rows, width)
    out = scaled_dot_product_attention(folded, key, value, mask, scale=scaling)
    return out.reshape(batch, q_heads, rows, width)


def _by_definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One sequence and block of rows at a time, in float32 from the scores on; see `attention.blocked`.

    Nothing is computed in place, so this can be differentiated. A row that may look nowhere becomes 0, as in sdpa.
    """
    kv_heads, tokens = key.shape[1], key.shape[2]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    grouped = (query * scale).unflatten(1, (kv_heads, -1))  # [batch, kv_heads, group, rows, width]
    group, rows = grouped.shape[2:4]
    if sinks is not None:
        sinks = sinks.float().reshape(kv_heads, group, 1, 1)
    if mask is not None:
        mask = mask.expand(query.shape[0], -1, rows, tokens)
        mask = mask.unflatten(1, (kv_heads, group)) if mask.shape[1] > 1 else mask[:, None]
    step = max(1, min(_ROWS, SCORE_BYTES // (4 * query.shape[1] * tokens)))
    sequences = []
    for number in range(query.shape[0]):
        keys, values = key[number].transpose(1, 2), value[number]
        blocks = []
        for start in range(0, rows, step):
            q = grouped[number, :, :, start : start + step]
            scores = torch.matmul(q.flatten(1, 2), keys).float().unflatten(1, q.shape[1:3])
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if mask is not None:
                part = mask[number, :, :, start : start + step]
                scores = scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + part
            elif causal:
                later = torch.ones(q.shape[2], tokens, dtype=torch.bool, device=q.device).triu(start + 1)
                scores = scores.masked_fill(later, float("-inf"))
            weights = _softmax(scores, sinks).flatten(1, 2).to(values.dtype)
            blocks.append(torch.matmul(weights, values).unflatten(1, q.shape[1:3]))
        sequences.append(torch.cat(blocks, 2))
    return torch.stack(sequences).flatten(1, 2)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Over the last dimension; `sinks` `[kv_heads, group, 1, 1]` are one more score that gets no column."""
    least = torch.finfo(scores.dtype).min  # not -inf, of which no difference can be taken
    top = scores.detach().amax(-1, keepdim=True).clamp_min(least)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - top).exp()
    return weights / total.clamp_min(torch.finfo(scores.dtype).tiny)


def _only(indices: torch.Tensor, mask: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """The mask, less the keys that are not among `indices` `[batch, rows, picked]`."""
    picked = torch.zeros(*indices.shape[:2], tokens, dtype=torch.bool, device=indices.device)
    picked = picked.scatter(-1, indices.long(), True)[:, None]
    if mask is None:
        return picked
    return mask & picked if mask.dtype == torch.bool else mask.masked_fill(~picked, torch.finfo(mask.dtype).min)


def _only_blocks(
    module: Any,
    block_indices: torch.Tensor,
    mask: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor | None,
) -> torch.Tensor:
    """The mask, less the blocks of keys that are not picked; the model says how."""
    tokens = key.shape[2]
    if positions is None:
        positions = torch.arange(tokens - query.shape[2], tokens, device=query.device)[None]
    positions = positions.expand(query.shape[0], -1)
    made: torch.Tensor = module.indexer.build_block_mask(
        block_indices, mask, tokens, query.dtype, query.device, positions
    )
    return made
