"""Unmapping behind events, with a model: no page is unmapped or used again before its last use has completed.

Random maps, aliases, unmaps and trims beside work on several streams, watched and not. The emulated device does work as
late as CUDA allows, on the addresses it was given, and loses its context over a page that is gone by then. The model
knows what every physical page must hold in the end; work that hits a page of somebody else shows there.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from support import emulated_cuda
from support.machines import TEST_ALL, run

if not emulated_cuda.ACTIVE:
    pytest.skip("runs in a process of its own: see test_cuda_emulated.py", allow_module_level=True)

from vattention.errors import DriverError
from vattention.memory import CudaDriver, PagePool, Reservation

EXAMPLES = 3_000 if TEST_ALL else 60
STEPS = 60
PAGE, PAGES, STREAMS = os.sysconf("SC_PAGESIZE"), 12, 3

seen: Counter[str] = Counter()
places = st.integers(0, PAGES - 1)
streams = st.integers(0, STREAMS - 1)
bytes_ = st.integers(1, 250)


def _api() -> Any:
    from cuda.bindings import driver

    return driver


class InFlight(RuleBasedStateMachine):
    """One reservation. `content` and `pending` are by physical page: its bytes in the end, and who works on it."""

    driver_type: type[CudaDriver] = CudaDriver

    @initialize(several=st.booleans())
    def open(self, several: bool) -> None:
        emulated_cuda.load().configure(granularity=PAGE, memory=64 * PAGE)
        self.driver = self.driver_type(tensor_device="cpu")
        self.pool = PagePool(self.driver, PAGE, PAGES * PAGE)
        self.reservation = Reservation(self.pool, PAGES * PAGE)
        self.table: dict[int, int] = {}
        self.content: dict[int, int] = {}
        self.pending: dict[int, int] = {}
        self.watched: set[int] = set()
        api = _api()
        with self.driver.on_device():
            self.streams = [int(api.cuStreamCreate(1)[1]) for _ in range(STREAMS)]
        if several:
            self.watch(0)

    # -- pages

    @rule(place=places, count=st.integers(1, 3), value=bytes_)
    def map(self, place: int, count: int, value: int) -> None:
        """New pages, perhaps in place of others, and written by the host at once: what is free is in nobody's use."""
        count = min(count, PAGES - place, self.pool.available)
        if not count:
            return
        before = set(self.table.values())
        runs = self.pool.take(count)
        pages = [run.handle + number * PAGE for run in runs for number in range(run.pages)]
        assert not before & set(pages)
        self.reservation.map(place, runs)
        for number, page in enumerate(pages):
            seen["replaced"] += place + number in self.table
            seen["used again"] += page in self.content
            self.table[place + number] = page
            self.content[page] = value
            self._bytes(place + number).fill_(value)
        self._waited(before - set(self.table.values()))

    @rule(source=places, place=places)
    def alias(self, source: int, place: int) -> None:
        """The same page elsewhere: what is pending on it still comes."""
        source = self._mapped(source)
        if source is None or source == place:
            return
        before = set(self.table.values())
        self.reservation.alias(source, place, 1)
        seen["aliased"] += 1
        self.table[place] = self.table[source]
        self._waited(before - set(self.table.values()))

    @rule(place=places, count=st.integers(1, 4))
    def unmap(self, place: int, count: int) -> None:
        place = self._mapped(place) or 0
        count = min(count, PAGES - place)
        self.reservation.unmap(place, count)
        gone = [self.table.pop(each) for each in range(place, place + count) if each in self.table]
        if gone:
            seen["unmapped under work"] += bool(self.pending)
            self._waited(set(self.pending))

    @rule()
    def trim(self) -> None:
        self.pool.trim()
        for page in self.content.keys() - set(self.table.values()):
            del self.content[page]

    # -- work

    @rule(place=places, stream=streams, values=st.lists(bytes_, min_size=1, max_size=3))
    def fill(self, place: int, stream: int, values: list[int]) -> None:
        place, stream = self._mapped(place), self._named(stream)
        for value in values if self._free_for(place, stream) else ():
            with self.driver.on_device():
                address = self.reservation.address + place * PAGE
                assert _api().cuMemsetD8Async(address, value, PAGE, self.streams[stream]) == (0,)
            self._submitted(place, stream, value)

    @rule(source=places, place=places, stream=streams)
    def copy(self, source: int, place: int, stream: int) -> None:
        """Reads one page and writes another."""
        source, place, stream = self._mapped(source), self._mapped(place), self._named(stream)
        if source != place and self._free_for(source, stream) and self._free_for(place, stream):
            if self.table[source] == self.table[place]:
                return
            with self.driver.on_device():
                there, here = (self.reservation.address + each * PAGE for each in (place, source))
                assert _api().cuMemcpyDtoDAsync(there, here, PAGE, self.streams[stream]) == (0,)
            self.pending[self.table[source]] = stream
            self._submitted(place, stream, self.content[self.table[source]])

    def _mapped(self, place: int) -> Any:
        """One of the places with a page, None where there is none."""
        there = sorted(self.table)
        return there[place % len(there)] if there else None

    def _named(self, stream: int) -> int:
        """One of the streams that the driver waits for: all, or those that were named."""
        named = sorted(self.watched) or range(STREAMS)
        return named[stream % len(named)]

    def _free_for(self, place: int | None, stream: int) -> bool:
        """Whether work on a stream may touch a page: one that others work on would have to be waited for first."""
        page = self.table.get(-1 if place is None else place)
        return page is not None and self.pending.get(page, stream) == stream

    def _submitted(self, place: int, stream: int, value: int) -> None:
        page = self.table[place]
        self.pending[page], self.content[page] = stream, value
        seen["submitted"] += 1

    # -- streams

    @rule(stream=streams)
    def watch(self, stream: int) -> None:
        """From now on only named streams are waited for, so nobody else may have work under way."""
        if not self.watched:
            self.fence()
        self.driver.watch(self.streams[stream])
        self.watched.add(stream)
        seen["watched"] += 1

    @rule(stream=streams)
    def unwatch(self, stream: int) -> None:
        self.driver.unwatch(self.streams[stream])
        if stream in self.watched:
            self.watched.remove(stream)
            self.pending = {page: other for page, other in self.pending.items() if other != stream}

    @rule()
    def fence(self) -> None:
        self.driver.fence()
        self._waited(set(self.pending))

    def _waited(self, pages: set[int]) -> None:
        """Work on these must be over: seen at once where the page is still mapped somewhere."""
        for page in pages:
            self.pending.pop(page, None)
        for place, page in self.table.items():
            if page in pages:
                self._check(place, page)

    # -- what must be true

    def _bytes(self, place: int) -> torch.Tensor:
        return self.reservation.tensor(place * PAGE, (PAGE,), (1,), torch.uint8)

    def _check(self, place: int, page: int) -> None:
        values = set(self._bytes(place).tolist())
        assert values == {self.content[page]}, f"page {page:#x} at {place} holds {values}"

    @invariant()
    def what_nobody_works_on_is_as_it_must_be(self) -> None:
        if hasattr(self, "driver"):
            assert self.driver.calls.lost is None
            for place, page in self.table.items():
                if page not in self.pending:
                    self._check(place, page)

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        try:
            self.fence()
            self.what_nobody_works_on_is_as_it_must_be()
        finally:
            if self.driver.usable:
                self.reservation.close()
                self.pool.trim()
                self.driver.close()
            emulated_cuda.load().reset()
            emulated_cuda.load().configure(granularity=PAGE)


@pytest.mark.timeout(0 if TEST_ALL else 300)
def test_no_page_is_unmapped_or_used_again_before_its_last_use_has_completed() -> None:
    seen.clear()
    run(InFlight, examples=EXAMPLES, steps=STEPS)
    print(dict(seen))
    for what in ("submitted", "replaced", "used again", "aliased", "unmapped under work", "watched"):
        assert seen[what] > EXAMPLES // 6, what


class _Careless(CudaDriver):
    def fence(self) -> None: ...


class _OneStream(CudaDriver):
    """Waits for the first of the streams that it should wait for."""

    def _wait(self, streams: list[int]) -> None:
        super()._wait(streams[:1])


@pytest.mark.parametrize("driver", [_Careless, _OneStream])
def test_the_model_sees_who_does_not_wait(driver: type[CudaDriver]) -> None:
    """The controls. Handles of streams are addresses, so which of them is the first may differ from run to run."""
    with pytest.raises((AssertionError, DriverError, ExceptionGroup, Flaky)):
        run(type("Broken", (InFlight,), {"driver_type": driver}), examples=20 * EXAMPLES, steps=STEPS)
