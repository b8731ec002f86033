"""What changes logits before temperature: bias, penalties, and tokens that may not come here.

Work is in proportion to the tokens concerned, not to the vocabulary: entries of all rows are gathered, changed and
put back by one operation each.

Source: the order and the formulas are vLLM's; the repetition penalty is from CTRL (Keskar et al., arXiv 1909.05858).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vattention.engine.constraint import Constraint
from vattention.engine.sampling_params import SamplingParams

Ids = npt.NDArray[np.int64]
_FEW = 64  # distinct tokens that there is room for at first


class Seen:
    """The distinct tokens of a request, and how often each was generated.

    A function of the request's token ids, kept up to date as they come: a token costs a dictionary look-up.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        distinct = np.unique(np.array(prompt, dtype=np.int64))
        self._size = len(distinct)
        self._ids = np.concatenate([distinct, np.zeros(_FEW, np.int64)])
        self._counts = np.zeros(self._size + _FEW, np.float64)
        self._where = {token: i for i, token in enumerate(distinct.tolist())}
        self._outputs = 0

    def catch_up(self, output: Sequence[int]) -> Seen:
        """Count the tokens of `output` that have come since the last call."""
        for token in output[self._outputs :]:
            where = self._where.get(token)
            if where is None:
                where = self._where[token] = self._size
                if where == len(self._ids):
                    self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                    self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
                self._ids[where] = token
                self._size += 1
            self._counts[where] += 1
        self._outputs = len(output)
        return self

    @property
    def ids(self) -> Ids:
        """`[distinct]`, in no particular order."""
        return self._ids[: self._size]

    @property
    def counts(self) -> npt.NDArray[np.float64]:
        """How often each of `ids` was generated, `[distinct]`; 0 for those that are in the prompt alone."""
        return self._counts[: self._size]


@dataclass(frozen=True, slots=True)
class Adjustment:
    """The changes to one row of logits.

    Attributes:
        bias_ids, bias: tokens, and what is added to their logits; or None.
        seen: the tokens that the penalties are about, or None.
        repetition, presence, frequency: see `SamplingParams`.
        banned: tokens that may not come, or None.
        allowed: whether each token may come, `[vocabulary]` bool, or None for all of them.
    """

    bias_ids: Ids | None = None
    bias: npt.NDArray[np.float64] | None = None
    seen: Seen | None = None
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    banned: Ids | None = None
    allowed: npt.NDArray[np.bool_] | None = None


class Adjuster:
    """The adjustments of one sample, one token after another."""

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        ends: Collection[int],
        constraint: Constraint | None = None,
    ) -> None:
        self._params = params
        self._constraint = constraint
        self._seen = Seen(prompt) if params.penalises else None
        self._bias_ids: Ids | None = None
        self._bias: npt.NDArray[np.float64] | None = None
        self._banned: Ids | None = None
        if params.logit_bias:
            self._bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
            self._bias = np.array(list(params.logit_bias.values()), dtype=np.float64)
        if params.min_tokens and ends and constraint is None:  # which sees to that itself
            self._banned = np.array(sorted(ends), dtype=np.int64)

    @classmethod
    def needed(
        cls,
        prompt: Sequence[int],
        params: SamplingParams,
        ends: Collection[int],
        constraint: Constraint | None = None,
    ) -> Adjuster | None:
        """An adjuster where `params` ask for something that one does, or None."""
        asked = params.penalises or params.logit_bias or (params.min_tokens and ends) or constraint is not None
        return cls(prompt, params, ends, constraint) if asked else None

    def next(self, output: Sequence[int]) -> Adjustment | None:
        """What the logits of the token after `output` are changed by, or None."""
        params = self._params
        banned = self._banned if len(output) < params.min_tokens else None
        allowed = None if self._constraint is None else self._constraint.allowed(output)
        if banned is None and allowed is None and self._bias is None and self._seen is None:
            return None
        return Adjustment(
            bias_ids=self._bias_ids,
            bias=self._bias,
            seen=self._seen.catch_up(output) if self._seen else None,
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            banned=banned,
            allowed=allowed,
        )


def adjust(logits: torch.Tensor, adjustments: Sequence[Adjustment]) -> None:
    """Change `logits`, `[n, vocabulary]` float64 and contiguous, in place: row i by adjustment i."""
    flat = logits.view(-1)
    biased = [(i, a.bias_ids, a.bias) for i, a in enumerate(adjustments) if a.bias_ids is not None]
    if biased:
        where = _flat_index(logits, [(i, ids) for i, ids, _ in biased])
        flat[where] += torch.from_numpy(np.concatenate([bias for _, _, bias in biased])).to(logits.device)
    penalised = [(i, a, a.seen) for i, a in enumerate(adjustments) if a.seen is not None]
    if penalised:
        where = _flat_index(logits, [(i, seen.ids) for i, _, seen in penalised])
        lengths = [len(seen.ids) for _, _, seen in penalised]
        settings = np.array([(a.repetition, a.presence, a.frequency) for _, a, _ in penalised])
        each = torch.from_numpy(np.repeat(settings, lengths, axis=0)).to(logits.device)
        counts = torch.from_numpy(np.concatenate([seen.counts for _, _, seen in penalised])).to(logits.device)
        old = flat[where]
        new = torch.where(old > 0, old / each[:, 0], old * each[:, 0])
        new -= each[:, 2] * counts + each[:, 1] * (counts > 0)
        # An extreme penalty must not make infinities that are then divided by one another.
        largest = torch.finfo(new.dtype).max / 4
        flat[where] = new.clamp_(-largest, largest)
    banned = [(i, a.banned) for i, a in enumerate(adjustments) if a.banned is not None]
    if banned:  # last: nothing brings such a token back
        flat[_flat_index(logits, banned)] = -torch.inf
    masks = [(i, a.allowed) for i, a in enumerate(adjustments) if a.allowed is not None]
    if masks:
        allowed = torch.from_numpy(np.stack([mask for _, mask in masks])).to(logits.device)
        if len(masks) == len(logits):
            logits.masked_fill_(~allowed, -torch.inf)
        else:
            rows = [i for i, _ in masks]
            logits[rows] = logits[rows].masked_fill_(~allowed, -torch.inf)


def _flat_index(logits: torch.Tensor, parts: Sequence[tuple[int, Ids | None]]) -> torch.Tensor:
    """Where the tokens of (row, ids) parts are in the flat view of `logits`, one part after another."""
    width = logits.shape[1]
    index = np.concatenate([row * width + ids for row, ids in parts if ids is not None])
    return torch.from_numpy(index).to(logits.device)
