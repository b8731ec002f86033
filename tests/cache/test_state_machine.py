"""Invariants 1 to 4: random calls of the whole public API, compared after every one with a plain model.

One or two caches on one pool grow, roll back, fork, finish and are closed and opened again, in budgets so small that
running out of pages, and of mappings, is the usual thing. After every call every token of every live slot is
compared, and the pool's books with the page tables, with /proc/self/maps and with what the memfd holds.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.device import DeviceDriver
from support.drivers import new_driver
from support.mirror import Mirror, check_all
from vattention.cache import KVCache, KVLayout
from vattention.errors import ConfigError, OutOfPages
from vattention.memory import MappingBudget, PagePool, Run

KIB = 1024
TEST_ALL = os.environ.get("VATTENTION_TEST_ALL") == "1"
STEPS = 1_000_000 if TEST_ALL else 20_000

# Tokens of 192 to 8192 bytes a stream: pages hold many, a few, a broken number of them, or less than one.
LAYOUTS = {
    "one layer": KVLayout(1, 2, 32, torch.float32, 3, 60),
    "token-major": KVLayout(2, 1, 96, torch.float32, 4, 90),
    "half precision": KVLayout(3, 2, 48, torch.bfloat16, 3, 100),
    "head-major": KVLayout(2, 2, 96, torch.bfloat16, 4, 100, head_major=True),
    "head-major, K and V together": KVLayout(1, 3, 96, torch.float32, 3, 40, head_major=True, kv_together=True),
    "sliced with a remainder": KVLayout(3, 1, 48, torch.float32, 4, 80, layers_per_stream=2),
    "sliced, K and V together": KVLayout(3, 2, 48, torch.float32, 3, 50, layers_per_stream=2, kv_together=True),
    "all layers in one stream": KVLayout(3, 1, 24, torch.float64, 5, 64, layers_per_stream=None, kv_together=True),
    "a token takes more than a page": KVLayout(2, 3, 480, torch.float32, 3, 12),
    "layers that differ": KVLayout(
        3, 3, 96, torch.float32, 3, 60, layers_per_stream=2, shapes=((3, 32, 96), (1, 96, 64), (2, 64, 48))
    ),
    "layers that differ, together": KVLayout(
        3,
        2,
        96,
        torch.bfloat16,
        3,
        90,
        layers_per_stream=None,
        kv_together=True,
        shapes=((2, 32, 96), (1, 96, 8), (2, 9, 9)),
    ),
    "large tokens": KVLayout(1, 4, 512, torch.float32, 4, 48),
}


def page_sizes(layout: KVLayout) -> list[int]:
    """4 and 64 KiB, and 12 KiB where it divides the streams."""
    granularity = os.sysconf("SC_PAGESIZE")
    sizes = [granularity, 3 * granularity, 64 * KIB]
    return [size for size in sizes if all(stream.size % size == 0 for stream in layout.streams)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One world: its caches, and how little they have."""

    layout: KVLayout
    page_size: int
    pages: int
    mappings: int | None
    second: bool
    poison: bool
    device: bool
    guard: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    page_size = draw(st.sampled_from(page_sizes(layout)))
    full = sum(-(-layout.max_model_len * stream.token_bytes // page_size) for stream in layout.streams)
    streams = len(layout.streams)
    pages = draw(st.sampled_from([1, streams, streams + 1, full - 1, full, full + streams, 2 * full, 5 * full]))
    mappings = draw(st.sampled_from([None, None, None, streams, 3 * streams, 6 * streams]))
    second, poison, device = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([False, False, True]))
    guard = not device and draw(st.booleans())
    return Case(layout, page_size, max(1, pages), mappings, second, poison, device, guard)


executed: Counter[str] = Counter()
"""Calls of each rule, all examples together."""
outcomes: Counter[str] = Counter()
"""How often they came out in the ways that matter."""

slots = st.integers(0, 5)
changes = st.one_of(st.integers(-3, 6), st.integers(-100, 100))
lengths = st.integers(0, 100)


class CacheMachine(RuleBasedStateMachine):
    """The rules. `which` and `slot` count modulo the caches and the live slots there are."""

    @initialize(case=cases())
    def open(self, case: Case) -> None:
        self.case = case
        self.driver = self._open_driver()
        # A limit of this world's own: other tests' mappings are none of its business. Two for the empty ranges.
        self.driver.mappings = MappingBudget(None if case.mappings is None else case.mappings + 2)
        self.pool = PagePool(self.driver, case.page_size, case.pages * case.page_size)
        self.mirrors = [self._open_cache() for _ in range(1 + case.second)]
        self.closed: list[KVCache] = []
        self.held: list[Run] = []

    def _open_driver(self) -> Any:
        return DeviceDriver(self.case.page_size) if self.case.device else new_driver(guard=self.case.guard)

    def _open_cache(self) -> Mirror:
        return Mirror(KVCache(self.case.layout, pool=self.pool, poison=self.case.poison))

    def _mirror(self, which: int) -> Mirror:
        return self.mirrors[which % len(self.mirrors)]

    def _slot(self, mirror: Mirror, slot: int) -> int:
        """A live slot; where there is none, a new one, so that no call is wasted."""
        live = sorted(mirror.tokens) or [mirror.alloc()]
        return live[slot % len(live)]

    def _clamped(self, length: int) -> int:
        return max(0, min(self.case.layout.max_model_len, length))

    @invariant()
    def everything_holds(self) -> None:
        check_all(self.pool, self.mirrors, held=self.held)

    # -- slots

    @rule(which=slots, hint=st.one_of(st.just(0), lengths))
    def alloc(self, which: int, hint: int) -> None:
        executed["alloc"] += 1
        mirror = self._mirror(which)
        hint = self._clamped(hint)
        slot = mirror.alloc(hint)
        if slot is not None and hint:
            mapped = mirror.cache._backing.slots[slot].mapped
            wanted = mirror.cache._backing.pages_for(hint)
            assert all(here <= there for here, there in zip(mapped, wanted, strict=True))

    @rule(which=slots, slot=slots)
    def free(self, which: int, slot: int) -> None:
        executed["free"] += 1
        mirror = self._mirror(which)
        mirror.free(self._slot(mirror, slot))

    @rule(which=slots, slot=slots)
    def fork(self, which: int, slot: int) -> None:
        executed["fork"] += 1
        mirror = self._mirror(which)
        number = self._slot(mirror, slot)
        before = self.pool.stats()
        try:
            forked = mirror.fork(number)
        except OutOfPages:
            outcomes["fork without pages"] += 1
        else:
            outcomes["forked"] += forked is not None
            assert self.pool.stats().created - before.created <= len(self.case.layout.streams)

    @rule(which=slots, count=st.integers(1, 4), start=lengths, length=lengths)
    def alloc_range(self, which: int, count: int, start: int, length: int) -> None:
        """Rows of a batch, left-padded or not."""
        executed["alloc_range"] += 1
        mirror = self._mirror(which)
        rows = mirror.alloc_range(count)
        if rows is None:
            return
        try:
            mirror.pad({row: self._clamped(start * number // count) for number, row in enumerate(rows)})
        except OutOfPages:
            outcomes["padding without pages"] += 1
            for row in rows:
                mirror.starts[row] = mirror.cache._backing.slots[row].start
        self._step(mirror, dict.fromkeys(rows, self._clamped(length)))

    @rule(which=slots, slot=slots, start=lengths, length=lengths)
    def pad(self, which: int, slot: int, start: int, length: int) -> None:
        executed["pad"] += 1
        mirror = self._mirror(which)
        number = self._slot(mirror, slot)
        mirror.step({number: 0})
        try:
            mirror.pad({number: self._clamped(start)})
        except OutOfPages:
            mirror.starts[number] = mirror.cache._backing.slots[number].start
        self._step(mirror, {number: self._clamped(length)})

    @rule(which=slots, wanted=st.lists(st.tuples(st.integers(0, 4), slots), min_size=1, max_size=5))
    def reorder(self, which: int, wanted: list[tuple[int, int]]) -> None:
        executed["reorder"] += 1
        mirror = self._mirror(which)
        wanted = [(target % self.case.layout.max_num_seqs, self._slot(mirror, source)) for target, source in wanted]
        before, copied = self.pool.stats(), mirror.cache.stats().copied
        try:
            mirror.reorder(dict(wanted))
        except OutOfPages:
            outcomes["reorder without pages"] += 1
            return
        outcomes["reordered"] += 1
        tails = len({target for target, _ in wanted}) * len(self.case.layout.streams)
        assert self.pool.stats().created - before.created <= tails
        assert mirror.cache.stats().copied - copied <= tails * (self.case.page_size - 1)

    # -- growth

    @rule(which=slots, slot=slots, change=changes)
    def step_one(self, which: int, slot: int, change: int) -> None:
        executed["step_one"] += 1
        mirror = self._mirror(which)
        number = self._slot(mirror, slot)
        self._step(mirror, {number: self._clamped(len(mirror.tokens[number]) + change)})

    @rule(which=slots, wanted=st.lists(st.tuples(slots, changes), max_size=4))
    def step_many(self, which: int, wanted: list[tuple[int, int]]) -> None:
        executed["step_many"] += 1
        mirror = self._mirror(which)
        self._step(mirror, self._lengths(mirror, wanted))

    @rule(which=slots, slot=slots, back=st.integers(1, 60), forth=st.integers(1, 60))
    def rewrite(self, which: int, slot: int, back: int, forth: int) -> None:
        """Roll back and grow again, often into pages that a fork shares."""
        executed["rewrite"] += 1
        mirror = self._mirror(which)
        number = self._slot(mirror, slot)
        length = self._clamped(len(mirror.tokens[number]) - back)
        mirror.step({number: length})  # a rollback always succeeds
        self._step(mirror, {number: self._clamped(length + forth)})

    def _lengths(self, mirror: Mirror, wanted: list[tuple[int, int]]) -> dict[int, int]:
        numbers = [(self._slot(mirror, slot), change) for slot, change in wanted]
        return {number: self._clamped(len(mirror.tokens[number]) + change) for number, change in numbers}

    def _step(self, mirror: Mirror, lengths: dict[int, int]) -> None:
        outcomes["step" if mirror.step_as_foreseen(lengths) else "step without pages"] += 1

    @rule(
        which=slots,
        new=st.lists(st.tuples(st.one_of(slots, lengths), st.booleans()), min_size=1, max_size=3),
        grow=slots,
    )
    def admit(self, which: int, new: list[tuple[int, bool]], grow: int) -> None:
        """What `fits` says of new slots is what alloc and step then do, with and without hints."""
        executed["admit"] += 1
        mirror = self._mirror(which)
        wanted = {slot: self._clamped(len(tokens) + grow) for slot, tokens in mirror.tokens.items()}
        new = [(self._clamped(tokens), hint) for tokens, hint in new]
        fits = mirror.cache.fits(wanted, [tokens for tokens, _ in new])
        allocated = []
        for tokens, hint in new:
            slot = mirror.alloc(tokens if hint else 0)
            if slot is None:
                assert not fits
                break
            allocated.append(slot)
            wanted[slot] = tokens
        else:
            try:
                mirror.step(wanted)
            except OutOfPages as error:
                assert not fits, f"fits said yes, and step said {error}"
            else:  # of mappings `fits` knows an upper bound only, and slots taken over may need fewer
                assert fits or self.case.mappings is not None
                outcomes["admitted"] += 1
                return
        for slot in allocated:
            mirror.free(slot)

    @rule(which=slots, slot=slots, back=st.integers(0, 60), length=lengths)
    def alone(self, which: int, slot: int, back: int, length: int) -> None:
        """A request that has the pool to itself can always grow to what `capacity` promises."""
        executed["alone"] += 1
        mirror = self._mirror(which)
        # Another cache that has padded a slot keeps a page of zeros, where an address without a page cannot be read.
        if self.held or any(other.cache._backing.zeros for other in self.mirrors if other is not mirror):
            return
        number = self._slot(mirror, slot)
        for other in self.mirrors:
            for live in sorted(other.tokens):
                if (other, live) != (mirror, number):
                    other.free(live)
        length = min(self._clamped(length), mirror.cache.capacity())
        if self.case.mappings is None:
            mirror.step({number: self._clamped(len(mirror.tokens[number]) - back)})
            mirror.step({number: length})

    @rule(which=slots, wanted=st.lists(st.tuples(slots, changes), min_size=1, max_size=3), then=st.integers(0, 3))
    def prefetch(self, which: int, wanted: list[tuple[int, int]], then: int) -> None:
        executed["prefetch"] += 1
        mirror = self._mirror(which)
        lengths = self._lengths(mirror, wanted)
        mirror.cache.prefetch(lengths)
        if then == 0:
            mirror.cache.wait()
            mirror.cache.wait()
        elif then == 1:
            self._step(mirror, lengths)
        elif then == 2:
            mirror.cache.stats()
            for slot in sorted(mirror.tokens)[:1]:
                mirror.free(slot)
        # 3: whatever comes next meets the growth in flight

    # -- memory

    @rule(which=slots)
    def trim(self, which: int) -> None:
        executed["trim"] += 1
        cache = self._mirror(which).cache
        cache.fits({})  # joins background growth, which would make `before` a moment of its own
        before = self.pool.stats().created
        assert cache.trim() <= before * self.case.page_size
        assert cache.stats().reclaimable == 0
        assert self.pool.stats().free == 0

    @rule(pages=st.integers(0, 200))
    def resize(self, pages: int) -> None:
        executed["resize"] += 1
        for mirror in self.mirrors:
            mirror.cache.fits({})
        before = self.pool.stats()
        pages %= 2 * self.case.pages + 1
        try:
            self.pool.resize(pages * self.case.page_size + pages % self.case.page_size)
        except ConfigError:
            assert pages == 0
        except OutOfPages as error:
            assert (error.needed, error.free) == (self.pool.stats().in_use, pages)
            assert error.needed > pages
            assert self.pool.stats().budget == before.budget
        else:
            assert self.pool.stats().budget == pages

    @rule(pages=st.integers(0, 6), pieces=st.integers(1, 3))
    def outsider(self, pages: int, pieces: int) -> None:
        """Somebody who is no cache takes pages of the pool, or gives back what it has."""
        executed["outsider"] += 1
        if self.held:
            self.pool.drop(self.held)
            self.held = []
            return
        for _ in range(pieces):
            if pages <= self.pool.available:
                self.held += self.pool.take(pages)

    @rule(which=slots)
    @precondition(lambda self: len(self.closed) < 3)
    def reopen(self, which: int) -> None:
        """Close a cache, live slots and all, and open another in its place. The closed one stays around."""
        executed["reopen"] += 1
        which %= len(self.mirrors)
        mirror = self.mirrors[which]
        mirror.cache.close()
        mirror.forget()
        self.closed.append(mirror.cache)
        self.mirrors[which] = self._open_cache()

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for mirror in self.mirrors:
            mirror.cache.close()
            mirror.forget()
        self.pool.drop(self.held)
        assert self.pool.stats().in_use == self.pool.stats().quarantined == 0
        self.pool.trim()
        assert self.driver.physical_bytes == 0
        assert self.driver.mappings.used == 0
        self.driver.close()


@pytest.mark.timeout(0 if TEST_ALL else 300)
def test_every_call_keeps_the_invariants():
    chosen = settings(
        max_examples=STEPS // 160,  # most examples have the full 200 steps, some end early
        stateful_step_count=200,
        derandomize=not TEST_ALL,
        phases=(Phase.generate, Phase.shrink),  # explaining a failure would trace every line
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(CacheMachine, settings=chosen)
    print(dict(executed), dict(outcomes))
    assert sum(executed.values()) >= STEPS
    assert set(executed) == {
        name for name, method in vars(CacheMachine).items() if "hypothesis_stateful_rule" in dir(method)
    }
    assert min(executed.values()) >= STEPS // 400
    for outcome in ("step", "step without pages", "forked", "fork without pages", "admitted", "reordered"):
        assert outcomes[outcome] >= STEPS // 1000, f"{outcome}: the worlds are not tight enough, or too tight"
