"""Attention over blocks: the decode kernel with another way to an address, and everything else over a gathered copy.

Requests with one row are read where they are, through the block table (`cpu_decode` with a table). For the others, and
where that kernel cannot be had, the blocks that a request looks at are copied into contiguous scratch memory, layer
after layer into the same, and attention is computed there as in a contiguous cache. What it costs is a copy of K and V
up to the request's length for each layer and pass; a chunk of a prompt multiplies matrices with them for far longer.
On a GPU, where torch has a kernel that follows the table, it computes everything it can (`through_table`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from vattention.attention import cpu_decode, through_table
from vattention.attention.base import Attend, Features, Kernel, Segment


def prepare(
    segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device, table: torch.Tensor, inner: Kernel
) -> Attend:
    """A `Kernel`, once it has the last two: layers are `[blocks, block_size, kv_heads, width]`.

    Args:
        table: `PagedKVCache.table`.
        inner: what computes gathered requests.
    """
    every = tuple(segments)
    several = tuple(segment for segment in every if segment.rows > 1)
    single = functools.cache(
        lambda: cpu_decode.prepare([segment for segment in every if segment.rows == 1], table=table)
    )

    @functools.cache
    def gathered(segment: Segment, window: int | None, block_size: int) -> tuple[torch.Tensor, Attend]:
        """The blocks a request looks at, and attention over them. A window ends where its first row's does."""
        first = 0 if window is None else max(0, segment.cached + 1 - window) // block_size
        blocks = table[segment.slot, first : -(-segment.length // block_size)].to(device)
        # What counts is how far tokens are from each other, so the ones in front may be left out.
        alone = Segment(0, 0, segment.rows, segment.length - first * block_size)
        return blocks, inner([alone], dtype=dtype, device=device)

    @functools.cache
    def scratch(which: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def contiguous(which: int, cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """A slot of its own, `[1, tokens, kv_heads, width]`. Overwritten by the next request that has as many."""
        own = scratch(which, (len(blocks), *cache.shape[1:]))
        return torch.index_select(cache, 0, blocks, out=own).flatten(0, 1)[None]

    followed = functools.cache(lambda: through_table.prepare(every, device=device, table=table))

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        if through_table.available(device, keys.shape[1]) and through_table.can(query, keys, values, features):
            return followed()(query, keys, values, features)
        out = query.new_empty((query.shape[1], query.shape[0], values.shape[3]))
        in_place = len(several) < len(every) and cpu_decode.can(query, keys, values, paged=True)
        for segment in several if in_place else every:
            blocks, over = gathered(segment, features.window, keys.shape[1])
            k, v = contiguous(0, keys, blocks), contiguous(1, values, blocks)
            out[segment.start : segment.end] = over(query[:, segment.start : segment.end], k, v, features)
        if in_place:
            single()(query, keys, values, features, out)
        return out

    return attend
