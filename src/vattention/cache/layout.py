"""Where each token's K and V lie in virtual memory: sizes, strides and views, all arithmetic."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import KW_ONLY, dataclass, fields
from typing import NamedTuple

import torch

from vattention.errors import ConfigError, InvalidRequest

_ALIGNMENT = 2 << 20  # so that any usual page divides streams


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


class LayerShape(NamedTuple):
    """What one token leaves in one layer: KV heads, and the width of a head's K and of its V."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


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
        shapes: of each layer, for models whose layers differ or whose K and V have different widths; num_kv_heads and
            head_dim are then the largest of them.
        alignment: bytes; streams start and end at multiples, so any page that divides it will do. It costs addresses.

    Raises:
        ConfigError: a number that is not positive, an address range beyond what a process can have, or shapes that do
            not fit the other numbers, or whose heads differ under head_major.
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
    shapes: tuple[LayerShape, ...] | None = None
    alignment: int = _ALIGNMENT

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, not {self.dtype!r}")
        if not self.dtype.is_floating_point:
            raise ConfigError(f"dtype must be a floating point type, not {self.dtype}")
        for name in ("head_major", "kv_together"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
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
        self._check_shapes()
        # First without listing the streams, of which an absurd layout has more than there is memory for.
        assert self.layers_per_stream is not None
        groups = -(-self.num_layers // self.layers_per_stream)
        streams = groups * (1 if self.kv_together else 2) * (self.num_kv_heads if self.head_major else 1)
        size = streams * self.alignment * self.max_num_seqs
        if size < 1 << 47:
            size = self.size
        if size >= 1 << 47:
            raise ConfigError(
                f"{self.max_num_seqs} slots of {self.max_model_len} tokens need {size >> 40} TiB of "
                "addresses, and a process has 128: lower max_num_seqs or max_model_len"
            )

    def _check_shapes(self) -> None:
        if self.shapes is None:
            return
        object.__setattr__(self, "shapes", tuple(LayerShape(*map(operator.index, shape)) for shape in self.shapes))
        if len(self.shapes) != self.num_layers or min(map(min, self.shapes)) < 1:
            raise ConfigError(f"shapes must be {self.num_layers} times (heads, width of K, width of V), all positive")
        heads = max(shape.num_kv_heads for shape in self.shapes)
        widest = max(max(shape.key_dim, shape.value_dim) for shape in self.shapes)
        if (heads, widest) != (self.num_kv_heads, self.head_dim):
            raise ConfigError(f"num_kv_heads and head_dim must be the largest in shapes, {heads} and {widest}")
        if self.head_major and any(shape.num_kv_heads != heads for shape in self.shapes):
            raise ConfigError("head_major needs the same number of heads in every layer")

    @property
    def name(self) -> str:
        """How the streams lie, in words."""
        parts = ["head-major" if self.head_major else "token-major"]
        if self.layers_per_stream != 1:
            parts.append(f"{self.layers_per_stream} layers a stream")
        if self.kv_together:
            parts.append("K and V together")
        return ", ".join(parts)

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token, all layers."""
        return sum(self._token_bytes)

    @functools.cached_property
    def padded_len(self) -> int:
        """Tokens each slot has addresses for: max_model_len, rounded up until every stream is aligned."""
        align = self.alignment
        quantum = math.lcm(*(align // math.gcd(align, bytes_) for bytes_ in set(self._token_bytes)))
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
        """K (`which` 0) or V (1) of `layer`, of shape [max_num_seqs, padded_len, heads, width] of that layer."""
        self._check_layer(layer, which)
        number, first = 0, 0  # the group of the layer, and the number of its first stream
        while layer not in self._groups[number]:
            first += len(self._group_bytes(self._groups[number]))
            number += 1
        group = self._groups[number]
        before = range(group.start, layer)
        if self.kv_together:
            place = sum(self._row(i, 0) + self._row(i, 1) for i in before) + which * self._row(layer, 0)
        else:
            place = sum(self._row(i, which) for i in before)
            first += which * (len(self._group_bytes(group)) // 2)
        stream = self.streams[first]
        itemsize = self.dtype.itemsize
        slot = stream.size // itemsize
        head = slot * self.max_num_seqs if self.head_major else self.shape(layer)[1 + which]
        return View(stream.offset + place * itemsize, (slot, stream.token_bytes // itemsize, head, 1))

    def _check_layer(self, layer: int, which: int) -> None:
        if not 0 <= layer < self.num_layers or which not in (0, 1):
            raise InvalidRequest(f"layer {layer}, {which} is not K (0) or V (1) of one of {self.num_layers} layers")

    def shape(self, layer: int) -> LayerShape:
        """Heads, and the widths of K and V, of one layer."""
        self._check_layer(layer, 0)
        if self.shapes is None:
            return LayerShape(self.num_kv_heads, self.head_dim, self.head_dim)
        return self.shapes[layer]

    def _row(self, layer: int, which: int) -> int:
        """Elements that K or V of a layer have in one token of one stream."""
        shape = self.shape(layer)
        return shape[1 + which] * (1 if self.head_major else shape.num_kv_heads)

    @functools.cached_property
    def _groups(self) -> tuple[range, ...]:
        """The layers that share streams."""
        assert self.layers_per_stream is not None
        step = min(self.layers_per_stream, self.num_layers)
        return tuple(range(i, min(i + step, self.num_layers)) for i in range(0, self.num_layers, step))

    def _group_bytes(self, group: range) -> tuple[int, ...]:
        """Bytes of one token in each stream of a group: K and V, then head."""
        sides = [sum(self._row(layer, which) for layer in group) * self.dtype.itemsize for which in (0, 1)]
        if self.kv_together:
            sides = [sum(sides)]
        heads = self.shape(group.start).num_kv_heads if self.head_major else 1
        return tuple(side for side in sides for _ in range(heads))

    @functools.cached_property
    def _token_bytes(self) -> tuple[int, ...]:
        """Bytes of one token in each stream: by group of layers, then K and V, then head."""
        return tuple(bytes_ for group in self._groups for bytes_ in self._group_bytes(group))
