import asyncio
import json
from typing import Any

from support.asgi import call, saying, scope_of
from vattention.server.middleware.deadline import Deadline

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


async def for_ever() -> None:
    await asyncio.Event().wait()


def test_who_is_in_time_notices_nothing() -> None:
    assert asyncio.run(call(Deadline(saying("ok"), timeout=60), scope_of())).body == b"ok"


def test_before_an_answer_it_is_504_and_the_request_is_cancelled() -> None:
    ended = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await for_ever()
        finally:
            ended.append(True)

    answer = asyncio.run(call(Deadline(app, timeout=0.01), scope_of()))
    assert ended
    assert answer.status == 504
    assert answer.headers["x-should-retry"] == "false"
    assert json.loads(answer.body)["error"]["code"] == "request_timeout"


def streamed(path: str, headers: Any = EVENTS) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await for_ever()

    return asyncio.run(call(Deadline(app, timeout=0.01), scope_of(path=path)))


def test_in_a_stream_it_is_an_event_and_the_end() -> None:
    answer = streamed("/v1/chat/completions")
    assert answer.complete
    first, second, rest = answer.body.split(b"\n\n")
    assert (first, rest) == (b"data: 1", b"")
    assert json.loads(second.removeprefix(b"data: "))["error"]["code"] == "request_timeout"


def test_another_answer_is_cut_off() -> None:
    assert not streamed("/v1/completions", [(b"content-type", b"application/json")]).complete


def test_reading_has_no_deadline() -> None:
    async def later() -> None:
        await asyncio.sleep(0.05)

    app = Deadline(saying("ok", before=later), timeout=0.01)
    assert asyncio.run(call(app, scope_of("GET", "/dashboard"))).body == b"ok"


def test_a_reader_that_takes_nothing_does_not_hold_it_up() -> None:
    async def main() -> None:
        async def send(message: Any) -> None:
            if message["type"] != "http.response.start":
                await for_ever()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})

        await asyncio.wait_for(Deadline(app, timeout=0.01)(scope_of(), for_ever, send), 30)

    asyncio.run(main())
