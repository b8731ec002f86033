"""What a cache promises its user, one promise a test."""

import gc
import os
import threading

import pytest
import torch

from support.drivers import host_only, new_driver
from vattention.cache import KVCache, KVLayout
from vattention.errors import ConfigError, InvalidRequest, OutOfPages
from vattention.memory import PagePool

PAGE = 4096
LAYOUT = KVLayout(2, 2, 64, torch.float32, 4, 1000)  # 4 streams, 512 bytes a token each: 8 tokens a page
STREAMS = 4
PER_PAGE = 8


@pytest.fixture
def cache():
    with KVCache(LAYOUT, memory=400 * PAGE, page_size=PAGE) as cache:
        yield cache


def calls(cache: KVCache) -> int:
    return sum(cache.pool.meter.calls.values())


def fill(cache: KVCache, slot: int, start: int, end: int, value: float = 0.0) -> None:
    """Write a number of its own into every place of tokens [start, end)."""
    for layer in range(cache.layout.num_layers):
        for which, view in enumerate(cache.layer(layer)):
            for token in range(start, end):
                view[slot, token] = value + token + 1000 * layer + 5000 * which


def holds(cache: KVCache, slot: int, start: int, end: int, value: float = 0.0) -> bool:
    return all(
        bool((view[slot, token] == value + token + 1000 * layer + 5000 * which).all())
        for layer in range(cache.layout.num_layers)
        for which, view in enumerate(cache.layer(layer))
        for token in range(start, end)
    )


# -- growing and shrinking


def test_nothing_is_created_before_the_first_step(cache):
    slot = cache.alloc()
    cache.layer(0)
    assert cache.stats().created == 0
    cache.step({slot: 1})
    assert cache.stats().created == STREAMS * PAGE


def test_views_have_the_promised_shape_and_never_move(cache):
    before = [(view.data_ptr(), view.shape, view.stride()) for layer in range(2) for view in cache.layer(layer)]
    slot = cache.alloc()
    for length in (1, 500, 3, 800):
        cache.step({slot: length})
    cache.free(slot)
    cache.trim()
    assert before == [(view.data_ptr(), view.shape, view.stride()) for layer in range(2) for view in cache.layer(layer)]
    assert before[0][1] == (4, LAYOUT.padded_len, 2, 64)
    assert cache.layer(1) is not None
    assert cache.layer(1)[0] is cache.layer(1)[0]


def test_tokens_stay_while_a_slot_grows(cache):
    a, b = cache.alloc(), cache.alloc()
    for length in range(1, 60):
        cache.step({a: length, b: 2 * length})
        fill(cache, a, length - 1, length)
        fill(cache, b, 2 * length - 2, 2 * length, 0.5)
    assert holds(cache, a, 0, 59)
    assert holds(cache, b, 0, 118, 0.5)


def test_pages_come_exactly_when_tokens_need_them(cache):
    slot = cache.alloc()
    for length in range(1, 100):
        cache.step({slot: length})
        stats = cache.stats()
        assert stats.created == -(-length // PER_PAGE) * STREAMS * PAGE
        assert stats.mapped == stats.created
        assert stats.needed == length * LAYOUT.bytes_per_token
        assert stats.wasted == stats.mapped - stats.needed


def test_rolling_back_is_one_integer(cache):
    slot = cache.alloc()
    cache.step({slot: 100})
    fill(cache, slot, 0, 100)
    before = calls(cache)
    cache.step({slot: 40})
    cache.step({slot: 90})
    assert calls(cache) == before
    assert cache.length(slot) == 90
    assert holds(cache, slot, 0, 90)
    cache.step({slot: 0})
    assert cache.length(slot) == 0


def test_slots_not_named_keep_their_length(cache):
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: 10, b: 20})
    cache.step({b: 21})
    cache.step({})
    assert (cache.length(a), cache.length(b)) == (10, 21)


# -- running out


def test_out_of_pages_changes_nothing_and_says_how_much(cache):
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: 400})
    fill(cache, a, 0, 400)
    before = cache.stats()
    with pytest.raises(OutOfPages) as caught:
        cache.step({a: 410, b: 800})
    assert caught.value.needed == STREAMS * (2 + 100)
    assert caught.value.free == 400 - 200
    assert (cache.length(a), cache.length(b)) == (400, 0)
    assert holds(cache, a, 0, 400)
    after = cache.stats()
    assert (after.created, after.mapped, after.pages_in_use) == (before.created, before.mapped, before.pages_in_use)
    cache.step({a: 410, b: 300})


def test_fits_says_what_step_will_do(cache):
    a = cache.alloc()
    assert cache.fits({a: 800})
    assert not cache.fits({a: 801})
    assert cache.fits(new=[400, 400])
    assert not cache.fits(new=[400, 401])
    assert cache.fits({a: 400}, new=[400])
    assert not cache.fits({a: 401}, new=[400])
    assert cache.fits(new=[1, 1, 1])
    assert not cache.fits(new=[1, 1, 1, 1]), "one slot of four is live"
    cache.step({a: 600})
    cache.free(a)
    assert cache.fits(new=[800]), "idle pages count"
    b = cache.alloc(800)
    cache.step({b: 800})


def test_capacity_is_what_really_fits():
    with KVCache(LAYOUT, memory=400 * PAGE, page_size=PAGE) as cache:
        assert cache.capacity() == 800
        slot = cache.alloc()
        cache.step({slot: cache.capacity()})
        with pytest.raises(OutOfPages):
            cache.step({slot: cache.capacity() + 1})
    with KVCache(LAYOUT, memory=1200 * PAGE, page_size=PAGE) as cache:
        assert cache.capacity() == 2 * 1000 + 400
        a, b, c = cache.alloc(), cache.alloc(), cache.alloc()
        cache.step({a: 1000, b: 1000})
        with pytest.raises(OutOfPages):
            cache.step({c: cache.capacity() - 2000 + 1})
        cache.step({c: cache.capacity() - 2000})
    with KVCache(LAYOUT, memory="1GiB", page_size=PAGE) as cache:
        assert cache.capacity() == 4000


def test_a_page_that_shows_zeros_is_not_promised_again():
    """Under guard padding must be readable, and the page behind it stays."""
    with KVCache(LAYOUT, memory=STREAMS * 3 * PAGE, page_size=PAGE, guard=True) as cache:
        slot = cache.alloc()
        assert cache.capacity() == 3 * PER_PAGE
        cache.pad({slot: 2 * PER_PAGE})
        cache.pad({slot: 0})
        assert cache.capacity() == 2 * PER_PAGE
        cache.step({slot: cache.capacity()})
        with pytest.raises(OutOfPages):
            cache.step({slot: cache.capacity() + 1})


# -- finished requests leave their pages behind


def test_a_new_request_takes_over_a_finished_ones_pages_without_a_driver_call(cache):
    slot = cache.alloc()
    cache.step({slot: 300})
    cache.free(slot)
    before = calls(cache)
    assert cache.stats().reclaimable == cache.stats().created
    assert cache.stats().mapped == 0
    assert cache.alloc() == slot
    cache.step({slot: 300})
    assert calls(cache) == before


def test_best_fit_among_idle_slots(cache):
    small, middle, large = (cache.alloc() for _ in range(3))
    cache.step({small: 80, middle: 160, large: 320})
    for slot in (small, middle, large):
        cache.free(slot)
    assert cache.alloc(100) == middle
    assert cache.alloc(500) == large, "none is large enough: the largest"
    assert cache.alloc(1) == small
    assert cache.alloc(1) not in (small, middle, large)
    assert cache.alloc() is None


def test_pages_past_the_expected_tokens_go_back_to_the_pool(cache):
    slot = cache.alloc()
    cache.step({slot: 320})
    cache.free(slot)
    slot = cache.alloc(80)
    assert cache.stats().mapped == 10 * STREAMS * PAGE
    assert cache.stats().pages_free == 30 * STREAMS
    creates = cache.pool.meter.calls["create"]
    cache.step({slot: 320})
    assert cache.pool.meter.calls["create"] == creates, "they are still created and lie where the stream goes on"


def test_idle_pages_are_reclaimed_only_when_somebody_needs_them(cache):
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: 400, b: 8})
    cache.free(a)
    cache.step({b: 200})
    assert cache.stats().reclaimable == 50 * STREAMS * PAGE, "the pool still had enough"
    cache.step({b: 790})
    fill(cache, b, 0, 790)
    assert holds(cache, b, 0, 790)
    assert cache.length(b) == 790


def test_surplus_of_a_live_slot_is_reclaimed_too(cache):
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: 700})
    fill(cache, a, 0, 80)
    cache.step({a: 80})
    assert cache.stats().reclaimable == (88 - 10) * STREAMS * PAGE
    cache.step({b: 700})
    assert holds(cache, a, 0, 80)


def test_a_reclaim_takes_enough_for_the_next_steps_too(cache):
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: 400, b: 400})
    cache.free(a)
    unmaps = cache.pool.meter.calls["unmap"]
    cache.step({b: 401})
    assert cache.pool.meter.calls["unmap"] == unmaps + STREAMS
    for length in range(402, 440):
        cache.step({b: length})
    assert cache.pool.meter.calls["unmap"] == unmaps + STREAMS


def test_trim_gives_reclaimable_memory_to_the_system(cache):
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: 80, b: 160})
    fill(cache, a, 0, 80)
    cache.free(b)
    assert cache.trim() == 20 * STREAMS * PAGE
    stats = cache.stats()
    assert stats.created == stats.mapped == 10 * STREAMS * PAGE == cache.pool.driver.physical_bytes
    assert stats.reclaimable == 0
    assert holds(cache, a, 0, 80)
    cache.free(a)
    cache.trim()
    assert cache.stats().created == cache.pool.driver.physical_bytes == 0


# -- growth in the background


def test_prefetched_pages_cost_the_next_step_nothing(cache):
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: PER_PAGE, b: PER_PAGE})
    me = threading.get_ident()
    mine = cache.pool.meter.calls_by_thread[me]
    for length in range(PER_PAGE + 1, 20 * PER_PAGE):
        cache.prefetch({a: length, b: length})
        cache.step({a: length, b: length})
    assert cache.pool.meter.calls_by_thread[me] == mine
    assert calls(cache) > mine
    assert cache.length(a) == 20 * PER_PAGE - 1


def test_prefetch_changes_no_length_and_takes_nothing_from_anybody(cache):
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: 392, b: 400})
    cache.free(b)
    idle = cache.stats().reclaimable
    cache.prefetch({a: 500})
    cache.wait()
    assert cache.length(a) == 392
    assert cache.stats().reclaimable == idle
    cache.step({a: 500})


def test_prefetch_keeps_the_first_pages_of_one_idle_slot_ready(cache):
    slot = cache.alloc()
    cache.step({slot: 1})
    cache.prefetch({slot: 1})
    cache.wait()
    before = calls(cache)
    other = cache.alloc(1)
    cache.step({other: PER_PAGE})
    assert calls(cache) == before


def test_wait_without_prefetch_returns(cache):
    cache.wait()


# -- sharing


@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 100, 1000])
def test_a_fork_shares_full_pages_and_copies_the_tail(tokens):
    with KVCache(LAYOUT, memory=1200 * PAGE, page_size=PAGE) as cache:
        slot = cache.alloc()
        cache.step({slot: tokens})
        fill(cache, slot, 0, tokens)
        created = cache.stats().created
        twin = cache.fork(slot)
        tail = STREAMS * PAGE if tokens % PER_PAGE else 0
        assert cache.stats().created == created + tail == cache.pool.driver.physical_bytes
        assert cache.length(twin) == tokens
        assert holds(cache, twin, 0, tokens)


def test_forks_go_their_own_ways(cache):
    slot = cache.alloc()
    cache.step({slot: 100})
    fill(cache, slot, 0, 100)
    twin = cache.fork(slot)
    cache.step({slot: 130, twin: 120})
    fill(cache, slot, 100, 130, 0.25)
    fill(cache, twin, 100, 120, 0.5)
    assert holds(cache, slot, 0, 100)
    assert holds(cache, twin, 0, 100)
    assert holds(cache, slot, 100, 130, 0.25)
    assert holds(cache, twin, 100, 120, 0.5)


@pytest.mark.parametrize("writer", [0, 1])
@pytest.mark.parametrize("back", [0, 7, 8, 50, 97])
def test_writing_into_a_shared_page_copies_it_first(cache, writer, back):
    slot = cache.alloc()
    cache.step({slot: 100})
    fill(cache, slot, 0, 100)
    pair = (slot, cache.fork(slot))
    mine, other = pair[writer], pair[1 - writer]
    cache.step({mine: back})
    cache.step({mine: 98})
    fill(cache, mine, back, 98, 0.125)
    assert holds(cache, other, 0, 100)
    assert holds(cache, mine, 0, back)
    assert holds(cache, mine, back, 98, 0.125)
    for slot in pair:
        cache.free(slot)
    cache.trim()
    assert cache.stats().created == 0


def test_a_fork_outlives_its_parent_and_its_parents_slot(cache):
    slot = cache.alloc()
    cache.step({slot: 100})
    fill(cache, slot, 0, 100)
    twin = cache.fork(slot)
    cache.free(slot)
    again = cache.alloc(200)
    cache.step({again: 200})
    fill(cache, again, 0, 200, 0.5)
    third = cache.alloc(100)
    cache.step({third: 100})
    fill(cache, third, 0, 100, 0.75)
    assert holds(cache, twin, 0, 100)


def test_fork_of_a_fork_and_no_slot_left(cache):
    slot = cache.alloc()
    cache.step({slot: 64})
    fill(cache, slot, 0, 64)
    created = cache.stats().created
    twins = [cache.fork(slot)]
    twins += [cache.fork(twins[0]), cache.fork(slot)]
    assert cache.stats().created == created
    assert all(holds(cache, twin, 0, 64) for twin in twins)
    assert cache.fork(slot) is None


def test_fork_without_pages_for_the_tail_changes_nothing(cache):
    slot = cache.alloc()
    cache.step({slot: 799})
    with pytest.raises(OutOfPages):
        cache.fork(slot)
    assert cache.stats().live_slots == 1
    cache.step({slot: 792})
    twin = cache.fork(slot)
    assert cache.length(twin) == 792


# -- one pool, several caches


def test_two_caches_share_one_budget_and_reclaim_from_each_other():
    driver = new_driver()
    pool = PagePool(driver, PAGE, 100 * PAGE)
    with KVCache(LAYOUT, pool=pool) as one, KVCache(LAYOUT, pool=pool) as two:
        a = one.alloc()
        one.step({a: 20 * PER_PAGE})
        fill(one, a, 0, 160)
        b = two.alloc()
        with pytest.raises(OutOfPages):
            two.step({b: 10 * PER_PAGE})
        one.free(a)
        assert two.fits({b: 20 * PER_PAGE})
        two.step({b: 20 * PER_PAGE})
        fill(two, b, 0, 160)
        assert holds(two, b, 0, 160)
        assert pool.stats().created <= 100
    assert pool.stats().in_use == 0
    pool.trim()
    assert driver.physical_bytes == 0
    driver.close()


def test_a_cache_that_is_forgotten_gives_its_pages_back_to_the_pool():
    driver = new_driver()
    pool = PagePool(driver, PAGE, 100 * PAGE)
    cache = KVCache(LAYOUT, pool=pool)
    cache.step({cache.alloc(): 50})
    assert pool.stats().in_use > 0
    del cache
    gc.collect()
    assert pool.stats().in_use == 0
    pool.trim()
    driver.close()


def test_the_budget_can_shrink_and_grow_while_running(cache):
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: 80, b: 160})
    cache.free(b)
    cache.pool.resize(40 * PAGE)
    assert cache.stats().created == 40 * PAGE == cache.pool.driver.physical_bytes
    with pytest.raises(OutOfPages):
        cache.step({a: 81})
    with pytest.raises(OutOfPages):
        cache.pool.resize(39 * PAGE)
    cache.pool.resize(44 * PAGE)
    cache.step({a: 81})


def test_what_belongs_to_the_pool_cannot_be_said_twice():
    driver = new_driver()
    pool = PagePool(driver, PAGE, 100 * PAGE)
    for wrong in (dict(memory="1GiB"), dict(memory_utilization=0.5), dict(page_size=PAGE), dict(guard=True)):
        if wrong == dict(guard=True) and driver.guard:
            continue
        with pytest.raises(ConfigError):
            KVCache(LAYOUT, pool=pool, **wrong)
    driver.close()


# -- the end


@host_only
def test_close_returns_the_memory_at_once_and_the_addresses_with_the_last_tensor():
    cache = KVCache(LAYOUT, memory="1MiB", page_size=PAGE)
    slot = cache.alloc()
    cache.step({slot: 50})
    k, _ = cache.layer(0)
    fill(cache, slot, 0, 50)
    driver = cache.pool.driver
    files = [name for name in os.listdir("/proc/self/fd") if "vattention" in _target(name)]
    cache.close()
    cache.close()
    assert driver.closed
    assert len([name for name in os.listdir("/proc/self/fd") if "vattention" in _target(name)]) == len(files) - 1
    assert not k[slot, :50].any()
    for use in (cache.alloc, cache.stats, cache.trim, cache.wait, lambda: cache.step({}), lambda: cache.layer(0)):
        with pytest.raises(InvalidRequest, match="closed"):
            use()


def _target(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""


def test_opening_and_closing_leaves_nothing_behind():
    def footprint():
        gc.collect()
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), sum(1 for _ in maps), threading.active_count()

    def use():
        with KVCache(LAYOUT, memory="1MiB") as cache:
            slot = cache.alloc()
            cache.step({slot: 20})
            cache.prefetch({slot: 30})

    for _ in range(20):
        use()
    before = footprint()
    for _ in range(100):
        use()
    after = footprint()
    assert after[0] == before[0]
    assert after[1] <= before[1] + 5
    assert after[2] == before[2]


# -- modes


def test_poison_fills_what_no_kernel_may_read():
    with KVCache(LAYOUT, memory="1MiB", page_size=PAGE, poison=True) as cache:
        a, b = cache.alloc(), cache.alloc()
        cache.step({a: 13, b: 30})
        fill(cache, a, 0, 13)
        fill(cache, b, 0, 30)
        cache.free(b)
        cache.step({a: 11})
        k, v = cache.layer(1)
        assert holds(cache, a, 0, 11)
        assert k[a, 11:16].isnan().all()
        assert v[a, 11:16].isnan().all()
        assert k[b, :32].isnan().all()


def test_poison_spares_shared_pages():
    with KVCache(LAYOUT, memory="1MiB", page_size=PAGE, poison=True) as cache:
        slot = cache.alloc()
        cache.step({slot: 30})
        fill(cache, slot, 0, 30)
        twin = cache.fork(slot)
        cache.step({twin: 3})
        assert holds(cache, slot, 0, 30)
        assert cache.layer(0)[0][twin, 24:30].isnan().all()


def test_devices_that_are_not_there():
    with pytest.raises(ConfigError, match="not supported: use 'cpu' or 'cuda'"):
        KVCache(LAYOUT, device="meta")
    with pytest.raises(ConfigError, match="device"):
        KVCache(LAYOUT, device="cuda:99")


@host_only
@pytest.mark.parametrize("share", [0.5, 2, -1, float("nan")])
def test_shares_of_memory_are_for_devices(share):
    with pytest.raises(ConfigError, match="memory_utilization"):
        KVCache(LAYOUT, memory_utilization=share)
    with pytest.raises(ConfigError, match="leave one out"):
        KVCache(LAYOUT, memory="1GiB", memory_utilization=share)


def test_page_sizes_that_do_not_divide():
    with pytest.raises(ConfigError, match="power of two"):
        KVCache(LAYOUT, memory="1GiB", page_size=3 * PAGE)
    with pytest.raises(ConfigError, match="multiple"):
        KVCache(LAYOUT, memory="1GiB", page_size=1000)
    with pytest.raises(ConfigError, match="one page"):
        KVCache(LAYOUT, memory=1000, page_size=PAGE)


def test_stats_from_other_threads_while_the_owner_works(cache):
    wrong, done = [], threading.Event()

    def watch():
        while not done.is_set():
            stats = cache.stats()
            if stats.pages_free + stats.pages_in_use + stats.pages_quarantined != stats.created // PAGE:
                wrong.append(stats)

    watchers = [threading.Thread(target=watch) for _ in range(3)]
    for watcher in watchers:
        watcher.start()
    for _ in range(20):
        slot = cache.alloc()
        for length in range(1, 100, 7):
            cache.step({slot: length})
            cache.prefetch({slot: length + 7})
        cache.free(slot)
    done.set()
    for watcher in watchers:
        watcher.join()
    assert not wrong
