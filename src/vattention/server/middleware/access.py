"""Request ids, and a line in the log for every request."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vattention.server.errors import api_error
from vattention.server.middleware.record import Record, recording

LOGGER = logging.getLogger("vattention.server.access")

_GOOD_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_CLIENT_CLOSED = 499  # what nginx writes for a client that left before it had an answer
_WATCHERS = frozenset({"/health", "/ready", "/metrics"})
_LONGEST_BODY = 64 << 10


class Access:
    """Names each request, answers with the name in `X-Request-Id`, and writes one line when it is over.

    A client's own `X-Request-Id` is kept if it is 1 to 128 of letters, digits and `._:-`. The line has the method, the
    path without what follows "?", the status, milliseconds, token counts and the client's address: no prompt, no
    answer, no header. 499 is the status of a client that left before it had one. Requests of those who only watch
    (`/health`, `/ready`, `/metrics`, `/dashboard`) that went well are written at level debug. What nobody below has
    caught is written with its trace, and the client is told 500 and no more.

    Args:
        log_prompts: add the body of the request, up to 64 KiB of it.
    """

    def __init__(self, app: ASGIApp, *, log_prompts: bool = False) -> None:
        self._app = app
        self._log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        record = Record(_request_id(scope))
        status: int | None = None
        whole = False
        body = bytearray()

        async def named(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"]
                message = {**message, "headers": [*headers, (b"x-request-id", record.request_id.encode())]}
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                whole = True

        async def kept() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.extend(message.get("body", b"")[: _LONGEST_BODY - len(body)])
            return message

        try:
            with recording(record):
                await self._app(scope, kept if self._log_prompts else receive, named)
        except Exception as error:  # the log is where it belongs, and nobody above knows the request's name
            LOGGER.exception("internal error", extra={"fields": {"request_id": record.request_id}})
            if status is None:
                await api_error(error).response()(scope, receive, named)
        finally:
            shown = _CLIENT_CLOSED if status is None else status
            self._write(scope, record, shown, time.perf_counter() - began, {"complete": whole}, bytes(body))

    def _write(
        self, scope: Scope, record: Record, status: int, seconds: float, more: dict[str, Any], body: bytes
    ) -> None:
        path = scope["path"]
        watched = status < 400 and (path in _WATCHERS or path.startswith("/dashboard"))
        level = logging.DEBUG if watched else logging.WARNING if status >= 500 else logging.INFO
        if not LOGGER.isEnabledFor(level):
            return
        client = scope.get("client")
        fields: dict[str, Any] = {
            "request_id": record.request_id,
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": path,
            "status": status,
            "ms": round(seconds * 1000, 1),
            "model": record.model,
            "prompt_tokens": record.prompt_tokens or None,
            "completion_tokens": record.completion_tokens or None,
            "finish": ",".join(record.finish) or None,
            **more,
        }
        if self._log_prompts:
            fields["body"] = body.decode("utf-8", "replace")
        shown = {name: value for name, value in fields.items() if value is not None}
        LOGGER.log(level, "request", extra={"fields": shown})


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _GOOD_ID.fullmatch(value):
            return str(value, "ascii")
    return f"req-{uuid.uuid4().hex}"
