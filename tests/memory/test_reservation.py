"""Reservations: the order of driver calls, and errors that leave things as they were."""

import pytest
import torch

from support.drivers import new_driver
from vattention.errors import InvalidRequest
from vattention.memory import PagePool, Reservation

PAGE = 64 << 10


class Recorder:
    """A host driver that writes down which verbs were called."""

    def __init__(self):
        self.driver = new_driver()
        self.calls = []

    def __getattr__(self, name):
        found = getattr(self.driver, name)
        if not callable(found):
            return found

        def record(*args):
            self.calls.append(name)
            return found(*args)

        return record


@pytest.fixture
def recorder():
    recorder = Recorder()
    yield recorder
    recorder.driver.close()


def test_nothing_is_unmapped_or_replaced_before_a_fence(recorder):
    """Invariant 5: work in flight may still touch a page until the fence has passed."""
    pool = PagePool(recorder, PAGE, 64 * PAGE)
    reservation = Reservation(pool, 64 * PAGE)
    recorder.calls.clear()
    reservation.map(0, pool.take(2))
    assert "fence" not in recorder.calls, "fresh addresses need none"
    recorder.calls.clear()
    reservation.map(1, pool.take(1))
    assert recorder.calls.index("fence") < recorder.calls.index("map")
    recorder.calls.clear()
    reservation.unmap(0, 1)
    assert recorder.calls == ["fence", "unmap"]
    recorder.calls.clear()
    reservation.close()
    assert recorder.calls.index("fence") < recorder.calls.index("unmap")


def test_a_run_is_one_map_and_a_range_one_set_access(recorder):
    pool = PagePool(recorder, PAGE, 64 * PAGE)
    reservation = Reservation(pool, 64 * PAGE)
    recorder.calls.clear()
    reservation.map(0, pool.take(8))
    assert recorder.calls == ["create"] * (1 if recorder.linear else 8) + ["map", "set_access"]
    recorder.calls.clear()
    reservation.alias(0, 20, 3)
    assert recorder.calls == ["map", "set_access"]
    reservation.close()


def test_aliasing_holes_is_refused_and_changes_nothing(recorder):
    pool = PagePool(recorder, PAGE, 64 * PAGE)
    reservation = Reservation(pool, 64 * PAGE)
    reservation.map(0, pool.take(2))
    with pytest.raises(ValueError, match="not all mapped"):
        reservation.alias(1, 10, 2)
    assert pool.references(reservation.page(1)) == 1
    assert reservation.page(10) is None
    reservation.close()
    with pytest.raises(InvalidRequest, match="closed"):
        reservation.map(0, [])
    with pytest.raises(InvalidRequest, match="closed"):
        reservation.tensor(0, (1,), (1,), torch.uint8)


@pytest.mark.parametrize("size", [0, -PAGE, PAGE + 4096])
def test_sizes_are_whole_pages(recorder, size):
    with pytest.raises(ValueError, match="page size"):
        Reservation(PagePool(recorder, PAGE, 64 * PAGE), size)


def test_a_finalizer_never_works_inside_another_call(recorder):
    """What a forgotten cache holds is given back when the pool is next asked for numbers, not in between."""
    pool = PagePool(recorder, PAGE, 4 * PAGE)
    reservation = Reservation(pool, 64 * PAGE)
    reservation.map(0, pool.take(4))
    with pool.lock:
        pool.defer(reservation.close)
        assert not reservation.closed
        assert pool.available == 4
        assert reservation.closed
