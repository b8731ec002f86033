"""`/v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vattention.engine.outputs import CompletionOutput
from vattention.server.conversation import conversation, texts_of
from vattention.server.errors import ApiError
from vattention.server.generation import Job, answers, deltas
from vattention.server.logprobs import chat_logprobs
from vattention.server.protocol.chat import ChatCompletionRequest, ChatCompletionResponse
from vattention.server.routes.failures import GENERATING
from vattention.server.sampling import answer_limit, check_samples, check_text, sampling_params
from vattention.server.state import ServerState, state_of
from vattention.server.streaming import DONE, EventStream, event, whole
from vattention.server.strict_json import JsonResponse, StrictRoute
from vattention.server.structure import structured
from vattention.server.tools.reader import AnswerReader, MessageDelta
from vattention.server.tools.request import answer_reader, tool_use
from vattention.server.usage import UsageCount, usage_at_end, usage_in_chunks

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletionResponse, responses=GENERATING)
async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    model = state.model_name(body.model)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.max_tokens == 0:
        raise ApiError(400, "max_tokens must be at least 1", param="max_tokens")
    check_samples(state, 1, body.n or 1)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
    if body.stream:
        return EventStream(_stream(state, body, head))
    return await whole(request, _answer(state, body, head))


async def chat_job(state: ServerState, body: ChatCompletionRequest, name: str, param: str | None = None) -> Job:
    """What the engine is asked to do. `param`: what the client calls the limit. Raises ApiError, InvalidRequest."""
    use = tool_use(state, body)
    check_text(state, (text for message in body.messages for text in texts_of(message)))
    prompt = await conversation(state, body)
    if param is None:
        param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = sampling_params(
        body,
        n=body.n,
        max_tokens=answer_limit(state, len(prompt.token_ids), asked, param),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        structured=structured(body, use, state.llm.tokenizer),
        **({"skip_special_tokens": False} if use is not None and use.hides_calls(state.llm.tokenizer) else {}),
    )
    return Job(name, prompt.token_ids, params, body.priority or 0)


async def _answer(state: ServerState, body: ChatCompletionRequest, head: dict[str, Any]) -> Response:
    (output,) = await answers(state, [await chat_job(state, body, head["id"])])
    usage = UsageCount(len(output.prompt_token_ids), sum(len(each.token_ids) for each in output.outputs))
    answer = {
        **head,
        "object": "chat.completion",
        "choices": [_choice(state, body, each) for each in output.outputs],
        "usage": usage.body(),
    }
    if body.return_token_ids:
        answer["prompt_token_ids"] = list(output.prompt_token_ids)
    return JsonResponse(answer)


def _choice(state: ServerState, body: ChatCompletionRequest, completion: CompletionOutput) -> dict[str, Any]:
    told = answer_reader(tool_use(state, body)).feed(completion.text, last=True)
    message: dict[str, Any] = {"role": "assistant", "content": told.content, "refusal": None}
    if told.tool_calls:
        message["content"] = told.content or None
        message["tool_calls"] = [
            {name: value for name, value in call.items() if name != "index"} for call in told.tool_calls
        ]
    return {
        "index": completion.index,
        "message": message,
        **_rest(state, body, completion, called=bool(told.tool_calls)),
    }


def _rest(
    state: ServerState, body: ChatCompletionRequest, completion: CompletionOutput, *, called: bool
) -> dict[str, Any]:
    """What whole answers and chunks have in common. `called`: a tool has been called."""
    logprobs = None
    if body.logprobs:
        scored = zip(completion.token_ids, completion.logprobs or (), strict=True)
        as_ids = bool(body.return_tokens_as_token_ids)
        logprobs = chat_logprobs(scored, body.top_logprobs or 0, as_ids=as_ids, tokenizer=state.llm.tokenizer)
    reason = completion.finish_reason
    rest: dict[str, Any] = {
        "logprobs": logprobs,
        "finish_reason": "tool_calls" if called and reason == "stop" else reason,
        "stop_reason": completion.stop_reason,
    }
    if body.return_token_ids:
        rest["token_ids"] = list(completion.token_ids)
    return rest


async def _stream(state: ServerState, body: ChatCompletionRequest, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    """A chunk with the role for each sample, its deltas, the last with its finish_reason; the usage; the end."""
    job = await chat_job(state, body, head["id"])
    head["object"] = "chat.completion.chunk"
    usage = UsageCount(len(job.token_ids))
    readers: dict[int, AnswerReader] = {}
    called: set[int] = set()

    def chunk(index: int, delta: dict[str, Any], rest: dict[str, Any]) -> bytes:
        choice = {"index": index, "delta": delta, **rest}
        return event({**head, "choices": [choice], **usage_in_chunks(body, usage)})

    async with aclosing(deltas(state, [job])) as news:
        async for _, output in news:
            for completion in output.outputs:
                index = completion.index
                if index not in readers:
                    readers[index] = answer_reader(tool_use(state, body))
                    yield chunk(index, {"role": "assistant", "content": ""}, {"logprobs": None, "finish_reason": None})
                usage.completion_tokens += len(completion.token_ids)
                finished = completion.finish_reason is not None
                told = readers[index].feed(completion.text, last=finished)
                if told.tool_calls:
                    called.add(index)
                delta = _delta(told)
                if delta or finished or body.logprobs or body.return_token_ids:
                    yield chunk(index, delta, _rest(state, body, completion, called=index in called))
    last = usage_at_end(body, head, usage)
    if last is not None:
        yield event(last)
    yield DONE


def _delta(told: MessageDelta) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if told.content:
        delta["content"] = told.content
    if told.tool_calls:
        delta["tool_calls"] = list(told.tool_calls)
    return delta
