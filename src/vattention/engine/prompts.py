"""From what a caller gives as a prompt to token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from vattention.engine.chat import Message, chat_text
from vattention.errors import InvalidRequest

Prompt = str | Mapping[str, Any]
"""Text, `{"prompt": text}` or `{"prompt_token_ids": [int, ...]}`."""


class TokenizedPrompt(NamedTuple):
    """The text of a prompt, None where it was given as token ids, and its token ids, not checked yet."""

    text: str | None
    token_ids: Sequence[int]


def tokenize(tokenizer: Any | None, prompt: object, *, add_special_tokens: bool = True) -> TokenizedPrompt:
    """Take a `Prompt` apart.

    Args:
        tokenizer: of transformers; None serves token ids only.
        add_special_tokens: those that the tokenizer begins or ends a text with.

    Raises:
        TypeError: no `Prompt`. InvalidRequest: a dictionary with other keys, text that is not Unicode, or no tokenizer
            for it.
    """
    if isinstance(prompt, Mapping):
        if len(prompt) != 1 or next(iter(prompt)) not in ("prompt", "prompt_token_ids"):
            raise InvalidRequest('a prompt dictionary has one key, "prompt" or "prompt_token_ids"')
        if "prompt_token_ids" in prompt:
            ids = prompt["prompt_token_ids"]
            if not hasattr(ids, "__len__"):  # what has no end would never be read to its end
                raise TypeError(f"prompt_token_ids must be a sequence of ints, not {type(ids).__name__}")
            return TokenizedPrompt(None, ids)
        prompt = prompt["prompt"]
    if not isinstance(prompt, str):
        raise TypeError(
            f"a prompt is a str or a dictionary, not {type(prompt).__name__};"
            ' token ids go into {"prompt_token_ids": [...]}'
        )
    return TokenizedPrompt(prompt, text_ids(tokenizer, prompt, add_special_tokens=add_special_tokens))


def tokenize_chat(tokenizer: Any | None, messages: Sequence[Message], **options: Any) -> TokenizedPrompt:
    """Put a conversation into the model's chat template. `options` are those of `chat_text`, errors too."""
    text = chat_text(tokenizer, messages, **options)
    # The template has written its own special tokens.
    return TokenizedPrompt(text, text_ids(tokenizer, text, add_special_tokens=False))


def text_ids(tokenizer: Any | None, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The token ids of a text. Raises InvalidRequest for one that is not Unicode, or without a tokenizer."""
    if tokenizer is None:
        raise InvalidRequest("this model came without a tokenizer: pass prompt_token_ids")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        raise InvalidRequest(f"the text is not Unicode: {error.reason} at character {error.start}") from None
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
    return ids


@contextmanager
def naming(what: str, count: int) -> Iterator[None]:
    """Say which of several prompts an error is about."""
    try:
        yield
    except (InvalidRequest, TypeError) as error:
        if count == 1:
            raise
        raise type(error)(f"{what}: {error}") from None
