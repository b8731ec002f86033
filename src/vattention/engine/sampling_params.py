"""How to turn logits into tokens, and when to stop. Names and defaults are vLLM's, because its users' hands know them.

Source of the names: https://docs.vllm.ai/en/latest/api/vllm/sampling_params.html
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vattention.errors import InvalidRequest

_NOT_BUILT: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "stop": (None, "", (), []),
    "min_tokens": (0,),
    "logprobs": (None,),
    "prompt_logprobs": (None,),
    "logit_bias": (None, {}),
}
"""Fields whose feature is not built, and the values that ask for nothing."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request wants.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it before sampling.
        max_tokens: tokens to generate at most; None: until `max_model_len`.
        seed: 0 to 2**64 - 1. A request's random numbers depend on it and on token positions alone, so the same seed
            and prompt give the same text in any company. None: drawn from the engine's seed and the request's number.
        ignore_eos: go on after an end-of-sequence token.
        stop_token_ids: tokens that end the text as well; the one that did is the last of `token_ids`.

    The other fields are accepted at the value that asks for nothing.

    Raises:
        TypeError: a value of the wrong type. InvalidRequest: one out of range, or a feature that is not built yet.
    """

    temperature: float = 1.0
    max_tokens: int | None = 16
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    n: int = 1
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, (int, float)):
            raise TypeError(f"temperature must be a number, not {type(self.temperature).__name__}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidRequest(f"temperature must be finite and not negative, got {self.temperature}")
        if self.max_tokens is not None:
            object.__setattr__(self, "max_tokens", whole("max_tokens", self.max_tokens, at_least=1))
        if self.seed is not None:
            object.__setattr__(self, "seed", whole("seed", self.seed, at_least=0, below=2**64))
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be a bool, not {type(self.ignore_eos).__name__}")
        if self.stop_token_ids is None or isinstance(self.stop_token_ids, (str, bytes)):
            raise TypeError("stop_token_ids must be a sequence of token ids")
        stop_ids = tuple(whole("a stop token id", token, at_least=0) for token in self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", stop_ids)
        for name, neutral in _NOT_BUILT.items():
            given = getattr(self, name)
            if isinstance(given, bool) or given not in neutral:
                raise InvalidRequest(f"{name}={given!r}: {name} is not built yet, leave it at {neutral[0]!r}")


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
