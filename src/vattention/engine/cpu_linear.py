"""Linear layers over a few rows on a CPU, as fast as their weights can be read: one call for all that share an input.

oneDNN's product by packed weights is as fast where memory is slow, and costs more to call; with more than a few rows it
is the faster one (`engine.linears` chooses). bfloat16 alone, on processors that multiply it.

The kernel is cpu_linear.cpp, compiled at first use (`attention.native`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vattention.attention import native, recording
from vattention.engine.kept import Kept

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


@dataclass(frozen=True, slots=True)
class _Layers:
    """What does not change between calls of the same layers.

    Attributes:
        addresses: of the weights and biases, by which the layers are known.
        array: of `_Layer`; `address` is its own.
        outputs: of all layers together.
    """

    addresses: list[int]
    array: ctypes.Array[_Layer]
    address: int
    outputs: int


def linear(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """`x` `[..., inputs]` times every weight `[outputs, inputs]`, plus its bias, if any: `[..., all outputs]`.

    Returns:
        None for what the kernel does not compute: more than a few rows, other dtypes, what is not dense, processors
        that do not multiply bfloat16, and machines without a compiler.
    """
    inputs = x.shape[-1]
    rows = x.numel() // inputs
    if not 0 < rows <= MOST_ROWS or x.dtype != torch.bfloat16 or not x.is_contiguous():
        return None
    # This comes a hundred times between two tokens: what is known of the layers is not asked again.
    kept: Kept | None = getattr(weights[0], _KEPT, None)
    layers: _Layers | None = None if kept is None else kept.value
    if layers is None or layers.addresses != [tensor.data_ptr() for tensor in (*weights, *biases)]:
        layers = _find_layers(x, weights, biases)
        if layers is None:
            return None
    out = x.new_empty((*x.shape[:-1], layers.outputs))
    call = _Call(
        rows,
        inputs,
        inputs,
        layers.outputs,
        len(weights),
        torch.get_num_threads(),
        x.data_ptr(),
        out.data_ptr(),
        layers.address,
    )
    recording.call(_library().vattention_linear, call, layers, weights, biases)  # type: ignore[union-attr]
    return out


def _find_layers(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> _Layers | None:
    """Note what there is to know of layers, for as long as their weights live; None if the kernel cannot read them."""
    tensors = (*weights, *biases)
    dense = all(tensor.is_contiguous() and tensor.shape[-1] for tensor in tensors)
    if not dense or not native.readable(x, *tensors) or _library() is None:
        return None
    column, rows = 0, []
    for i, weight in enumerate(weights):
        rows.append(_Layer(weight.data_ptr(), biases[i].data_ptr() if biases else None, weight.shape[0], column))
        column += weight.shape[0]
    array = (_Layer * len(rows))(*rows)
    addresses = [tensor.data_ptr() for tensor in tensors]
    layers = _Layers(addresses, array, ctypes.addressof(array), column)
    setattr(weights[0], _KEPT, Kept(layers))
    return layers


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.load(_SOURCE)
    if library is not None:
        library.vattention_linear.restype = None
    return library
