import asyncio
import json
from typing import Any

import pytest

from support.asgi import call, scope_of
from vattention.server.middleware.body import BodyLimit


async def echo(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    assert not message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


LIMITED = BodyLimit(echo, max_bytes=10, timeout=60)


@pytest.mark.parametrize("parts", [[b"0123456789"], [b"01234", b"", b"56789"], [b""]])
@pytest.mark.parametrize("announced", [True, False])
def test_a_body_up_to_the_limit_arrives_whole(parts: list[bytes], announced: bool) -> None:
    headers = {"content_length": str(sum(map(len, parts)))} if announced else {"transfer_encoding": "chunked"}
    assert asyncio.run(call(LIMITED, scope_of(**headers), parts)).body == b"".join(parts)


@pytest.mark.parametrize(
    ("headers", "parts"),
    [
        ({"content_length": "11"}, [b"0" * 11]),
        ({"content_length": "9" * 40}, []),
        ({"transfer_encoding": "chunked"}, [b"0" * 5] * 3),
        ({}, [b"0" * 11]),
        ({"content_length": "3"}, [b"0" * 5] * 3),  # a server in front may not have checked
    ],
)
def test_a_longer_one_is_413(headers: dict[str, str], parts: list[bytes]) -> None:
    answer = asyncio.run(call(LIMITED, scope_of(**headers), parts))
    assert answer.status == 413
    assert "10 bytes" in json.loads(answer.body)["error"]["message"]


def test_an_endless_body_is_not_read_to_its_end() -> None:
    read = 0

    async def main() -> int:
        nonlocal read
        answer: list[Any] = []

        async def receive() -> dict[str, Any]:
            nonlocal read
            read += 1
            return {"type": "http.request", "body": b"0" * 4, "more_body": True}

        async def send(message: Any) -> None:
            answer.append(message)

        await LIMITED(scope_of(), receive, send)
        return answer[0]["status"]

    assert asyncio.run(main()) == 413
    assert read == 3


def test_one_that_never_arrives_is_408() -> None:
    slow = BodyLimit(echo, max_bytes=10, timeout=0.01)
    answer = asyncio.run(call(slow, scope_of(content_length="10"), []))
    assert answer.status == 408
    assert answer.headers["connection"] == "close"


def test_a_client_that_leaves_meanwhile_gets_nothing() -> None:
    assert not asyncio.run(call(LIMITED, scope_of(), [], leave=True)).messages


def test_what_comes_after_the_body_is_passed_on() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive()])

    asyncio.run(call(BodyLimit(app, max_bytes=10, timeout=60), scope_of(), [b"0"], leave=True))
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]
