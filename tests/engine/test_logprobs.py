"""Log-probabilities against the log-softmax of the reference, whatever the chunks, the company and the memory."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from support.models import Recorder, as_transformers, engine_for, loaded, prompts_of, run, teacher_forced, tiny_model
from vattention.engine.engine import Engine
from vattention.engine.loading import LoadedModel
from vattention.engine.logprobs import top_logprobs
from vattention.engine.outputs import Logprob, RequestOutput
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import InvalidRequest

PROMPTS = prompts_of(1, 2, 17, 64, 90)
OPTIONS: dict[str, Any] = {"max_tokens": 8, "seed": 1, "temperature": 0.7, "repetition_penalty": 1.5, "top_p": 0.9}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(tiny_model())


def outputs_of(engine: Engine, params: SamplingParams, prompts: Any = PROMPTS) -> list[RequestOutput]:
    return [engine.output(request) for request in run(engine, prompts, params)]


def check(entry: Mapping[int, Logprob], token: int, logits: torch.Tensor, count: int) -> None:
    """An entry against the logits of the reference."""
    exact = logits.double().log_softmax(-1)
    order = sorted(range(len(exact)), key=lambda t: -float(exact[t]))
    assert next(iter(entry)) == token, "the token itself first"
    assert set(entry) == {token, *order[:count]}
    for other, said in entry.items():
        assert said.logprob == pytest.approx(float(exact[other]), abs=2e-3)
        assert said.rank == order.index(other) + 1


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_are_the_models_own(model: LoadedModel, count: int) -> None:
    """Not those after penalties, temperature and top-p; of the prompt, chunk by chunk, too."""
    params = SamplingParams(logprobs=count, prompt_logprobs=count, **OPTIONS)
    engine = engine_for(model, max_num_batched_tokens=24, poison=True)
    with_none = SamplingParams(**OPTIONS)
    plain = outputs_of(engine_for(model), with_none)
    outputs = outputs_of(engine, params)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in plain]
    assert {(o.prompt_logprobs, o.outputs[0].logprobs, o.outputs[0].cumulative_logprob) for o in plain} == {(None,) * 3}
    with as_transformers(model.model):
        for output in outputs:
            prompt, answer = output.prompt_token_ids, output.outputs[0]
            assert answer.logprobs is not None
            assert output.prompt_logprobs is not None
            for token, entry, logits in zip(
                answer.token_ids, answer.logprobs, teacher_forced(model.model, prompt, answer.token_ids), strict=True
            ):
                check(entry, token, logits, count)
            total = math.fsum(e[t].logprob for e, t in zip(answer.logprobs, answer.token_ids, strict=True))
            assert answer.cumulative_logprob == pytest.approx(total)
            assert output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == len(prompt)
            if len(prompt) > 1:
                forced = teacher_forced(model.model, prompt[:1], prompt[1:])
                for token, entry, logits in zip(prompt[1:], output.prompt_logprobs[1:], forced, strict=True):
                    assert entry is not None
                    check(entry, token, logits, count)


def test_logprobs_survive_preemption_and_branching(model: LoadedModel) -> None:
    """Each is there once, though tokens were computed twice; prompts are shared by the samples."""
    prompts = prompts_of(*range(52, 72, 2))
    params = SamplingParams(logprobs=2, prompt_logprobs=1, n=2, max_tokens=30, seed=4, frequency_penalty=1.0)
    expected = outputs_of(engine_for(model, max_num_seqs=20), params, prompts)
    tight = engine_for(model, max_num_seqs=20, memory=8 * 6 * 4096, page_size=4096, max_num_batched_tokens=32)
    for got, wanted in zip(outputs_of(tight, params, prompts), expected, strict=True):
        assert len(got.outputs) == 2
        for ours, theirs in zip(got.outputs, wanted.outputs, strict=True):
            assert (ours.index, ours.token_ids) == (theirs.index, theirs.token_ids)
            assert ours.logprobs is not None
            assert theirs.logprobs is not None
            assert [set(entry) for entry in ours.logprobs] == [set(entry) for entry in theirs.logprobs]
            assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=0.05)
        assert got.prompt_logprobs is not None
        assert wanted.prompt_logprobs is not None
        assert len(got.prompt_logprobs) == len(got.prompt_token_ids)
        for entry, other in zip(got.prompt_logprobs[1:], wanted.prompt_logprobs[1:], strict=True):
            assert entry is not None
            assert other is not None
            assert list(entry) == list(other)
    assert tight.scheduler.preemptions > 0, "no pressure, no test"


def test_no_more_logits_than_are_asked_for(model: LoadedModel) -> None:
    """One row a chunk that samples; all of a chunk only where its prompt is scored, and once."""
    engine = engine_for(model, max_num_batched_tokens=24)
    recorder = engine._runner
    assert isinstance(recorder, Recorder)
    engine._runner = runner = recorder.runner
    forward, shapes = runner.forward, []

    def watched(chunks: Any) -> torch.Tensor:
        logits = forward(chunks)
        shapes.append(len(logits))
        return logits

    runner.forward = watched
    run(engine, [PROMPTS[4]], SamplingParams(max_tokens=3))
    assert shapes == [0, 0, 0, 1, 1, 1]
    shapes.clear()
    run(engine, [PROMPTS[4]], SamplingParams(max_tokens=3, prompt_logprobs=0))
    assert shapes == [24, 24, 24, 18, 1, 1]


def test_more_than_one_piece_of_rows_and_ties() -> None:
    logits = torch.zeros(100, 7)
    logits[:, 3] = 1
    tokens = [i % 7 for i in range(100)]
    entries = top_logprobs(logits, tokens, [7] * 100, str)
    for token, entry in zip(tokens, entries, strict=True):
        assert set(entry) == set(range(7))
        assert entry[token].rank == (1 if token == 3 else 2), "ties share the best rank"
        assert entry[token].decoded_token == str(token)
        assert sum(math.exp(said.logprob) for said in entry.values()) == pytest.approx(1)
    assert top_logprobs(logits[:1], [0], [-1], None)[0].keys() == set(range(7))
    assert top_logprobs(logits[:0], [], [], None) == []


def test_bfloat16_is_worked_out_in_float32() -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    entries = top_logprobs(logits, [1, 2, 3], [0, 0, 0], None)
    exact = logits.double().log_softmax(-1)
    for row, (token, entry) in enumerate(zip([1, 2, 3], entries, strict=True)):
        assert entry[token].logprob == pytest.approx(float(exact[row, token]), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"logprobs": 212}, "logprobs=212"),
        ({"prompt_logprobs": 212}, "prompt_logprobs=212"),
        ({"logit_bias": {211: 1.0}}, "logit_bias has token 211"),
        ({"stop_token_ids": [211]}, "stop_token_ids has token 211"),
        ({"min_tokens": 1, "stop_token_ids": range(211)}, "no token to choose"),
        ({"stop": "end"}, "tokenizer"),
    ],
)
def test_what_this_model_cannot_do_is_refused(model: LoadedModel, options: dict[str, Any], problem: str) -> None:
    engine = engine_for(model)
    with pytest.raises(InvalidRequest, match=problem):
        engine.add_request([1], SamplingParams(**options))
    assert engine.unfinished == 0
