"""JSON lines, in and out: files of any size, a line at a time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from vattention.errors import ConfigError, InvalidRequest

_CHUNK = 1 << 20


class LineReader:
    """The lines of a file or of standard input ("-"), with their numbers, from 1. Empty lines are left out.

    Raises:
        ConfigError: it cannot be opened or read.
    """

    def __init__(self, path: str) -> None:
        self._name = "standard input" if path == "-" else path
        with self._errors():
            self._descriptor = os.dup(sys.stdin.fileno()) if path == "-" else os.open(path, os.O_RDONLY)
        self._poll = select.poll()
        # A regular file cannot be waited for, and need not be: it is always ready.
        with contextlib.suppress(PermissionError):
            self._poll.register(self._descriptor, select.POLLIN)
        with self._errors():
            os.read(self._descriptor, 0)  # a directory can be opened, and then not be read
        self._rest = b""
        self._lines: list[bytes] = []  # the next one last
        self._number = 0
        self._ended = False

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def next(self, *, wait: bool) -> tuple[int, bytes] | None:
        """The next line and its number; None at the end, or where `wait` is False and none has come yet."""
        while True:
            while self._lines:
                self._number += 1
                if line := self._lines.pop().strip():
                    return self._number, line
            if self._ended or (not wait and not self._poll.poll(0)):
                return None
            self._read()
            if not wait and not self._lines:
                return None

    @property
    def ended(self) -> bool:
        """Whether no more lines will come."""
        return self._ended and not self._lines

    def _read(self) -> None:
        with self._errors():
            data = os.read(self._descriptor, _CHUNK)
        self._ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._ended:
            lines.append(self._rest)
        self._lines = lines[::-1]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"cannot read {self._name}: {error.strerror}") from None


def parse(number: int, line: bytes) -> dict[str, Any]:
    """The object in a line. Raises InvalidRequest, with the number of the line."""
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"line {number} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"line {number} is not JSON: {error.msg} at character {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise InvalidRequest(f"line {number} is not JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f'line {number} is not an object such as {{"prompt": "Once upon a time"}}')
    return value


class LineWriter:
    """Writes objects to a file, or to standard output for None, each a line, and each at once.

    Args:
        resume: keep what the file has. Its last line is cut off if it is not whole.

    Raises:
        ConfigError: it cannot be written, or is there already and `resume` is not asked for.
    """

    def __init__(self, path: str | None, *, resume: bool = False) -> None:
        self._name = path or "standard output"
        self._file: IO[bytes]
        with self._errors():
            if path is None:
                self._file = sys.stdout.buffer
                return
            if Path(path).is_file() and Path(path).stat().st_size and not resume:
                raise ConfigError(f"{path} is there already: go on with it (--resume), or remove it")
            self._file = open(path, "ab")  # noqa: SIM115
            if resume and Path(path).is_file():
                self._file.truncate(_whole_lines(path))

    def close(self) -> None:
        """Close the file."""
        if self._file is not sys.stdout.buffer:
            with self._errors():
                self._file.close()

    def write(self, value: Mapping[str, Any]) -> None:
        """Write one line. Raises ConfigError; BrokenPipeError where nobody reads any more."""
        try:
            line = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:  # an id with half of a surrogate pair
            line = json.dumps(value, allow_nan=False).encode()
        with self._errors():
            self._file.write(line + b"\n")
            self._file.flush()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ConfigError(f"cannot write {self._name}: {error.strerror}") from None


def _whole_lines(path: str) -> int:
    """Bytes up to the end of the last whole line."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _CHUNK)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            end = start
    return 0
