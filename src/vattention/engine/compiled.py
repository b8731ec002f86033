"""A model whose decoder layers run as compiled code, made ready while it serves.

Layers are compiled, not models: the layers of a kind share one graph, so that a model of thirty takes seconds and not
minutes, and what surrounds them (the embedding, rotary tables, the last norm) is a few calls a pass. Rows are a dynamic
dimension: one graph for a single row, and one for any other number of them, decodes and prompts alike. What a graph
cannot hold stays outside of it: attention, with the cache and the batch (`attention.operator`), and weights packed for
oneDNN (`engine.linears`). On a GPU matrix products stay torch's own, and what lies between them is fused; passes of
decodes are then captured with the layers compiled (`engine.graphs`).

Compiling happens in a thread of its own, on passes that touch no cache: until it has ended, passes run eagerly. Where
it fails (no C++ compiler, a layer that does not trace) they go on doing so, after one warning. Nobody else who uses the
same weights notices: a layer runs compiled only in a pass of ours.

Compiled code is kept in inductor's cache directory, and found again by the next process.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from vattention.attention import native, operator
from vattention.attention.base import LAYER, NAME, Batch
from vattention.engine.linears import can_pack, has_room, merge_linears, run_packed
from vattention.engine.shortcut import Shortcut, watchable

_ROWS = (8, 1)
"""What is compiled ahead: passes of several rows, and of one."""

_WATCHED_ROWS = (1013, 1019, 1, 1)
"""Passes that are watched, two of each kind: so many rows that no other number of a model is the same."""


class CompiledModel:
    """The compiled layers of a model. Made by `compile_model`, one for each model; any number of threads may use it.

    Args:
        model: as `Runner` takes it. Kept only until it is compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        self._failure: BaseException | None = None
        self._packs = True
        self._warned = False
        self._ours = threading.local()  # whether this thread is in a pass of ours
        # Not a daemon: the interpreter must not be taken away under a compiler.
        self._thread: threading.Thread | None = threading.Thread(
            target=self._prepare, args=(model,), name="vattention-compile"
        )
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether passes may run compiled. The first caller to see that they never will gets the warning."""
        if self._thread is not None:
            if self._thread.is_alive():
                return False
            self._thread = None
        if not self._warned and (self._failure is not None or not self._packs):
            self._warned = True
            _warn(self._failure)
        return self._failure is None

    @property
    def settled(self) -> bool:
        """Whether compiling has ended, one way or the other."""
        thread = self._thread
        return thread is None or not thread.is_alive()

    def wait(self) -> None:
        """Return when compiling has ended, one way or the other."""
        thread = self._thread
        if thread is not None:
            thread.join()
        self.ready  # noqa: B018 (for its warning)

    def run(self, model: nn.Module, batch: Batch, **inputs: Any) -> Any | None:
        """A pass of the model over `batch`, once `ready`. `inputs` are those of the model's forward.

        Returns:
            The model's output; None, for good, where the compiler fails after all. A new batch then does without it.
        """
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self._forward(model, batch, **inputs)
        except TorchDynamoException as error:
            self._failure = error
            return None

    def _forward(self, model: nn.Module, batch: Batch | None, **inputs: Any) -> Any:
        ticket = operator.new_ticket(batch, inputs["input_ids"].device)
        self._ours.now = True
        try:
            return model(**inputs, use_cache=False, **{NAME: ticket})
        finally:
            self._ours.now = False

    def _divert(self, module: nn.Module, compiled: Callable[..., Any]) -> None:
        """Have calls of `module` go to `compiled` in passes that are ours."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return (compiled if getattr(self._ours, "now", False) else module._call_impl)(*args, **kwargs)

        # The attribute in which torch keeps what `Module.compile` makes: calling, copying and pickling know it.
        module._compiled_call_impl = call

    @torch.inference_mode()
    def _prepare(self, model: nn.Module) -> None:
        try:
            device = next(model.parameters()).device
            if device.type == "cpu":  # elsewhere inductor looks for what it needs
                native.find_compiler()
            layers = decoder_layers(model)
            for part in (part for layer in layers for part in _attentions(layer)):
                setattr(part, LAYER, torch.tensor(part.layer_idx))
            self._packs = device.type != "cpu" or has_room(model)
            run = _compile(pack=self._packs)
            shortcuts = [Shortcut(layer, run) for layer in layers]
            for layer in layers:
                self._divert(layer, functools.partial(run, layer))
            head = model.get_output_embeddings()  # type: ignore[operator]
            if self._packs and type(head) is nn.Linear and can_pack(head.weight):
                self._divert(head, functools.partial(run_packed, head))

            def go(passes: Sequence[int]) -> None:
                for rows in passes:
                    numbers = torch.zeros((1, rows), dtype=torch.int64, device=device)
                    keep = torch.zeros(1, dtype=torch.int64, device=device)
                    self._forward(model, None, input_ids=numbers, position_ids=numbers, logits_to_keep=keep)

            # A thread has a current device of its own.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                go(_ROWS)
                if device.type != "cpu":  # graphs are the shortcut there
                    return
                for layer, shortcut in zip(layers, shortcuts, strict=True):
                    self._divert(layer, shortcut.watch)
                go(_WATCHED_ROWS)
                for layer, shortcut in zip(layers, shortcuts, strict=True):
                    self._divert(layer, shortcut)
        except Exception as error:  # noqa: BLE001 (a compiler is many libraries; all of them leave eager passes)
            self._failure = error


_models: weakref.WeakKeyDictionary[nn.Module, CompiledModel] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def compile_model(model: nn.Module) -> CompiledModel:
    """Compile a model in the background, or find that somebody else with the same weights has."""
    with _lock:
        if model not in _models:
            _models[model] = CompiledModel(model)
        return _models[model]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that are repeated, in order: what the outermost lists of modules hold that have attention inside."""
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(layer for layer in child if any(True for _ in _attentions(layer)))
            else:
                search(child)

    search(model)
    return found


def _attentions(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if isinstance(getattr(part, "layer_idx", None), int))


def _warn(error: BaseException | None) -> None:
    if error is None:
        warnings.warn(
            "linear layers run from the weights as they are, slower: packed copies would take more than half of the"
            " memory that is left",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    if isinstance(error, FileNotFoundError):
        native.warn(error)
        return
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    warnings.warn(
        f"the model runs uncompiled, slower: it cannot be compiled ({type(error).__name__}: {reason[:300]})",
        RuntimeWarning,
        stacklevel=2,
    )


def _compile(*, pack: bool) -> Callable[..., Any]:
    """A function that calls a layer, compiled; with graphs of its own. `pack` its linear layers, see `linears`."""

    def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return layer._call_impl(*args, **kwargs)

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx  # takes seconds to import

        if pack:
            merge_linears(graph)
        # The shapes that our operators promise are tested; to check them again takes as long as some of the arithmetic.
        code: Any = compile_fx(graph, inputs, config_patches={"size_asserts": False})
        return watchable(code)

    # Dynamo keeps graphs by code object, and gives up after a few: models must not share one.
    run.__code__ = run.__code__.replace()
    # The whole layer or nothing: a layer in pieces would be compiled for minutes, and again for other data.
    return torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
