"""Slots that come to hold what other slots hold: full pages are mapped there too, only tails are copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vattention.cache.backing import Backing, Part, Plan
from vattention.memory import Run


class _Move(NamedTuple):
    """A part of a stream of a slot that is to show other pages, or nothing.

    Attributes:
        part: the place, the new tail page included.
        runs: pages of the source, for the first places of the part.
        new_tail: the page after those is taken from the pool.
    """

    part: Part
    runs: tuple[Run, ...]
    new_tail: bool


@dataclass(frozen=True)
class Moves:
    """All that must be mapped before each slot in `sources` can hold what the slot it names holds now."""

    sources: Mapping[int, int]
    moves: tuple[_Move, ...]
    cost: Plan


class _Tail(NamedTuple):
    """The tail of one slot in neighbouring streams: where it goes and what it is, [streams, bytes] each."""

    where: torch.Tensor
    content: torch.Tensor


# -- planning -------------------------------------------------------------------------------------------------------


def plan_moves(backing: Backing, sources: Mapping[int, int]) -> Moves:
    """What it takes that each slot in `sources` holds what the slot it maps to holds now."""
    sources = {target: source for target, source in sources.items() if target != source}
    found = [
        (*_changed(backing, target, source, stream), _tail(backing, source, stream) > 0)
        for target, source in sources.items()
        for stream in range(len(backing.layout.streams))
    ]
    shared = {page for _, pages, _ in found for page in pages}
    moves = []
    for part, pages, has_tail in found:
        new_tail = has_tail and not _has_own(backing, part, shared)
        if pages or new_tail:
            moves.append(_Move(part._replace(pages=len(pages) + new_tail), _as_runs(backing, pages), new_tail))
    moves += [move for target, source in sources.items() for move in _other_padding(backing, target, source)]
    mappings = sum(_new_mappings(backing, move) for move in moves)
    return Moves(sources, tuple(moves), Plan(pages=sum(move.new_tail for move in moves), mappings=mappings))


def _full(backing: Backing, number: int, stream: int) -> int:
    """The page up to which all pages of a stream are full, or padding."""
    slot = backing.slots[number]
    return max(slot.first[stream], slot.length * backing.layout.streams[stream].token_bytes // backing.page_size)


def _tail(backing: Backing, number: int, stream: int) -> int:
    """Bytes that count in the page after the full ones; 0 where no page is needed."""
    slot, token_bytes = backing.slots[number], backing.layout.streams[stream].token_bytes
    full = _full(backing, number, stream) * backing.page_size
    if slot.length * token_bytes <= full:
        return 0
    return max(slot.length, slot.start) * token_bytes - full


def _changed(backing: Backing, target: int, source: int, stream: int) -> tuple[Part, list[int]]:
    """The places of full pages that show something else in `target` than in `source`, and the source's pages there.

    Two places that show the same page, below the lengths of both slots, share all pages before it too: pages get
    shared from the first one on, and writing un-shares from the first written one on. So the search starts at the end,
    and stops at the first page that is there already.
    """
    there, here = backing.slots[target], backing.slots[source]
    old, new = backing.index(Part(target, stream, 0, 0)), backing.index(Part(source, stream, 0, 0))
    kept = min(there.mapped[stream], _full(backing, target, stream)) if there.start == here.start else 0
    first = full = _full(backing, source, stream)
    pages = []
    while first > here.first[stream]:
        page = backing.reservation.page(new + first - 1)
        assert page is not None  # below the length
        if first <= kept and page == backing.reservation.page(old + first - 1):
            break
        pages.append(page)
        first -= 1
    return Part(target, stream, first, full - first), pages[::-1]


def _has_own(backing: Backing, part: Part, shared: set[int]) -> bool:
    """Whether the place behind `part` shows a page that nobody else has or is about to get."""
    slot, place = backing.slots[part.slot], part.first + part.pages
    if not slot.first[part.stream] <= place < slot.mapped[part.stream]:
        return False
    page = backing.reservation.page(backing.index(part) + part.pages)
    return page is not None and page not in shared and backing.pool.references(page) == 1


def _other_padding(backing: Backing, target: int, source: int) -> Iterator[_Move]:
    """Where the slots' padding differs: zeros before the first token, if they need a page, and nothing elsewhere."""
    there, here = backing.slots[target], backing.slots[source]
    if there.start == here.start:
        return
    for stream, before in enumerate(here.first):
        low = there.first[stream] if backing.zeros is None else 0
        end = _full(backing, source, stream) + (_tail(backing, source, stream) > 0)
        if backing.zeros is None:
            yield from _nothing(target, stream, low, min(before, there.mapped[stream]))
        elif before:
            yield _Move(Part(target, stream, 0, before), (backing.zeros,) * before, False)
        yield from _nothing(target, stream, max(end, low), there.mapped[stream])


def _nothing(target: int, stream: int, begin: int, end: int) -> Iterator[_Move]:
    if end > begin:
        yield _Move(Part(target, stream, begin, end - begin), (), False)


def _new_mappings(backing: Backing, move: _Move) -> int:
    if backing.pool.driver.linear:
        return len(move.runs) + move.new_tail + 1
    index = backing.index(move.part)
    return sum(backing.reservation.page(place) is None for place in range(index, index + move.part.pages))


def _as_runs(backing: Backing, pages: Sequence[int]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for page in pages:
        if runs and page == runs[-1].handle + runs[-1].pages * backing.page_size:
            runs[-1] = Run(runs[-1].handle, runs[-1].pages + 1)
        else:
            runs.append(Run(page, 1))
    return tuple(runs)


# -- applying -------------------------------------------------------------------------------------------------------


def apply_moves(backing: Backing, planned: Moves) -> None:
    """Do it all, or, raising what taking or mapping raises, nothing."""
    pool, reservation = backing.pool, backing.reservation
    tails = [tail for target, source in planned.sources.items() for tail in _read_tails(backing, target, source)]
    held: list[Run] = []  # one reference more on all that is or was shown, until nothing can go wrong
    done: list[tuple[Part, list[int | None]]] = []
    try:
        for part, runs, _ in planned.moves:
            for run in (*runs, *reservation.runs(backing.index(part), part.pages)):
                pool.share([run])
                held.append(run)
        for part, runs, new_tail in planned.moves:
            index = backing.index(part)
            before = [reservation.page(place) for place in range(index, index + part.pages)]
            tail = pool.take(1, room=backing.room[part.stream]) if new_tail else []
            pool.share(runs)
            done.append((part, before))
            if runs or tail:
                reservation.map(index, [*runs, *tail])
            else:
                reservation.unmap(index, part.pages)
    except BaseException:
        for part, before in reversed(done):
            pool.share(Run(page, 1) for page in before if page is not None)
            reservation.put_back(backing.index(part), before)
        pool.drop(held)
        raise
    pool.drop(held)
    for where, content in tails:
        where.copy_(content)
        backing.copied += content.numel()
    became = {number: (slot.length, slot.start, slot.first) for number, slot in enumerate(backing.slots)}
    for target, source in planned.sources.items():
        _become(backing, target, *became[source])
    for number in {*planned.sources, *planned.sources.values()}:
        slot = backing.slots[number]
        slot.shared = max(slot.shared, slot.length, became[number][0])


def _read_tails(backing: Backing, target: int, source: int) -> Iterator[_Tail]:
    """What must be copied, read before anything moves. Neighbouring streams of one size go in one copy."""
    for streams in backing.families:
        spec, count, tail = backing.layout.streams[streams.start], len(streams), _tail(backing, source, streams.start)
        if tail:
            stride = spec.size * backing.layout.max_num_seqs
            offset = spec.offset + _full(backing, source, streams.start) * backing.page_size
            where, origin = (
                backing.bytes.as_strided((count, tail), (stride, 1), offset + number * spec.size)
                for number in (target, source)
            )
            yield _Tail(where, origin.clone())


def _become(backing: Backing, target: int, length: int, start: int, first: list[int]) -> None:
    """The pages are there: let slot `target` know."""
    slot = backing.slots[target]
    before = slot.mapped if slot.start == start else first
    slot.length, slot.start, slot.first = length, start, list(first)
    slot.mapped = [max(end, old) for end, old in zip(backing.ends_for(slot, length), before, strict=True)]
    backing.measure(target)
