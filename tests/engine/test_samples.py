"""Several samples of one prompt: they branch off where it is computed, and nothing of them is left behind.

The first half runs on a stub that keeps its own copy of each slot (see test_scheduler.py): a sample that was given the
wrong contents by a fork would say something else.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.models import engine_for, loaded, prompts_of, run, tiny_model
from support.remember import count_forks, engine_with, expected, finish, nothing_is_left
from vattention.engine.engine import Engine
from vattention.engine.loading import LoadedModel
from vattention.engine.request import Request
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import DriverError, OutOfPages

COLD = 1e-9  # as good as greedy, but samples are allowed


def cold(n: int, tokens: int = 8) -> SamplingParams:
    return SamplingParams(temperature=COLD, max_tokens=tokens, n=n)


def texts(request: Request) -> list[list[int]]:
    return [sample.output_token_ids for sample in request.family]


@pytest.mark.parametrize(("slots", "forked"), [(8, 3), (4, 3), (3, 2), (1, 0)])
def test_samples_share_what_is_computed(slots: int, forked: int) -> None:
    engine, runner, cache = engine_with(max_num_seqs=slots, max_num_batched_tokens=16)
    with cache:
        forks = count_forks(cache, runner)
        prompt = list(range(20))
        request = engine.add_request(prompt, cold(4))
        finish(engine)
        assert texts(request) == [expected(prompt, 8)] * 4
        assert [sample.sample for sample in request.family] == [0, 1, 2, 3]
        assert len(forks) == forked
        # The prompt once, and again for each that found no slot (with its first token); then a row a token.
        assert runner.rows == 20 + 4 * 7 + 20 * (3 - forked)
        nothing_is_left(engine, cache)


def test_samples_that_end_with_their_first_token_need_no_slot() -> None:
    engine, runner, cache = engine_with()
    with cache:
        forks = count_forks(cache, runner)
        request = engine.add_request([1, 2], cold(4, tokens=1))
        (moved,) = [engine.step()]
        assert sorted(sample.sample for sample in moved) == [0, 1, 2, 3]
        assert texts(request) == [expected([1, 2], 1)] * 4
        assert not forks
        nothing_is_left(engine, cache)


def test_a_fork_for_which_there_is_no_memory_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner, cache = engine_with()

    def refuses(slot: int) -> int:
        raise OutOfPages(1, 0)

    with cache:
        monkeypatch.setattr(cache, "fork", refuses)
        request = engine.add_request(list(range(9)), cold(3))
        finish(engine)
        assert texts(request) == [expected(list(range(9)), 8)] * 3
        assert runner.rows == 3 * (9 + 7)
        nothing_is_left(engine, cache)


def test_a_fork_that_fails_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner, cache = engine_with(max_num_seqs=4)
    count_forks(cache, runner)
    fork, calls = cache.fork, 0

    def breaks(slot: int) -> int | None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise DriverError("map", 5, "broken")
        return fork(slot)

    with cache:
        monkeypatch.setattr(cache, "fork", breaks)
        request = engine.add_request([1] * 9, cold(4))
        beside = engine.add_request([2] * 9, cold(1))  # takes the rest of the pass
        finish(engine)
        assert texts(request) == [expected([1] * 9, 8)] * 4
        assert texts(beside) == [expected([2] * 9, 8)]
        assert calls == 2, "who could not fork is queued, and those after it too"
        nothing_is_left(engine, cache)


def test_a_leader_that_is_given_up_takes_the_others_with_it() -> None:
    """They were never queued: nobody else would end them."""
    engine, _, cache = engine_with(8 * 4096)
    with cache:
        other = cache.alloc()
        assert other is not None
        cache.step({other: 32})  # all of the memory
        request = engine.add_request([1] * 20, cold(3))
        finish(engine)
        assert [sample.finish_reason for sample in request.family] == ["error"] * 3
        assert all(isinstance(sample.error, OutOfPages) for sample in request.family)
        cache.free(other)
        nothing_is_left(engine, cache)


def test_a_leader_that_ends_at_once_leaves_the_others_running() -> None:
    engine, runner, cache = engine_with(max_num_seqs=3)
    with cache:
        count_forks(cache, runner)
        request = engine.add_request([1, 2, 3], cold(4))
        see = engine._see_whether_it_ends

        def ends_at_once(sample: Request, token: int) -> None:
            see(sample, token)
            if sample.sample == 0:
                sample.finish_reason = "stop"

        engine._see_whether_it_ends = ends_at_once  # type: ignore[method-assign]
        finish(engine)
        assert texts(request) == [expected([1, 2, 3], 1), *[expected([1, 2, 3], 8)] * 3]
        nothing_is_left(engine, cache)


@settings(max_examples=80)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(0, 49), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 20)),
        min_size=1,
        max_size=6,
    ),
    pages=st.integers(14, 60),
    max_num_seqs=st.integers(1, 6),
    extra_rows=st.integers(0, 30),
    aborts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=3),
    fail_at=st.one_of(st.none(), st.integers(1, 20)),
)
def test_everybody_ends_once_whatever_happens(
    requests: Sequence[tuple[list[int], int, int]],
    pages: int,
    max_num_seqs: int,
    extra_rows: int,
    aborts: list[tuple[int, int]],
    fail_at: int | None,
) -> None:
    """Pressure, aborts and a failing pass: tokens are a beginning of the right ones, and everything comes back."""
    engine, runner, cache = engine_with(
        pages * 4096, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_seqs + extra_rows
    )
    with cache:
        count_forks(cache, runner)
        runner.fail_at = fail_at
        added = [engine.add_request(prompt, cold(n, tokens)) for prompt, n, tokens in requests]
        ended: list[Request] = []
        for step in range(3000):
            if not engine.unfinished:
                break
            for _, which in [a for a in aborts if a[0] == step]:
                engine.abort(str(which))
            ended += [sample for sample in engine.step() if sample.finished]
        assert not engine.unfinished
        assert len(set(ended)) == len(ended), "nobody ends twice"
        for request, (prompt, n, tokens) in zip(added, requests, strict=True):
            assert len(request.family) == n
            for sample in request.family:
                out = sample.output_token_ids
                assert out == expected(prompt, len(out))
                assert sample.finish_reason in ("length", "abort", "error")
                assert sample.finish_reason != "error" or isinstance(sample.error, RuntimeError)
                if sample.finish_reason == "length":
                    assert len(out) == min(tokens, 64 - len(prompt), cache.capacity() + 1 - len(prompt))
                    assert sample in ended
        nothing_is_left(engine, cache)


def test_abort_ends_all_samples_before_and_after_they_branch() -> None:
    for steps in range(6):
        engine, runner, cache = engine_with(max_num_seqs=3, max_num_batched_tokens=5)
        with cache:
            count_forks(cache, runner)
            request = engine.add_request(list(range(8)), cold(4))
            other = engine.add_request([7] * 3, cold(1))
            for _ in range(steps):
                engine.step()
            assert engine.abort("0")
            assert not engine.abort("0")
            assert [sample.finish_reason for sample in request.family] == ["abort"] * 4
            assert engine.unfinished == 1
            finish(engine)
            assert texts(other) == [expected([7] * 3, 8)]
            nothing_is_left(engine, cache)


# -- a real model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(tiny_model())


def samples_of(engine: Engine, prompts: Any, params: SamplingParams) -> list[list[list[int]]]:
    return [texts(request) for request in run(engine, prompts, params)]


def test_samples_do_not_depend_on_forks_memory_or_company(model: LoadedModel) -> None:
    """Poison and guard: a shared page that somebody writes into, or a tail that was not copied, would be seen."""
    prompts = prompts_of(70, 33, 1)
    params = SamplingParams(temperature=1.0, n=4, max_tokens=100, seed=5, top_p=0.95, presence_penalty=0.5)
    expected = samples_of(engine_for(model, max_num_seqs=1), prompts, params)
    assert all(len({tuple(text) for text in request}) == 4 for request in expected), "each sample is its own"
    for options in (
        {"max_num_seqs": 16},
        {"max_num_seqs": 5, "max_num_batched_tokens": 16},
        {"max_num_seqs": 16, "head_major": True, "page_size": 4096, "guard": True},
        {"max_num_seqs": 16, "layers_per_stream": 3, "kv_together": True, "page_size": 4096},
    ):
        assert samples_of(engine_for(model, poison=True, **options), prompts, params) == expected, options
    total = sum(4 * (len(prompt) + 100) for prompt in prompts)
    per_token = engine_for(model)._cache.layout.bytes_per_token
    tight = engine_for(model, max_num_seqs=12, memory=total * per_token // 4, page_size=4096, poison=True)
    assert samples_of(tight, prompts, params) == expected
    assert tight.scheduler.preemptions > 0, "no pressure, no test"
    assert tight._cache.stats().live_slots == 0


def test_the_first_sample_is_that_of_a_request_for_one(model: LoadedModel) -> None:
    (prompt,) = prompts_of(20)
    one, four = (samples_of(engine_for(model), [prompt], SamplingParams(n=n, seed=3, max_tokens=12))[0] for n in (1, 4))
    assert four[0] == one[0]


def test_samples_follow_the_distribution_of_the_prompt(model: LoadedModel) -> None:
    """All first tokens come from one pass: chi-square of 2,000 of them."""
    from support.sampling import chi_square

    (prompt,) = prompts_of(9)
    engine = engine_for(model)
    (request,) = run(engine, [prompt], SamplingParams(n=2000, seed=1, max_tokens=1, temperature=3.0))
    logits = engine._runner.of("0")[0]  # type: ignore[attr-defined]
    expected = dict(enumerate((logits.double() / 3).softmax(-1).tolist()))
    tokens = [sample.output_token_ids[0] for sample in request.family]
    assert chi_square(tokens, expected) < 3.3
    assert chi_square(tokens, dict(enumerate(torch.ones(211).div(211).tolist()))) > 5
