"""Linear layers on a CPU in bfloat16, for any number of rows: as fast as weights are read, or products computed.

The weights are laid out for it once, in a copy. Unlike a library that generates code for every shape, nothing is made
anew when a pass has a number of rows that none had before; and what a row gets does not depend, to the last bit, on the
others, on how many they are, nor on the number of threads.

The kernel is cpu_linear.cpp, compiled at first use (`attention.native`).
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from vattention.attention import native, recording
from vattention.engine import huge_pages

_library = native.on_demand(Path(__file__).with_name("cpu_linear.cpp"), vattention_linear=None, vattention_pack=None)
_OUTPUTS = 32
"""Outputs of a block of packed weights; the last one is filled up."""


class _Call(ctypes.Structure):
    """`struct Call` of the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "packed", "bias", "out")),
    )


def can(weight: torch.Tensor) -> bool:
    """Whether the kernel multiplies by this weight: bfloat16, an even number of inputs, and a processor for it."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0 and works()


class Linear:
    """A linear layer whose weights are packed.

    Args:
        weight: `[outputs, inputs]`; only what `can` accepts.
        bias: `[outputs]` or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        library = _library()
        assert library is not None
        self._run = library.vattention_linear
        self._outputs, self._inputs = weight.shape
        self._bias = None if bias is None else bias.float().contiguous()
        blocks = -(-self._outputs // _OUTPUTS)
        self._packed = huge_pages.empty(blocks * _OUTPUTS * self._inputs, torch.bfloat16)
        rows = weight.detach().contiguous()
        library.vattention_pack(
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (rows, self._packed)),
            *map(ctypes.c_int64, (self._outputs, self._inputs, torch.get_num_threads())),
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., inputs] -> [..., outputs]`, bfloat16."""
        x = x.contiguous()
        out = x.new_empty((*x.shape[:-1], self._outputs))
        call = _Call(
            x.numel() // self._inputs,
            self._inputs,
            self._outputs,
            torch.get_num_threads(),
            x.data_ptr(),
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            out.data_ptr(),
        )
        recording.call(self._run, call, self._packed, self._bias)
        return out


def works() -> bool:
    """Whether the kernel could be compiled, for a processor that has what it takes."""
    return _library() is not None
