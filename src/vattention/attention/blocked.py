"""Attention by its definition, in plain torch operations and in blocks of rows: what stock kernels leave out.

Soft caps, sinks, and K and V of different width, all with or without a sliding window. Each block of rows computes
its scores with one matrix product, in float32 from there on, so the softmax is exact; a block has as many rows as fit
a fixed number of bytes of scores, so that a long prompt does not allocate heads x rows x keys at once. The views of
the slots go into the matrix products as they are.

Sources: soft caps, Gemma 2 (arXiv 2408.00118, section 2); sinks, gpt-oss (arXiv 2508.10925, section 2.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from vattention.attention.base import Attend, Features, Segment

SCORE_BYTES = 8 << 20
"""Of one block: about what a core's share of the cache holds, and at least one row whatever that takes."""

_ROWS = 256
"""The most rows of a block: under a window, more would see ever more keys that each row does not."""


def prepare(segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> Attend:
    """The `Kernel` of this file. Nothing depends on the batch alone but the segments themselves."""

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        kv_heads = keys.shape[2]
        scale = query.shape[2] ** -0.5 if features.scaling is None else features.scaling
        # Scaling the few queries is cheaper than scaling the scores.
        grouped = (query * scale).unflatten(0, (kv_heads, -1))  # [kv_heads, group, rows, width]
        sinks = None if features.sinks is None else features.sinks.float().reshape(kv_heads, -1, 1, 1)
        out = query.new_empty((query.shape[1], kv_heads, grouped.shape[1], values.shape[3]))
        for block, first in _blocks(segments, features.window, query.shape[0]):
            k = keys[block.slot, first : block.length].transpose(0, 1)  # [kv_heads, tokens, width], a view
            v = values[block.slot, first : block.length].transpose(0, 1)
            q = grouped[:, :, block.start : block.end]
            scores = torch.matmul(q.flatten(1, 2), k.transpose(1, 2)).float()
            if features.softcap is not None:
                scores.div_(features.softcap).tanh_().mul_(features.softcap)
            scores = scores.unflatten(1, q.shape[1:3])  # [kv_heads, group, rows, tokens]
            _hide(scores, block.cached - first, features.window)
            weights = _softmax(scores, sinks).flatten(1, 2).to(v.dtype)
            part = torch.matmul(weights, v).unflatten(1, q.shape[1:3])
            out[block.start : block.end] = part.permute(2, 0, 1, 3)
        return out.flatten(1, 2)

    return attend


def _blocks(segments: Sequence[Segment], window: int | None, heads: int) -> Iterator[tuple[Segment, int]]:
    """Each request's rows in blocks, and the first key that any row of the block sees."""
    for segment in segments:
        row = 0
        while row < segment.rows:
            cached = segment.cached + row
            first = 0 if window is None else max(0, cached + 1 - window)
            keys = segment.length - first
            if window is not None:
                keys = min(keys, window + _ROWS)
            rows = max(1, min(segment.rows - row, _ROWS, SCORE_BYTES // (4 * heads * keys)))
            yield Segment(segment.slot, segment.start + row, rows, cached + rows), first
            row += rows


def _hide(scores: torch.Tensor, own: int, window: int | None) -> None:
    """-inf where row i may not look. `own` is the column of row 0's own key; scores are `[..., rows, tokens]`."""
    rows, tokens = scores.shape[-2:]
    if rows > 1:
        later = torch.ones(rows, tokens, dtype=torch.bool, device=scores.device).triu_(own + 1)
        if window is not None:
            later |= torch.ones_like(later).tril_(own - window)
        scores.masked_fill_(later, float("-inf"))


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Over the last dimension, in place; `sinks` `[kv_heads, group, 1, 1]` are one more score that gets no column."""
    # The sink need not count for the maximum: where its exponential overflows, every weight is 0 in float32 anyway.
    top = scores.amax(-1, keepdim=True)
    total = scores.sub_(top).exp_().sum(-1, keepdim=True)
    if sinks is not None:
        total += (sinks - top).exp_()
    return scores.div_(total)
