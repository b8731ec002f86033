"""`vattention bench kernels`: decode attention on the CPU, against what the memory can deliver.

One new token of each request attends to K and V in the slots of a real cache: one call a layer, over enough layers that
none is still in the processor's caches when its turn comes again. Every side computes every layer, in rounds that
alternate. The limit is the time that reading the bytes of K and V takes at the rate at which torch sums a large tensor,
measured in the same rounds, on the same threads.

Beside them stands the same kernel over a paged cache: as many bytes in blocks of 16 and of 256 tokens, in the random
order that blocks have after a while of serving. What differs from `cpu_decode` is where tokens are, and nothing else.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from vattention.attention import cpu_decode, sdpa
from vattention.attention.base import Attend, Features, Segment
from vattention.bench.machine import check_writable, write_json
from vattention.cache import KVCache, KVLayout
from vattention.errors import ConfigError

_BYTES = 256 << 20  # of K and V at least, and of what is read for the limit: several times the caches of a processor
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LAYOUTS = {"token-major": False, "head-major": True}
_BLOCK_SIZES = (16, 256)

View = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class KernelBench:
    """The options of the command.

    Attributes:
        heads: query heads, KV heads and width of each shape, as "9/3x64".
        requests: that decode together, each of the same length.
        lengths: tokens of each request, its new one included.
        rounds: of each side.
    """

    heads: Sequence[str] = ("9/3x64", "32/8x128")
    requests: int = 8
    lengths: Sequence[int] = (512, 4096)
    dtypes: Sequence[str] = ("bfloat16", "float32")
    layouts: Sequence[str] = tuple(_LAYOUTS)
    rounds: int = 7
    json: str | None = None
    command: str = ""


@dataclass(frozen=True)
class Case:
    """One combination. `heads` are (query heads, KV heads, width)."""

    heads: tuple[int, int, int]
    requests: int
    length: int
    dtype: str
    layout: str

    @property
    def bytes(self) -> int:
        """Of K and V that one layer has to read."""
        _, kv_heads, width = self.heads
        return 2 * self.requests * self.length * kv_heads * width * _DTYPES[self.dtype].itemsize


def run(options: KernelBench) -> int:
    """Measure every combination, print the table, write the JSON. Returns the exit code, 0."""
    check_writable(options.json)
    shapes = [_parse(heads) for heads in options.heads]
    for given, known in ((options.dtypes, _DTYPES), (options.layouts, _LAYOUTS)):
        if wrong := set(given) - set(known):
            raise ConfigError(f"{', '.join(sorted(wrong))}: known are {', '.join(known)}")
    if options.requests < 1 or options.rounds < 1 or min(options.lengths) < 1:
        raise ConfigError("requests, rounds and lengths are 1 or more")
    threads = torch.get_num_threads()
    print(f"{options.requests} requests, {threads} threads; microseconds a layer, and share of the limit; medians")
    results: list[tuple[Case, dict[str, float]]] = []
    for heads, length, dtype, layout in itertools.product(shapes, options.lengths, options.dtypes, options.layouts):
        case = Case(heads, options.requests, length, dtype, layout)
        seconds = {name: statistics.median(each) for name, each in measure(case, rounds=options.rounds).items()}
        if not results:
            print(_line(["heads", "tokens", "dtype", "layout", *seconds]))
        print(_row(case, seconds), flush=True)
        results.append((case, seconds))
    write_json(
        options.json,
        options.command,
        {
            "threads": threads,
            "results": [{**asdict(case), "bytes": case.bytes, "seconds": median} for case, median in results],
        },
    )
    return 0


@torch.inference_mode()
def measure(case: Case, *, rounds: int) -> dict[str, list[float]]:
    """Seconds a layer of every side in every round: the limit, and what can compute this case."""
    q_heads, kv_heads, width = case.heads
    dtype = _DTYPES[case.dtype]
    layers = max(2, -(-_BYTES // case.bytes))
    layout = KVLayout(layers, kv_heads, width, dtype, case.requests, case.length, head_major=_LAYOUTS[case.layout])
    with KVCache(layout, memory=2 * layers * case.bytes + (64 << 20)) as cache:
        slots = [cache.alloc() for _ in range(case.requests)]
        cache.step({slot: case.length for slot in slots if slot is not None})
        views = [cache.layer(layer) for layer in range(layers)]
        for view in itertools.chain.from_iterable(views):
            view[:, : case.length] = torch.randn(case.length, kv_heads, width).to(dtype)
        query = torch.randn(case.requests, q_heads, width).to(dtype).transpose(0, 1)
        read = torch.ones(max(_BYTES, case.bytes) // 4)
        contiguous = {name: (side, views) for name, side in _sides(case, query).items()}
        sides = {**contiguous, **_paged_sides(case, query, views)}
        for side, own in sides.values():
            side(own[0])  # what is made at first use
        seconds: dict[str, list[float]] = {}
        for _ in range(rounds):
            per_byte = _seconds(read.sum) / read.nbytes
            seconds.setdefault("limit", []).append(per_byte * case.bytes)
            for name, (side, own) in sides.items():
                passed = _seconds(partial(_each, side, own))
                seconds.setdefault(name, []).append(passed / layers)
    return seconds


def _sides(case: Case, query: torch.Tensor) -> dict[str, Callable[[View], object]]:
    segments = [Segment(number, number, 1, case.length) for number in range(case.requests)]
    features = Features()
    stock = sdpa.prepare(segments, dtype=query.dtype, device=query.device)
    sides: dict[str, Callable[[View], object]] = {}
    if cpu_decode.can(query, *(torch.empty(1, case.heads[2], dtype=query.dtype) for _ in "kv")):
        own = cpu_decode.prepare(segments)

        def kernel(view: View) -> None:
            out = query.new_empty((case.requests, *case.heads[::2]))  # rows, query heads, width
            own(query, *view, features, out)

        sides["cpu_decode"] = kernel
    sides["sdpa, folded"] = partial(_call, stock, query, features)
    sides["sdpa, one call"] = partial(_one_call, case, query)
    sides["sdpa, enable_gqa"] = partial(_enable_gqa, case, query)
    return sides


def _paged_sides(
    case: Case, query: torch.Tensor, views: Sequence[View]
) -> dict[str, tuple[Callable[[View], object], list[View]]]:
    """The kernel over blocks, with layers of its own."""
    if not cpu_decode.can(query, *views[0], paged=True):
        return {}
    segments = [Segment(number, number, 1, case.length) for number in range(case.requests)]
    features = Features()
    sides: dict[str, tuple[Callable[[View], object], list[View]]] = {}
    for size in _BLOCK_SIZES:
        columns = -(-case.length // size)
        table = torch.randperm(case.requests * columns, dtype=torch.int32).view(case.requests, columns)
        own = cpu_decode.prepare(segments, table)

        def kernel(view: View, own: Callable[..., None] = own) -> None:
            out = query.new_empty((case.requests, *case.heads[::2]))  # rows, query heads, width
            own(query, *view, features, out)

        layers = [(_in_blocks(case, k, table, size), _in_blocks(case, v, table, size)) for k, v in views]
        sides[f"paged, {size}"] = kernel, layers
    return sides


def _in_blocks(case: Case, side: torch.Tensor, table: torch.Tensor, size: int) -> torch.Tensor:
    """K or V of a layer, `[slots, tokens, heads, width]`, in the blocks of `table`, each in the layout of the case."""
    _, kv_heads, width = case.heads
    if _LAYOUTS[case.layout]:
        blocks = side.new_empty((table.numel(), kv_heads, size, width)).transpose(1, 2)
    else:
        blocks = side.new_empty((table.numel(), size, kv_heads, width))
    for row, slot in zip(table.tolist(), side, strict=True):
        for column, block in enumerate(row):
            part = slot[column * size : min((column + 1) * size, case.length)]
            blocks[block, : len(part)] = part
    return blocks


def _call(attend: Attend, query: torch.Tensor, features: Features, view: View) -> object:
    """Request by request, the queries of a group as rows: what the engine does without a compiler."""
    return attend(query, *view, features)


def _one_call(case: Case, query: torch.Tensor, view: View) -> object:
    """The same for all requests at once, which only requests of one length allow."""
    keys, values = (x[:, : case.length].transpose(1, 2) for x in view)
    q_heads, kv_heads, width = case.heads
    folded = query.transpose(0, 1).reshape(case.requests, kv_heads, q_heads // kv_heads, width)
    return scaled_dot_product_attention(folded, keys, values)


def _enable_gqa(case: Case, query: torch.Tensor, view: View) -> object:
    """What transformers calls, for all requests at once."""
    keys, values = (x[:, : case.length].transpose(1, 2) for x in view)
    return scaled_dot_product_attention(query.transpose(0, 1)[:, :, None], keys, values, enable_gqa=True)


def _each(side: Callable[[View], object], views: Sequence[View]) -> None:
    for view in views:
        side(view)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _parse(heads: str) -> tuple[int, int, int]:
    try:
        q_heads, rest = heads.split("/")
        kv_heads, width = rest.split("x")
        numbers = int(q_heads), int(kv_heads), int(width)
    except ValueError:
        raise ConfigError(f"heads {heads!r}: write query heads/KV headsxwidth, such as 9/3x64") from None
    if min(numbers) < 1 or numbers[0] % numbers[1]:
        raise ConfigError(f"heads {heads!r}: as many query heads for every KV head, and a width")
    return numbers


def _line(cells: Sequence[object]) -> str:
    """A line of the table: rows are printed as they are measured, so columns have widths that are enough for all."""
    text = [f"{cell!s:<12}" for cell in cells[:4]]
    return "".join([*text, *(f"{cell!s:>18}" for cell in cells[4:])]).rstrip()


def _row(case: Case, seconds: dict[str, float]) -> str:
    q_heads, kv_heads, width = case.heads
    shares = (f"{each * 1e6:.0f} ({seconds['limit'] / each:.0%})" for each in seconds.values())
    return _line([f"{q_heads}/{kv_heads}x{width}", case.length, case.dtype, case.layout, *shares])
