"""What `import vattention` gives, and what it must not load."""

import subprocess
import sys

import pytest

import vattention

ERRORS = [
    *("VAttentionError", "OutOfPages", "DriverError", "EngineError"),
    *("UnsupportedModel", "InvalidRequest", "PromptTooLong", "ConfigError"),
]
OUTPUTS = ["RequestOutput", "CompletionOutput", "Logprob", "RequestMetrics"]
PUBLIC = [
    *("LLM", "AsyncLLM", "SamplingParams", "StructuredOutput", "RequestOutputKind", *OUTPUTS),
    *("KVCache", "KVLayout", "CacheStats", "VirtualCache", *ERRORS),
]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name: str) -> None:
    assert getattr(vattention, name).__name__ == name
    assert name in vattention.__all__
    assert name in dir(vattention)


def test_nothing_else_is_promised() -> None:
    assert set(vattention.__all__) == set(PUBLIC)
    with pytest.raises(AttributeError, match="Prefix"):
        _ = vattention.Prefix


def test_both_front_doors_are_in_one_room() -> None:
    from vattention.llm import LLM, AsyncLLM

    assert (LLM, AsyncLLM) == (vattention.LLM, vattention.AsyncLLM)


def test_errors_form_one_hierarchy() -> None:
    for name in ERRORS:
        assert issubclass(getattr(vattention, name), vattention.VAttentionError)


def test_importing_is_light() -> None:
    script = """
import sys
import vattention
print("torch" in sys.modules, "transformers" in sys.modules)
vattention.SamplingParams, vattention.RequestOutput, vattention.InvalidRequest
print("torch" in sys.modules, "transformers" in sys.modules)
vattention.LLM, vattention.AsyncLLM, vattention.KVCache
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False", "False", "False", "True", "False"]
