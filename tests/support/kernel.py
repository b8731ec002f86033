"""What the kernel says about this process's memory, against which our own books are checked."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Container, Iterable
from typing import NamedTuple

_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ \d+ *(.*)")


class Mapping(NamedTuple):
    """One line of /proc/self/maps: addresses, protection, offset into the file, and the file's name."""

    start: int
    end: int
    protection: str
    offset: int
    path: str

    @property
    def is_pages(self) -> bool:
        """Whether physical pages of a host driver lie behind it."""
        return "memfd:vattention" in self.path


def read_maps() -> str:
    """The text of /proc/self/maps at this moment."""
    with open("/proc/self/maps") as maps:
        return maps.read()


def mappings(address: int, size: int, maps: str | None = None) -> list[Mapping]:
    """The mappings that overlap [address, address + size), in order, cut to it."""
    lines = (read_maps() if maps is None else maps).splitlines()
    found = []
    # In the order of addresses, and thousands: most are never looked at.
    first = bisect_right(lines, address, key=_start) - 1
    for line in lines[max(0, first) :]:
        if _start(line) >= address + size:
            break
        match = _LINE.fullmatch(line)
        assert match, line
        start, end = int(match[1], 16), int(match[2], 16)
        if address < end:
            offset = int(match[4], 16) + max(0, address - start)
            found.append(Mapping(max(start, address), min(end, address + size), match[3], offset, match[5]))
    return found


def _start(line: str) -> int:
    return int(line[: line.index("-")], 16)


def page_table(
    mappings: Iterable[Mapping], address: int, page_size: int, *, unreadable: Container[int] = ()
) -> dict[int, int]:
    """Page from `address` on -> physical page behind it. All must be readable and writable, but for `unreadable`."""
    table = {}
    for mapping in mappings:
        if mapping.is_pages:
            for byte in range(mapping.start, mapping.end, page_size):
                place = (byte - address) // page_size
                assert mapping.protection == "rw-s" or place in unreadable, f"{mapping.protection} at page {place}"
                table[place] = mapping.offset + byte - mapping.start
    return table
