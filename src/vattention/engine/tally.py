"""What an engine has done since it was opened: a few numbers a pass, a few more when a request ends."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import get_args

from vattention.engine.histogram import SECONDS, TOKENS, Distribution, Histogram
from vattention.engine.outputs import FinishReason
from vattention.engine.request import Chunk, Request


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Everything since the engine was opened.

    A request for n samples is n sequences: what each of them has for itself is counted for each, what they have in
    common once. Requests that were aborted or failed are in `ended` and in what had happened until then, but not in
    what is only known at the end (`e2e_latency` and below).

    Attributes:
        passes: forward passes.
        rows: tokens computed in them. prompt_rows: those that were of a prompt. Both count a token again that is
            computed again, after a preemption for instance.
        prompt_tokens: of the prompts that have been computed, each request's once.
        generated_tokens: of all sequences.
        preemptions: how often a sequence had to give its slot back for lack of memory.
        ended: sequences of requests that are over, by `FinishReason`.
        queue_time: seconds from a request's arrival to its first pass. prefill_time: from there to its first token.
        time_to_first_token: the sum of both.
        inter_token_latency: seconds between two tokens of a sequence, preemptions included.
        e2e_latency: seconds from a request's arrival to its end.
        decode_time: seconds from the first to the last token of a sequence.
        time_per_output_token: that, divided by the tokens after the first; of sequences that have any.
        request_prompt_tokens: length of the prompts. request_generation_tokens: of the sequences.
    """

    passes: int
    rows: int
    prompt_rows: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    ended: Mapping[str, int]
    queue_time: Distribution
    prefill_time: Distribution
    time_to_first_token: Distribution
    inter_token_latency: Distribution
    e2e_latency: Distribution
    decode_time: Distribution
    time_per_output_token: Distribution
    request_prompt_tokens: Distribution
    request_generation_tokens: Distribution


class Tally:
    """Counts for one engine, in its thread."""

    def __init__(self) -> None:
        self._passes = self._rows = self._prompt_rows = self._prompt_tokens = self._generated_tokens = 0
        self._ended: Counter[str] = Counter()
        self._queue_time = Histogram(SECONDS)
        self._prefill_time = Histogram(SECONDS)
        self._time_to_first_token = Histogram(SECONDS)
        self._inter_token_latency = Histogram(SECONDS)
        self._e2e_latency = Histogram(SECONDS)
        self._decode_time = Histogram(SECONDS)
        self._time_per_output_token = Histogram(SECONDS)
        self._request_prompt_tokens = Histogram(TOKENS)
        self._request_generation_tokens = Histogram(TOKENS)

    def passed(self, chunks: Sequence[Chunk]) -> None:
        """A forward pass has computed these."""
        self._passes += 1
        for chunk in chunks:
            self._rows += chunk.end - chunk.start
            self._prompt_rows += max(0, min(chunk.end, len(chunk.request.prompt_token_ids)) - chunk.start)

    def token(self, sample: Request) -> None:
        """A sequence has got a token; its time is the last of `token_times`."""
        self._generated_tokens += 1
        times = sample.token_times
        if len(times) > 1:
            self._inter_token_latency.observe(times[-1] - times[-2])
        elif not sample.sample:
            self._prompt_tokens += len(sample.prompt_token_ids)
            began = times[0] if sample.scheduled is None else sample.scheduled
            self._queue_time.observe(began - sample.arrival)
            self._prefill_time.observe(times[0] - began)
            self._time_to_first_token.observe(times[0] - sample.arrival)

    def over(self, leader: Request) -> None:
        """Nothing more will come of any sequence of this request. Once for each request."""
        for sample in leader.family:
            reason = sample.finish_reason or "abort"
            self._ended[reason] += 1
            times = sample.token_times
            if reason not in ("stop", "length") or not times:
                continue
            self._request_generation_tokens.observe(len(times))
            self._decode_time.observe(times[-1] - times[0])
            if len(times) > 1:
                self._time_per_output_token.observe((times[-1] - times[0]) / (len(times) - 1))
        if all(sample.finish_reason in ("stop", "length") for sample in leader.family):
            self._e2e_latency.observe(time.monotonic() - leader.arrival)
            self._request_prompt_tokens.observe(len(leader.prompt_token_ids))

    def now(self, *, preemptions: int) -> Totals:
        """All of it, with what the scheduler counts."""
        return Totals(
            passes=self._passes,
            rows=self._rows,
            prompt_rows=self._prompt_rows,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=preemptions,
            ended=MappingProxyType({reason: self._ended[reason] for reason in get_args(FinishReason)}),
            queue_time=self._queue_time.now(),
            prefill_time=self._prefill_time.now(),
            time_to_first_token=self._time_to_first_token.now(),
            inter_token_latency=self._inter_token_latency.now(),
            e2e_latency=self._e2e_latency.now(),
            decode_time=self._decode_time.now(),
            time_per_output_token=self._time_per_output_token.now(),
            request_prompt_tokens=self._request_prompt_tokens.now(),
            request_generation_tokens=self._request_generation_tokens.now(),
        )
