"""`GET /dashboard`: the slots, the memory and the requests of the engine, as they change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import FastAPI, Query, Response
from fastapi.responses import JSONResponse

from vattention.async_llm import AsyncLLM
from vattention.server.dashboard.data import page_data
from vattention.server.dashboard.history import History
from vattention.server.dashboard.html import read_page

__all__ = ["add_dashboard"]


def add_dashboard(app: FastAPI, llm: AsyncLLM, *, model_name: str) -> None:
    """Serve `/dashboard`, a page without anything from elsewhere, and `/dashboard/data`, which it draws.

    From the start of the application to its end the engine is asked once a second how it is.
    """
    history = History(llm)
    page = read_page()
    _during_the_life_of(app, history)

    @app.get("/dashboard", include_in_schema=False)
    async def dashboard() -> Response:
        """The page: the same for everybody, and nothing about the engine."""
        return Response(page.html, media_type="text/html", headers=page.headers)

    @app.get("/dashboard/data", include_in_schema=False)
    async def data(after: Annotated[int, Query(ge=0)] = 0) -> Response:
        """The engine now, and the points from number `after` on."""
        content: dict[str, Any] = page_data(history, model_name, after)
        return JSONResponse(content, headers={"cache-control": "no-store"})


def _during_the_life_of(app: FastAPI, history: History) -> None:
    before = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with before(app) as state:
            running = asyncio.create_task(history.run())
            try:
                yield state
            finally:
                running.cancel()
                with suppress(asyncio.CancelledError):
                    await running

    app.router.lifespan_context = lifespan
