"""Errors that belong to one request or to one pass are values: they are told to their owner, and nobody else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def attempt(work: Callable[[], T]) -> T | Exception:
    """What `work` returns, or the error that it raised. KeyboardInterrupt and SystemExit pass through."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001  whatever a model, a tokenizer or a driver raises
        return error
