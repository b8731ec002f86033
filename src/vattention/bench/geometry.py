"""Shapes of models whose cache can be measured without the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vattention.cache import KVLayout


@dataclass(frozen=True)
class ModelGeometry:
    """What decides the size of a model's K and V."""

    layers: int
    kv_heads: int
    head_dim: int
    max_model_len: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    def layout(
        self, max_num_seqs: int, *, layers: int, head_major: bool, layers_per_stream: int | None, kv_together: bool
    ) -> KVLayout:
        """The cache of `layers` of the layers. Raises ConfigError as `KVLayout` does."""
        return KVLayout(
            layers,
            self.kv_heads,
            self.head_dim,
            self.dtype,
            max_num_seqs,
            self.max_model_len,
            head_major=head_major,
            layers_per_stream=layers_per_stream,
            kv_together=kv_together,
        )


GEOMETRIES = {
    "llama-3-8b": ModelGeometry(32, 8, 128, 8192),
    "yi-6b": ModelGeometry(32, 4, 128, 200_000),
    "yi-34b": ModelGeometry(60, 8, 128, 200_000),
    "smollm2-135m": ModelGeometry(30, 3, 64, 8192),
}
"""The models of the paper, with the context of their long versions, and the demo model. All KV heads on one device."""
