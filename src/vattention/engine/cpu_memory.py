"""Memory of a recorded pass: tensors at addresses that are used again once they are gone, and by nobody else."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch

_LINE = 64
"""Bytes that memory is aligned to."""


class Memory:
    """Tensors at addresses that are used again once they are gone, and by nobody else."""

    def __init__(self) -> None:
        self._blocks: list[ctypes.Array[ctypes.c_char]] = []
        self._addresses: set[int] = set()
        self._free: dict[int, list[int]] = {}

    def empty(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """As `torch.empty_strided`."""
        numbers = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        size = -(-max(1, numbers * dtype.itemsize) // _LINE) * _LINE
        free = self._free.setdefault(size, [])
        if not free:
            block = (ctypes.c_char * (size + _LINE))()
            address = -(-ctypes.addressof(block) // _LINE) * _LINE
            self._blocks.append(block)
            self._addresses.add(address)
            free.append(address)
        address = free.pop()
        buffer = (ctypes.c_char * size).from_address(address)
        weakref.finalize(buffer, free.append, address).atexit = False  # it dies with the last tensor over it
        return torch.frombuffer(buffer, dtype=dtype, count=size // dtype.itemsize).as_strided(shape, stride)

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether it is from here."""
        return storage_of(tensor) in self._addresses

    def spoil(self) -> None:
        """Fill everything with what is no number."""
        for block in self._blocks:
            ctypes.memset(block, 0xFF, len(block))


def storage_of(tensor: torch.Tensor) -> int:
    """The address of the memory that a tensor is in, which views share."""
    return tensor.untyped_storage().data_ptr()
