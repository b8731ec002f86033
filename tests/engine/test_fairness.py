"""Priorities, and what bounds them: adversaries who would have somebody wait, or give way, for ever."""

import itertools
from typing import Any

import pytest

from support.remember import count_forks, engine_with, expected, finish, nothing_is_left
from vattention.engine import scheduler
from vattention.engine.engine import Engine
from vattention.engine.request import Request
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import InvalidRequest, OutOfPages


def greedy(tokens: int = 8) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens)


def ended(engine: Engine) -> list[Request]:
    """Everybody, in the order in which they end."""
    order = []
    while engine.unfinished:
        order += [request for request in engine.step() if request.finished]
    return order


def admissions(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """A list to which everybody is added who is admitted."""
    admit, order = engine.scheduler._admit, []

    def noting(request: Request) -> bool:
        admitted = admit(request)
        if admitted:
            order.append(request)
        return admitted

    monkeypatch.setattr(engine.scheduler, "_admit", noting)
    return order


# -- priorities -------------------------------------------------------------------------------------------------------


def test_the_most_urgent_first_then_first_come() -> None:
    engine, _, cache = engine_with(max_num_seqs=1)
    with cache:
        priorities = [5, 0, -1, 0, -(2**63), 5, 2**63 - 1]
        requests = [engine.add_request([i], greedy(2), priority=p) for i, p in enumerate(priorities)]
        assert [requests.index(request) for request in ended(engine)] == [4, 2, 1, 3, 0, 5, 6]
        nothing_is_left(engine, cache)


def test_who_runs_is_not_put_out_for_somebody_more_urgent() -> None:
    engine, _, cache = engine_with(max_num_seqs=1)
    with cache:
        low = engine.add_request([1], greedy(), priority=9)
        engine.step()
        high = engine.add_request([2], greedy(), priority=0)
        assert ended(engine) == [low, high]
        assert engine.scheduler.preemptions == 0


@pytest.mark.parametrize("low_first", [True, False])
def test_the_least_urgent_gives_way(low_first: bool) -> None:
    engine, _, cache = engine_with(8 * 4096, max_num_seqs=2)  # 32 tokens: for one and a half of them
    with cache:
        priorities = [1, 0] if low_first else [0, 1]
        requests = [engine.add_request([p] * 3, greedy(20), priority=p) for p in priorities]
        low, high = sorted(requests, key=lambda request: -request.priority)
        assert ended(engine) == [high, low]
        assert high.preemptions == 0
        assert low.preemptions > 0
        assert [r.output_token_ids for r in requests] == [expected(r.prompt_token_ids, 20) for r in requests]


def test_of_equal_ones_who_came_last_gives_way_whoever_was_admitted_first() -> None:
    engine, _, cache = engine_with(8 * 4096, max_num_seqs=3)
    with cache:
        requests = [engine.add_request([i] * 3, greedy(24)) for i in range(3)]
        assert ended(engine) == requests
        assert requests[0].preemptions == 0


def test_samples_have_the_priority_of_their_request() -> None:
    engine, runner, cache = engine_with(max_num_seqs=2, max_num_batched_tokens=16)
    with cache:
        count_forks(cache, runner)
        params = SamplingParams(temperature=1e-9, max_tokens=8, n=5)
        low = engine.add_request([1, 2], params, priority=1)
        engine.step()
        high = engine.add_request([3], params, priority=0)
        order = ended(engine)
        assert order[:2] == low.family[:2], "they ran already"
        # Two slots came free at once, and only one of the urgent samples was there to take one.
        assert set(order[2:4]) == {low.family[2], high.family[0]}
        assert order[4:8] == high.family[1:]
        assert order[8:] == low.family[3:]
        nothing_is_left(engine, cache)


@pytest.mark.parametrize(("priority", "error"), [(True, TypeError), (1.5, TypeError), (2**63, InvalidRequest)])
def test_priorities_that_are_none(priority: Any, error: type[Exception]) -> None:
    engine, _, cache = engine_with()
    with cache:
        with pytest.raises(error, match="priority"):
            engine.add_request([1], greedy(), priority=priority)
        nothing_is_left(engine, cache)


# -- overtaking -------------------------------------------------------------------------------------------------------


def test_an_endless_stream_of_urgent_requests_starves_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, cache = engine_with(max_num_seqs=2)
    with cache:
        order = admissions(engine, monkeypatch)
        low = [engine.add_request([i], greedy(3), priority=1) for i in range(3)]
        for number in range(2_000):
            while len(engine.scheduler.waiting) < 8:
                engine.add_request([7], greedy(2), priority=-number)  # each more urgent than all before
            engine.step()
            if all(request.finished for request in low):
                break
        places = [order.index(request) for request in low]
        each = scheduler.MAX_PASSED + 1
        assert places == [each - 1, 2 * each - 1, 3 * each - 1], "not sooner either: they are not urgent"
        assert [request.output_token_ids for request in low] == [expected([i], 3) for i in range(3)]


def test_those_who_have_waited_do_not_come_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backlog of a hundred must not stand between the urgent ones and the engine."""
    engine, _, cache = engine_with(max_num_seqs=1)
    with cache:
        order = admissions(engine, monkeypatch)
        for _ in range(100):
            engine.add_request([1], greedy(1), priority=1)
        for _ in range(300):
            engine.add_request([2], greedy(1), priority=0)
            engine.step()
        low = [i for i, request in enumerate(order) if request.priority]
        assert len(low) == 300 // (scheduler.MAX_PASSED + 1)
        assert all(b - a == scheduler.MAX_PASSED + 1 for a, b in itertools.pairwise(low))


# -- giving way -------------------------------------------------------------------------------------------------------


def test_memory_for_one_and_a_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """One long request that is never urgent, and always somebody more urgent who grows."""
    monkeypatch.setattr(scheduler, "MAX_PASSED", 2)
    engine, _, cache = engine_with(12 * 4096, max_num_seqs=3)  # 48 tokens
    with cache:
        low = engine.add_request([1] * 8, greedy(24), priority=1)
        others = []
        for step in range(3_000):
            if step % 3 == 0:
                others.append(engine.add_request([step % 50] * 5, greedy(12), priority=0))
            engine.step()
            if low.finished:
                break
        assert low.output_token_ids == expected(low.prompt_token_ids, 24)
        assert low.preemptions == scheduler.MAX_PREEMPTIONS, "as often as may be, or the test saw nothing"
        finish(engine)
        for request in others:
            assert request.output_token_ids == expected(request.prompt_token_ids, 12)
            assert request.preemptions <= scheduler.MAX_PREEMPTIONS
        nothing_is_left(engine, cache)


def test_who_has_given_way_often_comes_back_when_all_it_may_need_is_there() -> None:
    engine, _, cache = engine_with(8 * 4096, max_num_seqs=2)  # 4 pages a stream, 8 tokens each
    with cache:
        first = engine.add_request([1] * 8, greedy(8))
        second = engine.add_request([2] * 8, greedy(9))  # 16 tokens to compute: 2 pages a stream
        second.preemptions = scheduler.MAX_PREEMPTIONS
        engine.step()
        assert first.slot is not None
        assert second.slot is not None, "2 and 2 fit"
        finish(engine)
        assert second.preemptions == scheduler.MAX_PREEMPTIONS
        longer = engine.add_request([3] * 8, greedy(10))  # 17: 3 pages
        longer.preemptions = scheduler.MAX_PREEMPTIONS
        other = engine.add_request([4] * 8, greedy(10))
        other.preemptions = scheduler.MAX_PREEMPTIONS
        engine.step()
        assert (longer.slot is None, other.slot is None) == (False, True), "3 and 3 do not, though 1 and 1 would"
        finish(engine)
        assert engine.scheduler.preemptions == 0


def test_where_the_cache_holds_less_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, cache = engine_with(max_num_seqs=4)
    step = cache.step

    def one_at_a_time(lengths: dict[int, int]) -> None:
        if len(lengths) > 1:
            raise OutOfPages(2, 1)
        step(lengths)

    with cache:
        monkeypatch.setattr(cache, "step", one_at_a_time)
        requests = [engine.add_request([i], greedy(20)) for i in range(6)]
        finish(engine)
        most = scheduler.MAX_PREEMPTIONS + 1
        assert max(request.preemptions for request in requests) == most
        assert [r.output_token_ids for r in requests] == [expected(r.prompt_token_ids, 20) for r in requests]
        nothing_is_left(engine, cache)


def test_who_waits_for_one_that_outgrows_the_memory_is_served() -> None:
    engine, _, cache = engine_with(8 * 4096)  # 32 tokens
    with cache:
        outgrows = engine.add_request([1, 2, 3], greedy(60))
        engine.step()
        waits = engine.add_request([4] * 31, greedy(1))
        finish(engine)
        assert (outgrows.finish_reason, len(outgrows.output_token_ids)) == ("length", 30)
        assert waits.output_token_ids == expected([4] * 31, 1)


# -- a pass -----------------------------------------------------------------------------------------------------------


def test_a_pass_is_every_decode_and_as_much_of_a_prompt_as_there_is_room_for() -> None:
    engine, runner, cache = engine_with(max_num_seqs=4, max_num_batched_tokens=10)
    with cache:
        seen: list[list[int]] = []
        forward = runner.forward

        def noting(chunks: Any) -> Any:
            seen.append([chunk.end - chunk.start for chunk in chunks])
            return forward(chunks)

        runner.forward = noting  # type: ignore[method-assign]
        engine.add_request([1], greedy(6))
        engine.add_request([2], greedy(6))
        engine.step()
        engine.add_request([3] * 20, greedy(2))
        engine.add_request([4] * 3, greedy(2))
        finish(engine)
        # Both decode in each pass; 8 rows are left: for the long prompt, and then for what follows it.
        assert seen == [[1, 1], [1, 1, 8], [1, 1, 8], [1, 1, 4, 3], [1, 1, 1, 1], [1, 1]]
        nothing_is_left(engine, cache)
