"""Invariants 3 and 4 when the driver fails: every driver call of a script fails once, and so does every later one.

The script goes through everything that calls the driver. After each failure the live slots must be as they were, token
by token; when the driver works again, so must the same call, and nothing may be lost: not a page, not a mapping.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from support import kernel
from support.device import DeviceDriver
from support.drivers import EMULATED, new_driver
from support.faults import Fault, FaultyDriver
from support.faulty_cuda import FaultyCuda
from support.mirror import Mirror, check_pool
from vattention.cache import KVCache, KVLayout, opening
from vattention.errors import OutOfPages, VAttentionError
from vattention.memory import PagePool

TEST_ALL = os.environ.get("VATTENTION_TEST_ALL") == "1"
PAGE = 4096
PAGES = 56
LAYOUT = KVLayout(2, 1, 96, torch.float32, 4, 120, layers_per_stream=None)  # 2 streams, 5 1/3 tokens a page in each
OTHER = KVLayout(1, 2, 96, torch.bfloat16, 2, 200, head_major=True, kv_together=True)  # 2 streams, 10 2/3 tokens a page


class Skip(Exception):
    """The script names something that an earlier failure left out."""


class World:
    """The caches of one run of the script, their pool, and the slots by the names the script gives them."""

    def __init__(self, driver: FaultyDriver, monkeypatch: pytest.MonkeyPatch, *, shared: bool) -> None:
        self.driver = driver
        self.shared = shared
        self.mirrors: list[Mirror] = []
        self.slots: dict[str, int] = {}
        self.pool: PagePool | None = None
        if shared:
            self.pool = PagePool(driver, PAGE, PAGES * PAGE)
        else:
            monkeypatch.setattr(opening, "HostDriver", self._new_driver)

    def _new_driver(self, *, guard: bool) -> FaultyDriver:
        self.driver.driver = new_driver(guard=guard)
        return self.driver

    # -- what the script is made of

    def open(self, layout: KVLayout) -> None:
        if self.shared:
            cache = KVCache(layout, pool=self.pool)
        else:
            cache = KVCache(layout, memory=PAGES * PAGE, page_size=PAGE)
            self.pool = cache.pool
        self.mirrors.append(Mirror(cache))

    def alloc(self, name: str, tokens: int = 0, cache: int = 0) -> None:
        slot = self._mirror(cache).alloc(tokens)
        if slot is None:
            raise Skip
        self.slots[name] = slot

    def fork(self, source: str, name: str) -> None:
        slot = self._mirror(0).fork(self._slot(source))
        if slot is None:
            raise Skip
        self.slots[name] = slot

    def alloc_range(self, *names: str) -> None:
        slots = self._mirror(0).alloc_range(len(names))
        if slots is None:
            raise Skip
        self.slots.update(zip(names, slots, strict=True))

    def pad(self, **starts: int) -> None:
        self._mirror(0).pad({self._slot(name): start for name, start in starts.items()})

    def reorder(self, **sources: str) -> None:
        """Names that are not slots yet get the next idle one."""
        mirror = self._mirror(0)
        idle = [slot for slot in range(mirror.cache.layout.max_num_seqs) if slot not in mirror.tokens]
        new = [name for name in sources if name not in self.slots]
        if len(new) > len(idle):
            raise Skip
        places = {**self.slots, **dict(zip(new, idle, strict=False))}
        mirror.reorder({places[name]: self._slot(source) for name, source in sources.items()})
        self.slots = places

    def free(self, *names: str, cache: int = 0) -> None:
        for name in names:
            self._mirror(cache).free(self._slot(name))
            del self.slots[name]

    def step(self, cache: int = 0, **lengths: int) -> None:
        self._mirror(cache).step({self._slot(name): length for name, length in lengths.items()})

    def prefetch(self, **lengths: int) -> None:
        cache = self._mirror(0).cache
        cache.prefetch({self._slot(name): length for name, length in lengths.items()})
        cache.wait()

    def trim(self) -> None:
        self._mirror(0).cache.trim()

    def resize(self, pages: int) -> None:
        if self.pool is None:
            raise Skip
        self.pool.resize(pages * PAGE)

    def close(self) -> None:
        while self.mirrors:
            self.mirrors[-1].forget()  # closing ends the slots, whether the driver works or not
            self.mirrors[-1].cache.close()
            self.mirrors.pop()
        self.slots.clear()
        if self.shared:
            self.pool.trim()

    def _mirror(self, cache: int) -> Mirror:
        if cache >= len(self.mirrors):
            raise Skip
        return self.mirrors[cache]

    def _slot(self, name: str) -> int:
        if name not in self.slots:
            raise Skip
        return self.slots[name]

    # -- looking

    def live_pages(self) -> list[dict[int, int]]:
        """Of every cache, the page table of the tokens of its live slots."""
        tables = []
        for mirror in self.mirrors:
            table = mirror.places()
            live = {page: table[page] for page in mirror.needed_places()}
            tables.append(live)
        return tables

    def check(self, before: list[dict[int, int]] | None = None) -> None:
        """What must be true after any call, failed or not, whether the driver works or not.

        Args:
            before: what `live_pages` said before a call that failed and must have changed nothing.
        """
        if self.pool is None or self.driver.closed:
            return
        for mirror in self.mirrors:
            mirror.cache.fits({})  # joins background growth
        check_pool(self.pool, self.mirrors, physical_bytes=self.driver.physical_bytes)
        maps = kernel.read_maps()
        for number, mirror in enumerate(self.mirrors):
            mirror.check_lengths()
            mirror.check_backed()
            mirror.check_stats()
            reservation = mirror.cache._backing.reservation
            table, stuck = mirror.places(), set(reservation._stuck)
            # Where a shared page was being copied, and undoing that failed too, nothing can be read until it settles.
            # The same goes for padding, while a page that was put there, or not quite, cannot be unmapped.
            unreadable = stuck & (set(table) | mirror.padding_places())
            assert not unreadable or self.driver.broken
            mirror.check_contents(unreadable=unreadable)
            if not reservation.closed:
                mirror.check_kernel(maps)
            if before is not None and mirror.tokens:
                kept = {place: table[place] for place in before[number]}
                copied = {place for place, page in kept.items() if page != before[number][place]}
                assert not copied or self.driver.broken, f"pages {copied} of live slots are others now"

    def settle(self) -> None:
        """Once the driver works, any step empties the quarantine, and everything is right."""
        for mirror in self.mirrors:
            mirror.cache.step({})
        if self.mirrors:
            assert self.pool.stats().quarantined == 0
        self.check()


@dataclass(frozen=True)
class Action:
    """One call of the script."""

    name: str
    arguments: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, world: World) -> None:
        getattr(world, self.name)(*self.arguments, **dict(self.options))


def act(name: str, *arguments: Any, **options: Any) -> Action:
    return Action(name, arguments, tuple(options.items()))


ALONE = [
    act("open", LAYOUT),
    act("alloc", "a"),
    act("step", a=12),
    act("alloc", "b"),
    act("step", a=25, b=5),  # several streams of several slots grow
    act("prefetch", a=40, b=30),
    act("step", a=33, b=30),
    act("fork", "a", "c"),
    act("step", c=3),
    act("step", c=14, b=31),  # copies shared pages
    act("step", a=8),
    act("step", a=50, c=20),  # copies and grows at once
    act("free", "b"),
    act("alloc", "d", 11),  # takes over what b left, but for the surplus
    act("step", d=12),
    act("fork", "d", "b"),
    act("free", "a", "d"),
    act("step", c=76),  # reclaims what a and d left
    act("alloc", "a"),  # d's pages are shared with b
    act("step", a=11),
    act("step", c=21),
    act("step", a=64),  # reclaims what c has too much
    act("free", "a"),
    act("trim"),
    act("alloc", "a"),
    act("step", a=22),
    act("free", "a"),
    act("resize", 20),
    act("step", b=22),
    act("resize", 60),
    act("step", b=40),
    act("close"),
]

ROWS = [
    act("open", LAYOUT),
    act("alloc_range", "a", "b", "c"),
    act("pad", a=13, b=20),
    act("step", a=30, b=30, c=30),
    act("reorder", b="a", c="a"),
    act("step", a=34, b=34, c=34),
    act("reorder", a="b", b="c", c="a"),
    act("reorder", d="b"),  # a slot that was idle
    act("step", a=41, b=41, c=40, d=40),
    act("step", b=5),  # back into the padding
    act("step", b=25),  # copies shared pages
    act("reorder", a="b", d="a"),
    act("free", "c"),
    act("alloc", "c"),
    act("step", c=9),
    act("reorder", a="c", c="b"),  # other paddings
    act("free", "d"),
    act("alloc_range", "d"),
    act("pad", d=50),
    act("step", a=20, c=30, d=60),
    act("reorder", d="a", a="d"),
    act("step", a=65, d=65),
    act("close"),
]

TOGETHER = [
    act("open", LAYOUT),
    act("open", OTHER),
    act("alloc", "a"),
    act("alloc", "x", cache=1),
    act("step", a=40),
    act("step", 1, x=60),
    act("fork", "a", "b"),
    act("free", "x", cache=1),
    act("step", b=20),
    act("step", a=100, b=30),  # reclaims what x left
    act("free", "a"),
    act("alloc", "x", cache=1),
    act("step", 1, x=150),  # reclaims what a left
    act("resize", 44),
    act("close"),
]

AfterFailure = Callable[[World, Action, list[dict[int, int]]], None]


def once_more(world: World, action: Action, before: list[dict[int, int]]) -> None:
    """The driver works again: the same call succeeds."""
    world.driver.repair()
    action(world)
    world.settle()


def stubborn(world: World, action: Action, before: list[dict[int, int]]) -> None:
    """The same call, and others, twice while the driver does not work. Then it works, and the same call succeeds."""
    for _ in range(2):
        try:
            action(world)
        except VAttentionError:
            world.check(before)
        else:  # it had less to do
            world.driver.repair()
            world.settle()
            return
        meddle(world)
        world.check(before)
    once_more(world, action, before)


def give_up(world: World, action: Action, before: list[dict[int, int]]) -> None:
    """The driver does not work until the end, and the script goes on as well as it can."""


AFTER_FAILURE = (once_more, stubborn, give_up)


def meddle(world: World) -> None:
    """Calls that change nothing the script relies on, whether they succeed or not."""
    for mirror in world.mirrors:
        mirror.cache.stats()
        mirror.cache.fits({}, [7])
        mirror.cache.capacity()
        with suppress(VAttentionError):
            if (slot := mirror.cache.alloc(1)) is not None:
                mirror.cache.free(slot)
        with suppress(VAttentionError):
            mirror.cache.trim()
        with suppress(VAttentionError):
            mirror.cache.step({})
        with suppress(VAttentionError):
            world.pool.resize(world.pool.budget * PAGE)


def play(world: World, script: list[Action], after_failure: AfterFailure = once_more) -> None:
    """Go through the script. Where an action raises, check the world and let `after_failure` go on."""
    for action in script:
        before = world.live_pages()
        try:
            action(world)
        except VAttentionError:
            assert world.driver.failures, "an error though nothing had failed"
            world.check(before)
            after_failure(world, action, before)
        except Skip:
            assert after_failure is give_up
        if world.driver.failures:
            world.check()


KINDS: dict[str, tuple[bool, Callable[[], Any], list[Action]]] = {
    "a pool of its own": (False, lambda: None, ALONE),
    "a shared pool": (True, new_driver, TOGETHER),
    "a device": (True, lambda: DeviceDriver(PAGE), ALONE),
    "rows": (False, lambda: None, ROWS),
    "guarded rows": (True, lambda: new_driver(guard=True), ROWS),
    "rows on a device": (True, lambda: DeviceDriver(PAGE), ROWS),
}
if EMULATED:
    KINDS["CUDA's own calls"] = (True, lambda: None, ALONE)

STRIDES = {
    "a pool of its own": 2,
    "a device": 3,
    "rows": 5,
    "guarded rows": 7,
    "rows on a device": 11,
    "CUDA's own calls": 13,
}
"""Of the calls of these, every so manieth fails in turn. No divisor of another, so that together they meet most."""


def start(kind: str, monkeypatch: pytest.MonkeyPatch, fault: Fault | None = None) -> tuple[World, list[Action]]:
    shared, driver, script = KINDS[kind]
    faulty = FaultyCuda(fault) if kind == "CUDA's own calls" else FaultyDriver(driver(), fault)
    return World(faulty, monkeypatch, shared=shared), script


def finish(world: World) -> None:
    """Everything is back."""
    world.driver.repair()
    world.close()
    if world.shared:
        assert world.pool.stats()[1:] == (0, 0, 0, 0)
        assert world.driver.mappings.used == 0 or world.driver.linear
        world.driver.close()
    assert world.driver.at_close == 0


@functools.cache
def verbs(kind: str) -> tuple[str, ...]:
    """The driver calls of the script when nothing fails."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        world, script = start(kind, monkeypatch)
        play(world, script)
        finish(world)
    return tuple(world.driver.history)


def faults(kind: str, after_failure: AfterFailure) -> Iterator[Fault]:
    """Every call of the script, in every way it may fail. Of most kinds not every call, except at full size: what goes
    on after a failure decides which."""
    onwards = after_failure is not once_more
    stride = 1 if TEST_ALL else STRIDES.get(kind, 1)
    first = AFTER_FAILURE.index(after_failure) % stride
    for number, verb in list(enumerate(verbs(kind), start=1))[first::stride]:
        yield Fault(number, onwards)
        if verb in ("unmap", "cuMemUnmap"):
            yield Fault(number, onwards, after=True)
        if verb in ("create", "cuMemCreate"):
            yield Fault(number, onwards, no_memory=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after_failure", AFTER_FAILURE, ids=lambda function: function.__name__)
def test_any_driver_call_may_fail(kind, after_failure, monkeypatch):
    in_use = new_driver().mappings.used
    for fault in faults(kind, after_failure):
        world, script = start(kind, monkeypatch, fault)
        try:
            play(world, script, after_failure)
            assert world.driver.failures
            finish(world)
        except BaseException as error:
            error.add_note(f"{fault}: {verbs(kind)[fault.at - 1]}")
            raise
        assert new_driver().mappings.used == in_use


@pytest.mark.parametrize("shared", [False, True], ids=["own slots", "another cache's slots"])
@pytest.mark.parametrize("forking", [False, True], ids=["step", "fork"])
def test_where_the_machine_has_less_than_the_budget_idle_slots_give_what_they_have(shared, forking):
    host = new_driver()
    driver = FaultyDriver(host, memory=24 * PAGE)
    pool = PagePool(driver, PAGE, PAGES * PAGE)
    with KVCache(LAYOUT, pool=pool) as cache, KVCache(LAYOUT, pool=pool) as other:
        mirror = Mirror(cache)
        holder = Mirror(other) if shared else mirror
        slot, idle = mirror.alloc(), holder.alloc()
        mirror.step({slot: 21})  # 4 pages in each of the 2 streams
        holder.step({idle: 42})  # 8 pages
        with pytest.raises(OutOfPages):
            mirror.fork(slot) if forking else mirror.step({slot: 22})
        mirror.check_contents()
        holder.check_contents()
        holder.free(idle)
        if forking:
            mirror.fork(slot)
        else:
            mirror.step({slot: 64})
        mirror.check_contents()
        check_pool(pool, [mirror, holder] if shared else [mirror], physical_bytes=host.physical_bytes)
        assert host.physical_bytes <= 24 * PAGE
        mirror.forget()
        holder.forget()
