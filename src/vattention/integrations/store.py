"""The memory behind a `VirtualCache` and its forks: a `KVCache` for each layer, and one pool for those of a device."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, SupportsIndex

import torch

from vattention.cache import CacheStats, KVCache, KVLayout
from vattention.cache.layout import LayerShape
from vattention.errors import ConfigError, InvalidRequest
from vattention.memory import PagePool
from vattention.memory.limits import max_map_count

_ROWS = 64
"""Rows reserved where nobody says: more than a batch times its beams usually comes to. Addresses only."""

_GROWTH = 4
"""By how much a larger first batch may still grow."""

_ADDRESSES = 1 << 45
"""Bytes of addresses that all layers together may take before fewer rows are reserved: a quarter of what there is."""

_HOST_PAGE = 16 << 10
"""Bytes: what a short row wastes is little, and mapping is a small part of a decode step (docs/transformers.md)."""

_MAPPINGS_A_STREAM = 3
"""The run of the prompt, what was generated behind it, and the addresses after that."""


@dataclass(frozen=True)
class Sizing:
    """What a cache is laid out for.

    Attributes:
        max_cache_len: tokens a row can hold.
        max_batch_size: rows; None for a generous number.
        memory: bytes all layers may take; None for what the machine has.
        page_size: bytes; None for a small one.
        head_major: each head's K and V densely one behind the other; None: where the mapping limit allows it.
        num_layers: layers that will be opened.
        guard: reading an address without a page faults. A debugging aid.
    """

    max_cache_len: int
    max_batch_size: int | None
    memory: str | SupportsIndex | None
    page_size: str | SupportsIndex | None
    head_major: bool | None
    num_layers: int
    guard: bool

    def __post_init__(self) -> None:
        for name in ("max_cache_len", "max_batch_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")


class Kind(NamedTuple):
    """What the K and V of a layer are, whatever the tokens: for as long as this stays, so does the layer's cache."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, key: torch.Tensor, value: torch.Tensor) -> Kind:
        """The kind of `[batch, heads, tokens, width]`."""
        return cls(key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device)

    def __str__(self) -> str:
        return f"{self.heads} heads of {self.key_dim} and {self.value_dim} in {self.dtype} on {self.device}"


class Store:
    """Opens a layer's cache when the layer is first used, and closes everything when the last user leaves."""

    def __init__(self, sizing: Sizing) -> None:
        self.sizing = sizing
        self.users = 1
        self._caches: dict[int, tuple[Kind, KVCache]] = {}
        self._first: dict[torch.device, KVCache] = {}  # opens the pool, and takes it along when it closes
        self._lock = threading.RLock()  # a finalizer may run in the middle of opening a layer
        self._closer = weakref.finalize(self, _close, self._caches, self._first, os.getpid())
        self._closer.atexit = False

    def layer(self, index: int, kind: Kind, batch: int) -> KVCache:
        """The cache of layer `index`, opened for `kind` and at least `batch` rows if it is not open yet.

        Raises:
            InvalidRequest: it is open for another kind, and another user still has rows in it.
            ConfigError, DriverError, OutOfPages: it cannot be opened.
        """
        with self._lock:
            if not self._closer.alive:
                raise InvalidRequest("this cache is closed: make a new VirtualCache")
            if index in self._caches:
                was, cache = self._caches[index]
                if was == kind and cache.layout.max_num_seqs >= batch:
                    return cache
                if cache.stats().live_slots:
                    raise InvalidRequest(f"layer {index} is in use with {was} and cannot become {kind}")
                del self._caches[index]
                if cache not in self._first.values():
                    cache.close()
            with torch.inference_mode(False):  # else the views could not be written outside inference mode
                cache = self._open(kind, batch)
            self._caches[index] = kind, cache
            return cache

    def _open(self, kind: Kind, batch: int) -> KVCache:
        layout, device = self._layout(kind, batch), kind.device
        if device in self._first:
            return KVCache(layout, device=device, pool=self._first[device].pool)
        memory, page_size = self.sizing.memory, self.sizing.page_size
        if device.type == "cpu":
            if memory is None:  # no budget but the machine's: every page is created for real, or refused
                memory = layout.size * self.sizing.num_layers
            page_size = _HOST_PAGE if page_size is None else page_size
        cache = KVCache(layout, device=device, memory=memory, page_size=page_size, guard=self.sizing.guard)
        self._first[device] = cache
        return cache

    def _layout(self, kind: Kind, batch: int) -> KVLayout:
        sizing = self.sizing
        rows = sizing.max_batch_size or max(_ROWS, _GROWTH * batch)
        if rows < batch:
            raise ConfigError(f"a batch of {batch} does not fit max_batch_size={rows}: give a larger one")
        head_major = sizing.head_major
        if head_major is None:
            streams = 2 * kind.heads * sizing.num_layers * batch * _GROWTH
            head_major = kind.device.type == "cpu" and streams * _MAPPINGS_A_STREAM < _host_mappings()
        shape = LayerShape(kind.heads, kind.key_dim, kind.value_dim)

        def layout(rows: int) -> KVLayout:
            widest = max(kind.key_dim, kind.value_dim)
            return KVLayout(
                1, kind.heads, widest, kind.dtype, rows, sizing.max_cache_len, head_major=head_major, shapes=(shape,)
            )

        row = layout(1).size * sizing.num_layers
        return layout(rows if sizing.max_batch_size else max(batch, min(rows, _ADDRESSES // row)))

    # -- looking, and giving back ---------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the last user has left."""
        return not self._closer.alive

    @property
    def page_size(self) -> int | None:
        """Bytes; None before the first layer is there."""
        return max((pool.page_size for pool in self._pools), default=None)

    @property
    def _pools(self) -> list[PagePool]:
        return [cache.pool for cache in self._first.values()]

    def give_back(self) -> None:
        """Return free pages to the system, where there are many beside those in use."""
        for pool in self._pools:
            stats = pool.stats()
            if stats.free * 8 > stats.in_use:
                pool.trim()

    def stats(self) -> list[CacheStats]:
        """Of every layer that is open."""
        if self.closed:
            raise InvalidRequest("this cache is closed: make a new VirtualCache")
        return [cache.stats() for _, cache in list(self._caches.values())]

    def leave(self) -> bool:
        """A user goes. The last one closes everything: True then. Raises DriverError where the driver fails."""
        with self._lock:
            self.users -= 1
            if self.users == 0:
                self._closer()
            return self.users <= 0

    def join(self) -> Store:
        """One more user."""
        with self._lock:
            self.users += 1
            return self

    def defer(self, rows: Sequence[tuple[KVCache, range]]) -> None:
        """Free `rows` as soon as somebody asks the pool for numbers. For finalizers, which run in the middle of it."""

        def free() -> None:
            for cache, taken in rows:
                for row in taken if not cache.closed else ():
                    cache.free(row)

        if self._first:
            self._pools[0].defer(free)


def _close(caches: dict[int, tuple[Kind, KVCache]], first: dict[torch.device, KVCache], owner: int) -> None:
    if os.getpid() != owner:
        return
    for _, cache in caches.values():
        if cache not in first.values():
            cache.close()
    for cache in first.values():
        cache.close()
    caches.clear()
    first.clear()


def _host_mappings() -> int:
    return max_map_count() // 2
