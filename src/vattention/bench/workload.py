"""What the engines are given to do: cases, each some requests that arrive all at once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vattention.bench.trace import Lengths, load_trace
from vattention.errors import ConfigError


@dataclass(frozen=True)
class Case:
    """Requests that arrive together.

    Attributes:
        name: for the tables.
        requests: prompt and output tokens of each.
        shared: tokens at the beginning that all prompts have in common, as far as a prompt is longer than that.
    """

    name: str
    requests: tuple[Lengths, ...]
    shared: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(request.prompt + request.output for request in self.requests)

    @property
    def prompt_tokens(self) -> int:
        """Of all requests."""
        return sum(request.prompt for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """Of all requests."""
        return sum(request.output for request in self.requests)

    def prompts(self, vocab_size: int, seed: str) -> list[list[int]]:
        """Random token ids, the same for the same seed. Other seeds have nothing in common: no cache of beginnings
        can help from one run to another."""
        source = random.Random(seed)
        beginning = [source.randrange(vocab_size) for _ in range(self.shared)]
        prompts = []
        for request in self.requests:
            own = request.prompt - min(self.shared, request.prompt - 1)
            rest = [source.randrange(vocab_size) for _ in range(own)]
            prompts.append(beginning[: request.prompt - own] + rest)
        return prompts


def fixed(requests: Sequence[int], prompts: Sequence[int], outputs: int, *, shared: int = 0) -> list[Case]:
    """A case for each number of requests and each length of prompts. Raises ConfigError for a number below 1."""
    if min(*requests, *prompts, outputs) < 1:
        raise ConfigError("requests, prompt tokens and output tokens must be at least 1")
    if not 0 <= shared < min(prompts):
        raise ConfigError(f"--shared-prefix {shared} must leave a token of every prompt")
    common = f", {shared} shared" if shared else ""
    return [
        Case(f"{count} x {prompt}/{outputs}{common}", (Lengths(prompt, outputs),) * count, shared)
        for prompt in prompts
        for count in requests
    ]


def sampled(path: str, count: int, longest: int, *, seed: int, shared: int = 0) -> Case:
    """`count` requests of a trace, drawn without putting back and kept in order of arrival, fitted to `longest`.

    Raises: ConfigError: fewer requests than that in it, or as `load_trace`.
    """
    trace = load_trace(path)
    if not 1 <= count <= len(trace):
        raise ConfigError(f"{path} has {len(trace)} requests: {count} cannot be drawn from them")
    picked = sorted(random.Random(seed).sample(range(len(trace)), count))
    return Case(f"{count} of the trace, up to {longest}", tuple(fitted([trace[i] for i in picked], longest)), shared)


def fitted(requests: Sequence[Lengths], longest: int) -> list[Lengths]:
    """All lengths by the one factor that makes the longest request (prompt and output) `longest` tokens, rounded down,
    at least 1; as they are where all fit already.

    Raises ConfigError for less than 2 tokens.
    """
    if longest < 2:
        raise ConfigError("a request has at least 2 tokens: one of its prompt and one of its output")
    most = max(request.prompt + request.output for request in requests)
    if most <= longest:
        return list(requests)
    return [Lengths(*(max(1, tokens * longest // most) for tokens in request)) for request in requests]
