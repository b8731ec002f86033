"""Wrong arguments, wrong moments, wrong processes, wrong threads: an error of the hierarchy, never a crash.

Whatever is thrown at the public methods, they raise a VAttentionError, TypeError or ValueError, or they work; and the
tokens of everybody else are still there. What may take the interpreter down with it runs in an interpreter of its own.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.calls import HOLDER_METHODS, LAYOUT, PAGE, PAGES, everything
from support.drivers import new_driver
from support.faults import Fault, FaultyDriver
from support.mirror import Mirror, check_all, check_pool
from vattention.cache import KVCache, KVLayout
from vattention.errors import ConfigError, DriverError, InvalidRequest, OutOfPages, VAttentionError
from vattention.memory import PagePool, Reservation, Run
from vattention.memory.sizes import parse_size

TEST_ALL = os.environ.get("VATTENTION_TEST_ALL") == "1"
ALLOWED = (VAttentionError, TypeError, ValueError)

fuzzed = settings(
    max_examples=20_000 if TEST_ALL else 1_000,
    derandomize=not TEST_ALL,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

INTEGERS = st.one_of(
    st.integers(-2, 6),
    st.sampled_from([-1, 99, 100, 101, 2**31, 2**32, 2**47, 2**63, 2**64, 2**64 + PAGE, 10**30, -(10**30), 10**400]),
)
JUNK = st.one_of(
    INTEGERS,
    INTEGERS.filter(lambda value: abs(value) < 2**63).map(np.int64),
    st.sampled_from(
        [None, True, False, math.nan, math.inf, -math.inf, 0.0, 1.5, 1e300, 1j, np.float64(2), np.bool_(True)]
    ),
    st.sampled_from(["", "0", "1", "nan", "2GiB", "cpu", "cuda:7", "no such thing", "9" * 400, b"1", bytearray(3)]),
    st.sampled_from([(), [], {}, [1, 2], {1: 2}, {"1": "2"}, {0: math.nan}, {None: None}, {3: 10**30}, range(3)]),
    st.sampled_from(
        [object(), print, KVCache, ..., torch.tensor(1), torch.tensor([1, 2]), np.arange(3), torch.float32]
    ),
    st.builds(dict, st.lists(st.tuples(INTEGERS, st.one_of(INTEGERS, st.none(), st.floats())), max_size=3)),
)
RUNS = st.one_of(
    JUNK,
    st.lists(st.one_of(JUNK, st.builds(Run, JUNK.filter(lambda value: True), JUNK), st.just((0, 1, 2))), max_size=3),
    st.just([Run(0, 10**30)]),
    st.just([Run(0, -1)]),
    st.just([Run(7, 1)]),
)


def attempt(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the call returns, or the error it raises, which must be one of those it may raise."""
    try:
        return call(*args, **kwargs)
    except ALLOWED as error:
        return error


# -- arguments


class Scene:
    """A cache to throw things at, and another on the same pool whose tokens nobody may touch."""

    def __init__(self) -> None:
        self.driver = new_driver()
        self.pool = PagePool(self.driver, PAGE, PAGES * PAGE)
        self.target = KVCache(LAYOUT, pool=self.pool)
        self.bystander = Mirror(KVCache(LAYOUT, pool=self.pool))
        slot = self.bystander.alloc()
        self.bystander.step({slot: 37})
        self.bystander.fork(slot)

    def check(self) -> None:
        self.target.fits({})
        self.bystander.cache.fits({})
        check_pool(self.pool, [self.bystander, Watched(self.target)], physical_bytes=self.driver.physical_bytes)
        self.bystander.check_lengths()
        self.bystander.check_contents()

    def close(self) -> None:
        self.bystander.cache.close()
        self.bystander.forget()
        self.target.close()
        self.pool.trim()
        assert self.driver.physical_bytes == 0
        self.driver.close()


class Watched(Mirror):
    """A cache of which only the pages are looked at."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.tokens = {}


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.close()


CACHE_CALLS: dict[str, Callable[..., Any]] = {
    "alloc": lambda cache, a, b: cache.alloc(a),
    "free": lambda cache, a, b: cache.free(a),
    "fork": lambda cache, a, b: cache.fork(a),
    "alloc_range": lambda cache, a, b: cache.alloc_range(a),
    "reorder": lambda cache, a, b: cache.reorder(a),
    "reorder one": lambda cache, a, b: cache.reorder({a: b}),
    "pad": lambda cache, a, b: cache.pad(a),
    "pad one": lambda cache, a, b: cache.pad({a: b}),
    "length": lambda cache, a, b: cache.length(a),
    "step": lambda cache, a, b: cache.step(a),
    "step of one": lambda cache, a, b: cache.step({a: b}),
    "fits": lambda cache, a, b: cache.fits(a, b),
    "fits of one": lambda cache, a, b: cache.fits({a: b}),
    "fits of a new one": lambda cache, a, b: cache.fits({}, [a, b]),
    "prefetch": lambda cache, a, b: cache.prefetch(a),
    "prefetch of one": lambda cache, a, b: cache.prefetch({a: b}),
    "wait": lambda cache, a, b: cache.wait(),
    "layer": lambda cache, a, b: cache.layer(a),
    "trim": lambda cache, a, b: cache.trim(),
    "reclaim": lambda cache, a, b: cache.reclaim(a),
    "reclaimable": lambda cache, a, b: cache.reclaimable(),
    "capacity": lambda cache, a, b: cache.capacity(),
    "stats": lambda cache, a, b: cache.stats(),
    "slots": lambda cache, a, b: cache.slots(),
}


@fuzzed
@given(calls=st.lists(st.tuples(st.sampled_from(sorted(CACHE_CALLS)), JUNK, JUNK), min_size=1, max_size=6))
def test_cache_methods(scene, calls):
    attempt(scene.target.alloc)
    for name, a, b in calls:
        attempt(CACHE_CALLS[name], scene.target, a, b)
    scene.check()


@fuzzed
@given(option=st.sampled_from(["device", "memory", "page_size", "pool"]), value=JUNK)
def test_opening_a_cache(option, value):
    opened = attempt(KVCache, LAYOUT, **{option: value})
    if isinstance(opened, KVCache):
        with opened:
            slot = opened.alloc()
            attempt(opened.step, {slot: 10})
            opened.stats()
    elif option == "device":
        assert isinstance(opened, ConfigError | TypeError | ValueError)


@fuzzed
@given(position=st.integers(0, 9), value=JUNK)
def test_layouts(position, value):
    arguments = [2, 2, 48, torch.float32, 4, 100]
    names = ["head_major", "layers_per_stream", "kv_together", "shapes"]
    options: dict[str, Any] = {}
    if position < len(arguments):
        arguments[position] = value
    else:
        options[names[position - len(arguments)]] = value
    layout = attempt(KVLayout, *arguments, **options)
    if isinstance(layout, KVLayout):
        assert 0 < layout.size < 2**47
        attempt(layout.view, value, 0)
        attempt(layout.view, 0, value)
        attempt(layout.shape, value)
        hash(layout)


POOL_CALLS: dict[str, Callable[..., Any]] = {
    "take": lambda pool, a, b, runs: pool.take(a),
    "take with room": lambda pool, a, b, runs: pool.take(a, room=b),
    "take after": lambda pool, a, b, runs: pool.take(a, after=b),
    "share": lambda pool, a, b, runs: pool.share(runs),
    "drop": lambda pool, a, b, runs: pool.drop(runs),
    "quarantine": lambda pool, a, b, runs: pool.quarantine(runs),
    "recover": lambda pool, a, b, runs: pool.recover(runs),
    "resize": lambda pool, a, b, runs: pool.resize(a),
    "trim": lambda pool, a, b, runs: pool.trim(),
    "reclaim": lambda pool, a, b, runs: pool.reclaim(a),
    "continues": lambda pool, a, b, runs: pool.continues(a, b),
    "references": lambda pool, a, b, runs: pool.references(a),
    "add_holder": lambda pool, a, b, runs: pool.add_holder(a),
    "stats": lambda pool, a, b, runs: pool.stats(),
}


@fuzzed
@given(calls=st.lists(st.tuples(st.sampled_from(sorted(POOL_CALLS)), JUNK, JUNK, RUNS), min_size=1, max_size=6))
def test_pool_methods(calls):
    """Only `take` gives pages, and only what it gave can be shared or dropped."""
    driver = new_driver()
    pool = PagePool(driver, PAGE, PAGES * PAGE)
    mine = pool.take(3)
    first = mine[0].handle
    held = list(mine)
    for name, a, b, runs in calls:
        result = attempt(POOL_CALLS[name], pool, a, b, runs)
        if isinstance(result, list):
            held += result
        elif name in ("share", "drop", "quarantine", "recover") and result is None:
            assert not list(runs) or all(pages == 0 for _, pages in runs), "nobody had given that"
    assert pool.references(first) == 1
    check_pool(pool, [], held=held, physical_bytes=driver.physical_bytes)
    pool.drop(held)
    pool.trim()
    assert driver.physical_bytes == 0
    driver.close()


@fuzzed
@given(page_size=JUNK, budget=JUNK)
def test_opening_a_pool(page_size, budget):
    driver = new_driver()
    for pool in (attempt(PagePool, driver, page_size, 10 * PAGE), attempt(PagePool, driver, PAGE, budget)):
        if isinstance(pool, PagePool):
            assert pool.stats().budget > 0
            taken = attempt(pool.take, 1)
            if isinstance(taken, list):
                pool.drop(taken)
    driver.close()


RANGE_CALLS: dict[str, Callable[..., Any]] = {
    "map": lambda reservation, a, b, runs: reservation.map(a, runs),
    "map pages": lambda reservation, a, b, runs: reservation.map(a, [Run(1 << 40, 1)]),
    "unmap": lambda reservation, a, b, runs: reservation.unmap(a, b),
    "alias": lambda reservation, a, b, runs: reservation.alias(0, a, b),
    "alias from": lambda reservation, a, b, runs: reservation.alias(a, 0, b),
    "runs": lambda reservation, a, b, runs: reservation.runs(a, b),
    "pages": lambda reservation, a, b, runs: list(reservation.pages(a, b)),
    "page": lambda reservation, a, b, runs: reservation.page(a),
    "mappings_of": lambda reservation, a, b, runs: reservation.mappings_of(a, b),
    "settle": lambda reservation, a, b, runs: reservation.settle(),
}


@fuzzed
@given(name=st.sampled_from(sorted(RANGE_CALLS)), a=JUNK, b=JUNK, runs=RUNS, size=JUNK)
def test_reservations(name, a, b, runs, size):
    """Nothing outside the range is touched, and a range that is not to be had is an error."""
    driver = new_driver()
    pool = PagePool(driver, PAGE, PAGES * PAGE)
    odd = attempt(Reservation, pool, size)
    if isinstance(odd, Reservation):
        assert odd.size == size
        odd.close()
    below, reservation, above = (Reservation(pool, 4 * PAGE) for _ in range(3))
    marks = []
    for neighbour in (below, above):
        neighbour.map(0, pool.take(4))
        marks.append(neighbour.tensor(0, (4 * PAGE,), (1,), torch.uint8))
        marks[-1].fill_(42)
    reservation.map(0, pool.take(2))
    attempt(RANGE_CALLS[name], reservation, a, b, runs)
    assert all(bool((mark == 42).all()) for mark in marks)
    marks.clear()
    for opened in (below, reservation, above):
        opened.close()
    assert pool.stats().in_use == 0
    driver.close()


@fuzzed
@given(
    value=st.one_of(JUNK, st.text(max_size=12), st.from_regex(r"\s*\d{1,20}(\.\d{1,5})?\s*[kKmMgGtTpP]?[iI]?[bB]?\s*"))
)
def test_sizes(value):
    size = attempt(parse_size, value)
    assert isinstance(size, Exception) or (type(size) is int and size > 0)


def test_numpy_and_torch_integers_are_integers():
    layout = KVLayout(*map(np.int32, (2, 2, 48)), torch.float32, np.uint8(4), np.int64(100))
    assert layout == LAYOUT
    assert type(layout.num_layers) is int
    with KVCache(layout, memory=np.int64(PAGES * PAGE), page_size=np.uint32(PAGE)) as cache:
        slot = np.int64(cache.alloc(np.int16(3)))
        cache.step({slot: np.uint64(20)})
        cache.prefetch({slot: np.int8(21)})
        assert cache.fits({slot: torch.tensor(30)}, [np.int32(4)])
        assert cache.length(slot) == 20
        fork = cache.fork(slot)
        cache.free(np.int32(fork))
        assert cache.layer(np.int64(1))[0] is cache.layer(1)[0]


# -- moments


def test_dead_slots_double_frees_and_slots_of_others():
    with KVCache(LAYOUT, memory=PAGES * PAGE, page_size=PAGE) as cache:
        mirror = Mirror(cache)
        live, dead = mirror.alloc(), mirror.alloc()
        mirror.step({live: 20, dead: 20})
        mirror.free(dead)
        for wrong in (dead, -1, len(cache._slots), 10**30):
            for call in (cache.free, cache.fork, cache.length):
                with pytest.raises(InvalidRequest, match="not live"):
                    call(wrong)
            for call in (cache.step, cache.fits, cache.prefetch):
                with pytest.raises(InvalidRequest, match="not live"):
                    call({live: 25, wrong: 1})
        assert cache.length(live) == 20  # not even the right half was done
        for length in (-1, 101, 10**30):
            for call in (cache.step, cache.fits, cache.prefetch):
                with pytest.raises(InvalidRequest, match="max_model_len"):
                    call({live: length})
            with pytest.raises(InvalidRequest, match="max_model_len"):
                cache.alloc(length)
        check_all(cache.pool, [mirror])
        mirror.forget()


def test_the_list_of_calls_is_complete():
    public = {name for name in vars(KVCache) if not name.startswith("_")} - {"close", "closed"} - HOLDER_METHODS
    with KVCache(LAYOUT, memory=PAGES * PAGE, page_size=PAGE) as cache:
        assert set(everything(cache, 0)) == public


@pytest.mark.parametrize("shared", [False, True])
def test_use_after_close(shared):
    driver = new_driver()
    pool = PagePool(driver, PAGE, PAGES * PAGE)
    cache = KVCache(LAYOUT, pool=pool) if shared else KVCache(LAYOUT, memory=PAGES * PAGE, page_size=PAGE)
    slot = cache.alloc()
    cache.step({slot: 30})
    cache.prefetch({slot: 60})
    k, _ = cache.layer(0)
    cache.close()
    cache.close()
    assert cache.closed
    for call in everything(cache, slot).values():
        with pytest.raises(InvalidRequest, match="closed"):
            call()
    if not driver.guard:  # where reading them does not fault
        assert k[slot, :60].sum() == 0  # the addresses are still there, with nothing behind them
    if shared:  # the pool does not count on what a closed cache had
        assert (cache.reclaimable(), cache.reclaim(5)) == (0, None)
        with KVCache(LAYOUT, pool=pool) as other:
            assert other.fits({}, [100, 100])
            assert not other.fits({}, [100, 100, 1])
            other.step({other.alloc(): 10})
            with pytest.raises(OutOfPages):
                pool.resize(PAGE)
    driver.close()


def test_a_cache_that_is_dropped_while_the_driver_fails_is_closed_when_it_works_again():
    driver = FaultyDriver(new_driver())
    pool = PagePool(driver, PAGE, PAGES * PAGE)
    cache = KVCache(LAYOUT, pool=pool)
    slot = cache.alloc()
    cache.step({slot: 30})
    driver.fault = Fault(1, onwards=True)
    del cache
    with pytest.raises(DriverError):
        pool.stats()
    driver.repair()
    assert pool.stats().in_use == 0
    pool.trim()
    assert driver.physical_bytes == 0
    driver.close()


# -- processes


def run_python(script: str, **variables: Any) -> str:
    """Run a script in an interpreter of its own and return what it prints. It must end by itself, with status 0."""
    here = Path(__file__).parents[1]
    paths = [str(here), str(Path(KVCache.__module__ and sys.modules["vattention"].__file__).parents[1])]
    prelude = f"import sys; sys.path[:0] = {paths!r}\n" + "".join(f"{k} = {v!r}\n" for k, v in variables.items())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": ""}
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


FORK = """
    import gc, os, signal
    import torch
    from support.drivers import EMULATED, new_driver
    from support.mirror import Mirror, check_all
    from support.calls import LAYOUT, PAGE, PAGES, everything
    from vattention.cache import KVCache
    from vattention.errors import ConfigError, VAttentionError
    from vattention.memory import PagePool, Reservation

    pool = PagePool(new_driver(), PAGE, PAGES * PAGE)
    if shared:
        cache = KVCache(LAYOUT, pool=pool)
    else:
        cache = KVCache(LAYOUT, memory=PAGES * PAGE, page_size=PAGE)
    reservation = Reservation(pool, 4 * PAGE)
    reservation.map(0, pool.take(2))
    mirror = Mirror(cache)
    slot, other = mirror.alloc(), mirror.alloc()
    mirror.step({slot: 30, other: 11})
    mirror.fork(slot)
    mirror.free(other)
    k, v = cache.layer(1)
    cache.prefetch({slot: 40})  # perhaps still going on in the parent's thread when it forks

    def in_a_child(work):
        pid = os.fork()
        if pid == 0:
            try:
                work()
            except BaseException as error:
                print("child:", repr(error), flush=True)
                os._exit(1)
            if leave == "normally":
                sys.stdout.flush()
                raise SystemExit(0)  # finalizers and exit handlers run
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


@pytest.mark.parametrize("shared", [False, True], ids=["own pool", "shared pool"])
@pytest.mark.parametrize("leave", ["normally", "at once"])
def test_a_forked_child_can_do_nothing_with_its_parents_cache(shared, leave):
    script = (
        FORK
        + """
    def child():
        for name, call in everything(cache, slot).items():
            try:
                call()
            except VAttentionError:
                continue
            raise RuntimeError(f"{name} works in the child")
        with cache:
            pass
        cache.close()
        for name, call in everything(cache, slot).items():
            try:
                call()
            except VAttentionError:
                continue
            raise RuntimeError(f"{name} works in the child after close")
        for call in (
            lambda: pool.take(20), lambda: reservation.map(2, pool.take(1)), lambda: reservation.unmap(0, 2),
            lambda: reservation.alias(0, 1, 1), reservation.settle, reservation.close,
            pool.trim, pool.stats, lambda: pool.resize(PAGE),
        ):
            try:
                call()
            except VAttentionError:
                continue
            raise RuntimeError("the parent's pool works in the child")
        if EMULATED:  # CUDA itself is not for children
            try:
                KVCache(LAYOUT, memory=PAGES * PAGE, page_size=PAGE)
            except ConfigError:
                return
        own = KVCache(LAYOUT, memory=PAGES * PAGE, page_size=PAGE)  # but it can have a cache of its own
        owned = Mirror(own)
        number = owned.alloc()
        owned.step({number: 50})
        check_all(own.pool, [owned])
        owned.forget()
        own.close()

    marks = reservation.tensor(0, (2 * PAGE,), (1,), torch.uint8)
    marks.fill_(7)
    for _ in range(3):
        status = in_a_child(child)
        assert status == 0, status
        mirror.check_contents()
        assert bool((marks == 7).all())
    mirror.step({slot: 45})
    if shared:
        pool.drop([])
    else:
        check_all(cache.pool, [mirror])
    mirror.check_contents()
    mirror.forget()
    cache.close()
    print("parent is well")
    """
    )
    assert "parent is well" in run_python(script, shared=shared, leave=leave)


@pytest.mark.parametrize(
    "touch", ["k[slot, 3].sum()", "k[slot, 3].fill_(9)", "v[slot, 90].sum()", "v[slot, 90].fill_(9)"]
)
def test_touching_a_tensor_in_a_child_faults(touch):
    script = (
        FORK
        + """
    def grandchild():
        exec(touch)

    def child():
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        status = in_a_child(grandchild)
        assert status == -signal.SIGSEGV, status

    status = in_a_child(child)
    assert status == 0, status
    mirror.check_contents()
    print("parent is well")
    """
    )
    assert "parent is well" in run_python(script, shared=False, leave="at once", touch=touch)


def test_a_child_of_a_process_whose_thread_is_at_work_does_not_hang():
    """The child inherits locks that the parent's threads held; none of its calls may wait for them."""
    script = (
        FORK
        + """
    import threading
    stop = threading.Event()

    def churn():
        length = 1
        while not stop.is_set():
            length = length % 90 + 9
            cache.prefetch({slot: length})
            cache.step({slot: length})

    def child():
        signal.alarm(20)
        for call in everything(cache, slot).values():
            try:
                call()
            except VAttentionError:
                continue
            raise RuntimeError("it works in the child")
        with cache:
            pass

    thread = threading.Thread(target=churn)
    thread.start()
    for _ in range(20):
        status = in_a_child(child)
        assert status == 0, status
    stop.set()
    thread.join()
    cache.close()
    print("parent is well")
    """
    )
    assert "parent is well" in run_python(script, shared=False, leave="at once")


# -- threads


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("shared", [False, True], ids=["one cache", "a cache each, one pool"])
def test_many_threads_at_once(threads, shared):
    """Every thread has slots of its own, and finds its tokens in them whatever the others do."""
    steps = 3_000 // threads * (20 if TEST_ALL else 1)
    driver = new_driver()
    pool = PagePool(driver, PAGE, 3 * PAGES * PAGE)
    layout = KVLayout(2, 2, 48, torch.float32, 3 * threads, 100)
    caches = [KVCache(layout, pool=pool) for _ in range(threads if shared else 1)]
    mirrors = [Mirror(caches[number % len(caches)]) for number in range(threads)]
    failures: list[BaseException] = []
    counts = [0] * threads

    def work(number: int) -> None:
        choice, mirror = random.Random(number), mirrors[number]
        cache = mirror.cache
        try:
            for _ in range(steps):
                counts[number] += 1
                slots = sorted(mirror.tokens)
                what = choice.randrange(12)
                try:
                    if len(slots) < 2 or (what == 0 and len(slots) < 3):
                        slot = cache.alloc(choice.randrange(40))
                        if slot is not None:
                            mirror.tokens[slot] = np.zeros(0, np.uint64)
                    elif what == 1 and len(slots) < 3:
                        slot = choice.choice(slots)
                        fork = cache.fork(slot)
                        if fork is not None:
                            mirror.tokens[fork] = mirror.tokens[slot].copy()
                    elif what == 2:
                        mirror.free(choice.choice(slots))
                    elif what == 3:
                        cache.trim()
                    elif what == 4:
                        cache.prefetch({choice.choice(slots): choice.randrange(101)})
                    elif what == 5:
                        assert cache.stats().created <= 3 * PAGES * PAGE
                        cache.fits({choice.choice(slots): 50}, [20])
                    elif what == 6:
                        attempt(cache.wait)
                        pool.resize((2 + choice.randrange(2)) * PAGES * PAGE)
                    else:
                        mirror.step({slot: choice.randrange(101) for slot in slots[: choice.randrange(3)]})
                except OutOfPages:
                    mirror.free(slots[0])
                if not counts[number] % 7:
                    mirror.check_contents()
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(200)
        assert not worker.is_alive(), "hangs"
    if failures:
        raise failures[0]
    assert sum(counts) == threads * steps
    for mirror in mirrors:
        mirror.cache.fits({})
        mirror.check_contents()
        mirror.check_lengths()
        mirror.forget()
    check_pool(pool, [Watched(cache) for cache in caches], physical_bytes=driver.physical_bytes)
    for cache in caches:
        cache.close()
    pool.trim()
    assert driver.physical_bytes == 0
    driver.close()


@pytest.mark.parametrize("shared", [False, True], ids=["own pool", "shared pool"])
def test_closing_while_other_threads_work(shared):
    """They find a closed cache; nothing else happens to them, and nothing is left."""
    for round_ in range(100 if TEST_ALL else 15):
        driver = new_driver()
        pool = PagePool(driver, PAGE, PAGES * PAGE)
        cache = KVCache(LAYOUT, pool=pool) if shared else KVCache(LAYOUT, memory=PAGES * PAGE, page_size=PAGE)
        slot = cache.alloc()
        failures: list[BaseException] = []
        begin = threading.Barrier(4)

        def work(seed: int, cache=cache, slot=slot, begin=begin, failures=failures) -> None:
            choice = random.Random(seed)
            calls = [call for name, call in everything(cache, slot).items() if name != "free"]
            begin.wait()
            try:
                while True:
                    choice.choice(calls)()
            except InvalidRequest:
                pass
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for worker in workers:
            worker.start()
        begin.wait()
        threading.Event().wait(0.002 * (round_ % 5))
        closers = [threading.Thread(target=cache.close) for _ in range(2)]
        for closer in closers:
            closer.start()
        for thread in (*closers, *workers):
            thread.join(60)
            assert not thread.is_alive(), "hangs"
        assert not failures, failures
        assert cache.closed
        assert (pool if shared else cache.pool).stats().in_use == 0
        driver.close()
