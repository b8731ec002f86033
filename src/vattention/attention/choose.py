"""Which kernel computes a layer.

"auto", the default, asks in order of speed, layer by layer:
- on a CPU: requests with a single row go to `cpu_decode`, the others to `cpu_prefill`. What remains is left to
  `blocked`, whose matrix products are faster than torch's attention there, unless rows are few; then to `sdpa`;
- on a GPU: "flash", torch's own FlashAttention, for everything in half precision but soft caps; "flex" for those, for
  float32, and for V of another width than K; "blocked" where FlexAttention cannot be compiled.

Any name in `NAMES` asks for that kernel and no other. Nothing but torch is needed for "auto": kernels from other
packages are used where they are named.

For CUDA graphs `decode_plan` gives the same choice in another form: `attention.decode_plan` has the seam. `plan.update`
takes the slots and lengths of a pass and overwrites tensors in place, outside of the graph; `plan.attend` is what a
layer calls, inside. A captured call is the one of the kernel that the layer got while it was captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from vattention.attention import blocked, cpu_decode, cpu_prefill, flash_attn, flashinfer, flex, sdpa, varlen
from vattention.attention.base import Attend, Features, Kernel, Segment
from vattention.attention.decode_plan import DecodePlan, DecodeRows
from vattention.attention.family import Family
from vattention.errors import ConfigError, UnsupportedModel

AUTO = "auto"


def _flash() -> Family:
    needed = "it needs a GPU of compute capability 8.0 and a torch built with FlashAttention"
    return Family(
        lambda device: None if varlen.available(device) else needed, varlen.can, varlen.prepare, varlen.decode
    )


def _sdpa() -> Family:
    return Family(lambda _: None, lambda _, k, v, features: sdpa.can(features, k, v), sdpa.prepare)


def _flex() -> Family:
    return Family(flex.missing, flex.can, flex.prepare, flex.decode)


def _blocked() -> Family:
    return Family(lambda _: None, lambda *_: True, blocked.prepare)


_FAMILIES: dict[str, Callable[[], Family]] = {
    "flash": _flash,
    "flex": _flex,
    "flashinfer": flashinfer.family,
    "flash-attn-2": partial(flash_attn.family, 2),
    "flash-attn-3": partial(flash_attn.family, 3),
    "sdpa": _sdpa,
    "blocked": _blocked,
}
_ON_A_GPU = ("flash", "flex", "blocked")

NAMES = (AUTO, *_FAMILIES)
"""What kernels are called."""


def named(name: str, device: torch.device) -> Family:
    """The family of that name, for one engine.

    Raises:
        ConfigError: there is no kernel of that name, or not on this device.
    """
    if name not in _FAMILIES:
        raise ConfigError(f"attention_kernel={name!r}: use one of {', '.join(NAMES)}")
    family = _FAMILIES[name]()
    reason = family.missing(device)
    if reason is not None:
        raise ConfigError(f"attention_kernel={name!r} cannot be used on {device}: {reason}; leave it out, or see auto")
    return family


def only(name: str, family: Family) -> Kernel:
    """A `Kernel` that is this family for every layer. It raises ConfigError for a layer that the family cannot do."""

    def kernel(segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> Attend:
        inner = family.prepare(segments, dtype=dtype, device=device)

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
            check(name, family, query, keys, values, features)
            try:
                return inner(query, keys, values, features)
            except flex.CannotCompile as error:
                raise ConfigError(f"attention_kernel={name!r} cannot be compiled here: leave it out") from error

        return attend

    return kernel


def check(
    name: str, family: Family, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features
) -> None:
    """Raises ConfigError if the family does not compute this layer; looks at no number in the tensors."""
    if not family.can(query, keys, values, features):
        raise ConfigError(
            f"attention_kernel={name!r} does not compute {_asked(features)} in {query.dtype} with K of"
            f" {tuple(keys.shape[2:])} and V of {tuple(values.shape[2:])} (heads, width) on {keys.device}: leave it out"
        )


def _asked(features: Features) -> str:
    """What a layer asks for, in words."""
    names = {"window": "a sliding window", "softcap": "a soft cap", "sinks": "sinks"}
    asked = [words for name, words in names.items() if getattr(features, name) is not None]
    return f"attention with {' and '.join(asked)}" if asked else "plain attention"


def prepare(segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> Attend:
    """The `Kernel` that is called "auto". What a kernel prepares is made once, if it is used at all."""
    every = tuple(segments)
    if device.type != "cpu":
        return _elsewhere(every, dtype, device)
    several = tuple(segment for segment in every if segment.rows > 1)
    single_rows = tuple(segment for segment in every if segment.rows == 1)
    single = functools.cache(lambda: cpu_decode.prepare(single_rows))
    stock = functools.cache(lambda some: sdpa.prepare(some, dtype=dtype, device=device))
    plain = functools.cache(lambda some: blocked.prepare(some, dtype=dtype, device=device))

    longer = functools.cache(lambda: cpu_prefill.prepare(several))

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        alone = len(several) < len(every) and cpu_decode.can(query, keys, values)
        together = bool(several) and cpu_prefill.can(query, keys, values)
        rest = (*(() if together else several), *(() if alone else single_rows))
        if not rest:
            out = query.new_empty((query.shape[1], query.shape[0], values.shape[3]))
        else:
            by_products = all(blocked.suits(segment, query.shape[0]) for segment in rest)
            kernel = plain if by_products or not sdpa.can(features, keys, values) else stock
            out = kernel(rest)(query, keys, values, features)
        if alone:
            single()(query, keys, values, features, out)
        if together:
            longer()(query, keys, values, features, out)
        return out

    return attend


def _elsewhere(every: tuple[Segment, ...], dtype: torch.dtype, device: torch.device) -> Attend:
    parts = {
        name: functools.cache(partial(_FAMILIES[name]().prepare, every, dtype=dtype, device=device))
        for name in _ON_A_GPU
    }
    return _first_of(device, parts)


def _first_of(device: torch.device, parts: Mapping[str, Callable[[], Attend]]) -> Attend:
    """Attention by the first of `parts`, in their order, that can be had and does what a layer asks for."""
    families = {name: _FAMILIES[name]() for name in parts}

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        for name, family in families.items():
            if family.missing(device) is None and family.can(query, keys, values, features):
                try:
                    return parts[name]()(query, keys, values, features)
                except flex.CannotCompile:
                    continue
        raise UnsupportedModel(
            f"no kernel here computes decodes of {_asked(features)} in {query.dtype} from numbers on the device alone:"
            " such a pass cannot be captured in a graph"
        )

    return attend


def decode_plan(rows: int, *, bound: int, dtype: torch.dtype, device: torch.device, kernel: str = AUTO) -> DecodePlan:
    """Attention of `rows` decodes that can be captured in a CUDA graph: see `attention.decode_plan`.

    Until its first `update` every row is the first token of slot 0.

    Args:
        bound: the most tokens that any of them may have. Work is divided by it: a plan for much longer requests than
            there are leaves much of a GPU idle.
        dtype, device: those of the cache.
        kernel: one of `NAMES`.

    Raises:
        ConfigError: no such kernel on this device, or one that needs the host for every pass.
    """
    numbers = DecodeRows([0] * rows, [1] * rows, bound=bound, device=device)
    if kernel != AUTO:
        family = named(kernel, device)
        if family.decode is None:
            raise ConfigError(f"attention_kernel={kernel!r} cannot be captured in a graph: leave it out")
        return DecodePlan(numbers, _checked(kernel, family, family.decode(numbers)))
    parts: dict[str, Callable[[], Attend]] = {}
    for name in _ON_A_GPU:
        decode = _FAMILIES[name]().decode
        if decode is not None and (device.type, name) != ("cpu", "flex"):
            parts[name] = functools.cache(partial(decode, numbers))
    return DecodePlan(numbers, _first_of(device, parts))


def cpu_plan(
    rows: int, *, bound: int, dtype: torch.dtype, device: torch.device, table: torch.Tensor | None = None
) -> DecodePlan:
    """As `decode_plan`, on a CPU: attention of `rows` decodes that can be recorded, see `engine.cpu_graphs`.

    `table` as for `cpu_decode.decode`. Its `attend` raises UnsupportedModel for what the kernel does not compute.
    """
    numbers = DecodeRows([0] * rows, [1] * rows, bound=bound, device=device)
    attend = cpu_decode.follow(numbers, table)

    def computed(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        if not cpu_decode.can(query, keys, values, paged=table is not None):
            raise UnsupportedModel(f"no kernel here computes decodes in {query.dtype} in a way that can be recorded")
        return attend(query, keys, values, features)

    return DecodePlan(numbers, computed)


def _checked(name: str, family: Family, inner: Attend) -> Attend:
    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
        check(name, family, query, keys, values, features)
        return inner(query, keys, values, features)

    return attend
