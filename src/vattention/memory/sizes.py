"""Sizes as people write them: bytes, or a string such as "2GiB"."""

from __future__ import annotations

import operator
import re
from decimal import Decimal
from fractions import Fraction
from typing import SupportsIndex

from vattention.errors import ConfigError

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    _UNITS[f"{_letter}ib"] = _UNITS[_letter] = 1024**_power
    _UNITS[f"{_letter}b"] = 1000**_power

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(value: str | SupportsIndex, what: str = "size") -> int:
    """Bytes in `value`: an int, or a string like "2GiB", "512 MiB", "1.5GiB" (binary) or "2GB" (decimal).

    Raises:
        ConfigError: not a size, zero or negative. TypeError: neither a string nor an integer.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        unit = _UNITS.get(match.group(2).lower()) if match else None
        if match is None or unit is None:
            raise ConfigError(f'{what} {value!r} is not a size: write bytes, or a string like "2GiB"')
        size = int(Fraction(match.group(1)) * unit)  # a float would round what is larger than 8 PiB
    elif isinstance(value, bool):
        raise TypeError(f"{what} must be bytes or a string like '2GiB', not a bool")
    else:
        try:
            size = operator.index(value)
        except TypeError:
            raise TypeError(f"{what} must be bytes or a string like '2GiB', not {type(value).__name__}") from None
    if size <= 0:
        raise ConfigError(f"{what} must be positive, got {value!r}")
    return size


def format_size(size: int) -> str:
    """`size` bytes for people: 1536 -> "1.5 KiB"."""
    value = Decimal(size)  # which no size is too large for
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
