"""The pages behind the slots: planning growth, applying it all or not at all, taking pages back."""

from __future__ import annotations

import contextlib
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
    """One slot. In every stream its mapped pages are the first ones.

    Attributes:
        live: somebody holds it.
        length: tokens that may be read or written.
        shared: tokens up to which pages may be mapped elsewhere too; writing below it looks before it writes.
        mapped: pages mapped, by stream.
        covered: tokens all streams have pages for.
    """

    streams: int
    live: bool = False
    length: int = 0
    shared: int = 0
    covered: int = 0
    mapped: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.mapped = [0] * self.streams


class _Part(NamedTuple):
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

    growths: tuple[_Part, ...] = ()
    copies: tuple[_Part, ...] = ()
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
        self._room = [stream.size // self.page_size for stream in layout.streams]
        self._bytes = self.reservation.tensor(0, (whole_pages,), (1,), torch.uint8)

    def close(self) -> None:
        """Give every page back, and the addresses once the last tensor over them dies.

        Raises DriverError; there are no slots any more, and closing again tries again.
        """
        self.slots.clear()  # also because the pool asks a closed cache for pages, as long as somebody holds on to it
        self.reservation.close()
        self._bytes = torch.empty(0, dtype=torch.uint8)

    # -- planning -------------------------------------------------------------------------------------------------

    def pages_for(self, tokens: int) -> Iterator[int]:
        """Pages that `tokens` tokens take, by stream."""
        return (-(-tokens * stream.token_bytes // self.page_size) for stream in self.layout.streams)

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
            _Part(number, stream, mapped, wanted - mapped)
            for stream, (mapped, wanted) in enumerate(zip(slot.mapped, self.pages_for(length), strict=True))
            if wanted > mapped
        )
        return Plan(growths, (), sum(part.pages for part in growths), sum(map(self._new_mappings, growths)))

    def plan_new(self, tokens: int) -> Plan:
        """What a slot without pages needs for `tokens` tokens."""
        pages = list(self.pages_for(tokens))
        linear = self.pool.driver.linear
        return Plan(pages=sum(pages), mappings=sum(2 for count in pages if count) if linear else sum(pages))

    def _new_mappings(self, part: _Part) -> int:
        """Mappings that a growth adds at most: none where the stream goes on in the page behind its last one."""
        if not self.pool.driver.linear:
            return part.pages
        if not part.first:
            return 2
        last = self.reservation.page(self._index(part) - 1)
        return 0 if last is not None and self.pool.continues(last, part.pages) == part.pages else 2

    def _shared_parts(self, number: int, start: int, end: int) -> Iterator[_Part]:
        """The pages in which tokens [start, end) lie and which are mapped elsewhere too."""
        slot = self.slots[number]
        for stream, spec in enumerate(self.layout.streams):
            first = start * spec.token_bytes // self.page_size
            for page in range(first, min(slot.mapped[stream], -(-end * spec.token_bytes // self.page_size))):
                part = _Part(number, stream, page, 1)
                held = self.reservation.page(self._index(part))
                if held is not None and self.pool.references(held) > 1:
                    yield part

    def _index(self, part: _Part) -> int:
        """The place of a part's first page in the reservation."""
        stream = self.layout.streams[part.stream]
        return (stream.offset + part.slot * stream.size) // self.page_size + part.first

    # -- applying -------------------------------------------------------------------------------------------------

    def apply(self, plan: Plan) -> None:
        """Map everything in `plan`, or, raising what went wrong, nothing."""
        grown: list[_Part] = []
        copied: list[tuple[_Part, Run]] = []
        try:
            for part in plan.growths:
                self._grow(part)
                grown.append(part)
            for part in plan.copies:
                copied.append((part, self._unshare(part)))
        except BaseException:
            for part, original in reversed(copied):
                self._attempt(self.reservation.map, self._index(part), [original])
            for part in reversed(grown):
                self._attempt(self.reservation.unmap, self._index(part), part.pages)
            raise
        for _, original in copied:
            self.pool.drop([original])
        for part in grown:
            self.slots[part.slot].mapped[part.stream] += part.pages
        for number in {part.slot for part in grown}:
            self._measure(number)

    def _grow(self, part: _Part) -> None:
        index = self._index(part)
        last = self.reservation.page(index - 1) if part.first else None
        runs = self.pool.take(part.pages, after=last, room=self._room[part.stream])
        self.reservation.map(index, runs)

    def _unshare(self, part: _Part) -> Run:
        """Put a page of its own with the same live bytes behind `part`; return the old one, with a reference held."""
        index = self._index(part)
        page = self.reservation.page(index)
        assert page is not None
        original = Run(page, 1)
        slot, spec = self.slots[part.slot], self.layout.streams[part.stream]
        live = min(self.page_size, max(0, slot.length * spec.token_bytes - part.first * self.page_size))
        here = self._bytes[index * self.page_size :][:live]
        kept = here.clone()
        runs = self.pool.take(1, room=self._room[part.stream])
        self.pool.share([original])
        try:
            self.reservation.map(index, runs)
        except BaseException:
            self.pool.drop([original])
            raise
        here.copy_(kept)
        return original

    def _attempt(self, undo: Callable[..., None], *args: object) -> None:
        """Undo as far as it goes: what cannot be undone is in quarantine or maps the same bytes."""
        with contextlib.suppress(VAttentionError):
            undo(*args)

    def _measure(self, number: int) -> None:
        slot = self.slots[number]
        slot.covered = min(
            pages * self.page_size // stream.token_bytes
            for pages, stream in zip(slot.mapped, self.layout.streams, strict=True)
        )

    def fork(self, source: int, target: int) -> None:
        """Give slot `target`, which has no pages, the tokens of `source`: full pages shared, the tail copied.

        Raises what taking or mapping raises, with `target` empty again.
        """
        tokens = self.slots[source].length
        try:
            for number, stream in enumerate(self.layout.streams):
                full, tail = divmod(tokens * stream.token_bytes, self.page_size)
                here, there = _Part(source, number, 0, full), _Part(target, number, 0, full)
                runs = self.reservation.runs(self._index(here), full)
                rest = self.pool.take(1, room=self._room[number]) if tail else []
                self.pool.share(runs)
                self.slots[target].mapped[number] = full + len(rest)  # before mapping: a failure is unmapped with it
                self.reservation.map(self._index(there), runs + rest)
                if tail:
                    start = (self._index(there) + full) * self.page_size
                    origin = (self._index(here) + full) * self.page_size
                    self._bytes[start : start + tail].copy_(self._bytes[origin : origin + tail])
        except BaseException:
            self._attempt(self.release, target)
            raise
        self._measure(target)
        for number in (source, target):
            self.slots[number].shared = max(self.slots[number].shared, tokens)

    # -- taking back ----------------------------------------------------------------------------------------------

    def release(self, number: int, tokens: int = 0, at_most: int | None = None) -> None:
        """Unmap what slot `number` has past `tokens` tokens, or the last `at_most` pages of every stream of that.

        Raises DriverError when an unmap failed; every other stream was done, and the pages are in quarantine.
        """
        slot = self.slots[number]
        failure: DriverError | None = None
        for stream, wanted in enumerate(self.pages_for(tokens)):
            pages = max(0, slot.mapped[stream] - wanted)
            if at_most is not None:
                pages = min(pages, at_most)
            if not pages:
                continue
            slot.mapped[stream] -= pages
            try:
                self.reservation.unmap(self._index(_Part(number, stream, slot.mapped[stream], 0)), pages)
            except DriverError as error:
                failure = error
        self._measure(number)
        if not any(slot.mapped):
            slot.shared = 0
        if failure:
            raise failure

    def surplus(self, keep: Mapping[int, int]) -> Iterator[_Part]:
        """What is mapped past the length of live slots, or past `keep` tokens if that is more, and in idle slots."""
        for number, slot in enumerate(self.slots):
            if not any(slot.mapped):
                continue
            tokens = max(slot.length, keep.get(number, 0))
            for stream, (mapped, wanted) in enumerate(zip(slot.mapped, self.pages_for(tokens), strict=True)):
                if mapped > wanted:
                    yield _Part(number, stream, wanted, mapped - wanted)

    def reclaimable(self, keep: Mapping[int, int], copies: Iterable[_Part] = ()) -> int:
        """Pages that would be free, or of `copies` not be needed any more, if the whole surplus were unmapped.

        Quarantined pages count too: what reclaims them tries once more.
        """
        if self.reservation.settled and not any(slot.shared for slot in self.slots):
            return sum(part.pages for part in self.surplus(keep))
        places = Counter(self.reservation.quarantined())
        for part in self.surplus(keep):
            index = self._index(part)
            for place in range(index, index + part.pages):
                page = self.reservation.page(place)
                if page is not None:
                    places[page] += 1
        freed = sum(self.pool.references(page) == count for page, count in places.items())
        copied = [self.reservation.page(self._index(part)) for part in copies]
        return freed + sum(self.pool.references(page) - places[page] == 1 for page in copied if page is not None)

    def unused_mappings(self) -> int:
        """Mappings that emptying the slots without tokens gives back at least."""
        return sum(
            self.reservation.mappings_of(self._index(_Part(number, stream, 0, 0)), pages)
            for number, slot in enumerate(self.slots)
            for stream, pages in enumerate(slot.mapped)
            if pages and not slot.length
        )

    def reclaim(self, goal: int, keep: Mapping[int, int]) -> None:
        """Unmap surplus until the pool has `goal` pages available: idle slots first, those with most pages first."""
        order = sorted(range(len(self.slots)), key=lambda n: (self.slots[n].live, -max(self.slots[n].mapped)))
        for number in order:
            slot = self.slots[number]
            tokens = max(slot.length, keep.get(number, 0))
            while self.pool.available < goal and any(
                mapped > wanted for mapped, wanted in zip(slot.mapped, self.pages_for(tokens), strict=True)
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

    # -- checking -------------------------------------------------------------------------------------------------

    def poison(self) -> None:
        """Fill every mapped byte at or past a slot's length with ones, which is NaN in every floating point format.

        Pages that are mapped elsewhere too are left alone: there the bytes may be somebody's tokens.
        """
        for number, slot in enumerate(self.slots):
            for stream, spec in enumerate(self.layout.streams):
                first = slot.length * spec.token_bytes // self.page_size
                part = _Part(number, stream, first, slot.mapped[stream] - first)
                if part.pages > 0:
                    low = self._index(_Part(number, stream, 0, 0)) * self.page_size + slot.length * spec.token_bytes
                    for start, end in self._own_ranges(part) if slot.shared else [self._range(part)]:
                        self._bytes[max(start, low) : end].fill_(0xFF)

    def _range(self, part: _Part) -> tuple[int, int]:
        """First byte of a part in the reservation, and the one past its last."""
        start = self._index(part) * self.page_size
        return start, start + part.pages * self.page_size

    def _own_ranges(self, part: _Part) -> Iterator[tuple[int, int]]:
        """The byte ranges of the pages in a part that are mapped nowhere else."""
        for page in range(part.first, part.first + part.pages):
            single = _Part(part.slot, part.stream, page, 1)
            held = self.reservation.page(self._index(single))
            if held is not None and self.pool.references(held) == 1:
                yield self._range(single)

    def mapped_pages(self, slots: Iterable[Slot]) -> int:
        """Pages mapped in `slots`, by place."""
        return sum(sum(slot.mapped) for slot in slots)
