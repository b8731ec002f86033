"""A cache, and beside it, in a plain list, what it must hold.

Every token that is written gets a serial number of its own, and every element of its K and V in every layer a value
made of that number and of its place. So whatever a slot shows, it can be told whose token it is, and a page that shows
up in the wrong slot, stream, layer or head is seen.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from support import kernel
from support.drivers import page_table
from vattention.cache import KVCache
from vattention.errors import OutOfPages
from vattention.memory import PagePool, Run

_INTEGERS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}
_serials = itertools.count(1)


class Mirror:
    """One cache and the serial numbers of the tokens in its live slots.

    Attributes:
        tokens: live slot -> serial number of each of its tokens; 0 for padding, which shows zeros.
        starts: live slot -> tokens of padding, if it has any.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.tokens: dict[int, np.ndarray] = {}
        self.starts: dict[int, int] = {}
        layout = cache.layout
        as_integer, self._type = _INTEGERS[layout.dtype.itemsize]
        random = np.random.default_rng(layout.num_layers)
        self._views: list[tuple[np.ndarray, np.ndarray]] = []
        for layer in range(layout.num_layers):
            for view in cache.layer(layer):
                codes = random.integers(0, 2**63, view.shape[2:], dtype=np.uint64)
                self._views.append((view.view(as_integer).numpy().view(self._type), codes.astype(self._type)))

    def forget(self) -> None:
        """Let go of everything that keeps the cache's addresses alive."""
        self._views.clear()
        self.tokens.clear()
        self.starts.clear()

    # -- changing both ------------------------------------------------------------------------------------------------

    def alloc(self, tokens: int = 0) -> int | None:
        slot = self.cache.alloc(tokens)
        assert (slot is None) == (len(self.tokens) == self.cache.layout.max_num_seqs)
        if slot is not None:
            assert slot not in self.tokens
            self.tokens[slot] = np.zeros(0, np.uint64)
        return slot

    def alloc_range(self, count: int) -> range | None:
        slots = self.cache.alloc_range(count)
        live = sorted([-1, *self.tokens, self.cache.layout.max_num_seqs])
        assert (slots is None) == (max(after - before for before, after in itertools.pairwise(live)) <= count)
        for slot in slots or ():
            assert slot not in self.tokens
            self.tokens[slot] = np.zeros(0, np.uint64)
        assert slots is None or len(slots) == count
        return slots

    def free(self, slot: int) -> None:
        self.cache.free(slot)
        del self.tokens[slot]
        self.starts.pop(slot, None)

    def pad(self, starts: Mapping[int, int]) -> None:
        self.cache.pad(starts)
        self.starts.update(starts)

    def reorder(self, sources: Mapping[int, int]) -> None:
        self.cache.reorder(sources)
        tokens = {target: self.tokens[source].copy() for target, source in sources.items()}
        starts = {target: self.starts.get(source, 0) for target, source in sources.items()}
        self.tokens.update(tokens)
        self.starts.update(starts)

    def fork(self, slot: int) -> int | None:
        target = self.cache.fork(slot)
        assert (target is None) == (len(self.tokens) == self.cache.layout.max_num_seqs)
        if target is not None:
            assert target not in self.tokens
            self.tokens[target] = self.tokens[slot].copy()
            self.starts[target] = self.starts.get(slot, 0)
        return target

    def step(self, lengths: Mapping[int, int]) -> None:
        """Step, then write the tokens that are new, as a forward pass would."""
        self.cache.step(lengths)
        for slot, length in lengths.items():
            padding = np.zeros(max(0, min(length, self.starts.get(slot, 0)) - len(self.tokens[slot])), np.uint64)
            start = len(self.tokens[slot]) + len(padding)
            fresh = np.fromiter(itertools.islice(_serials, max(0, length - start)), np.uint64)
            self.tokens[slot] = np.concatenate([self.tokens[slot][:length], padding, fresh])
            if len(fresh):
                for view, codes in self._views:
                    view[slot, start:length] = self._values(fresh, codes)

    def step_as_foreseen(self, lengths: Mapping[int, int]) -> bool:
        """Step, which must go as `fits` says. Returns whether it did fit."""
        foreseen = self.cache.fits(lengths)
        try:
            self.step(lengths)
        except OutOfPages as error:
            assert not foreseen, f"fits said yes, and step said {error}"
            assert error.needed > error.free
        else:
            assert foreseen, "fits said no, and step succeeded"
        return foreseen

    # -- comparing ----------------------------------------------------------------------------------------------------

    def _values(self, serials: np.ndarray, codes: np.ndarray) -> np.ndarray:
        serials = serials.astype(self._type)[:, None, None]
        return np.where(serials == 0, self._type(0), serials * self._type(0x9E3779B1 & 0xFFFF | 1) + codes)

    def check_lengths(self) -> None:
        assert {slot: self.cache.length(slot) for slot in self.tokens} == {
            slot: len(serials) for slot, serials in self.tokens.items()
        }

    def check_contents(self, *, unreadable: Iterable[int] = ()) -> int:
        """Every token of every live slot shows its values. Returns how many tokens were compared.

        Args:
            unreadable: pages of the address range that cannot be looked at; tokens that touch them are left out.
        """
        compared = 0
        unreadable = set(unreadable)
        for slot, serials in self.tokens.items():
            kept = slice(0, len(serials))
            if unreadable:
                touched = self._tokens_in(slot, unreadable)
                kept = np.array([token for token in range(len(serials)) if token not in touched], dtype=np.int64)
                serials = serials[kept]
            for number, (view, codes) in enumerate(self._views):
                shown, expected = view[slot, kept], self._values(serials, codes)
                if not np.array_equal(shown, expected):
                    wrong = np.nonzero((shown != expected).any(axis=(1, 2)))[0].tolist()
                    raise AssertionError(
                        f"slot {slot}, layer {number // 2}, {'kv'[number % 2]}: tokens {wrong} changed"
                    )
            compared += len(serials)
        return compared

    def _tokens_in(self, slot: int, pages: set[int]) -> set[int]:
        page_size = self.cache.pool.page_size
        found: set[int] = set()
        for stream in self.cache.layout.streams:
            start = stream.offset + slot * stream.size
            for page in pages:
                first = (page * page_size - start) // stream.token_bytes
                last = ((page + 1) * page_size - 1 - start) // stream.token_bytes
                if start <= page * page_size < start + stream.size:
                    found.update(range(max(0, first), last + 1))
        return found

    def places(self) -> dict[int, int]:
        """The cache's page table: page of the address range -> physical page."""
        return dict(self.cache._backing.reservation._table)

    def needed_places(self) -> set[int]:
        """Pages of the address range in which tokens of live slots lie, padding left out."""
        page_size = self.cache.pool.page_size
        places: set[int] = set()
        for slot, serials in self.tokens.items():
            start = self.starts.get(slot, 0)
            for stream in self.cache.layout.streams if len(serials) > start else ():
                base = (stream.offset + slot * stream.size) // page_size
                first = base + start * stream.token_bytes // page_size
                places.update(range(first, base + -(-len(serials) * stream.token_bytes // page_size)))
        return places

    def padding_places(self) -> set[int]:
        """Pages of the address range in which only padding lies."""
        page_size = self.cache.pool.page_size
        places: set[int] = set()
        for slot, start in self.starts.items():
            for stream in self.cache.layout.streams:
                first = (stream.offset + slot * stream.size) // page_size
                places.update(range(first, first + start * stream.token_bytes // page_size))
        return places

    def zeros(self) -> list[Run]:
        """The page that padding shows, where it must show one."""
        zeros = self.cache._backing.zeros
        return [] if zeros is None else [zeros]

    def check_backed(self) -> None:
        """Invariant 1: each token of a live slot has its pages in every stream. Padding has none of its own."""
        page_size = self.cache.pool.page_size
        table = self.places()
        missing = self.needed_places() - set(table)
        assert not missing, f"pages {missing} are not mapped"
        zeros = [run.handle for run in self.zeros()]
        for slot, start in self.starts.items():
            for stream in self.cache.layout.streams:
                first = (stream.offset + slot * stream.size) // page_size
                shown = [table.get(page) for page in range(first, first + start * stream.token_bytes // page_size)]
                assert shown == (zeros or [None]) * len(shown)

    def check_kernel(self, maps: str | None = None) -> None:
        """The kernel's page table is ours, but for pages in quarantine, and takes no more mappings than we count."""
        reservation, pool = self.cache._backing.reservation, self.cache.pool
        stuck = set(reservation._stuck)
        place = (reservation.address, reservation.size)
        shown = page_table(pool.driver, *place, pool.page_size, unreadable=stuck, maps=maps)
        table = self.places()
        if not stuck:
            assert shown == table
        else:
            assert {place: shown.get(place) for place in table if place not in stuck} == {
                place: page for place, page in table.items() if place not in stuck
            }
            assert set(shown) <= set(table) | stuck
        if not stuck and pool.driver.linear:  # a device's mappings are not the kernel's
            assert len(kernel.mappings(*place, maps)) <= reservation.mappings

    def check_stats(self) -> None:
        stats = self.cache.stats()
        pool, page = self.cache.pool.stats(), self.cache.pool.page_size
        layout = self.cache.layout
        needed = sum(map(np.count_nonzero, self.tokens.values())) * layout.bytes_per_token
        assert (stats.needed, stats.live_slots, stats.reserved) == (needed, len(self.tokens), layout.size)
        live = 0
        zeros = [run.handle for run in self.zeros()]
        places = [place for place, shown in self.places().items() if shown not in zeros]
        for stream in layout.streams:
            for slot in self.tokens:
                first = (stream.offset + slot * stream.size) // page
                live += sum(first <= place < first + stream.size // page for place in places)
        assert stats.mapped == live * page
        assert stats.mapped >= stats.needed
        assert stats.wasted == stats.mapped - stats.needed
        assert (stats.budget, stats.created) == (pool.budget * page, pool.created * page)
        assert (stats.pages_free, stats.pages_in_use, stats.pages_quarantined) == (
            pool.free, pool.in_use, pool.quarantined,
        )  # fmt: skip
        assert 0 <= stats.reclaimable <= (pool.in_use + pool.quarantined) * page
        assert stats.mappings <= (stats.mapping_limit or stats.mappings)


def check_pool(
    pool: PagePool, mirrors: Iterable[Mirror], *, held: Iterable[Run] = (), physical_bytes: int | None = None
) -> None:
    """Invariants 2 and 3 over one pool, all caches on it, and what somebody else holds.

    Args:
        physical_bytes: what the driver says it holds, where it can say.
    """
    mirrors = list(mirrors)
    page = pool.page_size
    references: Counter[int] = Counter()
    for run in held:
        references.update(range(run.handle, run.handle + run.pages * page, page))
    stuck: Counter[int] = Counter()
    for mirror in mirrors:
        references.update(mirror.places().values())
        references.update(run.handle for run in mirror.zeros())
        for pages in mirror.cache._backing.reservation._stuck.values():
            stuck.update(pages)
    created = set(pool._refs)
    assert set(references) | set(stuck) <= created, "a page is mapped that the pool has not created"
    for number in created:
        assert pool.references(number) == references[number] + stuck[number], f"references of page {number:#x}"
    stats = pool.stats()
    quarantined = len(set(stuck) - set(references))
    in_use = len(references)
    assert stats == (pool.budget, len(created), len(created) - in_use - quarantined, in_use, quarantined)
    assert stats.free + stats.in_use + stats.quarantined == stats.created <= stats.budget
    assert min(stats) >= 0
    assert pool.available == stats.budget - stats.created + stats.free
    if physical_bytes is not None:
        assert physical_bytes == stats.created * page
    budget = pool.driver.mappings
    assert budget.limit is None or budget.used <= budget.limit


def check_all(pool: PagePool, mirrors: Iterable[Mirror], *, held: Iterable[Run] = ()) -> None:
    """Everything that must be true between two calls while the driver works."""
    mirrors = list(mirrors)
    for mirror in mirrors:
        mirror.cache.fits({})  # joins background growth
        mirror.check_lengths()
    check_pool(pool, mirrors, held=held, physical_bytes=pool.driver.physical_bytes)
    maps = kernel.read_maps()
    for mirror in mirrors:
        mirror.check_backed()
        mirror.check_kernel(maps)
        mirror.check_stats()
        mirror.check_contents()
