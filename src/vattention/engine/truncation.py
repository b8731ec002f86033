"""Which tokens may be drawn: min-p, top-k and top-p over a batch of rows.

As if by a stable sort of each row, largest first: of equally likely tokens the one with the smaller id comes first.
What a row keeps therefore never depends on the rows beside it. Sorting a whole vocabulary is avoided where the largest
few hundred hold enough.

Sources: top-k, Fan et al., arXiv 1805.04833; top-p, Holtzman et al., arXiv 1904.09751; min-p, Nguyen et al.,
arXiv 2407.01082.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vattention.engine.sampling_params import SamplingParams

_FIRST_LOOK = 256
"""Tokens looked at first for top-p without top-k: of a language model they nearly always hold the mass asked for."""


def truncate(weights: torch.Tensor, rows: Sequence[SamplingParams]) -> None:
    """Set to 0 what may not be drawn, in place.

    Args:
        weights: `[n, vocabulary]` float64: probabilities over that of the most likely token, so the largest is 1.
        rows: the parameters of each row.
    """
    if any(row.min_p > 0 for row in rows):
        least = torch.tensor([row.min_p for row in rows], dtype=weights.dtype, device=weights.device)
        weights.masked_fill_(weights < least[:, None], 0.0)
    ranked = [i for i, row in enumerate(rows) if 0 < row.top_k < weights.shape[1] or row.top_p < 1]
    if len(ranked) == len(rows):
        _keep_top(weights, rows)
    elif ranked:
        part = weights[ranked]
        _keep_top(part, [rows[i] for i in ranked])
        weights[ranked] = part


def _keep_top(weights: torch.Tensor, rows: Sequence[SamplingParams]) -> None:
    """top-k and then top-p of the mass that is left; every row has at least one of them."""
    vocabulary = weights.shape[1]
    top_k = [row.top_k if 0 < row.top_k < vocabulary else vocabulary for row in rows]
    narrow = max((k for k in top_k if k < vocabulary), default=1)
    if any(k == vocabulary for k in top_k):
        narrow = min(vocabulary, max(narrow, _FIRST_LOOK))
    kept = None
    for width in (narrow, vocabulary):
        ordered = _largest(weights, width)
        kept = _how_many(ordered, weights, top_k, rows)
        if kept is not None:
            break
    assert kept is not None
    last = ordered.gather(1, kept[:, None] - 1)  # the least weight that is kept
    ties_kept = kept[:, None] - (ordered > last).sum(-1, keepdim=True)
    ties = weights == last
    if bool((ties.sum(-1, keepdim=True) != ties_kept).any()):
        ties &= ties.cumsum(-1) <= ties_kept
    weights.masked_fill_(~(ties | (weights > last)), 0.0)


def _largest(weights: torch.Tensor, width: int) -> torch.Tensor:
    """The largest of each row in falling order, `[n, width]`."""
    if weights.device.type != "cpu":
        return weights.topk(width, dim=-1).values
    # Only values are wanted, and numpy finds them several times faster than torch, which carries indices along.
    rows = weights.numpy()
    if width < rows.shape[1]:
        rows = np.partition(rows, rows.shape[1] - width, axis=1)[:, -width:]
    return torch.from_numpy(np.sort(rows, axis=1)[:, ::-1].copy())


def _how_many(
    ordered: torch.Tensor, weights: torch.Tensor, top_k: Sequence[int], rows: Sequence[SamplingParams]
) -> torch.Tensor | None:
    """How many tokens each row keeps, `[n]`; None where `ordered`, the largest weights, are too few to tell."""
    width, vocabulary = ordered.shape[1], weights.shape[1]
    k = torch.tensor(top_k, device=weights.device)
    p = torch.tensor([row.top_p for row in rows], dtype=weights.dtype, device=weights.device)
    inclusive = ordered.cumsum(-1)
    total = torch.where(k < vocabulary, inclusive.gather(1, (k.clamp(max=width) - 1)[:, None])[:, 0], weights.sum(-1))
    before = torch.cat([torch.zeros_like(inclusive[:, :1]), inclusive[:, :-1]], dim=1)
    by_mass = (before < (p * total)[:, None]).sum(-1)
    # At 1 nothing is cut: rounding in the sums must not cost the least likely tokens.
    kept = torch.minimum(k, torch.where(p < 1, by_mass, vocabulary))
    return kept if width == vocabulary or bool((kept < width).logical_or(kept == k).all()) else None
