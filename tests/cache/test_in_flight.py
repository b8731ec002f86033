"""Invariant 5: no page is unmapped or handed on while work that may touch it is in flight.

The rules of the state machine on a device that is never idle: after every call a forward pass over all live slots is
submitted, and it ends only when somebody waits for the device. Whatever it may touch is noted; taking that away before
the next fence fails. Nor is the device waited for where nothing is taken away: growing costs no pass its overlap.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis.stateful import invariant

from cache import test_state_machine as machine
from support.device import DeviceDriver
from support.machines import TEST_ALL, run

EXAMPLES = 1_000 if TEST_ALL else 15
STEPS = 100


class BusyDriver(DeviceDriver):
    """A device with work in flight.

    Attributes:
        busy: address of a page -> handle that was behind it when work on it was submitted.
        fences: how often the device was waited for.
        taken: pages that were unmapped or replaced with work on them behind us.
    """

    def __init__(self, page_size: int) -> None:
        super().__init__(page_size)
        self.busy: dict[int, int] = {}
        self.fences = self.removals = self.taken = 0

    def submit(self, addresses: Any) -> None:
        """Work on what is mapped there."""
        self.busy.update((address, self.mapped[address]) for address in addresses)

    def fence(self) -> None:
        self.fences += 1
        self.busy.clear()

    def map(self, address: int, handle: int, size: int) -> None:
        self._take(self._pages(address, size))
        there = set(self.mapped.values())
        for each in range(handle, handle + size, self.granularity):
            assert each in there or each not in self.busy.values(), "handed on while work may touch it"
        super().map(address, handle, size)

    def unmap(self, address: int, size: int) -> None:
        self._take(self._pages(address, size))
        super().unmap(address, size)

    def release(self, handle: int, size: int) -> None:
        assert handle not in self.busy.values(), "released while work may touch it"
        super().release(handle, size)

    def _take(self, pages: range) -> None:
        gone = [page for page in pages if page in self.mapped]
        assert not self.busy.keys() & set(gone), "taken away while work may touch it"
        self.removals += bool(gone)
        self.taken += len(gone)


totals = {"submitted": 0, "fences": 0, "taken": 0}


class BusyMachine(machine.CacheMachine):
    """The rules, on such a device."""

    driver: BusyDriver
    kind = BusyDriver

    def _open_driver(self) -> BusyDriver:
        return self.kind(self.case.page_size)

    @invariant()
    def a_pass_is_submitted(self) -> None:
        for mirror in self.mirrors:
            backing = mirror.cache._backing
            with self.pool.lock:  # background growth changes the books, and touches nothing that is live
                for slot in mirror.tokens:
                    state = backing.slots[slot]
                    for stream, pages in enumerate(backing.ends_for(state, state.length)):
                        first = backing.index(_part(slot, stream, state.first[stream]))
                        places = range(first, first + pages - state.first[stream])
                        self.driver.submit([backing.reservation._at(place) for place in places])
                        totals["submitted"] += len(places)
        assert self.driver.fences <= self.driver.removals, "waited for, and nothing taken away"

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            totals["fences"] += self.driver.fences
            totals["taken"] += self.driver.taken
        super().teardown()


def _part(slot: int, stream: int, first: int) -> Any:
    from vattention.cache.backing import Part

    return Part(slot, stream, first, 0)


@pytest.mark.timeout(0 if TEST_ALL else 300)
def test_nothing_is_taken_away_under_work_in_flight() -> None:
    totals.update(dict.fromkeys(totals, 0))
    run(BusyMachine, examples=EXAMPLES, steps=STEPS)
    print(totals)
    assert totals["taken"] > 10 * EXAMPLES
    assert totals["submitted"] > 100 * EXAMPLES
    assert 0 < totals["fences"] < totals["taken"]


class _Careless(BusyDriver):
    def fence(self) -> None: ...


class _CarelessMachine(BusyMachine):
    kind = _Careless


def test_the_model_sees_who_does_not_wait() -> None:
    """The control."""
    with pytest.raises(AssertionError, match="while work may touch it"):
        run(_CarelessMachine, examples=EXAMPLES, steps=STEPS)
