"""A seeded request says the same alone, in company, in chunks and under preemption, whatever it asks for."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from support import tokenizers
from support.models import engine_for, loaded, prompts_of, run, tiny_model
from support.sampling import adjusted
from support.tokenizers import spell
from vattention.engine.engine import Engine
from vattention.engine.loading import LoadedModel
from vattention.engine.request import Chunk, Request
from vattention.engine.sampling_params import SamplingParams

PROMPTS = prompts_of(1, 40, 17, 64, 65, 100, 5, 33, 8, 90, 61, 20)
ASKED: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9},
    {"top_k": 20},
    {"min_p": 0.05},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.8, "frequency_penalty": 0.5},
    {"frequency_penalty": -1.0},
    {"logit_bias": {7: 4.0, 9: -100.0}},
    {"min_tokens": 12, "stop_token_ids": list(range(0, 200, 3))},
    {"stop_token_ids": list(range(0, 60, 3))},
    {"logprobs": 3, "prompt_logprobs": 2},
    {"n": 3, "repetition_penalty": 1.2, "top_p": 0.95},
]
PARAMS = [SamplingParams(temperature=1.0, max_tokens=40, seed=i, **asked) for i, asked in enumerate(ASKED)]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(tiny_model())


def said(request: Request) -> list[tuple[list[int], str | None, int | str | None]]:
    return [(sample.output_token_ids, sample.finish_reason, sample.stop_reason) for sample in request.family]


def all_said(engine: Engine, order: list[int]) -> dict[int, Any]:
    requests = run(engine, [PROMPTS[i] for i in order], [PARAMS[i] for i in order])
    assert engine._cache.stats().live_slots == 0
    return dict(zip(order, map(said, requests), strict=True))


@pytest.fixture(scope="module")
def alone(model: LoadedModel) -> dict[int, Any]:
    """Each in an engine of its own, its prompt in one pass."""
    result: dict[int, Any] = {}
    for i in range(len(PROMPTS)):
        result |= all_said(engine_for(model, max_num_seqs=1, max_num_batched_tokens=512), [i])
    return result


@pytest.mark.parametrize(
    ("slots", "rows"), [(1, 5), (2, 7), (3, 16), (4, 512), (16, 16), (16, 33), (16, 64), (16, 512)]
)
def test_batches_and_chunks(model: LoadedModel, alone: dict[int, Any], slots: int, rows: int) -> None:
    order = random.Random(slots * rows).sample(range(len(PROMPTS)), len(PROMPTS))
    assert all_said(engine_for(model, max_num_seqs=slots, max_num_batched_tokens=rows, poison=True), order) == alone


@pytest.mark.parametrize("pages", [4, 6, 9])
def test_preemption(model: LoadedModel, alone: dict[int, Any], pages: int) -> None:
    """Penalties count what was generated before the slot was lost, and no random number is used twice."""
    engine = engine_for(
        model, max_num_seqs=12, memory=pages * 6 * 4096, page_size=4096, max_num_batched_tokens=40, poison=True
    )
    assert all_said(engine, list(range(len(PROMPTS)))) == alone
    assert engine.scheduler.preemptions > 0, "no pressure, no test"


@pytest.mark.parametrize(("pages", "rows"), [(100, 512), (100, 21), (6, 40)])
def test_priorities_and_passes_that_fail(model: LoadedModel, alone: dict[int, Any], pages: int, rows: int) -> None:
    """Whoever is tried again alone, in whatever order, goes on as it would have; who fails alone says what it can."""
    dice = random.Random(pages * rows)
    engine = engine_for(
        model, max_num_seqs=12, memory=pages * 6 * 4096, page_size=4096, max_num_batched_tokens=rows, poison=True
    )
    forward, failures = engine._runner.forward, 0

    def failing(chunks: Sequence[Chunk]) -> torch.Tensor:
        nonlocal failures
        logits = forward(chunks)  # K and V are written
        bad = any(c.request.request_id == "bad" and len(c.request.output_token_ids) == 3 for c in chunks)
        if bad or (len(chunks) > 1 and dice.random() < 0.05):
            failures += 1
            raise RuntimeError
        return logits

    engine._runner.forward = failing  # type: ignore[method-assign]
    order = dice.sample(range(len(PROMPTS)), len(PROMPTS))
    requests = {i: engine.add_request(PROMPTS[i], PARAMS[i], priority=dice.randint(-1, 1)) for i in order}
    bad = engine.add_request(PROMPTS[4], PARAMS[0], "bad", priority=dice.randint(-1, 1))
    while engine.unfinished:
        engine.step()
    assert {i: said(request) for i, request in requests.items()} == alone
    assert (bad.finish_reason, len(bad.output_token_ids)) == ("error", 3)
    assert failures >= 3
    assert (engine.scheduler.preemptions > 0) == (pages == 6)


@pytest.mark.parametrize("pages", [4, 100])
def test_penalties_count_every_token_once(model: LoadedModel, pages: int) -> None:
    """Greedy, from the logits that the engine saw, against the formulas over all tokens before: whatever was lost."""
    params = SamplingParams(
        temperature=0,
        max_tokens=40,
        min_tokens=9,
        stop_token_ids=[5, 6],
        logit_bias={7: 1.5},
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.6,
    )
    engine = engine_for(model, max_num_seqs=12, memory=pages * 6 * 4096, page_size=4096)
    requests = run(engine, PROMPTS, params)
    assert (engine.scheduler.preemptions > 0) == (pages == 4)
    for request in requests:
        logits = engine._runner.of(request.request_id).double().tolist()  # type: ignore[attr-defined]
        output = request.output_token_ids
        for i, token in enumerate(output):
            wanted = adjusted(logits[i], params, request.prompt_token_ids, output[:i], {5, 6})
            assert wanted[token] == max(wanted)


def test_every_option_matters_here(model: LoadedModel, alone: dict[int, Any]) -> None:
    """The control: with the option left out, the same request says something else."""
    for i, asked in enumerate(ASKED):
        if not asked or "logprobs" in asked:
            continue
        plain = SamplingParams(temperature=1.0, max_tokens=40, seed=i)
        (request,) = run(engine_for(model), [PROMPTS[i]], [plain])
        assert said(request) != alone[i], asked
    ends = {i: alone[i][0][1:] for i in (8, 9)}
    assert all(reason == "stop" for reason, _ in ends.values())
    assert len(alone[8][0][0]) > 12, "min_tokens and then the end token"
    assert alone[8][0][0][-1] == alone[8][0][2], "the token that stopped it is the reason"


# -- text, in the engine ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker() -> tuple[Any, Any]:
    """A model with the vocabulary of a byte-level tokenizer."""
    tokenizer = tokenizers.byte_level()
    return loaded(tiny_model(vocab_size=len(tokenizer)), tokenizer), tokenizer


def pair_in(text: str) -> str:
    """Two characters from behind the beginning of a text; fewer where it is too short."""
    pairs = [text[at : at + 2] for at in range(15, len(text))]
    return next((pair for pair in pairs if "\ufffd" not in pair), "")


def test_text_stops_where_it_should_under_preemption(speaker: tuple[Any, Any]) -> None:
    model, tokenizer = speaker
    eos = tokenizer.eos_token_id
    prompts = [tuple(spell(tokenizer, text)) for text in ("Hello", "wörld", "a b a b", "🙂" * 12, "x" * 60, "." * 50)]
    plain = SamplingParams(seed=3, max_tokens=50, logit_bias={eos: 2.0})

    def outputs(engine: Engine, params: Any) -> list[Any]:
        return [engine.output(request).outputs[0] for request in run(engine, prompts, params)]

    def engine(**options: Any) -> Engine:
        return engine_for(model, tokenizer=tokenizer, eos_token_ids=[eos], **options)

    free = outputs(engine(), plain)
    for answer in free:
        ended = answer.finish_reason == "stop"
        assert (answer.token_ids[-1] == eos) == ended
        assert answer.stop_reason is None
        assert answer.text == tokenizer.decode(answer.token_ids[: -1 if ended else None], skip_special_tokens=True)
    # Characters of the text itself as stop strings: they are found in the same place, wherever tokens end.
    stops = [pair_in(answer.text) for answer in free]
    params = [SamplingParams(seed=3, max_tokens=50, logit_bias={eos: 2.0}, stop=s or "none") for s in stops]
    tight = engine(memory=2 * 6 * 4096, page_size=4096, max_num_seqs=6)
    for got, same, whole, stop in zip(outputs(engine(), params), outputs(tight, params), free, stops, strict=True):
        assert got == same
        if stop:
            assert (got.finish_reason, got.stop_reason) == ("stop", stop)
            assert got.text == whole.text[: whole.text.index(stop)]
            assert got.token_ids == whole.token_ids[: len(got.token_ids)]
            assert stop in tokenizer.decode(got.token_ids)
            assert stop not in tokenizer.decode(got.token_ids[:-1])
    assert tight.scheduler.preemptions > 0
    assert sum(map(bool, stops)) >= 3


def test_text_while_it_runs(speaker: tuple[Any, Any]) -> None:
    """What `output` shows between two steps only grows, and is in the end what a request that nobody watched says."""
    model, tokenizer = speaker
    params = SamplingParams(seed=1, max_tokens=30, n=2, skip_special_tokens=False)
    prompt = spell(tokenizer, "a b")
    (unwatched,) = run(engine_for(model, tokenizer=tokenizer), [prompt], params)
    engine = engine_for(model, tokenizer=tokenizer)
    request = engine.add_request(prompt, params)
    shown, tokens = ["", ""], [0, 0]
    while engine.unfinished:
        assert not engine.output(request).finished
        engine.step()
        output = engine.output(request)
        for answer in output.outputs:
            assert answer.text.startswith(shown[answer.index])
            assert len(answer.token_ids) >= tokens[answer.index]
            shown[answer.index], tokens[answer.index] = answer.text, len(answer.token_ids)
    final = engine.output(request)
    assert final.finished
    assert [a.text for a in final.outputs] == [a.text for a in engine.output(unwatched).outputs] == shown


def test_what_includes_the_stop(speaker: tuple[Any, Any]) -> None:
    model, tokenizer = speaker
    eos = tokenizer.eos_token_id
    prompt = spell(tokenizer, "Hello")
    force = {"logit_bias": {eos: 100.0}, "min_tokens": 3, "seed": 1}
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, ""),
        ({"include_stop_str_in_output": True}, ""),
        ({"skip_special_tokens": False}, ""),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, "<eos>"),
    ]
    engine = engine_for(model, tokenizer=tokenizer, eos_token_ids=[eos])
    for options, end in cases:
        (request,) = run(engine, [prompt], SamplingParams(**force, **options))
        answer = engine.output(request).outputs[0]
        assert len(answer.token_ids) == 4, "min_tokens holds the end token back"
        assert answer.text == tokenizer.decode(answer.token_ids[:3]) + end
    (request,) = run(engine, [prompt], SamplingParams(**force, detokenize=False))
    assert engine.output(request).outputs[0].text == ""


def test_metrics(model: LoadedModel) -> None:
    engine = engine_for(model, max_num_seqs=1, max_num_batched_tokens=16)
    first = engine.add_request(PROMPTS[5], SamplingParams(max_tokens=5))
    second = engine.add_request(PROMPTS[0], SamplingParams(max_tokens=3, n=2))
    waiting = engine.output(second).metrics
    assert (waiting.queue_time, waiting.prefill_time, waiting.time_to_first_token) == (None, None, None)
    assert waiting.token_times == ((), ())
    while engine.unfinished:
        engine.step()
    one, two = (engine.output(request).metrics for request in (first, second))
    assert one.queue_time is not None
    assert two.queue_time is not None
    assert two.queue_time >= one.token_times[0][-1] - (two.arrival_time - one.arrival_time) - 0.05
    assert two.arrival_time >= one.arrival_time > 1e9
    assert [len(times) for times in (*one.token_times, *two.token_times)] == [5, 3, 3]
    for metrics in (one, two):
        assert metrics.queue_time is not None
        assert metrics.prefill_time is not None
        assert metrics.time_to_first_token == pytest.approx(metrics.queue_time + metrics.prefill_time)
        assert metrics.time_to_first_token == metrics.token_times[0][0]
        for times in metrics.token_times:
            assert all(a < b for a, b in itertools.pairwise(times))
    tight = engine_for(model, max_num_seqs=12, memory=4 * 6 * 4096, page_size=4096)
    requests = run(tight, PROMPTS, PARAMS)
    assert sum(tight.output(request).metrics.preemptions for request in requests) == tight.scheduler.preemptions > 0
