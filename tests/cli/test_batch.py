"""`vattention generate --input`: JSON lines."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vattention import LLM, KVCache, OutOfPages, SamplingParams
from vattention.cli import batch, json_lines, main
from vattention.cli.batch import Batch, Item, Source
from vattention.cli.json_lines import LineReader, LineWriter
from vattention.errors import ConfigError


@pytest.fixture(scope="module")
def llm(chatty: str) -> Iterator[LLM]:
    with LLM(chatty, kv_cache_memory="16MiB", max_num_seqs=4) as llm:
        yield llm


def write(path: Path, *lines: dict[str, Any] | str) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def read(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def answers(path: Path) -> dict[Any, list[tuple[int, ...]]]:
    """Token ids of every sample by id."""
    return {
        line.get("id", line.get("custom_id")): [tuple(each["token_ids"]) for each in line["outputs"]]
        for line in read(path)
    }


def run(llm: LLM, items: list[Item], output: Path, **options: Any) -> Batch:
    writer = LineWriter(str(output))
    work = Batch(llm, writer, {"temperature": 0.0, "max_tokens": 4}, **options)
    try:
        work.run(Source(None, items))
    finally:
        writer.close()
    return work


def test_each_kind_of_line_is_what_the_library_says(chatty: str, llm: LLM, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "world"}]
    lines = [
        {"prompt": "Hello"},
        {"id": "b", "prompt_token_ids": [5, 6, 7], "max_tokens": 9},
        {"custom_id": 7, "messages": messages, "logprobs": 1, "prompt_logprobs": 0},
        {"id": "d", "prompt": "x", "n": 2, "temperature": 1, "seed": 3, "top_p": 0.9, "logit_bias": {"5": 1.5}},
    ]
    output = tmp_path / "out.jsonl"
    source = write(tmp_path / "in.jsonl", *lines)
    assert main(["generate", chatty, "--input", source, "--output", str(output), "--max-tokens", "4"]) == 0

    def say(prompt: Any, **options: Any) -> Any:
        params = SamplingParams(**{"temperature": 0, "max_tokens": 4, **options})
        return llm.generate(prompt, params, use_tqdm=False)[0]

    expected = [
        say("Hello"),
        say({"prompt_token_ids": [5, 6, 7]}, max_tokens=9),
        llm.chat(messages, SamplingParams(temperature=0, max_tokens=4, logprobs=1, prompt_logprobs=0), False)[0],
        say("x", n=2, temperature=1, seed=3, top_p=0.9, logit_bias={5: 1.5}),
    ]
    got = read(output)
    assert [line.get("id") for line in got] == [1, "b", None, "d"]
    assert got[2]["custom_id"] == 7
    for line, wanted in zip(got, expected, strict=True):
        assert line["prompt_tokens"] == len(wanted.prompt_token_ids)
        for sample, same in zip(line["outputs"], wanted.outputs, strict=True):
            assert tuple(sample["token_ids"]) == same.token_ids
            assert (sample["text"], sample["finish_reason"]) == (same.text, same.finish_reason)
        assert line["metrics"]["time"] > 0
    scored = got[2]["outputs"][0]
    assert [entry[0]["token_id"] for entry in scored["logprobs"]] == scored["token_ids"]
    assert sum(entry[0]["logprob"] for entry in scored["logprobs"]) == pytest.approx(scored["cumulative_logprob"])
    assert got[2]["prompt_logprobs"][0] is None
    assert "logprobs" not in got[0]["outputs"][0]


BAD: list[tuple[dict[str, Any] | str, str]] = [
    ("not json", "line 1 is not JSON: Expecting value at character 1"),
    ('{"prompt": "a"', "line 1 is not JSON"),
    ("[" * 100_000, "line 1 is not JSON that can be read"),
    ('{"prompt": ' + "9" * 5000 + "}", "line 1 is not JSON that can be read"),
    ("[1]", "line 1 is not an object"),
    ({}, "line 1: one of prompt, prompt_token_ids, messages is needed, and there are 0"),
    ({"prompt": "a", "messages": []}, "and there are 2"),
    ({"prompt": "a", "temprature": 1}, "unknown: temprature"),
    ({"prompt": "a", "temperature": "hot"}, "temperature must be a number, not str"),
    ({"prompt": "a", "temperature": -1}, "temperature must be at least 0"),
    ('{"prompt": "a", "temperature": NaN}', "temperature must be at least 0, got nan"),
    ({"prompt": "a", "n": 2}, "n=2 samples at temperature 0"),
    ({"prompt": "a", "logit_bias": {"a": 1}}, "whole numbers"),
    ({"prompt": "a", "logit_bias": {"9999": 1}}, "the model has"),
    ({"prompt": "a", "stop": ""}, "an empty stop string"),
    ({"prompt": "a", "id": [1]}, "id must be a string or a whole number"),
    ({"prompt": "a", "custom_id": True}, "custom_id must be a string or a whole number"),
    ({"prompt": None}, "a prompt is a string, not NoneType"),
    ('{"prompt": "\\ud800"}', "not Unicode"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt_token_ids": "abc"}, "must be a sequence of ints"),
    ({"prompt_token_ids": 5}, "must be a sequence of ints"),
    ({"prompt_token_ids": [1.5]}, "a prompt token id must be a whole number"),
    ({"prompt_token_ids": [9999]}, "a prompt token id must be from 0"),
    ({"prompt_token_ids": [1] * 300}, "do not fit max_model_len=256"),
    ({"messages": "hello"}, "messages must be a sequence"),
    ({"messages": []}, "at least one message"),
    ({"messages": [{"content": "a"}]}, 'no "role"'),
]


@pytest.mark.parametrize(("line", "problem"), BAD, ids=[problem for _, problem in BAD])
def test_a_line_that_cannot_be_served_fails_alone(
    llm: LLM, tmp_path: Path, line: dict[str, Any] | str, problem: str
) -> None:
    source, output = write(tmp_path / "in", line, {"prompt": "a", "id": "good"}), tmp_path / "out"
    reader, writer = LineReader(source), LineWriter(str(output))
    work = Batch(llm, writer, {"max_tokens": 1, "temperature": 0.0})
    work.run(Source(reader))
    reader.close()
    writer.close()
    bad, good = read(output)
    assert problem in bad["error"]
    assert "line 1" in bad["error"]
    assert "outputs" not in bad
    assert (good["id"], len(good["outputs"])) == ("good", 1)
    assert (work.served, work.failed) == (1, 1)
    assert llm.engine.unfinished == 0


def test_what_is_not_utf8_is_named_by_its_line(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "\x80"}\n{"prompt": "b"}')
    reader, writer = LineReader(str(tmp_path / "in")), LineWriter(str(tmp_path / "out"))
    Batch(llm, writer, {"max_tokens": 1}).run(Source(reader))
    lines = read(tmp_path / "out")
    assert [("error" in line, line["id"]) for line in lines] == [(False, 1), (True, 3), (False, 4)]
    assert "line 3 is not UTF-8 text: invalid start byte at byte 12" in lines[1]["error"]


def test_order_is_that_of_the_input_whatever_ends_first(llm: LLM, tmp_path: Path) -> None:
    items = [Item(i, {"prompt": "a", "max_tokens": 40 if i % 5 == 1 else 1}) for i in range(1, 41)]
    run(llm, items, tmp_path / "out")
    written = [line["id"] for line in read(tmp_path / "out")]
    ended = sorted(written, key=lambda i: _ended(tmp_path / "out", i))
    assert written == list(range(1, 41))
    assert ended != written  # the engine did not go one by one


def _ended(path: Path, number: int) -> float:
    metrics = read(path)[number - 1]["metrics"]
    return metrics["arrival_time"] + metrics["time"]


def test_only_a_window_of_the_input_is_held(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_HELD", 12)
    output = tmp_path / "out"
    most = queued = taken = 0

    def items() -> Iterator[Item]:
        nonlocal most, queued, taken
        for number in range(1, 201):
            taken += 1
            most = max(most, taken - len(read(output)))
            queued = max(queued, llm.engine.unfinished)
            yield Item(number, {"prompt": "a", "max_tokens": 60 if number == 1 else 1})

    writer = LineWriter(str(output))
    Batch(llm, writer, {}, ahead=6).run(Source(None, items()))
    assert len(read(output)) == 200
    assert most == 12  # the first is slow: the others wait for it, not in the engine, and not without bounds
    assert queued == 5


def test_each_answer_is_written_as_soon_as_it_may_be(llm: LLM, tmp_path: Path) -> None:
    output = tmp_path / "out"
    seen = []

    def items() -> Iterator[Item]:
        yield Item(1, {"prompt": "a", "max_tokens": 1})
        for number in range(2, 6):
            yield Item(number, {"prompt": "a", "max_tokens": 20 * number})
            seen.append(len(read(output)))

    Batch(llm, LineWriter(str(output)), {}, ahead=1).run(Source(None, items()))
    assert seen == [2, 3, 4, 5]


def test_resuming_gives_what_one_run_gives(chatty: str, tmp_path: Path) -> None:
    lines = [{"prompt": "a", "id": f"r{i}"} for i in range(8)] + [{"prompt_token_ids": [i]} for i in range(4)]
    source = write(tmp_path / "in", *lines)
    whole, part = tmp_path / "whole", tmp_path / "part"
    command = ["generate", chatty, "--input", source, "--temperature", "1", "--max-tokens", "6", "--seed", "5"]
    assert main([*command, "--output", str(whole)]) == 0
    kept = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(kept[:5]) + kept[5][:-20])  # it ended in the middle of a line
    before = part.read_bytes()[: -len(kept[5]) + 20]
    assert main([*command, "--output", str(part), "--resume"]) == 0
    assert part.read_bytes().startswith(before)
    assert list(answers(part)) == list(answers(whole))
    assert answers(part) == answers(whole)
    assert len(set(map(tuple, answers(whole).values()))) > 8  # each line has random numbers of its own


def test_resuming_tries_failures_again_and_starts_where_there_is_nothing(
    chatty: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in", {"prompt": "a"}, {"prompt_token_ids": [1] * 50, "id": "long"})
    command = [
        "generate",
        chatty,
        "--input",
        source,
        "--output",
        str(tmp_path / "out"),
        "--resume",
        "--max-tokens",
        "1",
    ]
    assert main([*command, "--max-model-len", "40"]) == 1
    assert "1 answered, 1 failed\n" in capsys.readouterr().err
    assert main(command) == 0
    assert "1 answered, 0 failed, 1 there already\n" in capsys.readouterr().err
    assert [(line["id"], "error" in line) for line in read(tmp_path / "out")] == [
        (1, False),
        ("long", True),
        ("long", False),
    ]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--input", "missing"], "cannot read missing: No such file"),
        (["--input", "."], "cannot read .: Is a directory"),
        (["--input", "in", "--prompt", "a"], "leave --prompt"),
        (["--input", "in", "--output", "no/where"], "cannot write no/where"),
        (["--input", "in", "--output", "."], "cannot write .: Is a directory"),
        (["--input", "in", "--output", "in", "--resume"], "the same file"),
        (["--input", "in", "--output", "full"], "full is there already: go on with it (--resume), or remove it"),
        (["--input", "in", "--output", "broken", "--resume"], "cannot go on with broken: line 1 is not JSON"),
        (["--input", "in", "--resume"], "name it with --output"),
        (["--resume"], "name it with --output"),
        (["--prompt-logprobs", "1"], "JSON lines only"),
    ],
)
def test_files_that_cannot_be_are_refused_before_the_model_is_read(
    options: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", {"prompt": "a"})
    write(tmp_path / "full", "{}")
    write(tmp_path / "broken", "{", "{}")
    assert main(["generate", "./no-model", *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert problem in err
    assert (tmp_path / "full").read_text() == "{}\n"
    assert (tmp_path / "in").read_text() == '{"prompt": "a"}\n'


def test_a_full_disk_ends_it_with_one_line(chatty: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", {"prompt": "a"})
    assert main(["generate", chatty, "--input", source, "--output", "/dev/full", "--max-tokens", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[2:] == [
        "vattention: error: cannot write /dev/full: No space left on device"
    ]


def test_prompts_of_options_can_be_written_as_lines_too(chatty: str, llm: LLM, tmp_path: Path) -> None:
    some = ["--prompt", "Hello", "--prompt", "world", "--max-tokens", "5"]
    assert main(["generate", chatty, *some, "--output", str(tmp_path / "chat")]) == 0
    assert main(["generate", chatty, *some, "--output", str(tmp_path / "plain"), "--no-chat"]) == 0
    params = SamplingParams(temperature=0, max_tokens=5)
    for number, text in enumerate(("Hello", "world"), start=1):
        chat = llm.chat([{"role": "user", "content": text}], params, False)[0]
        plain = llm.generate(text, params, False)[0]
        assert answers(tmp_path / "chat")[number] == [chat.outputs[0].token_ids]
        assert answers(tmp_path / "plain")[number] == [plain.outputs[0].token_ids]


def test_a_model_without_tokenizer_serves_token_ids(bare_model: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"prompt_token_ids": [1, 2]}, {"prompt": "a"}, {"messages": [{"role": "user"}]})
    assert (
        main(["generate", bare_model, "--input", source, "--output", str(tmp_path / "out"), "--max-tokens", "2"]) == 1
    )
    good, *bad = read(tmp_path / "out")
    assert (len(good["outputs"][0]["token_ids"]), good["outputs"][0]["text"]) == (2, "")
    assert all("without a tokenizer" in line["error"] for line in bad)


def test_a_prompt_that_has_no_room_fails_alone(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = KVCache.step

    def refuse(self: KVCache, lengths: dict[int, int]) -> None:
        if 13 in lengths.values():
            raise OutOfPages(1, 0)
        step(self, lengths)

    monkeypatch.setattr(KVCache, "step", refuse)
    prompts = [[1, 2], [1] * 13, [3, 4]]
    items = [Item(i, {"prompt_token_ids": prompt}) for i, prompt in enumerate(prompts, start=1)]
    work = run(llm, items, tmp_path / "out")
    assert ["error" in line for line in read(tmp_path / "out")] == [False, True, False]
    assert "line 2: 1 pages needed" in read(tmp_path / "out")[1]["error"]
    assert (work.served, work.failed, llm.engine.unfinished) == (2, 1, 0)


def test_what_breaks_the_engine_leaves_what_is_done(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, count = llm.engine.step, 0

    def breaks() -> Any:
        nonlocal count
        count += 1
        if count == 6:
            raise ZeroDivisionError
        return step()

    monkeypatch.setattr(llm.engine, "step", breaks)
    items = [Item(i, {"prompt": "a", "max_tokens": 50 if i == 1 else 1}) for i in range(1, 4)]
    try:
        with pytest.raises(ZeroDivisionError):
            run(llm, items, tmp_path / "out")
        assert [line["id"] for line in read(tmp_path / "out")] == [2, 3]
    finally:
        for name in list(llm.engine._requests):
            llm.engine.abort(name)


def test_numbers_that_json_has_not_are_null() -> None:
    assert batch._finite(float("-inf")) is None
    assert batch._finite(-1.5) == -1.5


def test_lines_come_when_they_are_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(json_lines, "_CHUNK", 7)
    there, here = os.pipe()
    with open(there) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        reader = LineReader("-")
        assert reader.next(wait=False) is None
        os.write(here, b"abc")
        assert reader.next(wait=False) is None
        os.write(here, b"def\n\n  \nghi")
        assert reader.next(wait=True) == (1, b"abcdef")
        assert reader.next(wait=False) is None
        assert not reader.ended
        os.close(here)
        assert reader.next(wait=True) == (4, b"ghi")
        assert reader.next(wait=True) is None
        assert reader.ended
        reader.close()


@pytest.mark.parametrize("content", [b"", b"abc", b"abc\ndef\n", b"abc\ndefgh", b"\n" * 30, b"x" * 50])
def test_a_line_cut_short_is_taken_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes) -> None:
    monkeypatch.setattr(json_lines, "_CHUNK", 4)
    path = tmp_path / "out"
    path.write_bytes(content)
    writer = LineWriter(str(path), resume=True)
    writer.write({"a": "é\ud800"})
    writer.close()
    whole = content[: content.rfind(b"\n") + 1]
    assert path.read_bytes() == whole + b'{"a": "\\u00e9\\ud800"}\n'


def test_an_input_that_cannot_be_read_further_is_one_error(tmp_path: Path) -> None:
    reader = LineReader(write(tmp_path / "in", {}))
    reader.close()
    with pytest.raises(ConfigError, match=r"cannot read .*in: Bad file descriptor"):
        reader.next(wait=True)


def test_a_pipe_is_answered_line_by_line_and_an_interrupt_keeps_what_is_done(tireless: str) -> None:
    command = [sys.executable, "-m", "vattention.cli", "generate", tireless, "--input", "-"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    for number in range(2):  # the second is written when the first is answered
        process.stdin.write(b'{"prompt": "a", "max_tokens": 2}\n')
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == number + 1
    process.stdin.write(b'{"prompt": "a", "max_tokens": null, "ignore_eos": true}\n{"prompt": "a", "max_tokens": 2}\n{')
    process.stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)  # the third goes on for minutes, and the fourth waits for it
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert [json.loads(line)["id"] for line in out.splitlines()] == [4]
    assert err.splitlines()[2:] == [b"vattention: interrupted"]


def test_progress_is_shown_to_a_terminal_unless_it_is_to_be_quiet(
    chatty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in", {"prompt": "a"}, {"prompt": "b"})
    command = ["generate", chatty, "--max-tokens", "1", "--input", source]
    assert main([*command, "--output", str(tmp_path / "no-terminal")]) == 0
    assert "Requests:" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*command, "--output", str(tmp_path / "terminal")]) == 0
    seen = capsys.readouterr().err
    assert "Requests: 2request" in seen
    assert "2 answered, 0 failed\nKV cache at its fullest: " in seen
    assert main([*command, "--output", str(tmp_path / "quiet"), "--quiet"]) == 0
    seen = capsys.readouterr().err
    assert "Requests:" not in seen
    assert "KV cache at its fullest" not in seen
