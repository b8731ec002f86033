"""When requests are sent."""

from __future__ import annotations

import asyncio
import csv
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from vattention.errors import ConfigError

T = TypeVar("T")

_TIME_COLUMNS = ("TIMESTAMP", "arrived_at", "arrival_time")


@dataclass(frozen=True)
class Arrivals:
    """Either a time for each request, or the next one whenever one of `at_once` has its answer.

    Attributes:
        times: seconds after the first moment, in order; None: all at once, as far as `at_once` allows.
        at_once: requests under way at most; None: no limit.
        name: for the tables.
    """

    name: str
    times: Sequence[float] | None = None
    at_once: int | None = None


def closed(at_once: int) -> Arrivals:
    """So many at a time. Raises ConfigError for less than one."""
    if at_once < 1:
        raise ConfigError("--concurrency must be at least 1")
    return Arrivals(f"{at_once} at a time", at_once=at_once)


def poisson(count: int, rate: float, *, seed: str, at_once: int | None = None) -> Arrivals:
    """`count` requests, `rate` a second on average, independent of each other; the first at once. Always the same for
    a seed. Raises ConfigError unless `rate` is positive."""
    if not 0 < rate < float("inf"):
        raise ConfigError("--rate must be positive: requests a second")
    source = random.Random(seed)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + source.expovariate(rate))
    return Arrivals(f"{rate:.3g} a second", times[:count], at_once)


def traced(path: str, count: int, *, speed: float, at_once: int | None = None) -> Arrivals:
    """The first `count` arrivals of a trace, `speed` times as fast.

    Raises ConfigError where the file has none: a column TIMESTAMP (as the Azure traces have), arrived_at or
    arrival_time, with dates or seconds.
    """
    if not 0 < speed < float("inf"):
        raise ConfigError("--speed must be positive")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            column = next((name for name in _TIME_COLUMNS if name in (reader.fieldnames or ())), None)
            if column is None:
                raise ConfigError(f"{path} has no arrival times: no column {', '.join(_TIME_COLUMNS)}; use --rate")
            found: list[float] = []
            for row in reader:
                if len(found) == count:
                    break
                found.append(_seconds(path, reader.line_num, row[column] or ""))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if len(found) < count:
        raise ConfigError(f"{path} has {len(found)} arrivals, not {count}")
    if found != sorted(found):
        raise ConfigError(f"{path} is not in order of arrival")
    return Arrivals(f"as in the trace, {speed:g} times as fast", [(t - found[0]) / speed for t in found], at_once)


def _seconds(path: str, line: int, text: str) -> float:
    text = text.strip()
    try:
        return float(text)
    except ValueError:
        pass
    whole, dot, fraction = text.partition(".")
    try:
        # The traces have seven digits of a second, of which `datetime` takes six.
        return datetime.fromisoformat(whole).timestamp() + float(f"0.{fraction or 0}" if dot else 0)
    except ValueError:
        raise ConfigError(f"{path}, line {line}: {text!r} is neither a date nor seconds") from None


async def arrive(arrivals: Arrivals, work: Sequence[Callable[[float], Awaitable[T]]]) -> list[T]:
    """Start each piece of work in its time, with that time; wait for all of them.

    Where there are times, a piece of work is due then, whether or not it may begin: waiting for `at_once` counts.
    """
    room = asyncio.Semaphore(len(work) if arrivals.at_once is None else arrivals.at_once)
    began = time.perf_counter()

    async def one(index: int) -> T:
        due = None
        if arrivals.times is not None:
            due = began + arrivals.times[index]
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        async with room:
            return await work[index](time.perf_counter() if due is None else due)

    return list(await asyncio.gather(*(one(index) for index in range(len(work)))))
