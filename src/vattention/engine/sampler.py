"""From logits to tokens.

The random number of a token is a pure function of (seed, sample, position): a counter-based generator has no state
that batching, chunking or preemption could shift. Each token takes one number, and the cumulative distribution in
float64 turns it into a token.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-10).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vattention.errors import VAttentionError

Words = npt.NDArray[np.uint64]
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))


@dataclass(frozen=True, slots=True)
class Row:
    """How to sample one row of logits: `position` is that of the token being sampled."""

    temperature: float
    seed: int
    position: int
    sample: int = 0


def philox(counter: Sequence[Words], key: Sequence[Words]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10, element by element: 4 counter words and 2 key words of 32 bits each, held in uint64 arrays."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high = c0 * _MULTIPLIERS[0]  # 32 x 32 bits fit 64
        low = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (low >> _HALF) ^ c1 ^ k0, low & _LOW, (high >> _HALF) ^ c3 ^ k1, high & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def random_bits(seed: Sequence[int], sample: Sequence[int], position: Sequence[int]) -> Words:
    """64 random bits for each (seed, sample, position), `[n]`."""
    seeds = np.array(seed, dtype=np.uint64)
    samples = np.array(sample, dtype=np.uint64)
    positions = np.array(position, dtype=np.uint64)
    counter = (positions & _LOW, positions >> _HALF, samples & _LOW, samples >> _HALF)
    high, low, _, _ = philox(counter, (seeds & _LOW, seeds >> _HALF))
    return (high << _HALF) | low


def uniform(rows: Sequence[Row]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) with 53 bits for each row."""
    bits = random_bits([row.seed for row in rows], [row.sample for row in rows], [row.position for row in rows])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample(logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row.

    Args:
        logits: `[rows, vocabulary]`, any float dtype.
        rows: how to sample each.

    Raises:
        VAttentionError: a row with no largest number (NaN, or nothing but -inf): the model's arithmetic failed.
    """
    if not rows:
        return []
    largest, tokens = logits.max(dim=-1)
    if not bool(torch.isfinite(largest).all()):
        raise VAttentionError(
            f"the model's logits are not finite in {logits.dtype}: damaged weights, or a dtype with too small a range"
        )
    warm = [i for i, row in enumerate(rows) if row.temperature > 0]
    if warm:
        tokens[warm] = _draw(logits[warm], largest[warm], [rows[i] for i in warm])
    chosen: list[int] = tokens.tolist()
    return chosen


def _draw(logits: torch.Tensor, largest: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Inverse transform sampling, `[rows]` int64."""
    temperature = torch.tensor([row.temperature for row in rows], dtype=torch.float64, device=logits.device)
    # The largest is taken away before the division: no temperature, however small, can overflow.
    weights = logits.double().sub_(largest.double()[:, None]).div_(temperature[:, None]).exp_()
    cumulative = weights.cumsum_(dim=-1)
    target = torch.from_numpy(uniform(rows)).to(logits.device)[:, None] * cumulative[:, -1:]
    # The first token whose cumulative weight exceeds the target: never one of weight zero.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
