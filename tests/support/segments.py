"""A batch of requests over the slots of a real cache, for the tests of kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vattention.attention.base import Segment
from vattention.cache import KVCache


def segments_of(batch: Sequence[tuple[int, int, int]]) -> list[Segment]:
    """From slot, rows and length of each request."""
    segments: list[Segment] = []
    for slot, rows, length in batch:
        segments.append(Segment(slot, segments[-1].end if segments else 0, rows, length))
    return segments


def filled(
    cache: KVCache, segments: Sequence[Segment], q_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query `[q_heads, rows, width]`, and K and V of the last layer: random below the lengths, NaN behind under poison.

    The query has the strides that transformers gives it.
    """
    generator = torch.Generator().manual_seed(0)
    while cache.alloc() is not None:
        pass
    cache.step({segment.slot: segment.length for segment in segments})
    keys, values = cache.layer(cache.layout.num_layers - 1)
    for segment in segments:
        for view in (keys, values):
            part = view[segment.slot, : segment.length]
            part.copy_(torch.randn(part.shape, generator=generator))
    query = torch.randn(segments[-1].end, q_heads, keys.shape[3], generator=generator) * 2
    return query.to(keys.device, keys.dtype).transpose(0, 1), keys, values
