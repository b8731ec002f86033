"""Which kernel computes a layer: the fastest that has what the layer asks for."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from vattention.attention import blocked, sdpa
from vattention.attention.base import Attend, Features, Segment


def prepare(segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> Attend:
    """The `Kernel` that picks one for each layer call. What a kernel prepares is made once, if it is used at all."""
    stock = functools.cache(lambda: sdpa.prepare(segments, dtype=dtype, device=device))
    plain = functools.cache(lambda: blocked.prepare(segments, dtype=dtype, device=device))

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        kernel = stock if sdpa.can(features, keys, values) else plain
        return kernel()(query, keys, values, features)

    return attend
