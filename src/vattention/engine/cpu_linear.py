"""Linear layers over a few rows on a CPU, as fast as their weights can be read: one call for all that share an input.

oneDNN's product by packed weights is as fast where memory is slow, and costs more to call; with more than a few rows it
is the faster one (`engine.linears` chooses). bfloat16 alone, on processors that multiply it.

The kernel is cpu_linear.cpp, compiled at first use (`attention.native`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from vattention.attention import native

_SOURCE = Path(__file__).with_name("cpu_linear.cpp")
_KEPT = "vattention_layers"
"""The attribute of the first weight where what does not change between calls is kept."""

MOST_ROWS = 16
"""Rows up to which this is faster than packed weights: measured from 8 on, equal at about 24."""


class _Layer(ctypes.Structure):
    """`struct Layer` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("outputs", "column")),
    )


class _Call(ctypes.Structure):
    """`struct Call` of the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "x_row", "out_row", "layers", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "out", "layer")),
    )


def can(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> bool:
    """Whether the kernel computes this: few rows in bfloat16, inputs and weights dense."""
    return (
        x.dtype == torch.bfloat16
        and 0 < x.numel() <= MOST_ROWS * x.shape[-1]
        and x.is_contiguous()
        and all(weight.is_contiguous() for weight in weights)
        and native.readable(x, *weights)
        and _library() is not None
    )


def linear(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """`x` `[..., inputs]` times every weight `[outputs, inputs]`, plus its bias, if any: `[..., all outputs]`.

    Only what `can` accepts.
    """
    library = _library()
    assert library is not None
    layers, outputs = _layers(weights, biases)
    out = x.new_empty((*x.shape[:-1], outputs))
    inputs = x.shape[-1]
    rows = x.numel() // inputs
    threads = torch.get_num_threads()
    call = _Call(rows, inputs, inputs, outputs, len(weights), threads, x.data_ptr(), out.data_ptr(), layers)
    library.vattention_linear(ctypes.byref(call))
    return out


def _layers(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> tuple[int, int]:
    """The address of an array of `_Layer`, and the sum of their outputs. Made again where a tensor has moved."""
    addresses = [tensor.data_ptr() for tensor in (*weights, *biases)]
    kept = getattr(weights[0], _KEPT, None)
    if kept is None or kept[0] != addresses:
        column, layers = 0, []
        for i, weight in enumerate(weights):
            layers.append((weight.data_ptr(), biases[i].data_ptr() if biases else None, weight.shape[0], column))
            column += weight.shape[0]
        array = (_Layer * len(layers))(*layers)
        kept = (addresses, ctypes.addressof(array), column, array)
        setattr(weights[0], _KEPT, kept)
    return kept[1], kept[2]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel; None where there is no compiler, or the processor has not what it takes."""
    library = native.load(_SOURCE)
    if library is None:
        return None
    library.vattention_linear_works.restype = ctypes.c_int64
    if not library.vattention_linear_works():
        return None
    library.vattention_linear.restype = None
    return library
