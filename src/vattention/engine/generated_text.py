"""The text of one sample: what its tokens say, up to the stop string that ends it."""

from __future__ import annotations

from collections.abc import Sequence

from vattention.engine.detokenizer import Detokenizer, Vocabulary
from vattention.engine.sampling_params import SamplingParams


class GeneratedText:
    """Grows with the tokens of a sample, and looks for its stop strings wherever token borders are."""

    def __init__(self, vocabulary: Vocabulary, params: SamplingParams) -> None:
        self._detokenizer = Detokenizer(vocabulary, skip_special_tokens=params.skip_special_tokens)
        self._stops = params.stop_strings
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._overlap = max((len(stop) for stop in self._stops), default=1) - 1
        self._parts: list[str] = []
        self._length = 0
        self._recent = ""  # the last `_overlap` characters: a stop string may have begun there
        self._fed = 0
        self._complete = False

    def update(self, tokens: Sequence[int], *, last: bool = False) -> str | None:
        """Take in the tokens that have come since the last call.

        Args:
            tokens: all tokens of the sample so far.
            last: no more will come. Later calls change nothing.

        Returns:
            The stop string that was found, if one was: the text ends there, and no more should come.
        """
        if self._complete:
            return None
        piece = self._detokenizer.feed(tokens[self._fed :], last=last)
        self._fed, self._complete = len(tokens), last
        self._parts.append(piece)
        self._length += len(piece)
        if not self._stops or not piece:
            return None
        recent, old = self._recent + piece, len(self._recent)
        self._recent = recent[len(recent) - min(self._overlap, len(recent)) :]
        found = first_stop(recent, self._stops, old) if self._fed > self._min_tokens else None
        if found is None:
            return None
        start, end, stop = found
        kept = self._length - len(recent) + (end if self._include_stop else start)
        self._parts, self._length, self._complete = ["".join(self._parts)[:kept]], kept, True
        return stop

    @property
    def text(self) -> str:
        """What may be shown: without an end that may yet turn out to be the beginning of a stop string."""
        whole = "".join(self._parts)
        self._parts = [whole]
        return whole[: self.shown]

    @property
    def shown(self) -> int:
        """Characters of `text`. It never becomes less."""
        return self._length - (0 if self._complete else beginning_of_stop(self._recent, self._stops))

    def since(self, seen: int) -> str:
        """`text` without its first `seen` characters. It costs what is returned, however long the text is."""
        if not seen:
            return self.text
        parts: list[str] = []
        missing = self._length - seen
        while missing > 0:
            part = self._parts[-1 - len(parts)]
            parts.append(part[-missing:])
            missing -= len(part)
        new = "".join(reversed(parts))
        return new[: self.shown - seen]


def first_stop(text: str, stops: Sequence[str], old: int) -> tuple[int, int, str] | None:
    """The stop string that is complete first, as (start, end, string); None if there is none.

    One that ends within the first `old` characters does not count. Of several that end together, the one that begins
    first. So the answer is the same however the text was cut into pieces.
    """
    found = [(start + len(s), start, s) for s in stops if (start := text.find(s, max(0, old - len(s) + 1))) >= 0]
    if not found:
        return None
    end, start, stop = min(found)
    return start, end, stop


def beginning_of_stop(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of `text` with which a stop string begins."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
