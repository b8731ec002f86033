"""An engine at one moment, for those who watch it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from vattention.cache import Cache, CacheStats
from vattention.cache.stats import SlotStats
from vattention.engine.request import Request
from vattention.engine.scheduler import Scheduler
from vattention.engine.tally import Tally, Totals

WAITING_SHOWN = 64
"""Waiting sequences that a snapshot names; it counts them all. A queue may be long, and a snapshot is to be cheap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestState:
    """One sequence that waits or runs.

    Attributes:
        request_id: the same for all samples of a request.
        sample: which of them. One that waits for its prompt to be computed stands for all.
        slot: where its K and V are, None while it waits.
        prompt_tokens: of its prompt. computed: tokens whose K and V are in the slot. output_tokens: generated so far.
        priority: lower numbers are served earlier.
        preemptions: how often it had to give its slot back.
        age: seconds since its request came.
    """

    request_id: str
    sample: int
    slot: int | None
    prompt_tokens: int
    computed: int
    output_tokens: int
    priority: int
    preemptions: int
    age: float


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An engine between two steps.

    Attributes:
        time: seconds since the epoch.
        running: sequences that hold a slot, in order of admission.
        waiting: the first `WAITING_SHOWN` of those that do not, the most urgent first.
        num_running, num_waiting: how many there are in all.
        slots: every slot of the cache, by number.
        cache: the memory of all of it.
        totals: what was done since the engine was opened.
        max_model_len: tokens that a slot can hold. bytes_per_token: what one takes, in bytes.
    """

    time: float
    running: tuple[RequestState, ...]
    waiting: tuple[RequestState, ...]
    num_running: int
    num_waiting: int
    slots: tuple[SlotStats, ...]
    cache: CacheStats
    totals: Totals
    max_model_len: int
    bytes_per_token: int


def take_snapshot(scheduler: Scheduler, cache: Cache, tally: Tally) -> Snapshot:
    """The engine that has these three. Takes time with its slots and running requests, not with their tokens."""
    now = time.monotonic()
    return Snapshot(
        time=time.time(),
        running=_states(scheduler.running, now),
        waiting=_states(list(islice(scheduler.waiting, WAITING_SHOWN)), now),
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        slots=cache.slots(),
        cache=cache.stats(),
        totals=tally.now(preemptions=scheduler.preemptions),
        max_model_len=cache.layout.max_model_len,
        bytes_per_token=cache.layout.bytes_per_token,
    )


def _states(requests: Sequence[Request], now: float) -> tuple[RequestState, ...]:
    return tuple(
        RequestState(
            request_id=request.request_id,
            sample=request.sample,
            slot=request.slot,
            prompt_tokens=len(request.prompt_token_ids),
            computed=request.computed,
            output_tokens=len(request.output_token_ids),
            priority=request.priority,
            preemptions=request.preemptions,
            age=now - request.arrival,
        )
        for request in requests
    )
