"""One request that fails, by itself: the others lose nothing, and whatever fails always comes to an end."""

import functools
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from support import tokenizers
from support.models import engine_for, loaded, prompts_of, run, tiny_model
from support.remember import count_forks, engine_with, expected, finish, nothing_is_left
from support.tokenizers import spell
from vattention import LLM
from vattention.engine import engine as engine_module
from vattention.engine import reading
from vattention.engine.engine import Engine
from vattention.engine.loading import LoadedModel
from vattention.engine.request import Chunk, Request
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import DriverError, InvalidRequest, OutOfPages, VAttentionError
from vattention.memory import HostDriver, PagePool

GREEDY = SamplingParams(temperature=0, max_tokens=8)


def right(requests: Sequence[Request], tokens: int = 8) -> bool:
    return [r.output_token_ids for r in requests] == [expected(r.prompt_token_ids, tokens) for r in requests]


def names(chunks: Sequence[Chunk]) -> list[str]:
    return [chunk.request.request_id for chunk in chunks]


# -- the model fails --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail_at", range(1, 18))
def test_a_pass_that_fails_once_costs_nobody_anything(fail_at: int) -> None:
    engine, runner, cache = engine_with(max_num_seqs=3, max_num_batched_tokens=8)
    with cache:
        requests = [engine.add_request([i] * 9, GREEDY) for i in range(4)]
        alone = False

        def fails(chunks: Sequence[Chunk]) -> bool:
            nonlocal alone
            alone |= runner.passes == fail_at and len(chunks) == 1
            return runner.passes == fail_at

        runner.fails = fails
        finish(engine)
        assert runner.failures == 1
        failed = [request for request in requests if request.error is not None]
        assert len(failed) == alone, "nobody else could be to blame"
        assert right([request for request in requests if request not in failed])
        assert all(request.preemptions == 0 for request in requests), "that is about memory"
        nothing_is_left(engine, cache)


def test_who_fails_alone_ends_and_the_others_are_tried_alone_once() -> None:
    engine, runner, cache = engine_with(max_num_seqs=4, max_num_batched_tokens=40)
    with cache:
        passes: list[list[str]] = []

        def fails(chunks: Sequence[Chunk]) -> bool:
            passes.append(names(chunks))
            return "bad" in passes[-1] and any(c.request.request_id == "bad" and c.samples for c in chunks)

        runner.fails = fails
        others = [engine.add_request([i] * 5, GREEDY, f"{i}") for i in range(2)]
        for _ in range(3):
            engine.step()
        bad = engine.add_request([9] * 7, GREEDY, "bad")
        assert engine.step() == [], "nobody got anything"
        assert cache.stats().live_slots == 0
        moved = [engine.step() for _ in range(3)]
        assert passes[3:] == [["0", "1", "bad"], ["0"], ["1"], ["bad"]]
        assert moved == [[others[0]], [others[1]], [bad]]
        assert (bad.finish_reason, bad.output_token_ids) == ("error", [])
        assert isinstance(bad.error, RuntimeError)
        finish(engine)
        assert passes[7:] == [["0", "1"]] * 4
        assert right(others)
        assert not engine.abort("bad")
        nothing_is_left(engine, cache)


def test_a_model_that_always_fails_ends_everybody_soon() -> None:
    engine, runner, cache = engine_with(max_num_seqs=4)
    with cache:
        runner.fails = lambda chunks: True
        requests = [engine.add_request([i] * 5, GREEDY) for i in range(10)]
        finish(engine, limit=2 * len(requests))
        assert all(request.finish_reason == "error" and request.error for request in requests)
        nothing_is_left(engine, cache)
        runner.fails = lambda chunks: False
        again = engine.add_request([1], GREEDY)
        finish(engine)
        assert right([again])


def test_a_model_that_cannot_stand_company_serves_everybody_alone() -> None:
    engine, runner, cache = engine_with(max_num_seqs=3)
    with cache:
        runner.fails = lambda chunks: len(chunks) > 1
        requests = [engine.add_request([i] * 5, GREEDY) for i in range(5)]
        finish(engine)
        assert right(requests)
        # Each failing pass is followed by a token for each that was in it.
        assert runner.failures < 5 * 8
        nothing_is_left(engine, cache)


def test_one_sample_that_fails_ends_its_request_and_no_other() -> None:
    engine, runner, cache = engine_with(max_num_seqs=6, max_num_batched_tokens=32)
    with cache:
        count_forks(cache, runner)
        params = SamplingParams(temperature=1e-9, max_tokens=8, n=3)
        bad, good = (engine.add_request([i] * 3, params) for i in range(2))
        runner.fails = lambda chunks: any(
            chunk.request is bad.family[1] and len(chunk.request.output_token_ids) == 4 for chunk in chunks
        )
        engine.step()
        bad.family[2].params = SamplingParams(temperature=1e-9, max_tokens=2)  # it is done before
        returned = []
        while engine.unfinished:
            returned += [sample for sample in engine.step() if sample.finished]
        assert [sample.finish_reason for sample in bad.family] == ["error", "error", "length"]
        assert {type(sample.error) for sample in bad.family} == {RuntimeError}
        assert len({id(sample.error) for sample in bad.family}) == 1
        assert sorted(map(id, returned)) == sorted(map(id, [*bad.family, *good.family])), "each once"
        assert right(good.family)
        nothing_is_left(engine, cache)


@pytest.mark.parametrize("where", ["waiting", "running"])
def test_a_request_that_is_to_be_tried_alone_can_be_aborted(where: str) -> None:
    engine, runner, cache = engine_with(max_num_seqs=3, max_num_batched_tokens=8)
    with cache:
        requests = [engine.add_request([i] * 12, GREEDY, f"{i}") for i in range(3)]
        runner.fail_at = 3
        while not runner.failures:
            engine.step()
        if where == "running":
            engine.step()  # its prompt takes two passes
            assert requests[0].slot is not None
        assert requests[0].suspect
        assert engine.abort("0")
        assert not engine.abort("0")
        finish(engine)
        assert requests[0].finish_reason == "abort"
        assert right(requests[1:])
        nothing_is_left(engine, cache)


def test_one_to_be_tried_alone_shares_no_pass_with_who_came_before_it() -> None:
    """Else its samples, once they branch, could leave no room for the other's prompt."""
    engine, runner, cache = engine_with(max_num_seqs=6, max_num_batched_tokens=8)
    with cache:
        count_forks(cache, runner)
        runner.fail_at = 1
        several = engine.add_request([1, 2], SamplingParams(temperature=1e-9, max_tokens=8, n=3))
        other = engine.add_request([3], GREEDY)
        engine.step()
        assert several.suspect
        urgent = engine.add_request([4] * 7, GREEDY, priority=-1)
        assert engine.step() == [urgent]
        assert set(engine.step()) == set(several.family)
        finish(engine)
        assert right([*several.family, other, urgent])
        nothing_is_left(engine, cache)


# -- what comes after the model ---------------------------------------------------------------------------------------


def test_logits_of_one_request_that_are_not_finite() -> None:
    """No pass is computed again: the others' rows are as good as ever."""
    engine, runner, cache = engine_with(max_num_seqs=4, max_num_batched_tokens=64)
    with cache:
        forward = runner.forward

        def spoiling(chunks: Sequence[Chunk]) -> torch.Tensor:
            logits = forward(chunks)
            for row, chunk in enumerate(chunks):
                if chunk.request.request_id == "1" and chunk.end == 8:
                    logits[row] = torch.nan
            return logits

        runner.forward = spoiling  # type: ignore[method-assign]
        requests = [engine.add_request([i] * 5, GREEDY) for i in range(3)]
        finish(engine)
        assert [request.finish_reason for request in requests] == ["length", "error", "length"]
        assert isinstance(requests[1].error, VAttentionError)
        assert requests[1].output_token_ids == expected([1] * 5, 3)
        assert right([requests[0], requests[2]])
        assert runner.passes == 8
        nothing_is_left(engine, cache)


def breaks(*_: Any, **__: Any) -> Any:
    raise RuntimeError("it broke")


def test_an_adjustment_that_fails() -> None:
    engine, runner, cache = engine_with(max_num_seqs=4, max_num_batched_tokens=64)
    with cache:
        params = SamplingParams(temperature=1e-9, max_tokens=8, n=2, min_tokens=3, stop_token_ids=[49])
        requests = [engine.add_request([i] * 5, params) for i in range(2)]
        bad = requests[0].family[1]
        bad.adjuster.next = breaks  # type: ignore[union-attr, method-assign]
        count_forks(cache, runner)
        finish(engine)
        assert [sample.finish_reason for sample in requests[0].family] == ["error"] * 2
        assert requests[1].error is None
        assert runner.passes == 8
        nothing_is_left(engine, cache)


@pytest.mark.parametrize("asked", ["logprobs", "prompt_logprobs"])
def test_log_probabilities_that_fail(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt,) = prompts_of(40)
    params = SamplingParams(seed=1, max_tokens=8)
    (alone,) = run(engine_for(loaded_tiny()), [prompt], params)
    engine = engine_for(loaded_tiny(), max_num_batched_tokens=64)
    good = engine.add_request(prompt[:1], params)
    bad = engine.add_request(prompt, SamplingParams(seed=1, max_tokens=8, **{asked: 1}))
    monkeypatch.setattr(reading, "top_logprobs", breaks)
    passes = 0
    while engine.unfinished:
        engine.step()
        passes += 1
    assert passes == 8
    assert (bad.finish_reason, bad.output_token_ids, bad.logprobs, bad.prompt_logprobs) == ("error", [], [], [None])
    assert (good.finish_reason, len(good.output_token_ids)) == ("length", 8)
    monkeypatch.undo()
    (again,) = run(engine, [prompt], params)
    assert again.output_token_ids == alone.output_token_ids
    assert engine._cache.stats().live_slots == 0


def test_text_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizers.byte_level()
    model = loaded(tiny_model(vocab_size=len(tokenizer)), tokenizer)
    prompt = spell(tokenizer, "Hello")
    params = SamplingParams(max_tokens=12, seed=1, stop="never there")
    (alone,) = run(engine_for(model, tokenizer=tokenizer), [prompt], params)
    engine = engine_for(model, tokenizer=tokenizer)
    update = engine_module.update_text

    def failing(sample: Request, *args: Any, **options: Any) -> str | None:
        if sample.request_id == "bad" and sample.finished:
            raise UnicodeError("no such character")
        return update(sample, *args, **options)

    monkeypatch.setattr(engine_module, "update_text", failing)
    good, bad = (engine.add_request(prompt, params, name) for name in ("good", "bad"))
    while engine.unfinished:
        engine.step()
    assert good.output_token_ids == alone.output_token_ids
    assert bad.finish_reason == "error", "not length, which it had got as far as"
    assert isinstance(bad.error, UnicodeError)
    assert engine.output(bad).outputs[0].finish_reason == "error"
    bad.text.update = breaks  # type: ignore[union-attr, method-assign]
    assert engine.output(bad).finished, "what there is can be looked at"


def test_branching_that_fails() -> None:
    engine, _, cache = engine_with(max_num_seqs=4)
    with cache:
        cache.fork = breaks  # type: ignore[method-assign]
        bad = engine.add_request([1] * 4, SamplingParams(temperature=1e-9, max_tokens=8, n=3))
        good = engine.add_request([2] * 4, GREEDY)
        finish(engine)
        assert [sample.finish_reason for sample in bad.family] == ["error"] * 3
        assert right([good])
        nothing_is_left(engine, cache)


# -- memory and the driver --------------------------------------------------------------------------------------------


def test_a_prompt_for_which_there_is_no_memory_any_more_ends_alone() -> None:
    engine, _, cache = engine_with(16 * 4096)  # 64 tokens
    with cache:
        other = cache.alloc()
        assert other is not None
        cache.step({other: 40})
        small = [engine.add_request([i], GREEDY) for i in range(3)]
        large = engine.add_request([1] * 40, GREEDY)
        last = engine.add_request([7], GREEDY)
        finish(engine)
        assert large.finish_reason == "error"
        assert isinstance(large.error, OutOfPages)
        assert right([*small, last])
        cache.free(other)
        nothing_is_left(engine, cache)


DRIVEN = prompts_of(30, 100, 60, 20)


def with_a_call_that_fails(
    verb: str, nth: int, texts: Sequence[Sequence[int]], monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Four requests and a driver of which one call fails. Returns whether there were that many calls."""
    driver = HostDriver()
    call: Callable[..., Any] = getattr(driver, verb)
    calls, armed = 0, True

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += armed
        if armed and calls == nth:
            raise DriverError(verb, 5, "the test wants it so")
        return call(*args)

    monkeypatch.setattr(driver, verb, failing)
    pool = PagePool(driver, 4096, 10 * 4096)
    engine = engine_for(loaded_tiny(), max_num_seqs=3, memory=None, pool=pool, max_num_batched_tokens=40)
    with engine._cache as cache:
        requests = [engine.add_request(prompt, SamplingParams(seed=1, max_tokens=40)) for prompt in DRIVEN]
        may_fail = False
        while engine.unfinished:
            company, before = len(engine.scheduler.running) > 1, calls
            engine.step()
            may_fail |= before < nth <= calls and not company
        armed = False
        failed = [request for request in requests if request.error is not None]
        assert len(failed) <= may_fail
        for request, text in zip(requests, texts, strict=True):
            output = request.output_token_ids
            assert output == (text[: len(output)] if request in failed else text)
        nothing_is_left(engine, cache)
    return calls >= nth


@pytest.mark.parametrize("verb", ["create", "map", "unmap"])
def test_each_call_of_the_driver_fails_once(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In company nobody loses anything; alone, that one request ends."""
    params = SamplingParams(seed=1, max_tokens=40)
    texts = [run(engine_for(loaded_tiny()), [prompt], params)[0].output_token_ids for prompt in DRIVEN]
    reached = sum(with_a_call_that_fails(verb, nth, texts, monkeypatch) for nth in range(1, 9))
    assert reached > 3, "the driver was hardly called"


@functools.cache
def loaded_tiny() -> LoadedModel:
    return loaded(tiny_model(num_hidden_layers=1))


def test_a_slot_that_cannot_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """`alloc` fails where the driver cannot unmap what an earlier request left there."""
    engine, _, cache = engine_with(max_num_seqs=3)
    alloc, failures = cache.alloc, [2, 3, 6]
    calls = 0

    def failing(tokens: int = 0) -> int | None:
        nonlocal calls
        calls += 1
        if calls in failures:
            raise DriverError("unmap", 5, "the test wants it so")
        return alloc(tokens)

    with cache:
        monkeypatch.setattr(cache, "alloc", failing)
        requests = [engine.add_request([i] * 3, GREEDY) for i in range(5)]
        finish(engine)
        # The second failed twice, the other one once.
        assert [request.finish_reason for request in requests] == ["length", "error", "length", "length", "length"]
        assert isinstance(requests[1].error, DriverError)
        assert right([request for request in requests if request.error is None])
        nothing_is_left(engine, cache)


def test_a_slot_that_cannot_be_taken_for_a_sample_whose_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """They end with it, though they were to be in the same pass."""
    engine, runner, cache = engine_with(max_num_seqs=3)
    with cache:
        count_forks(cache, runner)
        bad = engine.add_request([1] * 3, SamplingParams(temperature=1e-9, max_tokens=8, n=2))
        good = engine.add_request([2] * 3, GREEDY)
        runner.fail_at = 3
        while not runner.failures:
            engine.step()
        engine.step()  # the first sample alone
        assert bad.slot is not None

        def failing(tokens: int = 0) -> int | None:
            raise DriverError("unmap", 5, "the test wants it so")

        with monkeypatch.context() as patched:
            patched.setattr(cache, "alloc", failing)
            engine.step()
        assert [sample.finish_reason for sample in bad.family] == ["error"] * 2
        assert isinstance(bad.error, DriverError)
        assert isinstance(good.error, DriverError), "it was alone then, and got no slot either"
        finish(engine)
        nothing_is_left(engine, cache)


def test_a_cache_that_was_closed_is_nobodys_fault() -> None:
    engine, _, cache = engine_with()
    requests = [engine.add_request([i], SamplingParams(temperature=1e-9, max_tokens=8, n=2)) for i in range(3)]
    engine.step()
    cache.close()
    with pytest.raises(InvalidRequest, match="closed"):
        engine.step()
    assert all(sample.finish_reason == "abort" for request in requests for sample in request.family)
    assert not engine.unfinished


def test_an_error_does_not_keep_the_tensors_of_its_pass() -> None:
    """Else memory that ran out in one pass would still be gone in the next."""
    engine, runner, cache = engine_with()
    with cache:
        activations: list[weakref.ref[torch.Tensor]] = []

        def failing(chunks: Sequence[Chunk]) -> torch.Tensor:
            hidden = torch.zeros(5)
            activations.append(weakref.ref(hidden))
            raise MemoryError(f"beside {hidden.shape}")

        runner.forward = failing  # type: ignore[method-assign]
        requests = [engine.add_request([i], GREEDY) for i in range(2)]
        gc.disable()
        try:
            finish(engine)
        finally:
            gc.enable()
        assert len(activations) == 3
        assert all(isinstance(request.error, MemoryError) for request in requests)
        assert [ref() for ref in activations] == [None] * 3


# -- the offline front door -------------------------------------------------------------------------------------------


def test_generate_raises_what_a_request_fails_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded_tiny()
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts_of(5, 9, 3)]
    params = SamplingParams(temperature=0, max_tokens=6)
    with LLM(model, kv_cache_memory="64MiB", max_num_seqs=2) as llm:
        answers = llm.generate(prompts, params, use_tqdm=False)
        runner: Any = llm.engine._runner
        forward = runner.forward

        def failing(chunks: Sequence[Chunk]) -> torch.Tensor:
            if any(len(chunk.request.prompt_token_ids) == 9 for chunk in chunks):
                raise ZeroDivisionError("of the model")
            logits: torch.Tensor = forward(chunks)
            return logits

        with monkeypatch.context() as patched:
            patched.setattr(runner, "forward", failing)
            with pytest.raises(ZeroDivisionError, match="of the model"):
                llm.generate(prompts, params, use_tqdm=False)
            assert llm.engine.unfinished == 0
            assert llm.stats().live_slots == 0
            assert llm.generate(prompts[2:], params, use_tqdm=False)[0].outputs == answers[2].outputs
        again = llm.generate(prompts, params, use_tqdm=False)
        assert [answer.outputs for answer in again] == [answer.outputs for answer in answers]


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_of_requests_that_were_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr(engine_module.time, "monotonic", clock)
    engine, runner, cache = engine_with(max_num_seqs=2, max_num_batched_tokens=16)

    def times_of(engine: Engine, request: Request) -> tuple[Any, ...]:
        metrics = engine.output(request).metrics
        return metrics.queue_time, metrics.prefill_time, metrics.time_to_first_token, metrics.token_times

    with cache:
        first, second = (engine.add_request([i] * 4, SamplingParams(temperature=0, max_tokens=3)) for i in range(2))
        assert times_of(engine, second) == (None, None, None, ((),))
        runner.fail_at = 1
        finish(engine)
        # Added at 101 and 102. The clock is read when a pass begins, and when its tokens are there: 103 the one that
        # fails; 104 and 105, 106 and 107 each alone; 108 and 109, 110 and 111 together.
        assert times_of(engine, first) == (2.0, 2.0, 4.0, ((4.0, 8.0, 10.0),))
        assert times_of(engine, second) == (1.0, 4.0, 5.0, ((5.0, 7.0, 9.0),))
        nothing_is_left(engine, cache)
