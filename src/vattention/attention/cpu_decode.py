"""Decoding on a CPU: one new token of each request over K and V of any lengths, all in one call of a kernel of our own.

torch's attention reads K and V once for each query head when there is a single row, or takes one call a request; this
reads every byte once, for all heads of a group, in the slots as they are, on all of torch's threads. Sliding windows,
soft caps, sinks, and K and V of different width are the kernel's own. It works in float32 whatever K and V are stored
as. What a request gets does not depend on the others in the batch, nor on the number of threads, to the last bit.

The kernel is cpu_decode.cpp, compiled at first use (`attention.native`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vattention.attention import native, recording
from vattention.attention.base import Attend, Features, Segment
from vattention.attention.decode_plan import DecodeRows

_SOURCE = Path(__file__).with_name("cpu_decode.cpp")
_NUMBERS = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
_WIDTHS = (64, 128)
"""Of K and V together: those compiled for by themselves; any other is computed by a build for all of them."""


class _Call(ctypes.Structure):
    """`struct Call` of the source; strides are in numbers."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("requests", "q_heads", "kv_heads", "k_width", "v_width")),
        *((name, ctypes.c_int64) for name in ("window", "threads")),
        *((name, ctypes.c_void_p) for name in ("k", "v", "q", "out")),
        *((name, ctypes.c_int64) for name in ("k_slot", "k_token", "k_head", "v_slot", "v_token", "v_head")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "out_row", "out_head")),
        *((name, ctypes.c_void_p) for name in ("slots", "rows", "lengths", "mask")),
        ("mask_row", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sinks", "scratch")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("table_row", "block_size")),
    )


@dataclass(frozen=True, eq=False)
class Requests:
    """Who attends, `[requests]` int64 each.

    Attributes:
        slots: where the K and V of each are.
        rows: the row of the query and of the output.
        lengths: tokens of each, its new one included; at least 1.
    """

    slots: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Requests:
        """Those of segments of one row."""
        return cls(
            torch.tensor([segment.slot for segment in segments], dtype=torch.int64),
            torch.tensor([segment.start for segment in segments], dtype=torch.int64),
            torch.tensor([segment.length for segment in segments], dtype=torch.int64),
        )


def can(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, paged: bool = False) -> bool:
    """Whether the kernel reads these: on the CPU, of one dtype, each head's numbers side by side, none to be trained.

    `paged` as for `decode` with a table. The first time this compiles the kernel, or finds that it cannot be compiled.
    """
    return (
        query.dtype in _NUMBERS
        and native.readable(query, keys, values)
        and _library(query.dtype, keys.shape[-1], values.shape[-1], paged) is not None
    )


def decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    features: Features,
    requests: Requests,
    out: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
) -> None:
    """Compute the rows of `out` that belong to `requests`. Only what `can` accepts.

    Args:
        query: `[rows, q_heads, width]`.
        keys: `[slots, tokens, kv_heads, width]`; values likewise, of any width.
        requests: slots and rows must exist, and lengths must be within the tokens: nothing is checked.
        out: `[rows, q_heads, width of V]`, other rows are left alone.
        mask: boolean `[requests, tokens]`: which tokens count. One that does not is not read, and a request in which
            none does gets 0.
        table: int32 `[slots, blocks of a slot]`: keys and values are `[blocks, block_size, kv_heads, width]`, and this
            says which blocks a slot's tokens are in. The same kernel but for addresses.
    """
    _Prepared(query, keys, values, features, requests, out, mask, table).run(query, keys, values, out)


class _Prepared:
    """A call without its tensors, which `run` puts in: those of any layer of the same shape. For one thread."""

    def __init__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        features: Features,
        requests: Requests,
        out: torch.Tensor,
        mask: torch.Tensor | None,
        table: torch.Tensor | None,
        bound: int | None = None,
    ) -> None:
        width, value_width = keys.shape[3], values.shape[3]
        library = _library(query.dtype, width, value_width, table is not None)
        assert library is not None
        sinks = None if features.sinks is None else features.sinks.float().contiguous()
        self._decode = library.vattention_decode
        self._kept = (requests, mask, table, sinks)
        self._call = call = _Call(
            requests=len(requests.slots),
            q_heads=query.shape[1],
            kv_heads=keys.shape[2],
            k_width=width,
            v_width=value_width,
            window=features.window or 0,
            threads=torch.get_num_threads(),
            slots=requests.slots.data_ptr(),
            rows=requests.rows.data_ptr(),
            lengths=requests.lengths.data_ptr(),
            mask=None if mask is None else mask.data_ptr(),
            mask_row=0 if mask is None else mask.stride(0),
            sinks=None if sinks is None else sinks.data_ptr(),
            scale=width**-0.5 if features.scaling is None else features.scaling,
            softcap=features.softcap or 0.0,
            table=None if table is None else table.data_ptr(),
            table_row=0 if table is None else table.stride(0),
            block_size=keys.shape[1],
        )
        call.k_slot, call.k_token, call.k_head = keys.stride()[:3]
        call.v_slot, call.v_token, call.v_head = values.stride()[:3]
        call.q_row, call.q_head = query.stride()[:2]
        call.out_row, call.out_head = out.stride()[:2]
        if bound is not None:  # room for lengths that are to come: nobody touches it before
            longest = torch.full_like(requests.lengths, bound)
            call.lengths = longest.data_ptr()
        self._scratch = torch.empty(library.vattention_scratch(ctypes.byref(call)), dtype=torch.uint8)
        call.lengths = requests.lengths.data_ptr()
        call.scratch = self._scratch.data_ptr()

    def run(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        """Fill in the rows of `out`."""
        call = self._call
        call.q, call.k, call.v, call.out = query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr()
        recording.call(self._decode, call, self._kept, self._scratch)


def prepare(segments: Sequence[Segment], table: torch.Tensor | None = None) -> Callable[..., None]:
    """The rows of `segments`, which have one each, as a function of what differs between layers.

    It takes `query` `[q_heads, rows, width]`, keys, values and features as an `Attend` does, and `out`
    `[rows, q_heads, width of V]`, where it fills in its rows. `table` as for `decode`.
    """
    return _prepared(Requests.of(segments), table)


def follow(rows: DecodeRows, table: torch.Tensor | None = None) -> Attend:
    """Attention of decodes whose numbers change in place; only what `can` accepts. `table` as for `decode`."""
    (lengths,) = rows.keep("lengths", lambda _, lengths: [lengths], torch.int64)
    fill = _prepared(Requests(rows.slots_there, torch.arange(len(rows)), lengths), table, bound=rows.bound)

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        out = query.new_empty((query.shape[1], query.shape[0], values.shape[3]))
        fill(query, keys, values, features, out)
        return out

    return attend


def _prepared(requests: Requests, table: torch.Tensor | None, *, bound: int | None = None) -> Callable[..., None]:
    """See `prepare`. No length will be larger than `bound`; None: they stay as they are."""
    known: dict[tuple[object, ...], _Prepared] = {}

    def attend(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features, out: torch.Tensor
    ) -> None:
        by_row = query.transpose(0, 1)
        if features.sinks is not None:  # which are each layer's own
            _Prepared(by_row, keys, values, features, requests, out, None, table, bound).run(by_row, keys, values, out)
            return
        asked = (features.scaling, features.window, features.softcap, query.dtype, query.shape, keys.shape)
        shape = (*asked, values.shape, query.stride(), keys.stride(), values.stride(), out.stride())
        if shape not in known:
            known[shape] = _Prepared(by_row, keys, values, features, requests, out, None, table, bound)
        known[shape].run(by_row, keys, values, out)

    return attend


_libraries: dict[tuple[torch.dtype, int, bool], ctypes.CDLL | None] = {}


def _library(dtype: torch.dtype, width: int, value_width: int, paged: bool = False) -> ctypes.CDLL | None:
    known = width if width == value_width and width in _WIDTHS else 0
    key = (dtype, known, paged)
    if key not in _libraries:
        library = native.load(_SOURCE, NUMBERS=_NUMBERS[dtype], WIDTH=known, WHERE="Blocks" if paged else "Slots")
        if library is not None:
            library.vattention_scratch.restype = ctypes.c_int64
            library.vattention_decode.restype = None
        _libraries[key] = library
    return _libraries[key]
