"""From logits to tokens, over the batch.

Each token takes one random number, and the cumulative distribution in float64 turns it into a token. Rows that ask for
nothing special take no part in what the others need; a batch of greedy rows is one argmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vattention.engine import cpu_largest
from vattention.engine.adjustment import Adjustment, adjust
from vattention.engine.randomness import uniform
from vattention.engine.sampling_params import SamplingParams
from vattention.engine.truncation import truncate
from vattention.errors import VAttentionError


@dataclass(frozen=True, slots=True)
class Row:
    """How to sample one row of logits.

    Attributes:
        seed, sample, position: the name of its random number; `position` is that of the token being sampled.
        adjustment: what its logits are changed by first, or None.
    """

    params: SamplingParams
    seed: int
    position: int
    sample: int = 0
    adjustment: Adjustment | None = None


def sample(logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row.

    Args:
        logits: `[rows, vocabulary]`, any float dtype; not changed.
        rows: how to sample each.

    Raises:
        VAttentionError: a row with no largest number (NaN, or nothing but -inf): the model's arithmetic failed.
    """
    if not rows:
        return []
    largest, tokens = cpu_largest.largest(logits)
    _check_finite(largest)
    changed = [i for i, row in enumerate(rows) if row.adjustment is not None]
    adjusted = None
    if changed:
        adjusted = logits[changed].double()
        adjust(adjusted, [a for row in rows if (a := row.adjustment) is not None])
        largest = largest.double()
        largest[changed], tokens[changed] = adjusted.max(dim=-1)
        _check_finite(largest)
    warm = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if warm:
        weights = adjusted if adjusted is not None and warm == changed else logits[warm].double()
        if adjusted is not None and weights is not adjusted:
            both = [(to, changed.index(i)) for to, i in enumerate(warm) if rows[i].adjustment is not None]
            if both:
                to, origin = zip(*both, strict=True)
                weights[list(to)] = adjusted[list(origin)]
        tokens[warm] = _draw(weights, largest[warm], [rows[i] for i in warm])
    chosen: list[int] = tokens.tolist()
    return chosen


def _check_finite(largest: torch.Tensor) -> None:
    if not bool(torch.isfinite(largest).all()):
        raise VAttentionError(
            f"the model's logits are not finite in {largest.dtype}: damaged weights, or a dtype with too small a range"
        )


def _draw(weights: torch.Tensor, largest: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Inverse transform sampling, `[rows]` int64; `weights` are logits in float64, and are overwritten."""
    temperature = torch.tensor([row.params.temperature for row in rows], dtype=torch.float64, device=weights.device)
    # The largest is taken away before the division: no temperature, however small, can overflow.
    weights.sub_(largest.double()[:, None]).div_(temperature[:, None]).exp_()
    cut = [i for i, row in enumerate(rows) if row.params.truncates]
    if len(cut) == len(rows):
        truncate(weights, [row.params for row in rows])
    elif cut:
        part = weights[cut]
        truncate(part, [rows[i].params for i in cut])
        weights[cut] = part
    cumulative = weights.cumsum_(dim=-1)
    numbers = uniform([row.seed for row in rows], [row.sample for row in rows], [row.position for row in rows])
    total = cumulative[:, -1:]
    target = torch.from_numpy(numbers).to(weights.device)[:, None] * total
    # The first token whose cumulative weight exceeds the target: never one of weight zero, though the product may have
    # been rounded up to the total.
    target = torch.minimum(target, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
