"""Request lengths, replayed step by step through a real KVCache.

Pages are really created and mapped; K and V are never written. Arrivals are a closed loop: as many requests are live as
slots and budget allow, first come first served. A step is what a forward pass of an engine would ask for: the whole
prompt of a request just admitted, one more token of every other.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from vattention.bench.trace import Lengths
from vattention.cache import KVCache
from vattention.errors import ConfigError, OutOfPages

BLOCKS = (16, 256)
"""Tokens in a block of the paged caches that are computed beside: vLLM's and FlashInfer's, and FlashAttention-2's."""

BACKED = ("mapped", "paged_16", "paged_256", "static")
"""The columns that are measured against `needed`."""


@dataclass
class Series:
    """One number a step in each list. Bytes, but for the first two and `mappings`.

    Attributes:
        live: requests with a slot. tokens: tokens they have.
        needed, mapped, created: of the cache, see CacheStats.
        mappings: see CacheStats.
        paged_16, paged_256: the same requests in blocks of that many tokens, by arithmetic.
        static: max_model_len tokens for each of them, by arithmetic.
    """

    live: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    needed: list[int] = field(default_factory=list)
    mapped: list[int] = field(default_factory=list)
    created: list[int] = field(default_factory=list)
    mappings: list[int] = field(default_factory=list)
    paged_16: list[int] = field(default_factory=list)
    paged_256: list[int] = field(default_factory=list)
    static: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.live)

    def over_needed(self, column: str) -> tuple[float, float, int]:
        """`column` over `needed`: summed over all steps, at the worst step, and which step that was."""
        values: list[int] = getattr(self, column)
        ratios = [value / needed for value, needed in zip(values, self.needed, strict=True)]
        worst = max(range(len(ratios)), key=ratios.__getitem__)
        return sum(values) / sum(self.needed), ratios[worst], worst


@dataclass(frozen=True)
class Replay:
    """What came of a replay.

    Attributes:
        series: every step.
        preemptions: times a request gave its slot back for lack of memory, to be computed again.
        driver_calls: by verb. driver_seconds: in them.
        calls_here: driver calls made by the thread that steps; the others were made in the background.
        seconds: the whole replay, the arithmetic beside it included.
    """

    series: Series
    preemptions: int
    driver_calls: dict[str, int]
    driver_seconds: float
    calls_here: int
    seconds: float


@dataclass
class _Live:
    number: int
    final: int
    length: int  # at the next step


def replay(cache: KVCache, requests: Sequence[Lengths], *, prefetch: bool = True) -> Replay:
    """Run `requests` through `cache`, which nobody else uses, until all have ended.

    Args:
        prefetch: map the pages of the next step in the background, as the engine does. What is counted is the same.

    Raises:
        ConfigError: a request that is longer than max_model_len, or than the budget holds when it is alone.
    """
    longest = cache.layout.max_model_len
    waiting = deque(_Live(number, lengths.stored, lengths.prompt) for number, lengths in enumerate(requests, start=1))
    for request in waiting:
        if request.final > longest:
            raise ConfigError(f"request {request.number} comes to {request.final} tokens, max_model_len is {longest}")
    running: dict[int, _Live] = {}  # by slot, in order of admission
    series = Series()
    preemptions = 0
    calls, seconds = dict(cache.pool.meter.calls), cache.pool.meter.seconds
    here = threading.get_ident()
    calls_here = cache.pool.meter.calls_by_thread[here]
    start = time.perf_counter()
    while waiting or running:
        _admit(cache, waiting, running)
        while True:
            try:
                cache.step({slot: request.length for slot, request in running.items()})
                break
            except OutOfPages as refused:
                slot, request = running.popitem()
                if not running:
                    raise _never_fits(request, refused) from None
                cache.free(slot)
                waiting.appendleft(request)
                preemptions += 1
        _note(series, cache, running)
        for slot, request in list(running.items()):
            if request.length == request.final:
                cache.free(slot)
                del running[slot]
            request.length += 1
        if prefetch and running:
            cache.prefetch({slot: request.length for slot, request in running.items()})
    cache.wait()
    stats = cache.stats()
    return Replay(
        series,
        preemptions,
        {verb: count - calls.get(verb, 0) for verb, count in stats.driver_calls.items()},
        stats.driver_seconds - seconds,
        cache.pool.meter.calls_by_thread[here] - calls_here,
        time.perf_counter() - start,
    )


def _admit(cache: KVCache, waiting: deque[_Live], running: dict[int, _Live]) -> None:
    """Give slots to those at the head of the queue, as long as the next step would have pages for all."""
    while waiting and len(running) < cache.layout.max_num_seqs:
        request = waiting[0]
        lengths = {slot: live.length for slot, live in running.items()}
        if running and not cache.fits(lengths, new=[request.length]):
            return
        slot = cache.alloc(tokens=request.length)
        if slot is None:
            return
        running[slot] = waiting.popleft()


def _never_fits(request: _Live, refused: OutOfPages) -> ConfigError:
    return ConfigError(
        f"request {request.number} does not fit at {request.length} tokens though it is alone ({refused})"
    )


def _note(series: Series, cache: KVCache, running: dict[int, _Live]) -> None:
    """Add the numbers of this step."""
    stats = cache.stats()
    token = cache.layout.bytes_per_token
    lengths = [request.length for request in running.values()]
    series.live.append(len(lengths))
    series.tokens.append(sum(lengths))
    series.needed.append(stats.needed)
    series.mapped.append(stats.mapped)
    series.created.append(stats.created)
    series.mappings.append(stats.mappings)
    for block, column in zip(BLOCKS, (series.paged_16, series.paged_256), strict=True):
        column.append(sum(-(-length // block) for length in lengths) * block * token)
    series.static.append(len(lengths) * cache.layout.max_model_len * token)
