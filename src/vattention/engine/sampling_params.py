"""How to turn logits into tokens, and when to stop. Names and defaults are vLLM's, because its users' hands know them.

Source of the names: https://docs.vllm.ai/en/latest/api/vllm/sampling_params.html
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from vattention.engine.structured import StructuredOutput
from vattention.errors import InvalidRequest

_MOST_SAMPLES = 16_384  # more is a slip of the hand, and would be felt before it is noticed
_MOST_BIAS = 100.0


class RequestOutputKind(Enum):
    """What the outputs of `AsyncLLM` hold while a request runs; `LLM` returns all there is at the end."""

    CUMULATIVE = 0
    """Everything so far, each time. It costs what has been generated: use it where answers are short."""
    DELTA = 1
    """What came since the reader's last output. Of the samples, those with something new."""
    FINAL_ONLY = 2
    """Nothing before the end, then everything."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request wants.

    The order of things is vLLM's: logit bias, penalties, `min_tokens` and `structured`, temperature, `min_p`, `top_k`,
    `top_p`.

    Attributes:
        n: samples of one prompt, each with random numbers of its own. At temperature 0 they would be equal: refused.
        temperature: 0 takes the most likely token; otherwise logits are divided by it before sampling.
        top_k: sample from the k most likely tokens; 0 or -1: from all.
        top_p: sample from the fewest most likely tokens that have this probability together, in (0, 1].
        min_p: drop tokens less likely than this share of the most likely one's probability, 0 to 1.
        repetition_penalty: logits of tokens in the prompt or the text are divided by it where positive, multiplied
            elsewhere; above 0, 1 changes nothing.
        presence_penalty: taken from the logits of tokens in the text; -2 to 2.
        frequency_penalty: taken from the logits of tokens in the text as often as they are there; -2 to 2.
        logit_bias: token id -> what is added to its logit, -100 to 100.
        seed: 0 to 2**64 - 1. A request's random numbers depend on it, on the sample and on token positions alone, so
            the same seed and prompt give the same text in any company. None: drawn from the engine's seed and the
            request's number.
        max_tokens: tokens to generate at most; None: until `max_model_len`.
        min_tokens: no end token may come, and no stop string counts, before there are this many tokens.
        ignore_eos: go on after an end-of-sequence token.
        stop: strings that end the text; kept as a tuple. The text ends before the one that is complete first.
        stop_token_ids: tokens that end the text as well; the one that did is the last of `token_ids`.
        include_stop_str_in_output: the text ends with what stopped it: the string, or the end token's text.
        logprobs: log-probabilities to return for each generated token: of the most likely ones, and always of the one
            chosen; 0: only of that one; -1: of the whole vocabulary; None: none.
        prompt_logprobs: the same for each token of the prompt but the first.
        detokenize: make text. Without it `stop` cannot work.
        skip_special_tokens: leave special tokens out of the text.
        structured: the form that the answer must have, see `StructuredOutput`. It goes before all else that is asked
            for: the answer ends where nothing can be added to it, whatever `min_tokens` and `ignore_eos` say, and end
            tokens come only where it may end. Stop strings and stop tokens that are text end it wherever they are.
        output_kind: what outputs that come while the request runs hold.

    Raises:
        TypeError: a value of the wrong type. InvalidRequest: one out of range, or values that exclude each other.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        for name in ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, not {type(getattr(self, name)).__name__}")
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise TypeError(f"structured must be a StructuredOutput, not {type(self.structured).__name__}")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise TypeError(f"output_kind must be a RequestOutputKind, not {type(self.output_kind).__name__}")
        _number("temperature", self.temperature, at_least=0)
        _number("top_p", self.top_p, above=0, at_most=1)
        _number("min_p", self.min_p, at_least=0, at_most=1)
        _number("repetition_penalty", self.repetition_penalty, above=0)
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), at_least=-2, at_most=2)
        self._set("n", whole("n", self.n, at_least=1, below=_MOST_SAMPLES + 1))
        self._set("top_k", max(0, whole("top_k", self.top_k, at_least=-1)))
        self._set("min_tokens", whole("min_tokens", self.min_tokens, at_least=0))
        if self.max_tokens is not None:
            self._set("max_tokens", whole("max_tokens", self.max_tokens, at_least=1))
        if self.seed is not None:
            self._set("seed", whole("seed", self.seed, at_least=0, below=2**64))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._set(name, whole(name, getattr(self, name), at_least=-1))
        self._set("stop", _strings(self.stop))
        if self.stop_token_ids is None or isinstance(self.stop_token_ids, (str, bytes)):
            raise TypeError("stop_token_ids must be a sequence of token ids")
        self._set("stop_token_ids", tuple(whole("a stop token id", t, at_least=0) for t in self.stop_token_ids))
        if self.logit_bias is not None:
            self._set("logit_bias", _bias(self.logit_bias))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.n > 1 and self.temperature == 0:
            raise InvalidRequest(f"n={self.n} samples at temperature 0 would be equal: leave n at 1")
        if self.stop and not self.detokenize:
            raise InvalidRequest("stop strings are looked for in the text: leave detokenize on")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` in the form it is kept in."""
        return self.stop or ()  # type: ignore[return-value]

    @property
    def penalises(self) -> bool:
        """Whether tokens that were there before are treated differently."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def truncates(self) -> bool:
        """Whether unlikely tokens are dropped."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def whole(what: str, value: object, *, at_least: int, below: int | None = None) -> int:
    """`value` as an int in `[at_least, below)`.

    Raises:
        TypeError: not a whole number (a bool is none). InvalidRequest: out of range.
    """
    if isinstance(value, bool):
        raise TypeError(f"{what} must be a whole number, not a bool")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{what} must be a whole number, not {type(value).__name__}") from None
    if number < at_least or (below is not None and number >= below):
        limits = f"at least {at_least}" if below is None else f"from {at_least} to {below - 1}"
        raise InvalidRequest(f"{what} must be {limits}, got {number}")
    return number


def _number(
    what: str, value: object, *, at_least: float | None = None, above: float | None = None, at_most: float | None = None
) -> float:
    """Check that `value` is a finite number within its limits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} must be a number, not {type(value).__name__}")
    limits = [
        text
        for limit, text, inside in (
            (at_least, f"at least {at_least:g}" if at_least is not None else "", lambda low: value >= low),
            (above, f"above {above:g}" if above is not None else "", lambda low: value > low),
            (at_most, f"at most {at_most:g}" if at_most is not None else "", lambda high: value <= high),
        )
        if limit is not None and not inside(limit)
    ]
    # A whole number too large for a float is as good as infinite.
    if limits or abs(value) > 1.7e308 or not math.isfinite(value):
        raise InvalidRequest(f"{what} must be {' and '.join(limits) or 'finite'}, got {value}")
    return value


def _strings(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    given = [stop] if isinstance(stop, str) else stop
    if isinstance(given, bytes) or not isinstance(given, Sequence) or not all(isinstance(s, str) for s in given):
        raise TypeError("stop must be a string or a sequence of strings")
    if not all(given):
        raise InvalidRequest("an empty stop string would end every text: leave it out")
    return tuple(given)


def _bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise TypeError(f"logit_bias must map token ids to numbers, not {type(bias).__name__}")
    return {
        whole("a token id of logit_bias", token, at_least=0): float(
            _number(f"logit_bias of token {token}", value, at_least=-_MOST_BIAS, at_most=_MOST_BIAS)
        )
        for token, value in bias.items()
    }
