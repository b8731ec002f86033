"""What each driver call costs, by page size: the paper's table of call latencies, for this machine's driver."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from vattention.bench.machine import check_writable, write_json
from vattention.bench.table import table
from vattention.memory import Access, Driver, HostDriver
from vattention.memory.sizes import format_size

_BYTES = 64 << 20  # created at a time; pages of 64 KiB then make 1,024 samples a round
_ROUNDS = 3


def measure(driver: Driver, page_size: int) -> dict[str, float]:
    """Median microseconds a page of each call. "first" is a page nobody has touched: making it readable zeroes it."""
    samples: dict[str, list[float]] = {}
    for _ in range(_ROUNDS):
        _measure_round(driver, page_size, min(1024, max(8, _BYTES // page_size)), samples)
    return {name: statistics.median(values) * 1e6 for name, values in samples.items()}


def _measure_round(driver: Driver, page_size: int, count: int, samples: dict[str, list[float]]) -> None:
    """The life of `count` pages; adds the seconds of each call to `samples`, by name."""

    def each(name: str, call: Callable[[int], object]) -> None:
        for index in range(count):
            start = time.perf_counter()
            call(index)
            samples.setdefault(name, []).append(time.perf_counter() - start)

    start = time.perf_counter()
    base = driver.reserve(count * page_size)
    samples.setdefault("reserve", []).append(time.perf_counter() - start)
    handles: list[int] = []
    places = [base + index * page_size for index in range(count)]
    each("create", lambda _: handles.append(driver.create(page_size)))
    each("map", lambda index: driver.map(places[index], handles[index], page_size))
    each("set_access, first", lambda index: driver.set_access(places[index], page_size, Access.READ_WRITE))
    each("unmap", lambda index: driver.unmap(places[index], page_size))
    each("map", lambda index: driver.map(places[index], handles[index], page_size))
    each("set_access, again", lambda index: driver.set_access(places[index], page_size, Access.READ_WRITE))
    each("unmap", lambda index: driver.unmap(places[index], page_size))
    each("release", lambda index: driver.release(handles[index], page_size))
    driver.free(base, count * page_size)


def report(page_sizes: list[int], *, json: str | None, command: str) -> None:
    """Print the table, and write the JSON where asked."""
    check_writable(json)
    driver = HostDriver()
    try:
        results: dict[int, dict[str, float]] = {size: measure(driver, size) for size in page_sizes}
    finally:
        driver.close()
    names = list(next(iter(results.values())))
    rows: list[list[object]] = [[name, *(f"{results[size][name]:.1f}" for size in page_sizes)] for name in names]
    for label, parts in (
        ("new page, GB/s", ("create", "map", "set_access, first")),
        ("page mapped again, GB/s", ("map", "set_access, again")),
    ):
        rates = (size / 1e3 / sum(results[size][part] for part in parts) for size in page_sizes)
        rows.append([label, *(f"{rate:.2f}" for rate in rates)])
    print("microseconds a call, median")
    print(table(["call", *(format_size(size) for size in page_sizes)], rows))
    result: dict[str, Any] = {"microseconds": {str(size): values for size, values in results.items()}}
    write_json(json, command, result)
