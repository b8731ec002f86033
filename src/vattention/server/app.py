"""The application: one model behind OpenAI's endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from vattention.async_llm import AsyncLLM
from vattention.errors import VAttentionError
from vattention.server.admission import Admission
from vattention.server.dashboard import add_dashboard
from vattention.server.errors import add_error_handlers
from vattention.server.metrics import add_metrics
from vattention.server.middleware import guards
from vattention.server.routes import ROUTERS
from vattention.server.settings import ServerSettings
from vattention.server.state import ServerState


def create_app(llm: AsyncLLM, settings: ServerSettings) -> FastAPI:
    """An ASGI application that serves a model.

    Where other parts attach:

    - `middleware`: keys, admission, deadlines, body size, request ids, access log. Plain ASGI classes: Starlette's
      BaseHTTPMiddleware would hide disconnects from the routes.
    - `/metrics` and `/dashboard`: `add_metrics(app, llm, ...)` and `add_dashboard(app, llm, ...)`, called here.
    - grammars and tool calls: `structure.py` and `tools/`, called by the routes.
    - what is counted or limited for each request that generates: `generation.py`, the one door to the engine.
    - `ServerState`, at `app.state.server`: `warm`, and `draining`, to be set when the server is told to end.

    Args:
        llm: who generates. It stays the caller's, who closes it after the server has ended. It is warmed up when the
            application starts; `/health` says 503 until that is done.
        settings: what the server was told.
    """
    admission = Admission(at_once=llm.max_num_seqs, queue=settings.max_queue)
    state = ServerState(llm=llm, settings=settings, admission=admission)
    app = FastAPI(
        title="vattention",
        version=version("vattention"),
        description="An OpenAI-compatible endpoint.",
        lifespan=_lifespan,
        middleware=guards(settings, admission=admission, draining=lambda: state.draining),
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = state
    add_error_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    if settings.enable_metrics:
        add_metrics(app, llm, model_name=settings.served_model_names[0])
    if settings.enable_dashboard:
        add_dashboard(app, llm, model_name=settings.served_model_names[0])
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    warming = asyncio.create_task(_warm_up(app.state.server))
    try:
        yield
    finally:
        warming.cancel()
        with suppress(asyncio.CancelledError):
            await warming


async def _warm_up(state: ServerState) -> None:
    with suppress(VAttentionError):  # it is at work already, or has stopped: `can_generate` knows
        await state.llm.warmup(wait=state.settings.warm)
    state.warm = True


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The document of FastAPI, less the status 422, which this server never uses."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            separate_input_output_schemas=False,
        )
        for path in document["paths"].values():
            for operation in path.values():
                operation.get("responses", {}).pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema
