"""The engine on a GPU: `LLM(..., device="cuda")` against transformers, and what happens when pages come and go.

`make gpu-check` runs these. Nothing here is about speed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support import emulated_cuda
from support.models import (
    TOLERANCE,
    Recorder,
    engine_for,
    loaded,
    prompts_of,
    relative_error,
    run,
    shared,
    teacher_forced,
    tiny_model,
)
from vattention import LLM, SamplingParams
from vattention.attention import blocked, varlen
from vattention.attention.base import Features, Segment
from vattention.engine import sampler
from vattention.engine.engine import Engine
from vattention.engine.logprobs import top_logprobs

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(emulated_cuda.ACTIVE, reason="needs kernels, which the emulation does not have"),
]

GREEDY = SamplingParams(temperature=0, max_tokens=12)
WIDE = {"head_dim": 64, "max_position_embeddings": 2048}
"""Heads that FlashAttention takes, and room for more tokens than fit the first page."""
DENSE: dict[str, Any] = {"layers_per_stream": None, "kv_together": True}
"""One stream: 3 layers x K and V x 2 heads of 64, so 682 tokens of float32 in a page of 2 MiB."""


def engine_on_gpu(model: Any, **options: Any) -> Engine:
    return engine_for(loaded(model), device=DEVICE, poison=True, **options)


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights in `dtype`, in place. Not its buffers: rotary frequencies are always float32."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def worst_error(engine: Engine, reference: Any, requests: Any) -> float:
    """Of the logits of all tokens, against one pass without any cache on the CPU; and greedy took the largest."""
    recorder: Any = engine._runner
    assert isinstance(recorder, Recorder)
    errors = []
    for request in requests:
        logits = recorder.of(request.request_id).cpu()
        assert logits.argmax(-1).tolist() == list(request.output_token_ids)
        expected = teacher_forced(reference, request.prompt_token_ids, request.output_token_ids)
        errors.append(relative_error(logits, expected))
    return max(errors)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_oss", "minicpm3"])
def test_float32_logits_are_those_of_transformers(model_type: str) -> None:
    """Plain attention, windows, soft caps, sinks, and V of another width than K."""
    model = tiny_model(model_type).to(DEVICE)
    engine = engine_on_gpu(model, max_num_batched_tokens=32)
    requests = run(engine, prompts_of(1, 17, 64, 100, 33), GREEDY)
    assert worst_error(engine, shared(model_type), requests) < 10 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [{}, {"head_major": True}, DENSE], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "mistral"])  # mistral has a window
def test_half_precision_is_close_and_by_flash_attention(
    model_type: str, layout: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    real = varlen.prepare
    monkeypatch.setattr(varlen, "prepare", lambda *args, **kwargs: used.append(1) or real(*args, **kwargs))
    reference = tiny_model(model_type, **WIDE)
    plain, model = (rounded(tiny_model(model_type, **WIDE), dtype).to(DEVICE) for _ in range(2))
    reference.load_state_dict(model.state_dict())  # the same rounded weights, computed in float32
    engine = engine_on_gpu(model, max_num_batched_tokens=32, **layout)
    requests = run(engine, prompts_of(1, 17, 64, 100, 33), GREEDY)
    assert used
    theirs = []
    for request in requests:
        ids = torch.tensor([[*request.prompt_token_ids, *request.output_token_ids[:-1]]], device=DEVICE)
        with torch.inference_mode():
            logits = plain(input_ids=ids, use_cache=False).logits[0, len(request.prompt_token_ids) - 1 :].float().cpu()
        theirs.append(
            relative_error(logits, teacher_forced(reference, request.prompt_token_ids, request.output_token_ids))
        )
    # Of the same rounding errors; the largest of some thousand logits varies.
    assert worst_error(engine, reference, requests) < 3 * max(theirs) + 0.02


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 1, 100, 257])
def test_flash_attention_beside_plain_operations(window: int | None, width: int) -> None:
    """Decodes and chunks in one batch, with NaN behind every length."""
    segments = [Segment(3, 0, 1, 700), Segment(0, 1, 1, 1), Segment(2, 2, 130, 900), Segment(1, 132, 40, 40)]
    generator = torch.Generator(DEVICE).manual_seed(0)
    keys, values = torch.full((2, 4, 1024, 2, width), torch.nan, dtype=torch.bfloat16, device=DEVICE).unbind()
    for segment in segments:
        for layer in (keys, values):
            layer[segment.slot, : segment.length].normal_(generator=generator)
    query = torch.empty(172, 8, width, dtype=torch.bfloat16, device=DEVICE).normal_(generator=generator)
    asked = Features(window=window)
    flash, exact = (
        prepare(segments, dtype=dtype, device=keys.device)(
            query.to(dtype).transpose(0, 1), keys.to(dtype), values.to(dtype), asked
        ).float()
        for prepare, dtype in ((varlen.prepare, torch.bfloat16), (blocked.prepare, torch.float32))
    )
    torch.testing.assert_close(flash, exact, atol=2e-2, rtol=2e-2)


def test_a_request_that_grows_over_pages() -> None:
    engine = engine_on_gpu(tiny_model(**WIDE).to(DEVICE), max_model_len=2048, max_num_batched_tokens=256, **DENSE)
    params = SamplingParams(temperature=0, max_tokens=64)
    requests = run(engine, prompts_of(650, 660, 1330), params)
    assert worst_error(engine, tiny_model(**WIDE), requests) < 10 * TOLERANCE
    assert engine._cache.pool.stats().created >= 2 + 2 + 3


def test_preemption_changes_no_logits() -> None:
    """Four pages for four requests that need two each."""
    model = tiny_model(**WIDE).to(DEVICE)
    engine = engine_on_gpu(model, max_model_len=2048, max_num_batched_tokens=256, memory="8MiB", **DENSE)
    requests = run(engine, prompts_of(660, 661, 662, 663), SamplingParams(temperature=0, max_tokens=40))
    recorder: Any = engine._runner
    again = [name for batch in recorder.passes for name, start, _ in batch if start == 0]
    assert len(again) > 4, "somebody has begun twice"
    assert worst_error(engine, tiny_model(**WIDE), requests) < 10 * TOLERANCE


def test_samples_share_a_prompt_and_then_part() -> None:
    model = tiny_model(**WIDE).to(DEVICE)
    outputs = []
    for n in (1, 3):
        engine = engine_on_gpu(model, max_model_len=2048, max_num_batched_tokens=256, **DENSE)
        params = SamplingParams(n=n, temperature=1.0, seed=5, max_tokens=20)
        (request,) = run(engine, prompts_of(675), params)
        outputs.append([tuple(sample.output_token_ids) for sample in request.family])
    (alone,), several = outputs
    assert several[0] == alone, "the first sample is what it is without the others"
    assert len(set(several)) == 3


def test_a_directory_on_the_device_and_back(tmp_path: Path) -> None:
    tiny_model(**WIDE).save_pretrained(tmp_path)
    with LLM(tmp_path, device=DEVICE, dtype="bfloat16", kv_cache_memory="256MiB") as llm:
        assert next(llm.model.parameters()).device.type == DEVICE
        outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts_of(5, 100)], GREEDY)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [12, 12]
        driver = llm.engine._cache.pool.driver
    assert driver.closed


def test_the_device_is_what_auto_takes_and_its_memory_the_default_budget(tmp_path: Path) -> None:
    tiny_model(**WIDE).save_pretrained(tmp_path)
    with LLM(tmp_path, max_model_len=1000, max_num_seqs=2) as llm:
        assert next(llm.model.parameters()).device.type == DEVICE
        _, total = torch.cuda.mem_get_info()
        assert 0 < llm.stats().budget <= 0.9 * total


def test_out_of_pages_ends_a_request_and_nothing_else() -> None:
    """Two pages: 1,365 tokens at most."""
    model = loaded(tiny_model(**WIDE).to(DEVICE))
    with pytest.warns(UserWarning, match="more than the KV budget holds"):
        llm = LLM(model, kv_cache_memory="4MiB", max_num_seqs=2, **DENSE)
    with llm:
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in prompts_of(1350, 20)]
        long, short = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
        assert (long.outputs[0].finish_reason, short.outputs[0].finish_reason) == ("length", "length")
        assert len(long.outputs[0].token_ids) < 100 == len(short.outputs[0].token_ids)


ROWS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1),
    SamplingParams(temperature=0.7, top_k=20),
    SamplingParams(temperature=1.5, top_p=0.9),
    SamplingParams(temperature=1, top_k=500, top_p=0.5, min_p=0.01),
]


def test_sampling_and_log_probabilities_are_those_of_the_cpu() -> None:
    logits = torch.randn(len(ROWS) * 20, 5000, generator=torch.Generator().manual_seed(0)) * 4
    rows = [sampler.Row(params, seed, 7) for seed in range(20) for params in ROWS]
    tokens = sampler.sample(logits, rows)
    assert sampler.sample(logits.to(DEVICE), rows) == tokens
    wanted = [0, 5, 3, 1] * 25
    ours, theirs = (top_logprobs(x, tokens, wanted, None) for x in (logits.to(DEVICE), logits))
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for token, entry in one.items():
            assert entry.rank == other[token].rank
            assert entry.logprob == pytest.approx(other[token].logprob, abs=1e-4)
