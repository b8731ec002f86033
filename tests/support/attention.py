"""Attention by its definition, and tensors laid out in every way, for the tests of kernels."""

import math
from typing import Any

import torch
from hypothesis import strategies as st

from vattention.attention.base import Features


def by_definition(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    asked: Features,
    requests: list[tuple[int, int, int]],
    mask: torch.Tensor | None = None,
) -> dict[int, torch.Tensor]:
    """`[q_heads, width of V]` in float64 of each row; requests are (slot, row, length)."""
    group = query.shape[1] // keys.shape[2]
    result = {}
    for number, (slot, row, length) in enumerate(requests):
        first = 0 if asked.window is None else max(0, length - asked.window)
        chosen = torch.arange(first, length)
        if mask is not None:
            chosen = chosen[mask[number, first:length]]
        k, v = (x[slot, chosen].double().repeat_interleave(group, 1) for x in (keys, values))
        scale = keys.shape[3] ** -0.5 if asked.scaling is None else asked.scaling
        scores = torch.einsum("hd,thd->ht", query[row].double(), k) * scale
        if asked.softcap is not None:
            scores = asked.softcap * (scores / asked.softcap).tanh()
        if asked.sinks is not None:
            scores = torch.cat([scores, asked.sinks.double()[:, None]], 1)
        weights = scores.softmax(1)[:, : len(chosen)] if scores.shape[1] else scores
        result[row] = torch.einsum("ht,thd->hd", weights, v)
    return result


def strided(data: Any, slots: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """All NaN: slots, tokens and heads in any order in memory, with room between them."""
    order = data.draw(st.permutations(range(3)))
    gaps = data.draw(st.tuples(*[st.integers(0, 3)] * 4))
    sizes = [slots, tokens, heads]
    storage = torch.full([*(sizes[axis] + gaps[axis] for axis in order), width + gaps[3]], math.nan, dtype=dtype)
    view = storage.permute(*(order.index(axis) for axis in range(3)), 3)
    return view[:slots, :tokens, :heads, :width]
