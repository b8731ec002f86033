"""From the state of a request to what its caller sees."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import chain

from vattention.engine.detokenizer import Vocabulary
from vattention.engine.generated_text import GeneratedText
from vattention.engine.outputs import CompletionOutput, Logprobs, RequestMetrics, RequestOutput
from vattention.engine.request import Request


def update_text(sample: Request, vocabulary: Vocabulary | None, *, last: bool = False) -> str | None:
    """Bring the text of a sample up to date. Returns the stop string with which it ended just now, or None.

    Args:
        last: no more tokens will come.
    """
    if vocabulary is None or not sample.params.detokenize:
        return None
    if sample.text is None:
        sample.text = GeneratedText(vocabulary, sample.params)
    tokens = sample.output_token_ids
    by_token = sample.finish_reason == "stop" and not isinstance(sample.stop_reason, str) and tokens[-1] in sample.ends
    if by_token and not sample.params.include_stop_str_in_output:
        tokens = tokens[:-1]
    return sample.text.update(tokens, last=last)


@dataclass(eq=False)
class Seen:
    """How far one reader of a request has come: tokens and characters of each sample, and which have ended."""

    tokens: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    characters: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    ended: set[int] = field(default_factory=set)
    prompt: bool = False


def request_output(
    request: Request, vocabulary: Vocabulary | None, prompt: str | None = None, seen: Seen | None = None
) -> RequestOutput:
    """All samples of a request as they are now.

    Args:
        request: any of them.
        vocabulary: of the tokenizer, or None where there is none.
        prompt: the text of the prompt, if it was given as text.
        seen: leave out what this reader has seen, and samples with nothing new; brought up to date. It costs what is
            new then, however long the answer is.
    """
    leader = request.family[0]
    samples = leader.family if seen is None else [sample for sample in leader.family if _has_news(sample, seen)]
    scored = leader.params.prompt_logprobs is not None and not (seen and seen.prompt)
    outputs = tuple(_completion(sample, vocabulary, seen or Seen()) for sample in samples)
    if seen is not None:
        seen.prompt = seen.prompt or bool(outputs)
    return RequestOutput(
        request_id=leader.request_id,
        prompt=prompt,
        prompt_token_ids=leader.prompt_token_ids,
        outputs=outputs,
        finished=leader.all_finished,
        prompt_logprobs=tuple(leader.prompt_logprobs) if scored else None,
        metrics=_metrics(leader, {output.index: len(output.token_ids) for output in outputs}),
    )


def joined(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """What one reader was told of a request in several pieces, in one. It costs what they hold together."""
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]
    pieces: dict[int, list[CompletionOutput]] = {}
    for output in outputs:
        for piece in output.outputs:
            pieces.setdefault(piece.index, []).append(piece)
    times = zip(*(output.metrics.token_times for output in outputs), strict=True)
    return replace(
        last,
        outputs=tuple(_joined(pieces[index]) for index in sorted(pieces)),
        prompt_logprobs=next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None),
        metrics=replace(last.metrics, token_times=tuple(tuple(chain.from_iterable(sample)) for sample in times)),
    )


def _joined(pieces: Sequence[CompletionOutput]) -> CompletionOutput:
    last = pieces[-1]
    scored = last.logprobs is not None
    return replace(
        last,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(chain.from_iterable(piece.token_ids for piece in pieces)),
        cumulative_logprob=sum(piece.cumulative_logprob or 0.0 for piece in pieces) if scored else None,
        logprobs=tuple(chain.from_iterable(piece.logprobs or () for piece in pieces)) if scored else None,
    )


def _has_news(sample: Request, seen: Seen) -> bool:
    place = sample.sample
    return place not in seen.ended and (sample.finished or len(sample.output_token_ids) > seen.tokens[place])


def _completion(sample: Request, vocabulary: Vocabulary | None, seen: Seen) -> CompletionOutput:
    with suppress(Exception) if sample.error is not None else nullcontext():  # it may have ended with just that error
        update_text(sample, vocabulary, last=sample.finished)
    place = sample.sample
    start = seen.tokens[place]
    token_ids = tuple(sample.output_token_ids[start:])
    text = "" if sample.text is None else sample.text.since(seen.characters[place])
    logprobs = tuple(sample.logprobs[start:]) if sample.params.logprobs is not None else None
    seen.tokens[place] += len(token_ids)
    seen.characters[place] += len(text)
    if sample.finished:
        seen.ended.add(place)
    return CompletionOutput(
        index=place,
        text=text,
        token_ids=token_ids,
        cumulative_logprob=None if logprobs is None else _total(token_ids, logprobs),
        logprobs=logprobs,
        finish_reason=sample.finish_reason,
        stop_reason=sample.stop_reason,
    )


def _total(token_ids: Sequence[int], logprobs: Logprobs) -> float:
    return sum(entry[token].logprob for token, entry in zip(token_ids, logprobs, strict=False))


def _metrics(leader: Request, new: Mapping[int, int]) -> RequestMetrics:
    """`new`: of each sample, how many of its last tokens this is about."""
    first = min((sample.token_times[0] for sample in leader.family if sample.token_times), default=None)
    scheduled, arrival = leader.scheduled, leader.arrival
    return RequestMetrics(
        arrival_time=leader.arrival_time,
        queue_time=None if scheduled is None else scheduled - arrival,
        prefill_time=None if first is None or scheduled is None else first - scheduled,
        time_to_first_token=None if first is None else first - arrival,
        token_times=tuple(_times(sample, new.get(sample.sample, 0)) for sample in leader.family),
        preemptions=sum(sample.preemptions for sample in leader.family),
    )


def _times(sample: Request, count: int) -> tuple[float, ...]:
    times = sample.token_times
    return tuple(time - sample.arrival for time in times[len(times) - count :])
