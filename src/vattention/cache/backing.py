"""The pages behind the slots: planning growth, applying it all or not at all, taking pages back."""

from __future__ import annotations

import contextlib
import operator
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from vattention.cache.layout import KVLayout
from vattention.errors import DriverError, VAttentionError
from vattention.memory import PagePool, Reservation, Run


@dataclass
class Slot:
    """One slot. In every stream its mapped pages are the first ones, or, after padding, those from `first` on.

    Attributes:
        live: somebody holds it.
        length: tokens that may be read or written, padding included.
        start: tokens of padding before the first one that counts; they read as zeros and are not backed.
        shared: tokens up to which pages may be mapped elsewhere too; writing below it looks before it writes.
        first: pages of padding, by stream.
        mapped: pages up to which all from `first` on are mapped, by stream.
        covered: tokens all streams have pages for.
    """

    streams: int
    live: bool = False
    length: int = 0
    start: int = 0
    shared: int = 0
    covered: int = 0
    first: list[int] = field(init=False)
    mapped: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.first = [0] * self.streams
        self.mapped = [0] * self.streams

    @property
    def pages(self) -> int:
        """Pages mapped in all its streams."""
        return sum(self.mapped) - sum(self.first)

    @property
    def tokens(self) -> int:
        """Tokens that need memory."""
        return max(0, self.length - self.start)

    @property
    def used(self) -> bool:
        """Whether an earlier user left more than pages of its own: padding, or pages that others use too."""
        return bool(self.shared or self.start)


class Part(NamedTuple):
    """Pages of one stream of one slot: [first, first + pages)."""

    slot: int
    stream: int
    first: int
    pages: int


@dataclass(frozen=True)
class Plan:
    """What must be mapped before a step.

    Attributes:
        growths: places that get new pages. copies: places whose page is shared and about to be written.
        pages: pages to take. mappings: mappings this adds at most.
    """

    growths: tuple[Part, ...] = ()
    copies: tuple[Part, ...] = ()
    pages: int = 0
    mappings: int = 0

    def __add__(self, other: Plan) -> Plan:
        return Plan(
            self.growths + other.growths,
            self.copies + other.copies,
            self.pages + other.pages,
            self.mappings + other.mappings,
        )


class Backing:
    """The slots of a cache and the pages behind them. An owner serialises the calls."""

    def __init__(self, layout: KVLayout, pool: PagePool) -> None:
        self.layout = layout
        self.pool = pool
        self.page_size = pool.page_size
        whole_pages = -(-layout.size // self.page_size) * self.page_size
        self.reservation = Reservation(pool, whole_pages)
        self.slots = [Slot(len(layout.streams)) for _ in range(layout.max_num_seqs)]
        self.room = [stream.size // self.page_size for stream in layout.streams]
        self.bytes = self.reservation.tensor(0, (whole_pages,), (1,), torch.uint8)
        self.families = _families(layout)
        self.copied = 0  # bytes copied from page to page
        self.zeros: Run | None = None  # what padding shows where reading an address without a page would fault

    def close(self) -> None:
        """Give every page back, and the addresses once the last tensor over them dies.

        Raises DriverError; there are no slots any more, and closing again tries again.
        """
        self.slots.clear()  # also because the pool asks a closed cache for pages, as long as somebody holds on to it
        self.reservation.close()
        if self.zeros is not None:
            self.pool.drop([self.zeros])
            self.zeros = None
        self.bytes = torch.empty(0, dtype=torch.uint8)

    # -- planning -------------------------------------------------------------------------------------------------

    def pages_for(self, tokens: int) -> Iterator[int]:
        """Pages that `tokens` tokens take, by stream."""
        return (-(-tokens * stream.token_bytes // self.page_size) for stream in self.layout.streams)

    def ends_for(self, slot: Slot, tokens: int) -> Iterator[int]:
        """Pages up to which `slot` must be mapped for `tokens` tokens, by stream."""
        return map(max, slot.first, self.pages_for(tokens))

    def plan(self, number: int, length: int) -> Plan:
        """What slot `number` needs before its tokens up to `length` may be written."""
        slot = self.slots[number]
        plan = self.plan_growth(number, length) if length > slot.covered else Plan()
        if slot.length < min(slot.shared, length):
            copies = tuple(self._shared_parts(number, slot.length, length))
            plan += Plan(copies=copies, pages=len(copies), mappings=2 * len(copies))
        return plan

    def plan_growth(self, number: int, length: int) -> Plan:
        """The pages slot `number` lacks for `length` tokens."""
        slot = self.slots[number]
        growths = tuple(
            Part(number, stream, mapped, wanted - mapped)
            for stream, (mapped, wanted) in enumerate(zip(slot.mapped, self.ends_for(slot, length), strict=True))
            if wanted > mapped
        )
        return Plan(growths, (), sum(part.pages for part in growths), sum(map(self._new_mappings, growths)))

    def plan_new(self, tokens: int) -> Plan:
        """What a slot without pages needs for `tokens` tokens."""
        pages = list(self.pages_for(tokens))
        linear = self.pool.driver.linear
        return Plan(pages=sum(pages), mappings=sum(2 for count in pages if count) if linear else sum(pages))

    def _new_mappings(self, part: Part) -> int:
        """Mappings that a growth adds at most: none where the stream goes on in the page behind its last one."""
        if not self.pool.driver.linear:
            return part.pages
        if part.first == self.slots[part.slot].first[part.stream]:
            return 2
        last = self.reservation.page(self.index(part) - 1)
        return 0 if last is not None and self.pool.continues(last, part.pages) == part.pages else 2

    def _shared_parts(self, number: int, start: int, end: int) -> Iterator[Part]:
        """The pages in which tokens [start, end) lie and which are mapped elsewhere too."""
        slot = self.slots[number]
        for stream, spec in enumerate(self.layout.streams):
            first = max(slot.first[stream], start * spec.token_bytes // self.page_size)
            for page in range(first, min(slot.mapped[stream], -(-end * spec.token_bytes // self.page_size))):
                part = Part(number, stream, page, 1)
                held = self.reservation.page(self.index(part))
                if held is not None and self.pool.references(held) > 1:
                    yield part

    def index(self, part: Part) -> int:
        """The place of a part's first page in the reservation."""
        stream = self.layout.streams[part.stream]
        return (stream.offset + part.slot * stream.size) // self.page_size + part.first

    # -- applying -------------------------------------------------------------------------------------------------

    def apply(self, plan: Plan) -> None:
        """Map everything in `plan`, or, raising what went wrong, nothing."""
        grown: list[Part] = []
        copied: list[tuple[Part, Run]] = []
        try:
            for part in plan.growths:
                self._grow(part)
                grown.append(part)
            for part in plan.copies:
                copied.append((part, self._unshare(part)))
        except BaseException:
            for part, original in reversed(copied):
                self.attempt(self.reservation.map, self.index(part), [original])
            for part in reversed(grown):
                self.attempt(self.reservation.unmap, self.index(part), part.pages)
            raise
        for _, original in copied:
            self.pool.drop([original])
        for part in grown:
            self.slots[part.slot].mapped[part.stream] += part.pages
        for number in {part.slot for part in grown}:
            self.measure(number)

    def _grow(self, part: Part) -> None:
        index = self.index(part)
        slot, begins = self.slots[part.slot], part.first == self.slots[part.slot].first[part.stream]
        last = None if begins else self.reservation.page(index - 1)
        runs = self.pool.take(part.pages, after=last, room=self.room[part.stream])
        self.reservation.map(index, runs)
        if begins and slot.start:  # the end of the padding lies in this page
            self.bytes[index * self.page_size :][: self._bytes_before(slot, part)].zero_()

    def _bytes_before(self, slot: Slot, part: Part) -> int:
        """Bytes of padding in a part."""
        start = slot.start * self.layout.streams[part.stream].token_bytes
        return max(0, min(start - part.first * self.page_size, part.pages * self.page_size))

    def _unshare(self, part: Part) -> Run:
        """Put a page of its own with the same live bytes behind `part`; return the old one, with a reference held."""
        index = self.index(part)
        page = self.reservation.page(index)
        assert page is not None
        original = Run(page, 1)
        slot, spec = self.slots[part.slot], self.layout.streams[part.stream]
        tokens = max(slot.length, slot.start)
        live = min(self.page_size, max(0, tokens * spec.token_bytes - part.first * self.page_size))
        here = self.bytes[index * self.page_size :][:live]
        kept = here.clone()
        runs = self.pool.take(1, room=self.room[part.stream])
        self.pool.share([original])
        try:
            self.reservation.map(index, runs)
        except BaseException:
            self.pool.drop([original])
            raise
        here.copy_(kept)
        self.copied += live
        return original

    def attempt(self, undo: Callable[..., None], *args: object) -> None:
        """Undo as far as it goes: what cannot be undone is in quarantine or maps the same bytes."""
        with contextlib.suppress(VAttentionError):
            undo(*args)

    def measure(self, number: int) -> None:
        """Work out what slot `number` covers, after its pages changed."""
        slot = self.slots[number]
        slot.covered = min(
            pages * self.page_size // stream.token_bytes
            for pages, stream in zip(slot.mapped, self.layout.streams, strict=True)
        )

    def pad(self, number: int, start: int) -> None:
        """Make the first `start` tokens of slot `number`, which has no pages, padding.

        Where reading an address without a page would fault, one page of zeros is put behind all of it.
        Raises what taking or mapping raises, without padding then.
        """
        slot = self.slots[number]
        firsts = [start * stream.token_bytes // self.page_size for stream in self.layout.streams]
        if self.pool.driver.guard and any(firsts):
            self._show_zeros(number, firsts)
        elif not self.reservation.settled:  # a page that could not be unmapped would show
            for stream, pages in enumerate(firsts):
                self.reservation.unmap(self.index(Part(number, stream, 0, 0)), pages)
        slot.start, slot.first, slot.mapped = start, firsts, list(firsts)
        self.measure(number)

    def _show_zeros(self, number: int, pages: list[int]) -> None:
        """Put the page of zeros behind the first `pages` pages of every stream of a slot."""
        zeros = self.zeros or self.pool.take(1)[0]
        parts = [Part(number, stream, 0, count) for stream, count in enumerate(pages) if count]
        try:
            for part in parts:
                self.pool.share([zeros] * part.pages)
                self.reservation.map(self.index(part), [zeros] * part.pages)
        except BaseException:
            for part in parts:
                self.attempt(self.reservation.unmap, self.index(part), part.pages)
            if self.zeros is None:
                self.pool.drop([zeros])
            raise
        if self.zeros is None:
            self.bytes[self.index(parts[0]) * self.page_size :][: self.page_size].zero_()
            self.zeros = zeros

    def empty(self, number: int) -> None:
        """Take all pages, and the padding, of slot `number` away. Raises DriverError as `release` does."""
        slot = self.slots[number]
        firsts = slot.first
        try:
            self.release(number)
        finally:
            slot.start, slot.first, slot.mapped = 0, [0] * len(firsts), [0] * len(firsts)
            self.measure(number)
            if self.zeros is not None:
                for stream, pages in enumerate(firsts):
                    self.attempt(self.reservation.unmap, self.index(Part(number, stream, 0, 0)), pages)

    # -- taking back ----------------------------------------------------------------------------------------------

    def release(self, number: int, tokens: int = 0, at_most: int | None = None) -> None:
        """Unmap what slot `number` has past `tokens` tokens, or the last `at_most` pages of every stream of that.

        Raises DriverError when an unmap failed; every other stream was done, and the pages are in quarantine.
        """
        slot = self.slots[number]
        failure: DriverError | None = None
        for stream, wanted in enumerate(self.ends_for(slot, tokens)):
            pages = max(0, slot.mapped[stream] - wanted)
            if at_most is not None:
                pages = min(pages, at_most)
            if not pages:
                continue
            slot.mapped[stream] -= pages
            try:
                self.reservation.unmap(self.index(Part(number, stream, slot.mapped[stream], 0)), pages)
            except DriverError as error:
                failure = error
        self.measure(number)
        if not slot.pages:
            slot.shared = 0
        if failure:
            raise failure

    def surplus(self, keep: Mapping[int, int]) -> Iterator[Part]:
        """What is mapped past the length of live slots, or past `keep` tokens if that is more, and in idle slots."""
        for number, slot in enumerate(self.slots):
            if not slot.pages:
                continue
            tokens = max(slot.length, keep.get(number, 0))
            for stream, (mapped, wanted) in enumerate(zip(slot.mapped, self.ends_for(slot, tokens), strict=True)):
                if mapped > wanted:
                    yield Part(number, stream, wanted, mapped - wanted)

    def reclaimable(self, keep: Mapping[int, int], copies: Iterable[Part] = ()) -> int:
        """Pages that would be free, or of `copies` not be needed any more, if the whole surplus were unmapped.

        Quarantined pages count too: what reclaims them tries once more.
        """
        if self.reservation.settled and not any(slot.shared for slot in self.slots):
            return sum(part.pages for part in self.surplus(keep))
        places = Counter(self.reservation.quarantined())
        for part in self.surplus(keep):
            index = self.index(part)
            places.update(self.reservation.pages(index, part.pages))
        # Both in loops of the interpreter's own: there may be hundreds of thousands.
        freed: int = sum(map(operator.eq, map(self.pool.references, places), places.values()))
        copied = [self.reservation.page(self.index(part)) for part in copies]
        return freed + sum(self.pool.references(page) - places[page] == 1 for page in copied if page is not None)

    def unused_mappings(self) -> int:
        """Mappings that emptying the slots without tokens gives back at least."""
        return sum(
            self.reservation.mappings_of(self.index(Part(number, stream, first, 0)), end - first)
            for number, slot in enumerate(self.slots)
            for stream, (first, end) in enumerate(zip(slot.first, slot.mapped, strict=True))
            if end > first and not slot.length
        )

    def reclaim(self, goal: int, keep: Mapping[int, int]) -> None:
        """Unmap surplus until the pool has `goal` pages available: idle slots first, those with most pages first."""
        order = sorted(range(len(self.slots)), key=lambda n: (self.slots[n].live, -self.slots[n].pages))
        for number in order:
            slot = self.slots[number]
            tokens = max(slot.length, keep.get(number, 0))
            while self.pool.available < goal and any(
                mapped > wanted for mapped, wanted in zip(slot.mapped, self.ends_for(slot, tokens), strict=True)
            ):
                short = goal - self.pool.available
                self.release(number, tokens, at_most=-(-short // len(slot.mapped)))

    def empty_unused(self, mappings: int, wanted: Iterable[int]) -> None:
        """Empty slots without tokens until `mappings` mappings are free: idle ones, other live ones, then all `wanted`.

        What a wanted slot inherited may be in more pieces than what it then gets.
        """
        others = sorted(set(range(len(self.slots))) - set(wanted), key=lambda number: self.slots[number].live)
        for group in (*([number] for number in others), list(wanted)):
            free = self.pool.driver.mappings.free
            if free is None or free >= mappings:
                return
            for number in group:
                if not self.slots[number].length:
                    self.release(number)

    def shared_pages(self, number: int) -> int:
        """Pages below the length of slot `number` that are mapped, or held, elsewhere too.

        Looked for by halving in one stream of each family, a few looks however long it is: `fork` shares pages from the
        first one on, writing un-shares from the first written one on, and streams of one size do so alike. Where
        another slot has pages of this one past its own length, which only a rollback and `reorder` leave behind, it is
        an estimate.
        """
        slot = self.slots[number]
        tokens = min(slot.shared, slot.length)
        shared = 0
        for family in self.families if tokens else ():
            stream = family.start
            end = max(slot.first[stream], -(-tokens * self.layout.streams[stream].token_bytes // self.page_size))
            first = self.index(Part(number, stream, slot.first[stream], 0))
            places = range(first, first + end - slot.first[stream])
            shared += bisect_left(places, True, key=self._is_alone) * len(family)
        return shared

    def _is_alone(self, place: int) -> bool:
        """Whether the page at a place of the reservation is mapped nowhere else."""
        page = self.reservation.page(place)
        return page is None or self.pool.references(page) <= 1

    # -- checking -------------------------------------------------------------------------------------------------

    def poison(self) -> None:
        """Fill every mapped byte at or past a slot's length with ones, which is NaN in every floating point format.

        Pages that are mapped elsewhere too are left alone: there the bytes may be somebody's tokens.
        """
        for number, slot in enumerate(self.slots):
            for stream, spec in enumerate(self.layout.streams):
                written = max(slot.length, slot.start) * spec.token_bytes
                first = written // self.page_size
                part = Part(number, stream, first, slot.mapped[stream] - first)
                if part.pages > 0:
                    low = self.index(Part(number, stream, 0, 0)) * self.page_size + written
                    for start, end in self._own_ranges(part) if slot.shared else [self._range(part)]:
                        self.bytes[max(start, low) : end].fill_(0xFF)

    def _range(self, part: Part) -> tuple[int, int]:
        """First byte of a part in the reservation, and the one past its last."""
        start = self.index(part) * self.page_size
        return start, start + part.pages * self.page_size

    def _own_ranges(self, part: Part) -> Iterator[tuple[int, int]]:
        """The byte ranges of the pages in a part that are mapped nowhere else."""
        for page in range(part.first, part.first + part.pages):
            single = Part(part.slot, part.stream, page, 1)
            held = self.reservation.page(self.index(single))
            if held is not None and self.pool.references(held) == 1:
                yield self._range(single)

    def mapped_pages(self, slots: Iterable[Slot]) -> int:
        """Pages mapped in `slots`, by place."""
        return sum(slot.pages for slot in slots)


def _families(layout: KVLayout) -> list[range]:
    """The streams, in ranges whose slots are all of one size and the same distance apart."""
    starts = [i for i, stream in enumerate(layout.streams) if not i or stream.size != layout.streams[i - 1].size]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(layout.streams)], strict=True)]
