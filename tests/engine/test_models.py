"""Every supported model type against transformers, in float32: greedy tokens, and the logits behind each of them.

The engine's way is the hardest one: chunked prefill, decodes in the same pass, four requests of different length at
once, NaN in all mapped memory past each request. The reference is each request alone, with transformers' own attention
and cache.
"""

from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from support.models import (
    TOLERANCE,
    Recorder,
    as_transformers,
    engine_for,
    greedy,
    loaded,
    prompts_of,
    relative_error,
    run,
    teacher_forced,
    tiny_model,
)
from vattention.engine.loading import SUPPORTED
from vattention.engine.sampling_params import SamplingParams

TOKENS = 10
PROMPTS = prompts_of(1, 7, 40, 90)

# What the type can do and its defaults leave off, or what it needs to be built small.
OPTIONS: dict[str, dict[str, Any]] = {
    "cohere": {"use_qk_norm": True, "logit_scale": 0.3},
    "exaone4": {"sliding_window": 256},
    "gpt_neox": {"num_key_value_heads": 6, "rotary_pct": 0.5},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 3.0,
    },
    "mistral": {"sliding_window": 256},
    "olmo": {"clip_qkv": 2.0},
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 1},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}
# RoPE kinds, on the type that has them all; trained on 32 positions, so that the long prompts are beyond.
ROPE: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 1e4,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
}
CASES = [
    *(pytest.param(kind, OPTIONS.get(kind, {}), id=kind) for kind in sorted(SUPPORTED)),
    *(pytest.param("llama", {"rope_parameters": rope}, id=f"llama-{name}") for name, rope in ROPE.items()),
    pytest.param("llama", {"num_key_value_heads": 6}, id="llama-without-groups"),
    pytest.param("llama", {"num_key_value_heads": 1, "attention_bias": True}, id="llama-one-kv-head"),
]


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_tokens_and_logits(model_type: str, changes: dict[str, Any]) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    model = tiny_model(model_type, **changes)
    engine = engine_for(loaded(model), max_num_batched_tokens=16, poison=True, memory="32MiB")
    requests = run(engine, PROMPTS, SamplingParams(temperature=0, max_tokens=TOKENS))
    recorder = engine._runner
    assert isinstance(recorder, Recorder)
    with as_transformers(model):
        for request in requests:
            expected = greedy(model, request.prompt_token_ids, TOKENS)
            assert tuple(request.output_token_ids) == expected
            logits = teacher_forced(model, request.prompt_token_ids, expected)
            assert relative_error(recorder.of(request.request_id), logits) < TOLERANCE
        assert sees_attention(model, PROMPTS[3]), "a test with this model would see nothing"


def sees_attention(model: Any, prompt: tuple[int, ...]) -> bool:
    """Whether half the attention scale moves the logits far beyond the tolerance."""
    before = teacher_forced(model, prompt, [0])
    for module in model.modules():
        if isinstance(scaling := getattr(module, "scaling", None), float):
            module.scaling = scaling / 2
    return relative_error(teacher_forced(model, prompt, [0]), before) > 1000 * TOLERANCE


def test_a_batch_whose_requests_see_each_other_would_be_seen() -> None:
    """The control: the flat batch as one long text, which is what a kernel without segments would compute."""
    model = tiny_model()
    first, second = PROMPTS[1], PROMPTS[2]
    alone = teacher_forced(model, second, [0])
    positions = torch.tensor([[*range(len(first)), *range(len(second))]])
    with torch.inference_mode():
        # An explicit mask of ones keeps transformers from finding the two texts in the positions.
        mixed = model(
            input_ids=torch.tensor([[*first, *second]]),
            attention_mask=torch.ones(1, positions.shape[1]),
            position_ids=positions,
            use_cache=False,
        ).logits[0, -1:]
    assert relative_error(mixed, alone) > 1000 * TOLERANCE
