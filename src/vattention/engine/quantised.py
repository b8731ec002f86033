"""Which quantised checkpoints are loaded: those that transformers runs on this device, and that keep requests apart.

Some methods quantise activations by what else is in the batch, so that a request's tokens would depend on its company.
They are refused, as are those that need a GPU or that nobody has compared.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from vattention.errors import ConfigError, UnsupportedModel

DEQUANTISED = frozenset({"fp8", "mxfp4"})
"""Methods whose kernels need a GPU: transformers makes full weights of them when it loads."""

_PACKAGES = {
    "bitsandbytes": ("accelerate", "bitsandbytes"),
    "compressed-tensors": ("accelerate", "compressed_tensors"),
    "fp8": ("accelerate",),
    "mxfp4": ("accelerate",),
    "torchao": ("accelerate", "torchao"),
}
"""Method -> the packages it needs beside transformers."""


def method_of(config: Any) -> str | None:
    """How the checkpoint is quantised, or None."""
    settings = _settings(config)
    method = None if settings is None else settings.get("quant_method") or "unnamed"
    return None if method is None else str(getattr(method, "value", method))  # an enum once transformers has read it


def check_quantised(config: Any) -> None:
    """Raise UnsupportedModel for a quantised checkpoint that is not loaded, ConfigError for a missing package."""
    settings, method = _settings(config), method_of(config)
    if settings is None or method is None:
        return
    if method not in _PACKAGES:
        raise UnsupportedModel(
            f"checkpoints quantised by {method!r} are not supported on this device: use the original weights, a GGUF"
            f" file, or one quantised by {', '.join(sorted(_PACKAGES))}"
        )
    if problem := _problem(method, settings):
        raise UnsupportedModel(f"this checkpoint is quantised by {method!r}, {problem}: use the original weights")
    for package in _PACKAGES[method]:
        if importlib.util.find_spec(package) is None:
            name = package.replace("_", "-")
            raise ConfigError(f"checkpoints quantised by {method!r} need the package {name}: pip install {name}")


def _settings(config: Any) -> dict[str, Any] | None:
    settings = getattr(config, "quantization_config", None)
    return settings if settings is None or isinstance(settings, dict) else settings.to_dict()


def _problem(method: str, settings: dict[str, Any]) -> str | None:
    """What in the settings is not computed as it should be, or None."""
    if method == "bitsandbytes" and not settings.get("load_in_4bit"):
        return "in 8 bits, whose outliers are found over the whole batch, so that requests would change each other"
    if method == "torchao":
        kind = settings.get("quant_type")
        kind = kind["default"].get("_type") if isinstance(kind, dict) and [*kind] == ["default"] else kind
        if kind != "Int8WeightOnlyConfig":
            return f"as {kind}, and only Int8WeightOnlyConfig was compared"
    if method == "compressed-tensors":
        groups = (settings.get("config_groups") or {}).values()
        if not groups or any(group.get("input_activations") for group in groups):
            return "with activations quantised too, which was not compared"
    return None
