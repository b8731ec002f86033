"""Requests through an engine, with the seconds of each step and of each request."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vattention.bench.gpu.report import Setting
from vattention.bench.setup import step
from vattention.bench.trace import Lengths, draw_requests, load_trace, scaled
from vattention.cache import Cache, PagedKVCache
from vattention.engine.loading import LoadedModel
from vattention.engine.request import Request
from vattention.engine.sampling_params import SamplingParams
from vattention.llm import LLM


@dataclass(frozen=True)
class Sizes:
    """What the engine is asked to do.

    Attributes:
        shape: one of `model.SHAPES`.
        batches: requests that decode together, where steps are looked at.
        prompt, output: tokens of each of these.
        longest: max_model_len.
        memory: for K and V, the same for every engine.
        requests: of the long-context workload; means: tokens of their prompts and answers, if there is no trace.
        rows: max_num_batched_tokens.
    """

    shape: str
    batches: tuple[int, ...]
    prompt: int
    output: int
    longest: int
    memory: int
    requests: int
    means: tuple[int, int]
    rows: int


def sizes(setting: Setting, weights: int) -> Sizes:
    """What fits: on a device, K and V get three quarters of what the weights leave."""
    if setting.tiny:
        return Sizes("tiny", (1, 3), 24, 12, 128, 8 << 20, 4, (40, 6), 64)
    memory = 16 << 30
    if setting.device.type == "cuda":
        _, total = torch.cuda.mem_get_info(setting.device)
        memory = int((total - weights) * 0.75) >> 30 << 30
    return Sizes("Llama-3-8B", (1, 32), 4096, 256, 65536, memory, 40, (24_000, 256), 4096)


def workload(setting: Setting, wanted: Sizes, *, trace: Sequence[Lengths] | None = None) -> list[Lengths]:
    """Requests of the trace, or drawn; those that are longer than fits are scaled down, all by one factor."""
    if trace is None:
        if setting.trace is not None:
            trace = load_trace(setting.trace, limit=wanted.requests)
        else:
            trace = draw_requests(wanted.requests, *wanted.means, seed=setting.seed)
    most = max(request.stored for request in trace)
    if most >= wanted.longest:
        trace = scaled(trace, (wanted.longest - 2) / (most + 2))
    return list(trace)


def prompts(setting: Setting, lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    """Random tokens, the same for a seed."""
    source = random.Random(setting.seed)
    return [[source.randrange(vocabulary) for _ in range(length)] for length in lengths]


@contextmanager
def engine(model: LoadedModel, wanted: Sizes, **options: Any) -> Iterator[LLM]:
    """An `LLM` that is warm; what it took is free again afterwards."""
    llm = LLM(
        model,
        max_model_len=wanted.longest,
        max_num_seqs=max(wanted.batches),
        kv_cache_memory=wanted.memory,
        max_num_batched_tokens=max(wanted.rows, max(wanted.batches)),
        **options,
    )
    try:
        llm.warmup()
        yield llm
    finally:
        llm.close()
        del llm
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Steps:
    """Decode steps: seconds of each, and the driver calls meanwhile, of this thread and of others."""

    seconds: list[float]
    calls_here: int
    calls_elsewhere: int


def decode_steps(llm: LLM, tokens: Sequence[Sequence[int]], outputs: int, *, ahead: bool = False) -> Steps:
    """Each decode step but the first and the last; every request gets `outputs` tokens.

    A step ends with the tokens on the host, so the clock of the process is the right one.

    Args:
        ahead: have the pages of all tokens mapped before decoding starts.
    """
    inner, cache = llm.engine, llm.engine._cache
    params = SamplingParams(temperature=0, max_tokens=outputs, ignore_eos=True, detokenize=False)
    requests = [inner.add_request(prompt, params) for prompt in tokens]
    try:
        while not all(request.output_token_ids for request in requests):
            step(inner)
        if ahead:
            lengths = {request.slot: request.computed for request in requests if request.slot is not None}
            left = {request.slot: outputs - len(request.output_token_ids) for request in requests}
            cache.step({slot: length + left[slot] for slot, length in lengths.items()})
            cache.step(lengths)  # a rollback: the pages stay
        step(inner)
        cache.wait()
        seconds, before = [], _calls(cache)
        while all(len(request.output_token_ids) < outputs - 1 for request in requests):
            start = time.perf_counter()
            step(inner)
            seconds.append(time.perf_counter() - start)
        cache.wait()
        after = _calls(cache)
        while inner.unfinished:
            step(inner)
        return Steps(seconds, after[0] - before[0], after[1] - before[1])
    finally:
        for request in requests:
            inner.abort(request.request_id)


def _calls(cache: Cache) -> tuple[int, int]:
    """Driver calls made so far by this thread, which is the engine's, and by all others."""
    if isinstance(cache, PagedKVCache):
        return 0, 0
    by_thread = cache.pool.meter.calls_by_thread
    here = by_thread[threading.get_ident()]
    return here, sum(by_thread.values()) - here


@dataclass(frozen=True)
class Served:
    """What came of a workload that was there at once.

    Attributes:
        seconds: in all. latencies: of each request, from the beginning. preempted: requests computed again.
        done: requests that had ended when time was up; of these are the latencies.
    """

    seconds: float
    latencies: list[float]
    done: int
    requests: int

    @property
    def per_minute(self) -> float:
        """Requests that ended."""
        return 60 * self.done / self.seconds


def serve(llm: LLM, tokens: Sequence[Sequence[int]], outputs: Sequence[int], *, seconds: float) -> Served:
    """All requests at once, first come first served, until they have ended or the time is up."""
    inner = llm.engine
    start = time.perf_counter()
    requests: list[Request] = []
    try:
        for prompt, output in zip(tokens, outputs, strict=True):
            params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
            requests.append(inner.add_request(prompt, params))
        latencies: dict[str, float] = {}
        while inner.unfinished and time.perf_counter() - start < seconds:
            for request in step(inner):
                if request.finished:
                    latencies[request.request_id] = time.perf_counter() - start
        return Served(time.perf_counter() - start, sorted(latencies.values()), len(latencies), len(requests))
    finally:
        for request in requests:
            inner.abort(request.request_id)
