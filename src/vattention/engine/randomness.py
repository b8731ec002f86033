"""Random numbers that nothing can shift.

The number of a token is a pure function of (seed, sample, position): a counter-based generator has no state that
batching, chunking or preemption could move on.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-10).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))


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


def uniform(seed: Sequence[int], sample: Sequence[int], position: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) with 53 bits for each (seed, sample, position), `[n]`."""
    return (random_bits(seed, sample, position) >> np.uint64(11)).astype(np.float64) * 2.0**-53
