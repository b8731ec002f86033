"""FlashAttention as torch ships it, on the slots as they are: two calls a layer, one for decodes and one for the rest.

The operator takes K and V of all sequences behind one another, `[tokens, kv_heads, width]`, and where each begins. The
slots of a layer are evenly spaced, so a whole layer is such a tensor, without a copy: a request begins at
slot * padded_len, and `seqused_k` says how many of its tokens count. Beginnings may come in any order. What lies past
a length is not read, so it may be unmapped.

With `seqused_k` causality is aligned to the lower right: row i of a chunk over cached tokens sees keys 0..cached+i.

Decodes get a call of their own, because the operator splits long contexts over the processors of the device, and makes
the queries of a group rows of one, only if no request has more than one row and there is no window. A decode never
needs one: what a single row sees through a window is the end of its tokens, so its request begins later and is shorter.

Where `torch.nn.attention.varlen.varlen_attn` takes `seqused_k` (torch 2.12), that is what is called. Before, and for
sinks, which need the logarithm of the softmax's sum, it is the operator beneath: `aten::_flash_attention_forward`.
Sources: its schema, torch.nn.attention.varlen in torch 2.13, https://github.com/Dao-AILab/flash-attention (2).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from vattention.attention.base import Attend, Features, Segment
from vattention.attention.decode_plan import DecodeRows
from vattention.attention.placing import place
from vattention.attention.sinks import weigh
from vattention.attention.splitting import decodes_apart

Operator = Callable[..., tuple[torch.Tensor, ...]]
"""`aten::_flash_attention_forward`, or what can be called as it is: the output, and perhaps the logsumexp after it."""

_DTYPES = (torch.float16, torch.bfloat16)
_WIDEST = 256
_VECTOR = 8
"""Numbers that the kernel loads at once: 16 bytes."""


@functools.cache
def available(device: torch.device) -> bool:
    """Whether torch has the operator for this device: a build with it, and compute capability 8.0 or later."""
    return (
        device.type == "cuda"
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def can(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> bool:
    """Whether the operator computes this: half precision, no soft cap, and a layer that is one flat tensor."""
    width = keys.shape[3]
    return (
        features.softcap is None
        and query.dtype in _DTYPES
        and keys.dtype == values.dtype == query.dtype
        and values.shape[3] == width
        and width <= _WIDEST
        and width % _VECTOR == 0
        and keys.shape[0] * keys.shape[1] < 1 << 31  # beginnings are int32
        and _is_flat(keys)
        and _is_flat(values)
    )


def _is_flat(layer: torch.Tensor) -> bool:
    """Whether slots and tokens can be one dimension, and every head of every token begins where the kernel can load."""
    slot, token, head, number = layer.stride()
    aligned = token % _VECTOR == head % _VECTOR == 0 and layer.data_ptr() % (_VECTOR * layer.element_size()) == 0
    return slot == layer.shape[1] * token and number == 1 and aligned


class _Call(NamedTuple):
    """What one call of the operator is told, but for K, V and scale.

    Attributes:
        query_starts: `[requests + 1]` int32: where each begins among the rows, and their number.
        starts: `[requests + 1]` int32: the beginning of each in a flat layer. The last number is never looked at,
            because `lengths` are given.
        lengths: `[requests]` int32.
        most_rows, longest: of any request.
        left: keys before its own that a row sees, -1 for all.
    """

    query_starts: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    most_rows: int
    longest: int
    left: int = -1


def prepare(
    segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device, operator: Operator | None = None
) -> Attend:
    """The `Kernel` of this file, for layers that it `can`. What depends on the batch is made by the first of them."""
    return decodes_apart(
        segments,
        device,
        lambda rows: decode(rows, operator=operator),
        lambda several: _prompts(several, device, operator),
    )


def decode(rows: DecodeRows, *, operator: Operator | None = None) -> Attend:
    """Attention of decodes alone, for layers that this kernel `can`."""

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        window = features.window
        queries, starts, lengths = rows.keep(("varlen", keys.shape[1], window), partial(_ends, keys.shape[1], window))
        longest = rows.bound if window is None else min(window, rows.bound)
        return _compute(operator, query, keys, values, features, _Call(queries, starts, lengths, 1, longest))

    return attend


def _prompts(segments: Sequence[Segment], device: torch.device, operator: Operator | None) -> Attend:
    """Of requests with any number of rows, which are neighbours in the query."""

    @functools.cache
    def planned(padded_len: int) -> _Call:
        return _plan(segments, padded_len, device)

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        call = planned(keys.shape[1])
        if features.window is not None and features.window < call.longest:
            call = call._replace(left=features.window - 1)  # besides its own
        return _compute(operator, query, keys, values, features, call)

    return attend


def _compute(
    operator: Operator | None,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    features: Features,
    call: _Call,
) -> torch.Tensor:
    flash = operator or _operator(features.sinks is not None)
    by_row = query.transpose(0, 1)  # [rows, q_heads, width]
    if by_row.stride(2) != 1 or by_row.stride(0) % _VECTOR or by_row.stride(1) % _VECTOR:
        by_row = by_row.contiguous()
    causal = call.left < 0 and call.most_rows > 1  # a single row sees everything before it as it is
    out, *more = flash(
        by_row,
        keys.flatten(0, 1),  # views, or `can` is wrong
        values.flatten(0, 1),
        call.query_starts,
        call.starts,
        call.most_rows,
        call.longest,
        0.0,  # dropout
        causal,
        False,  # no debug mask
        scale=features.scaling,
        window_size_left=call.left,
        window_size_right=0 if causal or call.left >= 0 else -1,
        seqused_k=call.lengths,
    )
    return out if features.sinks is None else weigh(out, more[0].transpose(0, 1), features.sinks)


def _ends(padded_len: int, window: int | None, slots: Sequence[int], lengths: Sequence[int]) -> Sequence[Sequence[int]]:
    """The numbers of a call for decodes that see the last `window` of their tokens."""
    seen = list(lengths) if window is None else [min(length, window) for length in lengths]
    starts = [slot * padded_len + length - n for slot, length, n in zip(slots, lengths, seen, strict=True)]
    return range(len(slots) + 1), [*starts, starts[-1]], seen


def _plan(segments: Sequence[Segment], padded_len: int, device: torch.device) -> _Call:
    query_starts = [0]
    for segment in segments:
        query_starts.append(query_starts[-1] + segment.rows)
    starts = [segment.slot * padded_len for segment in segments]
    numbers = (query_starts, [*starts, starts[-1]], [segment.length for segment in segments])
    most_rows, longest = (max(numbers) for numbers in zip(*((s.rows, s.length) for s in segments), strict=True))
    query_numbers, places, lengths = place(numbers, device, torch.int32)
    return _Call(query_numbers, places, lengths, most_rows, longest)


@functools.cache
def _operator(logsumexp: bool) -> Operator:
    """What this torch has, and what returns the logsumexp, `[q_heads, rows]`, where that is needed."""
    from torch.nn.attention import varlen

    if not logsumexp and "seqused_k" in inspect.signature(varlen.varlen_attn).parameters:
        return _varlen_attn
    return torch.ops.aten._flash_attention_forward.default


def _varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    starts: torch.Tensor,
    most_rows: int,
    longest: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float | None,
    window_size_left: int,
    window_size_right: int,
    seqused_k: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """torch's public function, called as the operator is; it finds out by itself whether a call is causal."""
    from torch.nn.attention.varlen import varlen_attn

    window = (window_size_left, window_size_right)
    assert causal == (window == (-1, 0))
    assert dropout == debug == 0
    numbers = (query_starts, starts, most_rows, longest)
    out = varlen_attn(
        query, key, value, *numbers, scale=scale, window_size=window, enable_gqa=True, seqused_k=seqused_k
    )
    return (out,)  # type: ignore[return-value]
