"""`/tokenize`, `/detokenize`."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vattention.server.conversation import conversation
from vattention.server.errors import ApiError
from vattention.server.protocol.chat import ChatCompletionRequest
from vattention.server.protocol.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from vattention.server.routes.failures import READING
from vattention.server.state import ServerState, state_of
from vattention.server.strict_json import JsonResponse, StrictRoute
from vattention.server.text import text_of

router = APIRouter(route_class=StrictRoute)


@router.post("/tokenize", response_model=TokenizeResponse, responses=READING)
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """The token ids of a text or a conversation, however long."""
    state = state_of(request)
    state.model_name(body.model)
    tokenizer = _tokenizer(state)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give one of prompt and messages", param="prompt")
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        prompt = await state.llm.tokenize(body.prompt, add_special_tokens=special)
    else:
        chat = ChatCompletionRequest.model_construct(
            messages=body.messages,
            add_generation_prompt=body.add_generation_prompt,
            chat_template_kwargs=body.chat_template_kwargs,
            tools=body.tools,
        )
        prompt = await conversation(state, chat)
    ids = list(prompt.token_ids)
    names = await asyncio.to_thread(tokenizer.convert_ids_to_tokens, ids) if body.return_token_strs else None
    return JsonResponse(
        {"count": len(ids), "max_model_len": state.llm.max_model_len, "tokens": ids, "token_strs": names}
    )


@router.post("/detokenize", response_model=DetokenizeResponse, responses=READING)
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """The text of token ids."""
    state = state_of(request)
    state.model_name(body.model)
    tokenizer = _tokenizer(state)
    if body.tokens and max(body.tokens) >= state.llm.vocab_size:
        raise ApiError(
            400, f"the model has {state.llm.vocab_size} tokens, there is no {max(body.tokens)}", param="tokens"
        )
    return JsonResponse({"prompt": await asyncio.to_thread(text_of, tokenizer, body.tokens)})


def _tokenizer(state: ServerState) -> Any:
    if state.llm.tokenizer is None:
        raise ApiError(400, "this model came without a tokenizer", code="not_supported")
    return state.llm.tokenizer
