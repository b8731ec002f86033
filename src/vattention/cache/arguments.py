"""What both caches say to slots, lengths and layers that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import SupportsIndex

from vattention.cache.opening import integer
from vattention.errors import InvalidRequest


def checked_slot(slot: SupportsIndex, slots: int, live: Callable[[int], bool]) -> int:
    """The number of a live slot, of `slots` that there are. Raises InvalidRequest for any other."""
    number = integer(slot, "a slot")
    if not 0 <= number < slots or not live(number):
        raise InvalidRequest(f"slot {number} is not live: use one that alloc or fork gave and free has not taken")
    return number


def checked_length(length: SupportsIndex, what: str, longest: int) -> int:
    """A number of tokens, at most `longest`. Raises InvalidRequest, which calls it `what`."""
    number = integer(length, what)
    if not 0 <= number <= longest:
        raise InvalidRequest(f"{what} {number} is outside 0..{longest} (max_model_len)")
    return number


def checked_lengths(lengths: Mapping[int, int], slot: Callable[[SupportsIndex], int], longest: int) -> dict[int, int]:
    """Slots, which `slot` checks, and their lengths. Raises TypeError for no mapping, otherwise as the two above."""
    if not isinstance(lengths, Mapping):
        raise TypeError(f"lengths must map slots to numbers of tokens, not {type(lengths).__name__}")
    return {slot(number): checked_length(length, "length", longest) for number, length in lengths.items()}


def checked_layer(layer: SupportsIndex, layers: int) -> int:
    """The number of a layer, of `layers` that there are. Raises InvalidRequest for any other."""
    number = integer(layer, "a layer")
    if not 0 <= number < layers:
        raise InvalidRequest(f"layer {number} is not one of the {layers} layers")
    return number
