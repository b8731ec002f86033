"""Log-probabilities of tokens: of the model itself, before penalties and temperature, in float32 (vLLM's default)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vattention.engine.outputs import Logprob

_ROWS = 32  # of a prompt worked on at once: a float32 copy of this many rows is what it costs in memory


def top_logprobs(
    logits: torch.Tensor, chosen: Sequence[int], wanted: Sequence[int], text_of: Callable[[int], str] | None
) -> list[dict[int, Logprob]]:
    """What there is to say about each row.

    Args:
        logits: `[n, vocabulary]`, any float dtype.
        chosen: the token that came, of each row.
        wanted: how many of the most likely tokens to list, of each row; -1: all.
        text_of: the text of a token, None where there is none.

    Returns:
        For each row, the chosen token first and then the most likely ones: token id -> Logprob.
    """
    result: list[dict[int, Logprob]] = []
    for at in range(0, len(chosen), _ROWS):
        part = slice(at, at + _ROWS)
        result += _top(logits[part], chosen[part], wanted[part], text_of)
    return result


def _top(
    logits: torch.Tensor, chosen: Sequence[int], wanted: Sequence[int], text_of: Callable[[int], str] | None
) -> list[dict[int, Logprob]]:
    values = logits.float().log_softmax(-1)
    of_chosen = values.gather(1, torch.tensor(chosen, device=values.device)[:, None])
    ranks = ((values > of_chosen).sum(-1) + 1).tolist()
    counts = [values.shape[1] if k < 0 else min(k, values.shape[1]) for k in wanted]
    best, ids = values.topk(max(counts), dim=-1)
    # Equally likely tokens in order of their ids; the sort keeps the order of what is equal.
    result = []
    rows = zip(chosen, of_chosen[:, 0].tolist(), ranks, counts, best.tolist(), ids.tolist(), strict=True)
    for token, value, rank, count, row_values, row_ids in rows:
        ordered = sorted(zip(row_values, row_ids, strict=True), key=lambda pair: (-pair[0], pair[1]))[:count]
        entry = {token: Logprob(value, rank, text_of(token) if text_of else None)}
        for place, (other, number) in enumerate(ordered, start=1):
            if number != token:
                entry[number] = Logprob(other, place, text_of(number) if text_of else None)
        result.append(entry)
    return result
