"""torch's own scaled_dot_product_attention on views of the slots: no copy of K or V, no padding.

The rows of a request are cut into pieces, one call each:
- one new token: the queries that share a KV head become rows of one small query, so every K and V byte is read once
  for the whole group;
- a prompt with nothing cached before it: `is_causal=True`;
- a chunk over cached tokens: `is_causal` would be wrong, as torch aligns it to the *upper left* corner (row i sees
  keys 0..i), where row i of a chunk must see keys 0..cached+i. An additive mask says so; it is built once a batch;
- under a sliding window: short blocks of rows, each over the keys that one of its rows sees. A window then saves what
  it promises: neither the work nor the mask grows with the square of the prompt.

Grouped queries: KV heads are the batch dimension and K, V are expanded over the group with stride 0.

Soft caps, sinks and a V of another width than K need `blocked`: the first two sdpa does not have, and for the third it
falls back to an implementation that allocates heads x rows x keys at once.

Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from vattention.attention.base import Attend, Features, Segment

_WINDOWED_ROWS = 256
"""Rows of a block under a window: long enough for a full matrix product, short against the windows models have."""


class _Piece(NamedTuple):
    """Rows `[start, end)` of the batch over tokens `[first, last)` of `slot`; `mask` as `_mask` says."""

    slot: int
    start: int
    end: int
    first: int
    last: int
    mask: torch.Tensor | None


def can(features: Features, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether this kernel computes what a layer asks for."""
    return features.softcap is None and features.sinks is None and keys.shape[3] == values.shape[3]


def prepare(segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> Attend:
    """The `Kernel` of this file. Pieces and masks are made once a window: by the first layer that has it, for all."""

    @functools.cache
    def pieces(window: int | None) -> tuple[_Piece, ...]:
        return tuple(piece for segment in segments for piece in _cut(segment, window, dtype, device))

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        rows, head_dim, kv_heads = query.shape[1], query.shape[2], keys.shape[2]
        grouped = query.unflatten(0, (kv_heads, -1))  # [kv_heads, group, rows, head_dim], a view
        out = query.new_empty((rows, kv_heads, grouped.shape[1], head_dim))
        scale = features.scaling
        for slot, start, end, first, last, mask in pieces(features.window):
            # Never past `length`: what is there may be unmapped or belong to nobody.
            k = keys[slot, first:last].transpose(0, 1)  # [kv_heads, tokens, head_dim], a view
            v = values[slot, first:last].transpose(0, 1)
            if end - start == 1:
                q = grouped[:, :, start]  # [kv_heads, group, head_dim]
                out[start] = scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]
                continue
            q = grouped[:, :, start:end]
            k = k[:, None].expand(-1, q.shape[1], -1, -1)
            v = v[:, None].expand(-1, q.shape[1], -1, -1)
            part = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
            out[start:end] = part.permute(2, 0, 1, 3)
        return out.flatten(1, 2)

    return attend


def _cut(segment: Segment, window: int | None, dtype: torch.dtype, device: torch.device) -> Iterator[_Piece]:
    """The pieces of one request's rows."""
    if window is None or window >= segment.length:
        yield _Piece(
            segment.slot, segment.start, segment.end, 0, segment.length, _mask(segment, 0, None, dtype, device)
        )
        return
    for start in range(segment.start, segment.end, _WINDOWED_ROWS):
        end = min(start + _WINDOWED_ROWS, segment.end)
        last = segment.cached + end - segment.start
        block = Segment(segment.slot, start, end - start, last)
        first = max(0, block.cached + 1 - window)
        narrow = window if last > window else None
        yield _Piece(segment.slot, start, end, first, last, _mask(block, first, narrow, dtype, device))


def _mask(
    block: Segment, first: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """0 where row i may look and -inf elsewhere, `[rows, length - first]`; None if `is_causal` or nothing will do.

    Row i of the block sees the keys up to cached + i, and under a window no more than `window` of them.
    In the dtype of the query: torch converts a boolean mask on every call, which would be once a layer.
    """
    if block.rows == 1 or (block.cached == 0 and window is None):
        return None
    shape, minus = (block.rows, block.length - first), float("-inf")
    own = block.cached - first  # the column of row 0's own key
    mask = torch.full(shape, minus, dtype=dtype, device=device).triu_(own + 1)
    if window is not None:
        mask += torch.full(shape, minus, dtype=dtype, device=device).tril_(own - window)
    return mask
