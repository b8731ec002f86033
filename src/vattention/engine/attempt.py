"""Errors that belong to one request or to one pass are values: they are told to their owner, and nobody else."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def attempt(work: Callable[[], T]) -> T | Exception:
    """What `work` returns, or the error that it raised. KeyboardInterrupt and SystemExit pass through."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001  whatever a model, a tokenizer or a driver raises
        traceback.clear_frames(error.__traceback__)  # or the tensors of a pass would live as long as its error
        return error
