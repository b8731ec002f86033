"""One layer of a `VirtualCache`: what transformers' `DynamicLayer` does, without copying what is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from vattention.cache import KVCache
from vattention.errors import ConfigError, InvalidRequest
from vattention.integrations.store import Kind, Store

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class VirtualLayer(DynamicLayer):
    """K and V of one layer, rows of a batch at neighbouring addresses.

    `keys` and `values` are views `[batch, heads, tokens, width]` into the layer's `KVCache`, None before the first
    update. Methods that are not described here do what those of `DynamicLayer` do.

    Args:
        index: of the layer in the model.
        store: where the memory comes from.
        starts: for each row of the first batch, tokens of left padding.
    """

    def __init__(self, index: int, store: Store, starts: Sequence[int] = ()) -> None:
        # Not DynamicLayer's own: it would set `keys` and `values`, which are views here.
        self._index = index
        self._store = store
        self._starts = tuple(starts)
        self._forget()

    def _forget(self) -> None:
        self._cache: KVCache | None = None
        self._kind: Kind | None = None
        self._rows = range(0)
        self._length = 0
        self._padding: list[int] = []  # tokens, of every row
        self._alike: list[int] = []  # for each row, the first that has had the same prompt so far
        self._all: tuple[torch.Tensor, torch.Tensor] | None = None  # [batch, heads, padded_len, width]

    # -- what transformers reads ----------------------------------------------------------------------------------

    @property
    def is_initialized(self) -> bool:
        """Whether anything was written since it was made or reset."""
        return self._cache is not None

    @property
    def keys(self) -> torch.Tensor | None:
        """K of all tokens, a view."""
        return None if self._all is None else self._all[0].narrow(2, 0, self._length)

    @property
    def values(self) -> torch.Tensor | None:
        """V of all tokens, a view."""
        return None if self._all is None else self._all[1].narrow(2, 0, self._length)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of K and V."""
        return None if self._kind is None else self._kind.dtype

    @property
    def device(self) -> torch.device | None:
        """Of K and V."""
        return None if self._kind is None else self._kind.device

    @property
    def head_major(self) -> bool:
        """Whether each head is a stream of its own. False before the first update."""
        return self._cache is not None and self._cache.layout.head_major

    def get_seq_length(self) -> int:
        """Tokens in every row, padding included."""
        return self._length

    # -- growing --------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take rows for the batch. Only shapes, dtype and device count."""
        kind, batch = Kind.of(key_states, value_states), key_states.shape[0]
        starts = _spread(self._starts, batch)
        self._kind = kind
        cache = self._store.layer(self._index, kind, batch)
        self._take(cache, batch)
        self._padding = starts
        self._alike = [starts.index(start) for start in starts]
        if any(starts):
            try:
                cache.pad(dict(zip(self._rows, starts, strict=True)))
            except BaseException:
                self.release()
                raise

    def _take(self, cache: KVCache, batch: int) -> None:
        rows = cache.alloc_range(batch)
        if rows is None:
            raise ConfigError(
                f"no {batch} neighbouring rows are left of the {cache.layout.max_num_seqs} that this cache reserved:"
                " make it with a larger max_batch_size (addresses cost nothing)"
            )
        self._cache = cache
        self._show(rows)

    def _show(self, rows: range) -> None:
        assert self._cache is not None
        self._rows = rows
        with torch.inference_mode(False):
            key, value = (view[rows.start : rows.stop].transpose(1, 2) for view in self._cache.layer(0))
        self._all = key, value

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens, `[batch, heads, tokens, width]`, and return views of all tokens.

        Raises:
            InvalidRequest: another batch, shape, dtype or device than before, or more tokens than the cache is for.
            OutOfPages: the memory is full. Nothing was written; shorten or close something and call again.
        """
        if self._cache is not None and not self._length and not self._fits(key_states, value_states):
            self.release()  # nothing would be lost
        if self._cache is None:
            self.lazy_initialization(key_states, value_states)
        assert self._cache is not None
        assert self._all is not None
        self._check(key_states, value_states)
        end = self._length + key_states.shape[2]
        self._alike = _alike(self._alike, key_states, value_states)
        with torch.no_grad():
            if self._alike != list(range(len(self._rows))):
                self._grow_alike(key_states, value_states, end)
            else:
                self._cache.step(dict.fromkeys(self._rows, end))
                self._write(range(len(self._rows)), key_states, value_states)
        self._length = end
        key, value = self._all
        shown = key.narrow(2, 0, end), value.narrow(2, 0, end)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return _inference_only(*shown, key_states, value_states)
        return shown

    def _grow_alike(self, key_states: torch.Tensor, value_states: torch.Tensor, end: int) -> None:
        """Write one of the rows that are alike, as beams of a prompt are, and let the others share it."""
        assert self._cache is not None
        first = sorted(set(self._alike))
        self._cache.step({self._rows[row]: end for row in first})
        try:
            self._write(first, key_states, value_states)
            others = {row: leader for row, leader in enumerate(self._alike) if row != leader}
            self._cache.reorder({self._rows[row]: self._rows[leader] for row, leader in others.items()})
        except BaseException:
            self._cache.step({self._rows[row]: self._length for row in first})
            raise

    def _write(self, rows: Sequence[int], key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Put new tokens of some rows behind those that are there, but for padding."""
        assert self._all is not None
        start, tokens = self._length, key_states.shape[2]
        if len(rows) == len(self._rows) and start >= max(self._padding):
            for whole, new in zip(self._all, (key_states, value_states), strict=True):
                whole.narrow(2, start, tokens).copy_(new)
            return
        for row in rows:
            skipped = min(max(0, self._padding[row] - start), tokens)
            for whole, new in zip(self._all, (key_states, value_states), strict=True):
                whole[row, :, start + skipped : start + tokens].copy_(new[row, :, skipped:])

    def _fits(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        same = Kind.of(key, value) == self._kind and value.shape[:3] == key.shape[:3]
        return same and key.shape[0] == len(self._rows)

    def _check(self, key: torch.Tensor, value: torch.Tensor) -> None:
        assert self._cache is not None
        if not self._fits(key, value):
            raise InvalidRequest(
                f"layer {self._index} holds {len(self._rows)} rows of {self._kind}, and this call brings {key.shape[0]}"
                f" rows of {Kind.of(key, value)}: a cache serves one model and one batch; make another for another, or"
                " reset() this one"
            )
        longest = self._cache.layout.max_model_len
        if self._length + key.shape[2] > longest:
            raise InvalidRequest(
                f"{self._length + key.shape[2]} tokens do not fit max_cache_len={longest}: make the cache with a larger"
                " one (addresses cost nothing)"
            )

    # -- changing -------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything, padding too."""
        self.release()
        self._starts = ()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens: a number changes, and large ends go back to the pool."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove == 0 or self._cache is None:
            return
        before, self._length = self._length, max(0, self._length + tokens_to_remove)
        self._cache.step(dict.fromkeys(self._rows, self._length))
        if self._length < max(self._padding):
            self._crop_padding(self._cache)
        if (before - self._length) * 8 > before:
            self._cache.trim()

    def _crop_padding(self, cache: KVCache) -> None:
        """What comes next is no padding, wherever the first prompt had some: rows that have nothing else get less."""
        rows = zip(self._rows, self._padding, strict=True)
        shorter = {row: self._length for row, start in rows if start > self._length}
        cache.step(dict.fromkeys(shorter, 0))
        cache.pad(shorter)
        cache.step(shorter)
        self._padding = [min(start, self._length) for start in self._padding]
        if not self._length:
            self._starts = ()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` is."""
        self._become(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, one behind the other."""
        self._become([row for row in range(len(self._rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows that `indices` names (numbers, or a mask of booleans)."""
        self._become(torch.arange(len(self._rows))[indices.to("cpu")].tolist())

    def _become(self, sources: list[int]) -> None:
        """Row i becomes what row `sources[i]` is: full pages are mapped there too, tails are copied."""
        if self._cache is None or not self._length:
            return
        cache, rows, batch = self._cache, self._rows, len(sources)
        sources = [range(len(rows))[source] for source in sources]  # negative ones count from the end
        if batch <= len(rows) or (self._store.users == 1 and rows.start + batch <= cache.layout.max_num_seqs):
            target = range(rows.start, rows.start + batch)
        else:  # the rows behind may be a fork's
            self._take(cache, batch)
            target = self._rows
        try:
            cache.reorder({row: rows[source] for row, source in zip(target, sources, strict=True)})
        except BaseException:
            if target.start != rows.start:
                self._show(rows)
                self._free(target)
            raise
        self._padding = [self._padding[source] for source in sources]
        self._alike = list(range(batch))
        if target != rows:
            self._show(target)
            self._free(range(max(target.stop, rows.start), rows.stop) if target.start == rows.start else rows)

    def _free(self, rows: range) -> None:
        assert self._cache is not None
        for row in rows:
            self._cache.free(row)
        if rows:
            self._cache.trim()

    def release(self) -> None:
        """Give the rows back."""
        cache, rows = self._cache, self._rows
        self._forget()
        if cache is not None and not cache.closed:
            for row in rows:
                cache.free(row)
            cache.trim()

    def taken(self) -> tuple[KVCache, range] | None:
        """The cache and the rows that this layer holds."""
        return None if self._cache is None else (self._cache, self._rows)

    def fork(self, store: Store) -> VirtualLayer:
        """Another layer with the same tokens, in rows of its own that share all full pages."""
        twin = VirtualLayer(self._index, store, self._starts)
        if self._cache is not None:
            twin._kind, twin._padding = self._kind, list(self._padding)
            twin._alike = list(range(len(self._rows)))
            twin._take(self._cache, len(self._rows))
            try:
                self._cache.reorder(dict(zip(twin._rows, self._rows, strict=True)))
            except BaseException:
                twin.release()
                raise
            twin._length = self._length
        return twin

    def offload(self) -> None:
        """Refused: the pages are where they are."""
        raise ConfigError("a VirtualCache cannot be offloaded: use transformers' own cache for that")


def _spread(starts: Sequence[int], batch: int) -> list[int]:
    """Padding of each row, when generate() repeats each prompt for its beams or samples."""
    if not starts:
        return [0] * batch
    if batch % len(starts):
        raise ConfigError(
            f"attention_mask has {len(starts)} rows, and the first batch has {batch}: give the mask of this batch"
        )
    return [start for start in starts for _ in range(batch // len(starts))]


def _alike(before: Sequence[int], key: torch.Tensor, value: torch.Tensor) -> list[int]:
    """Which rows are still alike, to the last bit, with these new tokens: for each row, the first of them.

    Neighbours are compared, as generate() puts the beams or samples of a prompt side by side. Tokens that come one by
    one are not worth it: rows that choose their own part at once.
    """
    alike = list(range(len(before)))
    if key.shape[2] == 1:
        return alike
    for row in alike[1:]:
        if before[row] == before[row - 1] and _same_bits(key, row) and _same_bits(value, row):
            alike[row] = alike[row - 1]
    return alike


def _same_bits(states: torch.Tensor, row: int) -> bool:
    """Whether a row is what the row before it is; 0 and -0 differ, NaN is itself."""
    bits = states.detach().view(_BITS[states.element_size()])
    return torch.equal(bits[row], bits[row - 1])


class _InferenceOnly(torch.autograd.Function):
    """Views of the cache, from which no gradient flows to the K and V that were written there."""

    @staticmethod
    def forward(ctx: Any, key: torch.Tensor, value: torch.Tensor, *_: torch.Tensor) -> Any:
        return key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise InvalidRequest("a VirtualCache is for inference: train with use_cache=False")


def _inference_only(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = _InferenceOnly.apply(*tensors)
    return key, value
