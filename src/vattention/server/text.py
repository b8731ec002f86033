"""From token ids to text and bytes, outside the engine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def text_of(tokenizer: Any | None, tokens: Sequence[int]) -> str:
    """The text of tokens, special ones included, as the engine writes it; nothing without a tokenizer."""
    if tokenizer is None:
        return ""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def bytes_of(tokenizer: Any | None, token: int, text: str) -> bytes:
    """The bytes of a token. Where its own text is no whole character, the vocabulary knows which bytes it stands for.

    Args:
        text: of the token alone.
    """
    if tokenizer is None or "\N{REPLACEMENT CHARACTER}" not in text:
        return text.encode()
    name = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(name, str):
        return text.encode()
    byte = _BYTE_TOKEN.fullmatch(name)
    if byte is not None:
        return bytes([int(byte[1], 16)])
    spelled = [_SPELLED.get(character) for character in name]
    return text.encode() if None in spelled else bytes(each for each in spelled if each is not None)


def _byte_characters() -> dict[str, int]:
    """How byte-level vocabularies (GPT-2's) spell bytes: printable ones as themselves, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_SPELLED = _byte_characters()
