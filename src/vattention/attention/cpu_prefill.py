"""Prompts on a CPU: several new tokens of each request over K and V of any lengths, all in one call of our own kernel.

torch's attention is several times slower than the processor multiplies matrices, and plain products of matrices write
scores to memory and read them back. This does what FlashAttention does, in bfloat16, on processors that multiply it
(AVX512-BF16); others, and other dtypes, are left to `blocked` and `sdpa`. Sliding windows, soft caps, sinks, and K and
V of different width are the kernel's own.

The kernel is cpu_prefill.cpp, compiled at first use (`attention.native`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vattention.attention import native
from vattention.attention.base import Features, Segment

_library = native.on_demand(
    Path(__file__).with_name("cpu_prefill.cpp"), vattention_prefill_scratch=ctypes.c_int64, vattention_prefill=None
)
_ALIGNMENT = 64


class _Call(ctypes.Structure):
    """`struct Call` of the source; strides are in numbers."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("segments", "q_heads", "kv_heads", "k_width", "v_width")),
        *((name, ctypes.c_int64) for name in ("window", "threads")),
        *((name, ctypes.c_void_p) for name in ("k", "v", "q", "out")),
        *((name, ctypes.c_int64) for name in ("k_slot", "k_token", "k_head", "v_slot", "v_token", "v_head")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "out_row", "out_head")),
        *((name, ctypes.c_void_p) for name in ("slots", "rows", "counts", "lengths", "sinks", "scratch")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


def can(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the kernel reads these, as `cpu_decode.can` says; bfloat16 alone, and on processors that multiply it."""
    return query.dtype == torch.bfloat16 and native.readable(query, keys, values) and _library() is not None


def prepare(segments: Sequence[Segment]) -> Callable[..., None]:
    """The rows of `segments`, of any number, as a function of what differs between layers.

    It takes `query` `[q_heads, rows, width]`, keys, values and features as an `Attend` does, and `out`
    `[rows, q_heads, width of V]`, where it fills in its rows.
    """
    numbers = torch.tensor([(s.slot, s.start, s.rows, s.length) for s in segments], dtype=torch.int64).T.contiguous()

    def attend(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features, out: torch.Tensor
    ) -> None:
        library = _library()
        assert library is not None
        sinks = None if features.sinks is None else features.sinks.float().contiguous()
        width = keys.shape[3]
        call = _Call(
            len(segments),
            query.shape[0],
            keys.shape[2],
            width,
            values.shape[3],
            features.window or 0,
            torch.get_num_threads(),
            keys.data_ptr(),
            values.data_ptr(),
            query.data_ptr(),
            out.data_ptr(),
            *keys.stride()[:3],
            *values.stride()[:3],
            query.stride(1),
            query.stride(0),
            *out.stride()[:2],
            *(row.data_ptr() for row in numbers),
            None if sinks is None else sinks.data_ptr(),
            None,
            width**-0.5 if features.scaling is None else features.scaling,
            features.softcap or 0.0,
        )
        pointer = ctypes.byref(call)
        scratch = torch.empty(library.vattention_prefill_scratch(pointer) + _ALIGNMENT, dtype=torch.uint8)
        call.scratch = -(-scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        library.vattention_prefill(pointer)

    return attend
