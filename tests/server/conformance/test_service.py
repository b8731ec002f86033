"""Models, tokens, probes."""

import openai
import pytest

from support.openai_client import Client, Endpoint


def test_models(client: Client) -> None:
    models = client.call(lambda c: c.models.list())
    names = [model.id for model in models.data]
    assert client.model in names
    assert models.data[0].object == "model"


def test_one_model(client: Client, ours: None) -> None:
    assert client.call(lambda c: c.models.retrieve(client.model)).id == client.model


def test_a_model_that_is_not_there(client: Client, ours: None) -> None:
    for name in ("gpt-17", "some/one's"):
        with pytest.raises(openai.NotFoundError):
            client.call(lambda c, name=name: c.models.retrieve(name))


def test_tokenize_and_back(endpoint: Endpoint) -> None:
    text = "Grüße, 世界 🙂 and <|im_end|>"
    answer = endpoint.post("/tokenize", {"model": endpoint.model, "prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] > 0
    back = endpoint.post("/detokenize", {"model": endpoint.model, "tokens": answer["tokens"]}).json()
    assert back == {"prompt": text}


def test_tokens_of_a_conversation(endpoint: Endpoint, client: Client) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    answer = endpoint.post("/tokenize", {"model": endpoint.model, "messages": messages}).json()
    assert answer["count"] == client.chat("Hi", temperature=0, max_tokens=1).usage.prompt_tokens
    closed = {"model": endpoint.model, "messages": messages, "add_generation_prompt": False}
    assert endpoint.post("/tokenize", closed).json()["count"] < answer["count"]


def test_tokens_that_are_not_there(endpoint: Endpoint) -> None:
    for tokens in ([-1], "Hi", ["a"], [2**64]):
        assert 400 <= endpoint.post("/detokenize", {"model": endpoint.model, "tokens": tokens}).status_code < 500


def test_tokens_that_the_model_has_not(endpoint: Endpoint, ours: None) -> None:
    assert endpoint.post("/detokenize", {"tokens": [99999999]}).status_code == 400


def test_one_of_two(endpoint: Endpoint, ours: None) -> None:
    assert endpoint.post("/tokenize", {}).status_code == 400
    assert endpoint.post("/tokenize", {"prompt": "Hi", "messages": [{"role": "user"}]}).status_code == 400


def test_probes(endpoint: Endpoint) -> None:
    assert endpoint.get("/health").status_code == 200
    assert endpoint.get("/version").json()["version"]


def test_ready(endpoint: Endpoint, ours: None) -> None:
    assert endpoint.get("/ready").json() == {"status": "ok"}
