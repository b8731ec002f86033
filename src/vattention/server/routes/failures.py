"""What the OpenAPI document says about answers that are not a success, and about those in events."""

from __future__ import annotations

from typing import Any

from vattention.server.protocol.base import ErrorResponse
from vattention.server.streaming import EventStream

_MEANING = {
    400: "The request cannot be served as it is.",
    401: "An API key is missing, or wrong.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "Too many requests wait: try again after Retry-After seconds.",
    500: "A bug.",
    503: "The server cannot generate now.",
    504: "The answer took longer than this server gives one.",
}


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route for these statuses."""
    return {status: {"model": ErrorResponse, "description": _MEANING[status]} for status in statuses}


READING = failures(400, 401, 404, 408, 413, 429, 500, 503, 504)
"""Of endpoints that read a body and ask nothing of the engine."""

_STREAMED = {
    "description": "The answer, whole or with `stream` as events.",
    "content": {EventStream.media_type: {}},
}

GENERATING: dict[int | str, dict[str, Any]] = {200: _STREAMED, **READING}
"""Of the endpoints that generate."""
