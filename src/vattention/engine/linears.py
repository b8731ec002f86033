"""Linear layers in a compiled graph: those that share an input become one, by the fastest product there is.

A pass over the graph of torch.compile, before inductor sees it. One wide product beats three narrow ones: q, k and v,
or gate and up. The product is that of `engine.cpu_linear`, or of oneDNN where that cannot be had: both multiply
considerably faster by weights that they have laid out for themselves. That copy is made when it is first needed, and an
attribute of the first weight of each group: it lives as long as the weights do.

Only bfloat16 and float16: there a packed product rounds as torch's own does, once, from float32 sums. float32
is left to torch, whose results the tests compare to.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch

from vattention.engine import cpu_linear
from vattention.engine.cpu_linear import Linear
from vattention.engine.kept import Kept
from vattention.memory.limits import memory_headroom

_PACKED = "vattention_packed"
_HINT = 64
"""Rows that oneDNN lays weights out for."""

_library = torch.library.Library("vattention", "FRAGMENT")
_library.define("linears(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor")


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN multiplies by this weight on this processor."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    dtype = weight.dtype
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def has_room(model: torch.nn.Module) -> bool:
    """Whether there is memory for packed copies of a model's linear layers: they may take half of what is left."""
    weights = [part.weight for part in model.modules() if isinstance(part, torch.nn.Linear)]
    left = memory_headroom()
    return left is None or sum(weight.nbytes for weight in weights if can_pack(weight)) <= left // 2


def run_packed(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """A linear layer by itself, its weights packed."""
    return run(x, [layer.weight], [] if layer.bias is None else [layer.bias])


def merge_linears(graph: torch.fx.GraphModule) -> None:
    """Replace the linear layers of a graph, in place, by as few calls of `vattention::linears` as there are inputs."""
    groups: dict[tuple[Any, bool], list[Any]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in (torch._C._nn.linear, torch.nn.functional.linear):
            x, weight, bias = (*node.args, *node.kwargs.values(), None)[:3]
            given = weight.op == "placeholder" and (bias is None or bias.op == "placeholder")
            value = weight.meta.get("example_value")
            if given and value is not None and can_pack(value):
                groups.setdefault((x, bias is not None), []).append(node)
    for (x, _), nodes in groups.items():
        weights, biases = zip(*((*node.args, *node.kwargs.values(), None)[1:3] for node in nodes), strict=True)
        given = [bias for bias in biases if bias is not None]
        with graph.graph.inserting_before(nodes[0]):
            out = graph.graph.call_function(torch.ops.vattention.linears.default, (x, list(weights), given))
        widths = [weight.meta["example_value"].shape[0] for weight in weights]
        for node, end, width in zip(nodes, itertools.accumulate(widths), widths, strict=True):
            columns: Any = (..., slice(end - width, end))
            with graph.graph.inserting_before(node):
                part = graph.graph.call_function(operator.getitem, (out, columns))
            node.replace_all_uses_with(part)
            graph.graph.erase_node(node)
    for node in graph.graph.nodes:
        # A part is no longer dense: what needs a copy now gets one.
        if groups and node.op == "call_method" and node.target == "view":
            node.target = "reshape"
    graph.recompile()


def run(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """What `vattention::linears` does."""
    return _multiply(x, weights, biases)  # looked up at every call, so that it can be timed


def _multiply(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    # This comes a hundred times between two tokens: what is known of the layers is not asked again.
    kept: Kept | None = getattr(weights[0], _PACKED, None)
    addresses = [tensor.data_ptr() for tensor in (*weights, *biases)]
    if kept is None or kept.value[0] != addresses:
        joined = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        bias = torch.cat(list(biases)) if biases else None
        kept = Kept((addresses, Linear(joined, bias) if cpu_linear.can(joined) else _OneDnn(joined, bias)))
        setattr(weights[0], _PACKED, kept)
    out: torch.Tensor = kept.value[1](x)
    return out


class _OneDnn:
    """A linear layer by oneDNN, its weights packed."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _HINT)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


_library.impl("linears", run, "CPU")


@torch.library.register_fake("vattention::linears", lib=_library)
def _(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))
