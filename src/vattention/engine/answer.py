"""From the state of a request to what its caller sees."""

from __future__ import annotations

from contextlib import nullcontext, suppress

from vattention.engine.detokenizer import Vocabulary
from vattention.engine.generated_text import GeneratedText
from vattention.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
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


def request_output(request: Request, vocabulary: Vocabulary | None, prompt: str | None = None) -> RequestOutput:
    """All samples of a request as they are now.

    Args:
        request: any of them.
        vocabulary: of the tokenizer, or None where there is none.
        prompt: the text of the prompt, if it was given as text.
    """
    leader = request.family[0]
    return RequestOutput(
        request_id=leader.request_id,
        prompt=prompt,
        prompt_token_ids=leader.prompt_token_ids,
        outputs=tuple(_completion(sample, vocabulary) for sample in leader.family),
        finished=leader.all_finished,
        prompt_logprobs=None if leader.params.prompt_logprobs is None else tuple(leader.prompt_logprobs),
        metrics=_metrics(leader),
    )


def _completion(sample: Request, vocabulary: Vocabulary | None) -> CompletionOutput:
    with suppress(Exception) if sample.error is not None else nullcontext():  # it may have ended with just that error
        update_text(sample, vocabulary, last=sample.finished)
    scored = sample.params.logprobs is not None
    chosen = [entry[token].logprob for token, entry in zip(sample.output_token_ids, sample.logprobs, strict=False)]
    return CompletionOutput(
        index=sample.sample,
        text="" if sample.text is None else sample.text.text,
        token_ids=tuple(sample.output_token_ids),
        cumulative_logprob=sum(chosen) if scored else None,
        logprobs=tuple(sample.logprobs) if scored else None,
        finish_reason=sample.finish_reason,
        stop_reason=sample.stop_reason,
    )


def _metrics(leader: Request) -> RequestMetrics:
    first = min((sample.token_times[0] for sample in leader.family if sample.token_times), default=None)
    scheduled, arrival = leader.scheduled, leader.arrival
    return RequestMetrics(
        arrival_time=leader.arrival_time,
        queue_time=None if scheduled is None else scheduled - arrival,
        prefill_time=None if first is None or scheduled is None else first - scheduled,
        time_to_first_token=None if first is None else first - arrival,
        token_times=tuple(tuple(time - arrival for time in sample.token_times) for sample in leader.family),
        preemptions=sum(sample.preemptions for sample in leader.family),
    )
