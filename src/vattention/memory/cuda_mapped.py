"""Which handles are mapped where: what CUDA knows and does not tell."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Piece(NamedTuple):
    """One mapped handle: its address, its size in bytes, and its number."""

    address: int
    size: int
    handle: int


class MappedPieces:
    """The mapped handles of a device, by address."""

    def __init__(self) -> None:
        self._addresses: list[int] = []  # ascending
        self._pieces: dict[int, Piece] = {}

    def __len__(self) -> int:
        return len(self._addresses)

    def add(self, pieces: Iterable[Piece]) -> None:
        """Note neighbouring pieces, ascending, in a range where there is none."""
        added = list(pieces)
        if added:
            at = bisect.bisect(self._addresses, added[0].address)
            self._addresses[at:at] = [piece.address for piece in added]
            self._pieces.update((piece.address, piece) for piece in added)

    def inside(self, address: int, size: int) -> list[Piece]:
        """The pieces that overlap [address, address + size), ascending."""
        first = bisect.bisect(self._addresses, address)
        if first and self._overlaps(self._addresses[first - 1], address):
            first -= 1
        last = bisect.bisect_left(self._addresses, address + size)
        return [self._pieces[start] for start in self._addresses[first:last]]

    def _overlaps(self, start: int, address: int) -> bool:
        return start + self._pieces[start].size > address

    def remove(self, pieces: list[Piece]) -> None:
        """Forget neighbouring pieces that are noted, ascending and without a noted one in between."""
        if pieces:
            at = bisect.bisect_left(self._addresses, pieces[0].address)
            del self._addresses[at : at + len(pieces)]
            for piece in pieces:
                del self._pieces[piece.address]


def stretches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces, ascending, grouped into stretches of addresses without a hole: what one call may cover."""
    stretch: list[Piece] = []
    for piece in pieces:
        if stretch and stretch[-1].address + stretch[-1].size != piece.address:
            yield stretch
            stretch = []
        stretch.append(piece)
    if stretch:
        yield stretch
