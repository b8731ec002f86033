"""`/v1/responses`, in its basic form: text in, text out, nothing kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vattention.server.protocol.base import Answer, Body, Int
from vattention.server.protocol.chat import ContentPart


class InputItem(Body):
    """A turn of the conversation. Other types of items are read so that they can be refused by name."""

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ContentPart] | None = None


class TextFormat(Body):
    """What form the answer has to have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """About the text of the answer."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(Body):
    """Answer a text or a conversation."""

    model: str | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[Int, Field(ge=1, lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None

    seed: Annotated[Int, Field(ge=-(2**63), lt=2**64)] | None = None
    top_k: Annotated[Int, Field(ge=-1, lt=2**63)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[Int, Field(ge=-(2**63), lt=2**63)] | None = None


class OutputText(Answer):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(Answer):
    """An answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class IncompleteDetails(Answer):
    """Why an answer is not complete."""

    reason: Literal["max_output_tokens"]


class InputDetails(Answer):
    """Of the prompt's tokens."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(Answer):
    """Of the answer's tokens."""

    reasoning_tokens: int = 0


class ResponsesUsage(Answer):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponsesResponse(Answer):
    """An answer, and what was asked for."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str] | None
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: Literal["none"] = "none"
    tools: list[Any]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponsesUsage | None
    user: str | None
