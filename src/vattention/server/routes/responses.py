"""`/v1/responses`, in its basic form: text in, text out, nothing kept."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from itertools import count
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vattention.engine.outputs import CompletionOutput
from vattention.server.errors import ApiError
from vattention.server.generation import answers, deltas
from vattention.server.logprobs import chat_logprobs
from vattention.server.protocol.chat import ChatCompletionRequest, ChatMessage
from vattention.server.protocol.responses import InputItem, ResponsesRequest, ResponsesResponse
from vattention.server.routes.chat import chat_job
from vattention.server.routes.failures import GENERATING
from vattention.server.state import ServerState, state_of
from vattention.server.streaming import EventStream, event, whole
from vattention.server.strict_json import JsonResponse, StrictRoute

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/responses", response_model=ResponsesResponse, responses=GENERATING)
async def responses(request: Request, body: ResponsesRequest) -> Response:
    """Answer a text or a conversation."""
    state = state_of(request)
    model = state.model_name(body.model)
    for name in ("previous_response_id", "background", "tools"):
        if getattr(body, name):
            raise ApiError(400, f"{name} is not supported by this server", param=name, code="not_supported")
    chat = _chat(body)
    head = _head(body, model)
    if body.stream:
        return EventStream(_stream(state, body, chat, head))
    return await whole(request, _answer(state, body, chat, head))


def _chat(body: ResponsesRequest) -> ChatCompletionRequest:
    """The same request to the chat endpoint."""
    turns = [ChatMessage(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        turns.append(ChatMessage(role="user", content=body.input))
    else:
        turns += [_turn(place, item) for place, item in enumerate(body.input)]
    wanted = body.text.format if body.text else None
    return ChatCompletionRequest.model_validate(
        {
            "messages": [turn.model_dump() for turn in turns],
            "max_completion_tokens": body.max_output_tokens,
            "logprobs": _scored(body),
            "top_logprobs": body.top_logprobs,
            "response_format": None if wanted is None else _format(wanted.model_dump(by_alias=True)),
            "stream": body.stream,
            **{name: getattr(body, name) for name in _SAME},
        }
    )


_SAME = ("temperature", "top_p", "seed", "top_k", "min_p", "repetition_penalty", "ignore_eos", "priority")


def _scored(body: ResponsesRequest) -> bool:
    return "message.output_text.logprobs" in (body.include or ()) or bool(body.top_logprobs)


def _format(wanted: dict[str, Any]) -> dict[str, Any]:
    """The form of an answer, as the chat endpoint is told of it: one level deeper."""
    if wanted["type"] != "json_schema":
        return {"type": wanted["type"]}
    if wanted["schema"] is None:
        raise ApiError(400, "text.format: a json_schema needs a schema", param="text")
    return {"type": "json_schema", "json_schema": {name: wanted[name] for name in ("name", "schema", "strict")}}


def _turn(place: int, item: InputItem) -> ChatMessage:
    if item.type not in (None, "message") or item.role is None:
        raise ApiError(
            400,
            f"input {place} is of type {item.type!r}: messages with a role are served here",
            param="input",
            code="not_supported",
        )
    return ChatMessage(role=item.role, content=item.content)


def _head(body: ResponsesRequest, model: str) -> dict[str, Any]:
    """What is known of the answer before it comes."""
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "model": model,
        "output": [],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}} if body.text is None else body.text.model_dump(by_alias=True),
        "tool_choice": "none",
        "tools": [],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _message(name: str, status: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": name, "type": "message", "role": "assistant", "status": status, "content": parts}


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _end(
    head: dict[str, Any], finish_reason: str | None, message: dict[str, Any], prompt: int, answer: int
) -> dict[str, Any]:
    """The complete answer, with tokens of the prompt and of the answer."""
    status = message["status"] = _status(finish_reason)
    return {
        **head,
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "output": [message],
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + answer,
        },
    }


def _status(finish_reason: str | None) -> str:
    return "incomplete" if finish_reason == "length" else "completed"


def _logprobs(state: ServerState, body: ResponsesRequest, completion: CompletionOutput) -> list[dict[str, Any]]:
    if not _scored(body):
        return []
    scored = zip(completion.token_ids, completion.logprobs or (), strict=True)
    told = chat_logprobs(scored, body.top_logprobs or 0, as_ids=False, tokenizer=state.llm.tokenizer)
    content: list[dict[str, Any]] = told["content"]
    return content


async def _answer(
    state: ServerState, body: ResponsesRequest, chat: ChatCompletionRequest, head: dict[str, Any]
) -> Response:
    (output,) = await answers(state, [await chat_job(state, chat, head["id"], "max_output_tokens")])
    (completion,) = output.outputs
    part = _part(completion.text, _logprobs(state, body, completion))
    message = _message(f"msg_{uuid.uuid4().hex}", "completed", [part])
    return JsonResponse(
        _end(head, completion.finish_reason, message, len(output.prompt_token_ids), len(completion.token_ids))
    )


async def _stream(
    state: ServerState, body: ResponsesRequest, chat: ChatCompletionRequest, head: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    """The answer begins, its message, the message's text; deltas; and each of them ends."""
    job = await chat_job(state, chat, head["id"], "max_output_tokens")
    numbers = count()
    name = f"msg_{uuid.uuid4().hex}"
    place = {"item_id": name, "output_index": 0, "content_index": 0}
    texts: list[str] = []
    scores: list[dict[str, Any]] = []
    tokens = 0
    reason = None

    def tell(kind: str, **fields: Any) -> bytes:
        return event({"type": kind, "sequence_number": next(numbers), **fields}, kind)

    async with aclosing(deltas(state, [job])) as news:
        async for _, output in news:
            if not tokens:
                for each in _beginning(tell, head, name, place):
                    yield each
            for completion in output.outputs:
                tokens += len(completion.token_ids)
                reason = completion.finish_reason
                logprobs = _logprobs(state, body, completion)
                texts.append(completion.text)
                scores += logprobs
                if completion.text or logprobs:
                    yield tell("response.output_text.delta", **place, delta=completion.text, logprobs=logprobs)
    text = "".join(texts)
    part = _part(text, scores)
    message = _message(name, _status(reason), [part])
    yield tell("response.output_text.done", **place, text=text, logprobs=scores)
    yield tell("response.content_part.done", **place, part=part)
    yield tell("response.output_item.done", output_index=0, item=message)
    complete = _end(head, reason, message, len(job.token_ids), tokens)
    yield tell(f"response.{complete['status']}", response=complete)


def _beginning(tell: Any, head: dict[str, Any], name: str, place: dict[str, Any]) -> Iterator[bytes]:
    yield tell("response.created", response=head)
    yield tell("response.in_progress", response=head)
    yield tell("response.output_item.added", output_index=0, item=_message(name, "in_progress", []))
    yield tell("response.content_part.added", **place, part=_part("", []))
