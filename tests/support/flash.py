"""What `aten::_flash_attention_forward` promises for sequences of different lengths, from its definition, on a CPU.

It is as strict as the operator on a device, and stricter where that would read out of bounds: what it is not given it
does not look at, so NaN outside the lengths shows in no result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Asked(NamedTuple):
    """What one call asked for beyond tensors."""

    max_q: int
    max_k: int
    causal: bool
    window: tuple[int, int]
    lengths: tuple[int, ...]


@dataclass
class FlashOnACPU:
    """Stands in for the operator, and notes each call.

    Attributes:
        calls: one for each call.
        align_right: causality as the operator has it. False: aligned to the upper left, which is wrong for a chunk.
    """

    calls: list[Asked] = field(default_factory=list)
    align_right: bool = True

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cum_seq_q: torch.Tensor,
        cum_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        seqused_k: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Of `[rows, q_heads, width]` and `[tokens, kv_heads, width]`: as many rows of output, the logsumexp
        `[q_heads, rows]`; the rest is empty.
        """
        _check(query, key, value, cum_seq_q, cum_seq_k, seqused_k)
        assert (dropout_p, return_debug_mask) == (0.0, False)
        assert seqused_k is not None
        left, right = (-1 if size is None else size for size in (window_size_left, window_size_right))
        starts, bounds, lengths = cum_seq_k.tolist(), cum_seq_q.tolist(), seqused_k.tolist()
        assert bounds[0] == 0, "queries begin at the first row"
        assert bounds[-1] == len(query), "and end with the last"
        self.calls.append(Asked(max_q, max_k, is_causal, (left, right), tuple(lengths)))
        out, group = torch.full_like(query, torch.nan), query.shape[1] // key.shape[1]
        logsumexp = torch.full((query.shape[1], len(query)), torch.nan)
        if is_causal and max_q > 1:
            right = 0
        for number, length in enumerate(lengths):
            first, last = bounds[number : number + 2]
            assert last - first <= max_q
            assert length <= max_k
            assert 0 <= starts[number] <= len(key) - length
            keys, values = (x[starts[number] : starts[number] + length].double() for x in (key, value))
            for row in range(first, last):
                own = row - first + (length - (last - first) if self.align_right else 0)
                begin = 0 if left < 0 else max(0, own - left)
                end = length if right < 0 else min(length, own + right + 1)
                for head in range(query.shape[1]):
                    scores = keys[begin:end, head // group] @ query[row, head].double()
                    scores = scores * (query.shape[2] ** -0.5 if scale is None else scale)
                    logsumexp[head, row] = scores.logsumexp(0)
                    out[row, head] = (scores.softmax(0) @ values[begin:end, head // group]).to(out.dtype)
        return out, logsumexp, *(torch.empty(0) for _ in range(3))


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    seqused_k: torch.Tensor | None,
) -> None:
    """What the operator refuses, and what its loads of 16 bytes need."""
    assert query.dtype in (torch.float16, torch.bfloat16)
    for tensor in (query, key, value):
        assert tensor.dim() == 3
        assert tensor.dtype == query.dtype
        assert tensor.shape[2] == query.shape[2] <= 256
        assert tensor.stride(2) == 1
        assert tensor.shape[2] % 8 == tensor.stride(0) % 8 == tensor.stride(1) % 8 == 0
        assert tensor.data_ptr() % 16 == 0
    assert query.shape[1] % key.shape[1] == 0
    assert key.shape == value.shape
    assert seqused_k is not None
    for tensor in (cum_seq_q, cum_seq_k, seqused_k):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
        assert len(tensor) == len(seqused_k) + (tensor is not seqused_k)
