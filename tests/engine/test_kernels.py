"""A kernel asked for by name, through whole engines: other libraries' by what stands in for them."""

from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from support.flash import FlashOnACPU
from support.flash_attn import WithCacheOnACPU
from support.flashinfer import FlashInferOnACPU
from support.models import as_transformers, loaded, prompts_of, teacher_forced, tiny_model
from vattention import LLM, ConfigError, SamplingParams
from vattention.attention import choose, flash_attn, flashinfer, varlen
from vattention.attention.family import Family

PROMPTS = prompts_of(9, 70, 1, 33)
GREEDY = SamplingParams(temperature=0, max_tokens=6, logprobs=1)
TOLERANCE = 0.1


def flash_on_a_cpu() -> Family:
    operator = FlashOnACPU()
    return Family(
        lambda device: None,
        varlen.can,
        partial(varlen.prepare, operator=operator),
        partial(varlen.decode, operator=operator),
    )


STAND_INS = {
    "flash": flash_on_a_cpu,
    "flashinfer": lambda: flashinfer.family(FlashInferOnACPU()),
    "flash-attn-2": lambda: flash_attn.family(2, WithCacheOnACPU()),
    "flash-attn-3": lambda: flash_attn.family(3, WithCacheOnACPU(tile=64)),
}


def worst_error(model: Any, kernel: str) -> float:
    """Of the log-probabilities of generated tokens, against transformers in float32.

    Chunks of prompts beside decodes, more requests than slots, NaN behind every length.
    """
    options: dict[str, Any] = {"max_num_seqs": 3, "max_model_len": 128, "max_num_batched_tokens": 24}
    with LLM(loaded(model), attention_kernel=kernel, poison=True, guard=True, **options) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], GREEDY, use_tqdm=False)
    errors = []
    with as_transformers(deepcopy(model).float()) as reference:
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            (sample,) = output.outputs
            expected = teacher_forced(reference, prompt, sample.token_ids).log_softmax(-1)
            for token, said, row in zip(sample.token_ids, sample.logprobs, expected, strict=True):
                errors.append(abs(said[token].logprob - float(row[token])))
    return max(errors)


def half(model_type: str, **changes: Any) -> Any:
    """A small model with its weights in float16: the numbers of kernels for GPUs, with the fewest lost digits."""
    model = tiny_model(model_type, **changes)
    for weight in model.parameters():
        weight.data = weight.data.half()
    return model


@pytest.mark.parametrize(
    ("kernel", "model_type"),
    [
        ("sdpa", "mistral"),
        ("blocked", "gemma2"),
        ("flash", "mistral"),
        ("flash", "gpt_oss"),
        ("flashinfer", "gemma2"),
        ("flash-attn-2", "gemma2"),
        ("flash-attn-2", "gpt_oss"),
        ("flash-attn-3", "mistral"),
    ],
)
def test_engines_with_a_named_kernel(kernel: str, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel in STAND_INS:
        monkeypatch.setitem(choose._FAMILIES, kernel, STAND_INS[kernel])
    model = half(model_type, **({"head_dim": 64} if kernel == "flashinfer" else {}))
    assert worst_error(model, kernel) < TOLERANCE


@pytest.mark.slow
def test_an_engine_with_flexattention() -> None:
    """Compiled for this processor, in float32."""
    assert worst_error(tiny_model("gemma2"), "flex") < 1e-3


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("mistral", {"window": None}), ("gemma2", {"softcap": None}), ("gpt_oss", {"sinks": None})],
)
def test_the_control_of_the_one_above(
    model_type: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that forgets a feature is seen."""
    real = STAND_INS["flash-attn-2"]()

    def prepare(*args: Any, **kwargs: Any) -> Any:
        attend = real.prepare(*args, **kwargs)
        return lambda query, keys, values, features: attend(query, keys, values, replace(features, **changes))

    monkeypatch.setitem(choose._FAMILIES, "flash-attn-2", lambda: replace(real, prepare=prepare))
    assert worst_error(half(model_type), "flash-attn-2") > 2 * TOLERANCE


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(tiny_model("gemma2"))
    with pytest.raises(ConfigError, match="'fast': use one of auto, flash, flex, flashinfer"):
        LLM(model, attention_kernel="fast")
    for name in ("flash", "flashinfer", "flash-attn-2", "flash-attn-3"):
        with pytest.raises(ConfigError, match=f"{name}.* cannot be used on cpu: it needs a GPU"):
            LLM(model, attention_kernel=name)
    with pytest.raises(ConfigError, match=r"'sdpa' does not compute attention with .*a soft cap in torch\.float32"):
        LLM(model, attention_kernel="sdpa", kv_cache_memory="64MiB", max_model_len=64)
    with pytest.raises(ConfigError, match="'blocked' is for slots"):
        LLM(model, attention_kernel="blocked", cache="paged", kv_cache_memory="64MiB", max_model_len=64)
    monkeypatch.setitem(choose._FAMILIES, "flash", STAND_INS["flash"])
    with pytest.raises(ConfigError, match=r"'flash' does not compute .* in torch\.float32"):
        LLM(model, attention_kernel="flash", kv_cache_memory="64MiB", max_model_len=64)
    for name in (None, "auto"):
        LLM(model, attention_kernel=name, kv_cache_memory="64MiB", max_model_len=64).close()
