"""The paged cache: the promises of `KVCache`, counted in blocks."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from support.mirror import Mirror
from vattention.cache import KVLayout, PagedKVCache
from vattention.errors import ConfigError, InvalidRequest, OutOfPages

SLOTS, LONGEST = 5, 40
LAYOUT = KVLayout(2, 2, 4, torch.float32, SLOTS, LONGEST)
TOKEN = LAYOUT.bytes_per_token


def open_cache(blocks: int = 12, block_size: int = 4, **options: Any) -> PagedKVCache:
    return PagedKVCache(LAYOUT, memory=blocks * block_size * TOKEN, block_size=block_size, **options)


class Gathered:
    """One side of a layer as a `KVCache` would show it."""

    def __init__(self, blocks: np.ndarray, cache: PagedKVCache) -> None:
        self._tokens = blocks.reshape(-1, *blocks.shape[2:])
        self._cache = cache

    def _places(self, slot: int, tokens: slice) -> np.ndarray:
        positions = np.arange(tokens.start, tokens.stop)
        size = self._cache.block_size
        return self._cache.table.numpy()[slot, positions // size] * size + positions % size

    def __getitem__(self, at: tuple[int, slice]) -> np.ndarray:
        return self._tokens[self._places(*at)]

    def __setitem__(self, at: tuple[int, slice], values: np.ndarray) -> None:
        self._tokens[self._places(*at)] = values


class PagedMirror(Mirror):
    """A `Mirror` that looks through the block table."""

    def __init__(self, cache: PagedKVCache) -> None:
        super().__init__(cache)  # type: ignore[arg-type]
        self._views = [(Gathered(view, cache), codes) for view, codes in self._views]  # type: ignore[misc]

    def check(self) -> None:
        cache: Any = self.cache
        self.check_lengths()
        self.check_contents()
        shown = [block for row in cache.table.tolist() for block in row if block >= 0]
        for slot in range(cache.layout.max_num_seqs):
            blocks = -(-len(self.tokens.get(slot, ())) // cache.block_size)
            row = cache.table[slot]
            assert (row[:blocks] >= 0).all()
            assert (row[blocks:] == -1).all()
        stats, block = cache.stats(), cache.block_size * TOKEN
        needed = sum(map(len, self.tokens.values())) * TOKEN
        assert (stats.needed, stats.mapped, stats.wasted) == (needed, len(shown) * block, len(shown) * block - needed)
        assert (stats.pages_in_use, stats.pages_free) == (len(set(shown)), cache.num_blocks - len(set(shown)))
        assert (stats.live_slots, stats.budget, stats.created) == (len(self.tokens), *2 * (cache.num_blocks * block,))
        assert {b: n for b, n in enumerate(cache._refs) if n} == Counter(shown)


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("block_size", [1, 3, 4, 16, 256])
def test_random_calls_keep_every_token(block_size: int, poison: bool) -> None:
    for seed in range(12):
        dice = random.Random(seed)
        blocks = max(1, dice.choice((60, 100)) // block_size)
        with open_cache(blocks, block_size, poison=poison) as cache:
            mirror = PagedMirror(cache)
            for _ in range(60):
                live = list(mirror.tokens)
                match dice.choice(("alloc", "fork", "free", "step", "step", "step", "back")):
                    case "alloc":
                        mirror.alloc(dice.randint(0, LONGEST))
                    case "fork" if live:
                        before = [list(row) for row in cache.table.tolist()]
                        try:
                            mirror.fork(dice.choice(live))
                        except OutOfPages:
                            assert before == cache.table.tolist()
                    case "free" if live:
                        mirror.free(dice.choice(live))
                    case "step" if live:
                        some = dice.sample(live, dice.randint(1, len(live)))
                        mirror.step_as_foreseen({slot: dice.randint(0, LONGEST) for slot in some})
                    case "back" if live:
                        # Into shared blocks, and out of them again.
                        mirror.step_as_foreseen(
                            {slot: max(0, cache.length(slot) - dice.randint(0, 3)) for slot in live}
                        )
                        mirror.step_as_foreseen({slot: min(LONGEST, cache.length(slot) + 1) for slot in live})
                mirror.check()
            for slot in list(mirror.tokens):
                mirror.free(slot)
            mirror.check()
            assert cache.fits({}, new=[min(cache.num_blocks * block_size, LONGEST)])


def test_what_is_past_the_lengths_is_nan() -> None:
    cache = open_cache(poison=True)
    slot = cache.alloc()
    assert slot is not None
    k, v = cache.layer(1)
    cache.step({slot: 6})
    first, second = cache.table[slot, :2].tolist()
    assert k[[first, second]].isnan().all()
    k[[first, second]] = v[[first, second]] = 1.0
    cache.step({slot: 7})
    for side in (k, v):
        assert side[first].eq(1).all()
        assert side[second, :3].eq(1).all()
        assert side[second, 3:].isnan().all()
    cache.free(slot)
    other = cache.alloc()
    assert other is not None
    cache.step({other: 1})
    assert k[cache.table[other, 0]].isnan().all()


def test_a_fork_shares_full_blocks_and_copies_the_last_one() -> None:
    cache = open_cache()
    slot = cache.alloc()
    assert slot is not None
    cache.step({slot: 10})
    fork = cache.fork(slot)
    assert fork is not None
    assert cache.table[slot, :2].equal(cache.table[fork, :2])
    assert cache.table[slot, 2] != cache.table[fork, 2]
    assert (cache.stats().copied, cache.stats().pages_in_use) == (2 * TOKEN, 4)
    cache.step({fork: 5})  # into a block that both have
    cache.step({fork: 6})  # which is written now
    assert cache.table[slot, 1] != cache.table[fork, 1]
    assert cache.stats().copied == 3 * TOKEN


def test_of_two_that_write_into_a_shared_block_one_keeps_it() -> None:
    cache = open_cache(blocks=3)
    slot = cache.alloc()
    assert slot is not None
    cache.step({slot: 8})
    fork = cache.fork(slot)
    assert fork is not None
    cache.step({slot: 6, fork: 6})
    assert cache.fits({slot: 7, fork: 7})
    cache.step({slot: 7, fork: 7})
    assert cache.stats().pages_free == 0
    cache.step({slot: 4, fork: 6})
    with pytest.raises(OutOfPages):
        cache.step({slot: 9})


def test_a_step_is_all_or_nothing() -> None:
    cache = open_cache(blocks=3)
    one, two = cache.alloc(), cache.alloc()
    assert one is not None
    assert two is not None
    cache.step({one: 4})
    with pytest.raises(OutOfPages, match="3 blocks needed, 2 can be had") as caught:
        cache.step({one: 8, two: 8})
    assert (caught.value.needed, caught.value.free, caught.value.what) == (3, 2, "blocks")
    assert (cache.length(one), cache.length(two), cache.stats().pages_in_use) == (4, 0, 1)
    with pytest.raises(InvalidRequest):
        cache.step({two: 4, 4: 1})
    assert cache.length(two) == 0
    cache.step({one: 0, two: 12})  # what one gives back, the other may have
    with pytest.raises(OutOfPages):
        cache.step({one: 1})
    cache.step({two: 10})
    with pytest.raises(OutOfPages):  # for the copy of the last block
        cache.fork(two)
    assert cache.stats().live_slots == 2


def test_capacity() -> None:
    assert open_cache(blocks=1).capacity() == 4
    assert open_cache(blocks=12).capacity() == 40 + 8
    assert open_cache(blocks=1000).capacity() == SLOTS * LONGEST
    assert open_cache(blocks=1000).num_blocks == SLOTS * 10  # more can never be used
    assert open_cache(blocks=1, block_size=256).capacity() == LONGEST
    assert open_cache(blocks=2, block_size=7).capacity() == 14


def test_mistakes() -> None:
    for wrong, error in (
        ({"block_size": 0}, ConfigError),
        ({"block_size": 1.5}, TypeError),
        ({"memory": 4 * TOKEN - 1}, ConfigError),
    ):
        with pytest.raises(error):
            PagedKVCache(LAYOUT, **{"memory": "1MiB", "block_size": 4, **wrong})
    for order in ({"head_major": True}, {"kv_together": True}, {"layers_per_stream": None}):
        with pytest.raises(ConfigError, match="cache='virtual'"):
            PagedKVCache(KVLayout(2, 2, 4, torch.float32, SLOTS, LONGEST, **order), memory="1MiB")
    cache = open_cache()
    slot = cache.alloc()
    assert slot is not None
    for call in (
        lambda: cache.alloc(41),
        lambda: cache.step({slot: 41}),
        lambda: cache.step({1: 1}),
        lambda: cache.fits({1: 1}),
        lambda: cache.fits(new=[41]),
        lambda: cache.prefetch({1: 1}),
        lambda: cache.fork(1),
        lambda: cache.free(1),
        lambda: cache.layer(2),
    ):
        with pytest.raises(InvalidRequest):
            call()
    assert not cache.fits(new=[1] * SLOTS)
    assert cache.fits(new=[1] * (SLOTS - 1))
    cache.wait()
    assert cache.trim() == 0
    cache.close()
    cache.close()
    for call in (cache.alloc, cache.stats, cache.capacity, cache.wait, lambda: cache.layer(0), lambda: cache.step({})):
        with pytest.raises(InvalidRequest, match="closed"):
            call()
