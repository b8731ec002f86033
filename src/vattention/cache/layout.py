"""Where each token's K and V lie in virtual memory: sizes, strides and views, all arithmetic."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import KW_ONLY, dataclass, fields
from typing import NamedTuple

import torch

from vattention.errors import ConfigError

_ALIGNMENT = 2 << 20  # streams start and end at multiples of this, so that any usual page divides them


class Stream(NamedTuple):
    """One stream of every slot: virtual memory that grows with the slot's tokens.

    Attributes:
        offset: byte of the cache's address range at which slot 0 starts; the other slots follow, `size` apart.
        size: bytes of addresses a slot has in this stream.
        token_bytes: bytes one token takes.
    """

    offset: int
    size: int
    token_bytes: int


class View(NamedTuple):
    """K or V of one layer in the cache's address range: byte offset, and element strides of slot, token, head, dim."""

    offset: int
    strides: tuple[int, int, int, int]


@dataclass(frozen=True)
class KVLayout:
    """The geometry of a cache.

    Args:
        num_layers, num_kv_heads, head_dim: of the model (the heads of this rank under tensor parallelism).
        dtype: of K and V.
        max_num_seqs: slots.
        max_model_len: tokens a slot can hold.
        head_major: each KV head is a stream of its own, so that a head's keys lie densely one behind the other.
        layers_per_stream: layers that share a stream (the paper's tensor slicing); None for all of
            them. The last stream takes what is left where it does not divide num_layers.
        kv_together: K and V of a layer share a stream.

    Raises:
        ConfigError: a number that is not positive, or an address range beyond what a process can have.
        TypeError: not an integer, or not a torch floating point dtype.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    max_num_seqs: int
    max_model_len: int
    _: KW_ONLY
    head_major: bool = False
    layers_per_stream: int | None = 1
    kv_together: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, not {self.dtype!r}")
        if not self.dtype.is_floating_point:
            raise ConfigError(f"dtype must be a floating point type, not {self.dtype}")
        if self.layers_per_stream is None:
            object.__setattr__(self, "layers_per_stream", self.num_layers)
        for name in (field.name for field in fields(self) if field.type in ("int", "int | None")):
            value = getattr(self, name)
            if isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, not a bool")
            try:
                object.__setattr__(self, name, operator.index(value))
            except TypeError:
                raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.size >= 1 << 47:
            raise ConfigError(
                f"{self.max_num_seqs} slots of {self.max_model_len} tokens need {self.size / 2**40:.0f} TiB of "
                "addresses, and a process has 128: lower max_num_seqs or max_model_len"
            )

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @functools.cached_property
    def padded_len(self) -> int:
        """Tokens each slot has addresses for: max_model_len, rounded up until every stream is aligned."""
        quantum = math.lcm(*(_ALIGNMENT // math.gcd(_ALIGNMENT, bytes_) for bytes_ in set(self._token_bytes)))
        return -(-self.max_model_len // quantum) * quantum

    @functools.cached_property
    def streams(self) -> tuple[Stream, ...]:
        """Every stream, in address order. In each the slots lie side by side."""
        streams = []
        offset = 0
        for token_bytes in self._token_bytes:
            size = self.padded_len * token_bytes
            streams.append(Stream(offset, size, token_bytes))
            offset += size * self.max_num_seqs
        return tuple(streams)

    @property
    def size(self) -> int:
        """Bytes of addresses the whole cache reserves."""
        return sum(self._token_bytes) * self.padded_len * self.max_num_seqs

    def view(self, layer: int, which: int) -> View:
        """K (`which` 0) or V (1) of `layer`, of shape [max_num_seqs, padded_len, num_kv_heads, head_dim]."""
        group, in_group = divmod(layer, self._group)
        group_layers = self._group_layers[group]
        parts = 1 if self.kv_together else 2  # streams that K and V of a group take
        heads = self.num_kv_heads if self.head_major else 1
        stream = self.streams[(group * parts + (0 if self.kv_together else which)) * heads]
        row = self.head_dim * (1 if self.head_major else self.num_kv_heads)  # one layer's K (or V) in a token
        place = (in_group * 2 + which if self.kv_together else in_group) * row
        itemsize = self.dtype.itemsize
        slot = stream.size // itemsize
        head = slot * self.max_num_seqs if self.head_major else self.head_dim
        assert stream.token_bytes == group_layers * row * itemsize * (2 if self.kv_together else 1)
        return View(stream.offset + place * itemsize, (slot, stream.token_bytes // itemsize, head, 1))

    @property
    def _group(self) -> int:
        assert self.layers_per_stream is not None
        return min(self.layers_per_stream, self.num_layers)

    @functools.cached_property
    def _group_layers(self) -> tuple[int, ...]:
        """Layers in each group of layers that share a stream."""
        full, rest = divmod(self.num_layers, self._group)
        return (self._group,) * full + ((rest,) if rest else ())

    @functools.cached_property
    def _token_bytes(self) -> tuple[int, ...]:
        """Bytes of one token in each stream: by group of layers, then K and V, then head."""
        row = self.head_dim * self.dtype.itemsize
        heads = (row,) * self.num_kv_heads if self.head_major else (row * self.num_kv_heads,)
        sides = (2,) if self.kv_together else (1, 1)
        return tuple(layers * side * head for layers in self._group_layers for side in sides for head in heads)
