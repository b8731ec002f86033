"""Seconds of work on a device, and the bandwidth they are compared with.

CUDA events on a GPU, the process's clock on a CPU. Before each sample of a GPU its second-level cache is overwritten,
because what is measured reads K and V that were written long ago.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

_FLUSH = 256 << 20  # several times the cache of any GPU so far
_COPY = 1 << 30
_WARM = 2
_FEW = 3  # samples that are taken whatever they cost


class Deadline:
    """The time that a part may take.

    Args:
        seconds: from now on. The part is asked to look at `over` between its cases.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds, not less than 0."""
        return max(0.0, self._end - time.perf_counter())

    @property
    def over(self) -> bool:
        """Whether there are none."""
        return self.left == 0.0


class Clock:
    """Takes samples on one device.

    Args:
        device: where the work is done.
        tiny: with little memory, for tests.
    """

    def __init__(self, device: torch.device, *, tiny: bool = False) -> None:
        self.device = device
        self._copied = (1 << 20) if tiny else _COPY
        self._flushed: torch.Tensor | None = None
        if device.type == "cuda":
            self._flushed = torch.empty(_FLUSH, dtype=torch.uint8, device=device)

    def samples(
        self, call: Callable[[int], object], *, seconds: float, most: int = 30, flush: bool = True
    ) -> list[float]:
        """Seconds of `call(round)`, after two calls that do not count: at least three, at most `most` of them.

        Args:
            call: gets the number of the round, to work on other data each time.
            seconds: about how long all of it may take.
            flush: overwrite the cache before each sample.
        """
        end = time.perf_counter() + seconds
        for number in range(_WARM):
            call(number)
        self.wait()
        found: list[float] = []
        while len(found) < _FEW or (len(found) < most and time.perf_counter() < end):
            found.append(self._one(call, _WARM + len(found), flush))
        return found

    def _one(self, call: Callable[[int], object], number: int, flush: bool) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call(number)
            return time.perf_counter() - start
        if flush:
            assert self._flushed is not None
            self._flushed.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call(number)
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def wait(self) -> None:
        """Return when the device has nothing to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def bandwidth(self, *, seconds: float = 1.0) -> float:
        """Bytes a second of a large copy, those read and those written both counted."""
        source, target = (torch.ones(self._copied, dtype=torch.uint8, device=self.device) for _ in range(2))
        return 2 * self._copied / median(self.samples(lambda _: target.copy_(source), seconds=seconds, flush=False))
