"""FlashAttention of torch through a block table, for the paged baseline on a GPU: torch 2.12 and later.

The same kernel as `varlen`, told of blocks instead of beginnings, so that a comparison of the two is one of layouts. It
takes blocks of whole multiples of 256 tokens. Decodes are a call of their own, for the reason given in `varlen`.
Source: torch.nn.attention.varlen in torch 2.13.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from vattention.attention import varlen
from vattention.attention.base import Attend, Features, Segment
from vattention.attention.placing import place

_MULTIPLE = 256
"""Tokens; FlashAttention-2 refuses other blocks."""


@functools.cache
def _stock() -> Callable[..., Any] | None:
    """`varlen_attn`, if it follows a table."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "block_table" in inspect.signature(varlen_attn).parameters else None


def available(device: torch.device, block_size: int) -> bool:
    """Whether torch has the kernel for this device, with blocks of this many tokens."""
    return varlen.available(device) and block_size % _MULTIPLE == 0 and _stock() is not None


def can(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> bool:
    """Whether the kernel computes this; keys and values are `[blocks, block_size, kv_heads, width]`."""
    return features.sinks is None and varlen.can(query, keys, values, features)


class _Call(NamedTuple):
    rows: torch.Tensor | slice
    query_starts: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    most_rows: int
    longest: int


def prepare(
    segments: Sequence[Segment],
    *,
    device: torch.device,
    table: torch.Tensor,
    operator: Callable[..., Any] | None = None,
) -> Attend:
    """Attention of these segments over blocks, for layers that this kernel `can`.

    Args:
        table: `PagedKVCache.table`, on the host.
    """
    compute = operator or _stock()
    assert compute is not None, "asked of `available`"

    @functools.cache
    def calls(block_size: int) -> tuple[_Call, ...]:
        parts = [[s for s in segments if s.rows == 1], [s for s in segments if s.rows > 1]]
        return tuple(_plan(part, table, block_size, device) for part in parts if part)

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        by_row = query.transpose(0, 1).contiguous()
        out = torch.empty_like(by_row)
        for call in calls(keys.shape[1]):
            window = (-1, 0 if call.most_rows > 1 else -1)  # a single row sees everything before it as it is
            if features.window is not None and features.window < call.longest:
                window = (features.window - 1, 0)
            out[call.rows] = compute(
                by_row[call.rows], keys, values, call.query_starts, None, call.most_rows, call.longest,
                scale=features.scaling, window_size=window, enable_gqa=True, seqused_k=call.lengths,
                block_table=call.table,
            )  # fmt: skip
        return out

    return attend


def _plan(segments: Sequence[Segment], table: torch.Tensor, block_size: int, device: torch.device) -> _Call:
    starts = [0]
    for segment in segments:
        starts.append(starts[-1] + segment.rows)
    query_starts, lengths = place((starts, [segment.length for segment in segments]), device, torch.int32)
    longest = max(segment.length for segment in segments)
    blocks = table[[segment.slot for segment in segments], : -(-longest // block_size)].clamp(min=0)  # -1: none there
    first, last = segments[0].start, segments[-1].end
    rows: torch.Tensor | slice = slice(first, last)
    if last - first != starts[-1]:
        (rows,) = place([[row for segment in segments for row in range(segment.start, segment.end)]], device)
    most = max(segment.rows for segment in segments)
    return _Call(rows, query_starts, lengths, blocks.to(device), most, longest)
