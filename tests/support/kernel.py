"""What the kernel says about this process's memory, against which our own books are checked."""

from __future__ import annotations

import re
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
    """The mappings that overlap [address, address + size), in order."""
    found = []
    for match in _LINE.finditer(read_maps() if maps is None else maps):
        start, end = int(match[1], 16), int(match[2], 16)
        if start < address + size and address < end:
            found.append(Mapping(start, end, match[3], int(match[4], 16), match[5]))
    return found


def mapped_pages(address: int, size: int, page_size: int, maps: str | None = None) -> dict[int, int]:
    """Page of the range -> physical page behind it, as the kernel has it. Every one must be readable and writable."""
    table = {}
    for mapping in mappings(address, size, maps):
        if mapping.is_pages:
            assert mapping.protection == "rw-s", f"{mapping.protection} at {mapping.start:#x}"
            for place in range(max(mapping.start, address), min(mapping.end, address + size), page_size):
                table[(place - address) // page_size] = mapping.offset + place - mapping.start
    return table
