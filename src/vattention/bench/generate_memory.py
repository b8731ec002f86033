"""What `VirtualCache` holds and moves, counted, against what transformers' caches do by their definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache

from vattention.integrations import VirtualCache

_PAGE = 4096
_RAGGED = (8000, 2000, 500, 100)


@dataclass(frozen=True)
class Bar:
    """One comparison.

    Attributes:
        held, reference: bytes.
        at_most: the largest `held / reference` that passes.
    """

    name: str
    held: int
    reference: int
    at_most: float

    @property
    def ratio(self) -> float:
        """Of what is held to the reference."""
        return self.held / self.reference if self.reference else math.inf if self.held else 0.0

    @property
    def passed(self) -> bool:
        """Whether the bar is met."""
        return self.ratio <= self.at_most

    def row(self) -> tuple[object, ...]:
        """For a table."""
        return self.name, self.held, self.reference, f"{self.ratio:.3f}", f"{self.at_most:.3f}"


class _Geometry:
    """K and V of one model, as tensors of zeros that take no memory."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        text = config.get_text_config(decoder=True)
        self.config, self.dtype, self.layers = config, dtype, text.num_hidden_layers
        self.heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self.width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    @property
    def token(self) -> int:
        """Bytes."""
        return 2 * self.layers * self.heads * self.width * self.dtype.itemsize

    def update(self, cache: Any, batch: int, tokens: int) -> None:
        """One forward pass."""
        self.write(cache, self.states(batch, tokens))

    def states(self, batch: int, tokens: int, *, alike: bool = False) -> torch.Tensor:
        """K or V of one layer; no two rows are the same, or all are."""
        rows = torch.zeros(batch) if alike else torch.arange(batch)
        return rows.to(self.dtype).reshape(batch, 1, 1, 1).expand(batch, self.heads, tokens, self.width)

    def write(self, cache: Any, states: torch.Tensor) -> None:
        """The same K and V in every layer."""
        for layer in range(self.layers):
            cache.update(states, states, layer)


def count(config: Any, dtype: torch.dtype) -> list[Bar]:
    """Every bar, for a model of this config whose layers all have full attention."""
    model = _Geometry(config, dtype)
    return [_growing(model), _sized(model), _ragged(model), *_beams(model), *_moved(model)]


def _growing(model: _Geometry) -> Bar:
    with VirtualCache(model.config) as cache:
        model.update(cache, 4, 1000)
        for _ in range(3):
            model.update(cache, 4, 1)
        stats = cache.stats()
        streams = sum(2 * (model.heads if layer.head_major else 1) for layer in cache.layers)
        page = cache.page_size or 0
    dynamic = 4 * 1003 * model.token
    return Bar(
        "4 rows of 1,003 tokens, against DynamicCache (and a page a stream)",
        stats.created,
        dynamic,
        1 + 4 * streams * page / dynamic,
    )


def _sized(model: _Geometry) -> Bar:
    with VirtualCache(model.config, max_cache_len=8000) as cache:
        model.update(cache, 4, 1000)
        return Bar(
            "sized for 8,000 tokens, 1,000 there, against StaticCache",
            cache.stats().created,
            4 * 8000 * model.token,
            0.2,
        )


def _ragged(model: _Geometry) -> Bar:
    longest = max(_RAGGED)
    mask = torch.arange(longest)[None] >= longest - torch.tensor(_RAGGED)[:, None]
    with VirtualCache(model.config, attention_mask=mask) as cache:
        model.update(cache, len(_RAGGED), longest)
        held = cache.stats().created
    name = "8,000, 2,000, 500 and 100 tokens in one batch, against DynamicCache"
    return Bar(name, held, len(_RAGGED) * longest * model.token, 0.4)


def _beams(model: _Geometry) -> list[Bar]:
    with VirtualCache(model.config, page_size=_PAGE) as cache:
        model.update(cache, 1, 2000)
        one = cache.stats().created
        streams = sum(2 * (model.heads if layer.head_major else 1) for layer in cache.layers)
    with VirtualCache(model.config, page_size=_PAGE) as cache:
        model.write(cache, model.states(8, 2000, alike=True))  # generate() computes the prompt for each
        first = cache.stats()
        model.update(cache, 8, 1)
        cache.reorder_cache(torch.zeros(8, dtype=torch.int64))  # what the first step of beam search says
        second = cache.stats()
        model.update(cache, 8, 1)
        cache.reorder_cache(torch.tensor([1, 0, 0, 3, 4, 4, 6, 7]))
        third = cache.stats()
    held = "8 beams of a 2,000-token prompt, {}, against one"
    copied = "bytes copied {}, against a page a stream and row"
    one_page = 1 - 1 / _PAGE  # no full page
    return [
        Bar(held.format("computed"), first.created, one, 1.2),
        Bar(held.format("and reordered"), second.created, one, 1.2),
        Bar(copied.format("for 7 more"), first.copied, 7 * streams * _PAGE, one_page),
        Bar(copied.format("when all follow one"), second.copied - first.copied, 7 * streams * _PAGE, one_page),
        Bar(copied.format("when 3 follow others"), third.copied - second.copied, 3 * streams * _PAGE, one_page),
    ]


class _Written(TorchDispatchMode):
    """Adds up the bytes of every result that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.bytes += result.nbytes
        return result


def written(work: Callable[[], None]) -> int:
    """Bytes that torch operations write during `work`."""
    with _Written() as mode:
        work()
    return mode.bytes


def _moved(model: _Geometry) -> list[Bar]:
    """What one more token of 4 rows writes, at two lengths of context."""
    ours: list[int] = []
    dynamic: list[int] = []
    states = model.states(4, 1)
    for tokens in (500, 4000):
        with VirtualCache(model.config) as cache:
            for other, counts in ((cache, ours), (DynamicCache(config=model.config), dynamic)):
                model.update(other, 4, tokens)
                counts.append(written(lambda other=other: model.write(other, states)))  # type: ignore[misc]
    return [
        Bar("bytes a token of 4 rows writes, at 500 tokens, against its K and V", ours[0], 4 * model.token, 1.0),
        Bar("the same at 4,000 tokens", ours[1], 4 * model.token, 1.0),
        Bar("the same at 4,000 tokens, against DynamicCache", ours[1], dynamic[1], 0.01),
    ]
