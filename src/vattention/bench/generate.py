"""`vattention bench generate`: decoding under transformers' own generate(), by cache and by attention function.

Four sides: `DynamicCache` and `VirtualCache`, each under `attn_implementation="sdpa"` and `"vattention"`. All decode
a few tokens behind the same context, in rounds that alternate, in one process, so that what the machine does meanwhile
meets all of them. The context is written straight into the caches: what it says does not change the time.

With `--memory` nothing is timed: the bytes that caches hold are counted, and the bytes that a token moves.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from vattention.attention import register
from vattention.bench.generate_memory import count
from vattention.bench.machine import check_writable, settings_of, write_json
from vattention.bench.table import table
from vattention.engine.loading import load_model
from vattention.errors import ConfigError
from vattention.integrations import VirtualCache

_CACHES = {"DynamicCache": lambda config: DynamicCache(config=config), "VirtualCache": VirtualCache}
_ATTENTION = ("sdpa", "vattention")
_BASE = ("DynamicCache", "sdpa")


@dataclass(frozen=True)
class GenerateBench:
    """The options of the command.

    Attributes:
        contexts: tokens before the ones that are decoded.
        tokens: decoded in each round of each side.
        min_cache, min_both: how many times as fast as `DynamicCache` with sdpa the cache alone, and cache and attention
            together, must be for the check to pass.
        memory: count bytes instead of timing.
    """

    model: str | None = None
    dtype: str = "bfloat16"
    device: str = "auto"
    trust_remote_code: bool = False
    batch: int = 4
    contexts: tuple[int, ...] = (2000, 8000)
    tokens: int = 8
    rounds: int = 5
    min_cache: float = 1.0
    min_both: float = 2.0
    memory: bool = False
    json: str | None = None
    command: str = ""


Side = tuple[str, str]
"""A cache and an attention function."""

Times = dict[str, list[float]]
"""Of each round, seconds a token: `"wall"`, and `"processor"`, of all threads, which other processes disturb less."""


def run(options: GenerateBench) -> int:
    """Measure, and print every side.

    Returns:
        The exit code: 1 if a bar is missed.

    Raises:
        ConfigError: options that cannot be run.
    """
    check_writable(options.json)
    if min(options.batch, options.tokens, options.rounds, *options.contexts) < 1:
        raise ConfigError("batch, tokens, rounds and contexts: at least 1")
    if options.device not in ("auto", "cpu"):
        raise ConfigError(f"--device {options.device}: this measurement is for CPUs")
    loaded = load_model(options.model, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
    dtype = str(loaded.dtype).removeprefix("torch.")
    if options.memory:
        print(f"{loaded.name}, {dtype}: bytes, counted")
        result = count(loaded.model.config, loaded.dtype)
        print(table(("", "held", "reference", "ratio", "at most"), [bar.row() for bar in result]))
        failures = [bar.name for bar in result if not bar.passed]
        rows: Any = [asdict(bar) for bar in result]
    else:
        print(f"{loaded.name}, {dtype}: {options.batch} rows, {options.tokens} tokens a round, {options.rounds} rounds")
        register()
        rows = {context: _measure(loaded.model, options, context) for context in options.contexts}
        failures = _report(rows, options)
    print("FAIL: " + "; ".join(failures) if failures else "PASS")
    write_json(
        options.json,
        options.command,
        {
            "settings": {**settings_of(options), "model": loaded.name},
            "passed": not failures,
            "failures": failures,
            "result": rows,
        },
    )
    return 1 if failures else 0


def _measure(model: Any, options: GenerateBench, context: int) -> dict[str, Times]:
    """What each side took."""
    seconds: dict[Side, Times] = {
        (cache, how): {"wall": [], "processor": []} for how in _ATTENTION for cache in _CACHES
    }
    caches = {name: make(model.config) for name, make in _CACHES.items()}
    try:
        for cache in caches.values():
            fill(cache, model.config, options.batch, context, model.dtype)
        ids = torch.ones(options.batch, context + 1, dtype=torch.int64)  # of which generate() computes the last alone
        for number in range(-1, options.rounds):  # one more, to warm up
            sides = list(seconds) if number % 2 else list(seconds)[::-1]
            for name, how in sides:
                with attention(model, how):
                    start, used = time.perf_counter(), time.process_time()
                    model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        past_key_values=caches[name],
                        max_new_tokens=options.tokens,
                        do_sample=False,
                        eos_token_id=None,
                        pad_token_id=0,
                    )
                    spent = {"wall": time.perf_counter() - start, "processor": time.process_time() - used}
                caches[name].crop(context - caches[name].get_seq_length())
                if number >= 0:
                    for clock, value in spent.items():
                        seconds[name, how][clock].append(value / options.tokens)
    finally:
        caches["VirtualCache"].close()
    return {" + ".join(side): times for side, times in seconds.items()}


def fill(cache: Any, config: Any, batch: int, tokens: int, dtype: torch.dtype) -> None:
    """Put `tokens` tokens into every layer of `cache`. Raises ConfigError for models whose layers are not all alike."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if any(type(layer).__name__ not in ("DynamicLayer", "VirtualLayer") for layer in cache.layers):
        raise ConfigError("this measurement needs a model whose layers all have full attention")
    for layer in range(len(cache.layers)):
        cache.update(*(torch.randn(batch, heads, tokens, width).to(dtype) for _ in "kv"), layer)


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """`model` with another attention function."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _report(result: dict[int, dict[str, Times]], options: GenerateBench) -> list[str]:
    failures = []
    base, alone, both = " + ".join(_BASE), "VirtualCache + sdpa", "VirtualCache + vattention"
    rows = []
    for context, sides in result.items():
        for side, times in sides.items():
            wall, processor = (_speed(sides[base][clock], times[clock]) for clock in ("wall", "processor"))
            median = statistics.median(times["wall"])
            rows.append((context, side, f"{median * 1e3:.1f}", f"{wall:.2f}", f"{processor:.2f}"))
            least = {alone: options.min_cache, both: options.min_both}.get(side, 0)
            if wall < least:
                failures.append(f"at {context} tokens {side} is {wall:.2f} times as fast, not {least}")
    print(table(("context", "side", "ms a token", "times as fast", "in processor time"), rows, left=2))
    return failures


def _speed(base: list[float], times: list[float]) -> float:
    """Rounds are compared one by one: what slows the machine down slows down all sides of a round."""
    return statistics.median(one / two for one, two in zip(base, times, strict=True))
