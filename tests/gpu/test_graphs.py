"""Decode passes replayed from CUDA graphs, on a device: the tokens of eager passes, whatever pages do in between.

What is checked of every pass without a device is in tests/engine/test_graphs.py. `make gpu-check` runs these.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from support import emulated_cuda
from support.models import (
    TOLERANCE,
    Recorder,
    as_transformers,
    engine_for,
    loaded,
    prompts_of,
    relative_error,
    run,
    teacher_forced,
    tiny_model,
)
from vattention import LLM, SamplingParams
from vattention.engine.engine import Engine
from vattention.engine.graphs import CudaCapture
from vattention.engine.loading import LoadedModel
from vattention.engine.runner import Runner

DEVICE = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(emulated_cuda.ACTIVE, reason="needs kernels, which the emulation does not have"),
]

WIDE = {"head_dim": 64, "max_position_embeddings": 2048, "initializer_range": 0.05}
"""Weights of this size: half precision then moves logits by 3% of their spread, and a wrong number by more than all."""
DENSE: dict[str, Any] = {"layers_per_stream": None, "kv_together": True}
"""One stream: 3 layers x K and V x 2 heads of 64, so 1,365 tokens of half precision in a page of 2 MiB."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A pass that cannot be captured is an error, unless a test says otherwise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=RuntimeWarning)
        yield


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(tiny_model(**WIDE).bfloat16().to(DEVICE))


def graphed(model: LoadedModel, *, compile: bool = False, **options: Any) -> Engine:
    engine = engine_for(model, device=DEVICE, max_model_len=2048, poison=True, **options)
    recorder: Any = engine._runner
    recorder.runner = Runner(model.model, engine._cache, capture=CudaCapture(DEVICE), compile=compile)
    return engine


def compare(model: LoadedModel, engine: Engine, requests: Any) -> None:
    """The logits of every token are as close to float32 as those of transformers in this dtype, without any cache.

    A number that is not brought up to date would move them by more than their spread.
    """
    recorder: Any = engine._runner
    assert isinstance(recorder, Recorder)
    exact = tiny_model(**WIDE)
    exact.load_state_dict(model.model.state_dict())  # the same rounded weights
    ours, theirs = [], []
    for request in requests:
        expected = teacher_forced(exact, request.prompt_token_ids, request.output_token_ids)
        ours.append(relative_error(recorder.of(request.request_id).cpu(), expected))
        ids = torch.tensor([[*request.prompt_token_ids, *request.output_token_ids[:-1]]], device=DEVICE)
        with as_transformers(model.model) as plain, torch.inference_mode():
            logits = plain(input_ids=ids, use_cache=False).logits[0, len(request.prompt_token_ids) - 1 :]
        theirs.append(relative_error(logits.float().cpu(), expected))
    print(f"PROBE error of logits against float32, ours {max(ours):.3f}, transformers {max(theirs):.3f}")
    assert max(ours) < 3 * max(theirs) + 0.02


def captured(engine: Engine) -> tuple[int, ...]:
    recorder: Any = engine._runner
    return recorder.runner.graphs.captured


def test_growth_over_pages(model: LoadedModel) -> None:
    engine = graphed(model, **DENSE)
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    requests = run(engine, prompts_of(1330, 1350, 20), params)
    assert captured(engine)
    compare(model, engine, requests)
    assert engine._cache.pool.stats().created >= 2 + 2 + 1


def test_requests_that_come_and_go_through_the_buckets(model: LoadedModel) -> None:
    engine = graphed(model, max_num_seqs=8, **DENSE)
    engine.warmup()
    assert captured(engine) == (1, 2, 4, 8)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (5, 10, 15, 20, 25, 30, 35)]
    requests = run(engine, prompts_of(1, 30, 100, 3, 300, 17, 64), params)
    compare(model, engine, requests)


def test_forks(model: LoadedModel) -> None:
    engine = graphed(model, **DENSE)
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=40, ignore_eos=True)
    (request,) = run(engine, prompts_of(1370), params)
    assert len({tuple(sample.output_token_ids) for sample in request.family}) == 3
    assert captured(engine) == (4,)


def test_preemption(model: LoadedModel) -> None:
    """Four pages for four requests that come to need two each."""
    engine = graphed(model, memory="8MiB", max_num_batched_tokens=256, **DENSE)
    requests = run(engine, prompts_of(1340, 1341, 1342, 1343), SamplingParams(temperature=0, max_tokens=40))
    assert sum(request.preemptions for request in requests) > 0
    compare(model, engine, requests)


def test_out_of_pages_ends_a_request_and_nothing_else(model: LoadedModel) -> None:
    engine = graphed(model, memory="2MiB", max_num_seqs=2, max_num_batched_tokens=256, **DENSE)
    params = [SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)] * 2
    long, short = run(engine, prompts_of(1340, 20), params)
    assert len(long.output_token_ids) < 100 == len(short.output_token_ids)
    compare(model, engine, [short])


def test_memory_given_back_and_mapped_anew_under_the_graphs(model: LoadedModel) -> None:
    engine = graphed(model, **DENSE)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    first = run(engine, prompts_of(40, 700), params)
    engine._cache.trim()
    again = run(engine, prompts_of(40, 700), params)
    assert [r.output_token_ids for r in again] == [r.output_token_ids for r in first]


def test_compiled_layers_are_captured(model: LoadedModel) -> None:
    engine = graphed(model, compile=True, **DENSE)
    engine.warmup()
    assert captured(engine) == (1, 2, 4)
    compare(model, engine, run(engine, prompts_of(5, 300), SamplingParams(temperature=0, max_tokens=20)))


def test_a_replay_allocates_nothing(model: LoadedModel) -> None:
    engine = graphed(model, **DENSE)
    engine.warmup()
    request = engine.add_request(prompts_of(20)[0], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    for _ in range(5):
        engine.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for _ in range(20):
        engine.step()
    assert torch.cuda.memory_reserved() == before
    engine.abort(request.request_id)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
def test_float32_soft_caps_and_sinks_by_flex_attention(model_type: str) -> None:
    """Tokens of transformers, in full precision; whichever way passes ran where FlexAttention cannot be compiled."""
    tiny = tiny_model(model_type, **WIDE)
    full = loaded(tiny_model(model_type, **WIDE).to(DEVICE))
    engine = graphed(full, **DENSE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        requests = run(engine, prompts_of(5, 40), SamplingParams(temperature=0, max_tokens=12))
    print(f"PROBE {model_type} in float32: captured {captured(engine)}, {[str(w.message)[:200] for w in caught]}")
    recorder: Any = engine._runner
    for request in requests:
        expected = teacher_forced(tiny, request.prompt_token_ids, request.output_token_ids)
        assert relative_error(recorder.of(request.request_id).cpu(), expected) < 10 * TOLERANCE


def test_the_default_is_on_and_the_budget_counts_it(model: LoadedModel) -> None:
    options: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 1000, "memory_utilization": 0.5}
    prompts: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts_of(5, 100)]
    params = SamplingParams(temperature=0, max_tokens=12)
    with LLM(model, **options) as llm:
        runner: Any = llm.engine._runner
        assert runner.graphs.captured == (1, 2, 4)
        free, total = torch.cuda.mem_get_info()
        assert 0 < llm.stats().budget <= free + llm.stats().created - total // 2 + (64 << 20)
        assert len(llm.generate(prompts, params)) == 2
    with LLM(model, cuda_graphs=False, **options) as llm:
        runner = llm.engine._runner
        assert runner.graphs is None
