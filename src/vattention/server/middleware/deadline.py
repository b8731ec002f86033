"""How long a request may take in all."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vattention.server.middleware.refusal import error_body, refuse

_CODE = "request_timeout"


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
        if not begun:
            await refuse(send, 504, message, code=_CODE, headers={"x-should-retry": "false"})
        elif streaming:
            event = b"event: error\n" if scope["path"].endswith("/responses") else b""
            # A reader who takes nothing must not hold this up: then the connection ends without it.
            try:
                async with asyncio.timeout(1):
                    await send(
                        {
                            "type": "http.response.body",
                            "body": event + b"data: " + error_body(504, message, _CODE) + b"\n\n",
                        }
                    )
            except TimeoutError:
                return
            await send({"type": "http.response.body", "body": b""})
