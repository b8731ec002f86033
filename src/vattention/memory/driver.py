"""The seam to physical memory: the verbs of the CUDA virtual memory API, as one small Protocol.

Sources: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VA.html; arXiv 2405.04437 on the cost of each call.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from vattention.errors import OutOfPages

if TYPE_CHECKING:
    import torch


class Access(enum.IntEnum):
    """What a mapped range may be used for."""

    NONE = 0
    READ = 1
    READ_WRITE = 2


class MappingBudget:
    """How many mappings may exist, and how many do; shared by everything the limit is shared by.

    Args:
        limit: mappings allowed in all, or None where the driver knows no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.RLock()  # a finalizer may charge in the middle of a charge

    def forget(self) -> None:
        """Begin anew, in a child process: what was charged is not there, nor who may hold the lock."""
        self.used = 0
        self._lock = threading.RLock()

    @property
    def free(self) -> int | None:
        """Mappings that may still be added, or None where there is no limit."""
        return None if self.limit is None else max(0, self.limit - self.used)

    def charge(self, mappings: int, *, force: bool = False) -> None:
        """Count `mappings` more (negative: fewer). Raises OutOfPages, counting nothing, past the limit.

        `force`: never raise. For undoing and giving back, which the limit must not stand in the way of: it leaves the
        kernel room enough.
        """
        with self._lock:
            if mappings > 0 and not force and self.limit is not None and self.used + mappings > self.limit:
                hint = (
                    "the mapping limit is reached: use larger pages or fewer streams a slot, or raise vm.max_map_count"
                )
                raise OutOfPages(mappings, max(0, self.limit - self.used), "mappings", hint)
            self.used += mappings


class Driver(Protocol):
    """Physical memory, virtual addresses, and the mapping between them. Sizes and addresses are bytes.

    A *handle* names physical memory: it is the position of its first byte in the physical address space of the
    driver. Where that space is `linear` (a file), one create may make many pages, any page-aligned part may be mapped
    or released, the caller may say where to create, and neighbouring pages at neighbouring addresses are one mapping.
    Where it is not (a device), one create makes one page, handles are mapped and released whole, and every page is a
    mapping; the driver numbers them so that pages created one after another still form runs.

    Any verb may raise DriverError, and then has had no effect that the caller must know of, with two exceptions: after
    a failed `map` or `unmap` each page of the range may be in either state. Verbs may be called from any thread, one
    at a time for a range.
    """

    @property
    def granularity(self) -> int:
        """Every size and address is a multiple of this many bytes."""

    @property
    def linear(self) -> bool:
        """Whether physical memory is one space that can be cut anywhere (see above)."""

    @property
    def guard(self) -> bool:
        """Whether touching an unmapped address faults even for a read."""

    @property
    def mappings(self) -> MappingBudget:
        """The mapping limit this driver works under, and its use."""

    def headroom(self) -> int | None:
        """Bytes that could be created now, as far as the system tells; None if it does not."""

    def reserve(self, size: int) -> int:
        """Reserve `size` bytes of addresses with nothing behind them; return the first (cuMemAddressReserve)."""

    def free(self, address: int, size: int) -> None:
        """Give back exactly what `reserve` gave, with nothing mapped in it (cuMemAddressFree).

        The addresses stay unusable by others until the last tensor over them dies.
        """

    def create(self, size: int, at: int | None = None, room: int = 0) -> int:
        """Allocate physical memory for real; return its handle (cuMemCreate).

        On a linear driver the memory is placed at `at`, or, without it, where `room` bytes from the handle on are
        promised to this caller for later creates. Raises DriverError with `out_of_memory` when there is none.
        """

    def release(self, handle: int, size: int) -> None:
        """Give physical memory back to the system (cuMemRelease). It must not be mapped."""

    def map(self, address: int, handle: int, size: int) -> None:
        """Put [handle, handle + size) behind [address, address + size), without access (cuMemMap).

        What was mapped there before is replaced; nothing may be using it (`fence`).
        """

    def unmap(self, address: int, size: int) -> None:
        """Leave nothing behind [address, address + size), holes included (cuMemUnmap)."""

    def set_access(self, address: int, size: int, access: Access) -> None:
        """Set what a fully mapped range may be used for, and make first touches free of faults (cuMemSetAccess)."""

    def tensor(self, address: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over reserved addresses, mapped or not; strides in elements. It keeps the addresses reserved."""

    def fence(self) -> None:
        """Return once no work submitted so far can touch mapped memory any more."""

    def close(self) -> None:
        """Give up what the driver itself holds. Idempotent."""
