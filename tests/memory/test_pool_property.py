"""PagePool and Reservation against plain models, on host memory and on a driver with whole handles.

Two state machines. The first only counts: what is taken, shared, dropped, quarantined, recovered, and how the budget
moves. The second maps for real, with a driver that fails now and then: every page carries a mark, so that each place of
the address range can be asked which page it shows, and the kernel is asked too.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter

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

from support import kernel
from support.device import DeviceDriver
from support.drivers import host_only, new_driver, page_table
from support.faults import Fault, FaultyDriver
from vattention.errors import ConfigError, DriverError, OutOfPages
from vattention.memory import MappingBudget, PagePool, Reservation, Run

TEST_ALL = os.environ.get("VATTENTION_TEST_ALL") == "1"
PAGE = os.sysconf("SC_PAGESIZE")

few = st.integers(0, 8)
many = st.integers(0, 40)


def explore(machine: type[RuleBasedStateMachine]) -> None:
    chosen = settings(
        max_examples=5_000 if TEST_ALL else 100,
        stateful_step_count=80,
        derandomize=not TEST_ALL,
        phases=(Phase.generate, Phase.shrink),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)


def pages_of(runs: list[Run]) -> list[int]:
    return [page for run in runs for page in range(run.handle, run.handle + run.pages * PAGE, PAGE)]


# -- the pool


class PoolMachine(RuleBasedStateMachine):
    """`held` are references somebody has, one list of runs for each time they were taken or shared."""

    @initialize(device=st.booleans(), budget=st.integers(1, 40))
    def open(self, device: bool, budget: int) -> None:
        self.driver = DeviceDriver(PAGE) if device else new_driver()
        self.pool = PagePool(self.driver, PAGE, budget * PAGE)
        self.budget = budget
        self.held: list[list[Run]] = []
        self.stuck: list[list[Run]] = []
        self.created = 0

    @invariant()
    def the_books_are_right(self) -> None:
        references = Counter(page for runs in self.held for page in pages_of(runs))
        quarantined = Counter(page for runs in self.stuck for page in pages_of(runs))
        for page, count in (references + quarantined).items():
            assert self.pool.references(page) == count
        stats = self.pool.stats()
        assert stats.budget == self.pool.budget == self.budget
        assert stats.in_use == len(references)
        assert stats.quarantined == len(set(quarantined) - set(references))
        assert stats.free + stats.in_use + stats.quarantined == stats.created <= stats.budget
        assert stats.created * PAGE == self.driver.physical_bytes
        assert self.pool.available == stats.budget - stats.in_use - stats.quarantined

    @invariant()
    def free_runs_are_whole_and_extents_know_what_is_in_them(self) -> None:
        free = {page for page, count in self.pool._refs.items() if not count}
        runs = self.pool._free_runs
        assert {page for start, pages in runs.items() for page in pages_of([Run(start, pages)])} == free
        for start, pages in runs.items():
            assert pages > 0
            assert self.pool._free_ends[start + pages * PAGE] == start
            assert start - PAGE not in free
            assert start + pages * PAGE not in free
        assert len(self.pool._free_ends) == len(runs)
        if self.driver.linear:
            for extent in self.pool._extents._extents:
                inside = sum(extent.start <= page < extent.end for page in self.pool._refs)
                assert extent.created == inside
                spare = self.pool._extents._spare.get((extent.end - extent.start) // PAGE, {})
                assert (extent.start in spare) == (inside == 0)

    @rule(pages=many, room=many, behind=st.one_of(st.none(), few))
    def take(self, pages: int, room: int, behind: int | None) -> None:
        after = None
        if behind is not None and self.held:
            after = pages_of(self.held[behind % len(self.held)])[-1]
        before = dict(self.pool._refs)
        available = self.pool.available
        follows = self.pool.continues(after, pages) if after is not None and pages else 0
        try:
            runs = self.pool.take(pages, after=after, room=room)
        except OutOfPages as error:
            assert (error.needed, error.free) == (pages, available)
            assert pages > available
            assert self.pool._refs == before
            return
        taken = pages_of(runs)
        assert len(taken) == len(set(taken)) == pages <= available
        assert not any(before.get(page) for page in taken), "handed out twice"
        if self.driver.linear:
            assert len(runs) <= (1 if after is None or follows == pages else 2)
            assert pages_of(runs[:1])[:1] == ([after + PAGE] if follows else taken[:1])
        if runs:
            self.held.append(runs)

    @rule(which=few, first=few, pages=few)
    @precondition(lambda self: self.held)
    def share(self, which: int, first: int, pages: int) -> None:
        shared = pages_of(self.held[which % len(self.held)])[first:][: pages + 1]
        if shared:
            runs = [Run(page, 1) for page in shared]
            self.pool.share(runs)
            self.held.append(runs)

    @rule(which=few)
    @precondition(lambda self: self.held)
    def drop(self, which: int) -> None:
        self.pool.drop(self.held.pop(which % len(self.held)))

    @rule(which=few, first=few)
    @precondition(lambda self: self.held)
    def drop_some(self, which: int, first: int) -> None:
        """Drop pages one by one, and leave a hole in what is held."""
        held = pages_of(self.held.pop(which % len(self.held)))
        kept, dropped = held[:first] + held[first + 2 :], held[first : first + 2]
        self.pool.drop(Run(page, 1) for page in dropped)
        if kept:
            self.held.append([Run(page, 1) for page in kept])

    @rule(which=few)
    @precondition(lambda self: self.held)
    def quarantine(self, which: int) -> None:
        runs = self.held.pop(which % len(self.held))
        self.pool.quarantine(runs)
        self.stuck.append(runs)

    @rule(which=few)
    @precondition(lambda self: self.stuck)
    def recover(self, which: int) -> None:
        self.pool.recover(self.stuck.pop(which % len(self.stuck)))

    @rule(budget=many)
    def resize(self, budget: int) -> None:
        used = self.pool.stats().in_use + self.pool.stats().quarantined
        try:
            self.pool.resize(budget * PAGE + budget)
        except ConfigError:
            assert budget == 0
        except OutOfPages as error:
            assert (error.needed, error.free) == (used, budget)
            assert used > budget
        else:
            assert used <= budget
            self.budget = budget

    @rule()
    def trim(self) -> None:
        free = self.pool.stats().free
        assert self.pool.trim() == free * PAGE
        assert self.pool.stats().free == 0

    @rule(which=few)
    def drop_twice(self, which: int) -> None:
        """What nobody holds cannot be dropped, shared or quarantined."""
        free = [page for page, count in self.pool._refs.items() if not count]
        page = free[which % len(free)] if free else 1 << 50
        for wrong in (self.pool.drop, self.pool.share, self.pool.quarantine, self.pool.recover):
            with pytest.raises(ValueError, match="in use"):
                wrong([Run(page, 1)])

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for runs in self.held:
                self.pool.drop(runs)
            for runs in self.stuck:
                self.pool.recover(runs)
            self.pool.trim()
            assert self.pool.stats() == (self.budget, 0, 0, 0, 0)
            assert self.driver.physical_bytes == 0
            self.driver.close()


def test_pool():
    explore(PoolMachine)


# -- reservations

PLACES = 24


class ReservationMachine(RuleBasedStateMachine):
    """Two ranges on one pool. `tables` is what must be mapped where, `stuck` what an unmap that failed left behind."""

    @initialize(device=st.booleans(), budget=st.integers(4, 60), mappings=st.one_of(st.none(), st.integers(6, 30)))
    def open(self, device: bool, budget: int, mappings: int | None) -> None:
        self.driver = FaultyDriver(DeviceDriver(PAGE) if device else new_driver())
        self.driver.driver.mappings = MappingBudget(mappings)
        self.pool = PagePool(self.driver, PAGE, budget * PAGE)
        self.ranges = [self._open() for _ in range(2)]
        self.tables: list[dict[int, int]] = [{}, {}]
        self.marks = itertools.count(1)
        self.marked: dict[int, int] = {}

    def _open(self) -> tuple[Reservation, torch.Tensor]:
        reservation = Reservation(self.pool, PLACES * PAGE)
        return reservation, reservation.tensor(0, (PLACES,), (PAGE // 8,), torch.int64)

    @invariant()
    def every_place_shows_its_page(self) -> None:
        references: Counter[int] = Counter()
        maps = kernel.read_maps()
        for (reservation, memory), table in zip(self.ranges, self.tables, strict=True):
            assert {place: reservation.page(place) for place in range(PLACES)} == {
                place: table.get(place) for place in range(PLACES)
            }
            assert sum(run.pages for run in reservation.runs(0, PLACES)) == len(table)
            references.update(table.values())
            references.update(reservation.quarantined())
            stuck = set(reservation._stuck)
            where = (reservation.address, reservation.size)
            shown = page_table(self.driver, *where, PAGE, unreadable=stuck, maps=maps)
            settled = {place: page for place, page in table.items() if place not in stuck}
            assert {place: page for place, page in shown.items() if place not in stuck} == settled
            for place, page in settled.items():
                assert memory[place].item() == self.marked[page], f"place {place} shows another page"
            if not stuck and self.driver.linear:
                assert len(kernel.mappings(*where, maps)) <= reservation.mappings
        assert {page: count for page, count in self.pool._refs.items() if count} == references
        stats = self.pool.stats()
        in_use = {page for table in self.tables for page in table.values()}
        assert (stats.in_use, stats.quarantined) == (len(in_use), len(set(references) - in_use))
        assert stats.free + stats.in_use + stats.quarantined == stats.created <= stats.budget
        assert self.driver.physical_bytes == stats.created * PAGE
        assert self.driver.mappings.used == sum(reservation.mappings for reservation, _ in self.ranges)

    def _attempt(self, call: object, *args: object) -> bool:
        """Call; False when it failed, because the driver did or because the mappings were spent."""
        failures = self.driver.failures
        try:
            call(*args)
        except DriverError:
            assert self.driver.failures > failures
            return False
        except OutOfPages as error:
            assert error.what == "mappings"
            assert error.needed > error.free
            return False
        finally:
            if self.driver.failures > failures:
                self.driver.repair()
        return True

    @rule(call=st.integers(1, 12), after=st.booleans())
    def something_will_fail(self, call: int, after: bool) -> None:
        self.driver.fault = Fault(len(self.driver.history) + call, after=after)

    @rule(which=few, place=many, pages=st.integers(1, 10), pieces=st.integers(1, 3), follow=st.booleans())
    def map(self, which: int, place: int, pages: int, pieces: int, follow: bool) -> None:
        """Map new pages, over others too."""
        (reservation, memory), table = self.ranges[which % 2], self.tables[which % 2]
        place %= PLACES
        pages = min(pages, PLACES - place)
        runs: list[Run] = []
        try:
            for piece in range(pieces):
                size = pages // pieces + (piece < pages % pieces)
                after = table.get(place - 1) if follow and not runs else None
                runs += self.pool.take(size, after=after, room=PLACES)
        except (OutOfPages, DriverError) as error:
            self.driver.repair()
            self.pool.drop(runs)
            assert isinstance(error, DriverError) or error.what == "pages"
            return
        fresh = pages_of(runs)
        if self._attempt(reservation.map, place, runs):
            table.update(zip(range(place, place + pages), fresh, strict=True))
            for number, page in enumerate(fresh, start=place):
                self.marked[page] = next(self.marks)
                memory[number] = self.marked[page]

    @rule(which=few, source=many, place=many, pages=st.integers(1, 6))
    def alias(self, which: int, source: int, place: int, pages: int) -> None:
        (reservation, _), table = self.ranges[which % 2], self.tables[which % 2]
        source, place = source % PLACES, place % PLACES
        pages = min(pages, PLACES - source, PLACES - place)
        wanted = [table.get(number) for number in range(source, source + pages)]
        if None in wanted:
            with pytest.raises(ValueError, match="not all mapped"):
                reservation.alias(source, place, pages)
        elif not (set(range(source, source + pages)) & set(reservation._stuck)) and self._attempt(
            reservation.alias, source, place, pages
        ):
            table.update(zip(range(place, place + pages), wanted, strict=True))

    @rule(which=few, place=many, pages=many)
    def unmap(self, which: int, place: int, pages: int) -> None:
        """Whatever happens, nothing counts as mapped there afterwards."""
        (reservation, _), table = self.ranges[which % 2], self.tables[which % 2]
        place %= PLACES
        pages = min(pages, PLACES - place)
        mappings = reservation.mappings
        gain = reservation.mappings_of(place, pages)
        done = self._attempt(reservation.unmap, place, pages)
        for number in range(place, place + pages):
            table.pop(number, None)
        assert reservation.mappings == mappings - gain
        assert not done or not any(place <= number < place + pages for number in reservation._stuck)

    @rule(which=few)
    def settle(self, which: int) -> None:
        reservation, _ = self.ranges[which % 2]
        self._attempt(reservation.settle)
        if self.driver.fault is None:
            self._attempt(reservation.settle)
            assert reservation.settled

    @rule(which=few)
    def close(self, which: int) -> None:
        which %= 2
        reservation, _ = self.ranges[which]
        if not self._attempt(reservation.close):
            self.tables[which].clear()
            self.every_place_shows_its_page()
            reservation.close()
        self.driver.repair()
        self.tables[which].clear()
        self.ranges[which] = self._open()

    @rule()
    def trim(self) -> None:
        if self._attempt(self.pool.trim):
            assert self.pool.stats().free == 0

    @rule(which=few, place=st.integers(-3, PLACES + 3), pages=st.integers(-2, PLACES + 3))
    def outside(self, which: int, place: int, pages: int) -> None:
        """Nothing is ever mapped outside the range."""
        (reservation, _), _ = self.ranges[which % 2], self.tables
        if place >= 0 and pages >= 0 and place + pages <= PLACES:
            return
        with pytest.raises(ValueError, match="reserved"):
            reservation.unmap(place, pages)
        with pytest.raises(ValueError, match="reserved"):
            reservation.alias(0, place, pages)
        if pages > 0:
            with pytest.raises(ValueError, match="reserved"):
                reservation.map(place, [Run(0, pages)])

    def teardown(self) -> None:
        if hasattr(self, "ranges"):
            self.driver.repair()
            for reservation, _ in self.ranges:
                reservation.close()
            self.pool.trim()
            assert self.pool.stats()[1:] == (0, 0, 0, 0)
            assert self.driver.physical_bytes == 0
            assert self.driver.mappings.used == 0
            self.driver.close()


def test_reservation():
    explore(ReservationMachine)


@host_only
def test_giving_back_is_never_refused_for_want_of_mappings():
    """A hole in a run is one mapping more, and yet less memory."""
    driver = new_driver()
    driver.mappings = MappingBudget(3)
    pool = PagePool(driver, PAGE, 9 * PAGE)
    reservation = Reservation(pool, 9 * PAGE)
    reservation.map(0, pool.take(9))
    with pytest.raises(OutOfPages, match="mapping limit"):
        Reservation(pool, PAGE)
    reservation.unmap(4, 1)
    assert pool.stats().free == 1
    reservation.close()
    assert driver.mappings.used == 0
    pool.trim()
    driver.close()


def test_a_pages_references_may_get_stuck_one_by_one():
    """Mapped at three places, of which two cannot be unmapped: in use, then quarantined, then free."""
    driver = FaultyDriver(new_driver())
    pool = PagePool(driver, PAGE, 4 * PAGE)
    reservation = Reservation(pool, 4 * PAGE)
    reservation.map(0, pool.take(1))
    reservation.alias(0, 1, 1)
    reservation.alias(0, 2, 1)
    driver.fault = Fault(len(driver.history) + 1, onwards=True)
    states = [pool.stats()[2:]]
    for place in (0, 1):
        with pytest.raises(DriverError):
            reservation.unmap(place, 1)
        states.append(pool.stats()[2:])
    driver.repair()
    reservation.unmap(2, 1)
    states.append(pool.stats()[2:])
    reservation.settle()
    states.append(pool.stats()[2:])
    assert states == [(0, 1, 0), (0, 1, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]  # free, in use, quarantined
    reservation.close()
    driver.close()


def test_pages_stuck_at_one_place_one_after_the_other_all_come_back():
    """The driver stays broken while a page, then another, is mapped at the same place."""
    driver = FaultyDriver(new_driver())
    pool = PagePool(driver, PAGE, 4 * PAGE)
    reservation = Reservation(pool, 4 * PAGE)
    runs = [pool.take(1), pool.take(1)]
    for run in runs:
        driver.fault = Fault(len(driver.history) + 2, onwards=True)  # map works; access, and undoing it, do not
        with pytest.raises(DriverError):
            reservation.map(0, run)
    assert pool.stats().quarantined == 2
    driver.repair()
    reservation.settle()
    assert pool.stats()[1:] == (2, 2, 0, 0)
    reservation.close()
    driver.close()
