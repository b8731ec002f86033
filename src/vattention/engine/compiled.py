"""A model whose decoder layers run as compiled code, made ready while it serves.

Layers are compiled, not models: the layers of a kind share one graph, so that a model of thirty takes seconds and not
minutes, and what surrounds them (the embedding, rotary tables, the last norm) is a few calls a pass. Rows are a dynamic
dimension: one graph for a single row, and one for any other number of them, decodes and prompts alike. What a graph
cannot hold stays outside of it: attention, with the cache and the batch (`attention.operator`), and weights packed for
oneDNN (`engine.linears`).

Compiling happens in a thread of its own, on passes that touch no cache: until it has ended, passes run eagerly. Where
it fails (no C++ compiler, a layer that does not trace) they go on doing so, after one warning. Nobody else who uses the
same weights notices: a layer runs compiled only in a pass of ours.

Compiled code is kept in inductor's cache directory, and found again by the next process.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from vattention.attention import operator
from vattention.attention.base import LAYER, NAME, AttentionBatch
from vattention.engine.linears import can_pack, merge_linears, run_packed

_ROWS = (8, 1)
"""What is compiled ahead: passes of several rows, and of one."""


class CompiledModel:
    """A model of transformers, compiled in the background.

    Args:
        model: as `Runner` takes it; in use by nobody else while the constructor runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._ticket = operator.new_ticket(next(model.parameters()).device)
        self._failure: BaseException | None = None
        self._running: int | None = None
        _number_layers(model)
        run = _compile(_run_layer)
        for layer in decoder_layers(model):
            _divert(layer, functools.partial(run, layer), lambda: self._running == threading.get_ident())
        head = model.get_output_embeddings()  # type: ignore[operator]
        if type(head) is nn.Linear and can_pack(head.weight):
            _divert(head, functools.partial(run_packed, head), lambda: self._running == threading.get_ident())
        # Not a daemon: the interpreter must not be taken away under a compiler.
        self._thread: threading.Thread | None = threading.Thread(target=self._prepare, name="vattention-compile")
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether passes run compiled. The first caller to see that they never will gets the warning."""
        if self._thread is not None:
            if self._thread.is_alive():
                return False
            self._thread = None
            if self._failure is not None:
                self._warn(self._failure)
        return self._failure is None

    def wait(self) -> None:
        """Return when compiling has ended, one way or the other."""
        if self._thread is not None:
            self._thread.join()
        self.ready  # noqa: B018

    def __call__(self, batch: AttentionBatch, **inputs: Any) -> Any:
        """A pass of the model over `batch`, once `ready`. `inputs` are those of the model's forward.

        Raises: what the model raises. A failure of the compiler ends compiled passes, with a warning.
        """
        operator.give(self._ticket, batch)
        try:
            return self._forward(**inputs)
        finally:
            operator.give(self._ticket, None)

    def _forward(self, **inputs: Any) -> Any:
        self._running = threading.get_ident()
        try:
            return self._model(**inputs, use_cache=False, **{NAME: self._ticket})
        finally:
            self._running = None

    @torch.inference_mode()
    def _prepare(self) -> None:
        try:
            device = self._ticket.device
            for rows in _ROWS:
                numbers = torch.zeros((1, rows), dtype=torch.int64, device=device)
                keep = torch.zeros(1, dtype=torch.int64, device=device)
                self._forward(input_ids=numbers, position_ids=numbers, logits_to_keep=keep)
        except Exception as error:  # noqa: BLE001 (a compiler is many libraries; all of them leave eager passes)
            self._failure = error

    def _warn(self, error: BaseException) -> None:
        reason = next((line for line in reversed(str(error).strip().splitlines()) if line.strip()), "")
        warnings.warn(
            f"the model is not compiled, and runs as it is, slower: {type(error).__name__}: {reason[:300]}",
            RuntimeWarning,
            stacklevel=4,
        )


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


def _number_layers(model: nn.Module) -> None:
    for part in _attentions(model):
        setattr(part, LAYER, torch.tensor(part.layer_idx))


def _divert(module: nn.Module, compiled: Callable[..., Any], ours: Callable[[], bool]) -> None:
    """Have calls of `module` go to `compiled` in passes that are ours."""
    # The attribute in which torch keeps what `Module.compile` makes: calling, copying and pickling know it.
    before = module._compiled_call_impl or module._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        return (compiled if ours() else before)(*args, **kwargs)

    module._compiled_call_impl = call


def _run_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer._call_impl(*args, **kwargs)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx  # takes seconds to import

        merge_linears(graph)
        return compile_fx(graph, inputs)

    # The whole layer or nothing: a layer in pieces would be compiled for minutes, and again for other data.
    # Isolated: dynamo would count the graphs of all models together, and give up after a few.
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend, isolate_recompiles=True)
