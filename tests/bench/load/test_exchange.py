"""HTTP as servers may write it, cut at every place."""

import asyncio

import pytest

from support.stand_in import bytes_server
from vattention.bench.load.exchange import Broken, address_of, exchange
from vattention.errors import ConfigError

EVENTS = b"data: one\n\n: a comment\n\ndata:two\ndata: three\n\nevent: x\ndata: [DONE]\n\n"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\ndata:\r\n6;x=y\r\n one\n\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(EVENTS[11:]), EVENTS[11:])
)
TO_THE_END = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n\r\n" + EVENTS
OF_LENGTH = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n%s" % (
    len(EVENTS),
    EVENTS,
)
WITH_RETURNS = TO_THE_END.replace(b"\n\n", b"\r\n\r\n")
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED


def ask(pieces: list[bytes], pause: float = 0.0) -> tuple[int, bytes, list[bytes], list[float]]:
    events: list[bytes] = []
    times: list[float] = []

    def event(now: float, data: bytes) -> None:
        times.append(now)
        events.append(data)

    with bytes_server(pieces, pause) as url:
        status, body = asyncio.run(exchange(address_of(url), "POST", "/v1/x", {}, b"{}", event))
    return status, body, events, times


@pytest.mark.parametrize("whole", [CHUNKED, TO_THE_END, OF_LENGTH, WITH_RETURNS, CONTINUED])
def test_events_in_every_framing_and_however_they_are_cut(whole: bytes) -> None:
    for size in (1, 7, len(whole)):
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
        status, _, events, _ = ask(pieces)
        assert (status, events) == (200, [b"one", b"two\nthree", b"[DONE]"])


def test_times_are_those_of_the_packets() -> None:
    head, rest = CHUNKED[: CHUNKED.index(b"one\n\n") + 7], CHUNKED[CHUNKED.index(b"one\n\n") + 7 :]
    _, _, events, times = ask([head, rest], pause=0.2)
    assert len(events) == 3
    assert times[1] - times[0] > 0.1
    assert times[2] == times[1]


def test_what_is_no_stream_of_events_is_a_body() -> None:
    answer = b'HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{"error": "x"}'
    status, body, events, _ = ask([answer[:20], answer[20:]])
    assert (status, body, events) == (404, b'{"error": "x"}', [])


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (CHUNKED[:-5], "cut off"),
        (OF_LENGTH[:-3], "cut off"),
        (b"", "cut off"),
        (b"SSH-2.0-x\r\n\r\n", "not HTTP"),
        (CHUNKED.replace(b"5\r\n", b"z\r\n"), "not HTTP"),
    ],
)
def test_what_is_broken(answer: bytes, problem: str) -> None:
    with pytest.raises(Broken, match=problem):
        ask([answer])


def test_addresses() -> None:
    assert address_of("localhost:8000/v1/").url == "http://localhost:8000"
    assert address_of("https://example.org/models/v1").url == "https://example.org:443/models"
    for url in ("ftp://x", "http://", "http://x:99999", "http://x?y=1"):
        with pytest.raises(ConfigError, match="no URL"):
            address_of(url)
