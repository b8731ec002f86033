"""Room in a linear physical space: who may create pages where."""

from __future__ import annotations

import bisect


class _Extent:
    __slots__ = ("created", "end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end, self.created = start, end, 0


class Extents:
    """The extents of one pool. An extent without created pages is spare, and used again."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._starts: list[int] = []  # ascending: the driver hands out the space from the bottom up
        self._extents: list[_Extent] = []
        self._spare: dict[int, dict[int, None]] = {}  # pages of room -> starts, oldest first

    def open(self, start: int, pages: int) -> None:
        """Add the extent the driver promised at `start`."""
        index = bisect.bisect(self._starts, start)
        self._starts.insert(index, start)
        self._extents.insert(index, _Extent(start, start + pages * self._page_size))

    def end_of(self, page: int) -> int:
        """Where the extent around `page` ends; `page` itself when it lies in none."""
        extent = self._around(page)
        return extent.end if extent else page

    def spare(self, pages: int) -> int | None:
        """The start of a spare extent with exactly `pages` of room, if there is one."""
        starts = self._spare.get(pages)
        return next(reversed(starts)) if starts else None

    def count_created(self, start: int, pages: int) -> None:
        """`pages` pages from `start` on were created."""
        self._count(start, pages, +1)

    def count_released(self, start: int, pages: int) -> None:
        """`pages` pages from `start` on were released."""
        self._count(start, pages, -1)

    def _count(self, start: int, pages: int, sign: int) -> None:
        end = start + pages * self._page_size
        while start < end:  # extents lie side by side, so a run of free pages may reach over several
            extent = self._around(start)
            assert extent is not None, f"page {start:#x} is in no extent"
            stop = min(end, extent.end)
            extent.created += sign * (stop - start) // self._page_size
            spare = self._spare.setdefault((extent.end - extent.start) // self._page_size, {})
            if extent.created:
                spare.pop(extent.start, None)
            else:
                spare[extent.start] = None
            start = stop

    def _around(self, page: int) -> _Extent | None:
        index = bisect.bisect(self._starts, page) - 1
        if index < 0 or page >= self._extents[index].end:
            return None
        return self._extents[index]
