"""`vattention bench growth`: what mapping pages while decoding costs, against pages that are there already.

Both sides run the real engine on the same requests, in rounds that alternate, in one process. *On demand*: every page
of a round is created and mapped as tokens arrive, in the background (paper section 6.1.1). *Pre-mapped*: before
decoding starts, the cache is stepped to the final length and rolled back, which leaves the pages mapped, so that
decoding makes no driver call at all.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vattention.bench.machine import check_writable, settings_of, write_json
from vattention.bench.prompts import make_prompts
from vattention.bench.setup import EngineOptions, open_cache, open_engine, step
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
    trust_remote_code: bool = False
    requests: int = 8
    prompt_tokens: int = 128
    output_tokens: int = 128
    rounds: int = 7
    seed: int = 0
    max_overhead: float = 0.02
    engine: EngineOptions = field(default_factory=EngineOptions)
    json: str | None = None
    command: str = ""


@dataclass(frozen=True)
class Round:
    """One round of one side.

    Attributes:
        seconds: of each decode step.
        calls_here, calls_elsewhere: driver calls meanwhile, on the engine's thread and on others.
        grown: bytes created meanwhile.
        driver_seconds: in those calls.
    """

    seconds: tuple[float, ...]
    calls_here: int
    calls_elsewhere: int
    grown: int
    driver_seconds: float


def run(options: GrowthBench) -> int:
    """Decode, and print both sides.

    Returns:
        The exit code: 1 if the engine's thread made a driver call, or growth costs more than `max_overhead`.

    Raises:
        ConfigError: options that cannot be run, or under which nothing grows.
    """
    check_writable(options.json)
    if min(options.requests, options.prompt_tokens, options.rounds) < 1 or options.output_tokens <= _OTHER_STEPS:
        raise ConfigError(f"requests, prompt tokens and rounds: at least 1; output tokens: more than {_OTHER_STEPS}")
    loaded = load_model(
        options.model,
        dtype=options.dtype,
        device=options.engine.place,
        max_model_len=options.engine.max_model_len,
        trust_remote_code=options.trust_remote_code,
    )
    # No slot for others, so that no idle one is mapped ahead; all prompts in one pass, so that all decode together.
    engine_options = replace(
        options.engine,
        max_num_seqs=options.requests,
        max_num_batched_tokens=options.requests * options.prompt_tokens,
    )
    lengths = [options.prompt_tokens] * options.requests
    prompts = [
        prompt.token_ids
        for prompt in make_prompts(lengths, loaded.geometry.vocab_size, loaded.tokenizer, seed=options.seed)
    ]
    demand: list[Round] = []
    premapped: list[Round] = []
    with open_cache(loaded, engine_options) as cache:
        tokens = options.prompt_tokens + options.output_tokens
        if not cache.fits(new=[tokens] * options.requests):
            raise ConfigError(f"{options.requests} requests of {tokens} tokens do not fit: fewer, or a larger budget")
        engine = open_engine(loaded, cache, Runner(loaded.model, cache), engine_options)
        page = cache.pool.page_size
        print(
            f"{loaded.name}, {str(loaded.dtype).removeprefix('torch.')}: {options.requests} requests together,"
            f" {options.prompt_tokens} tokens in, {options.output_tokens} out, {format_size(page)} pages,"
            f" {options.rounds} rounds a side",
            flush=True,
        )
        _decode(engine, cache, prompts, _OTHER_STEPS + 5, ahead=False)  # warm-up
        for number in range(options.rounds):
            for ahead in (True, False) if number % 2 else (False, True):
                result = _decode(engine, cache, prompts, options.output_tokens, ahead=ahead)
                (premapped if ahead else demand).append(result)
    if not sum(round_.grown for round_ in demand):
        raise ConfigError("no page was needed while decoding: more --output-tokens, or a smaller --page-size")
    return _report(options, demand, premapped, page, loaded.name)


def _decode(engine: Engine, cache: KVCache, prompts: Sequence[Sequence[int]], outputs: int, *, ahead: bool) -> Round:
    """One round: all prompts, `outputs` tokens each; the decode steps but the first and the last are timed.

    Args:
        ahead: have the pages of all tokens mapped before decoding starts.
    """
    cache.trim()  # nothing is left mapped or created by the round before
    params = SamplingParams(temperature=0, max_tokens=outputs, ignore_eos=True)
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    while not all(request.output_token_ids for request in requests):
        step(engine)
    if ahead:
        lengths = {request.slot: request.computed for request in requests if request.slot is not None}
        cache.step({slot: length + outputs for slot, length in lengths.items()})
        cache.step(lengths)  # a rollback: the pages stay
    step(engine)
    cache.wait()
    before, stats = _calls(cache), cache.stats()
    seconds = []
    for _ in range(outputs - _OTHER_STEPS):
        start = time.perf_counter()
        step(engine)
        seconds.append(time.perf_counter() - start)
    cache.wait()
    after, then = _calls(cache), cache.stats()
    while engine.unfinished:
        step(engine)
    return Round(
        tuple(seconds),
        after[0] - before[0],
        after[1] - before[1],
        then.created - stats.created,
        then.driver_seconds - stats.driver_seconds,
    )


def _calls(cache: KVCache) -> tuple[int, int]:
    """Driver calls made so far by this thread, which is the engine's, and by all others."""
    by_thread = cache.pool.meter.calls_by_thread
    here = by_thread[threading.get_ident()]
    return here, sum(by_thread.values()) - here


# -- the report -----------------------------------------------------------------------------------------------------


def typical_steps(rounds: Sequence[Round]) -> list[float]:
    """Seconds of each decode step, the median over rounds.

    Pages are needed at the same steps in every round, so this keeps what growth costs and loses what the machine did
    meanwhile.
    """
    return [statistics.median(times) for times in zip(*(round_.seconds for round_ in rounds), strict=True)]


def _report(options: GrowthBench, demand: list[Round], premapped: list[Round], page: int, model: str) -> int:
    sides = {"on demand": demand, "pre-mapped": premapped}
    typical = {name: typical_steps(rounds) for name, rounds in sides.items()}
    ratio = sum(typical["on demand"]) / sum(typical["pre-mapped"])
    noise = _noise(premapped)
    here = sum(round_.calls_here for round_ in (*demand, *premapped))
    stray = sum(round_.calls_elsewhere for round_ in premapped)
    print(_table(sides, typical))
    if noise is not None:
        print(f"pre-mapped rounds, odd over even: {noise:.4f} (what chance alone does to such a ratio)")
    failures = []
    if here:
        failures.append(f"the engine's thread made {here} driver calls between tokens")
    if stray:
        failures.append(f"{stray} driver calls were made though every page was mapped")
    if ratio > 1 + options.max_overhead:
        failures.append(f"growth costs more than {options.max_overhead:.1%} of decode time")
    verdict = "FAIL: " + "; ".join(failures) if failures else "PASS: no driver call on the engine's thread"
    print(f"{verdict}; decode time on demand over pre-mapped: {ratio:.4f}")
    write_json(
        options.json,
        options.command,
        {
            "settings": {**settings_of(options), "model": model, "page_size": page},
            "passed": not failures,
            "failures": failures,
            "ratio": ratio,
            "noise": noise,
            "rounds": {name: [asdict(round_) for round_ in rounds] for name, rounds in sides.items()},
        },
    )
    return 1 if failures else 0


def _noise(rounds: Sequence[Round]) -> float | None:
    """Odd rounds over even ones of the same side; None for a single round."""
    if len(rounds) < 2:
        return None
    return sum(typical_steps(rounds[1::2])) / sum(typical_steps(rounds[::2]))


def _table(sides: dict[str, list[Round]], typical: dict[str, list[float]]) -> str:
    def of_steps(value: Any) -> list[str]:
        return [f"{value(steps) * 1e3:.2f}" for steps in typical.values()]

    def of_rounds(value: Any) -> list[Any]:
        return [value(rounds) for rounds in sides.values()]

    rows: list[tuple[Any, ...]] = [
        ("mean step, ms", *of_steps(statistics.fmean)),
        ("median step, ms", *of_steps(statistics.median)),
        ("slowest step, ms", *of_steps(max)),
        ("fastest and slowest round, s", *of_rounds(_extremes)),
        ("driver calls, engine's thread", *of_rounds(lambda rounds: sum(round_.calls_here for round_ in rounds))),
        ("driver calls, background", *of_rounds(lambda rounds: sum(round_.calls_elsewhere for round_ in rounds))),
        ("driver time over decode time", *of_rounds(_driver_share)),
        ("created while decoding, a round", *of_rounds(lambda rounds: format_size(rounds[-1].grown))),
    ]
    return table(("", *sides), rows)


def _driver_share(rounds: Sequence[Round]) -> str:
    spent = sum(round_.driver_seconds for round_ in rounds)
    return f"{spent / sum(sum(round_.seconds) for round_ in rounds):.2%}"


def _extremes(rounds: Sequence[Round]) -> str:
    seconds = [sum(round_.seconds) for round_ in rounds]
    return f"{min(seconds):.2f} .. {max(seconds):.2f}"
