"""An address range with its page table."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import SupportsIndex

import torch

from vattention.errors import DriverError, InvalidRequest, OutOfPages
from vattention.memory.driver import Access
from vattention.memory.pool import PagePool, Run


class Reservation:
    """Addresses that never change, backed page by page from one pool.

    Pages are counted from the start of the range. Mapping takes over the references the caller has; unmapping drops
    them. An owner serialises the calls (a KVCache does, under the pool's lock).

    Args:
        pool: where pages come from and go back to.
        size: bytes of addresses; a multiple of the pool's page size.

    Raises:
        DriverError: the addresses are not to be had.
        OutOfPages: the mapping limit is reached.
    """

    def __init__(self, pool: PagePool, size: SupportsIndex) -> None:
        size = operator.index(size)
        if size <= 0 or size % pool.page_size:
            raise ValueError(f"size {size} must be a positive multiple of the page size {pool.page_size}")
        self.pool = pool
        self.size = size
        self._driver = pool.driver
        self._step = pool.page_size
        self._table: dict[int, int] = {}  # page of the range -> physical page
        self._stuck: dict[int, list[int]] = {}  # page of the range -> physical pages whose unmapping failed there
        self.mappings = 1 if self._driver.linear else 0  # the empty range is one mapping to the kernel
        self._driver.mappings.charge(self.mappings)
        try:
            self.address = pool.meter.reserve(size)
        except BaseException:
            self._driver.mappings.charge(-self.mappings)
            raise
        self.closed = False

    # -- looking --------------------------------------------------------------------------------------------------

    def page(self, index: int) -> int | None:
        """The physical page at `index`, or None."""
        return self._table.get(index)

    def pages(self, index: int, pages: int) -> Iterator[int]:
        """The physical pages mapped at [index, index + pages), in order."""
        index, pages = self._range(index, pages)
        found = map(self._table.get, range(index, index + pages))
        return (page for page in found if page is not None)

    def runs(self, index: int, pages: int) -> list[Run]:
        """The mapped pages of [index, index + pages), in order, as runs."""
        index, pages = self._range(index, pages)
        places = range(index, index + pages)
        return _as_runs((self._table[place] for place in places if place in self._table), self._step)

    def mappings_of(self, index: int, pages: int) -> int:
        """Mappings that unmapping [index, index + pages) would give back; negative where it leaves a hole in a run."""
        index, pages = self._range(index, pages)
        return -self._change(index, [None] * pages)

    def tensor(self, offset: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor from byte `offset` on, strides in elements; it may lie over addresses with nothing behind them."""
        self._check_open()
        return self._driver.tensor(self.address + offset, shape, strides, dtype)

    # -- mapping --------------------------------------------------------------------------------------------------

    def map(self, index: int, runs: Iterable[Run]) -> None:
        """Map `runs` from page `index` on, one behind the other.

        This takes over one reference of each page, also when it fails: the pages then go back to the pool. Pages
        mapped there before are replaced, and their reference is dropped.

        Raises:
            DriverError, OutOfPages (of mappings): the range is as it was. Pages that could not be unmapped again are
                in quarantine.
            ValueError: the pages would not lie in the range, or are not in use. The caller keeps what it has.
        """
        self._check_open()
        runs = [Run(*map(operator.index, run)) for run in runs]
        index, _ = self._range(index, sum(max(0, run.pages) for run in runs))  # before they are written out
        pages = [page for run in runs for page in range(run.handle, run.handle + run.pages * self._step, self._step)]
        if not all(map(self.pool.references, pages)):
            raise ValueError("pages that are not in use cannot be mapped: take them from this pool first")
        if pages:
            with self.pool.lock:
                self._place(index, pages, runs)

    def _place(self, index: int, pages: list[int], runs: list[Run]) -> None:
        change = self._change(index, pages)
        try:
            self._driver.mappings.charge(change)
        except OutOfPages:
            self.pool.drop(runs)
            raise
        old = {place: self._table[place] for place in range(index, index + len(pages)) if place in self._table}
        mapped = touched = 0
        try:
            if old:
                self._driver.fence()
            for run in runs:
                touched = mapped + run.pages  # also when mapping fails: nobody knows what is there then
                self.pool.meter.map(self._at(index + mapped), run.handle, run.pages * self._step)
                mapped = touched
            self.pool.meter.set_access(self._at(index), mapped * self._step, Access.READ_WRITE)
        except BaseException:
            self._driver.mappings.charge(-change, force=True)
            self._undo_place(index, pages[:touched])
            self.pool.drop(_as_runs(pages[touched:], self._step))
            raise
        self.mappings += change
        self._unstick(index, len(pages))
        self._table.update(zip(range(index, index + len(pages)), pages, strict=True))
        self.pool.drop(Run(page, 1) for page in old.values())

    def _undo_place(self, index: int, pages: list[int]) -> None:
        """Take `pages` away from `index` on again, back to what the page table says."""
        for place, page in enumerate(pages, start=index):
            try:
                self._restore(place)
            except DriverError:
                self._quarantine(place, page)
            else:
                self._unstick(place, 1)
                self.pool.drop([Run(page, 1)])

    def _restore(self, place: int) -> None:
        """Make the system show at `place` what the page table says."""
        page = self._table.get(place)
        if page is None:
            self.pool.meter.unmap(self._at(place), self._step)
        else:
            self.pool.meter.map(self._at(place), page, self._step)
            self.pool.meter.set_access(self._at(place), self._step, Access.READ_WRITE)

    def alias(self, source: int, index: int, pages: int) -> None:
        """Map the pages at `source` a second time, from `index` on. Raises as `map` does, with nothing changed."""
        self._check_open()
        index, pages = self._range(index, pages)
        with self.pool.lock:
            runs = self.runs(source, pages)
            if sum(run.pages for run in runs) != pages:
                raise ValueError(f"pages {source}..{source + pages} are not all mapped")
            self.pool.share(runs)
            self.map(index, runs)

    def unmap(self, index: int, pages: int) -> None:
        """Take away what is mapped at [index, index + pages) and drop its references; holes are fine.

        Raises:
            DriverError: the range counts as unmapped all the same, because what the system did is not known; its
                pages are in quarantine until a later map, unmap, `settle` or `close` over the range succeeds.
        """
        self._check_open()
        index, pages = self._range(index, pages)
        with self.pool.lock:
            removed = {place: self._table[place] for place in range(index, index + pages) if place in self._table}
            if not removed and not any(index <= place < index + pages for place in self._stuck):
                return
            change = self._change(index, [None] * pages)
            for place in removed:
                del self._table[place]
            self.mappings += change
            self._driver.mappings.charge(change, force=True)  # a hole in a run is a mapping more, and still gives back
            try:
                self._driver.fence()
                self.pool.meter.unmap(self._at(index), pages * self._step)
            except BaseException:
                for place, page in removed.items():
                    self._quarantine(place, page)
                raise
            self._unstick(index, pages)
            self.pool.drop(_as_runs(removed.values(), self._step))

    def put_back(self, index: int, pages: Sequence[int | None]) -> None:
        """Undo `map` and `unmap`: show `pages` (None: nothing) from `index` on again, taking over one reference each.

        Never fails. Where the driver does, the page table says so all the same, what is shown instead is in
        quarantine, and `settle` tries again.
        """
        index, _ = self._range(index, len(pages))
        with self.pool.lock:
            change = self._change(index, pages)
            self.mappings += change
            self._driver.mappings.charge(change, force=True)
            for place, page in enumerate(pages, start=index):
                shown = self._table.pop(place, None)
                if page is not None:
                    self._table[place] = page
                try:
                    self._restore(place)
                except DriverError:
                    self._stuck.setdefault(place, [])
                    if shown is not None:
                        self._quarantine(place, shown)
                else:
                    self._unstick(place, 1)
                    self.pool.drop([] if shown is None else [Run(shown, 1)])

    def quarantined(self) -> Iterator[int]:
        """The physical pages whose unmapping failed, once for every place. `settle` may set them free."""
        return itertools.chain.from_iterable(self._stuck.values())

    @property
    def settled(self) -> bool:
        """Whether every place is in the state its page table says."""
        return not self._stuck

    def settle(self) -> None:
        """Try again where undoing or unmapping failed before, so that the quarantine empties.

        Raises:
            DriverError: nobody can wait for the work in flight, or a place that must show its page does not yet.
                (Places that only hold on to a page they should not have stay in quarantine without an error: nobody
                reads them.)
        """
        self._check_open()
        with self.pool.lock:
            if self._stuck:
                self._driver.fence()  # it may be what failed before
            for place in list(self._stuck):
                try:
                    self._restore(place)
                except DriverError:
                    if place in self._table:
                        raise
                else:
                    self._unstick(place, 1)

    def close(self) -> None:
        """Unmap everything and give the addresses back once the last tensor over them dies. Idempotent.

        Raises:
            DriverError: the pages are in quarantine; closing again tries again.
        """
        if self.closed:
            return
        with self.pool.lock:
            if self._table or self._stuck:
                removed, self._table = self._table, {}
                try:
                    self._driver.fence()
                    self.pool.meter.unmap(self.address, self.size)
                except BaseException:
                    for place, page in removed.items():
                        self._quarantine(place, page)
                    raise
                self._unstick(0, self.size // self._step)
                self.pool.drop(_as_runs(removed.values(), self._step))
            self.pool.meter.free(self.address, self.size)
            self._driver.mappings.charge(-self.mappings)
            self.mappings = 0
            self.closed = True

    # -- inside ---------------------------------------------------------------------------------------------------

    def _at(self, index: int) -> int:
        return self.address + index * self._step

    def _range(self, index: SupportsIndex, pages: SupportsIndex) -> tuple[int, int]:
        """Both as ints. The driver maps over whatever is there, so a place outside would be somebody else's memory."""
        index, pages = operator.index(index), operator.index(pages)
        if index < 0 or pages < 0 or index + pages > self.size // self._step:
            raise ValueError(f"pages {index}..{index + pages} are not all among the {self.size // self._step} reserved")
        return index, pages

    def _check_open(self) -> None:
        if self.closed:
            raise InvalidRequest("this memory is closed: open a new cache")

    def _quarantine(self, place: int, page: int) -> None:
        """Nobody knows whether `place` shows `page`, nor whether it shows what got stuck there earlier."""
        self._stuck.setdefault(place, []).append(page)
        self.pool.quarantine([Run(page, 1)])

    def _unstick(self, index: int, pages: int) -> None:
        """[index, index + pages) is in a known state again: its quarantined pages are nowhere in it."""
        for place in [place for place in self._stuck if index <= place < index + pages]:
            self.pool.recover(Run(page, 1) for page in self._stuck.pop(place))

    def _change(self, index: int, pages: Sequence[int | None]) -> int:
        """How many mappings more there are with `pages` from `index` on than now."""
        new = [self._table.get(index - 1), *pages, self._table.get(index + len(pages))]
        old = [self._table.get(place) for place in range(index - 1, index + len(pages) + 1)]
        return self._count(new) - self._count(old)

    def _count(self, pages: Sequence[int | None]) -> int:
        if not self._driver.linear:
            return sum(page is not None for page in pages[1:-1])
        step = self._step
        return sum(
            (before is None) != (after is None) or (before is not None and after != before + step)
            for before, after in itertools.pairwise(pages)
        )


def _as_runs(pages: Iterable[int], step: int) -> list[Run]:
    """Pages, in their order, as runs."""
    runs: list[Run] = []
    for page in pages:
        if runs and page == runs[-1].handle + runs[-1].pages * step:
            runs[-1] = Run(runs[-1].handle, runs[-1].pages + 1)
        else:
            runs.append(Run(page, 1))
    return runs
