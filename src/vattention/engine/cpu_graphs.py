"""Decode passes on a CPU without Python: calls written down once, and made again on the same addresses.

What a CUDA graph is on a GPU. A pass over a few requests is some three hundred calls of small compiled functions, and
calling them through Python and torch takes as long as some of their arithmetic. All addresses stay (those of K and V
for life, those of numbers that change in `attention.decode_batch`), so one pass is watched while it runs:

- functions that inductor has generated, by putting watchers in their places in its modules;
- our own kernels, which say so themselves (`attention.recording`);
- every other operator, by a dispatch mode of torch. Those go on being called from Python: a dozen, around the layers.

What lies between calls is memory that the recording hands out, and takes back when a tensor dies, so that a pass uses
the same few buffers layer after layer. A replay is then one call of `cpu_replay.cpp` for each run of functions.

A recording must give the logits of an ordinary pass, bit for bit: once with garbage in all its buffers, and then again
the first times that it is used, for other tokens. A pass that asks a tensor for a number, or runs what cannot be
watched, is not recorded.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vattention.attention import native, operator, recording
from vattention.attention.recording import CannotRecord
from vattention.engine import linears
from vattention.engine.graphs import Captured

MOST_ROWS = 32
"""Passes of more rows are not recorded: beside their arithmetic, what calls take is little."""

_SOURCE = Path(__file__).with_name("cpu_replay.cpp")
_MOST_ARGUMENTS = 32
_SMALL = 1 << 16
"""Numbers, in all tensors of a generated function, up to which it is left to one thread."""

_ALLOCATE = "empty_strided_cpu"
"""What inductor's modules call for memory."""

_PROOFS = 2
"""Replays that are compared to an ordinary pass. The first may be of the pass that was recorded."""

_LINE = 64
"""Bytes that memory is aligned to."""

_OURS: dict[Any, Callable[..., Any]] = {
    torch.ops.vattention.linears.default: linears.run,
    torch.ops.vattention.attend.default: operator.run,
}
_CASTS = {torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default}
_EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_strided.default}

_patching = threading.Lock()


class _Step(ctypes.Structure):
    """`struct Step` of the source."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("alone", ctypes.c_int64),
        ("arguments", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class _Native:
    """A call of a compiled function."""

    name: str
    address: int
    arguments: Sequence[int]
    alone: bool


@dataclass(frozen=True)
class _Operator:
    """A call of an operator, and the tensors that take what it makes."""

    function: Any
    args: Any
    kwargs: Any
    made: Sequence[torch.Tensor]

    def __call__(self) -> None:
        new = _tensors(self.function(*self.args, **self.kwargs))
        for old, tensor in zip(self.made, new[len(new) - len(self.made) :], strict=True):
            old.copy_(tensor)

    def into(self) -> Callable[[], object]:
        """The same in fewer calls, where the operator has a form that writes into a tensor it is given."""
        if len(self.made) != 1:
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


class CpuCapture:
    """Implements `engine.graphs.Capture` on a CPU."""

    def __call__(self, work: Callable[[], torch.Tensor]) -> Captured:
        """Run `work`, record it, and see that the recording does the same.

        Raises:
            CannotRecord: it does not, or cannot be recorded. So may the first replays.
        """
        library = _library()
        if library is None:
            raise CannotRecord("there is no compiler")
        expected = work().clone()
        recorder = _Recorder()
        with recorder.watching():
            output = work()
        replay = recorder.program(library)
        recorder.spoil()
        replay()
        _compare(output, expected)
        unproven = _PROOFS

        def proving() -> None:
            nonlocal unproven
            if not unproven:
                replay()
                return
            expected = work().clone()
            replay()
            _compare(output, expected)
            unproven -= 1

        return Captured(proving, output)


def _compare(output: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(output, expected):
        raise CannotRecord("a replay computes something else")


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


class _Memory:
    """Tensors at addresses that are used again once they are gone, and by nobody else."""

    def __init__(self) -> None:
        self._blocks: list[ctypes.Array[ctypes.c_char]] = []
        self._addresses: set[int] = set()
        self._free: dict[int, list[int]] = {}

    def empty(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """As `torch.empty_strided`."""
        numbers = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        size = -(-max(1, numbers * dtype.itemsize) // _LINE) * _LINE
        free = self._free.setdefault(size, [])
        if not free:
            block = (ctypes.c_char * (size + _LINE))()
            address = -(-ctypes.addressof(block) // _LINE) * _LINE
            self._blocks.append(block)
            self._addresses.add(address)
            free.append(address)
        address = free.pop()
        buffer = (ctypes.c_char * size).from_address(address)
        weakref.finalize(buffer, free.append, address).atexit = False  # it dies with the last tensor over it
        return torch.frombuffer(buffer, dtype=dtype, count=size // dtype.itemsize).as_strided(shape, stride)

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether it is from here."""
        return _storage(tensor) in self._addresses

    def spoil(self) -> None:
        """Fill everything with what is no number."""
        for block in self._blocks:
            ctypes.memset(block, 0xFF, len(block))


class _Recorder(TorchDispatchMode):
    """Writes down what one thread does."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[_Native | _Operator] = []
        self._memory = _Memory()
        self._made: dict[int, torch.Tensor] = {}  # by operators; by address of the storage
        self._kept: list[Any] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What this thread does in here is written down."""
        with _generated(self._watch, self._memory.empty), recording.to(self), self:
            yield

    def program(self, library: ctypes.CDLL) -> Program:
        """What does it all again."""
        parts: list[tuple[str, Callable[[], object]]] = []
        calls: list[_Native] = []
        for step in (*self._steps, None):
            if isinstance(step, _Native):
                calls.append(step)
                continue
            if calls:
                parts.append(("", _Sequence(library, calls)))
                calls = []
            if step is not None:
                parts.append((str(step.function), step.into()))
        return Program(parts, (self._memory, self._kept))

    def spoil(self) -> None:
        """Fill all that the recorded calls compute with garbage."""
        self._memory.spoil()
        for address, tensor in self._made.items():
            ctypes.memset(address, 0x7F, tensor.untyped_storage().nbytes())

    def note(self, function: Any, argument: ctypes.Structure, kept: tuple[Any, ...]) -> None:
        """See `recording.Recorder`."""
        own = type(argument).from_buffer_copy(argument)
        self._kept.append((own, kept))
        self._steps.append(_Native(function.__name__, _address_of(function), (ctypes.addressof(own),), alone=False))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _OURS:
            with self:
                return _OURS[function](*args, **kwargs)
        result = function(*args, **kwargs)
        if function in _EMPTY:
            return self._memory.empty(result.shape, result.stride(), result.dtype)
        made, given = _tensors(result), {_storage(tensor) for tensor in _tensors((args, kwargs))}
        if not made and not function._schema.is_mutable:
            if any(not self._is_setting(tensor) for tensor in _tensors((args, kwargs))):
                raise CannotRecord(f"{function} asks a tensor for a number")
            return result
        made = [tensor for tensor in made if _storage(tensor) not in given]
        if made or function._schema.is_mutable:
            self._made |= {_storage(tensor): tensor for tensor in made}
            self._steps.append(_Operator(function, args, kwargs, made))
        return result

    def _is_setting(self, tensor: torch.Tensor) -> bool:
        """Whether it is a number that a layer has, such as its index, and not one that a pass computes or is given."""
        alone = tensor.dim() == 0 and tensor.untyped_storage().nbytes() == tensor.element_size()
        return alone and _storage(tensor) not in self._made and not self._memory.has(tensor)

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
        self._steps.append(_Native(name, address, numbers, alone=size <= _SMALL))


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
                if (
                    name.startswith("cpp_") and isinstance(value, types.BuiltinFunctionType)
                ) or name == "empty_strided_cpu":
                    before.append((module, name, value))
        try:
            for module, name, value in before:
                setattr(module, name, allocating(value) if name == _ALLOCATE else told(name, value))
            yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)


class _Sequence:
    """Calls of compiled functions, made in one."""

    def __init__(self, library: ctypes.CDLL, calls: Sequence[_Native]) -> None:
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


def _address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.load(_SOURCE)
    if library is not None:
        library.vattention_replay.restype = None
    return library
