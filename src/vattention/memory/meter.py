"""Counting and timing driver calls, in one place for every driver."""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from vattention.memory.driver import Driver

P = ParamSpec("P")
R = TypeVar("R")


class Meter:
    """A driver's verbs, counted and timed, failing calls included.

    Attributes:
        calls: number of calls by verb.
        seconds: time spent inside the driver, all threads together.
        calls_by_thread: number of calls by thread identifier. Background growth must not be paid for by the engine's
            thread; here that can be seen.
    """

    def __init__(self, driver: Driver) -> None:
        self.calls: Counter[str] = Counter()
        self.seconds = 0.0
        self.calls_by_thread: Counter[int] = Counter()
        self.reserve = self._metered("reserve", driver.reserve)
        self.free = self._metered("free", driver.free)
        self.create = self._metered("create", driver.create)
        self.release = self._metered("release", driver.release)
        self.map = self._metered("map", driver.map)
        self.unmap = self._metered("unmap", driver.unmap)
        self.set_access = self._metered("set_access", driver.set_access)

    def _metered(self, verb: str, call: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(call)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls[verb] += 1
                self.calls_by_thread[threading.get_ident()] += 1

        return timed
