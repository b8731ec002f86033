"""FlexAttention on the slots as they are: soft caps, sinks, float32, and V of another width than K, on any device.

torch compiles it for what a layer asks for; lengths, slots and windows are numbers in tensors, so that one piece of
code serves every batch. What a request may look at is told in blocks of keys (a `BlockMask`), made once a batch.

A kernel reads whole blocks of K and V, and multiplies what it then hides by zero, which NaN survives. So it is given
nothing but tokens that are there:
- a prompt is a call of its own, over exactly its `length` tokens: the kernel itself stops at the end of a tensor;
- decodes are one call over all slots, in which each request sees its full blocks and no other. The tokens behind the
  last full block, at least one and at most a block of them, are gathered, computed beside it, and weighed together
  with the rest by the logsumexp of both. Nothing of this depends on a number the host has to know, so that it can be
  captured in a graph.
On a CPU FlexAttention returns no logsumexp: decodes are computed like prompts there, and sinks are not.

Sources: https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html, arXiv 2412.05496; weighing parts of a
softmax: FlashDecoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from vattention.attention import native
from vattention.attention.base import Attend, Features, Segment
from vattention.attention.decode_plan import DecodeRows
from vattention.attention.placing import place
from vattention.attention.sinks import weigh
from vattention.attention.splitting import decodes_apart

BLOCK = 128
"""Keys, and rows, of a block: what every kernel of FlexAttention takes."""

_NARROWEST = 16
"""Width that a matrix product on a GPU needs."""

_ALIGNMENT = 16
"""Bytes."""

_failure: Exception | None = None
"""What a compiler said: it would say so again, of everything."""


class CannotCompile(Exception):
    """There is no compiled FlexAttention in this process. Whoever asked computes the same in another way."""


def missing(device: torch.device) -> str | None:
    """Why there is none for this device; None where there may be."""
    if _failure is not None:
        return f"it could not be compiled here ({type(_failure).__name__})"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "it needs Triton, which is not installed or does not know this GPU"
    if device.type != "cpu":
        return "it is for GPUs and CPUs"
    try:
        native.find_compiler()
    except FileNotFoundError as error:
        return str(error)
    return None


def can(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> bool:
    """Whether FlexAttention computes this."""
    narrowest = min(keys.shape[3], values.shape[3])
    sides = (keys, values)
    return (
        query.dtype == keys.dtype == values.dtype
        and query.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and narrowest >= (_NARROWEST if keys.device.type == "cuda" else 1)
        # Otherwise compiled code copies a whole layer first.
        and not any((side.data_ptr() | side.stride(1) * side.element_size()) % _ALIGNMENT for side in sides)
        and (features.sinks is None or keys.device.type != "cpu")
    )


def prepare(segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> Attend:
    """The `Kernel` of this file, for layers that it `can`. Raises CannotCompile when it is called."""
    if device.type == "cpu":
        return _prompts(segments, device)
    return decodes_apart(segments, device, decode, lambda several: _prompts(several, device))


def decode(rows: DecodeRows) -> Attend:
    """Attention of decodes alone, for layers that this kernel `can`, but not on a CPU."""

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        window = features.window
        most = -(-keys.shape[1] // BLOCK)
        if window is not None:
            most = min(most, window // BLOCK + 1)
        derive = functools.partial(_blocks_of_slots, keys.shape[0], window)
        first, count, since, row = rows.keep(("flex", keys.shape[0], window), derive)
        ends = rows.keep(("flex rows", window), functools.partial(_ends_of_rows, window), torch.int64)
        most += 1  # two at least: see `_guarded`
        run = _compiled(_decode, features.softcap is not None, _kind(query, keys, values))
        numbers = (rows.slots_there, *ends, first, count, since, row, _places(most, keys.device))
        out, logsumexp = _guarded(run, query, keys, values, *numbers, *_floats(query, features))
        return out if features.sinks is None else weigh(out, logsumexp, features.sinks)

    return attend


def _prompts(segments: Sequence[Segment], device: torch.device) -> Attend:
    """Of requests with any number of rows, a call each."""

    @functools.cache
    def blocks(segment: Segment, window: int | None) -> tuple[torch.Tensor, ...]:
        return _blocks_of_rows(segment, window, device)

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        out = query.new_empty((query.shape[1], query.shape[0], values.shape[3]))
        kind = (*_kind(query, keys, values), features.sinks is not None)
        run = _compiled(_prompt, features.softcap is not None, kind)
        floats = _floats(query, features)
        for segment in segments:
            here = slice(segment.slot, segment.slot + 1)
            k, v = (side[here, : segment.length].transpose(1, 2) for side in (keys, values))
            q = query[None, :, segment.start : segment.end]
            part, *logsumexp = _guarded(run, q, k, v, *blocks(segment, features.window), *floats)
            if features.sinks is not None:
                part = weigh(part, logsumexp[0], features.sinks)
            out[segment.start : segment.end] = part
        return out

    return attend


# -- which blocks ---------------------------------------------------------------------------------------------------


def _blocks_of_rows(segment: Segment, window: int | None, device: torch.device) -> tuple[torch.Tensor, ...]:
    """For each block of rows of a request, the blocks of keys that it sees.

    Returns:
        `[blocks of rows]` int32 twice: the first block of keys that any row sees, and how many there are up to the
        last; int64 twice: tokens cached, and the window.
    """
    first, count = [], []
    for row in range(0, max(segment.rows, BLOCK + 1), BLOCK):  # two at least: see `_guarded`
        own = segment.cached + row
        start = 0 if window is None else max(0, own + 1 - window) // BLOCK
        end = -(-(segment.cached + min(row + BLOCK, segment.rows)) // BLOCK)
        first.append(start)
        count.append(end - start if row < segment.rows else 0)
    reach = segment.length if window is None else window
    return *place((first, count), device, torch.int32), *place([[segment.cached, reach]], device)[0].unbind()


def _blocks_of_slots(
    slots: int, window: int | None, of_rows: Sequence[int], lengths: Sequence[int]
) -> Sequence[Sequence[int]]:
    """For each slot of the cache: its first block that is seen, how many full ones follow, the first key seen, its row.

    Of rows that name the same slot the first is the one that counts.
    """
    first, count, since, row = [0] * slots, [0] * slots, [0] * slots, [0] * slots
    for number, slot, length in zip(reversed(range(len(of_rows))), of_rows[::-1], lengths[::-1], strict=True):
        row[slot] = number
        since[slot] = 0 if window is None else max(0, length - window)
        first[slot] = since[slot] // BLOCK
        count[slot] = max(0, (length - 1) // BLOCK - first[slot])
    return first, count, since, row


def _ends_of_rows(window: int | None, slots: Sequence[int], lengths: Sequence[int]) -> Sequence[Sequence[int]]:
    """For each row: the last key that it sees, and the first."""
    last = [length - 1 for length in lengths]
    return last, [0 if window is None else max(0, length - window) for length in lengths]


def _mask(
    first: torch.Tensor, count: torch.Tensor, places: torch.Tensor, shape: tuple[int, int], mask_mod: Any
) -> BlockMask:
    """Neighbouring blocks of keys.

    Args:
        first, count: `[batch, 1, blocks of rows]`.
        places: 0, 1, ..., as many as a row has blocks at most.
        shape: rows and keys.
    """
    # What lies behind the last block of a row is never looked up, but must be in range.
    indices = (first[..., None] + places).clamp_max((shape[1] - 1) // BLOCK)
    return BlockMask.from_kv_blocks(
        count, indices, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=shape, **_ONLY_FORWARD
    )


_ONLY_FORWARD: dict[str, Any] = (
    {"compute_q_blocks": False} if "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters else {}
)


# -- what is compiled -----------------------------------------------------------------------------------------------


def _prompt(capped: bool, kind: tuple[Any, ...]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Rows of one request over all its keys, see `_blocks_of_rows`; `[rows, q_heads, width]`, and the logsumexp."""

    def run(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        first: torch.Tensor,
        count: torch.Tensor,
        cached: torch.Tensor,
        window: torch.Tensor,
        scale: torch.Tensor,
        cap: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        def seen(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            own = row + cached
            return (key <= own) & (key > own - window)

        shape = (query.shape[2], keys.shape[2])
        places = torch.arange(shape[1] // BLOCK + 2, dtype=torch.int32, device=first.device)
        mask = _mask(first[None, None], count[None, None], places, shape, seen)
        score = _score(scale, cap if capped else None)
        if not kind[-1]:  # no logsumexp
            out = flex_attention(query, keys, values, score_mod=score, block_mask=mask, scale=1.0, enable_gqa=True)
            return (out[0].transpose(0, 1),)
        out, aux = flex_attention(
            query,
            keys,
            values,
            score_mod=score,
            block_mask=mask,
            scale=1.0,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )
        assert aux.lse is not None
        return out[0].transpose(0, 1), aux.lse[0].transpose(0, 1)

    return run


def _decode(capped: bool, kind: tuple[Any, ...]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """One row a request, see `_blocks_of_slots`; `[rows, q_heads, width]`, and the logsumexp `[rows, q_heads]`."""

    def run(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        last: torch.Tensor,
        begin: torch.Tensor,
        first: torch.Tensor,
        count: torch.Tensor,
        since: torch.Tensor,
        row_of_slot: torch.Tensor,
        places: torch.Tensor,
        scale: torch.Tensor,
        cap: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        def seen(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return key >= since[batch]

        by_row = query.transpose(0, 1)  # [rows, q_heads, width]
        every = by_row.index_select(0, row_of_slot)[:, :, None]  # [slots, q_heads, 1, width]
        shape = (1, keys.shape[1])
        mask = _mask(first[:, None, None], count[:, None, None], places, shape, seen)
        out, aux = flex_attention(
            every,
            keys.transpose(1, 2),
            values.transpose(1, 2),
            score_mod=_score(scale, cap if capped else None),
            block_mask=mask,
            scale=1.0,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )
        assert aux.lse is not None
        full, total = out[slots, :, 0], aux.lse[slots, :, 0]
        none = (count[slots] == 0)[:, None]
        total = total.masked_fill(none, float("-inf"))
        full = full.float().masked_fill(none[:, :, None], 0)

        end, end_total = _end(by_row, keys, values, slots, last, begin, scale, cap if capped else None)
        whole = torch.logaddexp(total, end_total)
        joined = full * torch.exp(total - whole)[:, :, None] + end * torch.exp(end_total - whole)[:, :, None]
        return joined.to(query.dtype), whole

    return run


def _end(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    last: torch.Tensor,
    begin: torch.Tensor,
    scale: torch.Tensor,
    cap: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the tokens behind a request's last full block, `[rows, q_heads, width]`, and its logsumexp."""
    rows, kv_heads = len(slots), keys.shape[2]
    places = last[:, None] // BLOCK * BLOCK + torch.arange(BLOCK, device=last.device)
    there = (places <= last[:, None]) & (places >= begin[:, None])
    places = torch.minimum(places, last[:, None])  # nothing past the end is read
    k, v = (side[slots[:, None], places].float() for side in (keys, values))  # [rows, BLOCK, kv_heads, width]
    grouped = query.float().unflatten(1, (kv_heads, -1))  # [rows, kv_heads, group, width]
    scores = torch.einsum("rhgd,rthd->rhgt", grouped, k) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~there[:, None, None], float("-inf"))
    total = scores.logsumexp(-1)
    out = torch.einsum("rhgt,rthd->rhgd", torch.exp(scores - total[..., None]), v)
    return out.reshape(rows, -1, values.shape[3]), total.reshape(rows, -1)


def _score(scale: torch.Tensor, cap: torch.Tensor | None) -> Any:
    """The scale and the cap as numbers in tensors: compiled code is for all of them, and is made but once."""

    def scaled(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return score * scale

    def capped(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        assert cap is not None
        return cap * torch.tanh(score * scale / cap)

    return scaled if cap is None else capped


# -- compiling ------------------------------------------------------------------------------------------------------


def _kind(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, ...]:
    """What layers that share compiled code have in common: all that would have it compiled anew."""
    shapes = (query.shape[0], *keys.shape[2:], values.shape[3])
    return query.dtype, keys.device, shapes, keys.stride(), values.stride()


def _floats(query: torch.Tensor, features: Features) -> tuple[torch.Tensor, ...]:
    """The scale and the cap of scores."""
    scale = query.shape[2] ** -0.5 if features.scaling is None else features.scaling
    return _on_device(scale, features.softcap or 0.0, query.device)


@functools.cache
def _on_device(scale: float, softcap: float, device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(number, dtype=torch.float32, device=device) for number in (scale, softcap))


@functools.cache
def _places(most: int, device: torch.device) -> torch.Tensor:
    return torch.arange(most, dtype=torch.int32, device=device)


@functools.cache
def _compiled(
    make: Callable[[bool, tuple[Any, ...]], Callable[..., Any]], capped: bool, kind: tuple[Any, ...]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """What `make(capped, kind)` returns, compiled for layers of that kind."""
    run = make(capped, kind)
    # Dynamo keeps what it compiled by code object, and gives up after a few: kinds of layers must not share one.
    run.__code__ = run.__code__.replace()
    return torch.compile(run, fullgraph=True, dynamic=True)


def _no_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in a tensor that is nobody's view. Of a view, what it is a view of decides what is compiled."""
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _guarded(run: Callable[..., tuple[torch.Tensor, ...]], *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Call what is compiled; where a compiler fails, say so once, and raise CannotCompile from then on.

    It is compiled for any sizes, but anew where one that was 1 is larger, or two that happened to be the same differ:
    once or twice, after which it fits them all. So nothing but rows may be one here, and single numbers have no size.
    """
    from torch._dynamo.exc import TorchDynamoException

    global _failure
    if _failure is not None:
        raise CannotCompile from _failure
    try:
        return run(*map(_no_view, args))
    except TorchDynamoException as error:
        _failure = error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        warnings.warn(
            f"FlexAttention cannot be compiled here ({type(error).__name__}: {reason[:300]}): layers that need it are"
            " computed by plain operations, which are slower",
            RuntimeWarning,
            stacklevel=2,
        )
        raise CannotCompile from error
