"""Decode passes as CUDA graphs: one launch in place of some hundred, for a number of rows fixed when it was captured.

A pass in which every request has one new token is the same work every time, but for numbers: tokens, positions, slots,
lengths. Those are in tensors that stay where they are (`attention.decode_batch`), K and V are at addresses that never
change, and pages come and go behind them: so what was captured once stays valid as requests grow, fork, leave and come.
`KVCache.step` is called before, so whatever a replay touches has pages; a replay maps nothing and waits for nothing.

There is a graph for each *bucket*, a number of rows; a pass takes the smallest that holds it, and the rest is padding.
All share one memory pool, which is sound because no two run at a time, and what one leaves is read before the next: the
logits of a pass are good until the next pass. The largest is captured first, and the others fit in what it needed.

While a graph is captured the lock of the page pool is held: nobody maps, unmaps, or waits for the device meanwhile,
which a stream that is being captured does not allow.

Where a pass cannot be captured (attention without a kernel that reads lengths on the device, a layer that asks the host
for a number, no memory) passes run as they are, after one warning. Source:
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch

from vattention.attention import choose
from vattention.attention.base import Layers
from vattention.attention.decode_batch import DecodeBatch, Plan
from vattention.attention.recording import CannotRecord
from vattention.engine.request import Chunk

MOST_ROWS = 512
"""Passes of more rows are never captured: launching their kernels takes less than computing them."""

Forward = Callable[[DecodeBatch], torch.Tensor]
"""The model over a batch: logits `[rows, vocabulary]`."""


class Captured(NamedTuple):
    """What a capture has made: run it again with `replay`, and find in `output` what it computes."""

    replay: Callable[[], None]
    output: torch.Tensor


class Capture(Protocol):
    """How work is captured: `CudaCapture`, and in tests something on the CPU that is as unforgiving."""

    def __call__(self, work: Callable[[], torch.Tensor]) -> Captured:
        """Run `work` as it is, for what is made on first use, and then capture it. Raises whatever that fails of."""


class Planner(Protocol):
    """Makes attention for a number of decodes: `choose.decode_plan`."""

    def __call__(self, rows: int, *, bound: int, dtype: torch.dtype, device: torch.device) -> Plan:
        """For rows of up to `bound` tokens, in the dtype and on the device of the cache."""


class CudaCapture:
    """Captures into CUDA graphs that share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def __call__(self, work: Callable[[], torch.Tensor]) -> Captured:
        """See `Capture`. Both on a stream of its own, for which libraries then have their workspaces."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                work()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate and map meanwhile: only this one must not.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = work()
        return Captured(graph.replay, output)


def buckets(most: int) -> tuple[int, ...]:
    """Rows of the graphs for passes of 1 to `most` requests, ascending: powers of two, from 16 on also those between.

    So padding is less than half of a pass, and from 16 on less than a third.
    """
    found, rows = [], 1
    while rows < most:
        found.append(rows)
        if rows >= 16 and rows * 3 // 2 < most:
            found.append(rows * 3 // 2)
        rows *= 2
    return *found, most


class DecodeGraphs:
    """The graphs of one model over one cache.

    Args:
        forward: runs the model; called when capturing only.
        layers: where K and V live.
        most: requests of the largest pass.
        bound: tokens that a request may have.
        capture: how.
        plan: attention for each bucket.
        lock: held while capturing, see above.
        exact: a bucket for every number of rows, and no padding.
        table: of a `PagedKVCache`.
        quiet: no warning where passes cannot be captured.
    """

    def __init__(
        self,
        forward: Forward,
        layers: Layers,
        *,
        most: int,
        bound: int,
        capture: Capture,
        lock: AbstractContextManager[object] = nullcontext(),  # noqa: B008 (it has no state)
        plan: Planner = choose.decode_plan,
        exact: bool = False,
        table: torch.Tensor | None = None,
        quiet: bool = False,
    ) -> None:
        self._exact = exact
        self._table = table
        self._quiet = quiet
        self._forward = forward
        self._layers = layers
        self._bound = bound
        self._capture = capture
        self._plan = plan
        self._lock = lock
        self._graphs: dict[int, tuple[DecodeBatch, Captured]] = {}
        self._failed = False
        self.buckets = tuple(range(1, most + 1)) if exact else buckets(min(most, MOST_ROWS))

    @property
    def captured(self) -> tuple[int, ...]:
        """The buckets that have a graph, ascending."""
        return tuple(sorted(self._graphs))

    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor | None:
        """A pass over `chunks`, one token each, which must have pages behind them. A bucket's first pass captures it.

        Returns:
            Logits `[chunks, vocabulary]`, overwritten by the next pass; None where it has to be run without a graph.
        """
        bucket = next((rows for rows in self.buckets if rows >= len(chunks)), None)
        if bucket is None or (self._failed and bucket not in self._graphs):
            return None
        tokens = [chunk.request.tokens(chunk.start, chunk.end)[0] for chunk in chunks]
        numbers = tokens, [chunk.slot for chunk in chunks], [chunk.end for chunk in chunks]
        if bucket not in self._graphs and not self._make(bucket, *numbers):
            return None
        batch, captured = self._graphs[bucket]
        batch.update(*numbers)
        try:
            captured.replay()
        except CannotRecord:
            self._failed = True
            self._graphs.clear()
            return None
        return captured.output[: len(chunks)]

    def capture_all(self, slot: int) -> None:
        """Capture what is not captured yet, the largest bucket first, on a slot whose first token has a page."""
        for bucket in reversed(self.buckets):
            if bucket not in self._graphs and not self._failed:
                self._make(bucket, [0], [slot], [1])

    def _make(self, bucket: int, tokens: Sequence[int], slots: Sequence[int], lengths: Sequence[int]) -> bool:
        """Capture a bucket, on a pass that is good. Returns whether that worked."""
        try:
            device, dtype = self._layers[0][0].device, self._layers[0][0].dtype
            plan = self._plan(bucket, bound=self._bound, dtype=dtype, device=device)
            batch = DecodeBatch(self._layers, bucket, plan, repeat=self._exact, table=self._table)
            batch.update(tokens, slots, lengths)
            with self._lock:
                self._graphs[bucket] = batch, self._capture(lambda: self._forward(batch))
        except Exception as error:  # noqa: BLE001 (the pass is run without a graph, and raises what is wrong with it)
            self._failed = True
            if self._quiet:
                return False
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            warnings.warn(
                f"decode passes of {bucket} rows run without a CUDA graph, slower: they cannot be captured"
                f" ({type(error).__name__}: {reason[:300]}); cuda_graphs=False says so without trying",
                RuntimeWarning,
                stacklevel=2,
            )
        return bucket in self._graphs
