"""Bad requests: each is answered with a 4xx in OpenAI's shape, and the next good one works."""

import json
import socket
from typing import Any

import pytest

from support.server_process import PATIENCE, Server, wait

GOOD = {"model": "tiny", "prompt": "Hello", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize", "/v1/embeddings")
DEEP = 100_000


def with_text(name: str, text: str) -> bytes:
    """A good request with a field whose JSON is this."""
    return json.dumps(GOOD).removesuffix("}").encode() + f', "{name}": {text}}}'.encode()


BODIES: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"hello",
    "cut off": b'{"model": "tiny", "prompt": "He',
    "two of them": b"{}{}",
    "a trailing comma": b'{"model": "tiny",}',
    "a list": b"[]",
    "a string": b'"hello"',
    "a number": b"5",
    "null": b"null",
    "only a NUL": b"\x00",
    "a NUL inside": b'{"model": "tiny", \x00"prompt": "Hello"}',
    "a NUL in a string": b'{"model": "tiny", "prompt": "Hel\x00lo"}',
    "invalid UTF-8": b'{"model": "tiny", "prompt": "\xff\xfe"}',
    "half a character": b'{"model": "tiny", "prompt": "\xe4\xb8"}',
    "overlong UTF-8": b'{"model": "tiny", "prompt": "\xc0\xaf"}',
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
    "half a surrogate pair": b'{"model": "tiny", "prompt": "\\ud800"}',
    "deep lists": b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"a": ' * DEEP + b"1" + b"}" * DEEP,
    "deep, and cut off": b"[" * DEEP,
    "10 MB": json.dumps({**GOOD, "prompt": "Hello " * 1_800_000}).encode(),
    "almost all that may be sent": json.dumps({**GOOD, "prompt": "Hello " * 170_000}).encode(),
    "as many token ids": json.dumps({**GOOD, "prompt": [1] * 300_000}).encode(),
    "as many prompts": json.dumps({**GOOD, "prompt": ["a"] * 150_000}).encode(),
    "an unknown model": json.dumps({**GOOD, "model": "gpt-4"}).encode(),
    "a name of 1 MB": json.dumps({**GOOD, "model": "x" * 900_000}).encode(),
    **{f"{name}={text}": with_text(name, text) for name in ("temperature", "max_tokens", "top_p", "seed", "n")
       for text in ("1e400", "-1e400", "NaN", "Infinity", '"1"', "[]", "{}", "true", "9" * 5000)},
    **{f"{name}={text}": with_text(name, text) for name, text in (
        ("max_tokens", "-1"), ("max_tokens", "1e9"), ("temperature", "-1"), ("temperature", "1e300"), ("top_p", "0"),
        ("top_p", "2"), ("top_k", "-5"), ("n", "0"), ("n", "100000"), ("presence_penalty", "99"), ("stop", "5"),
        ("stop", '["' + "x" * 10 + '", 5]'), ("stop", json.dumps(["x"] * 10_000)), ("logit_bias", '{"x": 1}'),
        ("logit_bias", '{"5": 1e400}'), ("logit_bias", '{"-1": 1}'), ("logit_bias", '{"99999999": 1}'),
        ("logit_bias", "[1]"), ("logprobs", "1000000"), ("stream", '"maybe"'), ("stream_options", "5"),
        ("prompt", "{}"), ("prompt", "[]"), ("prompt", "[[]]"), ("prompt", "[1.5]"), ("prompt", '[1, "a"]'),
        ("prompt", "[-1]"), ("prompt", "[99999999]"), ("prompt", "[1e400]"), ("prompt", "null"), ("prompt", '[null]'),
        ("prompt", '""'), ("prompt", "[" + "9" * 4000 + "]"), ("min_tokens", "-1"),
        ("response_format", '{"type": "json_schema"}'), ("response_format", '{"type": "magic"}'),
        ("response_format", '{"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}'),
    )},
}  # fmt: skip


# Those that no endpoint can take.
EVERYWHERE = list(BODIES)[: list(BODIES).index("10 MB") + 1]


@pytest.fixture(autouse=True)
def _the_next_good_request_works(shared_server: Server) -> Any:
    yield
    status, _, body = shared_server.ask("/v1/completions", GOOD)
    assert status == 200, body
    assert json.loads(body)["usage"]["completion_tokens"] == 2
    assert shared_server.process.poll() is None
    assert not shared_server.events("internal error")
    assert "Traceback" not in shared_server.log


def refused(answer: tuple[int, dict[str, str], bytes]) -> None:
    status, headers, body = answer
    assert 400 <= status < 500, (status, body[:300])
    assert headers["content-type"] == "application/json"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(body) < 10_000
    assert b"Traceback" not in body


@pytest.mark.parametrize("name", BODIES)
def test_a_completion_that_cannot_be(name: str, shared_server: Server) -> None:
    refused(shared_server.ask("/v1/completions", BODIES[name]))


@pytest.mark.parametrize("path", PATHS[1:])
def test_the_other_endpoints(path: str, shared_server: Server) -> None:
    for name in EVERYWHERE:
        try:
            refused(shared_server.ask(path, BODIES[name]))
        except AssertionError as error:
            raise AssertionError(f"{path}, {name}: {error}") from error


@pytest.mark.parametrize(
    "messages",
    [
        *(
            "null",
            "[]",
            "{}",
            '"hello"',
            "[null]",
            "[5]",
            "[{}]",
            '[{"role": "user"}]',
            '[{"role": 5, "content": "a"}]',
        ),
        *('[{"role": "user", "content": 5}]', '[{"role": "user", "content": [{"type": "image_url"}]}]'),
        *('[{"role": "user", "content": [5]}]', '[{"role": "user", "content": "\\ud800"}]', "[[[]]]"),
        '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://192.0.2.1/"}}]}]',
    ],
)
def test_a_conversation_that_cannot_be(messages: str, shared_server: Server) -> None:
    refused(shared_server.ask("/v1/chat/completions", f'{{"model": "tiny", "messages": {messages}}}'.encode()))


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "BREW"])
def test_another_method(method: str, shared_server: Server) -> None:
    answer = raw(shared_server, f"{method} /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 405 ")


@pytest.mark.parametrize(
    "request_",
    [
        *(
            b"\x00" * 100,
            b"\xff" * 100 + b"\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
        ),
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-Header: y\r\n" * 20_000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: magic\r\n\r\n",
        b"GET /%00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /%ff%fe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/models/%0d%0aSet-Cookie:x HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_what_is_no_request_at_all(request_: bytes, shared_server: Server) -> None:
    first = raw(shared_server, request_).split(b"\r\n")[0]
    assert first.startswith(b"HTTP/1.1 4"), first


def test_a_body_in_chunks_that_does_not_end_is_refused(shared_server: Server) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    assert raw(shared_server, head + chunk * 17).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_hangs_up_in_the_middle_of_its_request(shared_server: Server) -> None:
    for part in (b"POST", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", shared_server.port), timeout=PATIENCE) as client:
            client.sendall(part)


def test_nothing_of_all_that_is_left(shared_server: Server) -> None:
    wait(lambda: json.loads(shared_server.ask("/health")[2]) == {"status": "ok"})


def raw(server: Server, request: bytes) -> bytes:
    """What the server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as client:
        client.sendall(request)
        return client.recv(65536)
