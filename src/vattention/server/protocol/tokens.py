"""`/tokenize`, `/detokenize`: shapes are vLLM's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from vattention.server.protocol.base import Answer, Body, TokenIds
from vattention.server.protocol.chat import ChatMessage, Tool


class TokenizeRequest(Body):
    """A text (`prompt`), or a conversation (`messages`) in the model's chat template. One of them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class TokenizeResponse(Answer):
    """`token_strs` where they were asked for: as the vocabulary spells them."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Token ids."""

    model: str | None = None
    tokens: TokenIds


class DetokenizeResponse(Answer):
    """Their text, special tokens included."""

    prompt: str
