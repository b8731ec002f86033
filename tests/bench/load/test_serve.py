"""`vattention bench serve` against servers that run already."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.stand_in import stand_in
from vattention.cli import main

SMALL = ["--num-requests", "6", "--prompt-tokens", "4", "--output-tokens", "3", "--rounds", "2", "--timeout", "20"]


def test_one_server(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with stand_in() as server:
        server.key = "secret"
        server.pause = 0.01
        command = ["bench", "serve", "--url", server.url, "--api-key", "secret", *SMALL, "--json", str(path)]
        assert main([*command, "--concurrency", "3", "--body", '{"top_p": 0.5}']) == 0
        assert server.most == 3
        assert {each["top_p"] for each in server.seen} == {0.5}
    out = capsys.readouterr().out
    assert "3 at a time; median (lowest .. highest) of 2 rounds" in out
    assert "server: 12 answers, 0 failures; prompts of 4 tokens, 36 tokens of output" in out
    assert "PASS: no request failed" in out
    assert "time to first token, ms" in out
    result = json.loads(path.read_text())
    assert "secret" not in path.read_text()
    (phase,) = result["phases"]
    assert [each["output_tokens"] for each in phase["rounds"]["server"]] == [18, 18]
    assert all(each["values"]["p50_tpot_ms"] > 9 for each in phase["rounds"]["server"])


def test_two_in_turns_get_the_same_requests_and_the_better_one_wins(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    plot, path = tmp_path / "p.png", tmp_path / "r.json"
    with stand_in() as fast, stand_in() as slow:
        fast.pause, slow.pause = 0.005, 0.05
        sides = ["--side", f"fast={fast.url}", "--side", f"slow={slow.url}/v1"]
        command = ["bench", "serve", *sides, *SMALL, "--load", "0.7", "--must-win"]
        assert main([*command, "--plot", str(plot), "--json", str(path)]) == 0
        asked = [[each["prompt"] for each in server.seen if each["max_tokens"] == 3] for server in (fast, slow)]
        assert main([*command[:2], *sides[2:], *sides[:2], *SMALL, "--must-win"]) == 1
    measured = 6 * 2  # of each phase
    assert sorted(asked[0]) == sorted(each for each in asked[1] if each in asked[0])
    assert len(asked[0]) == 6 + 2 * measured
    assert len(asked[1]) == 6 + 2 * measured + 2 * 6  # the second one's capacity was measured
    assert plot.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "70% of slow's" in out
    assert "PASS: no request failed, and ours is ahead in every bar" in out
    assert "FAIL: 8 at a time: output tokens/s" in out
    closed, open_ = json.loads(path.read_text())["phases"]
    ratio = next(line for line in closed["figures"] if line["metric"] == "output tokens/s")["ratios"]["slow"]
    assert ratio["median"] > 1
    assert all(value["failures"] == {} for value in open_["rounds"]["fast"])


def test_a_request_that_fails_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with stand_in(lambda number, body: "busy" if number == 9 else "good") as server:
        assert main(["bench", "serve", "--url", server.url, *SMALL]) == 1
    assert "FAIL: 8 at a time: server: 1 x HTTP 429 (HTTP 429:" in capsys.readouterr().out


def test_traces_and_chat(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    rows = "".join(f"2023-11-16 18:15:4{second}.0,{10 + second},{1 + second}\n" for second in range(3))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    with stand_in() as server:
        server.template = 4
        command = ["bench", "serve", "--url", server.url, "--endpoint", "chat", "--num-requests", "3", "--rounds", "1"]
        command += ["--trace", str(trace), "--trace-arrivals", "--speed", "10", "--model-name", "other"]
        assert main(command) == 0
        assert {each["path"] for each in server.seen if "messages" in each} == {"/v1/chat/completions"}
        assert {each["model"] for each in server.seen} == {"other"}
    out = capsys.readouterr().out
    assert "as in the trace, 10 times as fast" in out
    assert "prompts of 10 to 12 tokens, 6 tokens of output" in out


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--url", "ftp://x"], "no URL"),
        (["--url", "http://127.0.0.1:1"], "no server answers at http://127.0.0.1:1: "),
        (["--url", "x", "--side", "a=b"], "name every one with --side"),
        (["--side", "a=b", "--side", "a=c"], "same name"),
        (["--url", "x", "--peer", "vllm=y"], "not both"),
        (["--url", "x", "--must-win"], "name a --peer"),
        (["--url", "x", "--load", "0.7"], "name a --peer"),
        (["--url", "x", "--trace-arrivals"], "needs a --trace"),
        (["--url", "x", "--endpoint", "chat", "--prompts", "ids"], "takes text"),
        (["--url", "x", "--endpoint", "nope"], "completions, chat"),
        (["--url", "x", "--rounds", "0"], "must be positive"),
        (["--peer", "transformers"], "no server that this command can start"),
        (["--overhead", "--peer", "paged-16"], "leave --peer out"),
    ],
)
def test_what_cannot_be(more: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *more]) == 2
    assert problem in capsys.readouterr().err


def test_a_vocabulary_in_which_words_are_no_tokens(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    with stand_in() as server:
        handler: Any = server.RequestHandlerClass
        monkeypatch.setattr(handler, "_prompt_tokens", lambda self, body: 3 * len(body["prompt"].split()))
        assert main(["bench", "serve", "--url", server.url, "--prompts", "text", *SMALL]) == 2
    assert "not a token each" in capsys.readouterr().err
