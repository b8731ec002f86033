"""The paged baseline: K and V in blocks anywhere in a pool, and a table that says where (PagedAttention, 2309.06180).

Here so that the layout in virtual memory can be compared with it in one engine, and as a second opinion in tests: the
scheduler, the engine and the decode kernel are the same, and only addresses differ.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import SupportsIndex

import torch

from vattention.cache.arguments import checked_layer, checked_length, checked_lengths, checked_slot
from vattention.cache.layout import KVLayout
from vattention.cache.opening import integer
from vattention.cache.stats import CacheStats, SlotStats
from vattention.errors import ConfigError, InvalidRequest, OutOfPages
from vattention.memory.sizes import format_size, parse_size

DEFAULT_BLOCK_SIZE = 16
"""Tokens: vLLM's and FlashInfer's."""


class PagedKVCache:
    """K and V of `max_num_seqs` sequences in blocks of `block_size` tokens.

    A scheduler may use it as it uses a `KVCache`: the same calls, errors and promises, counted in blocks. Its tensors
    are made at once, as large as the budget, and stay until `close`, as in paged engines; a host's memory counts as
    used from the first write to it on. A block belongs to a request while the request has tokens in it, or to several
    after `fork`; whoever writes into one that others have gets a copy of its own first.

    Args:
        layout: the geometry: heads, widths, slots and max_model_len. How streams lie means nothing here.
        memory: bytes or a string like "2GiB". No more is taken than all slots at max_model_len need.
        device: where K and V are, "cpu" or "cuda:N"; the table stays on the host.
        block_size: tokens of a block.
        poison: every step fills what a live slot's last block has past its length with NaN, and blocks are full of it
            when they are taken.

    Attributes:
        table: `[max_num_seqs, blocks of a request]` int32: the block of each part of each slot, -1 where there is
            none. The same tensor for life; to be read only.

    Raises:
        ConfigError: a layout of another order, or a budget below one block.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        memory: str | SupportsIndex,
        device: str | torch.device = "cpu",
        block_size: SupportsIndex = DEFAULT_BLOCK_SIZE,
        poison: bool = False,
    ) -> None:
        if layout.head_major or layout.kv_together or layout.layers_per_stream != 1:
            raise ConfigError("head_major, kv_together and layers_per_stream are for cache='virtual': leave them out")
        self.layout = layout
        self.block_size = integer(block_size, "block_size")
        if self.block_size < 1:
            raise ConfigError(f"block_size must be at least 1, got {block_size}")
        self.poison = bool(poison)
        budget = parse_size(memory, "memory")
        self._block_bytes = self.block_size * layout.bytes_per_token
        columns = self._blocks(layout.max_model_len)
        self.num_blocks = min(budget // self._block_bytes, columns * layout.max_num_seqs)
        if self.num_blocks < 1:
            raise ConfigError(
                f"a budget of {format_size(budget)} is less than a block of {self.block_size} tokens"
                f" ({format_size(self._block_bytes)}): raise it, or lower block_size"
            )
        self._device = torch.device(device)
        self._layers = [self._pool(layer) for layer in range(layout.num_layers)]
        self.table = torch.full((layout.max_num_seqs, columns), -1, dtype=torch.int32)
        self._table = self.table.numpy()  # the same memory; numbers go in faster
        self._tables: list[list[int]] = [[] for _ in range(layout.max_num_seqs)]  # of live slots, what `table` shows
        self._lengths: list[int | None] = [None] * layout.max_num_seqs  # None: idle
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._refs = [0] * self.num_blocks
        self._copied = 0
        self._lock = threading.RLock()

    # -- slots ----------------------------------------------------------------------------------------------------

    def alloc(self, tokens: SupportsIndex = 0) -> int | None:
        """Take a slot, with length 0; None when all are live. `tokens`, a hint, is only checked.

        Raises:
            InvalidRequest: `tokens` negative or past max_model_len.
        """
        self._checked_length(tokens, "tokens")
        with self._owned():
            if None not in self._lengths:
                return None
            slot = self._lengths.index(None)
            self._lengths[slot] = 0
            return slot

    def free(self, slot: SupportsIndex) -> None:
        """Give a slot and its blocks back. Raises InvalidRequest if it is not live."""
        with self._owned():
            number = self._checked_slot(slot)
            self._shrink(number, 0)
            self._lengths[number] = None

    def fork(self, slot: SupportsIndex) -> int | None:
        """A new slot with the same tokens; None when all are live.

        Full blocks are shared, a last one that is not full is copied.

        Raises:
            InvalidRequest: the slot is not live. OutOfPages: nothing has changed.
        """
        with self._owned():
            source = self._checked_slot(slot)
            if None not in self._lengths:
                return None
            tail = self._length(source) % self.block_size
            if tail and not self._free:
                raise OutOfPages(1, 0, "blocks")
            target = self._lengths.index(None)
            self._lengths[target] = self._length(source)
            for block in self._tables[source]:
                self._refs[block] += 1
            self._tables[target] = list(self._tables[source])
            self._table[target] = self._table[source]
            if tail:
                self._own_tail(target)
            return target

    def length(self, slot: SupportsIndex) -> int:
        """Tokens of a live slot."""
        with self._owned():
            return self._length(self._checked_slot(slot))

    # -- growth ---------------------------------------------------------------------------------------------------

    def step(self, lengths: Mapping[int, int]) -> None:
        """Set the lengths of slots, and put blocks behind all their tokens. Call it before the forward pass.

        All or nothing. Slots not named keep their length; a smaller number is a rollback, which gives blocks back.

        Raises:
            OutOfPages: too few blocks are free.
            InvalidRequest: a slot that is not live, or a length outside 0..max_model_len.
        """
        with self._owned():
            wanted = self._checked(lengths)
            needed, free = self._plan(wanted)
            if needed > free:
                raise OutOfPages(needed, free, "blocks")
            for number, length in wanted.items():  # first, as `_plan` counts what they give back
                if length <= self._length(number):
                    self._shrink(number, length)
            for number, length in wanted.items():
                if length > self._length(number):
                    self._grow(number, length)
            if self.poison:
                self._poison()

    def fits(self, lengths: Mapping[int, int] | None = None, new: Sequence[int] = ()) -> bool:
        """Whether `step(lengths)` would succeed now, with slots of `new` lengths allocated in the same breath.

        Raises InvalidRequest where `step` would.
        """
        with self._owned():
            needed, free = self._plan(self._checked({} if lengths is None else lengths))
            needed += sum(self._blocks(self._checked_length(tokens, "new length")) for tokens in new)
            return needed <= free and len(new) <= self._lengths.count(None)

    def capacity(self) -> int:
        """Tokens that fit at once when nothing else is held, filling one slot after another to max_model_len."""
        with self._owned():
            longest = self.layout.max_model_len
            full, rest = divmod(self.num_blocks, self.table.shape[1])
            if full >= self.layout.max_num_seqs:
                return self.layout.max_num_seqs * longest
            return full * longest + min(longest, rest * self.block_size)

    def prefetch(self, lengths: Mapping[int, int]) -> None:
        """Nothing: there is nothing to map. Raises InvalidRequest as `step` does."""
        with self._owned():
            self._checked(lengths)

    def wait(self) -> None:
        """Nothing: there is no growth in the background."""
        self._check_open()

    # -- memory ---------------------------------------------------------------------------------------------------

    def layer(self, index: SupportsIndex) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, [num_blocks, block_size, num_kv_heads, head_dim] each: the same tensors every time.

        Raises:
            InvalidRequest: there is no such layer.
        """
        layers = self._layers
        self._check_open()
        return layers[checked_layer(index, self.layout.num_layers)]

    def trim(self) -> int:
        """Bytes given back to the system: none, the pool stays as it is until `close`."""
        self._check_open()
        return 0

    def stats(self) -> CacheStats:
        """Numbers of one moment, with blocks for pages. Safe from any thread.

        A block that several slots share counts in `mapped` for each of them, as a page does.
        """
        with self._owned():
            size = self.num_blocks * self._block_bytes
            mapped = sum(map(len, self._tables)) * self._block_bytes
            live = [length for length in self._lengths if length is not None]
            needed = sum(live) * self.layout.bytes_per_token
            return CacheStats(
                reserved=size,
                budget=size,
                created=size,
                mapped=mapped,
                needed=needed,
                wasted=mapped - needed,
                reclaimable=0,
                mappings=0,
                mapping_limit=None,
                pages_free=len(self._free),
                pages_in_use=self.num_blocks - len(self._free),
                pages_quarantined=0,
                live_slots=len(live),
                copied=self._copied,
                driver_calls={},
                driver_seconds=0.0,
                prefetch_failures=0,
            )

    def slots(self) -> tuple[SlotStats, ...]:
        """Every slot at one moment, by number, with blocks for pages. Safe from any thread."""
        with self._owned():
            return tuple(
                SlotStats(
                    live=length is not None,
                    tokens=length or 0,
                    mapped=len(blocks) * self._block_bytes,
                    needed=(length or 0) * self.layout.bytes_per_token,
                    shared=bisect_left(blocks, True, key=lambda block: self._refs[block] <= 1) * self._block_bytes,
                )
                for length, blocks in zip(self._lengths, self._tables, strict=True)
            )

    def close(self) -> None:
        """Let go of the tensors; their memory goes back when nobody else has them. Idempotent."""
        with self._lock:
            self._layers = []

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._layers

    def __enter__(self) -> PagedKVCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _pool(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape, dtype = self.layout.shape(layer), self.layout.dtype
        size = (self.num_blocks, self.block_size, shape.num_kv_heads)
        widths = (shape.key_dim, shape.value_dim)
        keys, values = (torch.empty(*size, width, dtype=dtype, device=self._device) for width in widths)
        return keys, values

    def _blocks(self, tokens: int) -> int:
        """Blocks behind that many tokens."""
        return -(-tokens // self.block_size)

    def _plan(self, wanted: Mapping[int, int]) -> tuple[int, int]:
        """Blocks that the growth in `wanted` takes, and how many there are when what it shrinks is given back."""
        given: Counter[int] = Counter()  # how many slots give a block up
        for number, length in wanted.items():
            given.update(self._tables[number][self._blocks(length) :])
        free = len(self._free) + sum(self._refs[block] == count for block, count in given.items())
        needed = 0
        for number, length in wanted.items():
            now = self._length(number)
            if length > now:
                needed += self._blocks(length) - len(self._tables[number])
                if now % self.block_size:
                    tail = self._tables[number][-1]
                    if self._refs[tail] - given[tail] > 1:  # copied; who writes into it last keeps it
                        needed += 1
                        given[tail] += 1
        return needed, free

    def _grow(self, number: int, length: int) -> None:
        if self._length(number) % self.block_size and self._refs[self._tables[number][-1]] > 1:
            self._own_tail(number)
        blocks = self._tables[number]
        for column in range(len(blocks), self._blocks(length)):
            blocks.append(self._take())
            self._table[number, column] = blocks[-1]
        self._lengths[number] = length

    def _shrink(self, number: int, length: int) -> None:
        kept = self._blocks(length)
        blocks = self._tables[number]
        while len(blocks) > kept:
            self._drop(blocks.pop())
            self._table[number, len(blocks)] = -1
        self._lengths[number] = length

    def _take(self) -> int:
        block = self._free.pop()
        self._refs[block] = 1
        if self.poison:
            self._fill(block, 0)
        return block

    def _drop(self, block: int) -> None:
        self._refs[block] -= 1
        if not self._refs[block]:
            self._free.append(block)

    def _own_tail(self, number: int) -> None:
        """Give a slot a copy of its last block, up to its length."""
        tokens = self._length(number) % self.block_size
        column = len(self._tables[number]) - 1
        shared, own = self._tables[number][column], self._take()
        for k, v in self._layers:
            k[own, :tokens] = k[shared, :tokens]
            v[own, :tokens] = v[shared, :tokens]
        self._copied += tokens * self.layout.bytes_per_token
        self._tables[number][column] = own
        self._table[number, column] = own
        self._drop(shared)

    def _poison(self) -> None:
        for length, blocks in zip(self._lengths, self._tables, strict=True):
            if length and length % self.block_size and self._refs[blocks[-1]] == 1:  # else others' tokens are there
                self._fill(blocks[-1], length % self.block_size)

    def _fill(self, block: int, start: int) -> None:
        """NaN from a token of a block on."""
        for k, v in self._layers:
            k[block, start:] = float("nan")
            v[block, start:] = float("nan")

    def _length(self, number: int) -> int:
        length = self._lengths[number]
        assert length is not None
        return length

    def _checked(self, lengths: Mapping[int, int]) -> dict[int, int]:
        return checked_lengths(lengths, self._checked_slot, self.layout.max_model_len)

    def _checked_slot(self, slot: SupportsIndex) -> int:
        return checked_slot(slot, len(self._lengths), lambda number: self._lengths[number] is not None)

    def _checked_length(self, length: SupportsIndex, what: str) -> int:
        return checked_length(length, what, self.layout.max_model_len)

    def _check_open(self) -> None:
        if self.closed:
            raise InvalidRequest("this cache is closed: open a new one")

    @contextmanager
    def _owned(self) -> Iterator[None]:
        with self._lock:
            self._check_open()
            yield
