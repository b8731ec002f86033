"""`/v1/models`, `/version`."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Request
from starlette.responses import Response

from vattention.server.protocol.models import ModelCard, ModelList, Version
from vattention.server.routes.failures import failures
from vattention.server.state import ServerState, state_of
from vattention.server.strict_json import JsonResponse, StrictRoute

router = APIRouter(route_class=StrictRoute)


@router.get("/v1/models", response_model=ModelList, responses=failures(401, 500))
async def list_models(request: Request) -> Response:
    """The model, by each of its names."""
    state = state_of(request)
    cards = [_card(state, name) for name in state.settings.served_model_names]
    return JsonResponse(ModelList(data=cards).model_dump())


@router.get("/v1/models/{model:path}", response_model=ModelCard, responses=failures(401, 404, 500))
async def retrieve_model(request: Request, model: str) -> Response:
    """One of the names."""
    state = state_of(request)
    return JsonResponse(_card(state, state.model_name(model)).model_dump())


@router.get("/version", response_model=Version, responses=failures(401, 500))
async def show_version() -> Response:
    """The version of vattention."""
    return JsonResponse(Version(version=version("vattention")).model_dump())


def _card(state: ServerState, name: str) -> ModelCard:
    root = state.settings.served_model_names[0]
    return ModelCard(
        id=name, created=state.created, owned_by="vattention", root=root, max_model_len=state.llm.max_model_len
    )
