"""Writing the new K and V of a pass on a CPU: one call a layer, where torch's indexed writes take a dozen operations.

The kernel is cpu_write.cpp, compiled at first use (`attention.native`).
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from vattention.attention import native, recording

_library = native.on_demand(Path(__file__).with_name("cpu_write.cpp"), vattention_write=None)


class _Side(ctypes.Structure):
    """`struct Side` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("source", "target")),
        *((name, ctypes.c_int64) for name in ("from_row", "from_head", "to_slot", "to_token", "to_head", "bytes")),
    )


class _Call(ctypes.Structure):
    """`struct Call` of the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "threads")),
        *((name, ctypes.c_void_p) for name in ("slots", "positions")),
        ("sides", _Side * 2),
    )


def can(new: torch.Tensor, cache: torch.Tensor) -> bool:
    """Whether the kernel copies from one to the other: on the CPU, of one dtype, each head's numbers side by side."""
    return native.readable(new, cache) and _library() is not None


def write(
    slots: torch.Tensor,
    positions: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Put every row where it belongs. Only what `can` accepts.

    Args:
        slots, positions: `[rows]` int64: nothing is checked.
        key, value: `[kv_heads, rows, width]`.
        keys, values: `[slots, tokens, kv_heads, width]`, or `[blocks, block_size, kv_heads, width]`.
    """
    library = _library()
    assert library is not None
    call = _Call(
        key.shape[1],
        key.shape[0],
        torch.get_num_threads(),
        slots.data_ptr(),
        positions.data_ptr(),
        (_side(key, keys), _side(value, values)),
    )
    recording.call(library.vattention_write, call, slots, positions)


def _side(new: torch.Tensor, cache: torch.Tensor) -> tuple[int, ...]:
    size = new.element_size()
    head, row, _ = new.stride()
    slot, token, cache_head, _ = cache.stride()
    return (
        new.data_ptr(),
        cache.data_ptr(),
        row * size,
        head * size,
        slot * size,
        token * size,
        cache_head * size,
        new.shape[2] * size,
    )
