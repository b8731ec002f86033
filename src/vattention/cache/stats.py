"""What a cache holds, at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SlotStats:
    """One slot of a cache at one moment, in bytes.

    Attributes:
        live: somebody holds it. What an idle slot has mapped is what a finished request left for the next.
        tokens: its length.
        mapped: pages behind it, what it inherited included.
        needed: what its tokens take.
        shared: pages below its length that are mapped elsewhere too, part of `mapped`; an estimate where rollbacks and
            `reorder` have left pages of this slot past another's length.
    """

    live: bool
    tokens: int
    mapped: int
    needed: int
    shared: int


@dataclass(frozen=True)
class CacheStats:
    """Memory of a cache in bytes, its pages by state, and what the driver had to do for it.

    Attributes:
        reserved: virtual addresses.
        budget: physical memory the pool may create.
        created: physical memory the pool has created. Each page once, however often it is mapped.
        mapped: pages of live slots, at every place they are mapped; what a finished request left in a slot included.
        needed: what the tokens of live slots take, padding not counted.
        wasted: `mapped - needed`.
        reclaimable: created memory that a step could take for others: idle slots, and pages past a live slot's length.
        mappings: mappings to the kernel that this cache's addresses take.
        mapping_limit: mappings the driver may use in all, None without a limit.
        pages_free, pages_in_use, pages_quarantined: created pages of the pool by state. Quarantined pages are out of
            use because unmapping them failed.
        live_slots: slots in use.
        copied: bytes copied from page to page, over the cache's life: tails of forks and reorders, and what writing
            into a shared page takes along. Never a full page.
        driver_calls: calls by verb, over the pool's life. driver_seconds: time in them.
        prefetch_failures: times background growth ended in a driver error.
    """

    reserved: int
    budget: int
    created: int
    mapped: int
    needed: int
    wasted: int
    reclaimable: int
    mappings: int
    mapping_limit: int | None
    pages_free: int
    pages_in_use: int
    pages_quarantined: int
    live_slots: int
    copied: int
    driver_calls: Mapping[str, int]
    driver_seconds: float
    prefetch_failures: int
