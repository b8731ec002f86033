"""Server-sent events, and clients that go away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vattention.server.errors import api_error
from vattention.server.strict_json import encode

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"

_log = logging.getLogger("vattention.server")


class ClientGone(Exception):
    """The client went away before its answer was complete. There is nobody to tell."""


def event(value: Any, name: str | None = None) -> bytes:
    """One event: JSON, under a name where the protocol has names."""
    head = b"" if name is None else b"event: %b\n" % name.encode()
    return b"%bdata: %b\n\n" % (head, encode(value))


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled at once when the client goes away.

    Args:
        receive: of the request, its body read.

    Raises:
        ClientGone: it did. And whatever `work` raises.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """An answer that is not streamed. One that nobody waits for has status 499 in the log."""
    try:
        return await unless_gone(request.receive, work)
    except ClientGone:
        return Response(status_code=499)


class EventStream(Response):
    """An answer in events, sent as they come.

    It begins with the first event, so that what fails before it is an error with a status of its own; what fails later
    is an event of OpenAI's error shape, and the last one. No event is asked for before the one before it has been
    taken by the server, which holds back where the client reads slowly.

    Args:
        events: what to send; closed when the client goes away.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all, or until the client goes away."""
        try:
            await unless_gone(receive, self._send(send))
        except ClientGone:
            return

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _body(send, first)
            try:
                async for each in events:
                    await _body(send, each)
            except Exception as error:  # noqa: BLE001 - the status has been sent: this is how a client can be told
                told = api_error(error)
                if told.status == 500:
                    _log.exception("a stream failed")
                await _body(send, event(told.body()))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _body(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
