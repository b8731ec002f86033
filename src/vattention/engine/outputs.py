"""What `generate` returns. Names are vLLM's where it has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
"""An end token or a stop string; as long as it may get (`max_tokens`, `max_model_len`, or all that the KV budget
holds); cut off; failed, see `Request.error`."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely the model found a token in its place.

    Attributes:
        logprob: the natural logarithm of its probability.
        rank: 1 for the most likely token.
        decoded_token: its text on its own; None when the model has no tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


Logprobs = tuple[Mapping[int, Logprob], ...]
"""For each token of a text: token id -> Logprob, the token itself first."""


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One continuation of a prompt, or what is new of it (`RequestOutputKind.DELTA`).

    Attributes:
        index: which of the request's samples.
        text: what `token_ids` decode to, up to the stop; empty when the model has no tokenizer. While the sample runs
            it may lag behind: half a character, or what may be the beginning of a stop string, is not shown.
        token_ids: what was generated, the end token or the tokens of the stop string included.
        cumulative_logprob: the sum over `token_ids`; None unless `logprobs` was asked for.
        logprobs: one for each of `token_ids`; None unless asked for.
        finish_reason: why it ended, or None while it runs.
        stop_reason: the stop string or the stop token id that ended it; None for an end-of-sequence token.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """Where the time of one request went, in seconds.

    Attributes:
        arrival_time: when it was added, since the epoch.
        queue_time: from its arrival to its first pass; None before that.
        prefill_time: from its first pass to its first token.
        time_to_first_token: the sum of both.
        token_times: for each sample, when each of its tokens came, since the arrival: those that the output is about.
        preemptions: how often a sample had to give its slot back.
    """

    arrival_time: float
    queue_time: float | None
    prefill_time: float | None
    time_to_first_token: float | None
    token_times: tuple[tuple[float, ...], ...]
    preemptions: int


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """One request: its prompt and what came of it.

    Attributes:
        prompt: the text given, or None for a prompt of token ids.
        outputs: one per sample, in order; with `RequestOutputKind.DELTA` those with something new.
        finished: nothing more will come.
        prompt_logprobs: None for the first token, then one for each; None unless asked for. With
            `RequestOutputKind.DELTA` they come with the first tokens.
        metrics: where the time went.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    prompt_logprobs: tuple[Mapping[int, Logprob] | None, ...] | None = None
    metrics: RequestMetrics
