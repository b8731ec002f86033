import asyncio
import json
from typing import Any

import pytest

from support.asgi import call, saying, scope_of
from vattention.errors import InvalidRequest
from vattention.server.admission import Admission, Overloaded, hold
from vattention.server.middleware.admit import Admit


def never() -> bool:
    return False


def test_who_finds_no_room_is_told_when_to_come_back_and_a_place_that_is_given_back_is_free() -> None:
    async def main() -> None:
        go = asyncio.Event()
        admission = Admission(at_once=1, queue=1)
        app = Admit(saying("ok", before=lambda: go.wait()), admission=admission, draining=never)
        inside = [asyncio.create_task(call(app, scope_of())) for _ in range(2)]
        await asyncio.sleep(0)
        refused = await call(app, scope_of())
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert json.loads(refused.body)["error"]["type"] == "rate_limit_error"
        reading = asyncio.create_task(call(app, scope_of("GET", "/health")))
        go.set()
        assert {(await each).status for each in (*inside, reading)} == {200}
        assert admission.inside == 0
        assert (await call(app, scope_of())).status == 200

    asyncio.run(main())


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
def test_a_place_comes_back_however_its_request_ends(error: type[BaseException]) -> None:
    admission = Admission(at_once=1, queue=0)

    async def fail(scope: Any, receive: Any, send: Any) -> None:
        assert admission.inside == 1
        raise error

    with pytest.raises(error):
        asyncio.run(call(Admit(fail, admission=admission, draining=never), scope_of()))
    assert admission.inside == 0


def test_a_request_for_several_answers_takes_as_many_places() -> None:
    admission = Admission(at_once=2, queue=2)

    async def batch(scope: Any, receive: Any, send: Any) -> None:
        hold(3)
        assert admission.inside == 3
        with admission.enter(), pytest.raises(Overloaded):
            hold(4)
        assert admission.inside == 3
        with pytest.raises(InvalidRequest, match="4 at most"):
            hold(5)
        hold(2)
        assert admission.inside == 2

    asyncio.run(call(Admit(batch, admission=admission, draining=never), scope_of()))
    assert admission.inside == 0


def test_while_draining_only_reading_is_let_in() -> None:
    app = Admit(saying("ok"), admission=Admission(at_once=1, queue=0), draining=lambda: True)
    refused = asyncio.run(call(app, scope_of()))
    assert refused.status == 503
    assert "retry-after" in refused.headers
    assert refused.headers["connection"] == "close"
    assert asyncio.run(call(app, scope_of("GET", "/metrics"))).status == 200


def test_when_to_come_back_follows_how_long_requests_take() -> None:
    now = 0.0
    admission = Admission(at_once=2, queue=0, clock=lambda: now)

    def waits(seconds: float, times: int) -> int:
        nonlocal now
        for _ in range(times):
            with admission.enter():
                now += seconds
        with admission.enter(), admission.enter(), pytest.raises(Overloaded) as refused:
            admission.enter()
        return refused.value.retry_after

    assert waits(0.001, 1) == 1
    assert waits(20, 100) == 10
    assert waits(1000, 100) == 60
