"""Structured answers and tool calls over HTTP, read by OpenAI's client."""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import httpx
import openai
import pytest

from support.models import demo_model, loaded, tiny_model
from support.tools import TEMPLATES, TIME, TOOLS, is_call, tool
from vattention import AsyncLLM
from vattention.server.app import create_app
from vattention.server.settings import ServerSettings

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "country": {"enum": ["France", "Italy"]},
        "people": {"type": "integer", "minimum": 0, "maximum": 99_000_000},
    },
    "required": ["city", "country", "people"],
    "additionalProperties": False,
}
CITY_FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}}


@pytest.fixture(scope="module")
def tiny() -> Iterator[AsyncLLM]:
    """Random weights behind the demo model's tokenizer."""
    demo = demo_model()
    small = tiny_model(vocab_size=demo.geometry.vocab_size, hidden_size=24, max_position_embeddings=1024)
    llm = AsyncLLM(loaded(small, demo.tokenizer), max_num_seqs=8, kv_cache_memory="32MiB", compile=False)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def demo() -> Iterator[AsyncLLM]:
    llm = AsyncLLM(demo_model(), max_model_len=512, max_num_seqs=4, kv_cache_memory="128MiB", compile=False)
    yield llm
    llm.close()


Work = Callable[[Callable[..., Coroutine[Any, Any, Any]]], Coroutine[Any, Any, Any]]


def talk(llm: AsyncLLM, template: str | None, work: Work) -> Any:
    """Run `work` with a function that asks for a chat completion; streams come back put together."""

    async def main() -> Any:
        app = create_app(llm, ServerSettings(served_model_names=("m",), chat_template=template))
        transport = httpx.AsyncClient(transport=httpx.ASGITransport(app))
        async with openai.AsyncOpenAI(base_url="http://s/v1", api_key="x", http_client=transport) as client:

            async def ask(text: str = "Weather and time?", **fields: Any) -> Any:
                message = {"role": "user", "content": text}
                answer: Any = await client.chat.completions.create(model="m", messages=[message], **fields)  # type: ignore[arg-type]
                return await told(answer) if fields.get("stream") else choices_of(answer)

            return await work(ask)

    return asyncio.run(main())


def choices_of(answer: Any) -> list[Any]:
    """Of each choice: content, calls, finish_reason."""
    told = []
    for choice in answer.choices:
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        told.append((choice.message.content or "", calls, choice.finish_reason))
    return told


async def told(stream: Any) -> list[Any]:
    """The same from a stream."""
    content: dict[int, str] = {}
    calls: dict[int, list[list[str]]] = {}
    reasons: dict[int, str] = {}
    async for chunk in stream:
        for choice in chunk.choices:
            assert choice.index not in reasons, "nothing comes after the end"
            content[choice.index] = content.get(choice.index, "") + (choice.delta.content or "")
            for piece in choice.delta.tool_calls or []:
                mine = calls.setdefault(choice.index, [])
                if piece.id is not None:
                    assert (piece.index, piece.type) == (len(mine), "function")
                    mine.append([piece.function.name, ""])
                mine[piece.index][1] += piece.function.arguments
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    return [(content[i], [(name, text) for name, text in calls.get(i, [])], reasons[i]) for i in sorted(content)]


@pytest.mark.parametrize("style", ["hermes", "smollm", "mistral", "phi", "llama"])
def test_calls_that_have_to_be_made(tiny: AsyncLLM, style: str) -> None:
    """Every answer is calls that the tools take, whatever a model of random weights would like to say."""

    async def work(ask: Any) -> Any:
        fields = {"tools": TOOLS, "temperature": 1.5, "seed": 7, "n": 3, "max_tokens": 120}
        named = {"type": "function", "function": {"name": "get_time"}}
        required, streamed, one, time = await asyncio.gather(
            ask(tool_choice="required", **fields),
            ask(tool_choice="required", stream=True, **fields),
            ask(tool_choice="required", parallel_tool_calls=False, **fields),
            ask(tool_choice=named, **fields),
        )
        assert streamed == required
        for choices in (required, one, time):
            for content, calls, reason in choices:
                assert content == ""
                whole = calls if reason == "tool_calls" else calls[:-1]
                assert all(is_call(name, json.loads(arguments)) for name, arguments in whole), calls
        assert [(len(calls), reason) for _, calls, reason in one] == [(1, "tool_calls")] * 3
        assert [[name for name, _ in calls] for _, calls, _ in time] == [["get_time"]] * 3

    talk(tiny, TEMPLATES[style], work)


def test_calls_or_an_answer_of_a_form(tiny: AsyncLLM) -> None:
    async def work(ask: Any) -> Any:
        fields = {"tools": TOOLS, "temperature": 1.5, "max_tokens": 200, "response_format": CITY_FORMAT, "n": 4}
        answers = [each for seed in range(6) for each in await ask(seed=seed, parallel_tool_calls=False, **fields)]
        called = [calls for _, calls, reason in answers if reason == "tool_calls"]
        said = [content for content, _, reason in answers if reason == "stop"]
        assert called
        assert said
        assert all(is_call(name, json.loads(arguments)) for ((name, arguments),) in called)
        assert all(set(json.loads(content)) == set(CITY["properties"]) for content in said)  # type: ignore[call-overload]

    talk(tiny, TEMPLATES["hermes"], work)


def test_calls_that_may_be_made(tiny: AsyncLLM) -> None:
    """Text that happens to be a call, and text that does not: a form stands in for a model that knows tools."""
    call = '{"name": "get_time", "arguments": {}}'
    assert tiny.tokenizer is not None
    # Beside tools a form leaves room for a call at once: the first letter decides.
    liked = {str(tiny.tokenizer.encode("L", add_special_tokens=False)[0]): 100.0}

    async def work(ask: Any) -> Any:
        for text, content, calls in (
            (f"Let me see.\n<tool_call>\n{call}\n</tool_call>", "Let me see.", [("get_time", "{}")]),
            ("Look: <tool_call> is a tag", "Look: <tool_call> is a tag", []),
        ):
            form = {"structured_outputs": {"regex": re.escape(text).replace("\\\n", "\n")}}
            fields = {"extra_body": form, "tools": [TIME], "temperature": 0, "max_tokens": 100, "logit_bias": liked}
            whole, streamed = await ask(**fields), await ask(stream=True, **fields)
            assert whole == streamed == [(content, calls, "tool_calls" if calls else "stop")]

    talk(tiny, TEMPLATES["hermes"], work)


def test_refusals(tiny: AsyncLLM) -> None:
    async def work(ask: Any) -> Any:
        unknown = {"name": "x", "schema": {"type": "x"}}
        for fields, param, says in (
            ({"tools": TOOLS}, "tools", "does not know tools"),
            ({"response_format": {"type": "json_schema", "json_schema": unknown}}, None, "type: x"),
            ({"extra_body": {"structured_outputs": {"regex": "(a"}}}, None, "unclosed"),
            ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ):  # fmt: skip
            for stream in (False, True):
                with pytest.raises(openai.BadRequestError, match=says) as refused:
                    await ask(stream=stream, **fields)
                assert refused.value.param == param
        (_, calls, reason) = (await ask(tools=TOOLS, tool_choice="none", max_tokens=5))[0]
        assert (calls, reason) == ([], "length")

    talk(tiny, TEMPLATES["none"], work)


def test_parameters_that_cannot_be_kept_to(tiny: AsyncLLM) -> None:
    odd = tool(
        "odd",
        {
            "properties": {"x": {"type": "string", "format": "nonesuch", "maxLength": 3}},
            "required": ["x"],
            "additionalProperties": False,
        },
    )
    strict = {**odd, "function": {**odd["function"], "strict": True}}

    async def work(ask: Any) -> Any:
        ((_, ((name, arguments),), _),) = await ask(
            tools=[odd], tool_choice="required", parallel_tool_calls=False, seed=1
        )
        assert (name, set(json.loads(arguments))) == ("odd", {"x"})
        with pytest.raises(openai.BadRequestError, match="nonesuch"):
            await ask(tools=[strict], tool_choice="required")

    talk(tiny, TEMPLATES["hermes"], work)


def test_the_demo_model(demo: AsyncLLM) -> None:
    async def work(ask: Any) -> Any:
        asked, fields = "Tell me about Paris in JSON.", {"temperature": 0, "max_tokens": 40}
        city, streamed, called = await asyncio.gather(
            ask(asked, response_format=CITY_FORMAT, **fields),
            ask(asked, response_format=CITY_FORMAT, stream=True, **fields),
            ask("What time is it?", tools=[TIME], tool_choice="required", stream=True, **fields),
        )
        assert city == streamed
        ((content, _, reason),) = city
        assert (json.loads(content)["city"], json.loads(content)["country"], reason) == ("Paris", "France", "stop")
        ((content, calls, reason),) = called
        assert (content, reason) == ("", "tool_calls") or reason == "length"
        assert is_call(calls[0][0], json.loads(calls[0][1]))

    talk(demo, TEMPLATES["hermes"], work)


def test_any_object(tiny: AsyncLLM) -> None:
    async def work(ask: Any) -> Any:
        fields = {"response_format": {"type": "json_object"}, "temperature": 1.5, "n": 8, "seed": 1, "max_tokens": 60}
        for content, _, reason in await ask(**fields):
            assert content.startswith("{")
            assert reason == "length" or isinstance(json.loads(content), dict)

    talk(tiny, TEMPLATES["none"], work)
