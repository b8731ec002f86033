"""`/v1/completions`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vattention.server.protocol.base import Answer, Int, TokenIds, Usage
from vattention.server.protocol.chat import ResponseFormat, StructuredOutputs
from vattention.server.protocol.sampling import SamplingFields

CompletionPrompt = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
)
"""Text, token ids, or a batch of either."""


class CompletionRequest(SamplingFields):
    """Continue one or several prompts."""

    prompt: CompletionPrompt
    best_of: Annotated[Int, Field(ge=1, le=128)] | None = None
    echo: bool | None = None
    logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


class CompletionLogprobs(Answer):
    """Of each token. The first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(Answer):
    """All continuations: those of the first prompt first."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
