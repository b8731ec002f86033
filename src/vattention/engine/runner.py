"""Runs an unmodified transformers model over a flat batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from vattention.attention import choose, paged
from vattention.attention.base import NAME, AttentionBatch, Batch, Kernel, Layers, Segment
from vattention.attention.decode_batch import DecodeBatch
from vattention.attention.placing import place
from vattention.cache import Cache, KVCache, PagedKVCache
from vattention.engine.compiled import compile_model
from vattention.engine.cpu_graphs import MOST_ROWS, CpuCapture
from vattention.engine.graphs import Capture, DecodeGraphs, Planner
from vattention.engine.request import Chunk


class Runner:
    """A model whose attention reads and writes `cache`.

    Args:
        model: a causal language model of transformers, loaded with `attn_implementation="vattention"`, in eval mode.
        cache: laid out for that model.
        kernel: what computes attention.
        compile: compile the model in the background, and run compiled as soon as that is done; None: once `get_ready`
            has been called, on a CPU.
        capture: how passes of decodes are captured into graphs; None: they are not.
        plan: what computes attention in those.
        record: on a CPU, once the model is compiled: passes of few decodes are recorded (`engine.cpu_graphs`), with
            attention by `choose.cpu_plan`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        cache: Cache,
        *,
        kernel: Kernel = choose.prepare,
        compile: bool | None = False,
        capture: Capture | None = None,
        plan: Planner = choose.decode_plan,
        record: bool = False,
    ) -> None:
        self._model = model
        self._compiled = compile_model(model) if compile else None
        self._compiles_later = compile is None
        # Where K and V are in blocks, the kernel computes what is gathered from them.
        self._table = cache.table if isinstance(cache, PagedKVCache) else None
        self._kernel = kernel if self._table is None else partial(paged.prepare, table=self._table, inner=kernel)
        # Addresses are fixed for life, so the views are made once.
        self._layers = layer_views(cache)
        self._device = self._layers[0][0].device
        self._streams: _Streams | None = None
        if self._device.type == "cuda" and isinstance(cache, KVCache):
            self._streams = _Streams(cache, self._device)
        self.graphs: DecodeGraphs | None = None
        self._records = record
        if capture is not None and self._table is None:
            self.graphs = DecodeGraphs(
                self._decode,
                self._layers,
                most=cache.layout.max_num_seqs,
                bound=cache.layout.max_model_len,
                capture=capture,
                lock=nullcontext() if isinstance(cache, PagedKVCache) else cache.pool.lock,
                plan=plan,
            )
        elif record:
            self.graphs = DecodeGraphs(
                self._decode,
                self._layers,
                most=min(cache.layout.max_num_seqs, MOST_ROWS),
                bound=cache.layout.max_model_len,
                capture=CpuCapture(),
                plan=partial(choose.cpu_plan, table=self._table),
                exact=True,
                table=self._table,
                quiet=True,
            )

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Compute `chunks`, whose tokens must have pages behind them.

        Returns:
            Logits `[n, vocabulary]`, a row for each position that a chunk has `wanted`, in order: one for each chunk
            that `samples`, and those of prompts whose log-probabilities were asked for. Good until the next pass.
        """
        if self._streams is not None:
            self._streams.note()
        if self.graphs is not None and self._settled and all(chunk.end - chunk.start == 1 for chunk in chunks):
            logits = self.graphs.run(chunks)
            if logits is not None:
                rows = [row for row, chunk in enumerate(chunks) if chunk.wanted]
                return logits if len(rows) == len(chunks) else logits[rows]
        tokens: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        wanted_rows: list[int] = []
        for chunk in chunks:
            segments.append(Segment(chunk.slot, len(tokens), chunk.end - chunk.start, chunk.end))
            tokens += chunk.request.tokens(chunk.start, chunk.end)
            positions += range(chunk.start, chunk.end)
            wanted_rows += [len(tokens) - chunk.end + position for position in chunk.wanted]
        ids, places, keep = place((tokens, positions, wanted_rows), self._device)
        return self._logits(
            lambda: AttentionBatch.build(segments, self._layers, self._kernel, table=self._table),
            input_ids=ids[None],
            position_ids=places[None],
            logits_to_keep=keep,
        )

    def _logits(self, batch: Callable[[], Batch], **inputs: Any) -> torch.Tensor:
        """One pass of the model, compiled where that is ready. `batch` makes what attention is told, anew each time."""
        output = None
        if self._compiled is not None and self._compiled.ready:
            output = self._compiled.run(self._model, batch(), **inputs)
        if output is None:
            output = self._model(**inputs, use_cache=False, **{NAME: batch()})
        logits: torch.Tensor = output.logits[0]
        return logits

    def _decode(self, batch: DecodeBatch) -> torch.Tensor:
        """A pass to be captured."""

        def begin() -> Batch:
            batch.begin()
            return batch

        # Of all rows: none is left out for padding, and that is 0 in transformers.
        return self._logits(begin, input_ids=batch.tokens[None], position_ids=batch.positions[None], logits_to_keep=0)

    @property
    def _settled(self) -> bool:
        """Whether the model runs as it will go on to: what is captured before it is compiled stays uncompiled."""
        if self._records:
            return self._compiled is not None and self._compiled.ready
        return self._compiled is None or self._compiled.settled

    @torch.inference_mode()
    def get_ready(self, slot: int, *, wait: bool = True) -> None:
        """Begin to compile, if that was left to this moment, and capture every pass of decodes that there may be.

        Args:
            slot: one whose first token has a page. What is there is overwritten.
            wait: until compiling has ended, so that what is captured is compiled.
        """
        if self._compiles_later and self._compiled is None and self._device.type == "cpu":
            self._compiled = compile_model(self._model)
        if wait and self._compiled is not None:
            self._compiled.wait()
        if self.graphs is not None and self._settled:
            self.graphs.capture_all(slot)


class _Streams:
    """Tells a cache on a GPU on which streams passes run, so that unmapping waits for those and for no others."""

    def __init__(self, cache: KVCache, device: torch.device) -> None:
        self._cache = cache
        self._device = device
        self._known: set[int] = set()

    def note(self) -> None:
        """A pass is about to be submitted to torch's current stream."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        if stream not in self._known:
            self._cache.watch(stream)
            self._known.add(stream)


def layer_views(cache: Cache) -> Layers:
    """K and V of every layer, in the shape of that layer."""
    return tuple(cache.layer(layer) for layer in range(cache.layout.num_layers))
