"""Log-probabilities in the shapes of OpenAI's two endpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vattention.engine.outputs import Logprob
from vattention.server.text import bytes_of

Scored = tuple[int, Mapping[int, Logprob] | None]
"""A token, and what is known about its place: of the first token of a prompt, nothing."""


def completion_logprobs(
    tokens: Iterable[Scored], top: int, offset: int, *, as_ids: bool, text_of: Callable[[int], str]
) -> dict[str, Any]:
    """The shape of `/v1/completions`: a list for each column.

    Args:
        tokens: what to describe.
        top: how many of the most likely tokens to name.
        offset: characters before the first token. What a token adds is counted as the length of its own text.
        as_ids: name tokens "token_id:123", which is never ambiguous.
        text_of: the text of a token of which nothing is known.
    """
    names: list[str] = []
    chosen: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token, entry in tokens:
        mine = None if entry is None else entry[token]
        text = text_of(token) if mine is None else mine.decoded_token or ""
        names.append(_name(token, text, as_ids=as_ids))
        chosen.append(None if mine is None else mine.logprob)
        tops.append(None if entry is None else _column(entry, top, as_ids=as_ids))
        offsets.append(offset)
        offset += len(text)
    return {"tokens": names, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(tokens: Iterable[Scored], top: int, *, as_ids: bool, tokenizer: Any | None) -> dict[str, Any]:
    """The shape of `/v1/chat/completions`: an object for each token. `tokenizer` knows bytes of half characters."""
    content = []
    for token, entry in tokens:
        assert entry is not None
        most = _most_likely(entry, top)
        content.append(
            _token(token, entry[token], as_ids, tokenizer)
            | {"top_logprobs": [_token(other, value, as_ids, tokenizer) for other, value in most]}
        )
    return {"content": content, "refusal": None}


def _column(entry: Mapping[int, Logprob], top: int, *, as_ids: bool) -> dict[str, float]:
    """Text -> log-probability: the most likely tokens, and the one that came. Of equal texts the likelier counts."""
    token = next(iter(entry))
    column: dict[str, float] = {}
    for other, value in [*_most_likely(entry, top), (token, entry[token])]:
        column.setdefault(_name(other, value.decoded_token or "", as_ids=as_ids), value.logprob)
    return column


def _most_likely(entry: Mapping[int, Logprob], top: int) -> Sequence[tuple[int, Logprob]]:
    """The first `top` by rank; the token that came stands first in `entry`, wherever it ranks."""
    return sorted(entry.items(), key=lambda item: item[1].rank)[:top]


def _token(token: int, value: Logprob, as_ids: bool, tokenizer: Any | None) -> dict[str, Any]:
    text = value.decoded_token or ""
    name = _name(token, text, as_ids=as_ids)
    return {"token": name, "logprob": value.logprob, "bytes": list(bytes_of(tokenizer, token, text))}


def _name(token: int, text: str, *, as_ids: bool) -> str:
    return f"token_id:{token}" if as_ids else text
