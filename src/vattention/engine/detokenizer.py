"""Token ids to text as they come.

The text of two tokens together is not always that of one and of the other: a character may be spread over several
tokens, and some tokenizers drop the space at the beginning of what they decode. So tokens are decoded in a short window
that starts with tokens whose text is known already, and text is given out when no later token can change it. All that
is given out, put together, is what decoding all tokens at once gives.

Two things can still change:
- byte-level tokenizers decode bytes that do not (yet) make a character to U+FFFD, one for all bytes of a character that
  has begun. Only the last U+FFFD can still become something else;
- tokenizers with byte fallback (tokens called <0xE2>) decode a run of such tokens as a whole: one byte that does not
  fit changes all of the run. So nothing is given out before the run is over.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LONGEST_CHARACTER = 4  # bytes, and so tokens
_LONG_WINDOW = 16


class Vocabulary:
    """What a transformers tokenizer knows about its tokens, asked once for each.

    Text is never "cleaned up" (transformers' `clean_up_tokenization_spaces`): that takes back text given out before.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = frozenset(token for token, of in added.items() if of.special)
        self._text: dict[int, str] = {}
        self._is_byte: dict[int, bool] = {}

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of all of `tokens`, special ones included."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def text_of(self, token: int) -> str:
        """The text of a token on its own."""
        text = self._text.get(token)
        if text is None:
            text = self._text[token] = self.decode([token])
        return text

    def is_byte(self, token: int) -> bool:
        """Whether a token stands for a byte that the vocabulary has no character for."""
        known = self._is_byte.get(token)
        if known is None:
            name = self._tokenizer.convert_ids_to_tokens(token)
            known = self._is_byte[token] = isinstance(name, str) and _BYTE_TOKEN.fullmatch(name) is not None
        return known


class Detokenizer:
    """The text of one sequence of tokens, in pieces."""

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special if skip_special_tokens else frozenset()
        self._window: list[int] = []  # the last tokens whose text was given out, and those after them
        self._context = 0  # how many of the window's tokens are of the first kind
        self._given = 0  # characters of the window's text that were given out
        self._look_again = _LONG_WINDOW

    def feed(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Take the next tokens, and give out the text that is certain now; with `last`, all that there is."""
        new = [token for token in tokens if token not in self._skipped]
        self._window += new
        if not last and (not new or self._vocabulary.is_byte(new[-1])):
            return ""
        if not self._window:
            return ""
        text = self._vocabulary.decode(self._window)
        uncertain = not last and text.endswith(_UNKNOWN)
        piece = text[self._given : len(text) - uncertain]
        self._given += len(piece)
        if uncertain:
            self._shorten(text)
        else:
            # The new tokens are the context of those to come.
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._given = len(self._vocabulary.decode(self._window))
            self._look_again = _LONG_WINDOW
        return piece

    def _shorten(self, text: str) -> None:
        """Forget most of a window that never ends in a character, so that it is not decoded again and again."""
        if len(self._window) < self._look_again:
            return
        self._look_again = 2 * len(self._window)
        # A character that has begun has fewer bytes than a whole one: it begins after the cut.
        for kept in range(_LONGEST_CHARACTER, 2 * _LONGEST_CHARACTER):
            head, tail = self._window[:-kept], self._window[-kept:]
            after = self._vocabulary.decode(tail)
            if self._vocabulary.decode(head) + after == text:  # no character lies across
                self._window, self._context, self._given = tail, 0, len(after) - 1
                self._look_again = _LONG_WINDOW
                return
