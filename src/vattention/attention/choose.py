"""Which kernel computes a layer: the fastest that has what the layer asks for, on the device where the cache is."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from vattention.attention import blocked, cpu_decode, cpu_prefill, sdpa, varlen
from vattention.attention.base import Attend, Features, Segment


def prepare(segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> Attend:
    """The `Kernel` that picks one for each layer call. What a kernel prepares is made once, if it is used at all.

    On a CPU `cpu_decode` computes the requests with a single row, where it can, and `cpu_prefill` the others. What
    remains is left to `blocked`, whose matrix products are faster than torch's attention there, unless rows are few.
    """
    every = tuple(segments)
    if device.type != "cpu":
        return _elsewhere(every, dtype, device)
    several = tuple(segment for segment in every if segment.rows > 1)
    single_rows = tuple(segment for segment in every if segment.rows == 1)
    single = functools.cache(lambda: cpu_decode.prepare(single_rows))
    stock = functools.cache(lambda some: sdpa.prepare(some, dtype=dtype, device=device))
    plain = functools.cache(lambda some: blocked.prepare(some, dtype=dtype, device=device))

    longer = functools.cache(lambda: cpu_prefill.prepare(several))

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        alone = len(several) < len(every) and cpu_decode.can(query, keys, values)
        together = bool(several) and cpu_prefill.can(query, keys, values)
        rest = (*(() if together else several), *(() if alone else single_rows))
        if not rest:
            out = query.new_empty((query.shape[1], query.shape[0], values.shape[3]))
        else:
            by_products = all(blocked.suits(segment, query.shape[0]) for segment in rest)
            kernel = plain if by_products or not sdpa.can(features, keys, values) else stock
            out = kernel(rest)(query, keys, values, features)
        if alone:
            single()(query, keys, values, features, out)
        if together:
            longer()(query, keys, values, features, out)
        return out

    return attend


def _elsewhere(every: tuple[Segment, ...], dtype: torch.dtype, device: torch.device) -> Attend:
    """`varlen` where it can, and `blocked` for everything else."""
    flash = functools.cache(lambda: varlen.prepare(every, dtype=dtype, device=device))
    plain = functools.cache(lambda: blocked.prepare(every, dtype=dtype, device=device))

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        kernel = flash if varlen.available(device) and varlen.can(query, keys, values, features) else plain
        return kernel()(query, keys, values, features)

    return attend
