"""Nothing a caller can pass, and no order of calls, crashes: errors are ours, a TypeError or a ValueError."""

import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch

from vattention.cache import KVCache, KVLayout
from vattention.errors import InvalidRequest, VAttentionError
from vattention.memory import HostDriver, PagePool

PAGE = 4096
LAYOUT = KVLayout(2, 2, 64, torch.float32, 4, 1000)
ODD = [
    -1,
    -(10**30),
    10**30,
    1001,
    math.nan,
    math.inf,
    0.5,
    "3",
    b"3",
    None,
    True,
    [1],
    {},
    object(),
    torch.tensor(1.5),
]
EXPECTED = (VAttentionError, TypeError, ValueError)


@pytest.fixture
def cache():
    with KVCache(LAYOUT, memory="1MiB", page_size=PAGE) as cache:
        yield cache


def calls(cache: KVCache, value: object) -> list:
    """Every way to hand `value` to a public method."""
    live = next(number for number in range(4) if cache._slots[number].live)
    return [
        lambda: cache.alloc(value),
        lambda: cache.free(value),
        lambda: cache.fork(value),
        lambda: cache.length(value),
        lambda: cache.layer(value),
        lambda: cache.step(value),
        lambda: cache.step({value: 1}),
        lambda: cache.step({live: value}),
        lambda: cache.fits(value, [1]),
        lambda: cache.fits({live: value}),
        lambda: cache.fits({}, [value]),
        lambda: cache.fits({}, value),
        lambda: cache.prefetch(value),
        lambda: cache.prefetch({live: value}),
        lambda: cache.pool.resize(value),
        lambda: cache.pool.take(value),
    ]


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_odd_arguments_are_refused_and_change_nothing(cache, value):
    slot = cache.alloc()
    cache.step({slot: 50})
    k, _ = cache.layer(0)
    k[slot, :50] = 7
    refused = 0
    for call in calls(cache, value):
        before = cache.stats()
        try:
            call()
        except EXPECTED:
            refused += 1
            after = cache.stats()
            assert (after.needed, after.mapped, after.live_slots) == (before.needed, before.mapped, before.live_slots)
    assert refused >= 8, "nearly every method refuses it"
    assert bool((k[slot, :50] == 7).all())
    cache.step({slot: 60})


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_integers_of_other_libraries_are_integers(cache, integer):
    slot = cache.alloc(integer(5))
    cache.step({integer(slot): integer(40)})
    assert cache.length(integer(slot)) == 40
    assert cache.fits({slot: integer(50)}, [integer(3)])
    cache.layer(integer(1))
    cache.free(integer(slot))


def test_dead_slots(cache):
    slot = cache.alloc()
    cache.free(slot)
    for call in (
        lambda: cache.free(slot),
        lambda: cache.step({slot: 1}),
        lambda: cache.prefetch({slot: 1}),
        lambda: cache.fits({slot: 1}),
        lambda: cache.fork(slot),
        lambda: cache.length(slot),
    ):
        with pytest.raises(InvalidRequest, match="not live"):
            call()


def test_one_bad_slot_spoils_the_whole_step(cache):
    slot = cache.alloc()
    with pytest.raises(InvalidRequest):
        cache.step({slot: 10, 3: 10})
    assert cache.length(slot) == 0
    assert cache.stats().created == 0


def test_every_method_after_close(cache):
    slot = cache.alloc()
    cache.step({slot: 5})
    cache.close()
    for call in (
        cache.alloc,
        lambda: cache.free(slot),
        lambda: cache.fork(slot),
        lambda: cache.step({slot: 6}),
        lambda: cache.fits({slot: 6}),
        lambda: cache.prefetch({slot: 6}),
        lambda: cache.length(slot),
        lambda: cache.layer(0),
        cache.capacity,
        cache.wait,
        cache.trim,
        cache.stats,
    ):
        with pytest.raises(InvalidRequest, match="closed"):
            call()
    cache.close()


def test_a_slot_of_another_cache_on_the_same_pool_is_not_ours():
    driver = HostDriver()
    pool = PagePool(driver, PAGE, 100 * PAGE)
    with KVCache(LAYOUT, pool=pool) as one, KVCache(LAYOUT, pool=pool) as two:
        slot = one.alloc()
        with pytest.raises(InvalidRequest):
            two.step({slot: 3})
        assert pool.stats().created == 0
    driver.close()


@pytest.mark.parametrize("threads", [2, 8])
def test_many_threads_at_once(threads):
    """Each works on slots of its own, all at the same time; what each wrote is there at the end."""
    layout = KVLayout(2, 2, 64, torch.float32, threads * 2, 1000)
    failures = []
    with KVCache(layout, memory="8MiB", page_size=PAGE) as cache:

        def work(number: int) -> None:
            generator = random.Random(number)
            try:
                for turn in range(60):
                    slot = cache.alloc(generator.randrange(100))
                    if slot is None:
                        continue
                    length = generator.randrange(1, 60)
                    cache.step({slot: length})
                    k, _ = cache.layer(1)
                    k[slot, :length] = number * 1000 + turn
                    cache.prefetch({slot: length + 20})
                    cache.stats()
                    cache.step({slot: length + 10})
                    twin = cache.fork(slot)
                    for held in (slot, twin):
                        if held is not None:
                            if not bool((k[held, :length] == number * 1000 + turn).all()):
                                failures.append((number, turn, held))
                            cache.free(held)
                    if turn % 10 == 0:
                        cache.trim()
            except VAttentionError as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures
        assert cache.stats().live_slots == 0
        cache.trim()
        assert cache.stats().created == 0


FORK = """
    import gc, os, sys, torch
    from vattention import KVCache, KVLayout, VAttentionError
    cache = KVCache(KVLayout(2, 2, 64, torch.float32, 4, 1000), memory="1MiB", page_size=4096)
    with cache:
        slot = cache.alloc()
        cache.step({slot: 50})
        cache.prefetch({slot: 60})
        k, v = cache.layer(0)
        k[slot, :50] = 7
        child = os.fork()
        if child == 0:
            ours = 0
            for call in (cache.alloc, lambda: cache.step({slot: 51}), lambda: cache.free(slot), cache.stats, cache.trim,
                         lambda: cache.fork(slot), lambda: cache.layer(0), cache.wait, cache.capacity,
                         lambda: cache.prefetch({slot: 51}), lambda: cache.fits({slot: 51})):
                try:
                    call()
                except VAttentionError as error:
                    ours += "parent" in str(error)
            grandchild = os.fork()
            if grandchild == 0:
                k[slot, 0].sum().item()
                os._exit(0)
            print(ours, os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
        else:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            assert bool((k[slot, :50] == 7).all())
            cache.step({slot: 60})
            assert cache.pool.driver.physical_bytes == cache.stats().created
    if child == 0:
        del cache, k, v
        gc.collect()
        sys.exit(3)
    print("closed", cache.closed)
"""


def test_a_child_after_fork_gets_errors_and_leaves_its_parent_alone():
    result = subprocess.run(
        [sys.executable, "-u", "-c", textwrap.dedent(FORK)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.split("\n")[:3] == [f"11 {-signal.SIGSEGV}", "3", "closed True"], result.stderr
    assert result.returncode == 0


def test_a_child_can_have_a_cache_of_its_own():
    with KVCache(LAYOUT, memory="1MiB", page_size=PAGE) as cache:
        slot = cache.alloc()
        cache.step({slot: 20})
        child = os.fork()
        if child == 0:
            good = False
            try:
                with KVCache(LAYOUT, memory="1MiB", page_size=PAGE) as own:
                    mine = own.alloc()
                    own.step({mine: 100})
                    own.layer(0)[0][mine, :100] = 3
                    good = own.stats().created == own.pool.driver.physical_bytes > 0
            finally:
                os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        cache.step({slot: 30})
