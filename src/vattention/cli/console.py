"""Where the lines of a conversation come from, and where it is shown: a terminal, a pipe or a file."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vattention.errors import ConfigError

PROMPT, MORE = ">>> ", "... "
QUOTES = '"""'


@dataclass(frozen=True)
class Entry:
    """What was entered at once. `quoted`: between triple quotes, where nothing is a command."""

    text: str
    quoted: bool = False


class Console:
    """Reads entries and shows answers.

    With a terminal on both sides lines are edited, and the up key brings earlier ones back. Only answers and what
    commands show go to standard output; the prompt goes there too if that is a terminal.

    Attributes:
        interactive: somebody types.
    """

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        self._to_terminal = sys.stdout.isatty()
        self._line = 0
        if self.interactive and self._to_terminal:
            with contextlib.suppress(ImportError):  # some builds of Python have none
                import readline  # noqa: F401  # from here on `input` edits lines

    def read(self) -> Entry | None:
        """The next entry; None at the end. At a terminal, Ctrl-C drops what has been typed so far.

        Raises:
            ConfigError: standard input is not UTF-8 text.
        """
        while True:
            try:
                return self._entry()
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.note("")

    def show(self, text: str, end: str = "") -> None:
        """Write to standard output, at once. A terminal is shown control characters, and does not obey them."""
        sys.stdout.write((_visible(text) if self._to_terminal else text) + end)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """A line about the conversation, which is not part of it."""
        print(_visible(text), file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[Callable[[], bool]]:
        """Turns the first Ctrl-C into an answer to "was there one?", asked between two tokens; a second one raises.

        Where nobody types, Ctrl-C does what it always does.
        """
        if not self.interactive:
            yield lambda: False
            return
        pressed = False

        def press(*_: Any) -> None:
            nonlocal pressed
            if pressed:
                raise KeyboardInterrupt
            pressed = True

        before = signal.signal(signal.SIGINT, press)
        try:
            yield lambda: pressed
        finally:
            signal.signal(signal.SIGINT, before)

    def _entry(self) -> Entry | None:
        line = self._read_line(PROMPT)
        if line is None:
            return None
        if not line.lstrip().startswith(QUOTES):
            return Entry(line)
        lines = [line.lstrip().removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            more = self._read_line(MORE)
            if more is None:
                return Entry("\n".join(lines), quoted=True)
            lines.append(more)
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return Entry("\n".join(lines).strip("\n"), quoted=True)

    def _read_line(self, prompt: str) -> str | None:
        self._line += 1
        try:
            if self.interactive and self._to_terminal:
                line = input(prompt)
            else:
                if self.interactive:
                    print(prompt, end="", file=sys.stderr, flush=True)
                content = sys.stdin.buffer.readline()
                if not content:
                    return None
                line = content.decode("utf-8-sig" if self._line == 1 else "utf-8").rstrip("\r\n")
        except EOFError:
            self.note("")
            return None
        except UnicodeDecodeError as error:
            raise ConfigError(f"line {self._line} of standard input is not UTF-8 text: {error.reason}") from None
        # A terminal's bytes that are no text come as halves of surrogate pairs, which are no text either.
        return line.encode("utf-8", "replace").decode()


def _visible(text: str) -> str:
    """Control characters but line ends and tabs spelled out: what a model says must not move the cursor."""
    return "".join(c if c in "\n\t" or c.isprintable() or not _controls(c) else repr(c)[1:-1] for c in text)


def _controls(character: str) -> bool:
    return ord(character) < 32 or 127 <= ord(character) < 160
