"""The order of the middlewares."""

from __future__ import annotations

from collections.abc import Callable

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from vattention.server.admission import Admission
from vattention.server.middleware.access import Access
from vattention.server.middleware.admit import Admit
from vattention.server.middleware.body import BodyLimit
from vattention.server.middleware.deadline import Deadline
from vattention.server.middleware.keys import ApiKeys
from vattention.server.settings import ServerSettings


def guards(settings: ServerSettings, *, admission: Admission, draining: Callable[[], bool]) -> list[Middleware]:
    """The middlewares of a server, the outermost first.

    The log sees everything. CORS answers a browser's preflight, which carries no key. Then the key, before anything is
    read or queued for whoever has none; a place in the queue; the time; the size of the body.
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
    if settings.api_keys:
        layers.append(Middleware(ApiKeys, keys=settings.api_keys))
    layers.append(Middleware(Admit, admission=admission, draining=draining))
    if settings.request_timeout is not None:
        layers.append(Middleware(Deadline, timeout=settings.request_timeout))
    layers.append(Middleware(BodyLimit, max_bytes=settings.max_body_bytes, timeout=settings.body_timeout))
    return layers
