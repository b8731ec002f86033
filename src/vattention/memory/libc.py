"""The five Linux calls that move memory, and nothing else. Source: mmap(2), fallocate(2), madvise(2)."""

from __future__ import annotations

import ctypes
import errno
import os
import platform

_libc = ctypes.CDLL(None, use_errno=True)
_ADDRESS, _SIZE, _INT, _OFFSET = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
_SHARED, _PRIVATE, _FIXED, _ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_NORESERVE = 0x40 if platform.machine().startswith("ppc") else 0x4000
_KEEP_SIZE_AND_PUNCH_HOLE = 0x03
_POPULATE_READ, _POPULATE_WRITE = 22, 23

_mmap = _libc.mmap
_mmap.restype, _mmap.argtypes = _ADDRESS, (_ADDRESS, _SIZE, _INT, _INT, _INT, _OFFSET)
_munmap = _libc.munmap
_munmap.argtypes = (_ADDRESS, _SIZE)
_mprotect = _libc.mprotect
_mprotect.argtypes = (_ADDRESS, _SIZE, _INT)
_madvise = _libc.madvise
_madvise.argtypes = (_ADDRESS, _SIZE, _INT)
_fallocate = getattr(_libc, "fallocate64", _libc.fallocate)
_fallocate.argtypes = (_INT, _INT, _OFFSET, _OFFSET)

_FAILED = ctypes.c_void_p(-1).value


def _check(failed: bool) -> None:
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def map_nothing(address: int | None, size: int, protection: int) -> int:
    """Private anonymous addresses that no memory is set aside for; over `address` when one is given."""
    if size >> 63:  # ctypes would cut it off
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    flags = _PRIVATE | _ANONYMOUS | _NORESERVE | (0 if address is None else _FIXED)
    result = _mmap(address, size, protection, flags, -1, 0)
    _check(result == _FAILED)
    return int(result)


def map_file(address: int, size: int, fd: int, offset: int) -> None:
    """The file's range at `address`, replacing what was there in one step, without access."""
    _check(_mmap(address, size, PROT_NONE, _SHARED | _FIXED, fd, offset) == _FAILED)


def unmap(address: int, size: int) -> None:
    """Give addresses back to the system."""
    _check(_munmap(address, size) != 0)


def protect(address: int, size: int, protection: int) -> None:
    """Set the protection of mapped addresses."""
    _check(_mprotect(address, size, protection) != 0)


def populate(address: int, size: int, *, write: bool) -> None:
    """Fill in the page tables now, so that no later touch takes a fault. Linux 5.14; before, touches fault once."""
    if _madvise(address, size, _POPULATE_WRITE if write else _POPULATE_READ) != 0:
        code = ctypes.get_errno()
        if code != 22:  # EINVAL: a kernel that does not know the advice
            raise OSError(code, os.strerror(code))


def allocate(fd: int, offset: int, size: int) -> None:
    """Back a range of the file with memory."""
    _check(_fallocate(fd, 0, offset, size) != 0)


def punch(fd: int, offset: int, size: int) -> None:
    """Give the memory behind a range of the file back."""
    _check(_fallocate(fd, _KEEP_SIZE_AND_PUNCH_HOLE, offset, size) != 0)
