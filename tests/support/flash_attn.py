"""What `flash_attn_with_kvcache` promises, from its documentation, in float64 on a CPU.

It looks at nothing it is not given, except that version 3 reads the whole last tile of each request: `tile`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Asked(NamedTuple):
    """What one call asked for beyond tensors."""

    rows: int
    longest: int
    causal: bool
    window: tuple[int, int]
    lengths: tuple[int, ...]


@dataclass
class WithCacheOnACPU:
    """Stands in for the function, and notes each call.

    Attributes:
        tile: tokens that are read together, as far as the cache it is given goes; 1: none past a length.
    """

    tile: int = 1
    calls: list[Asked] = field(default_factory=list)

    def __call__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *,
        cache_seqlens: torch.Tensor,
        cache_batch_idx: torch.Tensor | None,
        softmax_scale: float | None,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        return_softmax_lse: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`[requests, rows, q_heads, width]` over `[slots, tokens, kv_heads, width]`; logsumexp by request and head."""
        _check(q, k_cache, v_cache, cache_seqlens, cache_batch_idx)
        lengths = cache_seqlens.tolist()
        slots = range(len(q)) if cache_batch_idx is None else cache_batch_idx.tolist()
        rows, group = q.shape[1], q.shape[2] // k_cache.shape[2]
        self.calls.append(Asked(rows, k_cache.shape[1], causal, window_size, tuple(lengths)))
        out, logsumexp = torch.full_like(q, torch.nan), torch.full((len(q), q.shape[2], rows), torch.nan)
        left, right = window_size[0], 0 if causal else window_size[1]
        for request, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            assert 0 < length <= k_cache.shape[1]
            read = min(-(-length // self.tile) * self.tile, k_cache.shape[1])
            keys, values = (side[slot, :read].double() for side in (k_cache, v_cache))
            for row in range(rows):
                own = length - rows + row
                places = torch.arange(read)
                seen = places < length
                if left >= 0:
                    seen &= places >= own - left
                if right >= 0:
                    seen &= places <= own + right
                for head in range(q.shape[2]):
                    scores = keys[:, head // group] @ q[request, row, head].double()
                    scores = scores * (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale)
                    if softcap > 0:
                        scores = softcap * torch.tanh(scores / softcap)
                    scores = scores.masked_fill(~seen, float("-inf"))
                    logsumexp[request, head, row] = scores.logsumexp(0)
                    # What is hidden still takes part in the product, with weight zero.
                    out[request, row, head] = (scores.softmax(0) @ values[:, head // group]).to(out.dtype)
        return (out, logsumexp) if return_softmax_lse else out


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor | None
) -> None:
    """What the library refuses, and what its loads of 16 bytes need."""
    assert q.dtype in (torch.float16, torch.bfloat16)
    for tensor in (q, k, v):
        assert tensor.dim() == 4
        assert tensor.dtype == q.dtype
        assert tensor.shape[3] == q.shape[3] <= 256
        assert tensor.stride(3) == 1
        assert not any(stride % 8 for stride in (tensor.shape[3], *tensor.stride()[:3]))
        assert tensor.data_ptr() % 16 == 0
    assert q.shape[2] % k.shape[2] == 0
    assert k.shape == v.shape
    for numbers in (lengths, slots):
        if numbers is not None:
            assert numbers.dtype == torch.int32
            assert numbers.shape == (len(q),)
    assert len(k) == len(q) or slots is not None
