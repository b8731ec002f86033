"""A cache for transformers' `generate()` that grows without copying: `past_key_values=VirtualCache(model.config)`.

Source: transformers' cache API, https://huggingface.co/docs/transformers/main/en/kv_cache
"""

from __future__ import annotations

import copy
import os
import weakref
from dataclasses import fields, replace
from types import TracebackType
from typing import Any, SupportsIndex

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from vattention.cache import CacheStats
from vattention.errors import ConfigError, InvalidRequest, OutOfPages
from vattention.integrations.store import Sizing, Store
from vattention.integrations.virtual_layer import VirtualLayer

_LONG = 32768
"""Tokens a row has addresses for, where the model's own limit is shorter or unknown."""


class VirtualCache(DynamicCache):
    """transformers' `DynamicCache`, with K and V of full attention layers contiguous in virtual memory.

    >>> with VirtualCache(model.config) as cache:
    ...     model.generate(**inputs, past_key_values=cache)

    New tokens are written behind the old ones, and nothing that is there is ever copied or moved: pages are put behind
    addresses as the tokens arrive. `crop` changes a number; `reorder_cache`, `batch_repeat_interleave`,
    `batch_select_indices` and `fork` let rows share full pages and copy less than a page of each stream. Layers of
    other types (sliding, chunked, recurrent, shared) are transformers' own, so every model works.

    For inference. One model and one batch at a time; `reset` makes it ready for another. Not for several threads at
    once, but each may have its own. Memory goes back when it is closed, or dropped.

    Args:
        config: of the model.
        max_batch_size: rows to reserve addresses for, beams and samples counted; None: 64, or 4 times the first batch.
        max_cache_len: tokens a row can hold; None: as many as the model is made for, or 32,768 if that is more.
        memory: most bytes K and V may take, or a string like "4GiB"; None: what the machine has.
        page_size: bytes; None: 16 KiB on a CPU, what the driver asks for on a device.
        attention_mask: `[batch, tokens]` of the first prompt, 0 where it is padded on the left: memory is never put
            behind those tokens, which read as zeros. It must be the mask the model is called with. Zeros further right
            are tokens like any other. None: padding is stored, as in `DynamicCache`.
        head_major: K and V of each head lie densely one behind the other; None: on a CPU, where the mapping limit
            allows it.
        guard: reading memory that was never written is a fault. A debugging aid.

    Raises:
        ConfigError: sizes that cannot be.
    """

    def __init__(
        self,
        config: Any,
        *,
        max_batch_size: int | None = None,
        max_cache_len: int | None = None,
        memory: str | SupportsIndex | None = None,
        page_size: str | SupportsIndex | None = None,
        attention_mask: torch.Tensor | None = None,
        head_major: bool | None = None,
        guard: bool = False,
    ) -> None:
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config must be a model's config, not {type(config).__name__}: pass model.config")
        super().__init__(config=config)
        text = config.get_text_config(decoder=True)
        ours = [index for index, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        length = max_cache_len or max(_LONG, getattr(text, "max_position_embeddings", None) or 0)
        sizing = Sizing(length, max_batch_size, memory, page_size, head_major, max(1, len(ours)), guard)
        starts = _left_padding(attention_mask)
        self._begin(Store(sizing))
        for index in ours:
            self.layers[index] = VirtualLayer(index, self._store, starts)

    def _begin(self, store: Store) -> None:
        self._store = store
        self._owner = os.getpid()
        self._closer = weakref.finalize(self, _drop, store, self.layers, os.getpid())
        self._closer.atexit = False  # the system takes everything back by itself then

    @property
    def _ours(self) -> list[VirtualLayer]:
        return [layer for layer in self.layers if isinstance(layer, VirtualLayer)]

    # -- transformers' cache API, where it is not the layers' alone -----------------------------------------------

    @property
    def is_compileable(self) -> bool:
        """False: a compiled model would read to the end of the addresses."""
        return False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens of a layer, and return K and V of all its tokens: zero-copy views.

        Raises:
            InvalidRequest: the cache is closed, or made for another model or batch.
            OutOfPages: the memory is full. Full attention layers are as they were before the forward pass.
        """
        if not self._closer.alive:
            raise InvalidRequest("this cache is closed: make a new VirtualCache")
        if not 0 <= layer_idx < len(self.layers):
            raise InvalidRequest(
                f"there is no layer {layer_idx}: this cache was made for a model of {len(self.layers)} layers"
            )
        layer = self.layers[layer_idx]
        try:
            return layer.update(key_states, value_states, *args, **kwargs)
        except OutOfPages:
            if isinstance(layer, VirtualLayer):
                self._take_back(key_states.shape[-2], layer.get_seq_length(), layer_idx)
            raise

    def _take_back(self, tokens: int, length: int, layer_idx: int) -> None:
        """Let go of what the layers before `layer_idx` got in the pass that cannot go on."""
        for layer in self.layers[:layer_idx]:
            if isinstance(layer, VirtualLayer) and layer.get_seq_length() == length + tokens:
                layer.crop(-tokens)
        self._store.give_back()

    def reset(self) -> None:
        """Forget all tokens, ready for another batch. The mask of the first prompt does not count any more."""
        super().reset()
        self._store.give_back()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` is."""
        super().reorder_cache(beam_idx)
        self._store.give_back()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of every row."""
        super().crop(tokens_to_remove)
        self._store.give_back()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times: how one prompt becomes many samples or beams for the memory of one."""
        super().batch_repeat_interleave(repeats)
        self._store.give_back()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows that `indices` names."""
        super().batch_select_indices(indices)
        self._store.give_back()

    # -- ours -----------------------------------------------------------------------------------------------------

    def fork(self) -> VirtualCache:
        """Another cache with the same tokens, for the price of the tails: full pages are shared until rewritten.

        `copy.deepcopy` does the same. The two share one budget of memory and of rows, and close independently.

        Raises:
            OutOfPages, ConfigError: no pages, or no rows, are left; nothing has changed.
        """
        if not self._closer.alive:
            raise InvalidRequest("this cache is closed: make a new VirtualCache")
        twin = copy.copy(self)
        twin.layers = []
        twin._begin(self._store.join())
        try:
            for layer in self.layers:
                ours = isinstance(layer, VirtualLayer)
                twin.layers.append(layer.fork(self._store) if ours else copy.deepcopy(layer))
        except BaseException:
            twin.close()
            raise
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> VirtualCache:
        return self.fork()

    @property
    def page_size(self) -> int | None:
        """Bytes of a page; None before the first token."""
        return self._store.page_size

    def stats(self) -> CacheStats:
        """What full attention layers hold, of this cache and its forks together, in bytes; see `CacheStats`.

        `live_slots` are rows, of all layers together. Layers of other types are not counted.
        """
        return _sum(self._store.stats())

    def close(self) -> None:
        """Give all memory back. Idempotent. Tensors that were returned earlier read as zeros then.

        Raises:
            DriverError: the driver failed.
        """
        if self._closer.detach() is None or os.getpid() != self._owner:
            return
        for layer in self._ours:
            layer.release()
        self._store.leave()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._closer.alive

    def __enter__(self) -> VirtualCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _drop(store: Store, layers: list[Any], owner: int) -> None:
    """What becomes of a cache that is dropped instead of closed."""
    if os.getpid() != owner:
        return
    rows = [taken for layer in layers if isinstance(layer, VirtualLayer) if (taken := layer.taken()) is not None]
    if not store.leave():
        store.defer(rows)


def _left_padding(mask: torch.Tensor | None) -> tuple[int, ...]:
    """Zeros before the first 1 of each row."""
    if mask is None:
        return ()
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise ConfigError("attention_mask must be the tokenizer's: a tensor [batch, tokens], 0 for padding")
    return tuple((mask.ne(0).cumsum(1) == 0).sum(1).tolist())


_SUMMED = ("reserved", "mapped", "needed", "wasted", "reclaimable", "mappings", "live_slots", "copied")


def _sum(layers: list[CacheStats]) -> CacheStats:
    """All layers as one: what each has is added up, what they share is taken once."""
    if not layers:
        nothing: dict[str, Any] = dict.fromkeys((field.name for field in fields(CacheStats)), 0)
        return CacheStats(**nothing | {"mapping_limit": None, "driver_calls": {}})
    return replace(layers[-1], **{name: sum(getattr(layer, name) for layer in layers) for name in _SUMMED})
