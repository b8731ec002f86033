"""What a request may ask for, and what is refused at once."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from vattention.engine.sampling_params import SamplingParams
from vattention.errors import InvalidRequest

NAN, INFINITY = float("nan"), float("inf")


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.ignore_eos) == (16, 0, None, False)
    assert (params.stop, params.stop_token_ids, params.include_stop_str_in_output) == ((), (), False)
    assert (params.logprobs, params.prompt_logprobs, params.logit_bias) == (None, None, None)
    assert (params.detokenize, params.skip_special_tokens) == (True, True)
    assert (params.penalises, params.truncates) == (False, False)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"max_tokens": None, "min_tokens": 1000},
        {"max_tokens": 3, "min_tokens": 3},
        {"seed": 2**64 - 1},
        {"max_tokens": np.int64(3)},
        {"stop_token_ids": [3, np.int32(4)]},
        {"n": 1, "top_p": 1, "top_k": -1, "min_p": 0, "stop": [], "logprobs": None, "repetition_penalty": 1},
        {"n": 16_384},
        {"top_p": 5e-324},
        {"min_p": 1},
        {"presence_penalty": -2, "frequency_penalty": 2.0},
        {"logprobs": -1, "prompt_logprobs": 0},
        {"logit_bias": {}},
        {"detokenize": False},
    ],
)
def test_accepted(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    hash(SamplingParams(stop_token_ids=params.stop_token_ids))
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params


def test_values_are_kept_in_one_form() -> None:
    given = {np.int64(5): 1, 7: -100}
    params = SamplingParams(top_k=-1, stop="end", logit_bias=given)
    given[9] = 5
    assert (params.top_k, params.stop_strings, params.logit_bias) == (0, ("end",), {5: 1.0, 7: -100.0})
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        *[({name: value}, InvalidRequest) for name in ("temperature", "min_p") for value in (-0.1, NAN, INFINITY)],
        *[
            ({name: value}, InvalidRequest)
            for name in ("top_p", "repetition_penalty")
            for value in (0, -1, NAN, INFINITY)
        ],
        *[
            ({name: value}, InvalidRequest)
            for name in ("presence_penalty", "frequency_penalty")
            for value in (-2.1, 2.1, NAN, -INFINITY)
        ],
        *[
            ({name: value}, TypeError)
            for name in (
                *("temperature", "top_p", "min_p"),
                *("presence_penalty", "frequency_penalty", "repetition_penalty"),
            )
            for value in ("hot", None, True, [1.0])
        ],
        *[({name: value}, TypeError) for name in ("n", "top_k", "min_tokens") for value in (1.5, None, True, "3")],
        *[
            ({name: value}, TypeError)
            for name in ("max_tokens", "seed", "logprobs", "prompt_logprobs")
            for value in (1.5, True)
        ],
        *[
            ({name: value}, TypeError)
            for name in ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens")
            for value in (1, None, "yes")
        ],
        ({"temperature": 10**400}, InvalidRequest),
        ({"top_p": 1.01}, InvalidRequest),
        ({"min_p": 1.01}, InvalidRequest),
        ({"top_k": -2}, InvalidRequest),
        ({"n": 0}, InvalidRequest),
        ({"n": 16_385}, InvalidRequest),
        ({"n": 2, "temperature": 0}, InvalidRequest),
        ({"max_tokens": 0}, InvalidRequest),
        ({"min_tokens": -1}, InvalidRequest),
        ({"min_tokens": 17}, InvalidRequest),
        ({"seed": -1}, InvalidRequest),
        ({"seed": 2**64}, InvalidRequest),
        ({"logprobs": -2}, InvalidRequest),
        ({"prompt_logprobs": -2}, InvalidRequest),
        ({"stop_token_ids": "5"}, TypeError),
        ({"stop_token_ids": None}, TypeError),
        ({"stop_token_ids": [1.0]}, TypeError),
        ({"stop_token_ids": [-1]}, InvalidRequest),
        ({"stop": 5}, TypeError),
        ({"stop": b"end"}, TypeError),
        ({"stop": ["a", 5]}, TypeError),
        ({"stop": {"a"}}, TypeError),
        ({"stop": ""}, InvalidRequest),
        ({"stop": ["a", ""]}, InvalidRequest),
        ({"stop": "a", "detokenize": False}, InvalidRequest),
        ({"logit_bias": [1.0]}, TypeError),
        ({"logit_bias": {"1": 1.0}}, TypeError),
        ({"logit_bias": {1: "up"}}, TypeError),
        ({"logit_bias": {-1: 1.0}}, InvalidRequest),
        ({"logit_bias": {1: 100.1}}, InvalidRequest),
        ({"logit_bias": {1: NAN}}, InvalidRequest),
    ],
)
def test_wrong_values(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        SamplingParams(**options)
    assert type(caught.value) is error
    assert any(name in str(caught.value) for name in ("stop", "token id", *options))


def test_messages_name_the_value_and_the_limit() -> None:
    with pytest.raises(InvalidRequest, match=r"top_p must be above 0, got 0"):
        SamplingParams(top_p=0)
    with pytest.raises(InvalidRequest, match=r"presence_penalty must be at most 2, got 3"):
        SamplingParams(presence_penalty=3)
    with pytest.raises(InvalidRequest, match=r"temperature must be finite, got inf"):
        SamplingParams(temperature=INFINITY)
    with pytest.raises(TypeError, match="min_p must be a number, not str"):
        SamplingParams(min_p="1")  # type: ignore[arg-type]
