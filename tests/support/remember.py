"""A model that remembers, and an engine around it.

Its next token is a hash of every token before it, read from its own copy of each slot: content that is lost, mixed up
or computed twice in the wrong place makes other tokens.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vattention.cache import KVCache, KVLayout
from vattention.engine.engine import Engine
from vattention.engine.request import Chunk

VOCABULARY = 50


def next_token(tokens: Sequence[int]) -> int:
    return hashlib.blake2b(bytes(tokens), digest_size=2).digest()[0] % VOCABULARY


def expected(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Rememberer:
    """Stands in for the runner: keeps what was written to each slot, and checks the rules of a pass."""

    def __init__(self, cache: KVCache, max_num_batched_tokens: int) -> None:
        self.cache = cache
        self.limit = max_num_batched_tokens
        self.slots: dict[int, list[int]] = {}
        self.engine: Engine
        self.passes = 0
        self.rows = 0
        self.fail_at: int | None = None
        self.fails: Callable[[Sequence[Chunk]], bool] = lambda chunks: False
        self.failures = 0

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        self.passes += 1
        if self.passes == self.fail_at or self.fails(chunks):
            self.failures += 1
            for chunk in chunks:  # in the middle of a pass, what follows is spoiled
                del self.slots.setdefault(chunk.slot, [])[chunk.start :]
                self.slots[chunk.slot] += [0] * (chunk.end - chunk.start)
            raise RuntimeError("the model broke")
        running = self.engine.scheduler.running
        rows = sum(chunk.end - chunk.start for chunk in chunks)
        self.rows += rows
        assert rows <= self.limit
        assert all(chunk.end > chunk.start for chunk in chunks)
        assert len({chunk.slot for chunk in chunks}) == len(chunks)
        if any(r.suspect for r in running):
            assert len(chunks) == 1
            assert chunks[0].request.suspect
        else:
            # Nobody who could decode is left out for somebody's prompt.
            assert {c.request for c in chunks} >= {r for r in running if r.remaining == 1}
        logits = []
        for chunk in chunks:
            assert self.cache.length(chunk.slot) == chunk.end
            if chunk.start == 0:
                self.slots[chunk.slot] = []
            content = self.slots[chunk.slot]
            assert len(content) >= chunk.start
            del content[chunk.start :]
            content += chunk.request.tokens(chunk.start, chunk.end)
            if chunk.samples:
                logits.append(torch.nn.functional.one_hot(torch.tensor(next_token(content)), VOCABULARY).float())
        return torch.stack(logits) if logits else torch.empty(0, VOCABULARY)


def engine_with(
    memory: int = 1 << 20, *, max_num_seqs: int = 4, max_num_batched_tokens: int = 16, max_model_len: int = 64
) -> tuple[Engine, Rememberer, KVCache]:
    """8 tokens a page, two streams."""
    cache = KVCache(
        KVLayout(1, 1, 128, torch.float32, max_num_seqs, max_model_len), memory=memory, page_size=4096, poison=True
    )
    runner = Rememberer(cache, max_num_batched_tokens)
    engine = Engine(
        runner,  # type: ignore[arg-type]
        cache,
        vocab_size=VOCABULARY,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
    )
    runner.engine = engine
    return engine, runner, cache


def finish(engine: Engine, limit: int = 5_000) -> None:
    for _ in range(limit):
        if not engine.unfinished:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def nothing_is_left(engine: Engine, cache: KVCache) -> None:
    assert not engine.unfinished
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert cache.stats().live_slots == 0
    assert cache.stats().needed == 0
    cache.trim()
    assert cache.stats().created == 0


def count_forks(cache: KVCache, runner: Rememberer) -> list[int]:
    """Lets the stub know what a fork copies. Returns the list that fork targets are put in."""
    fork, made = cache.fork, []

    def watched(slot: Any) -> int | None:
        target = fork(slot)
        if target is not None:
            made.append(target)
            runner.slots[target] = list(runner.slots[slot])
        return target

    cache.fork = watched  # type: ignore[method-assign]
    return made
