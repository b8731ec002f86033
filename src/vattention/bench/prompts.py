"""Prompts of given lengths, the same every time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vattention.errors import ConfigError


@dataclass(frozen=True)
class TestPrompt:
    """Token ids, and whether they are "text" or "random"."""

    token_ids: tuple[int, ...]
    kind: str


def spread(count: int, longest: int) -> list[int]:
    """`count` lengths from 1 to `longest`, each the same factor longer than the one before.

    Raises:
        ConfigError: a number below 1.
    """
    if count < 1 or longest < 1:
        raise ConfigError("the number of prompts and the longest of them must be at least 1")
    if count == 1:
        return [longest]
    return [round(longest ** (index / (count - 1))) for index in range(count)]


def make_prompts(lengths: Sequence[int], vocab_size: int, tokenizer: Any | None, *, seed: int) -> list[TestPrompt]:
    """A prompt of each length: random token ids and passages of English text in turn, or random ids alone without a
    tokenizer. Raises ConfigError for a length below 1."""
    if any(length < 1 for length in lengths):
        raise ConfigError("a prompt has at least one token")
    source = random.Random(seed)
    text = _text_ids(tokenizer, max(lengths))
    prompts = []
    for index, length in enumerate(lengths):
        if index % 2 and len(text) >= length:
            start = source.randrange(len(text) - length + 1)
            prompts.append(TestPrompt(tuple(text[start : start + length]), "text"))
        else:
            prompts.append(TestPrompt(tuple(source.randrange(vocab_size) for _ in range(length)), "random"))
    return prompts


def _text_ids(tokenizer: Any | None, longest: int) -> list[int]:
    """Token ids of much more than `longest` tokens of English: Python's own reference, which is on every machine."""
    if tokenizer is None:
        return []
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    characters = 40 * longest + 10_000
    text = "\n".join(topics[name] for name in sorted(topics))[:characters]
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids
