"""How to sample, as the completions and the chat endpoint have it. Extensions of OpenAI's are named as in vLLM."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vattention.server.protocol.base import Body, Int, StreamOptions, TokenId

_MOST_STOPS = 64

BiasKey = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopString = Annotated[str, Field(min_length=1)]


class SamplingFields(Body):
    """Null stands for the default everywhere."""

    model: str | None = None
    n: Annotated[Int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=1024)] | None = None
    seed: Annotated[Int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=_MOST_STOPS, fail_fast=True)] | None = None
    max_tokens: Annotated[Int, Field(ge=0, lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    top_k: Annotated[Int, Field(ge=-1, lt=2**63)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    min_tokens: Annotated[Int, Field(ge=0, lt=2**63)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    priority: Annotated[Int, Field(ge=-(2**63), lt=2**63)] | None = None
