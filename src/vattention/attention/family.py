"""A kernel by its name: where it runs, what it computes, and its two forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vattention.attention.base import Attend, Features, Kernel
from vattention.attention.decode_plan import DecodeRows

Can = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Features], bool]
"""`(query, keys, values, features)`, shaped as for `Attend`; looks at no number in them."""


@dataclass(frozen=True)
class Family:
    """One way to compute attention over slots.

    Attributes:
        missing: why it cannot be had on a device, in a sentence that may follow a colon; None where it can.
        can: whether it computes what a layer asks for.
        prepare: for the segments of a pass.
        decode: for decodes alone, from numbers on the device, so that a graph may be captured; None: it cannot.
    """

    missing: Callable[[torch.device], str | None]
    can: Can
    prepare: Kernel
    decode: Callable[[DecodeRows], Attend] | None = None
