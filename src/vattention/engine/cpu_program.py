"""What a recorded decode pass is, and how it is made again: runs of compiled functions, and operators between them.

A run of functions is one call of `cpu_replay.cpp`. Operators are called from Python, in the form that writes into a
given tensor where there is one.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from vattention.attention import native

_library = native.on_demand(Path(__file__).with_name("cpu_replay.cpp"), vattention_replay=None)
_CASTS = {torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default}


class _Step(ctypes.Structure):
    """`struct Step` of the source."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("alone", ctypes.c_int64),
        ("arguments", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Native:
    """A call of a compiled function."""

    name: str
    address: int
    arguments: Sequence[int]
    alone: bool


@dataclass(frozen=True)
class Operator:
    """A call of an operator, and the tensors that take what it makes."""

    function: Any
    args: Any
    kwargs: Any
    made: Sequence[torch.Tensor]

    def __call__(self) -> None:
        """Make it again."""
        new = tensors_of(self.function(*self.args, **self.kwargs))
        for old, tensor in zip(self.made, new[len(new) - len(self.made) :], strict=True):
            old.copy_(tensor)

    def into(self) -> Callable[[], object]:
        """The same in fewer calls, where the operator has a form that writes into a tensor it is given."""
        if len(self.made) != 1 or self.function._schema.is_mutable:
            return self
        (made,) = self.made
        if self.function in _CASTS and len(self.args) <= 2 and self.kwargs.keys() <= {"dtype"}:
            return functools.partial(made.copy_, self.args[0])
        form = _writing_form(self.function)
        return self if form is None else functools.partial(form, *self.args, **self.kwargs, out=made)


def _writing_form(function: Any) -> Any | None:
    """The overload of an operator that takes the same arguments and `out`."""
    taken = [(argument.name, str(argument.type)) for argument in function._schema.arguments]
    for name in (f"{function._overloadname}_out", "out"):
        form = getattr(function.overloadpacket, name, None)
        if form is not None:
            rest = [(a.name, str(a.type)) for a in form._schema.arguments if not a.is_out]
            if rest == taken and len(form._schema.arguments) == len(rest) + 1:
                return form
    return None


@dataclass(frozen=True)
class Program:
    """A recorded pass.

    Attributes:
        parts: what is called, and the names of operators.
        owned: what they read and write.
    """

    parts: Sequence[tuple[str, Callable[[], object]]]
    owned: Any

    def __call__(self) -> None:
        """Do it again."""
        for _, part in self.parts:
            part()

    def timed(self) -> Iterator[tuple[str, float]]:
        """Do it again. Yields what was called, and the seconds it took."""
        for name, part in self.parts:
            if isinstance(part, _Sequence):
                yield from part.timed()
                continue
            began = time.perf_counter()
            part()
            yield name, time.perf_counter() - began


def works() -> bool:
    """Whether there is a compiler, for the loop that makes the calls."""
    return _library() is not None


def program(steps: Sequence[Native | Operator], owned: Any) -> Program:
    """What does all `steps` again, in order; `owned` is kept for as long."""
    parts: list[tuple[str, Callable[[], object]]] = []
    calls: list[Native] = []
    for step in (*steps, None):
        if isinstance(step, Native):
            calls.append(step)
            continue
        if calls:
            parts.append(("", _Sequence(calls)))
            calls = []
        if step is not None:
            parts.append((str(step.function), step.into()))
    return Program(parts, owned)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """All tensors in it, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Sequence:
    """Calls of compiled functions, made in one."""

    def __init__(self, calls: Sequence[Native]) -> None:
        library = _library()
        assert library is not None
        self._library = library
        self._arguments = [(ctypes.c_int64 * len(call.arguments))(*call.arguments) for call in calls]
        self._steps = (_Step * len(calls))(
            *(
                _Step(call.address, len(call.arguments), call.alone, ctypes.addressof(given))
                for call, given in zip(calls, self._arguments, strict=True)
            )
        )
        self._names = [call.name for call in calls]

    def __call__(self) -> None:
        self._library.vattention_replay(self._steps, len(self._steps), None)

    def timed(self) -> Iterator[tuple[str, float]]:
        """Make the calls. Yields what was called, and the seconds it took."""
        seconds = (ctypes.c_double * len(self._steps))()
        self._library.vattention_replay(self._steps, len(self._steps), seconds)
        yield from zip(self._names, seconds, strict=True)
