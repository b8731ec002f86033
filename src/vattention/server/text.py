"""From token ids to text, outside the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def text_of(tokenizer: Any | None, tokens: Sequence[int]) -> str:
    """The text of tokens, special ones included, as the engine writes it; nothing without a tokenizer."""
    if tokenizer is None:
        return ""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
