"""Calls of compiled functions, which somebody may be writing down to make them again without Python.

Whoever records (`engine.cpu_graphs`) is told of every call that goes through `call` in his thread.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class CannotRecord(RuntimeError):
    """What is done cannot be done again from what was written down."""


class Recorder(Protocol):
    """Who writes down."""

    def note(self, function: Any, argument: ctypes.Structure, kept: tuple[Any, ...]) -> None:
        """`function`, of a library, has been called with the address of `argument`, which the caller will reuse.

        What it points to stays as long as `kept` does, and memory of tensors as long as the recorder sees to it.
        """


_here = threading.local()


def call(function: Any, argument: ctypes.Structure, *kept: Any) -> None:
    """Call `function(&argument)`."""
    function(ctypes.byref(argument))
    recorder: Recorder | None = getattr(_here, "recorder", None)
    if recorder is not None:
        recorder.note(function, argument, kept)


@contextmanager
def to(recorder: Recorder) -> Iterator[None]:
    """In here, calls of this thread are told to `recorder`."""
    _here.recorder = recorder
    try:
        yield
    finally:
        _here.recorder = None


def refuse(why: str) -> None:
    """Raises CannotRecord if somebody is writing down what this thread does."""
    if getattr(_here, "recorder", None) is not None:
        raise CannotRecord(why)
