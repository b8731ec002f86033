"""An answer in OpenAI's shape of an error, for those who stand before the routes."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.types import Send

_TYPES = {401: "authentication_error", 408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, code: str | None = None) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`, as JSON."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    if status == 504:
        kind = "timeout_error"
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


async def refuse(
    send: Send, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
) -> None:
    """Send the whole answer. The caller has sent nothing yet.

    Args:
        status: of HTTP, 400 to 599.
        message: for people. It goes to the client: no key, no stack trace.
        code: for programs.
        headers: besides the type and the length of the body.
    """
    body = error_body(status, message, code)
    named = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
