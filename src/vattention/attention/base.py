"""What attention needs to know about one forward pass, and the door through which transformers calls us.

A forward pass is a flat batch `[1, rows]`: the new tokens of several requests, one after another, without padding.
Everything that depends on the batch is worked out once, in `AttentionBatch.build`, and travels to every layer as one
keyword argument; there is no global state.

Source: https://huggingface.co/docs/transformers/main/en/attention_interface. The name is not registered as a *mask*
interface, so transformers builds no mask; causality is the kernel's business. What users name in `attn_implementation`,
with masks and transformers' own caches, is in `attention.generate`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from vattention.attention import cpu_write
from vattention.attention.placing import place
from vattention.errors import InvalidRequest, UnsupportedModel

NAME = "vattention_batch"
"""What the engine's `attn_implementation` and the keyword argument that carries the `AttentionBatch` are called."""

LAYER = "vattention_layer"
"""The attribute of attention modules that holds `layer_idx` as a tensor, set by whoever compiles the model."""

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""K and V of every layer, `[slots, padded_len, kv_heads, width]` each; heads and widths may differ between layers, and
the width of V may be another than that of K. Made by `engine.runner.layer_views`."""


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What one layer asks of attention beyond causality. The defaults are plain causal attention.

    Attributes:
        scaling: of the scores; None means 1/sqrt(width of K).
        window: keys a row sees, itself included; None: all before it.
        softcap: scores become softcap * tanh(score / softcap), after scaling and before masking.
        sinks: `[q_heads]`, one more score in each row's softmax, whose weight goes nowhere.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Features], torch.Tensor]
"""`(query [q_heads, rows, width], keys, values, features) -> [rows, q_heads, width of V]` for one layer.

`keys` and `values` are a whole layer, `[slots, padded_len, kv_heads, width]`, the new tokens already written. A kernel
reads tokens `[0, length)` of the slots in the batch and nothing else: what lies past `length` may be unmapped, another
request's leftovers, or NaN.
"""

_HARMLESS = frozenset({"position_ids"})
"""Keyword arguments with a value that cannot change what attention computes: positions are in q and k already."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one request in a flat batch.

    Attributes:
        slot: where its K and V live.
        start: its first row.
        rows: new tokens in this pass, at least one; the last `rows` of its `length` tokens.
        length: tokens after this pass, the new ones included.
    """

    slot: int
    start: int
    rows: int
    length: int

    @property
    def cached(self) -> int:
        """Tokens written by earlier passes."""
        return self.length - self.rows

    @property
    def end(self) -> int:
        """One past its last row."""
        return self.start + self.rows


class Kernel(Protocol):
    """A kernel family: prepares whatever depends on the batch alone, and returns what each layer calls."""

    def __call__(self, segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> Attend:
        """Prepare one forward pass over `segments`, in the dtype and on the device of the cache."""


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """One forward pass, as attention sees it. Made by `build`.

    Attributes:
        segments: one a request, in row order.
        layers: where K and V live.
        attend: the kernel, prepared for these segments.
        singles: how many leading segments have one row; their K and V are written by one call.
        single_slots, single_positions: where to, `[singles]` int64 each.
        places: in a paged cache where each row's K and V go, `[rows]` int64, counted in tokens from the first block
            on; None where slots are contiguous.
    """

    segments: tuple[Segment, ...]
    layers: Layers
    attend: Attend
    singles: int
    single_slots: torch.Tensor
    single_positions: torch.Tensor
    places: torch.Tensor | None = None
    _written: set[int] = field(default_factory=set)

    @classmethod
    def build(
        cls, segments: Sequence[Segment], layers: Layers, kernel: Kernel, *, table: torch.Tensor | None = None
    ) -> AttentionBatch:
        """Precompute what every layer shares.

        Args:
            table: of a `PagedKVCache`, whose layers are `[blocks, block_size, kv_heads, width]`; the kernel must know
                of it too.

        Raises:
            InvalidRequest: segments that do not tile the rows, share a slot, or leave the cache.
        """
        keys = layers[0][0]
        if table is None:
            _check(segments, slots=keys.shape[0], padded_len=keys.shape[1])
        else:
            _check(segments, slots=table.shape[0], padded_len=table.shape[1] * keys.shape[1])
        singles = next((i for i, segment in enumerate(segments) if segment.rows > 1), len(segments))
        leading = segments[:singles]
        slots, positions = place(([s.slot for s in leading], [s.cached for s in leading]), keys.device)
        return cls(
            segments=tuple(segments),
            layers=layers,
            attend=kernel(segments, dtype=keys.dtype, device=keys.device),
            singles=singles,
            single_slots=slots,
            single_positions=positions,
            places=None if table is None else _places(segments, table, keys.shape[1]).to(keys.device),
        )

    @functools.cached_property
    def _where(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The slot and the position of each row, `[rows]` int64; in a paged cache its block, and the place there."""
        if self.places is not None:
            size = self.layers[0][0].shape[1]
            return self.places // size, self.places % size
        if self.singles == len(self.segments):
            return self.single_slots, self.single_positions
        return place(
            (
                [s.slot for s in self.segments for _ in range(s.rows)],
                [position for s in self.segments for position in range(s.cached, s.length)],
            ),
            torch.device("cpu"),
        )  # type: ignore[return-value]

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put the new K and V, `[kv_heads, rows, width]` each, where they belong.

        On a CPU a kernel of our own does it in one call. By torch, single rows (decodes) go in one indexed write, a
        call a request would cost more than the bytes; longer segments are one strided copy each, which is several times
        faster than an indexed write of many rows.
        """
        self._written.add(layer)
        keys, values = self.layers[layer]
        if cpu_write.can(key, keys) and cpu_write.can(value, values):
            cpu_write.write(*self._where, key, value, keys, values)
            return
        for cache, new in ((keys, key), (values, value)):
            by_row = new.transpose(0, 1)
            if self.places is not None:
                cache.flatten(0, 1).index_copy_(0, self.places, by_row)
                continue
            if self.singles:
                cache.index_put_((self.single_slots, self.single_positions), by_row[: self.singles])
            for segment in self.segments[self.singles :]:
                cache[segment.slot, segment.cached : segment.length].copy_(by_row[segment.start : segment.end])

    def compute(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, features: Features
    ) -> torch.Tensor:
        """Write the new K and V of a layer and attend to all that is there; shapes as in `attention_forward`.

        Raises:
            UnsupportedModel: K or V of another shape than the cache has, or a layer that comes twice.
        """
        if layer in self._written:
            raise UnsupportedModel(f"layer {layer} computes attention twice in one pass, and has room for one K and V")
        keys, values = self.layers[layer]
        check_layer(layer, key, value, keys, values)
        self.write(layer, key[0], value[0])
        return self.attend(query[0], keys, values, features)[None]


class Batch(Protocol):
    """A pass as a layer sees it: `AttentionBatch`, or what stands in for it."""

    def compute(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, features: Features
    ) -> torch.Tensor:
        """Attention of one layer, shapes as in `attention_forward`; K and V are written first."""


def check_layer(layer: int, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Raises UnsupportedModel for new K and V, `[1, heads, rows, width]`, of another shape than the cache's layer."""
    if key.shape[1::2] != keys.shape[2:] or value.shape[1::2] != values.shape[2:]:
        raise UnsupportedModel(
            f"layer {layer} has K of {tuple(key.shape[1::2])} and V of {tuple(value.shape[1::2])} (heads, width),"
            f" the cache is laid out for {tuple(keys.shape[2:])} and {tuple(values.shape[2:])}"
        )


def _places(segments: Sequence[Segment], table: torch.Tensor, block_size: int) -> torch.Tensor:
    slots = torch.tensor([segment.slot for segment in segments])
    slots = slots.repeat_interleave(torch.tensor([segment.rows for segment in segments]))
    positions = torch.tensor([position for s in segments for position in range(s.cached, s.length)])
    return table[slots, positions // block_size].long() * block_size + positions % block_size


def _check(segments: Sequence[Segment], *, slots: int, padded_len: int) -> None:
    row = 0
    for segment in segments:
        inside = 0 < segment.rows <= segment.length <= padded_len and 0 <= segment.slot < slots
        if segment.start != row or not inside:
            raise InvalidRequest(
                f"{segment} must start at row {row}, in a cache of {slots} slots of {padded_len} tokens"
            )
        row = segment.end
    if not segments or len({segment.slot for segment in segments}) != len(segments):
        raise InvalidRequest("a batch needs at least one request, each in a slot of its own")


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    vattention_batch: Batch | torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, with the signature that transformers calls.

    Args:
        module: the model's attention module; its `layer_idx` picks the layer.
        query: `[1, q_heads, rows, width]`; key and value: `[1, kv_heads, rows, width]`, new tokens only.
        attention_mask: must be None.
        sliding_window, softcap, s_aux: see `Features`.
        vattention_batch: the batch, given to the model's forward as a keyword argument; in a compiled pass its ticket,
            see `attention.operator`.

    Returns:
        `[1, rows, q_heads, width of V]` and None (there are no attention weights to show).

    Raises:
        UnsupportedModel: an argument that would change the answer, named. Refusing beats computing another model.
    """
    if vattention_batch is None:
        raise InvalidRequest(f"this model computes attention in a KVCache: call it with {NAME}=AttentionBatch(...)")
    batch = vattention_batch
    if attention_mask is not None:
        raise UnsupportedModel("the model passes an attention_mask: only plain causal attention is computed here")
    if dropout:
        raise UnsupportedModel(f"the model passes dropout={dropout}: put it in eval mode")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModel("the model passes is_causal=False: only causal attention is computed here")
    if sliding_window is not None and sliding_window < 1:
        raise UnsupportedModel(f"the model passes sliding_window={sliding_window}: a window has at least one key")
    if softcap is not None and not softcap > 0:
        raise UnsupportedModel(f"the model passes softcap={softcap}: a cap is positive")
    if s_aux is not None and s_aux.shape != query.shape[1:2]:
        raise UnsupportedModel(f"the model passes s_aux of shape {tuple(s_aux.shape)}: sinks are one number a head")
    for name, given in kwargs.items():
        # None and False are how transformers says that a feature is off.
        if given is not None and given is not False and name not in _HARMLESS:
            raise UnsupportedModel(f"the model passes {name}, which may change what attention computes: not built")
    features = Features(scaling, sliding_window, softcap, s_aux)
    if isinstance(batch, torch.Tensor):
        from vattention.attention import operator  # compiled passes alone

        return operator.attend(query, key, value, batch, getattr(module, LAYER), features), None
    layer: int = module.layer_idx  # type: ignore[assignment]
    return batch.compute(layer, query, key, value, features), None
