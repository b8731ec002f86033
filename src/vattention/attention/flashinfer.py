"""FlashInfer on the slots as they are: its kernel for one contiguous request for prompts, its paged one for decodes.

A page list is arithmetic here: a slot is so many neighbouring pages of a cache that has them all behind one another,
and the pages of a request are the first of its slot. `plan` looks at the lengths on the host and divides the work; it
runs once a pass for each kind of layer, and beside the graph where a pass is replayed from one.

Not for sinks. The library compiles kernels when they are first used, which takes minutes.

Sources: https://docs.flashinfer.ai (BatchDecodeWithPagedKVCacheWrapper, single_prefill_with_kv_cache) and their
docstrings in https://github.com/flashinfer-ai/flashinfer; csrc/batch_decode.cu for what is asked of strides.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from vattention.attention.base import Attend, Features, Segment
from vattention.attention.decode_plan import DecodeRows
from vattention.attention.family import Family
from vattention.attention.splitting import decodes_apart

_DTYPES = (torch.float16, torch.bfloat16)
_WIDTHS = (64, 128, 256)
_VECTOR = 8
_PAGE = 64
"""The most tokens of a page: work is divided over keys in whole pages."""

_WORKSPACE = 128 << 20
"""Bytes that the library recommends for partial results."""

_PLAIN_GROUPS = (1, 2)
"""Queries that share a KV head, with which it does without tensor cores."""

Library = Any
"""The module `flashinfer`, or what stands in for it."""


class _Kind(NamedTuple):
    """What a plan is for: layers of this shape, that ask for this."""

    q_heads: int
    kv_heads: int
    width: int
    page: int
    scaling: float | None
    window: int | None
    softcap: float | None


def family(library: Library | None = None) -> Family:
    """Each keeps its own plans: use one for each engine. `library` stands in for the real one, for tests."""
    wrappers: dict[_Kind, Any] = {}

    def prepare(segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> Attend:
        return decodes_apart(
            segments,
            device,
            lambda rows: _decode(rows, _library(library), device, lambda kind: _kept(wrappers, kind, library, device)),
            lambda several: _prompts(several, _library(library)),
        )

    return Family(
        missing=lambda device: None if library else _missing(device),
        can=_can,
        prepare=prepare,
        decode=lambda rows: _captured(rows, _library(library)),
    )


def _library(library: Library | None) -> Library:
    if library is not None:
        return library
    import flashinfer  # type: ignore[import-not-found]

    return flashinfer


def _missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it needs a GPU"
    if importlib.util.find_spec("flashinfer") is None:
        return "there is no package flashinfer"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def _can(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> bool:
    """Half precision, widths there are kernels for, slots that are one flat tensor, K and V with the same strides."""
    slot, token, head, number = keys.stride()
    aligned = token % _VECTOR == head % _VECTOR == 0
    return (
        features.sinks is None
        and query.dtype in _DTYPES
        and keys.dtype == values.dtype == query.dtype
        and keys.shape == values.shape
        and keys.stride() == values.stride()
        and keys.shape[3] in _WIDTHS
        and number == 1
        and aligned
        and slot == keys.shape[1] * token
        and not any(side.data_ptr() % (_VECTOR * side.element_size()) for side in (keys, values))
    )


def _prompts(segments: Sequence[Segment], library: Library) -> Attend:
    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        out = query.new_empty((query.shape[1], query.shape[0], values.shape[3]))
        for segment in segments:
            q = query[:, segment.start : segment.end].transpose(0, 1)  # [rows, q_heads, width]
            out[segment.start : segment.end] = library.single_prefill_with_kv_cache(
                q.contiguous(),
                keys[segment.slot, : segment.length],
                values[segment.slot, : segment.length],
                causal=True,
                sm_scale=features.scaling,
                window_left=_left(features.window, segment.length),
                logits_soft_cap=features.softcap,
            )
        return out

    return attend


def _decode(rows: DecodeRows, library: Library, device: torch.device, wrapper_for: Callable[[_Kind], Any]) -> Attend:
    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        page = math.gcd(keys.shape[1], _PAGE)
        asked = (features.scaling, features.window, features.softcap)
        kind = _Kind(query.shape[0], keys.shape[2], keys.shape[3], page, *asked)
        wrapper = wrapper_for(kind)
        pages_of_slot = keys.shape[1] // page
        rows.watch(
            ("flashinfer", kind), functools.partial(_plan, wrapper, kind, rows.bound, query.dtype, pages_of_slot)
        )
        paged = tuple(side.flatten(0, 1).unflatten(0, (-1, page)) for side in (keys, values))
        out: torch.Tensor = wrapper.run(query.transpose(0, 1).contiguous(), paged)
        return out

    return attend


def _plan(
    wrapper: Any,
    kind: _Kind,
    bound: int,
    dtype: torch.dtype,
    pages_of_slot: int,
    slots: Sequence[int],
    lengths: Sequence[int],
) -> None:
    """Tell the library where the tokens are. Everything is on the host, where it wants to look at it."""
    page = kind.page
    counts = torch.tensor([-(-length // page) for length in lengths], dtype=torch.int32)
    bounds = torch.zeros(len(slots) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=bounds[1:])
    pages = [
        torch.arange(slot * pages_of_slot, slot * pages_of_slot + count, dtype=torch.int32)
        for slot, count in zip(slots, counts.tolist(), strict=True)
    ]
    wrapper.plan(
        bounds,
        torch.cat(pages),
        torch.tensor([(length - 1) % page + 1 for length in lengths], dtype=torch.int32),
        kind.q_heads,
        kind.kv_heads,
        kind.width,
        page,
        sm_scale=kind.scaling,
        window_left=_left(kind.window, bound),
        logits_soft_cap=kind.softcap,
        q_data_type=dtype,
        kv_data_type=dtype,
    )


def _left(window: int | None, longest: int) -> int:
    """Keys before its own that a row sees; -1 for all of them."""
    return -1 if window is None or window >= longest else window - 1


def _kept(wrappers: dict[_Kind, Any], kind: _Kind, library: Library | None, device: torch.device) -> Any:
    """One for each kind of layer, planned anew for every pass."""
    if kind not in wrappers:
        make = _library(library).BatchDecodeWithPagedKVCacheWrapper
        wrappers[kind] = make(_workspace(device), "NHD", use_tensor_cores=_tensor_cores(kind))
    return wrappers[kind]


def _captured(rows: DecodeRows, library: Library) -> Attend:
    """With buffers of its own, which a graph reads and every `update` of the rows overwrites."""
    device = rows.slots_there.device

    @functools.cache
    def wrapper_for(kind: _Kind) -> Any:
        most = len(rows) * -(-rows.bound // kind.page)
        numbers = (torch.zeros(size, dtype=torch.int32, device=device) for size in (len(rows) + 1, most, len(rows)))
        return library.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(device),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=_tensor_cores(kind),
            **dict(
                zip(
                    ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer"),
                    numbers,
                    strict=True,
                )
            ),
        )

    return _decode(rows, library, device, wrapper_for)


def _tensor_cores(kind: _Kind) -> bool:
    return kind.q_heads // kind.kv_heads not in _PLAIN_GROUPS


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    """For partial results of one call at a time, which calls on one stream may share."""
    return torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
