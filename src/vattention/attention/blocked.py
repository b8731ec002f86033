"""Attention by its definition, from matrix products over blocks of rows: prompts on a CPU, and what stock kernels lack.

Soft caps, sinks, and K and V of different width, all with or without a sliding window. Each block of rows computes
its scores with one matrix product in float32, so the softmax is exact; a block sees no keys beyond its last row, and is
short, so that little is computed to be hidden and the scores stay in the processor's cache. For single rows and in very
long contexts, where blocks have few rows, the product is in the dtype of K instead: converting K would cost more.

Sources: soft caps, Gemma 2 (arXiv 2408.00118, section 2); sinks, gpt-oss (arXiv 2508.10925, section 2.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from vattention.attention.base import Attend, Features, Segment

SCORE_BYTES = 8 << 20
"""Of one block: about what a core's share of the cache holds, and at least one row whatever that takes."""

_ROWS = 64
"""The most rows of a block: enough for a full matrix product; more would see ever more keys that each row does not."""

_ROWS_TO_CONVERT = 16
"""Rows that a block must have room for, for K to be converted to float32."""


def suits(segment: Segment, heads: int) -> bool:
    """Whether products are in float32: a request of several rows, in a context that leaves blocks of many."""
    return segment.rows > 1 and _rows(heads, segment.length) >= _ROWS_TO_CONVERT


def prepare(segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> Attend:
    """The `Kernel` of this file. Nothing depends on the batch alone but the segments themselves."""

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        kv_heads = keys.shape[2]
        scale = query.shape[2] ** -0.5 if features.scaling is None else features.scaling
        # Scaling the few queries is cheaper than scaling the scores.
        grouped = (query.float() * scale).unflatten(0, (kv_heads, -1))  # [kv_heads, group, rows, width]
        sinks = None if features.sinks is None else features.sinks.float().reshape(kv_heads, -1, 1, 1)
        out = query.new_empty((query.shape[1], kv_heads, grouped.shape[1], values.shape[3]))
        for block, first in _blocks(segments, features.window, query.shape[0]):
            k = keys[block.slot, first : block.length].transpose(0, 1)  # [kv_heads, tokens, width], a view
            v = values[block.slot, first : block.length].transpose(0, 1)
            q = grouped[:, :, block.start : block.end]
            if suits(block, query.shape[0]):
                k = k.float()
            else:
                q = q.to(k.dtype)
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
            rows = max(1, min(segment.rows - row, _rows(heads, keys)))
            yield Segment(segment.slot, segment.start + row, rows, cached + rows), first
            row += rows


def _rows(heads: int, keys: int) -> int:
    """Rows of a block whose scores have `keys` columns."""
    return min(_ROWS, SCORE_BYTES // (4 * heads * keys))


def _hide(scores: torch.Tensor, own: int, window: int | None) -> None:
    """-inf where row i may not look. `own` is the column of row 0's own key; scores are `[..., rows, tokens]`."""
    rows, tokens = scores.shape[-2:]
    if rows == 1:
        return
    later = torch.ones(rows, tokens - own, dtype=torch.bool, device=scores.device).triu_(1)
    scores[..., own:].masked_fill_(later, float("-inf"))
    if window is not None and own + rows > window:
        gone = torch.ones(rows, tokens, dtype=torch.bool, device=scores.device).tril_(own - window)
        scores.masked_fill_(gone, float("-inf"))


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Over the last dimension; `sinks` `[kv_heads, group, 1, 1]` are one more score that gets no column."""
    if sinks is None:
        return torch.softmax(scores, -1)
    # The sink need not count for the maximum: where its exponential overflows, every weight is 0 in float32 anyway.
    top = scores.amax(-1, keepdim=True)
    total = scores.sub_(top).exp_().sum(-1, keepdim=True)
    return scores.div_(total + (sinks - top).exp_())
