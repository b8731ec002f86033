"""The order of the middlewares."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from vattention.server.middleware.access import Access
from vattention.server.middleware.body import BodyLimit
from vattention.server.middleware.keys import ApiKeys
from vattention.server.settings import ServerSettings


def guarded(app: Starlette, settings: ServerSettings) -> None:
    """Put the middlewares around `app`, which has not served anything yet.

    From the client's side: the log sees everything; CORS answers a browser's preflight, which carries no key; then the
    key, before anything is read or queued for whoever has none; then the size of the body.
    """
    layers = [Middleware(Access, log_prompts=settings.log_prompts)]
    if settings.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    layers += [
        Middleware(ApiKeys, keys=settings.api_keys),
        Middleware(BodyLimit, max_bytes=settings.max_body_bytes, timeout=settings.body_timeout),
    ]
    app.user_middleware[:0] = layers
