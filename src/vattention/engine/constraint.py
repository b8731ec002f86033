"""Which tokens may come next in one sample whose answer has a form: a function of the tokens that came."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from vattention.engine.grammar import Grammar, plain
from vattention.errors import VAttentionError


class Constraint:
    """Where one sample is in its grammar.

    End tokens come where the grammar may end, and nowhere else:
    - one of `ends` may come as soon as the text is whole, but not before `min_tokens` while it can go on;
    - a text that is whole and cannot go on is `complete`: it ends without an end token, whatever `min_tokens` and
      `ignore_eos` say;
    - a token of `ends` that the grammar takes for text, as a stop token of the caller may be, ends the text there.

    Args:
        grammar: of the form.
        ends: tokens that end the text, see `Request`.
        min_tokens: see `SamplingParams`.
    """

    def __init__(self, grammar: Grammar, ends: Collection[int], min_tokens: int) -> None:
        self._matcher = grammar.start.deep_copy()
        self._vocab_size = grammar.vocab_size
        self._eos = [token for token in grammar.eos if token < grammar.vocab_size]
        self._ends = sorted(ends)
        self._min_tokens = min_tokens
        self._taken = 0

    def complete(self, output: Sequence[int]) -> bool:
        """Whether the text of `output` is whole and nothing can come after it. Output only ever grows.

        Raises:
            VAttentionError: the tokens are not of the grammar.
        """
        self._catch_up(output)
        return bool(self._matcher.is_stopped())

    def allowed(self, output: Sequence[int]) -> npt.NDArray[np.bool_]:
        """The tokens that may come after `output`, `[vocabulary]`; at least one.

        Raises:
            VAttentionError: there is none, or finding out takes more than a step may take.
        """
        self._catch_up(output)
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(words, count=self._vocab_size, bitorder="little").view(np.bool_)
        whole = bool(self._matcher.is_accepting())
        early = len(output) < self._min_tokens
        if whole:
            allowed[self._eos] = False
            allowed[self._ends] = True
        if early:
            kept = allowed.copy()
            kept[self._ends] = False
            allowed = kept if kept.any() else allowed
        if whole and not allowed.any():  # nothing ends this text but what the caller says to ignore
            allowed[self._eos] = True
        if not allowed.any():  # the tokenizer may have tokens that the model has not
            raise VAttentionError("no token of the model can continue the text that structured output asks for")
        return allowed

    def _catch_up(self, output: Sequence[int]) -> None:
        new = list(output[self._taken :])
        if new:
            self._taken = len(output)
            self._matcher.consume_tokens(new)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise VAttentionError(f"structured output failed: {plain(self._matcher.get_error())}")
