"""Which page size to take when nobody says."""

from __future__ import annotations

from vattention.cache.layout import KVLayout
from vattention.errors import ConfigError

_LARGEST = 2 << 20
_SHORT_REQUESTS = 4


def choose_page_size(layout: KVLayout, budget: int, granularity: int, mappings: int | None) -> int:
    """The smallest page, in bytes, that keeps within the mapping limit even if no two pages ever merge.

    Small pages waste least. But a request takes at least a page of every stream, so where the budget is small a page
    at which a handful of short requests fit goes first.
    """
    sizes = [
        size
        for power in range((_LARGEST // granularity).bit_length())
        if all(stream.size % (size := granularity << power) == 0 for stream in layout.streams)
    ] or [granularity]
    fitting = [size for size in sizes if len(layout.streams) * _SHORT_REQUESTS * size <= budget]
    if not fitting:
        return sizes[0]
    mappable = [size for size in fitting if mappings is None or budget // size <= mappings]
    return mappable[0] if mappable else fitting[-1]


def check_page_size(layout: KVLayout, page_size: int) -> None:
    """Raises ConfigError unless every stream is a whole number of pages."""
    for stream in layout.streams:
        if stream.size % page_size:
            raise ConfigError(
                f"page_size {page_size} does not divide a stream of {stream.size} bytes: use a power of two up to 2 MiB"
            )
