"""What `generate` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]
"""An end token; as long as it may get (`max_tokens`, `max_model_len`, or all that the KV budget holds); cut off."""


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation of a prompt.

    Attributes:
        index: which of the request's samples.
        text: decoded without special tokens; empty when the model has no tokenizer.
        token_ids: what was generated, the end token included.
        finish_reason: why it ended, or None while it runs.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class RequestOutput:
    """One request: its prompt and what came of it.

    Attributes:
        prompt: the text given, or None for a prompt of token ids.
        outputs: one per sample.
        finished: nothing more will come.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
