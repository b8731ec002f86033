"""Linux memory as a driver: a sparse memfd holds the physical pages, mmap puts them at addresses.

A handle is an offset into the file, so the physical space is linear: its size costs nothing, only what is allocated
in it does. Pages next to each other in the file, mapped next to each other in memory, are one mapping to the kernel.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import os
import weakref
from collections.abc import Sequence

import torch

from vattention.errors import ConfigError, DriverError
from vattention.memory import libc, limits
from vattention.memory.driver import Access, MappingBudget
from vattention.memory.sizes import format_size

_FILE_SIZE = 1 << 62  # the physical address space: sparse, so as large as an offset allows
_SAFE_SHARE = 0.8  # of vm.max_map_count: near the limit even thread creation fails
_HEADROOM_STEP = 64 << 20  # bytes created between two looks at the system's headroom
_PROTECTION = {Access.NONE: 0, Access.READ: libc.PROT_READ, Access.READ_WRITE: libc.PROT_READ | libc.PROT_WRITE}

_live: weakref.WeakSet[HostDriver] = weakref.WeakSet()
_mappings = MappingBudget(None)  # the kernel's limit is the process's, so all drivers of the process share one budget


class _Range:
    """One reservation. Its storage owns the addresses: they are unmapped when the last tensor over them dies."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = address, size
        buffer = (ctypes.c_char * size).from_address(address)
        weakref.finalize(buffer, libc.unmap, address, size).atexit = False
        self.storage = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()


class HostDriver:
    """Implements `Driver` on mmap and one memfd.

    Args:
        guard: unmapped addresses fault on reads too. Without it a stray read gives zeros and a stray write faults.

    Raises:
        ConfigError: not Linux, or the kernel has no memfd.
    """

    linear = True

    def __init__(self, *, guard: bool = False) -> None:
        if not hasattr(os, "memfd_create"):
            raise ConfigError("the host driver needs memfd_create: use Linux 3.17 or newer and a Python built for it")
        self.granularity = os.sysconf("SC_PAGESIZE")
        self.guard = guard
        self._unmapped = libc.PROT_NONE if guard else libc.PROT_READ
        self._ranges: list[_Range] = []  # sorted by address
        self._top = 0  # end of the part of the file that was promised to somebody
        self._trusted = 0  # bytes that may be created before the headroom is asked for again
        try:
            self._fd = os.memfd_create("vattention", os.MFD_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"memfd_create is refused here ({error}): allow it in the sandbox's profile") from error
        self._close_file = weakref.finalize(self, os.close, self._fd)
        try:
            os.ftruncate(self._fd, _FILE_SIZE)
        except OSError as error:
            self.close()
            raise ConfigError("the file size limit is too small: raise it with `ulimit -f unlimited`") from error
        others = limits.mappings_in_use() - _mappings.used
        _mappings.limit = max(0, int(limits.max_map_count() * _SAFE_SHARE) - others)
        self.mappings = _mappings
        _live.add(self)

    @property
    def physical_bytes(self) -> int:
        """What the memfd holds, in the kernel's own count."""
        return os.fstat(self._fd).st_blocks * 512

    def headroom(self) -> int | None:
        """Bytes this process can still have, from /proc/meminfo and its cgroups."""
        return limits.memory_headroom()

    def reserve(self, size: int) -> int:
        """Anonymous, no-reserve, read-only addresses (no access at all in guard mode)."""
        try:
            address = libc.map_nothing(None, size, self._unmapped)
        except OSError as error:
            advice = f"{format_size(size)} of addresses are not to be had; {_address_advice()}"
            raise _failure("reserve", error, advice) from error
        bisect.insort(self._ranges, _Range(address, size), key=lambda range_: range_.address)
        return address

    def free(self, address: int, size: int) -> None:
        """Forget the reservation; munmap follows when no tensor looks at it any more."""
        range_ = self._range(address)
        if (range_.address, range_.size) != (address, size):
            raise DriverError("free", errno.EINVAL, "free exactly what reserve gave")
        self._ranges.remove(range_)

    def create(self, size: int, at: int | None = None, room: int = 0) -> int:
        """Allocate a range of the memfd, so that running out is an error here and not a SIGBUS in a kernel."""
        handle = self._top if at is None else at
        if handle + size > _FILE_SIZE:
            raise DriverError("create", errno.EFBIG, "the physical address space is used up: open a new driver")
        try:
            self._check_headroom(size)
            libc.allocate(self._fd, handle, size)
        except OSError as error:
            raise _failure("create", error, "this driver is closed") from error
        self._trusted -= size
        if at is None:
            self._top += max(size, room)
        return handle

    def release(self, handle: int, size: int) -> None:
        """Punch a hole."""
        try:
            libc.punch(self._fd, handle, size)
        except OSError as error:
            raise _failure("release", error, "the memory stays with this process until the driver is closed") from error

    def map(self, address: int, handle: int, size: int) -> None:
        """One mmap over what is there; the kernel merges it with its neighbours."""
        try:
            libc.map_file(address, size, self._fd, handle)
        except OSError as error:
            raise _failure("map", error, "check vm.max_map_count and `ulimit -v`") from error

    def unmap(self, address: int, size: int) -> None:
        """Anonymous addresses over what is there."""
        try:
            libc.map_nothing(address, size, self._unmapped)
        except OSError as error:
            raise _failure("unmap", error, "check vm.max_map_count") from error

    def set_access(self, address: int, size: int, access: Access) -> None:
        """Protection for the range; the page tables are filled in at once, so that no kernel takes a fault."""
        try:
            libc.protect(address, size, _PROTECTION[access])
            if access is not Access.NONE:
                libc.populate(address, size, write=access is Access.READ_WRITE)
        except OSError as error:
            raise _failure("set_access", error, "the range must be mapped") from error

    def tensor(self, address: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor that keeps its reservation's addresses, and nothing else, alive."""
        range_ = self._range(address)
        offset, rest = divmod(address - range_.address, dtype.itemsize)
        if rest:
            raise DriverError("tensor", errno.EINVAL, f"address {address:#x} is not aligned for {dtype}")
        return torch.empty(0, dtype=dtype).set_(range_.storage, offset, tuple(shape), tuple(strides))

    def fence(self) -> None:
        """Nothing to wait for: host kernels are done when their call returns."""

    def close(self) -> None:
        """Close the memfd; its memory goes when nothing is mapped from it any more."""
        self._fd = -1
        self._close_file()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._close_file.alive

    def _range(self, address: int) -> _Range:
        index = bisect.bisect_right(self._ranges, address, key=lambda range_: range_.address) - 1
        if index < 0 or address >= self._ranges[index].address + self._ranges[index].size:
            raise DriverError("tensor", errno.EFAULT, f"address {address:#x} is not reserved here")
        return self._ranges[index]

    def _check_headroom(self, size: int) -> None:
        """The kernel kills for memory rather than refuse it, so ask first: often enough, not at every page."""
        if size <= self._trusted:
            return
        headroom = self.headroom()
        if headroom is not None and size > headroom:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        self._trusted = size + (_HEADROOM_STEP if headroom is None else min(_HEADROOM_STEP, (headroom - size) // 2))


def _failure(call: str, error: OSError, advice: str) -> DriverError:
    code = error.errno or 0
    no_memory = call == "create" and code in (errno.ENOMEM, errno.ENOSPC)
    if no_memory:
        advice = "no physical memory is left on this machine or in this cgroup: lower the memory budget"
    return DriverError(call, code, advice, out_of_memory=no_memory)


def _address_advice() -> str:
    bound = limits.address_space_limit()
    if bound is not None:
        return f"`ulimit -v` is {format_size(bound)}: raise it, or lower max_model_len or max_num_seqs"
    return "lower max_model_len or max_num_seqs"


def _forget_after_fork() -> None:
    """In a child, leave no way to the parent's pages: nobody there counts what it would touch or give back."""
    _mappings.forget()
    for driver in list(_live):
        for range_ in driver._ranges:
            libc.map_nothing(range_.address, range_.size, libc.PROT_NONE)
        driver.close()


os.register_at_fork(after_in_child=_forget_after_fork)
