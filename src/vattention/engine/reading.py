"""From the logits of a pass to what they say for each request. Nothing is changed here: a failure can be done over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from vattention.engine import sampler
from vattention.engine.attempt import attempt
from vattention.engine.logprobs import top_logprobs
from vattention.engine.outputs import Logprob
from vattention.engine.request import Chunk, Request

TextOf = Callable[[int], str] | None
"""The text of a token; None where there is no tokenizer."""

Entries = list[dict[int, Logprob]]


@dataclass(frozen=True, slots=True)
class New:
    """A token of a sample, and its log-probabilities where asked for."""

    token: int
    logprobs: dict[int, Logprob] | None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a pass has brought. An error in place of a result is that of one request alone.

    Attributes:
        scores: for each chunk the log-probabilities of its part of the prompt; an empty list where none are asked for.
        samples: who gets a token.
        new: what each of `samples` gets.
    """

    scores: list[Entries | Exception]
    samples: list[Request]
    new: list[New | Exception]


def read(chunks: Sequence[Chunk], logits: torch.Tensor, text_of: TextOf) -> Reading:
    """Read the logits that `Runner.forward` returned for `chunks`."""
    scores: list[Entries | Exception] = []
    samples: list[Request] = []
    rows: list[int] = []
    row = 0
    for chunk in chunks:
        request, scored = chunk.request, len(chunk.scored)
        part = logits[row : row + scored]
        scores.append(attempt(partial(_score, chunk, part, text_of)) if scored else [])
        row += scored
        if chunk.samples:
            # The others have the same prompt, and so the same logits.
            new = request.family if request.unbranched else [request]
            samples += new
            rows += [row] * len(new)
            row += 1
    if rows != list(range(len(logits))):
        logits = logits[rows]
    return Reading(scores, samples, _draw(samples, logits, text_of))


def _score(chunk: Chunk, logits: torch.Tensor, text_of: TextOf) -> Entries:
    tokens = chunk.request.tokens(chunk.scored.start + 1, chunk.scored.stop + 1)
    return top_logprobs(logits, tokens, [chunk.request.params.prompt_logprobs or 0] * len(tokens), text_of)


def _draw(samples: Sequence[Request], logits: torch.Tensor, text_of: TextOf) -> list[New | Exception]:
    """The next token of each sample, from its row of `logits`."""
    if not samples:
        return []
    new = attempt(lambda: _draw_all(samples, logits, text_of))
    if not isinstance(new, Exception):
        return list(new)
    if len(samples) == 1:
        return [new]
    # One of them spoils it for the others; one by one, it does not.
    return [each for i, sample in enumerate(samples) for each in _draw([sample], logits[i : i + 1], text_of)]


def _draw_all(samples: Sequence[Request], logits: torch.Tensor, text_of: TextOf) -> list[New]:
    tokens = sampler.sample(logits, [_row(sample) for sample in samples])
    scored = [i for i, sample in enumerate(samples) if sample.params.logprobs is not None]
    entries: dict[int, dict[int, Logprob]] = {}
    if scored:
        part = logits if len(scored) == len(samples) else logits[scored]
        wanted = [samples[i].params.logprobs or 0 for i in scored]
        entries = dict(zip(scored, top_logprobs(part, [tokens[i] for i in scored], wanted, text_of), strict=True))
    return [New(token, entries.get(i)) for i, token in enumerate(tokens)]


def _row(sample: Request) -> sampler.Row:
    adjustment = None if sample.adjuster is None else sample.adjuster.next(sample.output_token_ids)
    return sampler.Row(sample.params, sample.seed, sample.num_tokens, sample.sample, adjustment)
