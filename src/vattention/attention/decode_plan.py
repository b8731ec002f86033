"""Decodes, one new token each, as numbers that stay where they are: what a captured graph reads.

A pass that is replayed from a CUDA graph runs the same calls on the same addresses every time. Whatever differs between
passes (which slots, how long) therefore lives in tensors that are made once and overwritten before each replay:

    plan = choose.decode_plan(rows, bound=bound, dtype=dtype, device=device)   # for a number of rows, once
    plan.update(slots, lengths)                             # before a pass or a replay, on its stream
    plan.attend(query, keys, values, features)              # each layer; at least once before it is captured

A pass that has fewer requests than the plan has rows fills up with rows that name a slot again. These are padding: what
is computed for any but the first row of a slot means nothing. `attention.decode_batch` makes such passes.

What an eager pass needs for its decodes is the same, made for that pass alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from vattention.attention.base import Attend
from vattention.attention.placing import place
from vattention.errors import InvalidRequest

Derive = Callable[[Sequence[int], Sequence[int]], Sequence[Sequence[int]]]
"""`(slots, lengths) -> lists`, as many and as long every time."""


class DecodeRows:
    """The slots and lengths of a fixed number of decodes, and whatever kernels derive from them.

    Args:
        slots: where the K and V of each row are.
        lengths: tokens of each, the new one included; at least 1.

    Attributes:
        slots, lengths: on the host, as last given.
        bound: no length will be larger. Kernels choose by it how they divide their work.
        slots_there: `slots` on the device, `[rows]` int64.
    """

    def __init__(
        self, slots: Sequence[int], lengths: Sequence[int], *, device: torch.device, bound: int | None = None
    ) -> None:
        self._device = device
        self._kept: dict[Hashable, tuple[Derive, torch.dtype, tuple[torch.Tensor, ...]]] = {}
        self._watchers: dict[Hashable, Callable[[Sequence[int], Sequence[int]], None]] = {}
        self.bound = max(lengths) if bound is None else bound
        self.slots, self.lengths = self._checked(slots, lengths, len(slots))
        (self.slots_there,) = self.keep("slots", lambda slots, _: [slots], torch.int64)

    def __len__(self) -> int:
        return len(self.slots)

    def update(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Overwrite all numbers, on the current stream. As many as before.

        Raises:
            InvalidRequest: another number of rows, or a length outside 1..bound. Nothing has changed then.
        """
        self.slots, self.lengths = self._checked(slots, lengths, len(self))
        for derive, dtype, tensors in self._kept.values():
            for tensor, new in zip(tensors, place(derive(self.slots, self.lengths), self._device, dtype), strict=True):
                tensor.copy_(new)
        for watcher in self._watchers.values():
            watcher(self.slots, self.lengths)

    def keep(self, key: Hashable, derive: Derive, dtype: torch.dtype = torch.int32) -> tuple[torch.Tensor, ...]:
        """The lists that `derive` makes, as tensors on the device that follow every update. Made once a `key`."""
        if key not in self._kept:
            self._refuse_capture()
            self._kept[key] = derive, dtype, place(derive(self.slots, self.lengths), self._device, dtype)
        return self._kept[key][2]

    def watch(self, key: Hashable, watcher: Callable[[Sequence[int], Sequence[int]], None]) -> None:
        """Have `watcher(slots, lengths)` called now, and at every update. Once a `key`."""
        if key not in self._watchers:
            self._refuse_capture()
            watcher(self.slots, self.lengths)
            self._watchers[key] = watcher

    def _checked(
        self, slots: Sequence[int], lengths: Sequence[int], rows: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not rows == len(slots) == len(lengths) or not all(1 <= length <= self.bound for length in lengths):
            raise InvalidRequest(
                f"a plan for {rows} rows of 1 to {self.bound} tokens got {len(slots)} slots and lengths"
                f" {list(lengths)}: make another plan"
            )
        return tuple(slots), tuple(lengths)

    def _refuse_capture(self) -> None:
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise InvalidRequest("numbers of a plan must be made before a graph is captured: run the pass once before")


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """Attention of decodes whose slots and lengths change in place. Made by `choose.decode_plan`.

    Attributes:
        rows: the numbers.
        attend: computes a layer, see `Attend`: reads no number from the host, so that it may be captured, once it has
            run for each kind of layer. Raises UnsupportedModel for a layer that no kernel computes in this way.
    """

    rows: DecodeRows
    attend: Attend

    def update(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Overwrite the numbers of all rows, see `DecodeRows.update`."""
        self.rows.update(slots, lengths)
