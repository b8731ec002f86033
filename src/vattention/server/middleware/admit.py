"""Who may come in now: nobody while the server drains, and no more than it has room for."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from vattention.server.admission import Admission, Overloaded, staying
from vattention.server.errors import ApiError, api_error


class Admit:
    """Counts every POST as one answer from before its body is read until its own answer has ended.

    503 with Retry-After while the server drains, 429 with Retry-After where there is no room. A route says by
    `admission.hold` how many answers a request is about; that may end in 429 too. What only reads
    (GET) is let in always.
    """

    def __init__(self, app: ASGIApp, *, admission: Admission, draining: Callable[[], bool]) -> None:
        self._app = app
        self._admission = admission
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._draining():
            headers = {"retry-after": "5", "connection": "close"}
            error = ApiError(503, "the server is stopping: ask another one", code="draining", headers=headers)
            await error.response()(scope, receive, send)
            return
        try:
            stay = self._admission.enter()
        except Overloaded as full:
            await api_error(full).response()(scope, receive, send)
            return
        with staying(stay):
            await self._app(scope, receive, send)
