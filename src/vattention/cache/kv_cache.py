"""The KV cache: slots of tokens in virtual memory that physical pages follow."""

from __future__ import annotations

import functools
import operator
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import SupportsIndex

import torch

from vattention.cache.arguments import checked_layer, checked_length, checked_lengths, checked_slot
from vattention.cache.backing import Backing
from vattention.cache.layout import KVLayout
from vattention.cache.moving import apply_moves, plan_moves
from vattention.cache.opening import integer, open_pool
from vattention.cache.room import WATERMARK, Room
from vattention.cache.stats import CacheStats, SlotStats
from vattention.errors import DriverError, InvalidRequest, OutOfPages
from vattention.memory import CudaDriver, Driver, PagePool


class KVCache:
    """K and V of `max_num_seqs` sequences, each contiguous in virtual memory, with pages only where tokens are.

    The way of a request (the paper's `init / alloc_reqid / step / free_reqid`):

    >>> cache = KVCache(layout, memory="1GiB")
    >>> slot = cache.alloc()
    >>> cache.step({slot: 100})             # tokens 0..99 may now be written and read
    >>> k, v = cache.layer(0)               # k[slot, :100] is [100, num_kv_heads, head_dim]
    >>> cache.step({slot: 101})             # one more; nothing moves
    >>> cache.free(slot)

    Between two steps of a slot, tokens at or past the length it had before the later step may be written, and tokens
    below its length may be read. `stats` and `slots` may be called from any thread at any time. Everything else belongs
    to one owner; calls from several threads are safe but wait for each other, and join growth in the background first.

    Args:
        layout: the geometry.
        device: "cpu", "cuda" or "cuda:N".
        memory: physical budget, bytes or a string like "2GiB"; by default 2 GiB of a host, and of a device what
            `memory_utilization` says. Not with `pool`.
        memory_utilization: share of a device's memory, 0.9 by default, that is in use when the cache is full; what is
            in use already, weights for instance, counts. Not with `memory` or `pool`.
        page_size: bytes; None picks the smallest page that the budget and the mapping limit allow. Not with `pool`.
        pool: take pages from this pool, which other caches may use too.
        guard: reading an address without a page faults, instead of giving zeros. A debugging aid.
        poison: every step fills what is mapped past the lengths with NaN, so that a kernel reading there is found out.

    Raises:
        ConfigError: sizes that do not fit together, or a device that is not there.
        DriverError: the system refuses the addresses. OutOfPages: the process has no mappings left.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        device: str | torch.device = "cpu",
        memory: str | SupportsIndex | None = None,
        memory_utilization: float | None = None,
        page_size: SupportsIndex | str | None = None,
        pool: PagePool | None = None,
        guard: bool = False,
        poison: bool = False,
    ) -> None:
        pool, own_driver = open_pool(
            layout, device=device, memory=memory, memory_utilization=memory_utilization,
            page_size=page_size, pool=pool, guard=guard,
        )  # fmt: skip
        self.layout = layout
        self.pool = pool
        self._own_driver = own_driver
        self.poison = bool(poison)
        try:
            self._backing = Backing(layout, pool)
        except BaseException:
            if own_driver is not None:
                own_driver.close()
            raise
        self._room = Room(self._backing, self)
        self._slots = self._backing.slots
        self._views = [tuple(self._view(layer, which) for which in (0, 1)) for layer in range(layout.num_layers)]
        self._mapper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vattention-mapper")
        self._growing: Future[None] | None = None
        self._prefetch_failures = 0
        self._wants_idle_slot = True
        self._owner = os.getpid()
        self._closer = weakref.finalize(self, _forget, self._backing, pool, own_driver, self._owner)
        self._closer.atexit = False  # the system takes everything back by itself then
        pool.add_holder(self)

    # -- slots ----------------------------------------------------------------------------------------------------

    def alloc(self, tokens: SupportsIndex = 0) -> int | None:
        """Take a slot, with length 0; None when all are live.

        Among the idle slots that still have pages from an earlier request, the smallest that covers `tokens` is
        taken, or else the largest (the paper's deferred reclamation). Pages past a given `tokens` go back
        to the pool.

        Args:
            tokens: how many tokens are expected soon, the prompt for instance. A hint; 0 when unknown.

        Raises:
            InvalidRequest: `tokens` negative or past max_model_len. DriverError: unmapping failed; the slot is idle.
        """
        tokens = self._checked_length(tokens, "tokens")
        with self._owned():
            idle = [number for number, slot in enumerate(self._slots) if not slot.live]
            if not idle:
                return None
            number = min(idle, key=lambda number: self._fitness(number, tokens))
            self._take(number, tokens)
            return number

    def alloc_range(self, count: SupportsIndex) -> range | None:
        """Take `count` slots at neighbouring addresses, with length 0; None when there are not that many together.

        Their part of a layer is one strided view, `k[slots.start:slots.stop]`: the rows of a batch.

        Raises:
            InvalidRequest: `count` below 1. DriverError: unmapping failed; slots taken by then are idle.
        """
        wanted = integer(count, "count")
        if wanted < 1:
            raise InvalidRequest(f"count must be at least 1, got {wanted}")
        with self._owned():
            free = 0
            for number, slot in enumerate(self._slots):
                free = 0 if slot.live else free + 1
                if free == wanted:
                    slots = range(number + 1 - wanted, number + 1)
                    for taken in slots:
                        self._empty_used(taken)
                    for taken in slots:
                        self._slots[taken].live = True
                    return slots
            return None

    def _take(self, number: int, tokens: int) -> None:
        """Make an idle slot live, for `tokens` tokens if that is not 0."""
        if not self._empty_used(number) and tokens:
            self._backing.release(number, tokens)
        self._slots[number].live = True
        self._wants_idle_slot = True

    def _empty_used(self, number: int) -> bool:
        """A new request writes from 0 on, so padding, and pages that others use, are of no use to it."""
        used = self._slots[number].used
        if used:
            self._backing.empty(number)
        return used

    def _fitness(self, number: int, tokens: int) -> tuple[int, int]:
        """Sorts idle slots, the best for `tokens` tokens first."""
        slot = self._slots[number]
        if slot.used:
            return 3, 0
        if not slot.covered:
            return 2, 0
        if slot.covered >= tokens:
            return 0, slot.covered
        return 1, -slot.covered

    def free(self, slot: SupportsIndex) -> None:
        """Give a slot back. Its pages stay mapped until somebody needs them, or takes the slot over with them.

        Raises:
            InvalidRequest: the slot is not live.
        """
        with self._owned():
            state = self._slots[self._checked_slot(slot)]
            state.live = False
            state.length = 0

    def fork(self, slot: SupportsIndex) -> int | None:
        """A new slot with the same tokens; None when all are live.

        Full pages are shared, the tail of each stream is copied: at most one page a stream is created. Whichever side
        writes into a shared page later, after a rollback, gets a page of its own first.

        Raises:
            InvalidRequest: the slot is not live. OutOfPages, DriverError: nothing has changed.
        """
        with self._owned():
            source = self._checked_slot(slot)
            idle = [number for number, state in enumerate(self._slots) if not state.live]
            if not idle:
                return None
            target = min(idle, key=lambda number: self._slots[number].pages)
            self._move({target: source})
            return target

    def reorder(self, sources: Mapping[int, int]) -> None:
        """Make each slot that is named hold what the slot it maps to holds now, all at once.

        Full pages are shared and stay in place where they are the right ones already; only tails are copied, less than
        a page of each stream. A source may be used several times, or overwritten itself. An idle slot becomes live.
        What a slot held before, and nobody holds any more, is given back to the pool. Beam search is this:
        `cache.reorder({row: beam for row, beam in enumerate(beam_idx)})`.

        Args:
            sources: slot -> the live slot whose tokens, and padding, it is to have.

        Raises:
            InvalidRequest: a source that is not live, or a slot that is not there.
            OutOfPages, DriverError: nothing has changed.
        """
        with self._owned():
            if not isinstance(sources, Mapping):
                raise TypeError(f"sources must map slots to slots, not {type(sources).__name__}")
            wanted = {integer(target, "a slot"): self._checked_slot(source) for target, source in sources.items()}
            for target in wanted:
                if not 0 <= target < len(self._slots):
                    raise InvalidRequest(f"slot {target} is not one of the {len(self._slots)} slots")
            self._move(wanted)

    def _move(self, sources: Mapping[int, int]) -> None:
        self._backing.reservation.settle()
        for target in sources:  # an idle slot's padding and shared pages are leftovers
            if not self._slots[target].live:
                self._empty_used(target)
        cost = self._room.make(plan_moves(self._backing, sources).cost, {})
        self._room.insist(lambda: apply_moves(self._backing, plan_moves(self._backing, sources)), cost.pages, {})
        for target in sources:
            self._slots[target].live = True

    def pad(self, starts: Mapping[int, int]) -> None:
        """Say that the first tokens of empty slots are padding: they read as zeros, and no page is ever behind them.

        Lengths count padding too, so that rows of different prompts end at the same place. Never write there.

        Args:
            starts: live slot of length 0 -> tokens of padding before its first token.

        Raises:
            InvalidRequest: a slot that is not live or has tokens, or a number outside 0..max_model_len.
            OutOfPages, DriverError: of pages for zeros, where an address without a page cannot be read (guard mode,
                devices). Slots keep their padding or have none; none has lost a token.
        """
        with self._owned():
            wanted = self._checked(starts)
            for number in wanted:
                if self._slots[number].length:
                    raise InvalidRequest(f"slot {number} has tokens already: pad it before its first step")
            if not self._backing.reservation.settled:
                self._backing.reservation.settle()
            for number, start in wanted.items():
                if self._slots[number].start != start:
                    self._backing.empty(number)
                    if start:
                        self._room.insist(functools.partial(self._backing.pad, number, start), 1, {})

    def length(self, slot: SupportsIndex) -> int:
        """Tokens of a live slot."""
        with self._owned():
            return self._slots[self._checked_slot(slot)].length

    # -- growth ---------------------------------------------------------------------------------------------------

    def step(self, lengths: Mapping[int, int]) -> None:
        """Set the lengths of slots, and put pages behind all their tokens. Call it before the forward pass.

        All or nothing. Slots not named keep their length; a smaller number is a rollback, and costs nothing.

        Args:
            lengths: slot -> tokens it has when the forward pass is over.

        Raises:
            OutOfPages: the budget, the mapping limit or the machine has too little left, idle slots counted.
            InvalidRequest: a slot that is not live, or a length outside 0..max_model_len.
            DriverError: the driver failed. After each of these lengths, contents and pages of live slots are as before.
        """
        with self._owned():
            wanted = self._checked(lengths)
            if not self._backing.reservation.settled:
                self._backing.reservation.settle()
            plan = self._room.plan(wanted)
            if plan.pages:
                plan = self._room.make(plan, wanted)
                self._room.insist(lambda: self._backing.apply(self._room.plan(wanted)), plan.pages, wanted)
            for number, length in wanted.items():
                self._slots[number].length = length
            if self.poison:
                self._backing.poison()

    def fits(self, lengths: Mapping[int, int] | None = None, new: Sequence[int] = ()) -> bool:
        """Whether `step(lengths)` would succeed now, with slots of `new` lengths allocated in the same breath.

        Raises InvalidRequest where `step` would. It cannot foresee a failing driver or another cache on the pool.
        """
        with self._owned():
            wanted = self._checked({} if lengths is None else lengths)
            plan = self._room.plan(wanted)
            idle = sum(not slot.live for slot in self._slots)
            for tokens in new:
                idle -= 1
                plan += self._backing.plan_new(self._checked_length(tokens, "new length"))
            return idle >= 0 and self._room.shortage(plan, wanted) is None

    def capacity(self) -> int:
        """Tokens that fit at once when nothing else is held, filling one slot after another to max_model_len."""
        with self._owned():
            return self._room.capacity()

    def prefetch(self, lengths: Mapping[int, int]) -> None:
        """Start mapping, in the background, what `step(lengths)` will need (the paper's background allocation).

        Best effort: it takes pages that are free and never somebody else's, and changes no length. It also keeps the
        first pages of one idle slot mapped, for the next request (the paper's eager allocation).

        Raises InvalidRequest as `step` does.
        """
        with self._owned():
            wanted = self._checked(lengths)
            short = {number: length for number, length in wanted.items() if length > self._slots[number].covered}
            self._growing = None
            if short or self._wants_idle_slot:
                self._growing = self._mapper.submit(self._grow, short)

    def wait(self) -> None:
        """Join background growth. Raises the DriverError it ended in, once; step would try the same again."""
        self._check_open()
        growing = self._join()
        self._growing = None
        if growing is not None and (error := growing.exception()):
            raise error

    def _grow(self, wanted: Mapping[int, int]) -> None:
        try:
            with self.pool.lock:
                if self.closed:
                    return
                for number, length in wanted.items():
                    self._grow_slot(number, length)
                self._map_idle_slot()
        except DriverError:
            self._prefetch_failures += 1
            raise

    def _grow_slot(self, number: int, length: int) -> bool:
        plan = self._backing.plan_growth(number, length)
        mappings = self.pool.driver.mappings.free
        if plan.pages > self.pool.available or (mappings is not None and plan.mappings > mappings):
            return False
        try:
            self._backing.apply(plan)
        except OutOfPages:  # the machine has less than the budget: step will say so, if it still matters then
            return False
        return True

    def _map_idle_slot(self) -> None:
        """Have one idle slot with pages, where that leaves the pool above its watermark."""
        idle = [number for number, slot in enumerate(self._slots) if not slot.live]
        spare = self.pool.available - WATERMARK * self.pool.budget
        if idle and not any(self._slots[number].covered for number in idle) and spare > len(self.layout.streams):
            self._grow_slot(idle[0], 1)
        self._wants_idle_slot = False

    # -- memory ---------------------------------------------------------------------------------------------------

    def layer(self, index: SupportsIndex) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, [max_num_seqs, padded_len, num_kv_heads, head_dim] each: the same tensors every time.

        Strided views at addresses that never change, in the shape of that layer. Touch only what `step` has backed.

        Raises:
            InvalidRequest: there is no such layer.
        """
        views = self._views
        self._check_open()
        k, v = views[checked_layer(index, self.layout.num_layers)]
        return k, v

    def watch(self, stream: SupportsIndex) -> None:
        """Say that work on this cache comes from a stream of its device; without it, from anywhere on the device.

        Pages are unmapped once the work of the streams that were named has ended, and that of the caller's own torch
        stream: name all before they are used. Where the driver belongs to others too nothing changes: nobody here knows
        their streams.

        Args:
            stream: its handle, `torch.cuda.Stream.cuda_stream` for instance.
        """
        with self._owned():
            if isinstance(self._own_driver, CudaDriver):
                self._own_driver.watch(operator.index(stream))

    def trim(self) -> int:
        """Give everything reclaimable, and the pool's free pages, back to the system. Returns the bytes.

        Raises:
            DriverError: not everything could be given back; what was is.
        """
        with self._owned():
            self._backing.reservation.settle()
            for number, slot in enumerate(self._slots):
                self._backing.release(number, slot.length)
            return self.pool.trim()

    def reclaimable(self) -> int:
        """Pages that `reclaim` could make available in the pool. For the pool, which holds its lock meanwhile."""
        return self._backing.reclaimable({})

    def reclaim(self, pages: int) -> None:
        """Unmap idle pages until `pages` more are available in the pool. For the pool, as `reclaimable`."""
        goal = self.pool.available + operator.index(pages)
        if not self._backing.reservation.settled:  # what an earlier failure put in quarantine comes first
            self._backing.reservation.settle()
        self._backing.reclaim(goal, {})

    def stats(self) -> CacheStats:
        """Numbers of one moment. Safe from any thread."""
        self._check_open()
        with self.pool.lock:
            page = self.pool.page_size
            pool = self.pool.stats()
            live = [slot for slot in self._slots if slot.live]
            mapped = self._backing.mapped_pages(live) * page
            needed = sum(slot.tokens for slot in live) * self.layout.bytes_per_token
            return CacheStats(
                reserved=self.layout.size,
                budget=pool.budget * page,
                created=pool.created * page,
                mapped=mapped,
                needed=needed,
                wasted=mapped - needed,
                reclaimable=self._backing.reclaimable({}) * page,
                mappings=self._backing.reservation.mappings,
                mapping_limit=self.pool.driver.mappings.limit,
                pages_free=pool.free,
                pages_in_use=pool.in_use,
                pages_quarantined=pool.quarantined,
                live_slots=len(live),
                copied=self._backing.copied,
                driver_calls=dict(self.pool.meter.calls),
                driver_seconds=self.pool.meter.seconds,
                prefetch_failures=self._prefetch_failures,
            )

    def slots(self) -> tuple[SlotStats, ...]:
        """Every slot at one moment, by number. Safe from any thread."""
        self._check_open()
        with self.pool.lock:
            return tuple(
                SlotStats(
                    live=slot.live,
                    tokens=slot.length,
                    mapped=slot.pages * self.pool.page_size,
                    needed=slot.tokens * self.layout.bytes_per_token,
                    shared=self._backing.shared_pages(number) * self.pool.page_size,
                )
                for number, slot in enumerate(self._slots)
            )

    def close(self) -> None:
        """Give the physical memory back now, and the addresses when the last tensor over them dies. Idempotent.

        Raises:
            DriverError: the driver failed; no slot is live any more, and closing again tries again.
        """
        if not self._closer.alive:
            return
        if os.getpid() == self._owner:
            self._join()
            with self.pool.lock:
                _close(self._backing, self.pool, self._own_driver)
                self._closer.detach()
            self._mapper.shutdown()  # outside the lock, which growth of the last moment waits for
        self._closer.detach()
        self._views = []

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._closer.alive

    def __enter__(self) -> KVCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _view(self, layer: int, which: int) -> torch.Tensor:
        layout = self.layout
        own = layout.shape(layer)
        shape = (layout.max_num_seqs, layout.padded_len, own.num_kv_heads, own[1 + which])
        view = layout.view(layer, which)
        return self._backing.reservation.tensor(view.offset, shape, view.strides, layout.dtype)

    def _checked(self, lengths: Mapping[int, int]) -> dict[int, int]:
        return checked_lengths(lengths, self._checked_slot, self.layout.max_model_len)

    def _checked_slot(self, slot: SupportsIndex) -> int:
        return checked_slot(slot, len(self._slots), lambda number: self._slots[number].live)

    def _checked_length(self, length: SupportsIndex, what: str) -> int:
        return checked_length(length, what, self.layout.max_model_len)

    def _check_open(self) -> None:
        if os.getpid() != self._owner:
            raise InvalidRequest("this cache belongs to the parent process: open a new one after fork")
        if self.closed:
            raise InvalidRequest("this cache is closed: open a new one")

    def _join(self) -> Future[None] | None:
        """Wait for background growth, without looking at how it ended."""
        growing = self._growing
        if growing is not None:
            growing.exception()
        return growing

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """Background growth is over and the pool is ours."""
        self._check_open()
        self._join()
        with self.pool.lock:
            self._check_open()
            yield


def _close(backing: Backing, pool: PagePool, own_driver: Driver | None) -> None:
    """Everything back."""
    backing.close()
    if own_driver is not None:
        pool.trim()
        own_driver.close()


def _forget(backing: Backing, pool: PagePool, own_driver: Driver | None, owner: int) -> None:
    """What becomes of a cache that is dropped instead of closed."""
    if os.getpid() != owner:
        return
    if own_driver is not None:
        _close(backing, pool, own_driver)
    else:
        pool.defer(backing.close)
