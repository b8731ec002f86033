"""What the page draws, as JSON: bounded, however many slots and requests there are."""

from __future__ import annotations

from dataclasses import astuple, fields
from typing import Any

from vattention.cache import CacheStats
from vattention.engine.snapshot import RequestState, Snapshot
from vattention.server.dashboard.history import History, Point

MOST_SLOTS = 64
MOST_REQUESTS = 64
_LONGEST_ID = 64

_POINT = [field.name for field in fields(Point)]


def page_data(history: History, model_name: str, after: int) -> dict[str, Any]:
    """The engine now, and the points from number `after` on, each a list in the order of `columns`."""
    snapshot = history.latest
    return {
        "model": model_name,
        "up": history.up,
        "columns": _POINT,
        "points": [[_short(value) for value in astuple(point)] for point in history.since(after)],
        "now": None if snapshot is None else _now(snapshot),
    }


def _now(snapshot: Snapshot) -> dict[str, Any]:
    totals = snapshot.totals
    return {
        "time": round(snapshot.time, 3),
        "running": snapshot.num_running,
        "waiting": snapshot.num_waiting,
        "max_model_len": snapshot.max_model_len,
        "bytes_per_token": snapshot.bytes_per_token,
        "slots": [
            [slot.live, slot.tokens, slot.mapped, slot.needed, slot.shared] for slot in snapshot.slots[:MOST_SLOTS]
        ],
        "num_slots": len(snapshot.slots),
        "memory": _memory(snapshot.cache),
        "requests": [_request(state) for state in (*snapshot.running, *snapshot.waiting)[:MOST_REQUESTS]],
        "preemptions": totals.preemptions,
        "generated_tokens": totals.generated_tokens,
        "prompt_tokens": totals.prompt_tokens,
        "ended": dict(totals.ended),
    }


def _memory(cache: CacheStats) -> dict[str, Any]:
    """Bytes. `live`, `kept`, `free` and `broken` are pages, each once, and add up to `created`."""
    pages = cache.pages_free + cache.pages_in_use + cache.pages_quarantined
    page = cache.created // pages if pages else 0
    kept = min(cache.reclaimable, cache.pages_in_use * page)
    return {
        "reserved": cache.reserved,
        "budget": cache.budget,
        "created": cache.created,
        "live": cache.pages_in_use * page - kept,
        "kept": kept,
        "free": cache.pages_free * page,
        "broken": cache.pages_quarantined * page,
        "mapped": cache.mapped,
        "needed": cache.needed,
        "mappings": cache.mappings,
        "mapping_limit": cache.mapping_limit,
    }


def _request(state: RequestState) -> list[Any]:
    return [
        state.request_id[:_LONGEST_ID],
        state.sample,
        state.slot,
        state.prompt_tokens,
        state.computed,
        state.output_tokens,
        round(state.age, 1),
    ]


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
