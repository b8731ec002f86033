"""What is made from a tensor, and kept with it for as long as it lives."""

from __future__ import annotations

from typing import Any


class Kept:
    """A value for an attribute of a tensor that is no part of it: pickled it is None, and made again when missed."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()
