"""Garbage waits while a command starts, and is collected afterwards, whatever happens."""

import gc
import weakref

import pytest

from vattention.cli.startup import keep_for_good, without_collecting


def test_collecting_is_off_inside_and_on_after() -> None:
    with without_collecting():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_is_on_again_after_an_error() -> None:
    with pytest.raises(ValueError, match="no model"), without_collecting():
        raise ValueError("no model")
    assert gc.isenabled()


def test_whoever_had_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with without_collecting():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_what_is_kept_is_not_looked_at_again_and_garbage_is_not_kept() -> None:
    kept, garbage = Cycle(), weakref.ref(Cycle())
    try:
        keep_for_good()
        assert garbage() is None
        assert gc.get_freeze_count() > 0
        assert all(each is not kept for each in gc.get_objects())
        later = weakref.ref(Cycle())
        gc.collect()
        assert later() is None
    finally:
        gc.unfreeze()
