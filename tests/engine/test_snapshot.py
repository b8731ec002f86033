"""What an engine says of itself, against what its requests have seen."""

import pytest

from support.models import engine_for, loaded, prompts_of, run, tiny_model
from vattention.engine.engine import Engine
from vattention.engine.loading import LoadedModel
from vattention.engine.request import Request
from vattention.engine.sampling_params import SamplingParams
from vattention.engine.snapshot import WAITING_SHOWN


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(tiny_model())


def params(tokens: int = 5, temperature: float = 0, **more) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, **more)


def finish(engine: Engine) -> None:
    while engine.unfinished:
        engine.step()


def test_a_new_engine_has_done_nothing(model):
    snapshot = engine_for(model).snapshot()
    assert (snapshot.running, snapshot.waiting, snapshot.num_running, snapshot.num_waiting) == ((), (), 0, 0)
    totals = snapshot.totals
    assert (totals.passes, totals.rows, totals.prompt_tokens, totals.generated_tokens) == (0, 0, 0, 0)
    assert totals.ended == {"stop": 0, "length": 0, "abort": 0, "error": 0}
    assert totals.e2e_latency.count == 0
    assert snapshot.max_model_len == 256
    assert [slot.live for slot in snapshot.slots] == [False] * 4


def test_who_runs_and_who_waits(model):
    engine = engine_for(model, max_num_seqs=2)
    for number, prompt in enumerate(prompts_of(10, 20, 30)):
        engine.add_request(prompt, params(), f"request {number}", priority=number)
    assert [state.request_id for state in engine.snapshot().waiting] == ["request 0", "request 1", "request 2"]
    engine.step()
    engine.step()
    snapshot = engine.snapshot()
    assert (snapshot.num_running, snapshot.num_waiting) == (2, 1)
    first, second = snapshot.running
    assert (first.request_id, first.prompt_tokens, first.computed, first.output_tokens) == ("request 0", 10, 11, 2)
    assert (second.request_id, second.priority, second.preemptions) == ("request 1", 1, 0)
    (third,) = snapshot.waiting
    assert (third.request_id, third.slot, third.computed, third.priority) == ("request 2", None, 0, 2)
    assert first.age >= second.age >= third.age >= 0
    for state in snapshot.running:
        slot = snapshot.slots[state.slot]
        assert slot.live
        assert slot.tokens == state.computed
        assert slot.needed == state.computed * snapshot.bytes_per_token


def test_a_long_queue_is_counted_whole_and_shown_in_part(model):
    engine = engine_for(model)
    for prompt in prompts_of(*[3] * (WAITING_SHOWN + 7)):
        engine.add_request(prompt, params())
    snapshot = engine.snapshot()
    assert snapshot.num_waiting == WAITING_SHOWN + 7
    assert [state.request_id for state in snapshot.waiting] == [str(number) for number in range(WAITING_SHOWN)]


def test_counts_add_up_to_what_requests_got(model):
    engine = engine_for(model, max_num_batched_tokens=16)
    requests = run(engine, prompts_of(10, 40, 3, 7, 25), [params(n) for n in (1, 2, 9, 4, 6)])
    totals = engine.snapshot().totals
    assert totals.prompt_tokens == totals.prompt_rows == 85
    assert totals.generated_tokens == 22
    assert totals.rows == 85 + 22 - 5  # the last token of each is never computed
    assert totals.passes == len(engine._runner.passes)
    assert totals.ended == {"stop": 0, "length": 5, "abort": 0, "error": 0}
    assert totals.request_prompt_tokens.total == 85
    assert totals.request_generation_tokens.total == 22
    assert totals.time_per_output_token.count == 4  # one had a single token
    for spread in (totals.queue_time, totals.prefill_time, totals.time_to_first_token, totals.e2e_latency):
        assert spread.count == 5
    assert totals.inter_token_latency.count == 22 - 5
    gaps = [b - a for each in requests for a, b in zip(each.token_times, each.token_times[1:], strict=False)]
    assert totals.inter_token_latency.total == pytest.approx(sum(gaps))
    assert totals.decode_time.total == pytest.approx(sum(gaps))
    first = [each.token_times[0] - each.arrival for each in requests]
    assert totals.time_to_first_token.total == pytest.approx(sum(first))
    assert totals.queue_time.total + totals.prefill_time.total == pytest.approx(sum(first))
    assert totals.e2e_latency.total >= sum(each.token_times[-1] - each.arrival for each in requests)


def test_samples_share_what_they_have_in_common(model):
    engine = engine_for(model, max_num_batched_tokens=128, page_size=4096)
    engine.add_request(prompts_of(100)[0], params(8, n=3, temperature=1))
    engine.step()
    engine.step()
    snapshot = engine.snapshot()
    assert [(state.request_id, state.sample) for state in snapshot.running] == [("0", 0), ("0", 1), ("0", 2)]
    assert all(slot.shared for slot in snapshot.slots if slot.live)
    finish(engine)
    totals = engine.snapshot().totals
    assert (totals.prompt_tokens, totals.prompt_rows, totals.generated_tokens) == (100, 100, 24)
    assert totals.ended["length"] == totals.request_generation_tokens.count == 3
    assert totals.e2e_latency.count == totals.time_to_first_token.count == totals.request_prompt_tokens.count == 1
    assert not any(slot.shared for slot in engine.snapshot().slots)


def test_a_sample_without_a_slot_computes_the_prompt_again_but_it_counts_once(model):
    engine = engine_for(model, max_num_seqs=2)
    engine.add_request(prompts_of(40)[0], params(8, n=3, temperature=1))
    finish(engine)
    totals = engine.snapshot().totals
    assert (totals.prompt_tokens, totals.prompt_rows) == (40, 80)
    assert totals.time_to_first_token.count == 1


def test_what_is_aborted_counts_as_that_and_in_no_latency(model):
    engine = engine_for(model, max_num_seqs=1)
    for name, prompt in zip("ab", prompts_of(5, 6), strict=True):
        engine.add_request(prompt, params(20), name)
    engine.step()
    engine.step()
    assert engine.abort("a")
    assert engine.abort("b")
    assert not engine.abort("a")
    totals = engine.snapshot().totals
    assert totals.ended == {"stop": 0, "length": 0, "abort": 2, "error": 0}
    assert (totals.generated_tokens, totals.prompt_tokens) == (2, 5)
    assert totals.time_to_first_token.count == 1
    assert totals.e2e_latency.count == totals.decode_time.count == 0


def test_what_fails_counts_as_an_error(model):
    engine = engine_for(model)

    def broken(chunks):
        raise RuntimeError("a pass")

    engine._runner.forward = broken
    request: Request = engine.add_request(prompts_of(5)[0], params())
    finish(engine)
    assert request.finish_reason == "error"
    totals = engine.snapshot().totals
    assert totals.ended["error"] == 1
    assert totals.passes == totals.e2e_latency.count == 0


def test_a_preemption_computes_rows_again_but_counts_no_token_twice(model):
    engine = engine_for(model, memory=str(40 * 4096), page_size=4096)
    run(engine, prompts_of(*[60] * 4), params(60))
    totals = engine.snapshot().totals
    assert totals.preemptions == engine.scheduler.preemptions > 0
    assert (totals.prompt_tokens, totals.generated_tokens) == (240, 240)
    assert totals.rows > 240 + 240 - 4


def test_the_paged_cache_shows_its_slots_too(model):
    engine = engine_for(model, cache="paged")
    engine.add_request(prompts_of(20)[0], params())
    engine.step()
    snapshot = engine.snapshot()
    (live,) = [slot for slot in snapshot.slots if slot.live]
    assert live.tokens == 20
    assert live.mapped >= live.needed > 0
