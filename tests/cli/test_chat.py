"""`vattention chat`, from pipes and at a terminal."""

import fcntl
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from support.chat_models import save
from vattention import LLM, SamplingParams, StructuredOutput
from vattention.cli.answers import EngineAnswers, Piece
from vattention.cli.console import Console, Entry
from vattention.cli.conversation import Conversation
from vattention.cli.settings import _FIXED, Settings
from vattention.errors import InvalidRequest, OutOfPages

SMALL = ["--kv-cache-memory", "16MiB", "--max-tokens", "8"]


@pytest.fixture(scope="module")
def llm(chatty: str) -> Iterator[LLM]:
    with LLM(chatty, kv_cache_memory="16MiB", max_num_seqs=1) as llm:
        yield llm


def say(llm: LLM, *turns: str, **options: Any) -> str:
    """What the library answers to a conversation, user and assistant in turn; "system:..." goes first."""
    messages = []
    for text in turns:
        if text.startswith("system:"):
            messages.append({"role": "system", "content": text.removeprefix("system:")})
        else:
            last = messages[-1]["role"] if messages else ""
            messages.append({"role": "assistant" if last == "user" else "user", "content": text})
    params = SamplingParams(**{"temperature": 0, "max_tokens": 8, **options})
    return llm.chat(messages, params, use_tqdm=False)[0].outputs[0].text


# -- from a pipe ----------------------------------------------------------------------------------------------------


def test_each_line_is_a_turn_and_only_answers_go_out(chatty: str, llm: LLM, typed: Any) -> None:
    code, out, err = typed(["chat", chatty, *SMALL], "Hello\n\nworld\r\n")
    first = say(llm, "Hello")
    second = say(llm, "Hello", first, "world")
    assert second != say(llm, "world")  # it does see what came before
    assert out == f"{first}\n{second}\n"
    assert code == 0
    assert err.count("cut off after 8 tokens: /set max_tokens 16 allows more") == 2
    assert ">>>" not in out + err
    assert "\x1b[" not in err


def test_messages_of_several_lines_and_with_slashes(chatty: str, llm: LLM, typed: Any, tmp_path: Path) -> None:
    text = f'"""\none\n/two\n\nthree"""\n//four\n"""five"""\n/save {tmp_path}/f.json\n"""\nsix'
    code, out, _ = typed(["chat", chatty, *SMALL, "--max-tokens", "1"], text)
    assert code == 0
    messages = json.loads((tmp_path / "f.json").read_text())
    assert [m["content"] for m in messages if m["role"] == "user"] == ["one\n/two\n\nthree", "/four", "five"]
    assert len(re.findall("\n", out)) >= 4  # the block that the end of the input ends is answered too


def test_a_system_prompt(chatty: str, llm: LLM, typed: Any) -> None:
    text = '/system\nHello\n/system pirate  ship\n/system\n/reset\nHello\n/system ""\n/system\n'
    code, out, _ = typed(["chat", chatty, *SMALL, "--system", "be"], text)
    one, two = say(llm, "system:be", "Hello"), say(llm, "system:pirate  ship", "Hello")
    assert one != two
    assert out == f"be\n{one}\npirate  ship\n{two}\n(no system prompt)\n"
    assert code == 0


def test_retry_undo_and_reset(chatty: str, llm: LLM, typed: Any, tmp_path: Path) -> None:
    text = f"Hello\n/retry\nworld\n/undo\n/save {tmp_path}/a\n/reset\n/save {tmp_path}/b\n/undo\n/retry\n"
    code, out, err = typed(["chat", chatty, *SMALL], text)
    first = say(llm, "Hello")
    assert out == f"{first}\n{first}\n{say(llm, 'Hello', first, 'world')}\n"
    saved = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}]
    assert json.loads((tmp_path / "a").read_text()) == saved
    assert json.loads((tmp_path / "b").read_text()) == []
    assert "error: there is no message to take back" in err
    assert "error: there is no message to answer again" in err
    assert code == 1


def test_settings_reach_the_engine(chatty: str, llm: LLM, typed: Any) -> None:
    text = "/set max_tokens 3\n/set temperature 1\n/set seed 7\nHello\n/set temperature\n/set top-p 0.5\n/set top_p\n"
    code, out, _ = typed(["chat", chatty, *SMALL, "--top-k", "50", "--stop", "zzz"], text)
    answer = say(llm, "Hello", max_tokens=3, temperature=1, seed=7, top_k=50)
    assert answer != say(llm, "Hello", max_tokens=3)
    assert out == f"{answer}\ntemperature 1\ntop_p 0.5\n"
    assert code == 0


def test_statistics_only_when_asked_for(chatty: str, typed: Any) -> None:
    _, _, err = typed(["chat", chatty, *SMALL], "a\n/set stats on\nb\n/set stats off\nc\n")
    line = r"\((\d+) tokens in, 8 out; first token after \d+\.\d\d s, then \d+\.\d tokens/s\)"
    assert len(re.findall(line, err)) == 1
    _, _, err = typed(["chat", chatty, *SMALL, "--stats", "--max-tokens", "1"], "a\n")
    assert re.search(r"tokens in, 1 out; first token after \d+\.\d\d s\)", err)


def test_memory_is_that_of_the_last_answer(chatty: str, llm: LLM, typed: Any) -> None:
    command = ["chat", chatty, *SMALL, "--kv-cache-memory", "2MiB", "--ignore-eos"]
    _, out, _ = typed(command, "/memory\nHello\n/memory\n")
    before, after = out.split(say(llm, "Hello", ignore_eos=True))
    assert before.splitlines()[0] == "nothing is computed yet; the budget is 2 MiB"
    assert before.rstrip().endswith("0 B needed")
    prompt = llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=1), False)[0].prompt_token_ids
    lines = after.strip().splitlines()
    assert lines[0].startswith(f"last answer: {len(prompt) + 8} tokens")
    needed = (len(prompt) + 7) * 2 * 3 * 2 * 8 * 4  # the last token is never fed back
    assert lines[1].endswith(f"{needed / 1024:.4g} KiB needed")


def test_a_conversation_that_outgrows_the_model_loses_nothing(chatty: str, typed: Any, tmp_path: Path) -> None:
    long = "x" * 60
    text = f"a\n{long}\n/save {tmp_path}/f\n/undo\n/undo\nb\n/retry\n/save {tmp_path}/g\n"
    code, _, err = typed(["chat", chatty, "--max-model-len", "40", "--ignore-eos"], text)
    assert code == 1
    assert "(cut off: with 40 tokens the conversation is as long as it may be; /reset begins a new" in err
    refused = next(line for line in err.splitlines() if line.startswith("error"))
    assert "do not fit max_model_len=40" in refused
    assert "the message waits for /retry" in refused
    assert "/undo takes the last message back" in refused
    assert [m["content"] for m in json.loads((tmp_path / "f").read_text())][::2] == ["a"]
    # The first /undo takes the message that waits, the second the turn before it: there is room again.
    assert [m["content"] for m in json.loads((tmp_path / "g").read_text())][::2] == ["b"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/nope", "there is no command /nope: /help lists them"),
        ("/", "there is no command /"),
        ("/quit now", "/quit stands alone"),
        ("/reset now", "/reset stands alone"),
        ("/save", "say where: /save FILE"),
        ("/save /no/where", "cannot write /no/where: No such file or directory"),
        ("/save .", "cannot write .: Is a directory"),
        ("/set nope 1", "there is no setting 'nope'"),
        ("/set n 2", "n stays as it is: there is one answer at a time"),
    ],
)
def test_commands_that_are_refused(chatty: str, typed: Any, line: str, problem: str) -> None:
    code, out, err = typed(["chat", chatty, *SMALL], f"{line}\nHello\n")
    assert code == 1
    assert f"error: {problem}" in err
    assert out  # it goes on


def test_quit_and_help(chatty: str, typed: Any) -> None:
    code, out, _ = typed(["chat", chatty], "/help\n/quit\nHello\n")
    assert code == 0
    assert "/undo" in out
    assert "Ctrl-C stops an answer" in out.splitlines()[-1]


def test_input_that_is_no_text(chatty: str, typed: Any) -> None:
    code, _, err = typed(["chat", chatty], b"\xef\xbb\xbf/set\n\x80\n")
    assert code == 2
    assert "line 2 of standard input is not UTF-8 text" in err


def test_models_that_cannot_chat(bare_model: str, chatty: str, typed: Any, tmp_path: Path) -> None:
    code, _, err = typed(["chat", bare_model], "Hello\n")
    assert code == 2
    assert "came without a tokenizer" in err
    code, _, err = typed(["chat", save(tmp_path, template=None)], "Hello\n")
    assert code == 2
    assert "no chat template: use `vattention generate`" in err


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("max_tokens", "none", None),
        ("max-tokens", "7", 7),
        ("max_tokens", "default", 512),
        ("stop", "END", ("END",)),
        ("stop", '["a", "b c"]', ("a", "b c")),
        ("stop", '" x"', (" x",)),
        ("stop", "none", ()),
        ("stop_token_ids", "[1, 2]", (1, 2)),
        ("stop_token_ids", "none", ()),
        ("logit_bias", '{"5": -10}', {5: -10.0}),
        ("structured", '{"choice": ["a", "b"]}', StructuredOutput(choice=["a", "b"])),
        ("ignore_eos", "on", True),
        ("skip_special_tokens", "false", False),
    ],
)
def test_values_as_people_write_them(name: str, text: str, value: Any) -> None:
    settings = Settings()
    settings.set(name, text)
    assert getattr(settings.params, name.replace("-", "_")) == value
    assert settings.shown(name.replace("-", "_")).startswith(name.replace("-", "_") + " ")
    again = Settings()
    again.set(*settings.shown(name.replace("-", "_")).split(" ", 1))
    assert again.params == settings.params  # what is shown can be typed


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("temperature", "hot", "temperature must be a number, not 'hot'"),
        ("temperature", "-1", "temperature must be at least 0, got -1"),
        ("top_p", "2", "top_p must be at most 1"),
        ("max_tokens", "1.5", "max_tokens must be a whole number"),
        ("ignore_eos", "maybe", "ignore_eos must be on or off, not 'maybe'"),
        ("ignore_eos", "1", "ignore_eos must be a bool"),
        ("stop", "[1]", "stop must be a string"),
        ("stop_token_ids", "a", "stop_token_ids must be a list such as"),
        ("stop_token_ids", "5", "stop_token_ids must be a list such as [1, 2], not '5'"),
        ("logit_bias", "5", "logit_bias must map"),
        ("min_tokens", "600", "min_tokens=600 is more than max_tokens=512"),
        ("structured", '{"regex": 3}', "regex must be a str"),
        ("structured", '{"pattern": "a"}', "unexpected keyword argument"),
        ("structured", "a", "structured must be an object such as"),
        ("output_kind", "1", "output_kind stays as it is"),
        ("stats", "5", "stats is on or off"),
        ("model", "x", "there is no setting 'model'"),
    ],
)
def test_values_that_are_none_change_nothing(name: str, text: str, problem: str) -> None:
    settings = Settings()
    before = settings.lines()
    with pytest.raises(InvalidRequest, match=re.escape(problem)):
        settings.set(name, text)
    assert settings.lines() == before


def test_every_sampling_parameter_can_be_set_or_says_why_not() -> None:
    settings = Settings()
    listed = {line.split()[0] for line in settings.lines()}
    assert listed | set(_FIXED) == {each.name for each in fields(SamplingParams)} | {"stats"}
    for name in _FIXED:
        with pytest.raises(InvalidRequest, match="stays as it is"):
            settings.set(name, "1")


# -- answers that end early -----------------------------------------------------------------------------------------

ENDLESS = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
ASKED = [{"role": "user", "content": "Hello"}]


def test_an_answer_that_is_left_gives_its_slot_back(llm: LLM) -> None:
    answers = EngineAnswers(llm)
    whole = "".join(piece.text for piece in answers.stream(ASKED, ENDLESS))
    assert whole == say(llm, "Hello", max_tokens=200, ignore_eos=True)
    with closing(answers.stream(ASKED, ENDLESS)) as pieces:
        for _ in range(5):
            part = next(pieces)
        assert llm.stats().live_slots == 1
    assert part.tokens == 5
    assert (llm.stats().live_slots, llm.engine.unfinished) == (0, 0)
    assert "".join(piece.text for piece in answers.stream(ASKED, ENDLESS)) == whole


@pytest.mark.parametrize("error", [KeyboardInterrupt, OutOfPages(1, 0)])
def test_an_error_in_the_middle_keeps_what_came(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    step, count = llm.engine.step, 0

    def breaks() -> Any:
        nonlocal count
        count += 1
        if count == 20:
            raise error
        return step()

    monkeypatch.setattr(llm.engine, "step", breaks)
    console = Console()
    console.interactive = True
    talk = Conversation(EngineAnswers(llm), console, Settings({"ignore_eos": True}))
    before = signal.getsignal(signal.SIGINT)
    talk.say("Hello")
    assert signal.getsignal(signal.SIGINT) is before
    assert (llm.stats().live_slots, llm.engine.unfinished) == (0, 0)
    (_, answer), whole = talk.turns, say(llm, "Hello", max_tokens=200, ignore_eos=True)
    assert answer["content"]
    assert whole.startswith(answer["content"])
    out, err = capfd.readouterr()
    assert out == answer["content"] + "\n"
    assert "(stopped)" in err if error is KeyboardInterrupt else "1 pages needed" in err
    assert talk.failed is (error is not KeyboardInterrupt)


def test_a_model_that_fails_is_an_error_and_the_conversation_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    forward = llm.model.forward

    def breaks(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no matrix product today")

    console = Console()
    console.interactive = True
    talk = Conversation(EngineAnswers(llm), console, Settings({"max_tokens": 3}))
    monkeypatch.setattr(llm.model, "forward", breaks)
    talk.say("Hello")
    monkeypatch.setattr(llm.model, "forward", forward)
    assert "no matrix product today" in capfd.readouterr().err
    assert (llm.stats().live_slots, llm.engine.unfinished) == (0, 0)
    talk.say("Hello")
    assert capfd.readouterr().out


class Scripted:
    """Answers that fail or are stopped before their first token, then one that is fine."""

    def __init__(self, *acts: Any) -> None:
        self.acts = list(acts)
        self.asked: list[list[dict[str, str]]] = []

    def stream(self, messages: Any, params: SamplingParams) -> Iterator[Piece]:
        self.asked.append([dict(message) for message in messages])
        act = self.acts.pop(0)
        if isinstance(act, str):
            yield Piece(text=act, prompt_tokens=1, tokens=1, finish_reason="stop")
        elif act is signal.SIGINT:
            os.kill(os.getpid(), act)
            yield Piece(text="", prompt_tokens=1, tokens=0, finish_reason=None)
            raise AssertionError("nobody stopped this")
        else:
            raise act

    def memory(self) -> str:
        return ""


def test_a_message_that_got_no_answer_waits(capfd: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.interactive = True
    answers = Scripted("A", signal.SIGINT, InvalidRequest("no"), "B", signal.SIGINT, "C")
    talk = Conversation(answers, console, Settings())  # type: ignore[arg-type]
    talk.say("a")
    talk.say("b")  # stopped before its first token
    assert talk.unanswered == "b"
    talk.take(Entry("/retry"))  # fails
    talk.take(Entry("/retry"))
    assert [m["content"] for m in talk.turns] == ["a", "A", "b", "B"]
    talk.take(Entry("/retry"))  # stopped: the answer that was there stays
    assert [m["content"] for m in talk.turns] == ["a", "A", "b", "B"]
    assert talk.unanswered is None
    talk.take(Entry("/retry"))
    assert [m["content"] for m in talk.turns] == ["a", "A", "b", "C"]
    assert all([m["content"] for m in asked] in (["a"], ["a", "A", "b"]) for asked in answers.asked)
    assert capfd.readouterr().err.count("(stopped") == 2


# -- at a terminal --------------------------------------------------------------------------------------------------


def test_a_terminal_is_shown_control_characters_and_does_not_obey_them(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "é\t世\n\x1b[31m\x07\r\x9b\u2028🙂"
    Console().show(text)
    assert capfd.readouterr().out.replace("\r", "") == text.replace("\r", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Console().show(text)
    assert capfd.readouterr().out == "é\t世\n\\x1b[31m\\x07\\r\\x9b\u2028🙂"


class Terminal:
    """A command at a terminal of its own, which somebody types at."""

    def __init__(self, command: list[str]) -> None:
        self.here, there = os.openpty()
        settings = termios.tcgetattr(there)
        settings[3] |= termios.NOFLSH  # or Ctrl-C may swallow what is written at the same moment
        termios.tcsetattr(there, termios.TCSANOW, settings)
        self.seen = ""

        def controlling() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        environment = {**os.environ, "TERM": "xterm", "INPUTRC": "/dev/null"}
        self.process = subprocess.Popen(
            command,
            stdin=there,
            stdout=there,
            stderr=there,
            start_new_session=True,
            preexec_fn=controlling,
            env=environment,
        )
        os.close(there)

    def type(self, text: str) -> None:
        os.write(self.here, text.encode())

    def clear_line(self) -> None:
        """Ctrl-C at the prompt. A signal that comes while a key is handled waits for the next one: press it again."""
        for _ in range(30):
            self.type("\x03")
            end = time.monotonic() + 2
            while time.monotonic() < end and not self.seen.endswith(">>> "):
                if select.select([self.here], [], [], 0.1)[0]:
                    self.seen += os.read(self.here, 4096).decode(errors="replace")
            if self.seen.endswith(">>> "):
                self.seen = ""
                return
        raise AssertionError(f"no prompt after Ctrl-C in ...{self.seen[-300:]!r}")

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """Wait until `pattern` is seen; return everything up to its end, which is then forgotten."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            missing = f"{pattern!r} not in ...{self.seen[-300:]!r}"
            assert select.select([self.here], [], [], max(0, end - time.monotonic()))[0], missing
            try:
                data = os.read(self.here, 4096)
            except OSError:  # the other side is closed
                data = b""
            assert data, missing
            self.seen += data.decode(errors="replace")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text


def test_at_a_terminal(tireless: str, tmp_path: Path) -> None:
    model = [tireless, "--kv-cache-memory", "64MiB", "--max-tokens", "60000", "--ignore-eos"]
    terminal = Terminal([sys.executable, "-m", "vattention.cli", "chat", *model])
    try:
        terminal.expect("/help lists the commands", 120)
        terminal.expect(">>> ")
        terminal.type("Hello\n")
        terminal.expect(r"(?s)Hello\r\n.{20}")
        terminal.type("\x03")  # Ctrl-C stops the answer
        terminal.expect(r"\(stopped\)")
        terminal.expect(">>> ")
        terminal.type("half a line")
        terminal.expect("half a line")
        terminal.clear_line()
        terminal.type(f"/sabe\x7f\x7fve {tmp_path}/f\n")  # is edited
        terminal.expect(r"\(2 messages in")
        terminal.expect(">>> ")
        terminal.type('"""one\n')
        terminal.expect(r"\.\.\. ")
        terminal.type("two")
        terminal.expect("two")
        terminal.clear_line()  # drops all of it
        terminal.type("/memory\n")
        terminal.expect(r"when it ended: .* needed")
        terminal.expect(">>> ")
        terminal.type("\x1b[A\n")  # the line before
        terminal.expect(r"when it ended: .* needed")
        terminal.expect(">>> ")
        terminal.type("/set max_tokens 3\n/retry\n")
        terminal.expect(r"cut off after 3 tokens")  # the engine has survived
        terminal.expect(">>> ")
        terminal.type("\x04")  # Ctrl-D ends
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.here)
    hello, answer = json.loads((tmp_path / "f").read_text())
    assert hello == {"role": "user", "content": "Hello"}
    assert len(answer["content"]) >= 10


def test_with_output_elsewhere_the_prompt_is_on_standard_error(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"Hello\n"))
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", stdin)
    console = Console()
    assert console.read() == Entry("Hello")
    assert console.read() is None
    out, err = capfd.readouterr()
    assert (out, err.count(">>> ")) == ("", 2)
