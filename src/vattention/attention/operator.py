"""Attention as one operator that a compiler does not look into.

To the compiler `vattention::attend` is a function of query, key and value. That it also writes K and V into the slots
is hidden on purpose: the cache never appears in a compiled graph, so no compiler can clone it, plan it or guard on it.
Order is safe all the same: each layer's output depends on its own call, and nobody else reads the slots meanwhile.

The batch of a pass travels as a ticket: a tensor that is an input of the graph, and carries the batch as an attribute
of the Python object. What differs between passes is thus no part of what was compiled, and there is no global table.
The number of a layer is a tensor for the same reason: layers that compute the same share one compiled graph.
"""

from __future__ import annotations

import torch

from vattention.attention.base import Batch, Features

_ATTRIBUTE = "vattention_batch"

_library = torch.library.Library("vattention", "FRAGMENT")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor ticket, Tensor layer, float? scaling, int? window,"
    " float? softcap, Tensor? sinks) -> Tensor"
)


def new_ticket(batch: Batch | None, device: torch.device) -> torch.Tensor:
    """A ticket for `batch`, or for nothing: attention is zeros then, and no cache is touched.

    The latter is for compiling ahead.
    """
    ticket = torch.empty(1, device=device)  # nobody reads its number
    setattr(ticket, _ATTRIBUTE, batch)
    return ticket


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ticket: torch.Tensor,
    layer: torch.Tensor,
    features: Features,
) -> torch.Tensor:
    """Attention of one layer through the operator; shapes as in `attention_forward`."""
    out: torch.Tensor = torch.ops.vattention.attend(
        query, key, value, ticket, layer, features.scaling, features.window, features.softcap, features.sinks
    )
    return out


def run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ticket: torch.Tensor,
    layer: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What `vattention::attend` does."""
    # Without a default: a compiler that hands on another tensor than it got must not pass for a ticket for nothing.
    batch: Batch | None = getattr(ticket, _ATTRIBUTE)
    if batch is None:
        return _shape(query, value).zero_()
    return batch.compute(int(layer), query, key, value, Features(scaling, window, softcap, sinks))


def _shape(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))


for _device in ("CPU", "CUDA"):
    _library.impl("attend", run, _device)


@torch.library.register_fake("vattention::attend", lib=_library)
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: torch.Tensor | float | int | None
) -> torch.Tensor:
    return _shape(query, value)
