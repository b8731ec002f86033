"""What a server is told, but for its model and its engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from vattention.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
LOG_FORMATS = ("json", "text")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The settings of a server. They are checked when it is made.

    Attributes:
        served_model_names: what clients may call the model. The first is what answers call it.
        api_keys: any of these is accepted; with none, whatever a client sends is. They are not part of the `repr`.
        cors_origins: origins whose pages may call the server, "*" for all. None: no CORS headers at all.
        max_body_bytes: of a request. A longer one is refused with 413, as soon as that is known.
        max_queue: answers that may wait beyond those that are computed, before 429 with Retry-After.
        max_tokens: of one answer: whoever asks for more gets this many, with finish_reason "length".
        max_samples: answers of one request: its prompts, times `n` or `best_of`.
        request_timeout: seconds from a request's first byte to the last one of its answer. None: any time.
        body_timeout: seconds in which the body of a request has to arrive.
        stall_timeout: seconds without a byte read after which a client that has an answer to read is cut off.
        drain_timeout: seconds that requests get to end when the server is told to stop.
        host, port: where it listens. Port 0: one that is free.
        log_prompts: write the bodies of requests to the log, so what people ask. Off unless asked for.
        log_level, log_format: "debug" to "critical"; "json", a line an event, or "text".
        chat_template: in place of the tokenizer's own: the template itself.
        warm: `/health` and `/ready` wait for what is compiled in the background, too.
        enable_metrics, enable_dashboard: serve `/metrics`, `/dashboard`.

    Raises:
        ConfigError: a value that cannot be; the message names the setting, and never shows a key.
        TypeError: a value of the wrong type.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    max_queue: int = 256
    max_tokens: int | None = None
    max_samples: int = 16
    request_timeout: float | None = None
    body_timeout: float = 60.0
    stall_timeout: float = 60.0
    drain_timeout: float = 30.0
    host: str = "127.0.0.1"
    port: int = 8000
    log_prompts: bool = False
    log_level: str = "info"
    log_format: str = "json"
    chat_template: str | None = None
    warm: bool = False
    enable_metrics: bool = True
    enable_dashboard: bool = True

    def __post_init__(self) -> None:
        for name in ("served_model_names", "api_keys", "cors_origins"):
            _strings(name, getattr(self, name))
        if not self.served_model_names:
            raise ConfigError("served_model_names: a model needs a name that clients can ask for")
        for number, key in enumerate(self.api_keys, 1):
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise ConfigError(f"api_keys: key {number} has a space or a character that no HTTP header can carry")
        _whole("max_body_bytes", self.max_body_bytes, 1)
        _whole("max_queue", self.max_queue, 0)
        _whole("max_samples", self.max_samples, 1)
        _whole("port", self.port, 0, 65535)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1)
        if self.request_timeout is not None:
            _seconds("request_timeout", self.request_timeout)
        _seconds("body_timeout", self.body_timeout)
        _seconds("stall_timeout", self.stall_timeout)
        _seconds("drain_timeout", self.drain_timeout, zero=True)
        if not isinstance(self.host, str):
            raise TypeError(f"host must be a str, not {type(self.host).__name__}")
        if self.chat_template is not None and not isinstance(self.chat_template, str):
            raise TypeError(f"chat_template must be a str or None, not {type(self.chat_template).__name__}")
        for name in ("warm", "log_prompts", "enable_metrics", "enable_dashboard"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, not {type(getattr(self, name)).__name__}")
        _one_of("log_level", self.log_level, LOG_LEVELS)
        _one_of("log_format", self.log_format, LOG_FORMATS)


def _strings(name: str, values: Any) -> None:
    if not isinstance(values, tuple) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{name} must be a tuple of str")
    if not all(value.strip() for value in values):
        raise ConfigError(f"{name}: an empty one means nothing")


def _whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < least or (most is not None and value > most):
        raise ConfigError(f"{name} is {value}: it must be {least} or more{'' if most is None else f', up to {most}'}")


def _seconds(name: str, value: Any, *, zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ConfigError(f"{name} is {value}: it must be a number of seconds, {'0 or more' if zero else 'above 0'}")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name} is {value!r}: use one of {', '.join(known)}")
