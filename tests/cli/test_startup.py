"""Garbage waits while a command starts, and is collected afterwards, whatever happens."""

import gc

import pytest

from vattention.cli.startup import without_collecting


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
