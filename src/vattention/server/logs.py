"""Lines of the log: JSON, or text. Keys never get into them."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, TextIO

from vattention.server.settings import ServerSettings

_LOGGER = logging.getLogger("vattention.server")
_LOGGERS = ("vattention.server", "uvicorn", "py.warnings")


def configure(settings: ServerSettings, stream: TextIO | None = None) -> None:
    """Send what the server and uvicorn have to say to `stream` (default: standard error), in the form of `settings`."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    kind = JsonLines if settings.log_format == "json" else TextLines
    handler.setFormatter(kind(secrets=settings.api_keys))
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(settings.log_level.upper())
        logger.propagate = False
    logging.captureWarnings(True)


class Written(io.TextIOBase):
    """A file whose lines become events: for those who write to standard error instead of logging."""

    def __init__(self) -> None:
        self._begun = ""

    def write(self, text: str) -> int:
        """Log each line that is whole now."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                _LOGGER.info(line.removeprefix("vattention: ").strip())
        return len(text)


class _Lines(logging.Formatter):
    """One line a record, without `secrets`, wherever they have come from: a path, a header, an exception."""

    def __init__(self, *, secrets: Sequence[str] = ()) -> None:
        super().__init__()
        # The longest first: one may be a part of another.
        self._secrets = sorted(secrets, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        event: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            event["exception"] = self.formatException(record.exc_info)
        return self.line({name: self._clean(value) for name, value in event.items()})

    def line(self, event: dict[str, Any]) -> str:
        """The event as one line."""
        raise NotImplementedError

    def _clean(self, value: Any) -> Any:
        if isinstance(value, str):
            for secret in self._secrets:
                value = value.replace(secret, "[api key]")
        return value


class JsonLines(_Lines):
    """An object a line."""

    def line(self, event: dict[str, Any]) -> str:
        """As JSON in ASCII, so that nothing a client sends can end the line or colour it."""
        return json.dumps(event, default=str)


class TextLines(_Lines):
    """Time, level and message, then `name=value`."""

    def line(self, event: dict[str, Any]) -> str:
        """As text; a value that is no plain word is written as JSON."""
        time, level, logger, message = (event.pop(name) for name in ("time", "level", "logger", "message"))
        where = logger.removeprefix("vattention.server").removeprefix(".") or "server"
        trace = event.pop("exception", None)
        words = [time, level.upper(), f"{where}:", _printable(message), *(f"{n}={_word(v)}" for n, v in event.items())]
        return " ".join(words) + ("" if trace is None else "\n" + trace)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _word(value: Any) -> str:
    plain = isinstance(value, str) and value.isascii() and value.isprintable() and not set(' "=') & set(value)
    return value if plain and value else json.dumps(value, default=str)
