"""`vattention chat --url`, against a server that does as it is told."""

import threading
import time
from contextlib import closing
from typing import Any

import pytest

from support.stand_in import stand_in
from vattention import SamplingParams
from vattention.cli.remote import RemoteAnswers
from vattention.errors import EngineError, InvalidRequest

HELLO = [{"role": "user", "content": "Hello you"}]


def test_a_conversation(typed: Any) -> None:
    with stand_in() as server:
        server.key = "secret"
        server.template = 5
        command = ["chat", "--url", server.url + "/v1", "--api-key", "secret", "--max-tokens", "3", "--system", "be"]
        code, out, err = typed([*command, "--stats"], "Hello\nworld\n/memory\n")
        seen = server.seen
    assert code == 0
    assert out.splitlines()[:2] == [" w0 w1 w2", " w0 w1 w2"]
    assert f"{server.url}/metrics" in out
    assert err.count("cut off after 3 tokens: /set max_tokens 6 allows more") == 2
    assert "(7 tokens in, 3 out; first token after" in err
    assert [each["content"] for each in seen[1]["messages"]] == ["be", "Hello", " w0 w1 w2", "world"]
    assert seen[0]["model"] == "stand-in"
    assert seen[0]["key"] == "Bearer secret"
    assert set(seen[0]) == {"model", "messages", "temperature", "max_tokens", "stream", "stream_options", "path", "key"}


def test_settings_and_the_model_are_sent(typed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VATTENTION_API_KEY", "of the environment")
    with stand_in() as server:
        server.key = "of the environment"
        lines = '/set stop ["a"]\n/set seed 7\n/set logit_bias {"5": -10}\n/set max_tokens none\n/set max_tokens 2\nx\n'
        assert typed(["chat", "other", "--url", server.url, "--top-p", "0.5"], lines)[0] == 0
        (body,) = server.seen
    assert (body["stop"], body["seed"], body["logit_bias"], body["top_p"]) == (["a"], 7, {"5": -10}, 0.5)
    assert (body["model"], body["max_tokens"]) == ("other", 2)


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("busy", "says 429: too busy"),
        ("cut", "broke the answer off"),
        ("error", "failed: it broke"),
        ("garbage", "sent what is no answer"),
        ("unfinished", "ended the answer without a reason"),
    ],
)
def test_answers_that_fail_are_told_and_the_conversation_goes_on(typed: Any, how: str, problem: str) -> None:
    with stand_in(lambda number, body: how if number == 0 else "good") as server:
        code, out, err = typed(["chat", "--url", server.url, "--max-tokens", "2"], "Hello\n/undo\nHello\n")
    assert code == 1
    assert f"error: {server.url}" in err
    assert problem in err
    assert out.endswith(" w0 w1\n")


def test_who_cannot_be_asked(typed: Any) -> None:
    with stand_in() as server:
        server.key = "secret"
        url = server.url
        code, _, err = typed(["chat", "--url", url], "Hello\n")
        assert (code, "wants an API key: --api-key" in err) == (2, True)
        code, _, err = typed(["chat", "nope", "--url", url], "Hello\n")
        assert (code, "says 404: no model nope" in err) == (1, True)
    for more, problem in (
        (["--url", url], f"no server answers at {url}: Connection refused"),
        (["--url", "ftp://x"], "is no URL of a server"),
        (["--url", url, "--compile", "--seed", "3"], "leave --compile, --seed out"),
        (["--url", url, "--expected-tokens", "9"], "leave --expected-tokens out"),
        (["--api-key", "x"], "name it with --url"),
    ):
        code, _, err = typed(["chat", *more], "Hello\n")
        assert (code, problem in err) == (2, True), err


def test_closing_an_answer_leaves_the_server() -> None:
    """Before anything has come: what Ctrl-C does."""
    with stand_in(lambda number, body: "silent") as server:
        with closing(RemoteAnswers(server.url).stream(HELLO, SamplingParams(max_tokens=5))) as pieces:
            piece = next(pieces)
            assert (piece.text, piece.finish_reason) == ("", None)
        until = time.monotonic() + 10
        while not server.left and time.monotonic() < until:
            time.sleep(0.02)
        assert server.left == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "vattention-answer"]


def test_kinds_of_errors() -> None:
    with stand_in(lambda number, body: "busy") as server:
        answers = RemoteAnswers(server.url)
        with pytest.raises(EngineError, match="429"):
            list(answers.stream(HELLO, SamplingParams()))
        server.behaviour = lambda number, body: "good"
        with pytest.raises(InvalidRequest, match="404"):
            list(RemoteAnswers(server.url, model="nope").stream(HELLO, SamplingParams()))
    with pytest.raises(EngineError, match="no server answers"):
        list(answers.stream(HELLO, SamplingParams()))
