"""From a configuration to a geometry, or to the reason why not. Nothing is loaded for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vattention.cache import KVLayout
from vattention.cache.layout import LayerShape
from vattention.engine.architectures import ACCEPTED, REFUSED, WINDOW_IN_MASK
from vattention.engine.quantised import check_quantised
from vattention.errors import ConfigError, UnsupportedModel

_ROPE = frozenset({"default", "linear", "llama3", "proportional", "yarn"})
"""RoPE kinds whose frequencies depend on nothing but the position. "dynamic" and "longrope" take the longest request of
the whole batch, so one long request would change the others."""

_LAYERS = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class Geometry:
    """What the cache and the engine need to know of a model's shape.

    Attributes:
        shapes: what one token leaves in each layer.
        vocab_size: rows of the embedding.
        max_positions: tokens of the longest request the model was made for.
        window: tokens from which on a window that this engine is not told of would matter; None: never.
    """

    shapes: tuple[LayerShape, ...]
    vocab_size: int
    max_positions: int
    window: int | None = None

    @property
    def num_layers(self) -> int:
        """Layers with attention."""
        return len(self.shapes)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the layer with most of them."""
        return max(shape.num_kv_heads for shape in self.shapes)

    @property
    def head_dim(self) -> int:
        """The widest K or V of a head."""
        return max(max(shape.key_dim, shape.value_dim) for shape in self.shapes)

    def longest_request(self, max_model_len: int | None) -> int:
        """The `max_model_len` to serve: what was asked for, or all that the model was made for.

        Raises:
            ConfigError: more than the model's positions. UnsupportedModel: more than `window`.
        """
        longest = self.max_positions if max_model_len is None else max_model_len
        if longest > self.max_positions:
            raise ConfigError(f"max_model_len={longest} is more than the model's {self.max_positions} positions")
        if self.window is not None and self.window < longest:
            raise UnsupportedModel(
                f"the model's sliding_window={self.window} is narrower than max_model_len={longest}, and this model"
                f" does not tell attention of it: pass max_model_len={self.window} or less"
            )
        return longest

    def layout(self, dtype: torch.dtype, max_num_seqs: int, max_model_len: int, **kind: Any) -> KVLayout:
        """The layout of a cache for this model; `kind` are the keyword arguments of `KVLayout`."""
        shape = self.shapes[0]
        uniform = shape.key_dim == shape.value_dim and set(self.shapes) == {shape}
        kind["shapes"] = None if uniform else self.shapes
        return KVLayout(self.num_layers, self.num_kv_heads, self.head_dim, dtype, max_num_seqs, max_model_len, **kind)


def judge(config: Any) -> Geometry:
    """The geometry of a model that this engine computes exactly.

    Args:
        config: a transformers configuration.

    Raises:
        UnsupportedModel: with the reason.
    """
    kind = config.model_type
    if kind in REFUSED:
        raise UnsupportedModel(f"model type {kind!r} is not supported: {REFUSED[kind]}")
    if kind not in ACCEPTED:
        raise UnsupportedModel(
            f"model type {kind!r} is not among those proved to match transformers: {', '.join(sorted(ACCEPTED))}"
        )
    _check(config)
    positions = _of(config, "max_position_embeddings")
    if not positions:
        raise UnsupportedModel(f"the configuration of this {kind!r} does not say how many positions the model has")
    return Geometry(
        shapes=ACCEPTED[kind](config),
        vocab_size=config.vocab_size,
        max_positions=positions,
        window=_window(config) if kind in WINDOW_IN_MASK else None,
    )


def _check(config: Any) -> None:
    """What an accepted type may be configured to and is not computed."""
    check_quantised(config)
    for rope in _rope_kinds(config):
        if rope not in _ROPE:
            raise UnsupportedModel(
                f"RoPE of kind {rope!r} may depend on the longest request of a batch, so requests would change each"
                f" other; built are {', '.join(sorted(_ROPE))}"
            )
    kinds = set(_of(config, "layer_types") or ())
    if not kinds <= _LAYERS:
        raise UnsupportedModel(f"layers of kinds {sorted(kinds)}: only full and sliding attention are known here")
    # "vision" makes image tokens see each other, and there are none in text.
    if _of(config, "use_bidirectional_attention") not in (None, False, "vision"):
        raise UnsupportedModel("use_bidirectional_attention: a token would see later ones, which are not computed yet")
    for name in ("add_cross_attention", "is_encoder_decoder"):
        if _of(config, name):
            raise UnsupportedModel(f"{name}: attention to another input is not computed here")
    if _of(config, "num_kv_shared_layers"):
        raise UnsupportedModel("num_kv_shared_layers: layers that read the K and V of others are not built")


def _window(config: Any) -> int | None:
    """The sliding window in force in at least one layer, or None."""
    window: int | None = _of(config, "sliding_window")
    kinds = _of(config, "layer_types")
    return None if kinds is not None and "sliding_attention" not in kinds else window


def _rope_kinds(config: Any) -> set[str]:
    """Every RoPE kind in a configuration; transformers keeps one set of parameters, or one a kind of layer."""
    parameters = _of(config, "rope_parameters") or {}
    sets = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    return {p.get("rope_type") or "default" for p in sets}


def _of(config: Any, name: str) -> Any:
    return getattr(config, name, None)
