"""The scheduler against a model that remembers: every pass is checked for tokens that are lost, mixed or late.

The model is a stub whose next token is a hash of every token before it, read from its own copy of each slot. If a
slot's content were lost, mixed up or computed twice in the wrong place, tokens would differ from the closed form.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.remember import VOCABULARY, engine_with, expected, finish, nothing_is_left
from vattention.engine.request import Request
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import ConfigError, InvalidRequest, OutOfPages

GREEDY = SamplingParams(temperature=0, max_tokens=8)

prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40)


@settings(max_examples=60)
@given(
    requests=st.lists(st.tuples(prompts, st.integers(1, 23)), min_size=1, max_size=12),
    pages=st.integers(8, 60),
    max_num_seqs=st.integers(1, 6),
    extra_rows=st.integers(0, 30),
)
def test_everybody_finishes_with_the_right_tokens(
    requests: list[tuple[list[int], int]], pages: int, max_num_seqs: int, extra_rows: int
) -> None:
    engine, _, cache = engine_with(
        pages * 4096, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_seqs + extra_rows
    )
    with cache:
        capacity = cache.capacity()
        added = []
        for prompt, tokens in requests:
            if len(prompt) + 1 > capacity:
                with pytest.raises(InvalidRequest, match="never fit"):
                    engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=tokens))
                continue
            added.append((engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=tokens)), tokens))
        finish(engine)
        for request, tokens in added:
            assert request.finish_reason == "length"
            # A slot of all the memory holds `capacity` tokens, and one more can be chosen after them.
            most = min(64, min(capacity, 64) + 1) - len(request.prompt_token_ids)
            assert len(request.output_token_ids) == min(tokens, most)
            assert request.output_token_ids == expected(request.prompt_token_ids, len(request.output_token_ids))
        nothing_is_left(engine, cache)


def test_pressure_of_four_times_the_budget() -> None:
    params = SamplingParams(temperature=0, max_tokens=20)
    prompts = [[i, i + 1, *range(i)] for i in range(24)]
    total = sum(len(prompt) + 20 for prompt in prompts)
    engine, runner, cache = engine_with(total * 1024 // 4, max_num_seqs=24, max_num_batched_tokens=32)
    with cache:
        requests = [engine.add_request(prompt, params) for prompt in prompts]
        finish(engine)
        assert engine.scheduler.preemptions > 0, "no pressure, no test"
        for request in requests:
            assert request.output_token_ids == expected(request.prompt_token_ids, 20)
        # Preemption costs computing tokens again; it must not turn into thrashing.
        assert runner.rows < 2 * total
        nothing_is_left(engine, cache)


@pytest.mark.parametrize(("pages", "preempts"), [(256, False), (6, True)])
def test_first_come_first_served(pages: int, preempts: bool) -> None:
    engine, _, cache = engine_with(pages * 4096, max_num_seqs=3)
    with cache:
        order: list[Request] = []
        requests = [engine.add_request([i] * 3, GREEDY) for i in range(9)]
        while engine.unfinished:
            order += [request for request in engine.step() if request.finished]
        assert (engine.scheduler.preemptions > 0) == preempts
        assert order == requests


def test_a_prompt_is_admitted_when_all_of_it_fits() -> None:
    engine, runner, cache = engine_with(8 * 4096, max_num_batched_tokens=8)  # 32 tokens
    with cache:
        for length, tokens in ((12, 8), (18, 5), (1, 4)):
            engine.add_request([length] * length, SamplingParams(temperature=0, max_tokens=tokens))
        finish(engine)
        # The first takes 2 and later 3 of the 4 pages of a stream, the second 3 for its prompt alone: it has to wait,
        # and the third, for which there is room, does not overtake it.
        assert engine.scheduler.preemptions == 0
        assert runner.passes == (2 + 7) + (3 + 4)


def test_the_one_admitted_first_is_never_preempted() -> None:
    engine, _, cache = engine_with(8 * 4096, max_num_seqs=4)
    with cache:
        requests = [engine.add_request([i], SamplingParams(temperature=0, max_tokens=30)) for i in range(4)]
        finish(engine)
        assert requests[0].preemptions == 0
        assert sum(request.preemptions for request in requests) > 0


def test_a_decode_is_not_held_up_by_a_long_prompt() -> None:
    engine, runner, cache = engine_with(max_num_batched_tokens=4, max_num_seqs=2)
    with cache:
        short = engine.add_request([1], GREEDY)
        engine.step()
        engine.add_request(list(range(40)), GREEDY)
        for tokens in range(2, 9):
            engine.step()
            assert len(short.output_token_ids) == tokens
        assert runner.passes == 8


def test_outgrowing_all_of_the_memory_ends_with_length() -> None:
    engine, _, cache = engine_with(8 * 4096)  # 4 pages a stream: 32 tokens
    with cache:
        assert cache.capacity() == 32
        request = engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=60))
        finish(engine)
        assert request.finish_reason == "length"
        assert request.output_token_ids == expected([1, 2, 3], 30)
        nothing_is_left(engine, cache)


def test_reaching_max_model_len_ends_with_length() -> None:
    engine, _, cache = engine_with(max_model_len=16)
    with cache:
        requests = [engine.add_request([1] * n, SamplingParams(temperature=0, max_tokens=None)) for n in (3, 15)]
        finish(engine)
        assert [len(request.output_token_ids) for request in requests] == [13, 1]
        assert {request.finish_reason for request in requests} == {"length"}


def test_a_prompt_that_can_never_fit_is_refused_with_advice() -> None:
    engine, _, cache = engine_with(8 * 4096)
    with cache:
        with pytest.raises(InvalidRequest, match="raise kv_cache_memory"):
            engine.add_request([1] * 32, GREEDY)
        with pytest.raises(InvalidRequest, match="raise max_model_len"):
            engine.add_request([1] * 64, GREEDY)
        engine.add_request([1] * 31, SamplingParams(temperature=0, max_tokens=1))
        finish(engine)


def test_memory_that_somebody_else_took_is_an_error_and_not_a_hang() -> None:
    engine, _, cache = engine_with(8 * 4096)
    with cache:
        other = cache.alloc()
        assert other is not None
        cache.step({other: 32})
        request = engine.add_request([1] * 20, GREEDY)
        finish(engine)
        assert request.finish_reason == "error"
        assert isinstance(request.error, OutOfPages)
        cache.free(other)
        again = engine.add_request([1] * 20, GREEDY)
        finish(engine)
        assert again.output_token_ids == expected([1] * 20, 8)


def test_a_machine_with_less_memory_than_the_budget_is_served_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fits` goes by the budget; where `step` finds less, the engine must neither hang nor give up."""
    engine, _, cache = engine_with()
    step = cache.step

    def one_at_a_time(lengths: dict[int, int]) -> None:
        if len(lengths) > 1:
            raise OutOfPages(2, 1)
        step(lengths)

    with cache:
        monkeypatch.setattr(cache, "step", one_at_a_time)
        requests = [engine.add_request([i], GREEDY) for i in range(3)]
        finish(engine)
        for request in requests:
            assert request.output_token_ids == expected(request.prompt_token_ids, 8)
        nothing_is_left(engine, cache)


def test_slots_that_somebody_else_took_are_an_error_and_not_a_hang() -> None:
    engine, _, cache = engine_with(max_num_seqs=1)
    with cache:
        cache.alloc()
        request = engine.add_request([1], GREEDY)
        assert engine.step() == [request]
        assert request.finish_reason == "error"
        assert isinstance(request.error, OutOfPages)
        assert "slots" in str(request.error)
        assert not engine.unfinished


def test_abort_between_steps() -> None:
    engine, _, cache = engine_with(max_num_seqs=2)
    with cache:
        requests = [engine.add_request([i], GREEDY, request_id=f"r{i}") for i in range(4)]
        engine.step()
        assert engine.abort("r1")  # runs
        assert engine.abort("r3")  # waits
        assert not engine.abort("r1")
        assert not engine.abort("never there")
        finish(engine)
        assert [request.finish_reason for request in requests] == ["length", "abort", "length", "abort"]
        assert requests[2].output_token_ids == expected([2], 8)
        nothing_is_left(engine, cache)


def test_stop_tokens_and_end_of_sequence() -> None:
    prompt = [5, 6]
    text = expected(prompt, 12)
    cut = text.index(text[4]) + 1
    engine, _, cache = engine_with()
    engine._eos_token_ids = frozenset([text[4]])
    with cache:
        stops = engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=12))
        ignores = engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        own = engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[text[0]]))
        finish(engine)
        assert (stops.output_token_ids, stops.finish_reason) == (text[:cut], "stop")
        assert (ignores.output_token_ids, ignores.finish_reason) == (text, "length")
        assert (own.output_token_ids, own.finish_reason) == (text[:1], "stop")


def test_requests_that_come_while_others_run() -> None:
    engine, _, cache = engine_with(10 * 4096)
    with cache:
        requests = []
        for i in range(20):
            requests.append(engine.add_request([i, i], GREEDY))
            engine.step()
        finish(engine)
        for request in requests:
            assert request.output_token_ids == expected(request.prompt_token_ids, 8)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ([], InvalidRequest),
        ([VOCABULARY], InvalidRequest),
        ([-1], InvalidRequest),
        ([1.0], TypeError),
        ([True], TypeError),
        (["a"], TypeError),
        ("text", TypeError),
        (5, TypeError),
        (None, TypeError),
    ],
)
def test_prompts_that_are_no_prompts(prompt: Any, error: type[Exception]) -> None:
    engine, _, cache = engine_with()
    with cache:
        with pytest.raises(error):
            engine.add_request(prompt, GREEDY)
        nothing_is_left(engine, cache)


def test_other_misuse() -> None:
    engine, _, cache = engine_with()
    with cache:
        with pytest.raises(TypeError, match="SamplingParams"):
            engine.add_request([1], {"temperature": 0})  # type: ignore[arg-type]
        engine.add_request([1], GREEDY, request_id="twice")
        with pytest.raises(InvalidRequest, match="in use"):
            engine.add_request([1], GREEDY, request_id="twice")
        with pytest.raises(InvalidRequest, match="warm up"):
            engine.warmup()
        with pytest.raises(ConfigError, match="max_num_batched_tokens"):
            engine_with(max_num_seqs=8, max_num_batched_tokens=7)
