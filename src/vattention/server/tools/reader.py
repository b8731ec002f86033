"""From the text of an answer, as it comes, to content and tool calls."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

from vattention.engine.generated_text import beginning_of_stop
from vattention.server.tools.styles import Style

_HEAD = re.compile(
    r'\{\s{0,99}"name"\s{0,99}:\s{0,99}("(?:[^"\\]|\\.){0,999}")\s{0,99},\s{0,99}'
    r'"(?:arguments|parameters)"\s{0,99}:\s{0,99}(?=\{)'
)
"""A call up to its arguments, where these are an object and come second: they can be told of as they come."""

_ARGUMENTS = ("arguments", "parameters")

_BETWEEN_CALLS = " \t\r\n,;[]"


@dataclass(frozen=True)
class MessageDelta:
    """What a piece of text adds to a message.

    Attributes:
        content: text for people.
        tool_calls: pieces of calls in the shape of OpenAI's `delta.tool_calls`: `index`, and `id`, `type` and
            `function.name` in the first piece of each, and more of `function.arguments` in each. One for each call
            that the text is about.
    """

    content: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()


class AnswerReader(Protocol):
    """Reads the text of one answer as it comes. One for each sample."""

    def feed(self, text: str, *, last: bool) -> MessageDelta:
        """Take the next piece of text. `last`: there is no more."""


class PlainReader:
    """All of it is content."""

    def feed(self, text: str, *, last: bool) -> MessageDelta:
        """The text itself."""
        return MessageDelta(text)


class ToolReader:
    """Finds calls. However the text is cut into pieces, what is said of it, put together, is the same.

    What does not come to be a call of one of the tools is content, as it was written. Once the name and the beginning
    of its arguments have come, a call is one, though it may be cut off or go wrong from there. After a call, what was
    cut off before it came to be the next is left out.

    Args:
        style: how the model writes calls.
        names: of the tools.
        parallel: several calls count; otherwise those after the first are left out.
    """

    def __init__(self, style: Style, names: Collection[str], *, parallel: bool = True) -> None:
        self._style = style
        self._names = frozenset(names)
        self._parallel = parallel
        self._text = ""  # not read yet
        self._raw = ""  # read, and content if no call comes of it
        self._called = False  # since calls began, one has come
        self._call = _Call()
        self._count = 0
        self._content: list[str] = []
        self._pieces: dict[int, dict[str, Any]] = {}
        self._read: Callable[[bool], bool] = self._in_content if style.begin else self._at_start

    def feed(self, text: str, *, last: bool) -> MessageDelta:
        """Take the next piece of text. `last`: there is no more."""
        self._content, self._pieces = [], {}
        self._text += text
        while self._read(last):
            pass
        return MessageDelta("".join(self._content), tuple(self._pieces.values()))

    # Each of these reads on in one state, and returns whether there may be more to read, in the state that is next.

    def _at_start(self, last: bool) -> bool:
        """Where the answer is calls from its beginning on, or has none."""
        text = self._text.lstrip()
        rest = text.removeprefix(self._style.skip).lstrip()
        if rest.startswith("{"):
            self._raw = self._take(len(self._text) - len(rest))
            self._read = self._between
        elif last or (rest and not self._style.skip.startswith(text)):
            self._read = self._in_content
        else:
            return False
        return True

    def _in_content(self, last: bool) -> bool:
        """Up to where calls begin."""
        begin = self._style.begin
        at = self._text.find(begin) if begin else -1
        if at >= 0:
            self._say(self._take(len(self._text[:at].rstrip())))
            self._raw = self._take(self._text.index(begin) + len(begin))
            self._called = False
            self._read = self._between
            return True
        if last:
            text = self._take(len(self._text))
            if self._count:
                text = text[: len(text) - beginning_of_stop(text, [begin])].rstrip()
            self._say(text)
        elif begin:
            # White space before a call is no content.
            known = self._text[: len(self._text) - beginning_of_stop(self._text, [begin])]
            self._say(self._take(len(known.rstrip())))
        else:
            self._say(self._take(len(self._text)))
        return False

    def _between(self, last: bool) -> bool:
        """Before the next call, or the end of them."""
        end = self._style.end
        text = self._text.lstrip(_BETWEEN_CALLS)
        if not last and (not text or (end and text != end and end.startswith(text))):
            return False
        self._raw += self._take(len(self._text) - len(text))
        if text.startswith("{"):
            self._call = _Call()
            self._read = self._in_call
            return True
        if end and text.startswith(end):
            self._raw += self._take(len(end))
        elif self._count and end.startswith(text):  # cut off
            self._take(len(text))
            self._called = True
        self._no_more_calls()
        return True

    def _in_call(self, last: bool) -> bool:
        """Inside of a call."""
        call = self._call
        self._text = call.take(self._text)
        if call.name not in self._names:
            if not call.ended and not last:
                return False
            self._raw += call.text
            self._called = bool(self._count and last and not call.ended)
            self._no_more_calls()
            return True
        self._raw, self._called = "", True
        if call.index is None:
            call.index, self._count = self._count, self._count + 1
        news = call.news()
        if self._parallel or call.index == 0:
            self._tell(call, news)
        if call.ended:
            self._read = self._between
        return call.ended

    def _no_more_calls(self) -> None:
        if not self._called:
            self._say(self._raw)
        self._raw = ""
        self._read = self._in_content

    def _tell(self, call: _Call, news: str) -> None:
        assert call.index is not None
        if not call.told:
            call.told = True
            self._pieces[call.index] = {
                "index": call.index,
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": call.name, "arguments": news},
            }
        elif news:
            self._pieces[call.index] = {"index": call.index, "function": {"arguments": news}}

    def _say(self, text: str) -> None:
        if text:
            self._content.append(text)

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken


class _Call:
    """One call: a JSON object that comes in pieces.

    Attributes:
        text: all of it so far.
        name: of the function, once it is known.
        ended: the object is complete.
        index: of the call in its answer, once it counts.
        told: its first piece was handed out.
    """

    def __init__(self) -> None:
        self.text = ""
        self.name: str | None = None
        self.ended = False
        self.index: int | None = None
        self.told = False
        self._depth = 0
        self._in_string = self._escaped = False
        self._returns: list[int] = []  # where a value of the object ends that is an object or a list itself
        self._from: int | None = None  # what comes from here to the next of these are the arguments
        self._whole: str | None = None  # or this is them

    def take(self, text: str) -> str:
        """Read on; return what is behind the end of the object."""
        end = self._end(text)
        self.text += text[:end]
        if self.name is None:
            head = _HEAD.match(self.text)
            if head is not None:
                self.name, self._from = _decoded(head[1]), head.end()
            elif self.ended:
                self.name, self._whole = _understood(self.text)
        return text[end:]

    def news(self) -> str:
        """What has come of the arguments since the last call."""
        if self._from is None:
            whole, self._whole = self._whole or "", None
            return whole
        end = next((place for place in self._returns if place > self._from), None)
        news = self.text[self._from : end]
        self._from = len(self.text) if end is None else end
        if end is not None:
            self._returns = []
            self._from, self._whole = None, None
        return news

    def _end(self, text: str) -> int:
        """How much of `text` is of this object."""
        for place, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 1:
                    self._returns.append(len(self.text) + place + 1)
                elif self._depth <= 0:
                    self.ended = True
                    return place + 1
        return len(text)


def _decoded(name: str) -> str:
    try:
        return str(json.loads(name))
    except ValueError:
        return ""


def _understood(text: str) -> tuple[str | None, str | None]:
    """The name and the arguments of a whole call, in whatever order they are; None where it is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None, None
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None, None
    if len(call) > 1 and not any(key in call for key in _ARGUMENTS):
        return None, None
    given: Any = next((call[key] for key in _ARGUMENTS if call.get(key) is not None), {})
    # Some models write the arguments as text of JSON, as OpenAI's messages have them.
    return call["name"], given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
