"""Writing down what one thread does in a decode pass: see `engine.cpu_graphs`.

- Functions that inductor has generated are watched by putting watchers in their places in its modules;
- our own kernels say so themselves (`attention.recording`);
- every other operator is seen by a dispatch mode of torch.
"""

from __future__ import annotations

import ctypes
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vattention.attention import operator, recording
from vattention.attention.recording import CannotRecord
from vattention.engine import linears
from vattention.engine.cpu_memory import Memory, storage_of
from vattention.engine.cpu_program import Native, Operator, Program, program, tensors_of

_MOST_ARGUMENTS = 32
_SMALL = 1 << 16
"""Numbers, in all tensors of a generated function, up to which it is left to one thread."""

_ALLOCATE = "empty_strided_cpu"
"""What inductor's modules call for memory."""

_OURS: dict[Any, Callable[..., Any]] = {
    torch.ops.vattention.linears.default: linears.run,
    torch.ops.vattention.attend.default: operator.run,
}
_EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_strided.default}

_patching = threading.Lock()


class Recorder(TorchDispatchMode):
    """Writes down what one thread does."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[Native | Operator] = []
        self._memory = Memory()
        self._made: dict[int, torch.Tensor] = {}  # by operators; by address of the storage
        self._kept: list[Any] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What this thread does in here is written down."""
        with _generated(self._watch, self._memory.empty), recording.to(self), self:
            yield

    def program(self) -> Program:
        """What does it all again."""
        return program(self._steps, (self._memory, self._kept))

    def spoil(self) -> None:
        """Fill all that the recorded calls compute with garbage."""
        self._memory.spoil()
        for address, tensor in self._made.items():
            ctypes.memset(address, 0x7F, tensor.untyped_storage().nbytes())

    def note(self, function: Any, argument: ctypes.Structure, kept: tuple[Any, ...]) -> None:
        """See `recording.Recorder`."""
        own = type(argument).from_buffer_copy(argument)
        self._kept.append((own, kept))
        self._steps.append(Native(function.__name__, _address_of(function), (ctypes.addressof(own),), alone=False))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _OURS:
            with self:
                return _OURS[function](*args, **kwargs)
        result = function(*args, **kwargs)
        if function in _EMPTY:
            return self._memory.empty(result.shape, result.stride(), result.dtype)
        made, given = tensors_of(result), {storage_of(tensor) for tensor in tensors_of((args, kwargs))}
        if not made and not function._schema.is_mutable:
            if any(not self._is_setting(tensor) for tensor in tensors_of((args, kwargs))):
                raise CannotRecord(f"{function} asks a tensor for a number")
            return result
        made = [tensor for tensor in made if storage_of(tensor) not in given]
        if made or function._schema.is_mutable:
            self._made |= {storage_of(tensor): tensor for tensor in made}
            self._steps.append(Operator(function, args, kwargs, made))
        return result

    def _is_setting(self, tensor: torch.Tensor) -> bool:
        """Whether it is a number that a layer has, such as its index, and not one that a pass computes or is given."""
        alone = tensor.dim() == 0 and tensor.untyped_storage().nbytes() == tensor.element_size()
        return alone and storage_of(tensor) not in self._made and not self._memory.has(tensor)

    def _watch(self, name: str, address: int, args: Sequence[Any]) -> None:
        """A function of inductor's has been called."""
        if len(args) > _MOST_ARGUMENTS:
            raise CannotRecord(f"a generated function takes {len(args)} arguments")
        numbers: list[int] = []
        size = 0
        for value in args:
            if isinstance(value, torch.Tensor):
                if not self._memory.has(value):
                    self._kept.append(value)
                numbers.append(value.data_ptr())
                size += value.numel()
            elif isinstance(value, int):
                numbers.append(value)
            else:
                raise CannotRecord(f"a generated function takes a {type(value).__name__}")
        self._steps.append(Native(name, address, numbers, alone=size <= _SMALL))


@contextmanager
def _generated(
    watch: Callable[[str, int, Sequence[Any]], None],
    empty: Callable[[Sequence[int], Sequence[int], torch.dtype], torch.Tensor],
) -> Iterator[None]:
    """In here this thread's calls of inductor's functions are told to `watch`, and `empty` is its memory."""
    from torch._inductor.codecache import PyCodeCache

    thread = threading.get_ident()

    def told(name: str, kernel: Any) -> Callable[..., None]:
        address = _address_of(getattr(ctypes.CDLL(kernel.__self__.__file__), kernel.__name__))

        def run(*args: Any) -> None:
            kernel(*args)
            if threading.get_ident() == thread:
                watch(name, address, args)

        return run

    def allocating(stock: Any) -> Callable[..., torch.Tensor]:
        def run(*args: Any) -> torch.Tensor:
            return empty(*args) if threading.get_ident() == thread else stock(*args)

        return run

    with _patching:
        before: list[tuple[Any, str, Any]] = []
        for module in PyCodeCache.modules:
            for name, value in vars(module).items():
                if (name.startswith("cpp_") and isinstance(value, types.BuiltinFunctionType)) or name == _ALLOCATE:
                    before.append((module, name, value))
        try:
            for module, name, value in before:
                setattr(module, name, allocating(value) if name == _ALLOCATE else told(name, value))
            yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)


def _address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
