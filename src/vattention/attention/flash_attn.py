"""FlashAttention 2 and 3 as their own packages ship them: `flash_attn_with_kvcache` on the slots as they are.

Its cache is `[slots, tokens, kv_heads, width]`, a layer as it is: `cache_batch_idx` picks slots in any order, and
`cache_seqlens` says how many tokens of each count. Causality is aligned to the lower right, as chunks need it. All
decodes are one call; a prompt is a call of its own.

Version 2 loads no token past a length. Version 3 does, up to the end of its last tile, where no page may be: each of
its calls is therefore given one request, cut at its length, beyond which the hardware loads zeros. That is a call for
each decode too, and nothing a graph could hold.

Sources: the docstrings of flash_attn_with_kvcache in https://github.com/Dao-AILab/flash-attention, flash_attn and
hopper; csrc/flash_attn/flash_api.cpp (mha_fwd_kvcache) for what is checked, and when the work is split over keys.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence

import torch

from vattention.attention.base import Attend, Features, Segment
from vattention.attention.decode_plan import DecodeRows
from vattention.attention.family import Family
from vattention.attention.placing import place
from vattention.attention.sinks import weigh
from vattention.attention.splitting import decodes_apart

_DTYPES = (torch.float16, torch.bfloat16)
_WIDEST = 256
_VECTOR = 8
"""Numbers that the kernels load at once: 16 bytes."""

_MODULES = {2: "flash_attn", 3: "flash_attn_interface"}
_CAPABILITIES = {2: ((8, 0), None), 3: ((9, 0), (9, 0))}
"""The first GPU that each is for, and the last."""

WithCache = Callable[..., tuple[torch.Tensor, ...]]
"""`flash_attn_with_kvcache`, or what stands in for it."""


def family(version: int, operator: WithCache | None = None) -> Family:
    """Version 2 or 3. `operator` stands in for the library, for tests."""

    def call() -> WithCache:
        return operator or importlib.import_module(_MODULES[version]).flash_attn_with_kvcache

    def prepare(segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> Attend:
        if version == 3:
            return _one_by_one(segments, device, call())
        return decodes_apart(
            segments, device, lambda rows: _decode(rows, call()), lambda several: _one_by_one(several, device, call())
        )

    return Family(
        missing=lambda device: None if operator else _missing(version, device),
        can=_can,
        prepare=prepare,
        decode=None if version == 3 else lambda rows: _decode(rows, call()),
    )


def _missing(version: int, device: torch.device) -> str | None:
    module, (first, last) = _MODULES[version], _CAPABILITIES[version]
    if device.type != "cuda":
        return "it needs a GPU"
    if importlib.util.find_spec(module) is None:
        return f"there is no package {module}"
    capability = torch.cuda.get_device_capability(device)
    if capability < first or (last is not None and capability > last):
        return f"it is not for a GPU of compute capability {capability[0]}.{capability[1]}"
    return None


def _can(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> bool:
    """Half precision, and rows that begin where the kernels can load."""
    width = keys.shape[3]
    return (
        query.dtype in _DTYPES
        and keys.dtype == values.dtype == query.dtype
        and values.shape[3] == width <= _WIDEST
        and width % _VECTOR == 0
        and _is_aligned(keys)
        and _is_aligned(values)
    )


def _is_aligned(layer: torch.Tensor) -> bool:
    *strides, number = layer.stride()
    pointer = layer.data_ptr() % (_VECTOR * layer.element_size())
    return number == 1 and not pointer and all(stride % _VECTOR == 0 for stride in strides)


def _decode(rows: DecodeRows, with_cache: WithCache) -> Attend:
    """All decodes in one call."""

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        slots, lengths = rows.keep("flash_attn", lambda slots, lengths: [slots, lengths])
        by_row = query.transpose(0, 1)[:, None]  # [rows, 1, q_heads, width]
        # The keys that there are decide how many parts a request is divided into: no more than there may be.
        k, v = keys[:, : rows.bound], values[:, : rows.bound]
        return _call(with_cache, by_row, k, v, features, lengths, slots, longest=rows.bound)[:, 0]

    return attend


def _one_by_one(segments: Sequence[Segment], device: torch.device, with_cache: WithCache) -> Attend:
    """Each request in a call of its own, over exactly its tokens."""
    lengths: list[torch.Tensor] = []

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        if not lengths:
            lengths.extend(place([[segment.length] for segment in segments], device, torch.int32))
        out = query.new_empty((query.shape[1], query.shape[0], values.shape[3]))
        for segment, length in zip(segments, lengths, strict=True):
            by_row = query[:, segment.start : segment.end].transpose(0, 1)[None]
            k, v = (side[segment.slot, : segment.length][None] for side in (keys, values))
            part = _call(with_cache, by_row, k, v, features, length, None, longest=segment.length)
            out[segment.start : segment.end] = part[0]
        return out

    return attend


def _call(
    with_cache: WithCache,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    features: Features,
    lengths: torch.Tensor,
    slots: torch.Tensor | None,
    *,
    longest: int,
) -> torch.Tensor:
    """`query` and the result are `[requests, rows, q_heads, width]`."""
    if query.stride(3) != 1 or any(stride % _VECTOR for stride in query.stride()[:3]):
        query = query.contiguous()
    # A window as long as the longest request hides nothing, and without one the work may be split over keys.
    left = -1 if features.window is None or features.window >= longest else features.window - 1
    result = with_cache(
        query,
        keys,
        values,
        cache_seqlens=lengths,
        cache_batch_idx=slots,
        softmax_scale=features.scaling,
        causal=query.shape[1] > 1,
        window_size=(left, -1 if left < 0 else 0),
        softcap=features.softcap or 0.0,
        return_softmax_lse=features.sinks is not None,
    )
    if features.sinks is None:
        return result  # type: ignore[return-value]
    out, logsumexp = result[0], result[1]  # the latter [requests, q_heads, rows]
    flat = weigh(out.flatten(0, 1), logsumexp.transpose(1, 2).flatten(0, 1), features.sinks)
    return flat.view(out.shape)
