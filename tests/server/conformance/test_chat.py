"""`/v1/chat/completions` through the official client."""

import math
from typing import Any

import pytest

from support.openai_client import Client, Endpoint

QUESTION = "What is the capital of France?"


def streamed(client: Client, messages: Any, **fields: Any) -> tuple[dict[int, str], list[Any]]:
    """The content of each choice, put together, and all chunks."""
    chunks = client.chat(messages, stream=True, **fields)
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return texts, chunks


def test_a_whole_answer(client: Client) -> None:
    answer = client.chat(QUESTION, temperature=0, max_tokens=10)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == client.model
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert "Paris" in choice.message.content
    assert not choice.message.tool_calls
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_is_what_is_whole(client: Client) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 10}
    whole = client.chat(QUESTION, **fields)
    texts, chunks = streamed(client, QUESTION, **fields)
    assert texts == {0: whole.choices[0].message.content}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert not chunks[0].choices[0].delta.content
    assert all(choice.delta.role is None for chunk in chunks[1:] for choice in chunk.choices)
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}


def test_a_seed_makes_it_the_same_again(client: Client) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 8}
    whole = client.chat(QUESTION, **fields).choices[0].message.content
    assert streamed(client, QUESTION, **fields)[0] == {0: whole}


def test_usage_at_the_end_of_a_stream(client: Client) -> None:
    whole = client.chat(QUESTION, temperature=0, max_tokens=4)
    _, chunks = streamed(client, QUESTION, temperature=0, max_tokens=4, stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_samples(client: Client) -> None:
    fields: dict[str, Any] = {"n": 2, "seed": 4, "max_tokens": 6, "temperature": 1.5}
    answer = client.chat(QUESTION, **fields)
    assert [choice.index for choice in answer.choices] == [0, 1]
    texts, chunks = streamed(client, QUESTION, **fields)
    assert texts == {choice.index: choice.message.content for choice in answer.choices}
    assert [c.index for chunk in chunks for c in chunk.choices if c.delta.role] == [0, 1]


def test_a_conversation_goes_on(client: Client) -> None:
    messages = [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Say the word blue."},
        {"role": "assistant", "content": "Blue"},
        {"role": "user", "content": [{"type": "text", "text": "Say it again."}]},
    ]
    answer = client.chat(messages, temperature=0, max_tokens=4)
    assert answer.usage.prompt_tokens > 30
    assert answer.choices[0].message.content
    messages[-1] = {"role": "user", "content": "Say it again."}
    assert client.chat(messages, temperature=0, max_tokens=4).choices[0].message.content == (
        answer.choices[0].message.content
    )


def test_either_name_of_the_limit(client: Client) -> None:
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 9, "max_completion_tokens": 3}):
        answer = client.chat(QUESTION, temperature=0, **limit)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_a_stop_string_ends_it(client: Client) -> None:
    free = client.chat(QUESTION, temperature=0, max_tokens=10).choices[0].message.content
    stop = free[4:7]
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 10, "stop": stop}
    choice = client.chat(QUESTION, **fields).choices[0]
    assert (choice.message.content, choice.finish_reason) == (free[: free.index(stop)], "stop")
    assert streamed(client, QUESTION, **fields)[0] == {0: free[: free.index(stop)]}


@pytest.mark.parametrize("count", [None, 0, 3])
def test_logprobs(client: Client, count: int | None) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "logprobs": True}
    if count is not None:
        fields["top_logprobs"] = count
    choice = client.chat(QUESTION, **fields).choices[0]
    scores = choice.logprobs.content
    assert "".join(score.token for score in scores) == choice.message.content
    for score in scores:
        assert score.logprob <= 0
        assert bytes(score.bytes).decode() == score.token
        assert len(score.top_logprobs) == (count or 0)
        if count:
            assert score.top_logprobs[0].token == score.token
            assert math.isclose(score.top_logprobs[0].logprob, score.logprob, abs_tol=1e-3)
            assert [top.logprob for top in score.top_logprobs] == sorted(
                (top.logprob for top in score.top_logprobs), reverse=True
            )
    _, chunks = streamed(client, QUESTION, **fields)
    parts = [s for chunk in chunks for c in chunk.choices if c.logprobs for s in c.logprobs.content]
    assert [part.token for part in parts] == [score.token for score in scores]
    assert [part.logprob for part in parts] == pytest.approx([score.logprob for score in scores], abs=1e-3)


def test_no_logprobs_unless_asked(client: Client) -> None:
    assert client.chat(QUESTION, temperature=0, max_tokens=1).choices[0].logprobs is None


def test_a_bias_decides(client: Client, endpoint: Endpoint) -> None:
    token = endpoint.post("/tokenize", {"prompt": " banana"}).json()["tokens"][0]
    answer = client.chat(QUESTION, temperature=0, max_tokens=3, logit_bias={str(token): 100})
    assert len(set(answer.choices[0].message.content.split())) == 1


def test_narrow_sampling_is_greedy(client: Client) -> None:
    greedy = client.chat(QUESTION, temperature=0, max_tokens=5).choices[0].message.content
    for narrow in ({"top_k": 1}, {"min_p": 1.0}):
        answer = client.chat(QUESTION, temperature=2, max_tokens=5, extra_body=narrow)
        assert answer.choices[0].message.content == greedy


def test_penalties_are_against_repetition(client: Client) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 10}
    plain = client.chat("Say ha ha ha ha ha ha ha ha.", **fields).choices[0].message.content
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 5.0}}):
        assert client.chat("Say ha ha ha ha ha ha ha ha.", **fields, **penalty).choices[0].message.content != plain


def test_the_extensions(client: Client) -> None:
    more = {"ignore_eos": True, "min_tokens": 14, "priority": 0, "stop_token_ids": [], "nobody_knows_this": None}
    answer = client.chat(QUESTION, temperature=0, max_tokens=14, user="somebody", extra_body=more)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (14, "length")


def test_the_end_of_a_turn_ends_it(client: Client) -> None:
    answer = client.chat("Say hi.", temperature=0, max_tokens=64)
    assert answer.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in answer.choices[0].message.content
    assert answer.usage.completion_tokens < 64
