"""The last minutes of an engine, a point a second."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from vattention.async_llm import AsyncLLM
from vattention.engine.snapshot import Snapshot
from vattention.errors import VAttentionError

PERIOD = 1.0
"""Seconds between two points."""

POINTS = 300
"""Points that are kept."""

_RATE_WINDOW = 3
"""Points over which a rate is taken: passes are longer than nothing, and one a second would flicker."""

_LATENCY_WINDOW = 15
"""The same of a quantile, which needs some values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One second. Rates are tokens a second; times are seconds, None where none came.

    Attributes:
        number: of points since the start, so that a reader can ask for what is new.
        time: since the epoch.
        output, prompt: tokens generated, prompt tokens computed.
        first_token, first_token_p99: from a request's arrival to its first token, median and 99th percentile.
        next_token, next_token_p99: between two tokens of a sequence, the same.
        running, waiting: sequences.
    """

    number: int
    time: float
    output: float
    prompt: float
    first_token: float | None
    first_token_p99: float | None
    next_token: float | None
    next_token_p99: float | None
    running: int
    waiting: int


class History:
    """Takes a snapshot of an engine every second, and keeps points of the last five minutes.

    However many watch, the engine is asked once a second.

    Attributes:
        latest: the newest snapshot, None before the first.
        up: the engine answered when it was asked last.
        points: the oldest first.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._snapshots: deque[Snapshot] = deque(maxlen=_LATENCY_WINDOW + 1)
        self._taken = 0
        self.up = True
        self.points: deque[Point] = deque(maxlen=POINTS)

    @property
    def latest(self) -> Snapshot | None:
        """The newest snapshot, None before the first."""
        return self._snapshots[-1] if self._snapshots else None

    async def run(self) -> None:
        """Until cancelled, or the engine has stopped."""
        await self.take()
        while self.up:
            await asyncio.sleep(PERIOD)
            await self.take()

    async def take(self) -> None:
        """Add a point."""
        try:
            snapshot = await self._llm.snapshot()
        except VAttentionError:
            self.up = False
            return
        self._snapshots.append(snapshot)
        self.points.append(self._point(snapshot))
        self._taken += 1

    def since(self, number: int) -> list[Point]:
        """The points from this number on."""
        return [point for point in self.points if point.number >= number]

    def _point(self, now: Snapshot) -> Point:
        recent = self._before(_RATE_WINDOW)
        seconds = max(now.time - recent.time, 1e-9)
        then = self._before(_LATENCY_WINDOW).totals
        first = now.totals.time_to_first_token.since(then.time_to_first_token)
        between = now.totals.inter_token_latency.since(then.inter_token_latency)
        return Point(
            number=self._taken,
            time=now.time,
            output=(now.totals.generated_tokens - recent.totals.generated_tokens) / seconds,
            prompt=(now.totals.prompt_rows - recent.totals.prompt_rows) / seconds,
            first_token=first.quantile(0.5),
            first_token_p99=first.quantile(0.99),
            next_token=between.quantile(0.5),
            next_token_p99=between.quantile(0.99),
            running=now.num_running,
            waiting=now.num_waiting,
        )

    def _before(self, points: int) -> Snapshot:
        """The snapshot so many points ago, or the oldest there is."""
        return self._snapshots[max(0, len(self._snapshots) - 1 - points)]
