"""Runs an unmodified transformers model over a flat batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vattention.attention import choose
from vattention.attention.base import NAME, AttentionBatch, Kernel, Layers, Segment
from vattention.attention.placing import place
from vattention.cache import KVCache
from vattention.engine.request import Chunk


class Runner:
    """A model whose attention reads and writes `cache`.

    Args:
        model: a causal language model of transformers, loaded with `attn_implementation="vattention"`, in eval mode.
        cache: laid out for that model.
        kernel: what computes attention.
    """

    def __init__(self, model: torch.nn.Module, cache: KVCache, *, kernel: Kernel = choose.prepare) -> None:
        self._model = model
        self._kernel = kernel
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
        batch = AttentionBatch.build(segments, self._layers, self._kernel)
        ids, places, keep = place((tokens, positions, wanted_rows), self._device)
        output = self._model(
            input_ids=ids[None],
            position_ids=places[None],
            use_cache=False,
            logits_to_keep=keep,
            **{NAME: batch},
        )
        logits: torch.Tensor = output.logits[0]
        return logits


def layer_views(cache: KVCache) -> Layers:
    """K and V of every layer, in the shape of that layer."""
    return tuple(cache.layer(layer) for layer in range(cache.layout.num_layers))
