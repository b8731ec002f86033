"""What a server is told at its start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How to serve a model.

    Attributes:
        served_model_names: what requests may call the model; the first is what answers call it.
        api_keys: any of these opens the door; none: any key does, and none too.
        cors_origins: pages of these origins may call from a browser.
        max_body_bytes: of one request.
        max_queue: samples that may wait beyond those computed at once, before new requests are told 429.
        max_tokens: of one answer; None: as many as fit the model.
        max_samples: of one request: `n`, or the number of prompts times `n`.
        request_timeout: seconds until an answer is cut off; None: never.
        drain_timeout: seconds that answers under way have left once the server is told to end.
        host, port: where it listens.
        log_prompts: write prompts and answers into the log.
        log_level, log_format: of the log.
        chat_template: in place of the model's own.
        enable_metrics, enable_dashboard: whether there are `/metrics` and `/dashboard`.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    max_queue: int = 256
    max_tokens: int | None = None
    max_samples: int = 16
    request_timeout: float | None = None
    drain_timeout: float = 30.0
    host: str = "127.0.0.1"
    port: int = 8000
    log_prompts: bool = False
    log_level: str = "info"
    log_format: Literal["json", "text"] = "json"
    chat_template: str | None = None
    enable_metrics: bool = True
    enable_dashboard: bool = True
