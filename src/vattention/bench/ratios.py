"""Figures of rounds that alternate between sides, and ratios of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The median of some values, and how far they are apart."""

    median: float
    low: float
    high: float

    def show(self, digits: int = 1) -> str:
        """Median, smallest and largest."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} .. {self.high:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(ours: Sequence[float], peer: Sequence[float], *, faster_is_more: bool = True) -> Spread:
    """How many times as fast as the peer we are: the ratio within each round, so that what slows the machine down for
    a while slows both. More than 1 means that we are faster, of rates as of times.

    Args:
        faster_is_more: the values are rates; otherwise they are times.
    """
    pairs = zip(ours, peer, strict=True)
    return spread([a / b if faster_is_more else b / a for a, b in pairs])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    count = -(-len(ordered) * share // 1)
    return ordered[max(0, int(count) - 1)]
