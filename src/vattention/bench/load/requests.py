"""What is asked: prompts of exact lengths, as the endpoint takes them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vattention.bench.load.answer import Ask
from vattention.bench.trace import Lengths
from vattention.errors import ConfigError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

_WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"),
    *("family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system"),
    *("program", "question", "work", "government", "number", "night", "point", "home", "water", "room", "mother"),
    *("area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business"),
    *("issue", "side", "kind", "head", "house", "service", "friend", "father", "power", "hour", "game", "line", "end"),
)
"""With a space before them, a token each in every vocabulary made from English."""


@dataclass(frozen=True)
class Form:
    """How requests are written.

    Attributes:
        endpoint: "completions" or "chat".
        prompts: "ids" or "text".
        vocab_size: ids are drawn below it.
        ignore_eos: every answer has exactly the tokens asked for. Not OpenAI's, but vLLM's and ours.
        body: more fields.
    """

    endpoint: str = "completions"
    prompts: str = "ids"
    vocab_size: int = 10_000
    ignore_eos: bool = True
    body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.endpoint not in PATHS:
            raise ConfigError(f"--endpoint is one of {', '.join(PATHS)}")
        if self.prompts not in ("ids", "text"):
            raise ConfigError("--prompts is ids or text")
        if self.endpoint == "chat" and self.prompts == "ids":
            raise ConfigError("the chat endpoint takes text: --prompts text")
        if self.vocab_size < 1:
            raise ConfigError("--vocab-size must be at least 1")


def asks(form: Form, model: str, lengths: Sequence[Lengths], *, seed: str, overhead: int = 0) -> list[Ask]:
    """A request for each of `lengths`. Other seeds have nothing in common: no cache of beginnings can help.

    Args:
        overhead: tokens that the server adds to the words of a prompt: a beginning, a chat template.

    Raises ConfigError for a prompt that is not longer than that.
    """
    source = random.Random(seed)
    return [_ask(form, model, each, source, overhead) for each in lengths]


def _ask(form: Form, model: str, length: Lengths, source: random.Random, overhead: int) -> Ask:
    body: dict[str, Any] = {"model": model}
    if form.prompts == "ids":
        body["prompt"] = [source.randrange(form.vocab_size) for _ in range(length.prompt)]
    else:
        count = length.prompt - overhead
        if count < 1:
            raise ConfigError(f"a prompt of {length.prompt} tokens: the server adds {overhead} to what is written")
        text = "".join(f" {source.choice(_WORDS)}" for _ in range(count))
        if form.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
    body |= {"max_tokens": length.output, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    if form.ignore_eos:
        body["ignore_eos"] = True
    written = json.dumps({**body, **form.body}).encode()
    return Ask(PATHS[form.endpoint], written, length.output if form.ignore_eos else 0, length.output)
