"""`/v1/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vattention.engine.outputs import CompletionOutput, RequestOutput
from vattention.engine.prompts import TokenizedPrompt
from vattention.engine.sampling_params import SamplingParams
from vattention.server.errors import ApiError
from vattention.server.generation import Job, answers, deltas
from vattention.server.logprobs import Scored, completion_logprobs
from vattention.server.protocol.completions import CompletionRequest, CompletionResponse
from vattention.server.routes.failures import GENERATING
from vattention.server.sampling import answer_limit, check_samples, check_text, sampling_params
from vattention.server.state import ServerState, state_of
from vattention.server.streaming import DONE, EventStream, event, whole
from vattention.server.strict_json import JsonResponse, StrictRoute
from vattention.server.structure import structured
from vattention.server.text import text_of
from vattention.server.usage import UsageCount, usage_at_end, usage_in_chunks

router = APIRouter(route_class=StrictRoute)

_DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions", response_model=CompletionResponse, responses=GENERATING)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue one or several prompts."""
    state = state_of(request)
    model = state.model_name(body.model)
    _check(body)
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
    prompts = _prompts(body.prompt)
    check_samples(state, len(prompts), max(body.n or 1, body.best_of or 1))
    if body.stream:
        return EventStream(_stream(state, body, prompts, head))
    return await whole(request, _answer(state, body, prompts, head))


def _check(body: CompletionRequest) -> None:
    """What the types do not say. Raises ApiError, 400."""
    if body.suffix:
        raise ApiError(400, "suffix is not supported", param="suffix", code="not_supported")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens must be at least 1, or 0 with echo", param="max_tokens")
    if body.best_of is not None:
        if body.best_of < (body.n or 1):
            raise ApiError(400, f"best_of={body.best_of} is less than n={body.n}", param="best_of")
        if body.stream and body.best_of > (body.n or 1):
            raise ApiError(400, "best_of cannot be streamed: the best is known at the end", param="best_of")


def _prompts(given: Any) -> list[dict[str, Any]]:
    """Each prompt as `AsyncLLM` takes it."""
    several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    return [
        {"prompt": each} if isinstance(each, str) else {"prompt_token_ids": each}
        for each in (given if several else [given])
    ]


@dataclass(frozen=True)
class _Work:
    """A prompt on its way: the text to repeat in front of its answers, its job, and the text of a token."""

    echo: str
    job: Job
    text_of: Callable[[int], str]


async def _work(state: ServerState, body: CompletionRequest, prompts: Sequence[Any], name: str) -> list[_Work]:
    check_text(state, [prompt["prompt"] for prompt in prompts if "prompt" in prompt])
    special = body.add_special_tokens is not False
    tokenized = [await state.llm.tokenize(prompt, add_special_tokens=special) for prompt in prompts]
    return [
        _Work(
            _echo(state, body, prompt),
            Job(f"{name}-{place}", prompt.token_ids, params, body.priority or 0),
            lambda token: text_of(state.llm.tokenizer, [token]),
        )
        for place, prompt in enumerate(tokenized)
        for params in [_params(state, body, len(prompt.token_ids))]
    ]


def _params(state: ServerState, body: CompletionRequest, length: int) -> SamplingParams:
    asked = body.max_tokens
    if asked is None:  # the default gives way to a long prompt
        asked = max(1, min(_DEFAULT_MAX_TOKENS, state.llm.max_model_len - length))
    limit = answer_limit(state, length, asked)
    return sampling_params(
        body,
        n=body.best_of or body.n,
        max_tokens=max(1, limit or 1),
        logprobs=body.logprobs if body.best_of is None else body.logprobs or 0,
        prompt_logprobs=body.logprobs if body.echo else None,
        structured=structured(body),
    )


def _echo(state: ServerState, body: CompletionRequest, prompt: TokenizedPrompt) -> str:
    if not body.echo:
        return ""
    if prompt.text is not None:
        return prompt.text
    return text_of(state.llm.tokenizer, prompt.token_ids)


async def _answer(
    state: ServerState, body: CompletionRequest, prompts: Sequence[Any], head: dict[str, Any]
) -> Response:
    work = await _work(state, body, prompts, head["id"])
    outputs = await answers(state, [item.job for item in work])
    usage = UsageCount(sum(len(output.prompt_token_ids) for output in outputs))
    choices: list[dict[str, Any]] = []
    for item, output in zip(work, outputs, strict=True):
        usage.completion_tokens += sum(len(each.token_ids) for each in output.outputs) * (body.max_tokens != 0)
        for each in _best(body, output.outputs):
            choices.append({"index": len(choices), **_piece(body, item, output, each, first=True, offset=0)})
    return JsonResponse({**head, "object": "text_completion", "choices": choices, "usage": usage.body()})


def _best(body: CompletionRequest, outputs: Sequence[CompletionOutput]) -> Sequence[CompletionOutput]:
    """Of `best_of` answers the `n` with the largest log-probability per token."""
    if body.best_of is None:
        return outputs

    def likelihood(output: CompletionOutput) -> float:
        return (output.cumulative_logprob or 0.0) / max(1, len(output.token_ids))

    return sorted(outputs, key=likelihood, reverse=True)[: body.n or 1]


def _piece(
    body: CompletionRequest,
    item: _Work,
    output: RequestOutput,
    completion: CompletionOutput,
    *,
    first: bool,
    offset: int,
) -> dict[str, Any]:
    """What a choice says about some tokens: all of them, or those of a delta.

    Args:
        first: begin with the prompt, where it is to be repeated.
        offset: characters before this piece.
    """
    text, token_ids, scored = completion.text, completion.token_ids, completion.logprobs
    if body.max_tokens == 0:  # the engine makes one at least
        text, token_ids, scored = "", (), () if scored is not None else None
    logprobs = None
    if body.logprobs is not None and scored is not None:
        tokens: list[Scored] = list(zip(token_ids, scored, strict=True))
        if first and body.echo:
            tokens = [*zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True), *tokens]
        logprobs = completion_logprobs(
            tokens, body.logprobs, offset, as_ids=bool(body.return_tokens_as_token_ids), text_of=item.text_of
        )
    piece: dict[str, Any] = {
        "text": item.echo + text if first else text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if body.return_token_ids:
        piece["token_ids"] = list(token_ids)
        piece["prompt_token_ids"] = list(output.prompt_token_ids) if first else None
    return piece


async def _stream(
    state: ServerState, body: CompletionRequest, prompts: Sequence[Any], head: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    work = await _work(state, body, prompts, head["id"])
    head["object"] = "text_completion"
    usage = UsageCount(sum(len(item.job.token_ids) for item in work))
    samples = body.n or 1
    lengths: dict[int, int] = {}
    async with aclosing(deltas(state, [item.job for item in work])) as news:
        async for place, output in news:
            for completion in output.outputs:
                index = place * samples + completion.index
                first = index not in lengths
                offset = lengths.get(index, 0)
                piece = _piece(body, work[place], output, completion, first=first, offset=offset)
                lengths[index] = offset + len(piece["text"])
                usage.completion_tokens += len(completion.token_ids) * (body.max_tokens != 0)
                chunk = {**head, "choices": [{"index": index, **piece}], **usage_in_chunks(body, usage)}
                yield event(chunk)
    last = usage_at_end(body, head, usage)
    if last is not None:
        yield event(last)
    yield DONE
