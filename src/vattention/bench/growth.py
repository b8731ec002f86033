"""`vattention bench growth`: what mapping pages while decoding costs, against pages that are there already.

Both sides run the real engine on the same requests, in rounds that alternate, in one process. *On demand*: every page of
a round is created and mapped as tokens arrive, in the background (paper section 6.1.1). *Pre-mapped*: before decoding
starts, the cache is stepped to the final length and rolled back, which leaves the pages mapped, so that decoding makes no
driver call at all.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vattention.bench.machine import check_writable, write_json
from vattention.bench.prompts import make_prompts
from vattention.bench.setup import EngineOptions, open_cache, open_engine
from vattention.bench.table import table
from vattention.cache import KVCache
from vattention.engine.engine import Engine
from vattention.engine.loading import load_model
from vattention.engine.runner import Runner
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import ConfigError
from vattention.memory.sizes import format_size

_OTHER_STEPS = 3  # of a request's tokens: prefill, the first decode, and the last, in which slots are given back


@dataclass(frozen=True)
class GrowthBench:
    """The options of the command.

    Attributes:
        requests: that decode together; each has a slot.
        rounds: of each side.
        max_overhead: share of the pre-mapped decode time that growth may cost before the check fails.
    """

    model: str | None = None
    dtype: str = "auto"
    requests: int = 8
    prompt_tokens: int = 128
    output_tokens: int = 128
    rounds: int = 5
    seed: int = 0
    max_overhead: float = 0.02
    engine: EngineOptions = EngineOptions()
    json: str | None = None
    command: str = ""


@dataclass(frozen=True)
class Round:
    """One round of one side: seconds of each decode step, driver calls meanwhile by thread, and bytes mapped by them."""

    seconds: tuple[float, ...]
    calls_here: int
    calls_elsewhere: int
    grown: int


def run(options: GrowthBench) -> int:
    """Decode, print both sides. Returns the exit code: 1 if the engine's thread made a driver call, or growth costs more
    than `max_overhead`.

    Raises:
        ConfigError: options that cannot be run, or under which nothing grows.
    """
    check_writable(options.json)
    _check(options)
    tokens = options.prompt_tokens + options.output_tokens
    loaded = load_model(options.model, dtype=options.dtype, max_model_len=options.engine.max_model_len)
    # Slots for these requests alone, so that no idle one is mapped ahead; prompts in one pass, so that all start at once.
    engine_options = replace(
        options.engine,
        max_num_seqs=options.requests,
        max_num_batched_tokens=max(options.engine.max_num_batched_tokens, options.requests * options.prompt_tokens),
    )
    prompts = make_prompts(
        [options.prompt_tokens] * options.requests, loaded.geometry.vocab_size, loaded.tokenizer, seed=options.seed
    )
    demand: list[Round] = []
    premapped: list[Round] = []
    with open_cache(loaded, engine_options) as cache:
        slots = dict.fromkeys(range(options.requests), tokens)
        if tokens > cache.layout.max_model_len or cache.capacity() < tokens or not _all_fit(cache, slots):
            raise ConfigError(f"{options.requests} requests of {tokens} tokens do not fit: fewer, or a larger budget")
        engine = open_engine(loaded, cache, Runner(loaded.model, cache), engine_options)
        print(
            f"{loaded.name}, {str(loaded.dtype).removeprefix('torch.')}: {options.requests} requests,"
            f" {options.prompt_tokens} tokens in, {options.output_tokens} out,"
            f" {format_size(cache.pool.page_size)} pages, {options.rounds} rounds a side",
            flush=True,
        )
        ids = [prompt.token_ids for prompt in prompts]
        _decode(engine, cache, ids, replace_tokens(options, min(options.output_tokens, 8)), ahead=False)  # warm-up
        for number in range(options.rounds):
            for ahead in (False, True) if number % 2 else (True, False):
                (premapped if ahead else demand).append(_decode(engine, cache, ids, options, ahead=ahead))
        page_size = cache.pool.page_size
    return _report(options, demand, premapped, page_size, loaded.name)
