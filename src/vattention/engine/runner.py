"""Runs an unmodified transformers model over a flat batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from vattention.attention import choose, paged
from vattention.attention.base import NAME, AttentionBatch, Kernel, Layers, Segment
from vattention.attention.placing import place
from vattention.cache import Cache, PagedKVCache
from vattention.engine.compiled import compile_model
from vattention.engine.request import Chunk


class Runner:
    """A model whose attention reads and writes `cache`.

    Args:
        model: a causal language model of transformers, loaded with `attn_implementation="vattention"`, in eval mode.
        cache: laid out for that model.
        kernel: what computes attention.
        compile: compile the model in the background, and run compiled as soon as that is done.
    """

    def __init__(
        self, model: torch.nn.Module, cache: Cache, *, kernel: Kernel = choose.prepare, compile: bool = False
    ) -> None:
        self._model = model
        self._compiled = compile_model(model) if compile else None
        # Where K and V are in blocks, the kernel computes what is gathered from them.
        self._table = cache.table if isinstance(cache, PagedKVCache) else None
        self._kernel = kernel if self._table is None else partial(paged.prepare, table=self._table, inner=kernel)
        # Addresses are fixed for life, so the views are made once.
        self._layers = layer_views(cache)
        self._device = self._layers[0][0].device

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Compute `chunks`, whose tokens must have pages behind them.

        Returns:
            Logits `[n, vocabulary]`, a row for each position that a chunk has `wanted`, in order: one for each chunk
            that `samples`, and those of prompts whose log-probabilities were asked for.
        """
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
        inputs = {"input_ids": ids[None], "position_ids": places[None], "logits_to_keep": keep}
        output = None
        if self._compiled is not None and self._compiled.ready:
            output = self._compiled.run(self._model, self._batch(segments), **inputs)
        if output is None:
            output = self._model(**inputs, use_cache=False, **{NAME: self._batch(segments)})
        logits: torch.Tensor = output.logits[0]
        return logits

    def _batch(self, segments: Sequence[Segment]) -> AttentionBatch:
        return AttentionBatch.build(segments, self._layers, self._kernel, table=self._table)

    def wait(self) -> None:
        """Return when nothing is being compiled any more."""
        if self._compiled is not None:
            self._compiled.wait()


def layer_views(cache: Cache) -> Layers:
    """K and V of every layer, in the shape of that layer."""
    return tuple(cache.layer(layer) for layer in range(cache.layout.num_layers))
