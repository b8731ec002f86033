"""`/v1/completions` through the official client."""

import math
from typing import Any

import pytest

from support.openai_client import Client

PROMPT = "The three primary colours are"


def streamed(client: Client, prompt: Any, **fields: Any) -> tuple[dict[int, str], list[Any]]:
    """The text of each choice, put together, and all chunks."""
    chunks = client.completion(prompt, stream=True, **fields)
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return texts, chunks


def ids_of(client: Client, text: str) -> list[int]:
    """Token ids that say `text`, by way of the server's own tokenizer."""
    answer: Any = client.call(lambda c: c.post("/tokenize", body={"prompt": text}, cast_to=object))
    return list(answer["tokens"])


@pytest.fixture
def rooted(endpoint: Any) -> Client:
    """A client of the server's root, for /tokenize."""
    return Client(endpoint, base="")


def test_a_whole_answer(client: Client) -> None:
    answer = client.completion(PROMPT, temperature=0, max_tokens=6)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == client.model
    assert answer.created > 1_600_000_000
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.text
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens >= 4
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6


def test_streamed_is_what_is_whole(client: Client) -> None:
    whole = client.completion(PROMPT, temperature=0, max_tokens=8)
    texts, chunks = streamed(client, PROMPT, temperature=0, max_tokens=8)
    assert texts == {0: whole.choices[0].text}
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len(chunks) > 4  # as it comes


def test_a_seed_makes_it_the_same_again(client: Client) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 11, "max_tokens": 8}
    whole = client.completion(PROMPT, **fields).choices[0].text
    texts, _ = streamed(client, PROMPT, **fields)
    assert texts == {0: whole}
    assert client.completion(PROMPT, **{**fields, "seed": 12}).choices[0].text != whole


def test_a_negative_seed_is_a_seed(client: Client) -> None:
    once, again = (client.completion(PROMPT, seed=-7, max_tokens=4).choices[0].text for _ in range(2))
    assert once == again


def test_usage_at_the_end_of_a_stream(client: Client) -> None:
    _, chunks = streamed(client, PROMPT, temperature=0, max_tokens=4, stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    assert chunks[-1].usage.prompt_tokens >= 4
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_samples(client: Client) -> None:
    fields: dict[str, Any] = {"n": 3, "seed": 5, "max_tokens": 6}
    answer = client.completion(PROMPT, **fields)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    assert answer.usage.completion_tokens == 18
    texts, chunks = streamed(client, PROMPT, **fields)
    assert texts == {choice.index: choice.text for choice in answer.choices}
    assert len([c for chunk in chunks for c in chunk.choices if c.finish_reason]) == 3


def test_batches_of_text_and_of_tokens(client: Client, rooted: Client) -> None:
    other = "Once upon a time"
    texts = [client.completion(prompt, temperature=0, max_tokens=5).choices[0].text for prompt in (PROMPT, other)]
    ids = [ids_of(rooted, prompt) for prompt in (PROMPT, other)]
    assert client.completion(ids[0], temperature=0, max_tokens=5).choices[0].text == texts[0]
    for batch in ([PROMPT, other], ids):
        answer = client.completion(batch, temperature=0, max_tokens=5)
        assert [(c.index, c.text) for c in answer.choices] == list(enumerate(texts))
        assert answer.usage.prompt_tokens == len(ids[0]) + len(ids[1])
        assert answer.usage.completion_tokens == 10
    assert streamed(client, ids, temperature=0, max_tokens=5)[0] == dict(enumerate(texts))


def test_samples_of_a_batch_come_prompt_by_prompt(client: Client) -> None:
    fields: dict[str, Any] = {"n": 2, "seed": 3, "max_tokens": 5}
    alone = [client.completion(prompt, **fields).choices for prompt in (PROMPT, "Hello")]
    answer = client.completion([PROMPT, "Hello"], **fields)
    assert [c.text for c in answer.choices] == [c.text for choices in alone for c in choices]
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert streamed(client, [PROMPT, "Hello"], **fields)[0] == {c.index: c.text for c in answer.choices}


@pytest.mark.parametrize("listed", [False, True])
def test_a_stop_string_ends_it(client: Client, listed: bool) -> None:
    free = client.completion(PROMPT, temperature=0, max_tokens=8).choices[0].text
    stop = free[4:7]
    at = free.index(stop)
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "stop": ["\0never", stop] if listed else stop}
    choice = client.completion(PROMPT, **fields).choices[0]
    assert (choice.text, choice.finish_reason) == (free[:at], "stop")
    texts, chunks = streamed(client, PROMPT, **fields)
    assert texts == {0: free[:at]}
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["stop"]


def test_stop_in_the_output_where_it_is_wanted(client: Client) -> None:
    free = client.completion(PROMPT, temperature=0, max_tokens=8).choices[0].text
    stop = free[4:7]
    more = {"include_stop_str_in_output": True}
    choice = client.completion(PROMPT, temperature=0, max_tokens=8, stop=stop, extra_body=more).choices[0]
    assert choice.text == free[: free.index(stop)] + stop


def test_stop_token_ids(client: Client, rooted: Client) -> None:
    free = client.completion(PROMPT, temperature=0, max_tokens=8, logprobs=0).choices[0]
    token = ids_of(rooted, free.logprobs.tokens[3])[0]
    first = free.logprobs.tokens.index(free.logprobs.tokens[3])
    more = {"stop_token_ids": [token]}
    choice = client.completion(PROMPT, temperature=0, max_tokens=8, logprobs=0, extra_body=more).choices[0]
    assert choice.finish_reason == "stop"
    assert len(choice.logprobs.tokens) == first + 1
    assert choice.text == "".join(free.logprobs.tokens[:first])
    assert choice.stop_reason == token


@pytest.mark.parametrize("count", [0, 3])
def test_logprobs(client: Client, count: int) -> None:
    whole = client.completion(PROMPT, temperature=0, max_tokens=4, logprobs=count).choices[0]
    scores = whole.logprobs
    assert "".join(scores.tokens) == whole.text
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == 4
    assert scores.text_offset == [len("".join(scores.tokens[:i])) for i in range(4)]
    for token, value, top in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True):
        assert value <= 0
        assert len(top) == max(count, 1)
        assert math.isclose(top[token], value, abs_tol=1e-3)
        assert max(top.values()) == pytest.approx(value, abs=1e-3)  # at temperature 0 the likeliest comes
    _, chunks = streamed(client, PROMPT, temperature=0, max_tokens=4, logprobs=count)
    parts = [c.logprobs for chunk in chunks for c in chunk.choices if c.logprobs]
    assert [token for part in parts for token in part.tokens] == scores.tokens
    assert [v for part in parts for v in part.token_logprobs] == pytest.approx(scores.token_logprobs, abs=1e-3)
    assert [offset for part in parts for offset in part.text_offset] == scores.text_offset


def test_echo(client: Client) -> None:
    plain = client.completion(PROMPT, temperature=0, max_tokens=5).choices[0].text
    assert client.completion(PROMPT, temperature=0, max_tokens=5, echo=True).choices[0].text == PROMPT + plain
    assert streamed(client, PROMPT, temperature=0, max_tokens=5, echo=True)[0] == {0: PROMPT + plain}


def test_echo_with_logprobs_scores_the_prompt(client: Client, rooted: Client) -> None:
    ids = ids_of(rooted, PROMPT)
    choice = client.completion(PROMPT, temperature=0, max_tokens=2, echo=True, logprobs=1).choices[0]
    scores = choice.logprobs
    assert len(scores.tokens) == len(ids) + 2
    assert "".join(scores.tokens) == choice.text
    assert scores.token_logprobs[0] is None
    assert scores.top_logprobs[0] is None
    assert all(value <= 0 for value in scores.token_logprobs[1:])
    assert scores.text_offset[1] == len(scores.tokens[0])


def test_echo_alone(client: Client) -> None:
    answer = client.completion(PROMPT, max_tokens=0, echo=True, logprobs=1, temperature=0)
    assert answer.choices[0].text == PROMPT
    assert "".join(answer.choices[0].logprobs.tokens) == PROMPT


def test_a_bias_decides(client: Client, rooted: Client) -> None:
    token = ids_of(rooted, " banana")[0]
    bias = {str(token): 100}
    scores = client.completion(PROMPT, temperature=0, max_tokens=3, logit_bias=bias, logprobs=0).choices[0].logprobs
    assert len(set(scores.tokens)) == 1
    assert (
        scores.tokens[0]
        != client.completion(PROMPT, temperature=0, max_tokens=1, logprobs=0).choices[0].logprobs.tokens[0]
    )


PENALTIES: list[dict[str, Any]] = [
    {"presence_penalty": 2},
    {"frequency_penalty": 2},
    {"extra_body": {"repetition_penalty": 5.0}},
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_penalties_are_against_repetition(client: Client, penalty: dict[str, Any]) -> None:
    prompts = ["ha ha ha ha ha ha", "one two one two one", "The cat and the dog and the"]
    plain, other = (
        client.completion(prompts, temperature=0, max_tokens=8, logprobs=0, **fields).choices
        for fields in ({}, penalty)
    )

    def repeated(choices: Any) -> int:
        return sum(len(c.logprobs.tokens) - len(set(c.logprobs.tokens)) for c in choices)

    assert repeated(other) < repeated(plain)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}])
def test_narrow_sampling_is_greedy(client: Client, narrow: dict[str, Any]) -> None:
    greedy = client.completion(PROMPT, temperature=0, max_tokens=5).choices[0].text
    more = {name: value for name, value in narrow.items() if name != "top_p"}
    top_p = {"top_p": narrow["top_p"]} if "top_p" in narrow else {}
    answer = client.completion(PROMPT, temperature=2, max_tokens=5, extra_body=more, **top_p)
    assert answer.choices[0].text == greedy


def test_temperature_matters(client: Client) -> None:
    cold, hot = (
        client.completion(PROMPT, temperature=temperature, max_tokens=8, seed=1).choices[0].text
        for temperature in (0, 2)
    )
    assert cold != hot


def test_ends_are_ignored_or_put_off(client: Client, rooted: Client) -> None:
    end = ids_of(rooted, "<|im_end|>")[0]
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "logit_bias": {str(end): 100}}
    ended = client.completion(PROMPT, **fields)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    ignored = client.completion(PROMPT, **fields, extra_body={"ignore_eos": True})
    assert (ignored.choices[0].finish_reason, ignored.usage.completion_tokens) == ("length", 4)
    put_off = client.completion(PROMPT, **fields, extra_body={"min_tokens": 2})
    assert (put_off.choices[0].finish_reason, put_off.usage.completion_tokens) == ("stop", 3)
    shown = client.completion(PROMPT, **fields, extra_body={"ignore_eos": True, "skip_special_tokens": False})
    assert shown.choices[0].text == "<|im_end|>" * 4


def test_sixteen_tokens_are_the_default(client: Client) -> None:
    answer = client.completion(PROMPT, temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


def test_fields_that_say_nothing(client: Client) -> None:
    more = {"priority": 0, "nobody_knows_this": {"a": [1]}, "best_of": None, "suffix": None}
    answer = client.completion(PROMPT, temperature=0, max_tokens=3, user="somebody", extra_body=more)
    assert answer.choices[0].text == client.completion(PROMPT, temperature=0, max_tokens=3).choices[0].text


def test_tokens_by_their_numbers(client: Client) -> None:
    more = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = client.completion(PROMPT, temperature=0, max_tokens=3, logprobs=1, extra_body=more).choices[0]
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in choice.token_ids]
    assert list(choice.logprobs.top_logprobs[0]) == choice.logprobs.tokens[:1]


def test_the_best_of_several(client: Client, ours: None) -> None:
    each = client.completion(PROMPT, n=4, seed=3, max_tokens=5, logprobs=0)
    likelihood = {c.text: sum(c.logprobs.token_logprobs) / len(c.logprobs.tokens) for c in each.choices}
    best = client.completion(PROMPT, n=2, best_of=4, seed=3, max_tokens=5)
    assert [c.text for c in best.choices] == sorted(likelihood, key=likelihood.__getitem__, reverse=True)[:2]
    assert best.usage.completion_tokens == 20
