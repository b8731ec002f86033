"""A pass cut in two: the decodes, which have one row each, and the requests that have several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from vattention.attention.base import Attend, Features, Segment
from vattention.attention.decode_plan import DecodeRows
from vattention.attention.placing import place


def decodes_apart(
    segments: Sequence[Segment],
    device: torch.device,
    decode: Callable[[DecodeRows], Attend],
    prompts: Callable[[Sequence[Segment]], Attend],
) -> Attend:
    """Attention of a pass, from kernels for each part. Each is prepared by the first layer, if there are such requests.

    Args:
        decode: for those with a single row.
        prompts: for the others; their rows are neighbours in the query that it gets, whatever lies between them here.
    """
    single = [segment for segment in segments if segment.rows == 1]
    several = [segment for segment in segments if segment.rows > 1]

    @functools.cache
    def parts() -> list[tuple[slice | torch.Tensor, Attend]]:
        made: list[tuple[slice | torch.Tensor, Attend]] = []
        if single:
            rows = DecodeRows([s.slot for s in single], [s.length for s in single], device=device)
            made.append((_rows(single, device), decode(rows)))
        if several:
            made.append((_rows(several, device), prompts(_as_neighbours(several))))
        return made

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        made = parts()
        if len(made) == 1:  # of all rows
            return made[0][1](query, keys, values, features)
        out = query.new_empty((query.shape[1], query.shape[0], values.shape[3]))
        for rows, part in made:
            out[rows] = part(query[:, rows], keys, values, features)
        return out

    return attend


def _rows(segments: Sequence[Segment], device: torch.device) -> slice | torch.Tensor:
    """Those of the batch that belong to `segments`: a slice where they are neighbours, else `[rows]` int64."""
    rows = [row for segment in segments for row in range(segment.start, segment.end)]
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return place([rows], device)[0]


def _as_neighbours(segments: Sequence[Segment]) -> list[Segment]:
    moved: list[Segment] = []
    for segment in segments:
        moved.append(Segment(segment.slot, moved[-1].end if moved else 0, segment.rows, segment.length))
    return moved
