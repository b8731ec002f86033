"""Clients that go away, that read slowly, and answers that fail half way: over real sockets."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from support.servers import serving
from vattention import AsyncLLM
from vattention.server.app import create_app
from vattention.server.settings import ServerSettings

LONG = 30.0

ENDLESS: dict[str, Any] = {"prompt": [1, 2, 3], "max_tokens": 250, "ignore_eos": True, "seed": 1}


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not done():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def unfinished(llm: AsyncLLM) -> int:
    return llm._loop.call(lambda: llm._engine.unfinished).result(LONG)


class Gate:
    """Stands before the model: passes wait to be let through, and are counted."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._runner = llm._engine._runner
        self._forward = self._runner.forward
        self._runner.forward = self._gated  # type: ignore[method-assign]
        self._let = threading.Semaphore(0)
        self._open = False
        self.passes = 0

    def _gated(self, chunks: Any) -> Any:
        if not self._open:
            assert self._let.acquire(timeout=LONG)
        self.passes += 1
        return self._forward(chunks)

    def let(self, passes: int) -> None:
        self._let.release(passes)

    def remove(self) -> None:
        self._open = True
        self._let.release(1)
        self._runner.forward = self._forward  # type: ignore[method-assign]


@pytest.fixture
def gate(tiny_llm: AsyncLLM) -> Iterator[Gate]:
    gate = Gate(tiny_llm)
    yield gate
    gate.remove()


def sent(url: str, path: str, body: dict[str, Any], **options: Any) -> socket.socket:
    """A socket on which a request has been sent."""
    where = urlsplit(url)
    content = json.dumps(body).encode()
    connection = socket.socket()
    for name, value in options.items():
        connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    connection.settimeout(LONG)
    connection.connect((where.hostname, where.port))
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_client_that_goes_away_ends_its_request_within_one_step(
    tiny_server: str, tiny_llm: AsyncLLM, gate: Gate, monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    given: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200}
    if path == "/v1/completions":
        given = dict(ENDLESS)
    elif path == "/v1/responses":
        given = {"input": "Hi", "max_output_tokens": 200}
    connection = sent(tiny_server, path, {**given, "ignore_eos": True, "stream": stream})
    gate.let(2)
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    wait_until(lambda: gate.passes == 2)
    aborted = threading.Event()
    abort = tiny_llm._loop.abort
    monkeypatch.setattr(tiny_llm._loop, "abort", lambda ticket: (abort(ticket), aborted.set())[0])
    connection.close()
    assert aborted.wait(LONG), "the server notices while the model computes"
    gate.let(1)
    assert unfinished(tiny_llm) == 0
    assert gate.passes <= 3, "the pass under way is the last"
    assert tiny_llm.stats().live_slots == 0


def test_a_client_that_goes_away_while_it_waits_for_its_turn(
    tiny_server: str, tiny_llm: AsyncLLM, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, submit, abort = tiny_llm._loop, tiny_llm._loop.submit, tiny_llm._loop.abort
    calls: list[str] = []
    monkeypatch.setattr(loop, "submit", lambda *a, **k: (submit(*a, **k), calls.append("submit"))[0])
    monkeypatch.setattr(loop, "abort", lambda ticket: (abort(ticket), calls.append("abort"))[0])
    connections = [sent(tiny_server, "/v1/completions", {**ENDLESS, "stream": True}) for _ in range(10)]
    wait_until(lambda: calls.count("submit") == 10)  # 8 run at once
    for connection in connections:
        connection.close()
    wait_until(lambda: calls.count("abort") == 10)
    gate.let(5)
    assert unfinished(tiny_llm) == 0


def test_a_slow_reader_holds_nobody_up_and_misses_nothing(tiny_server: str, tiny_llm: AsyncLLM) -> None:
    asked = {**ENDLESS, "logprobs": 20, "stream": True}
    whole = httpx.post(f"{tiny_server}/v1/completions", json=ENDLESS, timeout=LONG).json()["choices"][0]["text"]
    connection = sent(tiny_server, "/v1/completions", asked, SO_RCVBUF=2048)
    wait_until(lambda: unfinished(tiny_llm) == 1)
    wait_until(lambda: unfinished(tiny_llm) == 0)  # nobody has read a byte
    received = b""
    while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        received += connection.recv(65536)
    connection.close()
    chunks = [json.loads(line[6:]) for line in received.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    counts = [len(chunk["choices"][0]["logprobs"]["tokens"]) for chunk in chunks]
    assert sum(counts) == 250
    assert max(counts) > 1, "what it has missed comes together"


@pytest.fixture
def failing(tiny_llm: AsyncLLM) -> Iterator[None]:
    """Requests with the prompt [13] fail at their fifth token."""
    engine, output = tiny_llm._engine, tiny_llm._engine.output

    def breaks(request: Any, prompt: Any = None, seen: Any = None) -> Any:
        if request.prompt_token_ids == (13,) and len(request.output_token_ids) >= 5:
            raise ValueError("a secret of the server")
        return output(request, prompt, seen)

    engine.output = breaks  # type: ignore[method-assign]
    yield
    engine.output = output  # type: ignore[method-assign]


def test_an_answer_that_fails_half_way_says_so(tiny_server: str, failing: None) -> None:
    with openai.OpenAI(base_url=f"{tiny_server}/v1", api_key="any", max_retries=0) as client:
        stream = client.completions.create(
            model="tiny", prompt=[13], max_tokens=9, stream=True, extra_body={"ignore_eos": True}
        )
        seen = []
        with pytest.raises(openai.APIError, match="internal error") as caught:
            seen.extend(stream)
        assert "secret" not in str(caught.value.body)
    raw = httpx.post(f"{tiny_server}/v1/completions", json={"prompt": [13], "stream": True, "ignore_eos": True})
    assert raw.status_code == 200
    *chunks, last = [line for line in raw.text.split("\n") if line]
    assert chunks
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


def test_it_fails_alone(tiny_server: str, failing: None) -> None:
    with openai.OpenAI(base_url=f"{tiny_server}/v1", api_key="any", max_retries=0) as client:
        good = client.completions.create(model="tiny", prompt=[14], max_tokens=30, stream=True, temperature=0)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="tiny", prompt=[13], max_tokens=9, extra_body={"ignore_eos": True})
        text = "".join(chunk.choices[0].text for chunk in good)
        whole = client.completions.create(model="tiny", prompt=[14], max_tokens=30, temperature=0)
    assert text == whole.choices[0].text


def test_one_of_a_batch_that_fails_ends_all_of_it(tiny_server: str, tiny_llm: AsyncLLM, failing: None) -> None:
    body = {"prompt": [[14], [13], [15]], "max_tokens": 200, "ignore_eos": True}
    assert httpx.post(f"{tiny_server}/v1/completions", json=body, timeout=LONG).status_code == 500
    streamed = httpx.post(f"{tiny_server}/v1/completions", json={**body, "stream": True}, timeout=LONG)
    assert '"error"' in streamed.text
    wait_until(lambda: unfinished(tiny_llm) == 0)


def test_many_streams_at_once_are_what_each_is_alone(tiny_server: str) -> None:
    """Random text of every kind: half characters, special tokens, several prompts and samples."""

    def ask(stream: bool, seed: int) -> dict[int, str]:
        body: dict[str, Any] = {"prompt": ["Hello", "é"] if seed % 2 else [[5, 6], [7]], "n": 2, "seed": seed}
        with openai.OpenAI(base_url=f"{tiny_server}/v1", api_key="any", max_retries=0) as client:
            answer = client.completions.create(model="tiny", max_tokens=40, stream=stream, **body)
            texts: dict[int, str] = {}
            for chunk in answer if stream else [answer]:
                for choice in chunk.choices:
                    texts[choice.index] = texts.get(choice.index, "") + choice.text
            return texts

    whole = [ask(False, seed) for seed in range(6)]
    got: dict[int, dict[int, str]] = {}
    threads = [threading.Thread(target=lambda seed=seed: got.__setitem__(seed, ask(True, seed))) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert [got[seed] for seed in range(6)] == whole
    assert all(len(texts) == 4 for texts in whole)


def test_health_until_warm_and_after_the_end(tiny_llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    let = threading.Event()
    warmup = tiny_llm._engine.warmup
    monkeypatch.setattr(tiny_llm._engine, "warmup", lambda **_: (let.wait(LONG), warmup())[1])
    app = create_app(tiny_llm, ServerSettings(served_model_names=("tiny",)))
    with serving(app) as url:
        assert httpx.get(f"{url}/health").status_code == 503
        assert httpx.get(f"{url}/health").json() == {"status": "warming up"}
        let.set()
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)
        app.state.server.draining = True
        assert (httpx.get(f"{url}/health").status_code, httpx.get(f"{url}/ready").status_code) == (200, 503)
        app.state.server.draining = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny_llm._loop, "_ended", True)
            assert httpx.get(f"{url}/health").json() == {"status": "the engine has stopped"}
