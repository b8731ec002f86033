"""What the kernel says about this process's memory, against which our own books are checked."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import NamedTuple

_LINE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ \d+ *(.*)$", re.MULTILINE)


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
    found = []
    for match in _LINE.finditer(read_maps() if maps is None else maps):
        start, end = int(match[1], 16), int(match[2], 16)
        if start < address + size and address < end:
            offset = int(match[4], 16) + max(0, address - start)
            found.append(Mapping(max(start, address), min(end, address + size), match[3], offset, match[5]))
    return found


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
