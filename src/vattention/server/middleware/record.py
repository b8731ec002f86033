"""What is known about a request while it is served, for the log: middlewares and routes both write into it."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import Scope

_KEY = "vattention.record"


@dataclass
class Record:
    """One HTTP request.

    Attributes:
        request_id: what the client and the log call it.
        model: that the client has asked for.
        prompt_tokens, completion_tokens: counted so far; None where nothing was computed.
        finish: why the answer ended; several reasons are joined by commas.
    """

    request_id: str
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish: str | None = None


def attach(scope: Scope, record: Record) -> None:
    """Make `record` the one of this request."""
    scope[_KEY] = record


def record_of(scope: Scope) -> Record:
    """The record of this request; a new one, which nobody reads, where no middleware has attached one."""
    record = scope.get(_KEY)
    return record if isinstance(record, Record) else Record("none")
