"""How long a request may take in all."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vattention.server.errors import ApiError
from vattention.server.streaming import event

_FAREWELL = 1.0


class Deadline:
    """Ends every POST that is not over after `timeout` seconds: its task is cancelled, and that frees its slot.

    Before the answer has begun that is 504, with `X-Should-Retry: false`, which OpenAI's clients heed: the same request
    would take as long again. In a stream it is an event with the error, and the end. 504 and not 408, which says that
    the client was slow.
    """

    def __init__(self, app: ASGIApp, *, timeout: float) -> None:
        self._app = app
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        begun = streaming = ended = False

        async def watched(message: Message) -> None:
            nonlocal begun, streaming, ended
            await send(message)
            if message["type"] == "http.response.start":
                begun = True
                streaming = any(
                    name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in message.get("headers", ())
                )
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)

        try:
            async with asyncio.timeout(self._timeout):
                await self._app(scope, receive, watched)
            return
        except TimeoutError:
            if ended:
                return
        message = f"the request was not over within the {self._timeout:g} s that this server gives one"
        error = ApiError(504, message, code="request_timeout", headers={"x-should-retry": "false"})
        if not begun:
            await error.response()(scope, receive, send)
        elif streaming:
            # A reader who takes nothing must not hold this up: then the connection ends without it.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FAREWELL):
                    await send({"type": "http.response.body", "body": event(error.body()), "more_body": True})
                    await send({"type": "http.response.body", "body": b""})
