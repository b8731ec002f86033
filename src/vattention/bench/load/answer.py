"""What one request has come to: when its text came, how long it was, or how it failed."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

from vattention.bench.load.exchange import Address, Broken, exchange


@dataclass
class Answer:
    """One request. Times are seconds on `time.perf_counter`.

    Attributes:
        due: when it was to be sent.
        wanted: tokens of output asked for.
        texts: when each piece of text came.
        ended: when the answer was over.
        prompt_tokens, output_tokens: as the server counts them.
        failure: the kind of failure in a few words, None for none.
        detail: what the server or the system said of it.
    """

    due: float
    wanted: int
    texts: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    failure: str | None = None
    detail: str = ""

    @property
    def first(self) -> float:
        """Seconds until the first text."""
        return self.texts[0] - self.due

    @property
    def each(self) -> float | None:
        """Seconds a token after the first text, on average; None where there is no other token."""
        if self.output_tokens < 2:
            return None
        return (self.texts[-1] - self.texts[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds from each piece of text to the next."""
        return [b - a for a, b in zip(self.texts, self.texts[1:], strict=False)]

    @property
    def whole(self) -> float:
        """Seconds until all of it was there."""
        return self.ended - self.due


@dataclass(frozen=True)
class Ask:
    """What is sent.

    Attributes:
        path: of the endpoint, as /v1/completions.
        body: JSON.
        wanted: tokens of output that must come; 0: as many as it likes.
        at_most: tokens of output that may come.
    """

    path: str
    body: bytes
    wanted: int
    at_most: int


async def send(address: Address, headers: dict[str, str], ask: Ask, *, due: float, timeout: float) -> Answer:
    """Send a request now and read its answer. Failures are in the result."""
    answer = Answer(due=due, wanted=ask.at_most)
    reading = _Reading(answer)
    try:
        async with asyncio.timeout(timeout):
            status, body = await exchange(address, "POST", ask.path, headers, ask.body, reading.event)
    except TimeoutError:
        answer.failure, answer.detail = "timed out", f"after {timeout:g} s"
    except OSError as error:
        answer.failure, answer.detail = "no connection", str(error)
    except Broken as error:
        answer.failure, answer.detail = "cut off", str(error)
    else:
        if status != 200:
            answer.failure, answer.detail = f"HTTP {status}", body.decode(errors="replace")[:300]
        elif answer.failure is None:
            answer.failure, answer.detail = reading.verdict(ask)
    answer.ended = time.perf_counter()
    return answer


class _Reading:
    """The events of one stream."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._done = False
        self._counted = False

    def event(self, now: float, data: bytes) -> None:
        answer = self._answer
        if data == b"[DONE]":
            self._done = True
            return
        try:
            said: dict[str, Any] = json.loads(data)
            if "error" in said:
                answer.failure, answer.detail = "error in the stream", json.dumps(said["error"])[:300]
                return
            if any(_text(choice) for choice in said.get("choices") or ()):
                answer.texts.append(now)
            usage = said.get("usage")
            if usage:
                answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                self._counted = True
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            answer.failure = "not the protocol"
            answer.detail = f"{type(error).__name__}: {error} in {data[:200].decode(errors='replace')}"

    def verdict(self, ask: Ask) -> tuple[str | None, str]:
        """Kind of failure and detail, of a stream that ended without an error."""
        answer = self._answer
        if not self._done:
            return "cut off", "the stream ended without [DONE]"
        if not self._counted:
            return "not the protocol", "no usage came, though stream_options asked for it"
        if ask.wanted and answer.output_tokens != ask.wanted:
            return "wrong length", f"{answer.output_tokens} tokens of {ask.wanted}"
        if not answer.texts:
            return "no text", f"{answer.output_tokens} tokens, and nothing to read"
        return None, ""


def _text(choice: dict[str, Any]) -> bool:
    """Whether a choice brings something to read."""
    if choice.get("text"):
        return True
    delta = choice.get("delta")
    if not delta:
        return False
    return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls", "refusal"))
