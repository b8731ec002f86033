"""ASGI applications called without a network."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What an application has sent."""

    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])

    @property
    def complete(self) -> bool:
        return len(self.messages) > 1 and not self.messages[-1].get("more_body", False)


def scope_of(method: str = "POST", path: str = "/v1/completions", **headers: str) -> dict[str, Any]:
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": raw,
        "client": ("192.0.2.1", 4711),
    }


async def call(app: Any, scope: Mapping[str, Any], parts: Iterable[bytes] = (b"",), *, leave: bool = False) -> Answer:
    """Send a request in `parts`; after the last one the client stays, or, with `leave`, goes away."""
    answer = Answer()
    waiting = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if waiting:
        waiting[-1]["more_body"] = False

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop(0)
        if leave:
            return {"type": "http.disconnect"}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        answer.messages.append(message)

    await app(dict(scope), receive, send)
    return answer


def saying(text: str, *, status: int = 200, before: Callable[[], Awaitable[None]] | None = None) -> Any:
    """An application that answers every request with `text`, after reading its body and waiting for `before`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        if before is not None:
            await before()
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": text.encode()})

    return app
