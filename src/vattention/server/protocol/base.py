"""What all requests and answers have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Body(BaseModel):
    """A request, or a part of one. Fields that are not known are ignored, as OpenAI's clients expect."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Answer(BaseModel):
    """An answer, or a part of one."""

    model_config = ConfigDict(extra="forbid")


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole)]
"""JSON knows one kind of number: 5.0 is 5."""

TokenId = Annotated[int, Field(ge=0, lt=2**63)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
"""Stops at the first that is none: a long list of something else is refused at once."""


class ErrorDetail(Answer):
    """What went wrong: `message` is for people, `code` for programs; `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Answer):
    """Every answer that is not a success."""

    error: ErrorDetail


class Usage(Answer):
    """Tokens of a request: each prompt once, and all samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class StreamOptions(Body):
    """`include_usage`: a last chunk with the usage and no choices. `continuous_usage_stats`: one in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
