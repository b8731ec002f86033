"""What the official client raises, and what the wire says."""

from typing import Any

import openai
import pytest

from support.openai_client import Client, Endpoint

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TEXT = {"prompt": "Hi", "max_tokens": 2}


def refused(endpoint: Endpoint, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    """The error that this request gets."""
    answer = endpoint.post(path, body)
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert "Traceback" not in answer.text
    return error


def test_a_model_that_is_not_there(client: Client) -> None:
    client.model = "gpt-17"
    for make in (lambda: client.completion("Hi"), lambda: client.chat("Hi"), lambda: client.response("Hi")):
        with pytest.raises(openai.NotFoundError, match="gpt-17"):
            make()
    with pytest.raises(openai.NotFoundError):
        client.chat("Hi", stream=True)


def test_the_shape_of_an_error(endpoint: Endpoint, ours: None) -> None:
    error = refused(endpoint, "/v1/completions", {**TEXT, "model": "gpt-17"}, 404)
    assert (error["type"], error["code"], error["param"]) == ("not_found_error", "model_not_found", "model")


def test_routes_and_methods(endpoint: Endpoint) -> None:
    assert endpoint.get("/v1/nothing").status_code == 404
    assert endpoint.get("/v1/completions").status_code == 405
    assert endpoint.post("/v1/models", {}).status_code == 405


def test_their_shape(endpoint: Endpoint, ours: None) -> None:
    for answer in (endpoint.get("/v1/nothing"), endpoint.get("/v1/completions")):
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert endpoint.get("/v1/completions").headers["allow"] == "POST"


BAD: list[dict[str, Any]] = [
    {"temperature": -0.1},
    {"temperature": "hot"},
    {"top_p": 0},
    {"top_p": 1.1},
    {"n": 0},
    {"presence_penalty": 2.1},
    {"frequency_penalty": -2.1},
    {"max_tokens": -1},
    {"seed": "one"},
    {"min_p": 1.1},
    {"top_k": -2},
    {"repetition_penalty": 0},
    {"stop": 5},
    {"logit_bias": {"x": 1}},
    {"logit_bias": {"99999999": 1}},
    {"logprobs": 1000},
    {"min_tokens": 5},
    {"stream": "perhaps"},
    {"prompt": {"text": "x"}},
    {"prompt": ["a", 1]},
    {"prompt": [99999999]},
]


@pytest.mark.parametrize("change", BAD, ids=[str(next(iter(each.items()))) for each in BAD])
def test_values_that_cannot_be(endpoint: Endpoint, change: dict[str, Any]) -> None:
    refused(endpoint, "/v1/completions", {**TEXT, "model": endpoint.model, **change})


OURS: list[dict[str, Any]] = [
    {"temperature": True},
    {"temperature": 2.1},
    {"logit_bias": {"5": 101}},
    {"stop_token_ids": [-1]},
    {"stop": ""},
    {"prompt": ""},
    {"prompt": []},
    {"n": 17},
    {"n": 2, "temperature": 0},
    {"max_tokens": "5"},
    {"max_tokens": 0},
    {"suffix": "end"},
    {"best_of": 1, "n": 2},
    {"priority": 2**70},
]


@pytest.mark.parametrize("change", OURS, ids=[str(list(each.items())[-1]) for each in OURS])
def test_values_that_we_refuse(endpoint: Endpoint, ours: None, change: dict[str, Any]) -> None:
    error = refused(endpoint, "/v1/completions", {**TEXT, "model": endpoint.model, **change})
    assert error["type"] == "invalid_request_error"


def test_the_field_is_named(endpoint: Endpoint, ours: None) -> None:
    assert refused(endpoint, "/v1/completions", {**TEXT, "temperature": -1})["param"] == "temperature"
    assert refused(endpoint, "/v1/chat/completions", {"model": endpoint.model})["param"] == "messages"


CHATS: list[dict[str, Any]] = [
    {"messages": []},
    {"messages": "Hi"},
    {"messages": [{"content": "Hi"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"top_logprobs": 2},
    {"logprobs": True, "top_logprobs": 1000},
    {"logprobs": True, "top_logprobs": -2},
    {"max_completion_tokens": -1},
]


@pytest.mark.parametrize("change", CHATS, ids=[str(list(each.items())[-1]) for each in CHATS])
def test_conversations_that_cannot_be(endpoint: Endpoint, change: dict[str, Any]) -> None:
    refused(endpoint, "/v1/chat/completions", {**CHAT, "model": endpoint.model, **change})


def test_parts_that_are_no_text(endpoint: Endpoint) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}]
    refused(endpoint, "/v1/chat/completions", {**CHAT, "model": endpoint.model, "messages": messages})


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_longer_than_the_context(client: Client, endpoint: Endpoint, stream: bool) -> None:
    longest = endpoint.get("/v1/models").json()["data"][0]["max_model_len"]
    with pytest.raises(openai.BadRequestError, match=str(longest)):
        client.completion([5] * (longest + 1), stream=stream)
    with pytest.raises(openai.BadRequestError):
        client.chat("word " * (longest + 1), stream=stream)


def test_what_has_no_room_for_its_answer(client: Client, endpoint: Endpoint, ours: None) -> None:
    """As OpenAI does; vLLM makes the answer shorter."""
    longest = endpoint.get("/v1/models").json()["data"][0]["max_model_len"]
    with pytest.raises(openai.BadRequestError, match=str(longest)):
        client.completion([5] * 10, max_tokens=longest)


def test_the_code_of_what_is_too_long(endpoint: Endpoint, ours: None) -> None:
    for path, body in (
        ("/v1/completions", {**TEXT, "max_tokens": 1_000_000}),
        ("/v1/completions", {"prompt": [5] * 9000}),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 1_000_000}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 1_000_000}),
    ):
        assert refused(endpoint, path, body)["code"] == "context_length_exceeded"


RAW = {
    "nothing": b"",
    "half": b'{"prompt": "Hi"',
    "no object": b"[1, 2]",
    "a word": b"Hi",
    "nan": b'{"prompt": "Hi", "temperature": NaN}',
    "infinity": b'{"prompt": "Hi", "temperature": -Infinity}',
    "1e400": b'{"prompt": "Hi", "temperature": 1e400}',
    "1e400 tokens": b'{"prompt": "Hi", "max_tokens": 1e400}',
    "many digits": b'{"prompt": "Hi", "seed": 1' + b"0" * 5000 + b"}",
    "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "no utf-8": b'{"prompt": "\xff\xfe"}',
    "half a pair": b'{"prompt": "\\ud800"}',
    "a name with half a pair": b'{"prompt": "Hi", "model": "\\udc00"}',
    "null": b"null",
}


@pytest.mark.parametrize("name", RAW)
def test_bodies_that_are_no_requests(endpoint: Endpoint, name: str) -> None:
    head = {"content-type": "application/json"}
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = endpoint.post(path, content=RAW[name], headers=head)
        assert 400 <= answer.status_code < 500, answer.text
    assert endpoint.post("/v1/completions", {**TEXT, "model": endpoint.model}).status_code == 200


@pytest.mark.parametrize("name", ["deep", "nan", "1e400", "half a pair", "a name with half a pair"])
def test_the_shape_of_what_they_get(endpoint: Endpoint, ours: None, name: str) -> None:
    answer = endpoint.post("/v1/completions", content=RAW[name], headers={"content-type": "application/json"})
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_fields_that_nobody_knows_may_be_deep(endpoint: Endpoint, ours: None) -> None:
    deep: Any = 1
    for _ in range(300):
        deep = {"a": deep}
    assert endpoint.post("/v1/completions", {**TEXT, "unknown": deep}).status_code == 200


def test_no_null_bytes_are_lost(client: Client) -> None:
    assert client.completion("a\0b", temperature=0, max_tokens=2, echo=True).choices[0].text.startswith("a\0b")


def test_a_body_of_another_type(endpoint: Endpoint) -> None:
    answer = endpoint.post("/v1/completions", content=b'{"prompt": "Hi"}', headers={"content-type": "text/plain"})
    assert 400 <= answer.status_code < 500


def test_embeddings_are_not_supported(client: Client, ours: None) -> None:
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.call(lambda c: c.embeddings.create(model=client.model, input="Hi"))
