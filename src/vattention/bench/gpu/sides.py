"""Attention by every library there is, over the same K and V: contiguous in slots, and in blocks behind a table.

A *side* is one library over one of the two. Contiguous sides read the slots of a real `KVCache`, in memory mapped page
by page; paged sides read blocks in random order, in memory that torch allocated, as paged engines do. All sides of a
case compute the same numbers, which is checked before anything is timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from vattention.attention import choose, paged
from vattention.attention.base import Attend, Features, Segment
from vattention.cache import KVCache, KVLayout
from vattention.errors import VAttentionError

Compute = Callable[[int], torch.Tensor]
"""From the number of a layer to `[rows, q_heads, width]`."""

_WORKSPACE = 256 << 20  # of FlashInfer
_PAGE = 64  # of FlashInfer over slots
_BLOCKS = {"torch": 256, "FlashAttention-2": 256, "FlashAttention-3": 16, "FlashInfer": 16, "gathered": 16}
"""Tokens of a block: the paper's for FlashInfer and FlashAttention-2; torch's is FlashAttention-2 inside."""


@dataclass(frozen=True)
class Case:
    """One batch: `requests` of `length` tokens each, of which the last `rows` are new.

    Attributes:
        q_heads, kv_heads, width: of the model.
        layers: that hold K and V of their own, to read others each time.
    """

    q_heads: int
    kv_heads: int
    width: int
    requests: int
    length: int
    rows: int
    layers: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Of K and V of one layer."""
        return 2 * self.requests * self.length * self.kv_heads * self.width * self.dtype.itemsize

    @property
    def operations(self) -> float:
        """Multiplications and additions of one layer, causal."""
        pairs = self.rows * (self.length - self.rows) + self.rows * (self.rows + 1) / 2
        return 4.0 * self.requests * self.q_heads * self.width * pairs

    @property
    def segments(self) -> list[Segment]:
        """The batch, a slot a request."""
        return [Segment(n, n * self.rows, self.rows, self.length) for n in range(self.requests)]


@dataclass
class Data:
    """The numbers of a case.

    Attributes:
        query: `[rows of all, q_heads, width]`.
        layers: K and V of each layer in slots, `[requests, padded_len, kv_heads, width]`.
    """

    case: Case
    query: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    _blocks: dict[int, tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]] = field(default_factory=dict)

    def blocks(self, size: int) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """The same numbers in blocks of `size` tokens: the table `[requests, blocks]` int32, and K and V of each layer,
        `[blocks, size, kv_heads, width]`. Made once, and kept until another size is asked for.
        """
        if size not in self._blocks:
            self._blocks.clear()
            case = self.case
            columns = -(-case.length // size)
            order = torch.randperm(case.requests * columns, generator=torch.Generator().manual_seed(0))
            table = order.to(torch.int32).view(case.requests, columns).to(case.device)
            self._blocks[size] = (
                table,
                [(self._in_blocks(k, table, size), self._in_blocks(v, table, size)) for k, v in self.layers],
            )
        return self._blocks[size]

    def _in_blocks(self, side: torch.Tensor, table: torch.Tensor, size: int) -> torch.Tensor:
        case = self.case
        out = torch.zeros(table.numel(), size, case.kv_heads, case.width, dtype=case.dtype, device=case.device)
        whole, rest = divmod(case.length, size)
        for request, row in enumerate(table.long()):
            tokens = side[request, : case.length]
            out[row[:whole]] = tokens[: whole * size].unflatten(0, (whole, size))
            if rest:
                out[row[whole], :rest] = tokens[whole * size :]
        return out


@contextmanager
def data(case: Case, **layout: Any) -> Iterator[Data]:
    """Random numbers in the slots of a cache laid out by `layout`, see `KVLayout`. The cache is closed afterwards."""
    shape = KVLayout(case.layers, case.kv_heads, case.width, case.dtype, case.requests, case.length, **layout)
    page = layout.get("alignment")
    page = page if page is not None and page > 2 << 20 else None
    pages = sum(-(-case.length * stream.token_bytes // (page or 2 << 20)) for stream in shape.streams) + len(
        shape.streams
    )
    memory = (pages * case.requests + 1) * (page or 2 << 20)
    with KVCache(shape, device=case.device, memory=memory, page_size=page) as cache:
        slots = [cache.alloc() for _ in range(case.requests)]
        assert slots == list(range(case.requests))
        cache.step(dict.fromkeys(range(case.requests), case.length))
        random = torch.Generator(device=case.device).manual_seed(0)
        layers = [cache.layer(layer) for layer in range(case.layers)]
        for side in (side for layer in layers for side in layer):
            for slot in side[:, : case.length]:
                slot.normal_(generator=random)
        query = torch.empty(case.requests * case.rows, case.q_heads, case.width, dtype=case.dtype, device=case.device)
        yield Data(case, query.normal_(generator=random), layers)


Sides = Mapping[str, Callable[[Data], Compute]]
"""By name, "library, contiguous" or "library, paged": what makes a side ready. It may fail, which leaves it out."""


def sides(device: torch.device) -> Sides:
    """Those whose library is installed, and fit for the device."""
    found: dict[str, Callable[[Data], Compute]] = {"vattention, contiguous": ours}
    if device.type == "cpu":
        return {**found, "vattention, paged": _gathered}
    found["gathered, paged"] = _gathered
    torch_varlen = _torch_varlen()
    if torch_varlen is not None:
        found["torch, contiguous"] = lambda data: _torch_contiguous(data, torch_varlen)
        found["torch, paged"] = lambda data: _torch_paged(data, torch_varlen)
    for name, module in (("FlashAttention-2", "flash_attn"), ("FlashAttention-3", "flash_attn_interface")):
        if importlib.util.find_spec(module) is not None:
            found |= flash_attention(name, importlib.import_module(module).flash_attn_with_kvcache)
    if importlib.util.find_spec("flashinfer") is not None:
        found |= flashinfer(importlib.import_module("flashinfer"))
    return found


def ready(made: Sides, data: Data, *, tolerance: float = 0.02) -> tuple[dict[str, Compute], dict[str, str]]:
    """The sides that compute what the first one does, and of the others why they are left out.

    Args:
        tolerance: largest difference of a number over the largest number of the first side.
    """
    computes: dict[str, Compute] = {}
    reasons: dict[str, str] = {}
    expected: torch.Tensor | None = None
    for name, make in made.items():
        try:
            compute = make(data)
            got = compute(0).float()
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
            AssertionError,
            ImportError,
            VAttentionError,
        ) as error:
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        if expected is None:
            expected = got
        error_share = float((got - expected).abs().max() / expected.abs().max())
        if not error_share <= tolerance:
            reasons[name] = f"its numbers are {error_share:.3f} off"
            continue
        computes[name] = compute
    return computes, reasons


# -- ours -----------------------------------------------------------------------------------------------------------


def ours(data: Data) -> Compute:
    """What the engine computes over slots."""
    return _attending(
        data, choose.prepare(data.case.segments, dtype=data.case.dtype, device=data.case.device), data.layers
    )


def _gathered(data: Data) -> Compute:
    """What the engine does over blocks where no kernel follows a table: copy, then compute as over slots."""
    case = data.case
    table, layers = data.blocks(_BLOCKS["gathered"])
    attend = paged.prepare(case.segments, dtype=case.dtype, device=case.device, table=table.cpu(), inner=choose.prepare)
    return _attending(data, attend, layers)


def _attending(data: Data, attend: Attend, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> Compute:
    query, features = data.query.transpose(0, 1), Features()
    return lambda layer: attend(query, *layers[layer], features)


# -- torch ----------------------------------------------------------------------------------------------------------


def _torch_varlen() -> Callable[..., Any] | None:
    """`varlen_attn`, where it follows a block table."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "block_table" in inspect.signature(varlen_attn).parameters else None


def _torch_contiguous(data: Data, varlen: Callable[..., Any]) -> Compute:
    padded = data.layers[0][0].shape[1]
    starts = torch.arange(data.case.requests + 1, dtype=torch.int32, device=data.case.device) * padded
    flat = [(k.flatten(0, 1), v.flatten(0, 1)) for k, v in data.layers]
    call = _varlen_call(data, varlen)
    return lambda layer: call(*flat[layer], starts)


def _torch_paged(data: Data, varlen: Callable[..., Any]) -> Compute:
    table, layers = data.blocks(_BLOCKS["torch"])
    call = _varlen_call(data, varlen, block_table=table)
    return lambda layer: call(*layers[layer], None)


def _varlen_call(data: Data, varlen: Callable[..., Any], **more: Any) -> Callable[..., torch.Tensor]:
    case = data.case
    queries = torch.arange(case.requests + 1, dtype=torch.int32, device=case.device) * case.rows
    lengths = torch.full((case.requests,), case.length, dtype=torch.int32, device=case.device)
    window = (-1, 0) if case.rows > 1 else (-1, -1)  # a single row sees everything, and may be split

    def call(keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = varlen(
            data.query, keys, values, queries, starts, case.rows, case.length,
            window_size=window, enable_gqa=True, seqused_k=lengths, **more,
        )  # fmt: skip
        return out

    return call


# -- FlashAttention -------------------------------------------------------------------------------------------------


def flash_attention(name: str, with_cache: Callable[..., Any]) -> Sides:
    """Both sides of `flash_attn_with_kvcache`. Version 3 calls the table `page_table`."""
    table_argument = "page_table" if name == "FlashAttention-3" else "block_table"

    def side(data: Data, layers: list[tuple[torch.Tensor, torch.Tensor]], more: dict[str, Any]) -> Compute:
        case = data.case
        query = data.query.view(case.requests, case.rows, case.q_heads, case.width)
        lengths = torch.full((case.requests,), case.length, dtype=torch.int32, device=case.device)

        def compute(layer: int) -> torch.Tensor:
            out = with_cache(query, *layers[layer], cache_seqlens=lengths, causal=True, **more)
            out = out[0] if isinstance(out, tuple) else out
            return out.flatten(0, 1)

        return compute

    def over_blocks(data: Data) -> Compute:
        table, layers = data.blocks(_BLOCKS[name])
        return side(data, layers, {table_argument: table})

    return {f"{name}, contiguous": lambda data: side(data, data.layers, {}), f"{name}, paged": over_blocks}


# -- FlashInfer -----------------------------------------------------------------------------------------------------


def flashinfer(library: Any) -> Sides:
    """Paged by its wrappers; contiguous by its kernel for one request, or, of decodes, with a slot as so many pages."""

    def contiguous(data: Data) -> Compute:
        case = data.case
        if case.rows == 1:
            # A page list that is arithmetic: the library divides the work over keys in whole pages.
            size = math.gcd(data.layers[0][0].shape[1], _PAGE)
            in_slot = torch.arange(-(-case.length // size), dtype=torch.int32, device=case.device)
            slots = torch.arange(case.requests, dtype=torch.int32, device=case.device)
            table = slots[:, None] * (data.layers[0][0].shape[1] // size) + in_slot
            views = [(_in_pages(k, size), _in_pages(v, size)) for k, v in data.layers]
            return decode(data, table, size, views)
        return lambda layer: _each(library, data, layer)

    def over_blocks(data: Data) -> Compute:
        size = _BLOCKS["FlashInfer"]
        table, layers = data.blocks(size)
        return (decode if data.case.rows == 1 else prefill)(data, table, size, layers)

    def decode(data: Data, table: torch.Tensor, size: int, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> Compute:
        case = data.case
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(_workspace(case), "NHD", use_tensor_cores=True)
        wrapper.plan(
            *_pages(case, table, size), case.q_heads, case.kv_heads, case.width, size,
            q_data_type=case.dtype, kv_data_type=case.dtype,
        )  # fmt: skip
        return lambda layer: wrapper.run(data.query, layers[layer])

    def prefill(data: Data, table: torch.Tensor, size: int, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> Compute:
        case = data.case
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(_workspace(case), "NHD")
        queries = torch.arange(case.requests + 1, dtype=torch.int32, device=case.device) * case.rows
        wrapper.plan(
            queries, *_pages(case, table, size), case.q_heads, case.kv_heads, case.width, size,
            causal=True, q_data_type=case.dtype, kv_data_type=case.dtype,
        )  # fmt: skip
        return lambda layer: wrapper.run(data.query, layers[layer])

    return {"FlashInfer, contiguous": contiguous, "FlashInfer, paged": over_blocks}


def _in_pages(side: torch.Tensor, size: int) -> torch.Tensor:
    """A layer's slots as pages that lie behind one another: a view."""
    return side.flatten(0, 1).unflatten(0, (-1, size))


def _each(library: Any, data: Data, layer: int) -> torch.Tensor:
    case, (keys, values) = data.case, data.layers[layer]
    parts = [
        library.single_prefill_with_kv_cache(
            data.query[segment.start : segment.end],
            keys[segment.slot, : case.length],
            values[segment.slot, : case.length],
            causal=True,
        )
        for segment in case.segments
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pages(case: Case, table: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    columns = table.shape[1]
    starts = torch.arange(case.requests + 1, dtype=torch.int32, device=case.device) * columns
    last = torch.full((case.requests,), case.length - (columns - 1) * size, dtype=torch.int32, device=case.device)
    return starts, table.flatten().contiguous(), last


def _workspace(case: Case) -> torch.Tensor:
    return torch.empty(_WORKSPACE, dtype=torch.uint8, device=case.device)
