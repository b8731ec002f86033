"""`/v1/responses` through the official client, in its basic form."""

from typing import Any

import openai
import pytest

from support.openai_client import Client, Endpoint

QUESTION = "What is the capital of France?"


def test_a_whole_answer(client: Client) -> None:
    answer = client.response(QUESTION, temperature=0, max_output_tokens=40)
    assert answer.object == "response"
    assert answer.id.startswith("resp_")
    assert answer.status == "completed"
    assert "Paris" in answer.output_text
    (message,) = answer.output
    assert (message.type, message.role) == ("message", "assistant")
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.usage.output_tokens > 3


def test_an_answer_that_is_cut_off(client: Client) -> None:
    answer = client.response(QUESTION, temperature=0, max_output_tokens=3)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 3


@pytest.mark.parametrize("limit", [3, 40])
def test_events(client: Client, limit: int) -> None:
    whole = client.response(QUESTION, temperature=0, max_output_tokens=limit)
    events = client.response(QUESTION, temperature=0, max_output_tokens=limit, stream=True)
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:-1] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text
    assert events[-4].text == whole.output_text
    last = events[-1].response
    assert (last.status, last.output_text) == (whole.status, whole.output_text)
    assert last.usage.output_tokens == whole.usage.output_tokens


def test_the_end_has_the_name_of_its_status(client: Client, ours: None) -> None:
    for limit, name in ((3, "response.incomplete"), (40, "response.completed")):
        events = client.response(QUESTION, temperature=0, max_output_tokens=limit, stream=True)
        assert events[-1].type == name


def test_the_clients_own_collector(client: Client, endpoint: Endpoint) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_output_tokens": 6}
    with (
        openai.OpenAI(base_url=endpoint.url + "/v1", api_key="any") as official,
        official.responses.stream(model=endpoint.model, input=QUESTION, **fields) as stream,
    ):
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")


def test_messages_and_instructions(client: Client) -> None:
    asked = client.response(
        [{"role": "user", "content": QUESTION}], instructions="You are terse.", temperature=0, max_output_tokens=6
    )
    parts = client.response(
        [
            {"role": "system", "content": "You are terse."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        ],
        temperature=0,
        max_output_tokens=6,
    )
    assert asked.output_text == parts.output_text
    assert asked.usage.input_tokens == parts.usage.input_tokens
    assert asked.instructions == "You are terse."


def test_the_same_answer_as_chat(client: Client) -> None:
    chat = client.chat(QUESTION, temperature=0, max_tokens=8).choices[0].message.content
    assert client.response(QUESTION, temperature=0, max_output_tokens=8).output_text == chat


def test_logprobs(client: Client) -> None:
    answer = client.response(
        QUESTION, temperature=0, max_output_tokens=3, top_logprobs=2, include=["message.output_text.logprobs"]
    )
    scores = answer.output[0].content[0].logprobs
    assert "".join(score.token for score in scores) == answer.output_text
    assert [len(score.top_logprobs) for score in scores] == [2, 2, 2]
