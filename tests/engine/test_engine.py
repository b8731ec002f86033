"""The whole way of a request, with real attention: nothing about memory, batching or chance shows in the tokens."""

import threading
from typing import Any

import pytest
import torch

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
from vattention.attention import blocked, sdpa
from vattention.attention.base import AttentionBatch
from vattention.engine.engine import Engine
from vattention.engine.loading import LoadedModel
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import InvalidRequest

LENGTHS = (1, 2, 17, 64, 65, 100, 5, 33)
TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS)
PROMPTS = prompts_of(*LENGTHS)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(tiny_model())


@pytest.fixture(scope="module")
def expected(model: LoadedModel) -> list[tuple[int, ...]]:
    with as_transformers(model.model):
        return [greedy(model.model, prompt, TOKENS) for prompt in PROMPTS]


def tokens_of(engine: Engine, params: Any = GREEDY, prompts: Any = PROMPTS) -> list[tuple[int, ...]]:
    return [tuple(request.output_token_ids) for request in run(engine, prompts, params)]


@pytest.mark.parametrize("check", ["guard", "poison"])
@pytest.mark.parametrize("page_size", [4096, 65536, 2 << 20])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"head_major": True},
        {"kv_together": True},
        {"layers_per_stream": 2},
        {"layers_per_stream": 3, "kv_together": True},
        {"head_major": True, "layers_per_stream": 3, "kv_together": True},
    ],
    ids=str,
)
def test_layouts_and_pages(
    model: LoadedModel, expected: list[tuple[int, ...]], layout: dict[str, Any], page_size: int, check: str
) -> None:
    engine = engine_for(model, page_size=page_size, **{check: True}, **layout)
    assert tokens_of(engine) == expected


@pytest.mark.parametrize("max_num_batched_tokens", [16, 24, 64, 512])
@pytest.mark.parametrize("max_num_seqs", [1, 3, 16])
def test_batches_and_chunks(
    model: LoadedModel, expected: list[tuple[int, ...]], max_num_seqs: int, max_num_batched_tokens: int
) -> None:
    engine = engine_for(
        model, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, poison=True, guard=True
    )
    assert tokens_of(engine) == expected
    recorder = engine._runner
    assert isinstance(recorder, Recorder)
    with as_transformers(model.model):
        for name, (prompt, output) in enumerate(zip(PROMPTS, expected, strict=True)):
            logits = teacher_forced(model.model, prompt, output)
            assert relative_error(recorder.of(str(name)), logits) < TOLERANCE
    chunked = any(start > 0 and end - start > 1 for chunks in recorder.passes for _, start, end in chunks)
    assert chunked == (max_num_batched_tokens < 100), "prompts were not cut where they should be"
    assert max(sum(end - start for _, start, end in chunks) for chunks in recorder.passes) <= max_num_batched_tokens


def test_a_chunk_that_ignores_alignment_would_be_seen(
    model: LoadedModel, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: as if nothing were cached before a chunk, tokens differ."""
    hide = blocked._hide
    monkeypatch.setattr(blocked, "_hide", lambda scores, own, window: hide(scores, 0, window))
    monkeypatch.setattr(blocked, "_ROWS", 512)
    assert tokens_of(engine_for(model, max_num_batched_tokens=512)) == expected, "whole prompts have nothing before"
    assert tokens_of(engine_for(model, max_num_batched_tokens=16)) != expected


def test_a_kernel_that_reads_past_the_length_would_be_seen(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of poison mode: one token too many, and the logits are NaN, which the sampler refuses."""
    build = AttentionBatch.build.__func__  # type: ignore[attr-defined]

    def too_long(segments: Any, *, dtype: torch.dtype, device: torch.device) -> Any:
        longer = [type(s)(s.slot, s.start, s.rows, s.length + (s.rows == 1)) for s in segments]
        return sdpa.prepare(longer, dtype=dtype, device=device)

    monkeypatch.setattr(
        AttentionBatch,
        "build",
        classmethod(lambda cls, segments, layers, kernel, **more: build(cls, segments, layers, too_long, **more)),
    )
    with pytest.raises(Exception, match="not finite"):
        run(engine_for(model, poison=True), [PROMPTS[2]], GREEDY)


def test_pressure_changes_nothing(model: LoadedModel) -> None:
    """24 requests that need four times the budget: the tokens of no limit, and nothing held afterwards."""
    prompts = prompts_of(*range(5, 53, 2))
    params = [SamplingParams(temperature=(i % 3) / 2, max_tokens=10 + i, seed=i) for i in range(24)]
    free = engine_for(model, max_num_seqs=24)
    expected = tokens_of(free, params, prompts)
    assert free.scheduler.preemptions == 0
    total = sum(len(prompt) + wanted.max_tokens for prompt, wanted in zip(prompts, params, strict=True))  # type: ignore[operator]
    per_token = free._cache.layout.bytes_per_token
    for chunk in (24, 64):
        tight = engine_for(
            model,
            max_num_seqs=24,
            memory=total * per_token // 4,
            page_size=4096,
            max_num_batched_tokens=chunk,
            poison=True,
        )
        assert tokens_of(tight, params, prompts) == expected
        assert tight.scheduler.preemptions > 0, "no pressure, no test"
        stats = tight._cache.stats()
        assert (stats.live_slots, stats.needed, stats.mapped) == (0, 0, 0)
        assert stats.created <= total * per_token // 4
        tight._cache.trim()
        assert tight._cache.stats().created == 0


def test_randomness_belongs_to_the_request(model: LoadedModel) -> None:
    """The same seed gives the same tokens alone, in company, in chunks and in another order; another seed does not."""
    params = [SamplingParams(temperature=1.0, max_tokens=TOKENS, seed=i) for i in range(len(PROMPTS))]
    together = tokens_of(engine_for(model), params)
    assert together == tokens_of(engine_for(model, max_num_seqs=1, max_num_batched_tokens=7), params)
    assert together[::-1] == tokens_of(engine_for(model, max_num_batched_tokens=9), params[::-1], PROMPTS[::-1])
    other = [SamplingParams(temperature=1.0, max_tokens=TOKENS, seed=100 + i) for i in range(len(PROMPTS))]
    assert all(a != b for a, b in zip(together, tokens_of(engine_for(model), other), strict=True))


def test_every_position_has_its_own_number(model: LoadedModel) -> None:
    """A text that is cut anywhere and given back as a prompt goes on as it did; and no number is used twice."""
    hot = SamplingParams(temperature=100.0, max_tokens=TOKENS, seed=3)  # flat: the number alone decides
    (whole,) = tokens_of(engine_for(model), hot, PROMPTS[:1])
    assert len(set(whole)) > TOKENS / 2
    for cut in (1, 5, 11):
        (rest,) = tokens_of(engine_for(model), hot, [PROMPTS[0] + whole[:cut]])
        assert rest[: TOKENS - cut] == whole[cut:]


def test_requests_without_a_seed_take_the_engines(model: LoadedModel) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=TOKENS)
    same_prompt = [PROMPTS[3]] * 3
    first = tokens_of(engine_for(model, seed=5), params, same_prompt)
    assert len(set(first)) == 3, "equal prompts must not get equal samples"
    assert first == tokens_of(engine_for(model, seed=5, max_num_batched_tokens=11), params, same_prompt)
    assert first != tokens_of(engine_for(model, seed=6), params, same_prompt)


def test_no_driver_call_between_two_tokens_of_steady_decoding(model: LoadedModel) -> None:
    """Pages come while the model computes, from another thread (the paper's background allocation)."""
    engine = engine_for(model, page_size=4096)
    meter = engine._cache.pool.meter
    me = threading.get_ident()
    # 64 tokens a page in each stream: 150 tokens cross two or three page ends each.
    for prompt in PROMPTS[:4]:
        engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=150))
    for _ in range(3):
        engine.step()
    mine, all_calls = meter.calls_by_thread[me], sum(meter.calls.values())
    for _ in range(140):
        engine.step()
    engine._cache.wait()
    assert meter.calls_by_thread[me] == mine
    assert sum(meter.calls.values()) > all_calls, "nothing grew: the test saw nothing"


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_interrupted_pass_leaks_nothing(
    model: LoadedModel, expected: list[tuple[int, ...]], interrupt: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where it is no interrupt but an error, nothing is lost."""
    engine = engine_for(model, poison=True)
    compute, calls = AttentionBatch.compute, 0

    def breaks(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 30:  # in the middle of a pass, K and V of some layers written
            raise interrupt
        return compute(*args)

    with monkeypatch.context() as patched:
        patched.setattr(AttentionBatch, "compute", breaks)
        if issubclass(interrupt, Exception):
            assert tokens_of(engine) == expected
        else:
            with pytest.raises(interrupt):
                run(engine, PROMPTS, GREEDY)
    assert calls >= 30
    assert engine._cache.stats().live_slots == 0
    for name in [request.request_id for request in engine.scheduler.waiting]:
        engine.abort(name)
    assert engine.unfinished == 0
    assert tokens_of(engine) == expected


def test_bfloat16_agrees_as_far_as_it_can() -> None:
    """Rounding differs with the shape of a batch; tokens may. Logits stay close to transformers' in the same dtype."""
    model = tiny_model().to(torch.bfloat16)
    engine = engine_for(loaded(model), max_num_batched_tokens=16, poison=True)
    (request,) = run(engine, [PROMPTS[5]], GREEDY)
    recorder = engine._runner
    assert isinstance(recorder, Recorder)
    with as_transformers(model):
        logits = teacher_forced(model, PROMPTS[5], request.output_token_ids)
        exact = teacher_forced(model.to(torch.float32), PROMPTS[5], request.output_token_ids)
    ours, theirs = (float((x - exact).square().mean().sqrt()) for x in (recorder.of(request.request_id), logits))
    assert ours < 2 * theirs, "further from the exact answer than transformers in the same dtype"


def test_warmup_leaves_nothing_behind(model: LoadedModel, expected: list[tuple[int, ...]]) -> None:
    engine = engine_for(model, max_num_seqs=1)
    engine.warmup()
    assert engine._cache.stats().live_slots == 0
    assert tokens_of(engine) == expected


def test_a_closed_cache_is_a_clear_error(model: LoadedModel) -> None:
    engine = engine_for(model)
    engine._cache.close()
    with pytest.raises(InvalidRequest, match="closed"):
        engine.add_request([1], GREEDY)
