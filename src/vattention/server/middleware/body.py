"""How large the body of a request may be, and how long it may take to come."""

from __future__ import annotations

import asyncio

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vattention.server.errors import ApiError


class BodyLimit:
    """Reads a request's body whole before the application sees it: 413 where it is too long, 408 where it is too slow.

    A body that announces its length is refused before it is read, another one as soon as it is longer than allowed, so
    no more than `max_bytes` of it and one chunk of the transport are ever held.

    Args:
        max_bytes: of a body.
        timeout: seconds for all of a body to arrive.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not announced.isdigit() or len(announced) > 18 or int(announced) > self._max_bytes:
            await self._too_long()(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout):
                body = await self._read(receive)
        except TimeoutError:
            message = f"the body of the request did not arrive within {self._timeout:g} s"
            error = ApiError(408, message, code="body_timeout", headers={"connection": "close"})
            await error.response()(scope, receive, send)
            return
        except _TooLong:
            await self._too_long()(scope, receive, send)
            return
        if body is None:
            return  # nobody is there any more
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}
        del body

        async def receive_whole() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        await self._app(scope, receive_whole, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """All of the body; None where the client has left. Raises _TooLong."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self._max_bytes:
                raise _TooLong
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_long(self) -> Response:
        message = f"the body of the request is longer than this server takes: {self._max_bytes} bytes at most"
        # The connection stays: uvicorn reads the rest and drops it. If it were closed with a part unread, the client,
        # which is still sending, might never see this answer.
        return ApiError(413, message, code="request_too_large").response()


class _TooLong(Exception):
    """More than the limit has come."""
