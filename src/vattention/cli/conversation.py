"""A conversation: what is entered, what is answered, and the commands that begin with a slash."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from vattention.cli.answers import Answers, Piece
from vattention.cli.console import QUOTES, Console, Entry
from vattention.cli.settings import Settings
from vattention.errors import InvalidRequest, VAttentionError

HELP = f"""\
/help                what you read
/system [TEXT]       show or set the system prompt, for the answers to come; "" for none
/set [NAME [VALUE]]  list the settings, show one, or change it ("default" brings the first value back)
/memory              what the KV cache took for the last answer
/retry               answer the last message again
/undo                take the last message and its answer back
/reset               begin a new conversation; the system prompt and the settings stay
/save FILE           write the messages as JSON
/quit                end, as Ctrl-D does
Everything else is a message. Text between {QUOTES} and {QUOTES} may have several lines; // at the beginning stands for
a message that begins with /. Ctrl-C stops an answer, or clears the line."""

_ROOM = "/reset begins a new conversation, /undo takes the last message back, /save FILE keeps all of them"


@dataclass
class Conversation:
    """The messages so far, and how to go on.

    Attributes:
        system: the system prompt; "" for none.
        turns: messages without it, from the user and the assistant in turn.
        unanswered: the last message, if nothing came of it. It is not among `turns`.
        failed: whether that has happened, or a command was refused.
    """

    answers: Answers
    console: Console
    settings: Settings
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    unanswered: str | None = None
    failed: bool = False

    def run(self) -> bool:
        """Go on until the input ends, or /quit. Returns whether everything was answered and obeyed."""
        while (entry := self.console.read()) is not None:
            if not self.take(entry):
                break
        return not self.failed

    def take(self, entry: Entry) -> bool:
        """Answer or obey one entry. Returns False for the last."""
        text = entry.text
        if not text.strip():
            return True
        if entry.quoted or not text.startswith("/"):
            self.say(text)
        elif text.startswith("//"):
            self.say(text[1:])
        else:
            name, _, rest = text[1:].strip().partition(" ")
            if name == "quit" and not rest:
                return False
            try:
                self._obey(name, rest.strip())
            except InvalidRequest as error:
                self._fail(str(error))
        return True

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system prompt, if there is one, and the turns."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def say(self, text: str) -> None:
        """Send a message and show its answer as it comes. What came of an answer that was cut off is kept."""
        asked = {"role": "user", "content": text}
        clock = _Clock()
        answer, last, stopped, problem = "", None, False, None
        try:
            with (
                self.console.interruptible() as interrupted,
                closing(self.answers.stream([*self.messages, asked], self.settings.params)) as pieces,
            ):
                for piece in pieces:
                    clock.note(piece)
                    self.console.show(piece.text)
                    answer, last = answer + piece.text, piece
                    if interrupted() and piece.finish_reason is None:
                        stopped = True
                        break
        except KeyboardInterrupt:
            if not self.console.interactive:
                raise
            stopped = True
        except VAttentionError as error:
            problem = " ".join(str(error).split())
        complete = last is not None and last.finish_reason is not None
        if answer or complete or stopped:
            self.console.show("\n")
        if answer or complete:
            self.turns += [asked, {"role": "assistant", "content": answer}]
            self.unanswered = None
        else:
            self.unanswered = text
        self._explain(last, stopped, problem)
        if self.settings.stats and last is not None and last.tokens:
            self.console.note(clock.summary(last))

    def _explain(self, last: Piece | None, stopped: bool, problem: str | None) -> None:
        """Why an answer ended, where it was not its own end."""
        if problem is not None:
            kept = "what came is kept" if self.unanswered is None else "the message waits for /retry"
            self._fail(f"{problem}; {kept}; {_ROOM}")
        elif stopped:
            self.console.note("(stopped)" if self.unanswered is None else "(stopped; the message waits for /retry)")
        elif last is not None and last.finish_reason == "length":
            limit = self.settings.params.max_tokens
            if last.tokens == limit:
                self.console.note(f"(cut off after {limit} tokens: /set max_tokens {2 * limit} allows more)")
            else:
                total = last.prompt_tokens + last.tokens
                self.console.note(f"(cut off: with {total} tokens the conversation is as long as it may be; {_ROOM})")

    def _fail(self, problem: str) -> None:
        self.failed = True
        self.console.note(f"error: {problem}")

    # -- commands ---------------------------------------------------------------------------------------------------

    def _obey(self, name: str, rest: str) -> None:
        with_text: dict[str, Callable[[str], None]] = {"system": self._system, "set": self._set, "save": self._save}
        alone: dict[str, Callable[[], None]] = {
            "help": lambda: self._tell(HELP),
            "memory": lambda: self._tell(self.answers.memory()),
            "retry": self._retry,
            "undo": self._undo,
            "reset": self._reset,
            "quit": lambda: None,  # `take` knows it
        }
        if name in with_text:
            with_text[name](rest)
        elif name not in alone:
            raise InvalidRequest(f"there is no command /{name}: /help lists them, // begins a message with a slash")
        elif rest:
            raise InvalidRequest(f"/{name} stands alone")
        else:
            alone[name]()

    def _tell(self, text: str) -> None:
        self.console.show(text, end="\n")

    def _system(self, text: str) -> None:
        if not text:
            self._tell(self.system or "(no system prompt)")
        else:
            self.system = "" if text == '""' else text

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if not name:
            self._tell("\n".join(self.settings.lines()))
        elif value.strip():
            self.settings.set(name, value.strip())
        else:
            self._tell(self.settings.shown(name))

    def _retry(self) -> None:
        if self.unanswered is not None:
            self.say(self.unanswered)
        elif self.turns:
            *self.turns, asked, answer = self.turns
            self.say(asked["content"])
            if self.unanswered is not None:  # nothing came: the answer that was there is better
                self.turns, self.unanswered = [*self.turns, asked, answer], None
        else:
            raise InvalidRequest("there is no message to answer again")

    def _undo(self) -> None:
        if self.unanswered is not None:
            self.unanswered = None
        elif self.turns:
            del self.turns[-2:]
        else:
            raise InvalidRequest("there is no message to take back")

    def _reset(self) -> None:
        self.turns.clear()
        self.unanswered = None

    def _save(self, path: str) -> None:
        if not path:
            raise InvalidRequest("say where: /save FILE")
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(self.messages, file, ensure_ascii=False, indent=1)
                file.write("\n")
        except (OSError, ValueError) as error:  # a name with a null character is a ValueError
            raise InvalidRequest(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
        self.console.note(f"({len(self.messages)} messages in {path})")


class _Clock:
    """How long an answer takes."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._first: float | None = None

    def note(self, piece: Piece) -> None:
        """A piece has come."""
        self._last = time.monotonic()
        if piece.tokens and self._first is None:
            self._first = self._last

    def summary(self, last: Piece) -> str:
        """One line about an answer with at least one token."""
        first = self._last if self._first is None else self._first
        text = f"{last.prompt_tokens} tokens in, {last.tokens} out; first token after {first - self._began:.2f} s"
        return f"({text}{self._speed(last.tokens - 1, self._last - first)})"

    @staticmethod
    def _speed(tokens: int, seconds: float) -> str:
        return f", then {tokens / seconds:.1f} tokens/s" if tokens and seconds else ""
