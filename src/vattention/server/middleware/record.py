"""What is known about a request while it is served, for the log: middlewares and routes both write into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Record:
    """One HTTP request.

    Attributes:
        request_id: what the client and the log call it.
        model: that the client has asked for.
        prompt_tokens, completion_tokens: counted so far.
        finish: why its answers have ended so far, in the order of their ends.
    """

    request_id: str
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: list[str] = field(default_factory=list)


_current: ContextVar[Record | None] = ContextVar("vattention_record", default=None)


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """Make `record` that of the request that this task serves, with the tasks that it starts."""
    token = _current.set(record)
    try:
        yield
    finally:
        _current.reset(token)


def current_record() -> Record:
    """The record of the request that is served here; one that nobody reads, where no middleware keeps one."""
    return _current.get() or Record("none")
