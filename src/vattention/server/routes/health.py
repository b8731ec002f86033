"""The probes: `/health` and `/ready`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vattention.server.protocol.models import Status
from vattention.server.state import state_of
from vattention.server.strict_json import JsonResponse

router = APIRouter()

_UNWELL: dict[int | str, dict[str, Any]] = {503: {"model": Status, "description": "Not now."}}


@router.get("/health", response_model=Status, responses=_UNWELL)
async def health(request: Request) -> Response:
    """Whether the server can generate: 503 while it warms up, and once the engine has stopped. A restart may help."""
    state = state_of(request)
    if state.can_generate:
        return _status(200, "ok")
    return _status(503, "the engine has stopped" if state.warm else "warming up")


@router.get("/ready", response_model=Status, responses=_UNWELL)
async def ready(request: Request) -> Response:
    """Whether new requests should be sent here: 503 where `/health` says so, and while the server is ending."""
    state = state_of(request)
    if state.draining:
        return _status(503, "ending")
    return await health(request)


def _status(code: int, status: str) -> Response:
    return JsonResponse(Status(status=status).model_dump(), code)
