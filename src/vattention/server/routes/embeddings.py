"""`/v1/embeddings`: not supported, and says so."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from vattention.server.errors import ApiError
from vattention.server.routes.failures import failures

router = APIRouter()


@router.post("/v1/embeddings", status_code=400, response_model=None, responses=failures(400, 401, 413, 500))
async def embeddings() -> Response:
    """The model served here generates text; it makes no embeddings."""
    raise ApiError(400, "embeddings are not supported: the model served here generates text", code="not_supported")
