"""CUDA graphs on the CPU, as unforgiving as the real ones: what was captured runs again on the addresses it ran on.

A capture notes every operator that torch dispatches, with its arguments: tensors made meanwhile are the graph's own,
and all others are kept as *addresses*, not as tensors, so that nobody lives longer because a graph reads him. A replay
fills the graph's own tensors with garbage and runs the operators, and no line of Python of the model: whatever a pass
computes on the host, or reads from a tensor made for that pass, is as it was at the capture, or is found out.

What ends a capture on a device ends it here: a number asked from a tensor, or a shape that depends on data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from vattention.attention.base import Features
from vattention.attention.decode_plan import DecodePlan, DecodeRows
from vattention.engine.engine import Engine
from vattention.engine.graphs import Captured, DecodeGraphs

_ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "repeat_interleave.Tensor")


class CannotBeCaptured(RuntimeError):
    """What a device would say in the middle of a capture."""


@dataclass
class Recording:
    """One captured graph.

    Attributes:
        operators: names, in order.
        replays: how often it ran since.
    """

    operators: list[str] = field(default_factory=list)
    replays: int = 0
    _calls: list[tuple[Callable[..., Any], Any, Any, list[torch.Tensor]]] = field(default_factory=list)
    _own: dict[int, torch.Tensor] = field(default_factory=dict)  # by address of the storage
    _others: dict[int, StorageWeakRef] = field(default_factory=dict)

    def note(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An operator that has just run."""
        given = {storage(x) for x in tensors((args, kwargs))}
        made = [x for x in tensors(result) if storage(x) not in given]
        if not made and not function._schema.is_mutable:
            return  # a view: its users know its address
        self.operators.append(str(function))
        args, kwargs = tree_map(self._address, (args, kwargs))
        for x in made:
            self._own[storage(x)] = x
        self._calls.append((function, args, kwargs, made))

    def _address(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or storage(x) in self._own:
            return x
        if x.dim() == 0 and x.untyped_storage().nbytes() == x.element_size():
            return x.clone()  # a number of the host is an argument of the kernel
        self._others.setdefault(storage(x), StorageWeakRef(x.untyped_storage()))
        size = x.untyped_storage().nbytes()
        there = torch._C._construct_storage_from_data_pointer(storage(x), x.device, size)
        return torch.empty(0, dtype=x.dtype).set_(there, x.storage_offset(), x.shape, x.stride())

    def check(self) -> None:
        """Fail when something that is read is gone, and its memory perhaps somebody else's."""
        assert not any(other.expired() for other in self._others.values()), "a graph reads memory that was given back"

    def replay(self) -> None:
        """Run it all again."""
        self.check()
        self.replays += 1
        for x in self._own.values():
            torch.frombuffer(_bytes(x), dtype=torch.uint8).fill_(0x7F)
        for function, args, kwargs, made in self._calls:
            new = tensors(function(*args, **kwargs))
            for x, y in zip(made, new[len(new) - len(made) :], strict=True):
                x.copy_(y)


def storage(x: torch.Tensor) -> int:
    """The address of what it lies over."""
    return x.untyped_storage().data_ptr()


def tensors(tree: Any) -> list[torch.Tensor]:
    """All in any nest of lists and the like."""
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


def _bytes(x: torch.Tensor) -> Any:
    import ctypes

    return (ctypes.c_byte * x.untyped_storage().nbytes()).from_address(storage(x))


class _Recorder(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removeprefix("aten.")
        kwargs = kwargs or {}
        if function._can_decompose():  # in inference mode nobody has done so
            with self:
                return function.decompose(*args, **kwargs)
        if name.startswith(_ASKS):
            raise CannotBeCaptured(f"{name} asks the device for a number: operation not permitted when capturing")
        if name.startswith("index") and any(x.dtype in (torch.bool, torch.uint8) for x in tensors(args[1:2])):
            raise CannotBeCaptured(f"{name} by a mask: operation not permitted when capturing")
        result = function(*args, **kwargs)
        self._recording.note(function, args, kwargs, result)
        return result


@dataclass
class CaptureOnACPU:
    """Implements `Capture`.

    Attributes:
        recordings: one for each capture, in order.
        watch: called in the middle of each capture.
    """

    recordings: list[Recording] = field(default_factory=list)
    watch: Callable[[], None] = lambda: None

    def __call__(self, work: Callable[[], torch.Tensor]) -> Captured:
        work()
        recording = Recording()
        with _Recorder(recording):
            output = work()
            self.watch()
        recording.check()
        self.recordings.append(recording)
        # A device computes nothing while it captures.
        output.fill_(float("nan"))
        return Captured(recording.replay, output)


_library = torch.library.Library("vattention_test", "FRAGMENT")
_library.define(
    "decode(Tensor query, Tensor keys, Tensor values, Tensor slots, Tensor lengths, float? scaling, int? window,"
    " float? softcap, Tensor? sinks) -> Tensor"
)


def _decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention by its definition, with slots and lengths from tensors, as a kernel on a device has them."""
    out = query.new_empty((query.shape[1], query.shape[0], values.shape[3]))
    scale = query.shape[2] ** -0.5 if scaling is None else scaling
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        first = 0 if window is None else max(0, length - window)
        k, v = (x[slot, first:length].double().transpose(0, 1) for x in (keys, values))  # [kv_heads, tokens, width]
        scores = query[:, row].double().unflatten(0, (k.shape[0], -1)) @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            more = sinks.double().view(k.shape[0], -1, 1)
            scores = torch.cat((scores, more), -1).softmax(-1)[..., :-1]
        else:
            scores = scores.softmax(-1)
        out[row] = (scores @ v).flatten(0, 1).to(out.dtype)
    return out


_library.impl("decode", _decode, "CPU")


def plan_on_a_cpu(rows: int, *, bound: int, dtype: torch.dtype, device: torch.device) -> DecodePlan:
    """Implements `Planner` with one operator that computes everything."""
    numbers = DecodeRows([0] * rows, [1] * rows, bound=bound, device=device)

    def derive(slots: Sequence[int], lengths: Sequence[int]) -> Sequence[Sequence[int]]:
        return slots, lengths

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        slots, lengths = numbers.keep("test", derive)
        return torch.ops.vattention_test.decode(
            query, keys, values, slots, lengths, features.scaling, features.window, features.softcap, features.sinks
        )

    return DecodePlan(numbers, attend)


def graphs_of(engine: Engine) -> DecodeGraphs:
    """Those of an engine whose recorder has a runner with graphs in it."""
    runner: Any = engine._runner
    graphs: DecodeGraphs = runner.runner.graphs
    return graphs


def decodes(engine: Engine) -> int:
    """Passes in which every request had one row."""
    runner: Any = engine._runner
    return sum(all(end - start == 1 for _, start, end in chunks) for chunks in runner.passes)


def all_tokens(requests: Any) -> list[tuple[int, ...]]:
    """What every sample of the requests has generated."""
    return [tuple(sample.output_token_ids) for request in requests for sample in request.family]
