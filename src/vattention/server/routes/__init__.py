"""The endpoints, one module a family."""

from __future__ import annotations

from vattention.server.routes import chat, completions, embeddings, health, models, responses, tokens

ROUTERS = (
    models.router,
    completions.router,
    chat.router,
    responses.router,
    embeddings.router,
    tokens.router,
    health.router,
)
"""In the order of the OpenAPI document."""
