"""The driver that the suite of pool, reservation and cache runs on.

The host's, or, with VATTENTION_TEST_DRIVER=cuda-emulated, the CUDA driver on an emulated device, with the granularity
of the host's and with tensors that torch takes for host memory. Caches that open a driver of their own follow.
"""

from __future__ import annotations

import os
from collections.abc import Container
from typing import Any

import pytest

from support import emulated_cuda, kernel
from vattention.cache import opening
from vattention.memory import CudaDriver, HostDriver

EMULATED = emulated_cuda.ACTIVE

host_only = pytest.mark.skipif(EMULATED, reason="about host memory")
"""For tests of what only the host driver does."""


def new_driver(*, guard: bool = False) -> Any:
    """A driver of the kind the suite runs on."""
    return CudaDriver(tensor_device="cpu") if EMULATED else HostDriver(guard=guard)


def page_table(
    driver: Any, address: int, size: int, page_size: int, *, unreadable: Container[int] = (), maps: str | None = None
) -> dict[int, int]:
    """Page from `address` on -> physical page behind it, as the system has it and not as our books do.

    All must be readable and writable, but for the places in `unreadable`.

    Args:
        maps: what kernel.read_maps gave a moment ago, for host memory.
    """
    if not (EMULATED and not isinstance(driver, HostDriver) and hasattr(driver, "_handles")):
        return kernel.page_table(kernel.mappings(address, size, maps), address, page_size, unreadable=unreadable)
    numbers = {handle.value: number for number, handle in driver._handles.items()}
    table = {}
    for start, handle, length, access in emulated_cuda.load().mappings(address, size):
        place = (start - address) // page_size
        assert length == page_size, "a handle is a page"
        assert access == 3 or place in unreadable, f"access {access} at page {place}"
        table[place] = numbers[handle]
    return table


if EMULATED:
    emulated_cuda.load().configure(granularity=os.sysconf("SC_PAGESIZE"))
    opening.HostDriver = new_driver  # type: ignore[assignment, misc]
    opening._AHEAD = 0  # else memory is created that nobody has asked for yet, and books are not exact
