"""`/v1/models`, `/version` and the probes."""

from __future__ import annotations

from typing import Literal

from vattention.server.protocol.base import Answer


class ModelCard(Answer):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(Answer):
    """The models that are served: one, by each of its names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Version(Answer):
    """Of vattention."""

    version: str


class Status(Answer):
    """Of the server."""

    status: str
