"""The life of a real process: what it says while it loads, who may come in, and how it ends."""

import contextlib
import json
import signal
import socket
import time
from pathlib import Path

import pytest

from support.server_process import Server, serving, wait
from vattention.cli import main
from vattention.errors import ConfigError
from vattention.server.listening import listen

KEYS = ("sk-one-of-two-keys", "sk-the-other-key")
LONG = {"model": "tiny", "prompt": "Hello", "max_tokens": 60_000, "ignore_eos": True}
NAMED = ("--served-model-name", "tiny", "--kv-cache-memory", "64MiB")


def asked(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_from_the_open_port_through_keys_to_an_orderly_end(tireless: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEYS[1])
    flags = [*NAMED, "--api-key", KEYS[0], "--api-key-file", str(tmp_path / "keys"), "--log-level", "debug"]
    with serving(tireless, *flags, ready=False) as server:
        loading(server)
        wait(lambda: server.ask("/ready")[0] == 200, lambda: server.log)
        keys(server)
        draining(server)
        assert not any(key in server.log for key in KEYS)
        assert "Traceback" not in server.log


def loading(server: Server) -> None:
    """Before there is a model the port is open, and says so."""
    status, _, body = server.ask("/health")
    assert (status, json.loads(body)) == (503, {"status": "loading"})
    assert server.ask("/version")[0] == 200
    status, headers, body = server.ask("/v1/completions", LONG)
    assert status == 503
    assert int(headers["retry-after"]) > 0
    assert json.loads(body)["error"]["code"] == "loading"


def keys(server: Server) -> None:
    """Wrong, missing and right ones; none is ever repeated."""
    short = {**LONG, "max_tokens": 2}
    said = b""
    for key in KEYS:
        assert server.ask("/v1/completions", short, headers=asked(key))[0] == 200
        # A client may put its key anywhere.
        for path in (f"/v1/models/{key}", f"/{key}?key={key}"):
            said += server.ask(path, headers=asked(key))[2]
        said += server.ask("/v1/completions", {**short, "model": key, "stop": key}, headers=asked(key))[2]
        server.ask("/v1/models", headers={**asked(key), "X-Request-Id": key})
    for headers in ({}, asked("sk-wrong"), asked(KEYS[0][:-1]), asked(KEYS[0] + KEYS[1])):
        status, _, body = server.ask("/v1/completions", short, headers=headers)
        assert status == 401
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        said += body
    for path in ("/metrics", "/dashboard", "/openapi.json", "/v1/models"):
        assert server.ask(path)[0] == 401
        said += server.ask(path, headers=asked(KEYS[0]))[2]
    said += server.ask("/v1/completions", b"{", headers=asked(KEYS[0]))[2]
    assert not any(key.encode() in said for key in KEYS)


def draining(server: Server) -> None:
    """What runs comes to its end, nothing new begins, and then the process ends with 0."""
    running = server.stream({**LONG, "max_tokens": 400}, headers=asked(KEYS[0]))
    running.read_until(b"data: ")
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("stopping: a second signal ends the server at once")
    assert server.ask("/ready")[0] == 503
    assert server.ask("/health")[0] == 200
    status, headers, body = server.ask("/v1/completions", LONG, headers=asked(KEYS[0]))
    assert status == 503
    assert "retry-after" in headers
    assert json.loads(body)["error"]["code"] == "draining"
    ended = running.read_to_the_end()
    assert b"data: [DONE]" in ended
    assert b'"finish_reason":"length"' in ended
    assert server.process.wait(60) == 0


def test_what_has_not_ended_in_time_is_told_so_and_the_end_is_orderly(tireless: str) -> None:
    with serving(tireless, *NAMED, "--drain-timeout", "0.3") as server:
        running = server.stream(LONG)
        running.read_until(b"data: ")
        assert server.stop() == 0
        assert b'"error":{"message":"the engine' in running.read_to_the_end()
        assert server.events("the time to drain is over")[0]["answers_cut_off"] == 1


def test_a_deadline_a_full_queue_and_a_second_signal(tireless: str) -> None:
    flags = [
        *NAMED,
        "--request-timeout",
        "2",
        "--body-timeout",
        "1",
        "--max-num-seqs",
        "1",
        "--max-queue",
        "0",
        "--max-tokens",
        "50000",
    ]
    with serving(tireless, *flags) as server:
        began = time.monotonic()
        mute = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        mute[1].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow")
        running = server.stream(LONG)
        running.read_until(b"data: ")
        status, headers, body = server.ask("/v1/completions", LONG)
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert json.loads(body)["error"]["code"] == "queue_full"
        assert b'"code":"request_timeout"' in running.read_to_the_end()
        assert time.monotonic() - began >= 2
        status, headers, _ = server.ask("/v1/completions", LONG)  # the slot is free again, and this one is no stream
        assert (status, headers["x-should-retry"]) == (504, "false")
        for each in mute:  # whoever never sends a request is hung up on
            each.settimeout(60)
            with contextlib.suppress(ConnectionResetError):
                assert each.recv(1) == b""
        running = server.stream(LONG)
        running.read_until(b"data: ")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping: a second signal ends the server at once")
        assert server.stop(signal.SIGINT) == 128 + signal.SIGINT


def test_a_signal_while_the_model_is_loaded(tireless: str) -> None:
    with serving(tireless, ready=False) as server:
        assert server.stop() == 0
        assert not server.events("ready")


def test_a_model_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "./no-such-model", "--port", "0", "--log-format", "text"]) == 2
    err = capfd.readouterr().err
    assert "no-such-model" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_port_that_is_taken_is_one_line_and_no_model_is_loaded(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "./never-looked-at", "--port", str(port), "--log-format", "text"]) == 2
    err = capfd.readouterr().err
    assert f"port {port} of 127.0.0.1 is in use" in err
    assert err.count("\n") == 1


def test_other_reasons_why_nothing_can_listen() -> None:
    with pytest.raises(ConfigError, match=r"host 'no\.such\.host\.invalid'"):
        listen("no.such.host.invalid", 0, stall_timeout=1)
    with pytest.raises(ConfigError, match="cannot listen on port 0 of 192"):
        listen("192.0.2.1", 0, stall_timeout=1)
