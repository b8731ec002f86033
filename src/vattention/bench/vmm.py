"""What CUDA's virtual memory calls cost: each call by size and by run, and how fast memory can be mapped.

The paper's section on the cost of the API (arXiv 2405.04437) has the figures of one device; this makes another's. Every
part is bounded in time, and returns its samples in microseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from vattention.bench.table import table
from vattention.memory import Access, CudaDriver
from vattention.memory.sizes import format_size

CALLS = ("reserve", "create", "map", "set_access", "unmap", "release", "free")
_FEW = 4  # rounds that are made even when the time is up; the first of them does not count

Samples = dict[str, list[float]]


@contextmanager
def _timed(samples: Samples, name: str, per: int = 1) -> Iterator[None]:
    start = time.perf_counter()
    yield
    samples.setdefault(name, []).append((time.perf_counter() - start) * 1e6 / per)


def _rounds(seconds: float, work: Callable[[], None]) -> None:
    """Do `work` until the time is up."""
    end, done = time.perf_counter() + seconds, 0
    while done < _FEW or time.perf_counter() < end:
        work()
        done += 1


def calls_by_size(driver: CudaDriver, *, seconds: float, sizes: list[int]) -> dict[int, Samples]:
    """Microseconds of each call for one handle, by its size in bytes. The first round of each size is left out."""
    found: dict[int, Samples] = {}
    for size in sizes:
        samples: Samples = {}

        def one(size: int = size, samples: Samples = samples) -> None:
            with _timed(samples, "reserve"):
                address = driver.reserve(size)
            with _timed(samples, "create"):
                handle = driver.create(size)
            with _timed(samples, "map"):
                driver.map(address, handle, size)
            with _timed(samples, "set_access"):
                driver.set_access(address, size, Access.READ_WRITE)
            with _timed(samples, "unmap"):
                driver.unmap(address, size)
            with _timed(samples, "release"):
                driver.release(handle, size)
            with _timed(samples, "free"):
                driver.free(address, size)

        _rounds(seconds / len(sizes), one)
        found[size] = {name: values[1:] for name, values in samples.items()}
    return found


def calls_by_run(driver: CudaDriver, *, seconds: float, runs: list[int]) -> dict[int, Samples]:
    """Microseconds a *page* of map, set_access and unmap, by the pages that are mapped in one go."""
    size = driver.granularity
    longest = max(runs)
    address, handles = driver.reserve(longest * size), [driver.create(size) for _ in range(longest)]
    found: dict[int, Samples] = {}
    try:
        for pages in runs:
            samples: Samples = {}

            def one(pages: int = pages, samples: Samples = samples) -> None:
                with _timed(samples, "map", pages):
                    driver.map(address, handles[0], pages * size)
                with _timed(samples, "set_access", pages):
                    driver.set_access(address, pages * size, Access.READ_WRITE)
                with _timed(samples, "unmap", pages):
                    driver.unmap(address, pages * size)

            _rounds(seconds / len(runs), one)
            found[pages] = {name: values[1:] for name, values in samples.items()}
    finally:
        driver.unmap(address, longest * size)
        for handle in handles:
            driver.release(handle, size)
        driver.free(address, longest * size)
    return found


def bandwidth(driver: CudaDriver, *, seconds: float, sizes: list[int], total: int) -> dict[int, Samples]:
    """GB/s of memory that becomes usable, by page size: newly created pages, and pages that exist and are mapped again.

    Args:
        total: bytes mapped in a round, page by page, with one set_access at the end, as a step does.
    """
    found: dict[int, Samples] = {}
    for size in sizes:
        pages = max(1, total // size)
        samples: Samples = {}

        def one(size: int = size, pages: int = pages, samples: Samples = samples) -> None:
            length = pages * size
            address = driver.reserve(length)
            start = time.perf_counter()
            handles = [driver.create(size) for _ in range(pages)]
            for index, handle in enumerate(handles):
                driver.map(address + index * size, handle, size)
            driver.set_access(address, length, Access.READ_WRITE)
            new = time.perf_counter() - start
            driver.unmap(address, length)
            start = time.perf_counter()
            for index, handle in enumerate(handles):
                driver.map(address + index * size, handle, size)
            driver.set_access(address, length, Access.READ_WRITE)
            again = time.perf_counter() - start
            driver.unmap(address, length)
            for handle in handles:
                driver.release(handle, size)
            driver.free(address, length)
            samples.setdefault("new pages", []).append(length / new / 1e9)
            samples.setdefault("pages mapped again", []).append(length / again / 1e9)

        _rounds(seconds / len(sizes), one)
        found[size] = {name: values[1:] for name, values in samples.items()}
    return found


def run(driver: CudaDriver, part: str, *, seconds: float, total: int = 1 << 30) -> dict[int, Samples]:
    """One of `PARTS`, in about `seconds`, with at most `total` bytes of the device."""
    sizes = [driver.granularity << power for power in range(6) if driver.granularity << power <= total]
    if part == "calls":
        return calls_by_size(driver, seconds=seconds, sizes=sizes)
    if part == "runs":
        pages = [1 << power for power in range(0, 9, 2) if driver.granularity << power <= total]
        return calls_by_run(driver, seconds=seconds, runs=pages)
    assert part == "bandwidth", part
    return bandwidth(driver, seconds=seconds, sizes=sizes[:4], total=total // 2)


PARTS = {
    "calls": "microseconds a call, median, by the size of the handle",
    "runs": "microseconds a page, median, by the pages mapped in one go",
    "bandwidth": "GB/s that become usable, median, by page size",
}


def summary(part: str, found: dict[int, Samples]) -> str:
    """A table of medians."""
    head = [str(key) if part == "runs" else format_size(key) for key in found]
    names = next(iter(found.values()))
    digits = 2 if part == "bandwidth" else 1
    rows = [[name, *(f"{median(samples[name]):.{digits}f}" for samples in found.values())] for name in names]
    return f"{PARTS[part]}\n{table(['', *head], rows)}"


def plot(path: Path, results: dict[str, dict[int, Samples]], *, title: str) -> None:
    """Medians, and the middle half of the samples, of every part there is, into one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(results), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (part, found) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        keys = [key if part == "runs" else key / (1 << 20) for key in found]
        for name in next(iter(found.values())):
            columns = [samples[name] for samples in found.values()]
            bounds = [quantiles(column, n=4) for column in columns]
            axes.plot(keys, [median(column) for column in columns], marker="o", label=name)
            axes.fill_between(keys, [low for low, _, _ in bounds], [high for _, _, high in bounds], alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("pages in one go" if part == "runs" else "MiB")
        axes.set_title(PARTS[part].split(",")[0], loc="left", fontsize=10)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path)


def as_json(results: dict[str, dict[int, Samples]]) -> dict[str, Any]:
    """All samples, rounded to what a clock can tell."""
    return {
        part: {
            str(key): {name: [round(value, 3) for value in values] for name, values in samples.items()}
            for key, samples in found.items()
        }
        for part, found in results.items()
    }
