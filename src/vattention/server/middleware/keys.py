"""API keys: who may ask."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from vattention.server.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
"""Answered without a key, for those who watch over the server. They say nothing about what is computed."""

_MISSING = 'this server wants an API key: send it as "Authorization: Bearer KEY"'
_WRONG = "this API key is not known here"


class ApiKeys:
    """Refuses with 401 whoever has none of `keys`. With no keys, lets everybody through, whatever is sent.

    A key comes as `Authorization: Bearer KEY`, as OpenAI's clients send it, or as the password of `Basic`, whatever the
    user's name, so that a browser can open `/dashboard` and `/docs`. How long a comparison takes says nothing about
    the keys: digests of equal length are compared, in constant time, with every one of them.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = tuple(_digest(key.encode()) for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] not in ("http", "websocket") or not self._digests or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        key = _key(given[0]) if len(given) == 1 else None
        if key is not None and self._known(key):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        page = scope["method"] == "GET" and not scope["path"].startswith("/v1/")
        challenge = 'Basic realm="vattention"' if page else "Bearer"
        message = _MISSING if key is None else _WRONG
        error = ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": challenge})
        await error.response()(scope, receive, send)

    def _known(self, key: bytes) -> bool:
        digest = _digest(key)
        found = False
        for known in self._digests:  # all of them, always
            found |= hmac.compare_digest(digest, known)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _key(header: bytes) -> bytes | None:
    """The key in a header, None where it has none."""
    scheme, _, value = header.strip().partition(b" ")
    value = value.strip()
    if scheme.lower() == b"bearer":
        return value or None
    if scheme.lower() == b"basic":
        try:
            _, found, password = base64.b64decode(value, validate=True).partition(b":")
        except binascii.Error:
            return None
        return password if found and password else None
    return None
