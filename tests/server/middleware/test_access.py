import asyncio
import json
import logging
from typing import Any

import pytest

from support.asgi import call, saying, scope_of
from vattention.server.middleware.access import Access
from vattention.server.middleware.record import current_record

SECRET = b'{"prompt": "my secret question"}'


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """The fields of every line of the access log, and its level."""
    caplog.set_level(logging.DEBUG, "vattention.server.access")
    return lambda: [(record.levelname, record.fields) for record in caplog.records]  # type: ignore[attr-defined]


def test_a_line_a_request_with_what_the_routes_know(lines: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        record = current_record()
        record.model, record.prompt_tokens, record.completion_tokens, record.finish = "m", 3, 5, ["stop", "length"]
        await saying("ok")(scope, receive, send)

    scope = scope_of(x_request_id="abc-1") | {"query_string": b"api_key=sk-x"}
    answer = asyncio.run(call(Access(app), scope, [SECRET]))
    assert answer.headers["x-request-id"] == "abc-1"
    ((level, fields),) = lines()
    assert level == "INFO"
    assert fields.pop("ms") >= 0
    assert fields == {
        "request_id": "abc-1",
        "client": "192.0.2.1",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "model": "m",
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "finish": "stop,length",
        "complete": True,
    }


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\nb", "a;b", "é", '"'])
def test_a_name_that_could_break_a_log_is_replaced(given: str, lines: Any) -> None:
    answers = [asyncio.run(call(Access(saying("ok")), scope_of(x_request_id=given))) for _ in range(2)]
    names = [answer.headers["x-request-id"] for answer in answers]
    assert len({given, *names}) == 3
    assert [fields["request_id"] for _, fields in lines()] == names


def test_the_application_does_not_name_the_request_twice(lines: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Request-Id", b"other")]})
        await send({"type": "http.response.body", "body": b""})

    answer = asyncio.run(call(Access(app), scope_of(x_request_id="mine")))
    assert answer.messages[0]["headers"] == [(b"x-request-id", b"mine")]


def test_prompts_are_written_only_when_asked_for(lines: Any) -> None:
    asyncio.run(call(Access(saying("ok")), scope_of(), [SECRET]))
    assert "secret" not in str(lines())
    asyncio.run(call(Access(saying("ok"), log_prompts=True), scope_of(), [SECRET[:10], SECRET[10:]]))
    assert lines()[-1][1]["body"] == SECRET.decode()


def test_a_body_in_the_log_has_an_end(lines: Any) -> None:
    asyncio.run(call(Access(saying("ok"), log_prompts=True), scope_of(), [b"x" * (1 << 20)] * 2))
    assert len(lines()[-1][1]["body"]) == 1 << 16


def test_who_watches_is_quiet_while_all_is_well(lines: Any) -> None:
    for path in ("/health", "/metrics"):
        asyncio.run(call(Access(saying("ok")), scope_of("GET", path)))
    asyncio.run(call(Access(saying("no", status=503)), scope_of("GET", "/health")))
    assert [level for level, _ in lines()] == ["DEBUG", "DEBUG", "WARNING"]


def test_a_bug_is_500_with_a_name_and_its_trace_stays_here(lines: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("what went wrong inside")

    answer = asyncio.run(call(Access(app), scope_of(x_request_id="mine")))
    assert answer.status == 500
    assert answer.headers["x-request-id"] == "mine"
    assert json.loads(answer.body)["error"]["type"] == "server_error"
    assert b"inside" not in answer.body
    assert b"Traceback" not in answer.body
    assert "what went wrong inside" in caplog.text
    assert [fields.get("status") for _, fields in lines()] == [None, 500]


def test_a_bug_in_the_middle_of_an_answer_cuts_it_off(lines: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("inside")

    answer = asyncio.run(call(Access(app), scope_of()))
    assert len(answer.messages) == 1
    assert lines()[-1][1]["complete"] is False


def test_a_client_that_left_before_an_answer_is_499(lines: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        return

    asyncio.run(call(Access(app), scope_of()))
    assert lines()[-1][1]["status"] == 499
