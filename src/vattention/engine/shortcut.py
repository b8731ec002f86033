"""Calling compiled layers without asking each time whether their code still fits.

Before every call torch.compile makes sure that nothing has changed on which the code depends: every attribute of every
module of a layer, among others. With small layers that takes longer than some of their arithmetic. In passes of the
engine the weights and the settings of a model stay what they are, and only a few inputs change: so two passes are
watched through the front door, it is noted which argument of the code comes from where, and the next passes hand over
those arguments themselves.

A layer goes on being called through the front door where that cannot be told: an argument of unknown origin, a result
that is not what the code returns, an attribute that the call changes. So does a call that differs in anything but the
numbers in its tensors and how many rows they have.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vattention.attention import recording

Path = tuple[Any, ...]
"""Where a value is in the arguments of a call: an index or a name, and then indices into tuples."""

_watched = threading.local()


def watchable(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What a backend of torch.compile returns, so that a `Shortcut` can see it called."""

    def run(*args: Any) -> Any:
        result = compiled(*args)
        calls = getattr(_watched, "calls", None)
        if calls is not None:
            calls.append((compiled, args, result))
        return result

    return run


@dataclass(frozen=True, slots=True)
class _Route:
    """How to make a call of a layer a call of its code.

    Attributes:
        code: what to call.
        constants: its arguments, None where they differ between calls.
        tensors: position among the arguments -> path, dtype and number of dimensions of an input.
        rows: positions where the number of rows goes.
        names: keyword arguments of the layer.
        same: path -> value of the inputs that are not tensors.
        several: the layer returns a tuple, of all that the code returns; otherwise its first output.
    """

    code: Callable[..., Any]
    constants: tuple[Any, ...]
    tensors: tuple[tuple[int, Path, torch.dtype, int], ...]
    rows: tuple[int, ...]
    names: frozenset[str]
    same: tuple[tuple[Path, Any], ...]
    several: bool

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """Those of the code; None if this call is another than the ones that were watched."""
        if kwargs.keys() != self.names:
            return None
        for path, value in self.same:
            if _fetch(path, args, kwargs) is not value:
                return None
        filled: list[Any] = list(self.constants)
        for index, path, dtype, dimensions in self.tensors:
            tensor = _fetch(path, args, kwargs)
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.dim() != dimensions:
                return None
            filled[index] = tensor
        for index in self.rows:
            filled[index] = _rows(args)
        return filled


class Shortcut:
    """A layer whose compiled code is called directly, once `watch` has seen how.

    Args:
        layer: the layer.
        door: calls it compiled: takes the layer, and what the layer takes.
    """

    def __init__(self, layer: nn.Module, door: Callable[..., Any]) -> None:
        self._layer = layer
        self._door = door
        self._routes: dict[bool, _Route | None] = {}  # for one row, and for several
        self._before: dict[bool, _Route | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        route = self._routes.get(_rows(args) == 1)
        if route is not None:
            filled = route.arguments(args, kwargs)
            if filled is not None:
                result = route.code(*filled)
                return tuple(result) if route.several else result[0]
        recording.refuse("a layer is called through the front door")
        return self._door(self._layer, *args, **kwargs)

    def watch(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer through the front door. The second time, with other tensors, the shortcut may open."""
        attributes = _attributes(self._layer)
        calls: list[tuple[Callable[..., Any], Sequence[Any], Sequence[Any]]] = []
        _watched.calls = calls
        try:
            result = self._door(self._layer, *args, **kwargs)
        finally:
            _watched.calls = None
        one = _rows(args) == 1
        route = None
        if len(calls) == 1 and attributes == _attributes(self._layer):
            route = _find(self._layer, args, kwargs, result, *calls[0])
            before = self._before.get(one)
            if route is not None and before is not None:
                self._routes[one] = route if _agree(before, args, kwargs, calls[0][1]) else None
        self._before[one] = route
        return result


def _find(
    layer: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    result: Any,
    code: Callable[..., Any],
    given: Sequence[Any],
    outputs: Sequence[Any],
) -> _Route | None:
    several = isinstance(result, tuple)
    returned = result if several else (result,)
    if len(returned) > len(outputs) or any(a is not b for a, b in zip(returned, outputs, strict=False)):
        return None
    if several and len(returned) != len(outputs):
        return None
    own = {id(value) for value in _own_tensors(layer)}
    inputs = list(_leaves(args, kwargs))
    paths = {id(value): path for path, value in inputs if isinstance(value, torch.Tensor)}
    constants: list[Any] = []
    tensors: list[tuple[int, Path, torch.dtype, int]] = []
    rows: list[int] = []
    for index, value in enumerate(given):
        constants.append(None)
        if id(value) in paths:
            tensors.append((index, paths[id(value)], value.dtype, value.dim()))
        elif isinstance(value, torch.Tensor) and (id(value) in own or _is_number(value)):
            constants[-1] = value
        elif isinstance(value, int) and value == _rows(args):
            rows.append(index)
        else:
            return None
    same = [(path, value) for path, value in inputs if not isinstance(value, torch.Tensor)]
    return _Route(code, tuple(constants), tuple(tensors), tuple(rows), frozenset(kwargs), tuple(same), several)


def _agree(route: _Route, args: Sequence[Any], kwargs: Mapping[str, Any], given: Sequence[Any]) -> bool:
    """Whether a route found in one call gives the arguments that were seen in another."""
    filled = route.arguments(args, kwargs)
    if filled is None or len(filled) != len(given):
        return False

    def equal(a: Any, b: Any) -> bool:
        if _is_number(a) and _is_number(b):
            return bool(a.dtype == b.dtype and a == b)
        return a is b or (isinstance(b, int) and a == b)

    return all(map(equal, filled, given))


def _is_number(value: Any) -> bool:
    """Whether it is a number among a layer's settings, such as an epsilon: those arrive as tensors of no dimension."""
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.device.type == "cpu"


def _rows(args: Sequence[Any]) -> int:
    """Of the first tensor of a call, `[1, rows, ...]`; 0 where there is none."""
    first = args[0] if args else None
    return first.shape[1] if isinstance(first, torch.Tensor) and first.dim() > 1 else 0


def _fetch(path: Path, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    first, *rest = path
    value = args[first] if isinstance(first, int) else kwargs[first]
    for index in rest:
        value = value[index]
    return value


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    def walk(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
        if isinstance(value, (tuple, list)):
            for index, item in enumerate(value):
                yield from walk((*path, index), item)
        else:
            yield path, value

    for index, value in enumerate(args):
        yield from walk((index,), value)
    for name, value in kwargs.items():
        yield from walk((name,), value)


def _own_tensors(layer: nn.Module) -> Iterator[torch.Tensor]:
    yield from layer.parameters()
    yield from layer.buffers()
    for module in layer.modules():
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))


def _attributes(layer: nn.Module) -> list[tuple[int, ...]]:
    """What the attributes of all modules are, to see whether they have been replaced."""
    return [tuple(id(value) for value in vars(module).values()) for module in layer.modules()]
