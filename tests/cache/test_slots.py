"""What each slot has, in both caches: bytes mapped, needed and shared, against a count of every page."""

import random

import pytest
import torch

from vattention.cache import KVCache, KVLayout, PagedKVCache
from vattention.cache.backing import Part
from vattention.errors import InvalidRequest, OutOfPages

PAGE = 4096
LAYOUT = KVLayout(2, 2, 64, torch.float32, 6, 1000)  # 4 streams, 512 bytes a token each: 8 tokens a page
STREAMS = 4
PER_PAGE = 8


@pytest.fixture
def cache():
    with KVCache(LAYOUT, memory=400 * PAGE, page_size=PAGE) as cache:
        yield cache


def counted(cache: KVCache, number: int) -> int:
    """Bytes of shared pages below the length of a slot, page by page."""
    backing = cache._backing
    slot = backing.slots[number]
    places = [
        backing.index(Part(number, stream, 0, 0)) + page
        for stream, end in enumerate(backing.ends_for(slot, slot.length))
        for page in range(slot.first[stream], end)
    ]
    pages = [backing.reservation.page(place) for place in places]
    return sum(page is not None and cache.pool.references(page) > 1 for page in pages) * PAGE


def test_a_slot_shows_its_tokens_and_its_pages(cache):
    slot = cache.alloc()
    cache.step({slot: PER_PAGE + 1})
    found = cache.slots()
    assert len(found) == 6
    state = found[slot]
    assert (state.live, state.tokens) == (True, PER_PAGE + 1)
    assert state.mapped == 2 * STREAMS * PAGE
    assert state.needed == (PER_PAGE + 1) * LAYOUT.bytes_per_token
    assert state.shared == 0
    assert not any(other.live or other.mapped for other in found if other is not state)


def test_what_a_finished_request_left_stays_with_its_slot(cache):
    slot = cache.alloc()
    cache.step({slot: 20})
    cache.free(slot)
    state = cache.slots()[slot]
    assert not state.live
    assert (state.tokens, state.needed, state.mapped) == (0, 0, 3 * STREAMS * PAGE)


def test_full_pages_are_shared_after_a_fork_and_not_after_one_side_wrote(cache):
    slot = cache.alloc()
    cache.step({slot: 2 * PER_PAGE + 3})
    other = cache.fork(slot)
    assert [cache.slots()[each].shared for each in (slot, other)] == [2 * STREAMS * PAGE] * 2
    cache.step({slot: PER_PAGE})
    cache.step({slot: PER_PAGE + 1})  # writes into the second page
    assert [cache.slots()[each].shared for each in (slot, other)] == [STREAMS * PAGE] * 2


def test_both_sides_add_up_to_the_stats(cache):
    slots = [cache.alloc() for _ in range(3)]
    cache.step({slot: 10 * (slot + 1) for slot in slots})
    cache.fork(slots[2])
    found, stats = cache.slots(), cache.stats()
    assert sum(slot.mapped for slot in found if slot.live) == stats.mapped
    assert sum(slot.needed for slot in found) == stats.needed
    assert sum(slot.live for slot in found) == stats.live_slots


def test_padding_is_not_shared_memory(cache):
    slot = cache.alloc()
    cache.pad({slot: 2 * PER_PAGE})
    cache.step({slot: 4 * PER_PAGE})
    cache.fork(slot)
    state = cache.slots()[slot]
    assert state.needed == 2 * PER_PAGE * LAYOUT.bytes_per_token
    assert state.shared == 2 * STREAMS * PAGE


OTHERS = {
    "head-major": KVLayout(2, 2, 64, torch.float32, 6, 1000, head_major=True),
    "in slices": KVLayout(3, 2, 64, torch.float32, 6, 1000, layers_per_stream=2),
    "K and V together": KVLayout(2, 2, 64, torch.float32, 6, 1000, kv_together=True),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", [LAYOUT, *OTHERS.values()], ids=["token-major", *OTHERS])
def test_shared_pages_are_counted_right_after_forks_and_growth(layout, seed):
    with KVCache(layout, memory=400 * PAGE, page_size=PAGE) as cache:
        work_and_count(cache, random.Random(seed))


def work_and_count(cache: KVCache, chance: random.Random) -> None:
    shared = 0
    for _ in range(120):
        live = [number for number, slot in enumerate(cache.slots()) if slot.live]
        what = chance.choice(["alloc", "step", "step", "step", "fork", "fork", "free"])
        try:
            if what == "alloc":
                cache.alloc()
            elif what == "fork" and live:
                cache.fork(chance.choice(live))
            elif what == "free" and live:
                cache.free(chance.choice(live))
            elif live:
                slot = chance.choice(live)
                cache.step({slot: min(1000, cache.length(slot) + chance.choice([1, 5, 30]))})
        except OutOfPages:
            cache.free(chance.choice(live))
        found = cache.slots()
        assert [slot.shared for slot in found] == [counted(cache, number) for number in range(6)]
        shared += any(slot.shared for slot in found)
    assert shared  # or this has shown nothing


def test_blocks_are_counted_like_pages():
    with PagedKVCache(LAYOUT, memory=400 * PAGE, block_size=PER_PAGE) as cache:
        block = PER_PAGE * LAYOUT.bytes_per_token
        slot = cache.alloc()
        cache.step({slot: 2 * PER_PAGE + 3})
        other = cache.fork(slot)
        found = cache.slots()
        assert (found[slot].mapped, found[slot].shared) == (3 * block, 2 * block)
        assert found[slot].needed == (2 * PER_PAGE + 3) * LAYOUT.bytes_per_token
        cache.free(slot)
        found = cache.slots()
        assert (found[slot].live, found[slot].mapped) == (False, 0)
        assert found[other].shared == 0


def test_a_closed_cache_has_no_slots_to_show():
    cache = KVCache(LAYOUT, memory=400 * PAGE, page_size=PAGE)
    cache.close()
    with pytest.raises(InvalidRequest):
        cache.slots()
