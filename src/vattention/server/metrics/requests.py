"""HTTP requests, counted by route and status."""

from __future__ import annotations

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vattention.server.metrics.families import PREFIX

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_CLIENT_CLOSED = "499"
"""What nginx writes for a client that left before it had an answer."""


class CountRequests:
    """Counts each request when its answer is over, as the outermost middleware, so that refusals count too.

    Labels come from the routes there are: whatever else a client asks for is "other".
    """

    def __init__(self, app: ASGIApp, *, routes: FastAPI, registry: CollectorRegistry) -> None:
        self._app = app
        self._routes = routes
        self._paths: frozenset[str] | None = None
        self._requests = Counter(
            PREFIX + "http_requests", "HTTP requests answered.", ["method", "route", "status"], registry=registry
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _CLIENT_CLOSED

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._requests.labels(method, self._route(scope), status).inc()

    def _route(self, scope: Scope) -> str:
        """The pattern that matched; where a middleware answered before any could, the path, if it is one of ours."""
        matched = getattr(scope.get("route"), "path", None)
        if isinstance(matched, str):
            return matched
        if self._paths is None:
            self._paths = frozenset(path for route in self._routes.routes if (path := getattr(route, "path", None)))
        return scope["path"] if scope["path"] in self._paths else "other"
