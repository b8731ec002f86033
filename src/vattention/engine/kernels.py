"""A kernel that was asked for by name: that there is such a kernel, and that it computes this model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vattention.attention import choose
from vattention.attention.base import NAME, Attend, Features, Layers, Segment
from vattention.attention.family import Family
from vattention.cache import Cache
from vattention.engine.runner import layer_views
from vattention.errors import ConfigError


class NamedKernel:
    """A `Kernel` that is the one of that name for every layer of one engine.

    Attributes:
        name: one of `choose.NAMES`, not "auto".
    """

    def __init__(self, name: str, family: Family) -> None:
        self.name = name
        self.family = family
        self._kernel = choose.only(name, family)

    def __call__(self, segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> Attend:
        """Prepare one forward pass, see `Kernel`."""
        return self._kernel(segments, dtype=dtype, device=device)


class _Question:
    """Stands where a batch does in a pass that computes nothing: each layer says what it asks of attention."""

    def __init__(self, kernel: NamedKernel, layers: Layers) -> None:
        self._kernel = kernel
        self._layers = layers

    def compute(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, features: Features
    ) -> torch.Tensor:
        keys, values = self._layers[layer]
        choose.check(self._kernel.name, self._kernel.family, query[0], keys, values, features)
        return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[3]))


def named_kernel(name: str | None, device: torch.device, *, paged: bool) -> NamedKernel | None:
    """The kernel of that name; None for "auto".

    Raises:
        ConfigError: no such kernel, not on this device, or not over blocks.
    """
    if name is None or name == choose.AUTO:
        return None
    family = choose.named(name, device)
    if paged:
        raise ConfigError(f'attention_kernel={name!r} is for slots: leave it out with cache="paged"')
    return NamedKernel(name, family)


@torch.inference_mode()
def check_layers(kernel: NamedKernel, model: torch.nn.Module, cache: Cache) -> None:
    """Ask every layer of the model, in a pass of one token that touches no cache.

    Raises:
        ConfigError: a layer that the kernel does not compute.
    """
    layers = layer_views(cache)
    zero = torch.zeros((1, 1), dtype=torch.int64, device=layers[0][0].device)
    question = _Question(kernel, layers)
    model(input_ids=zero, position_ids=zero, logits_to_keep=zero[0], use_cache=False, **{NAME: question})
