"""The official client and plain HTTP, against a server at an address."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import openai


@dataclass(frozen=True)
class Endpoint:
    """A server: its address, and the name of its model."""

    url: str
    model: str

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """A request past the client, for what the client would not send."""
        content = {} if body is None else {"json": body}
        return httpx.post(self.url + path, timeout=60, **content, **options)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)


class Client:
    """The official client, sync and async at the same time: every call is made by both, and must come to the same.

    Answers are whole, or lists of chunks. So requests have to be such that they have one answer.
    """

    def __init__(self, endpoint: Endpoint, *, base: str = "/v1") -> None:
        self.model = endpoint.model
        self._options: dict[str, Any] = {"base_url": endpoint.url + base, "api_key": "any", "max_retries": 0}

    def completion(self, prompt: Any, **fields: Any) -> Any:
        return self.call(lambda c: c.completions.create(model=self.model, prompt=prompt, **fields))

    def chat(self, messages: Any, **fields: Any) -> Any:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.call(lambda c: c.chat.completions.create(model=self.model, messages=messages, **fields))

    def response(self, given: Any, **fields: Any) -> Any:
        return self.call(lambda c: c.responses.create(model=self.model, input=given, **fields))

    def call(self, make: Callable[[Any], Any]) -> Any:
        """What `make` gets of either client; the error of both, where it is one."""
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(_outcome, lambda: self._sync(make))
            mine = _outcome(lambda: asyncio.run(self._async(make)))
            assert _essence(other.result()) == _essence(mine)
        if isinstance(mine, Exception):
            raise mine
        return mine

    def _sync(self, make: Callable[[Any], Any]) -> Any:
        with openai.OpenAI(**self._options) as client:
            answer = make(client)
            return list(answer) if isinstance(answer, openai.Stream) else answer

    async def _async(self, make: Callable[[Any], Any]) -> Any:
        async with openai.AsyncOpenAI(**self._options) as client:
            answer = await make(client)
            return [each async for each in answer] if isinstance(answer, openai.AsyncStream) else answer


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except openai.OpenAIError as error:
        return error


def _essence(answer: Any) -> Any:
    """What does not depend on names, times, and how a stream was cut into chunks."""
    if isinstance(answer, Exception):
        return type(answer), getattr(answer, "status_code", None)
    if isinstance(answer, list):
        texts: dict[int, list[Any]] = {}
        for chunk in answer:
            for choice in getattr(chunk, "choices", ()):
                delta = getattr(choice, "delta", None)
                piece = choice.text if delta is None else delta.content
                so_far = texts.setdefault(choice.index, ["", None])
                so_far[0] += piece or ""
                so_far[1] = choice.finish_reason
            if getattr(chunk, "type", None) == "response.output_text.delta":
                texts.setdefault(0, [""])[0] += chunk.delta
        return texts
    choices = [
        (choice.index, choice.finish_reason, choice.message.content if hasattr(choice, "message") else choice.text)
        for choice in getattr(answer, "choices", ())
    ]
    return choices, getattr(answer, "output_text", None), getattr(answer, "object", None)
