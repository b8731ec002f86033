"""The bytes of tokens, and texts that are too long to be read."""

from typing import Any

import httpx
import pytest

from support.tokenizers import byte_fallback, byte_level, spell
from vattention.server.text import bytes_of, text_of


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_bytes_of_tokens_are_those_of_their_text(make: Any) -> None:
    tokenizer = make()
    text = "é🙂-and-\ufffd,plain"
    tokens = spell(tokenizer, text)
    assert b"".join(bytes_of(tokenizer, token, text_of(tokenizer, [token])) for token in tokens) == text.encode()


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert (text_of(None, [1]), bytes_of(None, 1, "")) == ("", b"")


def test_bytes_in_an_answer_make_up_its_text(tiny_server: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "seed": 7, "max_tokens": 60}
    answer = httpx.post(f"{tiny_server}/v1/chat/completions", json={**body, "ignore_eos": True}, timeout=30).json()
    (choice,) = answer["choices"]
    spelled = b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"])
    assert spelled.decode(errors="replace") == choice["message"]["content"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_texts_that_must_be_too_long_are_refused_unread(
    tiny_server: str, tiny_llm: Any, monkeypatch: Any, path: str
) -> None:
    text = "word " * 100_000

    async def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the text has been read")

    monkeypatch.setattr(tiny_llm, "tokenize", never)
    monkeypatch.setattr(tiny_llm, "tokenize_chat", never)
    body = {
        "prompt": [text],
        "input": text,
        "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}],
    }
    answer = httpx.post(tiny_server + path, json=body, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
