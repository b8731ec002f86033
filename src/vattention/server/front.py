"""What answers before there is a model."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vattention.server.errors import ApiError

_WAIT = {"retry-after": "5"}


class Front:
    """An ASGI application that says 503 "loading" until it has another one, `app`, and then hands everything on.

    A server listens before its model is loaded: that the port is taken shows at once and not after a minute, and who
    watches over it reads why it is not ready instead of guessing from a refused connection.
    """

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._early(scope, receive, send)

    async def _early(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/version":
            await JSONResponse({"version": _version()})(scope, receive, send)
        elif scope["path"] in ("/health", "/ready"):
            await JSONResponse({"status": "loading"}, 503, _WAIT)(scope, receive, send)
        else:
            error = ApiError(503, "the model is being loaded: try again", code="loading", headers=_WAIT)
            await error.response()(scope, receive, send)


def _version() -> str:
    try:
        return version("vattention")
    except PackageNotFoundError:
        return "unknown"
