"""How values are spread, in a fixed number of counts however many values there are."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

SECONDS = (*(round(digit * 10.0**power, 6) for power in range(-3, 3) for digit in (1, 1.5, 2, 3, 5, 7)), 1000.0)
"""Bounds for times, from a millisecond to a quarter of an hour: six a decade, so that a quantile read off them is
right to a fifth or better."""

TOKENS = (*(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5)), 1e6)
"""Bounds for numbers of tokens."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a histogram held at one moment.

    Attributes:
        bounds: ascending.
        counts: values above the bound before and up to this one, then those above the last: one more than `bounds`.
        total: the sum of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(self.counts)

    def since(self, before: Distribution) -> Distribution:
        """The values that came after `before`, an earlier moment of the same histogram."""
        counts = tuple(now - then for now, then in zip(self.counts, before.counts, strict=True))
        return Distribution(self.bounds, counts, self.total - before.total)

    def quantile(self, share: float) -> float | None:
        """The value that `share` of all values, 0 to 1, do not exceed; None where there are none.

        Values are taken to be spread evenly between two bounds, and those above the last bound to lie on it, as in
        Prometheus' `histogram_quantile`.
        """
        wanted = share * self.count
        if not self.count:
            return None
        sums = list(accumulate(self.counts))
        place = bisect_left(sums, wanted)
        while not self.counts[place]:
            place += 1
        if place == len(self.bounds):
            return self.bounds[-1]
        low = self.bounds[place - 1] if place else 0.0
        part = (wanted - (sums[place] - self.counts[place])) / self.counts[place]
        return low + (self.bounds[place] - low) * part


class Histogram:
    """Counts values by size. Not for several threads.

    Args:
        bounds: ascending; a value counts under the first that it does not exceed.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def now(self) -> Distribution:
        """What it holds."""
        return Distribution(self._bounds, tuple(self._counts), self._total)
