"""Starting, and going on, without pauses for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collecting() -> Iterator[None]:
    """No garbage is collected in here; afterwards it is as it was before.

    Importing torch and transformers makes a million objects that stay; looking through them again and again takes a
    fifth of the time to the first token. Source: https://docs.python.org/3/library/gc.html
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def keep_for_good() -> None:
    """Collect what is garbage now, and never look at the rest again.

    For a process that is ready and will run for long: to look through a million objects of the libraries takes up to
    half a second, in which nobody gets a token. Source: https://docs.python.org/3/library/gc.html#gc.freeze
    """
    gc.collect()
    gc.freeze()
