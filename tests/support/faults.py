"""A driver that fails when it is told to."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, NamedTuple

from vattention.errors import DriverError
from vattention.memory import Access, Driver


class Fault(NamedTuple):
    """Which calls fail, and how.

    Attributes:
        at: number of the first call that fails, counted from 1.
        onwards: every later one fails too.
        after: unmap fails when it has unmapped already, which its contract allows. Other verbs fail before they act.
        no_memory: create fails because physical memory ran out.
    """

    at: int
    onwards: bool = False
    after: bool = False
    no_memory: bool = False


class FaultyDriver:
    """Passes everything on to `driver`, but for the calls that `fault` names.

    Args:
        memory: bytes that the machine has; create fails past that. None for no such limit.

    Attributes:
        history: the verbs called so far, failing ones included.
        failures: how many of them failed on purpose.
        at_close: bytes of physical memory that the driver held when it was closed.
    """

    def __init__(self, driver: Driver | None = None, fault: Fault | None = None, memory: int | None = None) -> None:
        self.driver = driver
        self.fault = fault
        self.memory = memory
        self.history: list[str] = []
        self.failures = 0
        self.at_close: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.driver, name)

    @property
    def broken(self) -> bool:
        """Whether undoing fails too, once something has failed."""
        return self.fault is not None and self.fault.onwards

    def repair(self) -> None:
        """From now on everything works."""
        self.fault = None

    def _call(self, verb: str, *args: Any) -> Any:
        self.history.append(verb)
        call: Callable[..., Any] = getattr(self.driver, verb)
        number, fault = len(self.history), self.fault
        if fault is None or not (number == fault.at or (fault.onwards and number > fault.at)):
            return call(*args)
        self.failures += 1
        if fault.after and verb == "unmap":
            call(*args)
        if fault.no_memory and verb == "create":
            raise DriverError(verb, errno.ENOMEM, "the test wants it so", out_of_memory=True)
        raise DriverError(verb, errno.EIO, "the test wants it so")

    def reserve(self, size: int) -> int:
        return self._call("reserve", size)

    def free(self, address: int, size: int) -> None:
        self._call("free", address, size)

    def create(self, size: int, at: int | None = None, room: int = 0) -> int:
        if self.memory is not None and self.driver.physical_bytes + size > self.memory:
            raise DriverError("create", errno.ENOMEM, "the machine is full", out_of_memory=True)
        return self._call("create", size, at, room)

    def release(self, handle: int, size: int) -> None:
        self._call("release", handle, size)

    def map(self, address: int, handle: int, size: int) -> None:
        self._call("map", address, handle, size)

    def unmap(self, address: int, size: int) -> None:
        self._call("unmap", address, size)

    def set_access(self, address: int, size: int, access: Access) -> None:
        self._call("set_access", address, size, access)

    def close(self) -> None:
        if not self.driver.closed:
            self.at_close = self.driver.physical_bytes
        self.driver.close()
