"""Room in the pool: what fits, what must be reclaimed for it, and what is said when it does not fit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

from vattention.cache.backing import Backing, Plan
from vattention.errors import OutOfPages
from vattention.memory.pool import Holder

WATERMARK = 0.1
"""Share of the budget that one reclaim aims to leave available, so that the next steps find it."""


class Room:
    """Makes room for one cache, out of what its idle slots have and out of what other caches on the pool can spare.

    Args:
        backing: the slots, and the pool.
        holder: who they belong to; the pool is to ask the others.
    """

    def __init__(self, backing: Backing, holder: Holder) -> None:
        self._backing = backing
        self._pool = backing.pool
        self._holder = weakref.ref(holder)  # which owns this

    def plan(self, wanted: Mapping[int, int]) -> Plan:
        """What `step(wanted)` must map."""
        plan = Plan()
        for number, length in wanted.items():
            slot = self._backing.slots[number]
            if length > slot.covered or slot.length < min(slot.shared, length):
                plan += self._backing.plan(number, length)
        return plan

    def shortage(self, plan: Plan, wanted: Mapping[int, int]) -> OutOfPages | None:
        """The error that applying `plan` would meet, everything reclaimable counted; None when it fits."""
        mappings = self._pool.driver.mappings.free
        if mappings is not None and plan.mappings > mappings:
            mappings += self._backing.unused_mappings()
            needed = plan.mappings
            for number, length in wanted.items():
                if not self._backing.slots[number].length:  # counted as emptied
                    needed += self._backing.plan_new(length).mappings - self._backing.plan(number, length).mappings
            if needed > mappings:
                hint = (
                    "the mapping limit is reached: use larger pages or fewer streams a slot, or raise vm.max_map_count"
                )
                return OutOfPages(needed, mappings, "mappings", hint)
        available = self._pool.available
        if plan.pages > available:
            others = sum(holder.reclaimable() for holder in self._pool.holders if holder is not self._holder())
            available += self._backing.reclaimable(wanted, plan.copies) + others
            if plan.pages > available:
                return OutOfPages(plan.pages, available)
        return None

    def make(self, plan: Plan, wanted: Mapping[int, int]) -> Plan:
        """Reclaim until `plan`, or the one this returns instead, can be applied, and then some.

        Raises OutOfPages, having reclaimed nothing.
        """
        shortage = self.shortage(plan, wanted)
        if shortage is not None:
            raise shortage
        self._backing.empty_unused(plan.mappings, wanted)
        if wanted:
            plan = self.plan(wanted)  # what was emptied may have been inherited by one of them
        if plan.pages > self._pool.available:
            self._backing.reclaim(plan.pages + int(WATERMARK * self._pool.budget), wanted)
            self._pool.reclaim(plan.pages - self._pool.available, asker=self._holder())
        return plan

    def insist(self, work: Callable[[], None], pages: int, keep: Mapping[int, int]) -> None:
        """Do `work`, which takes `pages` pages. Where the machine has less than the budget, reclaim that much first."""
        try:
            work()
        except OutOfPages:
            free = self._pool.stats().free
            goal = self._pool.available + pages
            self._backing.reclaim(goal, keep)
            self._pool.reclaim(goal - self._pool.available, asker=self._holder())
            if self._pool.stats().free == free:
                raise
            work()

    def capacity(self) -> int:
        """Tokens that fit at once when nothing else is held, filling one slot after another to max_model_len."""
        pages = self._pool.budget - (self._backing.zeros is not None)
        mappings = self._pool.driver.mappings.limit
        longest = self._backing.layout.max_model_len
        full = self._backing.plan_new(longest)
        slots = min(self._backing.layout.max_num_seqs, pages // full.pages)
        if mappings is not None:
            slots = min(slots, mappings // full.mappings)
            mappings -= slots * full.mappings
        if slots == self._backing.layout.max_num_seqs:
            return slots * longest
        return slots * longest + self._longest(pages - slots * full.pages, mappings)

    def _longest(self, pages: int, mappings: int | None) -> int:
        """The largest number of tokens one slot can have with that many pages and mappings."""
        low, high = 0, self._backing.layout.max_model_len
        while low < high:
            middle = (low + high + 1) // 2
            plan = self._backing.plan_new(middle)
            if plan.pages <= pages and (mappings is None or plan.mappings <= mappings):
                low = middle
            else:
                high = middle - 1
        return low
