"""The physical pages of one device: a budget, reference counts, and runs of free pages.

Pages are handed out in runs, as few as possible, and next to the page a stream already ends in, so that on a linear
driver a growing stream stays one mapping however the streams' growth interleaves. The physical space of such a driver
is sparse, and that is what makes this cheap: each stream starts in an *extent*, room in the physical space that costs
nothing until pages are created in it, and grows through it. When the budget is spent and the free pages lie in other
extents, as many of them are released as are created here.
"""

from __future__ import annotations

import collections
import contextlib
import operator
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, SupportsIndex

from vattention.errors import ConfigError, DriverError, InvalidRequest, OutOfPages
from vattention.memory.ahead import CreateAhead
from vattention.memory.driver import Driver
from vattention.memory.extents import Extents
from vattention.memory.meter import Meter

_CANDIDATES = 64  # free runs looked at before a new extent is opened
_SPARE_SHARE = 16  # creating releases free pages beyond this part of the budget, so that they do not pile up


class Run(NamedTuple):
    """Neighbouring pages of the physical space: the handle of the first, and how many."""

    handle: int
    pages: int


class PoolStats(NamedTuple):
    """Pages by state, and the budget; `free + in_use + quarantined == created <= budget`."""

    budget: int
    created: int
    free: int
    in_use: int
    quarantined: int


class Holder(Protocol):
    """Somebody who keeps pages mapped that nobody needs, because mapping them again would cost more."""

    def reclaimable(self) -> int:
        """Pages that `reclaim` could make available."""

    def reclaim(self, pages: int) -> None:
        """Give back at least `pages` pages, or all there are. Raises DriverError with nothing lost."""


class PagePool:
    """Hands out physical pages of one size from one driver, within a budget.

    Every method may be called from any thread. `lock` is public: whoever plans with the pool's numbers and then acts on
    them holds it meanwhile.

    Args:
        driver: where the pages come from. The pool does not close it.
        page_size: bytes; a multiple of the driver's granularity.
        budget: bytes that may be created at most; rounded down to whole pages.
        ahead: pages that a background thread keeps created and free, within the budget, once pages are being taken, so
            that the next ones cost no create. On a linear driver creating is cheap, and nothing is created ahead.

    Raises:
        ConfigError: a page size the driver cannot map, or a budget below one page.
    """

    def __init__(
        self, driver: Driver, page_size: SupportsIndex, budget: SupportsIndex, *, ahead: SupportsIndex = 0
    ) -> None:
        page_size = operator.index(page_size)
        if page_size <= 0 or page_size % driver.granularity:
            raise ConfigError(f"page_size {page_size} must be a positive multiple of {driver.granularity} bytes")
        self.driver = driver
        self.meter = Meter(driver)
        self.page_size = page_size
        self.lock: contextlib.AbstractContextManager[object] = threading.RLock()
        self._budget = self._whole_pages(budget)
        self._refs: dict[int, int] = {}  # every created page, 0 when free
        self._stuck: dict[int, int] = {}  # page -> references whose unmapping failed
        self._free_runs: dict[int, int] = {}  # first page of a free run -> pages, oldest first
        self._free_ends: dict[int, int] = {}  # page after a free run -> its first page
        self._free = 0
        self._extents = Extents(page_size)
        self._deferred: collections.deque[Callable[[], None]] = collections.deque()
        self._holders: list[weakref.ref[Holder]] = []
        pages_ahead = operator.index(ahead)
        self._ahead = CreateAhead(self, pages_ahead) if pages_ahead > 0 and not driver.linear else None
        _live.add(self)

    # -- numbers ------------------------------------------------------------------------------------------------

    @property
    def budget(self) -> int:
        """Pages that may be created at most."""
        return self._budget

    @property
    def available(self) -> int:
        """Pages that `take` could give now: free ones and ones not created yet."""
        with self.lock:
            self._run_deferred()
            return max(0, self._budget - len(self._refs) + self._free)

    def references(self, page: int) -> int:
        """How many places `page` is mapped at, plus other holds; 0 when free or not created."""
        return self._refs.get(page, 0)

    def stats(self) -> PoolStats:
        """Pages by state, at one moment."""
        with self.lock:
            self._run_deferred()
            created = len(self._refs)
            quarantined = sum(self._refs[page] == references for page, references in self._stuck.items())
            in_use = created - self._free - quarantined
            return PoolStats(self._budget, created, self._free, in_use, quarantined)

    # -- taking and giving back -----------------------------------------------------------------------------------

    def take(self, pages: SupportsIndex, *, after: int | None = None, room: SupportsIndex = 0) -> list[Run]:
        """Take `pages` pages with one reference each, in as few runs as possible.

        Args:
            after: the page these will be mapped behind; the first run follows it where that is possible.
            room: pages this stream may come to in all; a new run is placed where it can grow to that.

        Raises:
            OutOfPages: the budget, or the machine, has fewer; nothing was taken.
            DriverError: creating or releasing failed; nothing was taken.
        """
        pages, room = operator.index(pages), operator.index(room)
        if pages < 0:
            raise ValueError(f"pages must not be negative, got {pages}")
        with self.lock:
            if after is not None and not self._refs.get(operator.index(after)):
                raise ValueError(f"there is no page in use at {after!r} to go on behind")
            if pages > self.available:
                raise OutOfPages(pages, self.available)
            runs: list[Run] = []
            try:
                while pages > 0:
                    run = self._take_run(pages, after, room)
                    pages -= run.pages
                    if runs and run.handle == self._last(runs[-1]) + self.page_size:
                        run = Run(runs[-1].handle, runs.pop().pages + run.pages)
                    runs.append(run)
                    after = self._last(run)
            except BaseException:
                self.drop(runs)
                raise
            return runs

    def share(self, runs: Iterable[Run]) -> None:
        """Add a reference to every page of `runs`. Raises ValueError at a run that is not in use."""
        with self.lock:
            for run in runs:
                for page in self._used_pages(run):
                    self._refs[page] += 1

    def drop(self, runs: Iterable[Run]) -> None:
        """Remove a reference from every page of `runs`; a page without any is free, and stays created.

        Raises ValueError at a run that is not in use, the runs before it dropped.
        """
        with self.lock:
            for run in runs:
                pages = self._used_pages(run)
                first = pages.start
                for page in pages:
                    self._refs[page] -= 1
                    if self._refs[page]:
                        self._free_run(first, page)
                        first = page + self.page_size
                self._free_run(first, pages.stop)

    def _used_pages(self, run: Run) -> range:
        """The pages of `run`, each of which must have a reference."""
        handle, pages = map(operator.index, run)
        used = range(handle, handle + pages * self.page_size, self.page_size)
        if pages < 0 or not all(map(self._refs.get, used)):
            raise ValueError(
                f"{pages} pages from {handle:#x} on are not all in use: share or drop what take gave, once"
            )
        return used

    def continues(self, after: int, pages: int) -> int:
        """How many of `pages` pages `take(pages, after=after)` would find right behind `after`."""
        after, pages = operator.index(after), operator.index(pages)
        with self.lock:
            return self._room_at(after + self.page_size, pages) if self.driver.linear else 0

    # -- pages in an unknown state --------------------------------------------------------------------------------

    def quarantine(self, runs: Iterable[Run]) -> None:
        """A reference of each page may or may not be gone, because an unmap failed: keep the page out of use."""
        with self.lock:
            for run in runs:
                for page in self._used_pages(run):
                    self._stuck[page] = self._stuck.get(page, 0) + 1

    def recover(self, runs: Iterable[Run]) -> None:
        """What made the pages' state unknown is over: drop the reference after all."""
        with self.lock:
            for run in runs:
                for page in self._used_pages(run):
                    if page not in self._stuck:
                        raise ValueError(f"page {page:#x} is not in quarantine")
                    self._stuck[page] -= 1
                    if not self._stuck[page]:
                        del self._stuck[page]
                self.drop([run])

    # -- the budget -----------------------------------------------------------------------------------------------

    def resize(self, budget: SupportsIndex) -> None:
        """Change the budget to `budget` bytes, while running.

        Raises:
            OutOfPages: more pages than that are in use, reclaimable ones not counted; nothing changed.
        """
        pages = self._whole_pages(budget)
        with self.lock:
            kept = len(self._refs) - self._free
            if kept > pages:
                self.reclaim(kept - pages)
                kept = len(self._refs) - self._free
            if kept > pages:
                raise OutOfPages(kept, pages, hint="more pages are in use than the new budget allows: free slots first")
            self._rest()
            self._release_free(max(0, len(self._refs) - pages))
            self._budget = pages

    def trim(self) -> int:
        """Give the free pages' memory back to the system; return the bytes. The budget stays."""
        with self.lock:
            self._run_deferred()
            self._rest()
            pages = self._free
            self._release_free(pages)
            return pages * self.page_size

    @property
    def holders(self) -> list[Holder]:
        """Those that hold pages of this pool and can give some back."""
        found = (reference() for reference in self._holders)
        return [holder for holder in found if holder is not None]

    def add_holder(self, holder: Holder) -> None:
        """Let `holder` be asked for pages when the pool is short. Held weakly: it need not say goodbye."""
        with self.lock:
            self._holders = [weakref.ref(held) for held in (*self.holders, holder)]

    def reclaim(self, pages: SupportsIndex, *, asker: Holder | None = None) -> None:
        """Ask the holders other than `asker` until `pages` more pages are available or all were asked."""
        with self.lock:
            goal = self.available + operator.index(pages)
            for holder in self.holders:
                if self.available >= goal:
                    break
                if holder is not asker:
                    holder.reclaim(goal - self.available)

    def defer(self, work: Callable[[], None]) -> None:
        """Have `work` done before the pool is next asked for numbers.

        For finalizers: they run in the middle of anything, also of what a thread that holds the lock is doing here.
        """
        self._deferred.append(work)

    def _run_deferred(self) -> None:
        while self._deferred:
            self._deferred[0]()  # when it fails it stays, and is tried again
            self._deferred.popleft()

    def _whole_pages(self, budget: SupportsIndex) -> int:
        budget = operator.index(budget)
        if budget < self.page_size:
            raise ConfigError(f"a budget of {budget} bytes does not hold one page of {self.page_size}")
        return budget // self.page_size

    # -- creating ahead -------------------------------------------------------------------------------------------

    def create_ahead(self, pages: int) -> bool:
        """Create one free page more, where fewer than `pages` are free and the budget allows. Returns whether it did.

        For the thread that creates ahead: it holds the lock for one creation at a time.
        """
        with self.lock:
            if self._ahead is None or not self._ahead.awake:  # a trim came in between
                return False
            if self._free >= pages or len(self._refs) >= self._budget:
                return False
            handle = self.meter.create(self.page_size)  # `_create` would release what this piles up
            self._refs[handle] = 0
            self._free_run(handle, handle + self.page_size)
            return True

    def _rest(self) -> None:
        """What is about to be released shall not be created again at once."""
        if self._ahead is not None:
            self._ahead.awake = False

    # -- runs -----------------------------------------------------------------------------------------------------

    def _pages(self, runs: Iterable[Run]) -> Iterator[int]:
        for handle, pages in runs:
            yield from range(handle, handle + pages * self.page_size, self.page_size)

    def _last(self, run: Run) -> int:
        return run.handle + (run.pages - 1) * self.page_size

    def _take_run(self, pages: int, after: int | None, room: int) -> Run:
        if not self.driver.linear:
            return self._take_whole(pages)
        if after is not None:
            found = self._room_at(after + self.page_size, pages)
            if found:
                return self._claim(Run(after + self.page_size, found))
        for start in self._starts():
            if self._room_at(start, pages) == pages:
                return self._claim(Run(start, pages))
        spare = self._extents.spare(max(room, pages))
        if spare is not None:
            return self._claim(Run(spare, pages))
        handle = self._create(pages, None, max(room, pages))
        self._refs.update(dict.fromkeys(self._pages([Run(handle, pages)]), 1))
        return Run(handle, pages)

    def _take_whole(self, pages: int) -> Run:
        """One run on a driver whose pages are separate: a free one, or one new page."""
        if self._ahead is not None:
            self._ahead.wake()
        for start, length in self._free_runs.items():
            return self._claim(Run(start, min(length, pages)))
        handle = self._create(1, None, 1)
        self._refs[handle] = 1
        return Run(handle, 1)

    def _starts(self) -> Iterator[int]:
        """Free runs a stream may start in: not the ones behind another stream's last page, which that will want."""
        for start, _ in zip(reversed(self._free_runs), range(_CANDIDATES), strict=False):
            if start - self.page_size not in self._refs:
                yield start

    def _room_at(self, start: int, pages: int) -> int:
        """Pages from `start` on, up to `pages`, that are free or not created and ours to create."""
        end = min(start + pages * self.page_size, self._extents.end_of(start))
        page = start
        while page < end and not self._refs.get(page):
            page += self.page_size
        return (page - start) // self.page_size

    def _claim(self, run: Run) -> Run:
        """Take a run of free and not yet created pages into use. All or nothing."""
        end = run.handle + run.pages * self.page_size
        page = run.handle
        try:
            while page < end:
                if page in self._refs:
                    length = min(self._free_runs[page], (end - page) // self.page_size)
                    self._use_free(page, length)
                else:
                    after = page + self.page_size
                    while after < end and after not in self._refs:
                        after += self.page_size
                    length = (after - page) // self.page_size
                    self._create(length, page, 0, keep=Run(after, (end - after) // self.page_size))
                self._refs.update(dict.fromkeys(self._pages([Run(page, length)]), 1))
                page += length * self.page_size
        except BaseException:
            self.drop([Run(run.handle, (page - run.handle) // self.page_size)])
            raise
        return run

    def _free_run(self, start: int, end: int) -> None:
        """Enter [start, end), all without references, joining it with its free neighbours."""
        if start == end:
            return
        self._free += (end - start) // self.page_size
        if start in self._free_ends:
            before = self._free_ends.pop(start)
            del self._free_runs[before]
            start = before
        if end in self._free_runs:
            end += self._free_runs.pop(end) * self.page_size
        self._free_runs[start] = (end - start) // self.page_size
        self._free_ends[end] = start

    def _use_free(self, start: int, pages: int) -> None:
        """Remove the first `pages` of the free run at `start` from the free ones."""
        length = self._free_runs.pop(start)
        self._free -= pages
        rest = start + pages * self.page_size
        if length > pages:
            self._free_runs[rest] = length - pages
            self._free_ends[start + length * self.page_size] = rest
        else:
            del self._free_ends[rest]

    # -- the driver -----------------------------------------------------------------------------------------------

    def _create(self, pages: int, at: int | None, room: int, keep: Run | None = None) -> int:
        """Create a run, releasing free pages elsewhere where the budget asks for it; returns its first page.

        `keep`: free pages behind the run that the caller is about to use.
        """
        size = pages * self.page_size
        kept = keep.pages if keep else 0
        piled = min(pages, self._free - self._budget // _SPARE_SHARE - kept)
        released = max(0, len(self._refs) + pages - self._budget, piled)
        self._release_free(released, keep)
        try:
            handle = self.meter.create(size, at, room * self.page_size)
        except DriverError as error:
            if not error.out_of_memory:
                raise
            rest = pages - released  # the machine has less than the budget: make as much free as this takes
            if not self.driver.linear or rest <= 0 or self._free < rest + kept:
                raise OutOfPages(pages, self._free, hint=str(error)) from error
            self._release_free(rest, keep)
            try:
                handle = self.meter.create(size, at, room * self.page_size)
            except DriverError as again:
                if not again.out_of_memory:
                    raise
                raise OutOfPages(pages, self._free, hint=str(again)) from again
        if self.driver.linear:
            if at is None:
                self._extents.open(handle, room)
            self._extents.count_created(handle, pages)
        return handle

    def _release_free(self, pages: int, keep: Run | None = None) -> None:
        """Release `pages` free pages, oldest free runs first, from their ends."""
        for start in list(self._free_runs) if pages else ():
            end = start + self._free_runs[start] * self.page_size
            if keep and start < keep.handle + keep.pages * self.page_size and keep.handle < end:
                start = max(start, keep.handle + keep.pages * self.page_size)
            length = min(pages, (end - start) // self.page_size)
            if length <= 0:
                continue
            self._release(Run(end - length * self.page_size, length))
            pages -= length
            if not pages:
                break

    def _release(self, run: Run) -> None:
        """Release free pages at the end of a free run."""
        step = run.pages if self.driver.linear else 1
        for page in range(self._last(run), run.handle - 1, -step * self.page_size):
            handle = page - (step - 1) * self.page_size
            self.meter.release(handle, step * self.page_size)
            end = page + self.page_size
            start = self._free_ends.pop(end)
            self._free -= step
            self._free_runs[start] -= step
            if self._free_runs[start]:
                self._free_ends[handle] = start
            else:
                del self._free_runs[start]
            for released in self._pages([Run(handle, step)]):
                del self._refs[released]
            if self.driver.linear:
                self._extents.count_released(handle, step)


_live: weakref.WeakSet[PagePool] = weakref.WeakSet()


class _OthersLock(contextlib.AbstractContextManager[object]):
    """The lock of a parent's pool in a child, where whoever held it at the fork is not there to let it go."""

    def __enter__(self) -> object:
        raise InvalidRequest("this memory belongs to the parent process: open a new pool after fork")

    def __exit__(self, *error: object) -> None:
        return None


def _forget_after_fork() -> None:
    for pool in list(_live):
        pool.lock = _OthersLock()


os.register_at_fork(after_in_child=_forget_after_fork)
