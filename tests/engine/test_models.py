"""Every accepted model type against transformers, in float32: greedy tokens, and the logits behind each of them.

The engine's way is the hardest one: chunked prefill, decodes in the same pass, four requests of different length at
once, NaN in all mapped memory past each request. The reference is each request alone, by transformers' own eager
attention, in one pass without a cache: the tokens are greedy where each is the largest of the reference's logits after
the ones before it.
"""

import functools
from typing import Any

import pytest
import torch

from support.models import (
    COMMON,
    OPTIONS,
    TOLERANCE,
    WINDOW,
    Recorder,
    as_transformers,
    engine_for,
    features_of,
    loaded,
    one_pass,
    prompts_of,
    relative_error,
    run,
    shared,
    teacher_forced,
    tiny_model,
    watching,
)
from vattention.engine.architectures import ACCEPTED, WINDOW_IN_MASK
from vattention.engine.request import Request
from vattention.engine.sampling_params import SamplingParams

TOKENS = 10
PROMPTS = prompts_of(1, 7, 40, 90)
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS)
SEEN = 100 * TOLERANCE
"""A change of the logits that no comparison in this file would pass."""

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
VARIANTS = [
    *(pytest.param("llama", {"rope_parameters": rope}, id=f"llama-{name}") for name, rope in ROPE.items()),
    pytest.param("llama", {"num_key_value_heads": 6}, id="llama-without-groups"),
    pytest.param("llama", {"num_key_value_heads": 1, "attention_bias": True}, id="llama-one-kv-head"),
    pytest.param("gpt2", {"scale_attn_weights": False, "initializer_range": 0.1}, id="gpt2-unscaled"),
    pytest.param("gpt_bigcode", {"multi_query": False}, id="gpt_bigcode-multi-head"),
    pytest.param("deepseek_v2", {"q_lora_rank": 24}, id="deepseek_v2-latent-queries"),
    pytest.param("mistral", {"sliding_window": None}, id="mistral-without-window"),
    pytest.param("qwen2", {"use_sliding_window": False, "layer_types": None}, id="qwen2-without-window"),
    pytest.param("gemma2", {"attn_logit_softcapping": None}, id="gemma2-without-softcap"),
    pytest.param("gemma4_text", {"attention_k_eq_v": True}, id="gemma4_text-k-is-v"),
]
CASES = [*(pytest.param(kind, {}, id=kind) for kind in sorted(ACCEPTED)), *VARIANTS]


def compare(model: Any, engine: Any, requests: list[Request]) -> None:
    """Tokens and logits of `requests`, which `engine` has computed, with those of the reference."""
    recorder = engine._runner
    assert isinstance(recorder, Recorder)
    for request in requests:
        tokens = tuple(request.output_token_ids)
        logits = expected(model, tuple(request.prompt_token_ids), tokens)
        assert relative_error(recorder.of(request.request_id), logits) < TOLERANCE
        # Greedy, up to ties closer than that.
        lead = logits.max(-1).values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float(lead.max() / logits.std()) < TOLERANCE


@functools.cache
def expected(model: Any, prompt: tuple[int, ...], output: tuple[int, ...]) -> torch.Tensor:
    with as_transformers(model):
        return teacher_forced(model, prompt, output)


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_tokens_and_logits(model_type: str, changes: dict[str, Any]) -> None:
    model = tiny_model(model_type, **changes) if changes else shared(model_type)
    engine = engine_for(loaded(model), max_num_batched_tokens=16, poison=True, memory="32MiB")
    compare(model, engine, run(engine, PROMPTS, GREEDY))


@pytest.mark.parametrize("model_type", sorted(ACCEPTED))
def test_the_test_sees_every_feature_of_the_type(model_type: str) -> None:
    """The control: our own attention without one of the features is far from what is compared above."""
    model, prompt = shared(model_type), PROMPTS[3]
    right = one_pass(model, prompt)
    half = watching(set(), scaling=lambda scaling: 0.5 * (1.0 if scaling is None else scaling))
    assert relative_error(one_pass(model, prompt, half), right) > SEEN
    for feature in ("window", "softcap", "sinks"):
        off = relative_error(one_pass(model, prompt, watching(set(), **{feature: None})), right)
        assert off > SEEN if feature in features_of(model_type) else off == 0.0, feature


def test_windows_are_tested_where_there_are_any() -> None:
    """A type whose configuration has a window passes one to attention, or is known to keep it to its mask."""
    for model_type in sorted(ACCEPTED):
        config = shared(model_type).config
        if getattr(config, "sliding_window", None) is not None:
            assert ("window" in features_of(model_type)) == (model_type not in WINDOW_IN_MASK), model_type


# -- every way to run, for the types most people have -----------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1, "max_num_batched_tokens": 256},
    "ragged batch": {"max_num_batched_tokens": 256},
    "chunked prefill": {"max_num_batched_tokens": 11},
    "guard": {"guard": True, "page_size": 4096, "max_num_batched_tokens": 32},
    "poison": {"poison": True, "page_size": 4096, "max_num_batched_tokens": 32},
    "sliced layers": {"layers_per_stream": 2, "kv_together": True, "poison": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", COMMON)
def test_every_way_to_run(model_type: str, way: str) -> None:
    model = shared(model_type)
    engine = engine_for(loaded(model), **{"memory": "32MiB", **WAYS[way]})
    compare(model, engine, run(engine, PROMPTS, GREEDY))
    if way == "alone":
        assert all(len(chunks) == 1 for chunks in engine._runner.passes)
    if way == "chunked prefill":
        assert max(sum(end - start for _, start, end in chunks) for chunks in engine._runner.passes) <= 11


@pytest.mark.parametrize("model_type", COMMON)
def test_under_preemption(model_type: str) -> None:
    """Four prompts that get in together and grow out of the budget together: it holds two of the requests' ends."""
    model = shared(model_type)
    prompts, page, tokens = prompts_of(20, 20, 20, 20), 4096, 60
    layout = loaded(model).geometry.layout(torch.float32, 4, 256)
    one = sum(-(-80 * stream.token_bytes // page) for stream in layout.streams)
    if one < 2 * len(layout.streams):  # the request grows by no page: let it become longer
        tokens = 140
        one = sum(-(-160 * stream.token_bytes // page) for stream in layout.streams)
    engine = engine_for(loaded(model), memory=2 * one * page, page_size=page, poison=True, max_num_batched_tokens=128)
    requests = run(engine, prompts, SamplingParams(temperature=0, max_tokens=tokens))
    compare(model, engine, requests)
    assert engine.scheduler.preemptions > 0, "no pressure, no test"


def test_options_name_accepted_types() -> None:
    assert set(OPTIONS) <= set(ACCEPTED)
    assert len(PROMPTS[2]) > WINDOW
