"""One pass of decodes whose numbers stay where they are: what a captured graph reads, and what changes between replays.

A graph replays the same kernels on the same addresses. So everything that differs from pass to pass is in tensors that
are made once and overwritten: tokens and positions, where K and V go, and, in the plan, slots and lengths.

A graph also has a fixed number of rows. Rows that no request needs are *padding*, and touch nothing that matters: they
compute a token that nobody asked for, look at the first token of the first request (which has pages), and write what
the first row writes to where it writes it, bit for bit. So they need neither a slot nor a page of their own, and no
kernel that knows of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from vattention.attention import cpu_write
from vattention.attention.base import Attend, Features, Layers, check_layer
from vattention.attention.placing import place
from vattention.errors import InvalidRequest, UnsupportedModel


class Plan(Protocol):
    """Attention of a fixed number of decodes, from numbers that it keeps in tensors of its own."""

    def update(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Overwrite the numbers of all rows, on the current stream. Slots may repeat."""

    @property
    def attend(self) -> Attend:
        """Computes a layer; asks the host for nothing that `update` changes."""


class DecodeBatch:
    """As `AttentionBatch`, for passes of at most `rows` requests with one new token each.

    Args:
        layers: where K and V live.
        rows: of each pass, padding included.
        plan: for that many rows.
        repeat: padding is the first request once more, which writes the same bits to the same place. It costs more to
            compute, and nothing to write: for passes that are padded when they are captured, and then no more.
        table: of a `PagedKVCache`, whose layers are `[blocks, block_size, kv_heads, width]`.

    Attributes:
        rows: see above.
        tokens, positions: the inputs of the model, `[rows]` int64 each, at addresses that never change.
    """

    def __init__(
        self, layers: Layers, rows: int, plan: Plan, *, repeat: bool = False, table: torch.Tensor | None = None
    ) -> None:
        self.rows = rows
        self._repeat = repeat
        self._table = table
        self._layers = layers
        self._plan = plan
        self._device = layers[0][0].device
        self._numbers = torch.zeros((5, rows), dtype=torch.int64, device=self._device)
        self.tokens, self.positions, self._slots, self._places, self._sources = self._numbers.unbind()
        self._written: set[int] = set()

    def update(self, tokens: Sequence[int], slots: Sequence[int], lengths: Sequence[int]) -> None:
        """The next pass: a token for each request, its slot, and the tokens it has then. On the current stream.

        Raises:
            InvalidRequest: none at all, more than `rows`, a slot that comes twice, or a length of 0.
        """
        count = len(tokens)
        distinct = count == len(set(slots)) == len(lengths)
        if not 0 < count <= self.rows or not distinct or min(lengths) < 1:
            raise InvalidRequest(f"{count} decodes in slots {list(slots)} do not make a pass of {self.rows} rows")
        more = self.rows - count
        positions = [length - 1 for length in lengths]
        padded = [*slots, *[slots[0]] * more]
        places = [*positions, *[positions[0]] * more]
        numbers = (
            [*tokens, *[tokens[0] if self._repeat else 0] * more],
            places if self._repeat else [*positions, *[0] * more],
            *(self._in_blocks(padded, places) if self._table is not None else (padded, places)),
            [*range(count), *[0] * more],
        )
        (new,) = place([[number for row in numbers for number in row]], self._device)
        self._numbers.copy_(new.view(5, self.rows))
        self._plan.update(padded, [*lengths, *[lengths[0] if self._repeat else 1] * more])

    def _in_blocks(self, slots: Sequence[int], positions: Sequence[int]) -> tuple[list[int], list[int]]:
        """Blocks, and places in them."""
        assert self._table is not None
        size = self._layers[0][0].shape[1]
        blocks = [int(self._table[slot, position // size]) for slot, position in zip(slots, positions, strict=True)]
        return blocks, [position % size for position in positions]

    def begin(self) -> None:
        """The model is about to run: each layer writes once."""
        self._written.clear()

    def compute(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, features: Features
    ) -> torch.Tensor:
        """As `AttentionBatch.compute`, with the errors of it."""
        if layer in self._written:
            raise UnsupportedModel(f"layer {layer} computes attention twice in one pass, and has room for one K and V")
        self._written.add(layer)
        keys, values = self._layers[layer]
        check_layer(layer, key, value, keys, values)
        if self._repeat and cpu_write.can(key, keys) and cpu_write.can(value, values):
            cpu_write.write(self._slots, self._places, key[0], value[0], keys, values)
            return self._plan.attend(query[0], keys, values, features)[None]
        for cache, new in ((keys, key[0]), (values, value[0])):
            by_row = new.transpose(0, 1)
            if not self._repeat and self.rows > 1:  # the same bits wherever the same place is written twice
                by_row = by_row.index_select(0, self._sources)
            cache.index_put_((self._slots, self._places), by_row)
        return self._plan.attend(query[0], keys, values, features)[None]
