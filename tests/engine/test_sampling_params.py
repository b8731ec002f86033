"""What a request may ask for, and what is refused at once."""

from typing import Any

import numpy as np
import pytest

from vattention.engine.sampling_params import SamplingParams
from vattention.errors import InvalidRequest

NAN, INFINITY = float("nan"), float("inf")


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.seed, params.ignore_eos) == (1.0, 16, None, False)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"max_tokens": None},
        {"seed": 2**64 - 1},
        {"max_tokens": np.int64(3)},
        {"stop_token_ids": [3, np.int32(4)]},
        {"n": 1, "top_p": 1, "top_k": -1, "min_p": 0, "stop": [], "logprobs": None, "repetition_penalty": 1},
    ],
)
def test_accepted(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    hash(SamplingParams(stop_token_ids=params.stop_token_ids))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperature": -0.1}, InvalidRequest),
        ({"temperature": NAN}, InvalidRequest),
        ({"temperature": INFINITY}, InvalidRequest),
        ({"temperature": "hot"}, TypeError),
        ({"temperature": None}, TypeError),
        ({"temperature": True}, TypeError),
        ({"max_tokens": 0}, InvalidRequest),
        ({"max_tokens": 1.5}, TypeError),
        ({"max_tokens": True}, TypeError),
        ({"seed": -1}, InvalidRequest),
        ({"seed": 2**64}, InvalidRequest),
        ({"seed": 0.5}, TypeError),
        ({"ignore_eos": 1}, TypeError),
        ({"stop_token_ids": "5"}, TypeError),
        ({"stop_token_ids": None}, TypeError),
        ({"stop_token_ids": [1.0]}, TypeError),
        ({"stop_token_ids": [-1]}, InvalidRequest),
    ],
)
def test_wrong_values(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        SamplingParams(**options)
