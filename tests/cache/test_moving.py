"""Rows of a batch: `alloc_range`, `pad` and `reorder`, with every copied byte counted."""

from __future__ import annotations

import pytest
import torch

from support.device import DeviceDriver
from support.drivers import new_driver
from support.mirror import Mirror, check_all
from vattention.cache import KVCache, KVLayout
from vattention.errors import InvalidRequest, OutOfPages
from vattention.memory import PagePool

PAGE = 4096
LAYOUT = KVLayout(2, 2, 32, torch.float32, 6, 600)  # 4 streams, 16 tokens a page in each
STREAMS = 4


@pytest.fixture(params=["host", "guarded", "device"])
def mirror(request):
    driver = DeviceDriver(PAGE) if request.param == "device" else new_driver(guard=request.param == "guarded")
    pool = PagePool(driver, PAGE, 400 * PAGE)
    with KVCache(LAYOUT, pool=pool) as cache:
        mirror = Mirror(cache)
        yield mirror
        check_all(pool, [mirror])
        mirror.forget()


def pages(cache: KVCache) -> int:
    """In use, the page of zeros left out."""
    return cache.stats().pages_in_use - (cache._backing.zeros is not None)


def test_rows_are_one_strided_view(mirror):
    cache = mirror.cache
    first = cache.alloc()
    mirror.tokens[first] = mirror.tokens.get(first, torch.zeros(0).numpy().astype("uint64"))
    rows = mirror.alloc_range(3)
    assert list(rows) == [1, 2, 3]
    mirror.step(dict.fromkeys(rows, 20))
    keys, _ = cache.layer(1)
    assert keys[rows.start : rows.stop].transpose(1, 2)[:, :, :20].shape == (3, 2, 20, 32)
    mirror.free(2)
    assert mirror.alloc_range(3) is None
    assert list(mirror.alloc_range(1)) == [2]
    assert list(mirror.alloc_range(2)) == [4, 5]
    for count in (0, -1):
        with pytest.raises(InvalidRequest, match="at least 1"):
            cache.alloc_range(count)
    for count in (1.5, True, "1"):
        with pytest.raises(TypeError, match="count must be an integer"):
            cache.alloc_range(count)


def test_one_row_becomes_many(mirror):
    """Beam search, first step: what eight rows held becomes one row's, for the price of tails."""
    cache = mirror.cache
    rows = mirror.alloc_range(6)
    mirror.step(dict.fromkeys(rows, 100))  # 6 full pages and a quarter, in every stream
    assert pages(cache) == 6 * STREAMS * 7
    mirror.reorder(dict.fromkeys(rows, 2))
    assert pages(cache) == STREAMS * (6 + 6)  # shared, and a tail for everyone
    assert cache.stats().copied == 5 * STREAMS * 4 * 256  # four tokens
    mirror.check_contents()
    calls = sum(cache.stats().driver_calls.values())
    mirror.reorder(dict.fromkeys(rows, 4))  # they are the same but for the tails
    assert sum(cache.stats().driver_calls.values()) == calls
    mirror.step(dict.fromkeys(rows, 101))
    mirror.check_contents()


def test_permutations_leave_in_place_what_is_right(mirror):
    rows = mirror.alloc_range(4)
    mirror.step(dict.fromkeys(rows, 100))
    mirror.reorder(dict.fromkeys(rows, 0))
    mirror.step(dict.fromkeys(rows, 140))  # two full pages of their own since
    table = mirror.places()
    mirror.reorder({0: 1, 1: 2, 2: 0})
    changed = {place for place, page in mirror.places().items() if page != table[place]}
    assert len(changed) == 3 * STREAMS * 2
    mirror.check_contents()
    mirror.reorder({0: 0, 3: 3})
    mirror.check_contents()


def test_a_source_may_vanish_and_a_row_appear(mirror):
    rows = mirror.alloc_range(3)
    mirror.step({0: 50, 1: 70, 2: 33})
    mirror.reorder({0: 1, 1: 0, 2: 1, 5: 2})  # 5 was idle
    assert sorted(mirror.tokens) == [0, 1, 2, 5]
    assert [mirror.cache.length(slot) for slot in (*rows, 5)] == [70, 50, 70, 33]
    mirror.check_contents()
    mirror.step({0: 72, 1: 52, 2: 90, 5: 34})
    mirror.check_contents()


@pytest.mark.parametrize("row", [0, 1])
def test_rolling_back_into_what_is_shared(mirror, row):
    """Whoever writes there, source or target, gets pages of its own first, and copies less than a page of each."""
    mirror.alloc_range(2)
    mirror.step({0: 100, 1: 100})
    mirror.reorder({1: 0})
    copied = mirror.cache.stats().copied
    mirror.step({row: 23})
    mirror.step({row: 60})
    assert mirror.cache.stats().copied - copied == STREAMS * 7 * 256  # tokens 16 to 22
    mirror.check_contents()


def test_all_or_nothing():
    pool = PagePool(new_driver(), PAGE, 30 * PAGE)
    with KVCache(LAYOUT, pool=pool) as cache:
        mirror = Mirror(cache)
        mirror.alloc_range(2)
        mirror.step({0: 40, 1: 40})  # 24 pages
        before = mirror.places()
        with pytest.raises(OutOfPages) as caught:
            mirror.reorder({1: 0, 2: 0, 3: 1})  # two tails where nothing is yet
        assert caught.value.needed > caught.value.free
        assert mirror.places() == before
        check_all(pool, [mirror])
        mirror.reorder({0: 1, 1: 0})  # needs no page
        check_all(pool, [mirror])
        mirror.forget()


def test_padding_is_never_backed(mirror):
    cache = mirror.cache
    rows = mirror.alloc_range(3)
    mirror.pad({0: 0, 1: 100, 2: 250})
    assert pages(cache) == 0
    mirror.step(dict.fromkeys(rows, 260))
    assert pages(cache) == STREAMS * (17 + 11 + 2)
    assert cache.stats().needed == (260 + 160 + 10) * LAYOUT.bytes_per_token
    keys, values = cache.layer(1)
    for side in (keys, values):
        assert not side[1, :100].any()
        assert not side[2, :250].any()
        assert side[2, 250:260].any()
    mirror.reorder({0: 2, 1: 0, 2: 1})  # padding goes along
    assert not keys[0, :250].any()
    assert keys[1, :10].any()
    mirror.check_contents()
    mirror.step(dict.fromkeys(rows, 40))  # back into the padding
    mirror.step(dict.fromkeys(rows, 270))
    assert not keys[0, :250].any()
    mirror.check_contents()
    twin = mirror.fork(0)
    assert not keys[twin, :250].any()
    assert pages(cache) <= STREAMS * (17 + 11 + 2 + 1) + 3 * STREAMS


def test_recycled_pages_show_no_old_token_as_padding(mirror):
    cache = mirror.cache
    slot = mirror.alloc()
    mirror.step({slot: 300})
    cache.layer(0)[0][slot, :300] = float("nan")
    mirror.free(slot)
    (row,) = mirror.alloc_range(1)
    mirror.pad({row: 20})
    mirror.step({row: 25})
    for layer in range(2):
        for side in cache.layer(layer):
            assert not side[row, :20].any()


def test_padding_ends_with_its_slot(mirror):
    (row,) = mirror.alloc_range(1)
    mirror.pad({row: 77})
    mirror.step({row: 80})
    mirror.free(row)
    slot = mirror.alloc(5)
    mirror.step({slot: 90})
    mirror.check_contents()
    mirror.check_backed()


def test_padding_is_refused_where_tokens_are(mirror):
    slot = mirror.alloc()
    mirror.step({slot: 1})
    with pytest.raises(InvalidRequest, match="has tokens already"):
        mirror.cache.pad({slot: 1})
    for number, error in ((-1, InvalidRequest), (601, InvalidRequest), (1.0, TypeError)):
        with pytest.raises(error):
            mirror.cache.pad({slot: number})
    with pytest.raises(InvalidRequest, match="not live"):
        mirror.cache.pad({5: 1})


def test_arguments_of_reorder(mirror):
    mirror.alloc_range(2)
    for sources, error in (
        ({0: 3}, InvalidRequest),
        ({6: 0}, InvalidRequest),
        ({-1: 0}, InvalidRequest),
        ([0, 1], TypeError),
        ({0.0: 1}, TypeError),
        ({0: True}, TypeError),
    ):
        with pytest.raises(error):
            mirror.cache.reorder(sources)
    mirror.reorder({})
