"""vattention: LLM serving with the KV cache in virtual memory.

Importing this package is light; torch and transformers load when something that needs them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vattention.async_llm import AsyncLLM
    from vattention.cache import CacheStats, KVCache, KVLayout
    from vattention.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from vattention.engine.sampling_params import RequestOutputKind, SamplingParams
    from vattention.engine.structured import StructuredOutput
    from vattention.errors import (
        ConfigError,
        DriverError,
        EngineError,
        InvalidRequest,
        OutOfPages,
        PromptTooLong,
        UnsupportedModel,
        VAttentionError,
    )
    from vattention.integrations.transformers_cache import VirtualCache
    from vattention.llm import LLM

_HOME = {
    "CacheStats": "vattention.cache",
    "KVCache": "vattention.cache",
    "KVLayout": "vattention.cache",
    "CompletionOutput": "vattention.engine.outputs",
    "Logprob": "vattention.engine.outputs",
    "RequestMetrics": "vattention.engine.outputs",
    "RequestOutput": "vattention.engine.outputs",
    "RequestOutputKind": "vattention.engine.sampling_params",
    "SamplingParams": "vattention.engine.sampling_params",
    "StructuredOutput": "vattention.engine.structured",
    "AsyncLLM": "vattention.async_llm",
    "LLM": "vattention.llm",
    "VirtualCache": "vattention.integrations.transformers_cache",
    "ConfigError": "vattention.errors",
    "DriverError": "vattention.errors",
    "EngineError": "vattention.errors",
    "InvalidRequest": "vattention.errors",
    "OutOfPages": "vattention.errors",
    "PromptTooLong": "vattention.errors",
    "UnsupportedModel": "vattention.errors",
    "VAttentionError": "vattention.errors",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CacheStats",
    "CompletionOutput",
    "ConfigError",
    "DriverError",
    "EngineError",
    "InvalidRequest",
    "KVCache",
    "KVLayout",
    "Logprob",
    "OutOfPages",
    "PromptTooLong",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutput",
    "UnsupportedModel",
    "VAttentionError",
    "VirtualCache",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
