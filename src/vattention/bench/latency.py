"""`vattention bench latency`: one request at a time, ours and other engines in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from vattention.bench.conditions import differences
from vattention.bench.contest import OURS, ContestOptions, contest, tell
from vattention.bench.machine import check_writable, settings_of, write_json
from vattention.bench.ratios import percentile, ratio, spread
from vattention.bench.side import Side
from vattention.bench.table import table
from vattention.bench.workload import Case, fixed
from vattention.errors import ConfigError, EngineError

_P99 = 0.99


@dataclass(frozen=True)
class LatencyBench:
    """The options of the command.

    Attributes:
        requests: one after the other, in each round of each side.
    """

    requests: int = 4
    prompt_tokens: int = 512
    output_tokens: int = 64
    rounds: int = 3
    seed: int = 0
    contest: ContestOptions = field(default_factory=ContestOptions)
    json: str | None = None
    command: str = ""


@dataclass(frozen=True)
class Timing:
    """One request: seconds to its first token, and from each token to the next."""

    first: float
    gaps: tuple[float, ...]

    @property
    def each(self) -> float:
        """The mean time of a token after the first, in seconds."""
        return sum(self.gaps) / len(self.gaps)


def timing(times: Sequence[float]) -> Timing:
    """Of one request, from when its tokens came, at least two of them."""
    return Timing(times[0], tuple(b - a for a, b in pairwise(times)))


def run(options: LatencyBench) -> int:
    """Measure, and print a table with the ratios last.

    Returns:
        The exit code: 1 if conditions differ.

    Raises:
        ConfigError: options that cannot work. EngineError: a side that failed.
    """
    check_writable(options.json)
    if options.rounds < 1 or options.output_tokens < 2:
        raise ConfigError("rounds must be at least 1 and output tokens at least 2")
    case = fixed([options.requests], [options.prompt_tokens], options.output_tokens)[0]
    with contest(options.contest, case.longest) as sides:

        def work(side: Side, label: str) -> list[Timing]:
            return [_one(side, prompt, case) for prompt in case.prompts(sides.vocab_size, f"{options.seed} {label}")]

        sides.warm_up(lambda side: work(side, "warm-up"))
        found: dict[str, list[list[Timing]]] = {name: [] for name in sides.names}
        for number in range(options.rounds):
            label = f"round {number}"
            for name, timings in sides.round(number, lambda side, label=label: work(side, label)).items():  # type: ignore[misc]
                found[name].append(timings)
            tell(f"round {number + 1} of {options.rounds} done")
        print(sides.report())
        one = f"one request at a time, {options.prompt_tokens} tokens in, {options.output_tokens} out"
        print(f"\n{one}, {options.contest.dtype}; {options.requests} requests in each of {options.rounds} rounds")
        print(_table(found))
        failures = [f"different conditions: {words}" for words in differences(sides.conditions)]
        for failure in failures:
            print(f"FAIL: {failure}")
        write_json(
            options.json,
            options.command,
            {
                "settings": settings_of(options),
                "conditions": sides.record(),
                "failures": failures,
                "ratios": {
                    name: {metric: asdict(found_) for metric, found_ in each.items()}
                    for name, each in ratios_of(found).items()
                },
                "rounds": {name: [[asdict(t) for t in each] for each in rounds] for name, rounds in found.items()},
            },
        )
    return 1 if failures else 0


def _one(side: Side, prompt: list[int], case: Case) -> Timing:
    wanted = case.requests[0].output
    times = side.ask(do="stream", prompt=prompt, output=wanted)["times"]
    if len(times) != wanted:
        raise EngineError(f"{side.name} made {len(times)} tokens of {wanted}: no fair comparison")
    return timing(times)


def ratios_of(found: Mapping[str, Sequence[Sequence[Timing]]]) -> dict[str, dict[str, Any]]:
    """For each peer how many times as fast we are, of medians within each round."""

    def medians(name: str, part: str) -> list[float]:
        return [spread([getattr(timing_, part) for timing_ in timings]).median for timings in found[name]]

    return {
        peer: {
            part: ratio(medians(OURS, part), medians(peer, part), faster_is_more=False) for part in ("first", "each")
        }
        for peer in found
        if peer != OURS
    }


def _table(found: Mapping[str, Sequence[Sequence[Timing]]]) -> str:
    ratios = ratios_of(found)
    all_of = {name: [timing_ for timings in rounds for timing_ in timings] for name, rounds in found.items()}
    firsts = {name: [timing_.first * 1e3 for timing_ in each] for name, each in all_of.items()}
    means = {name: [timing_.each * 1e3 for timing_ in each] for name, each in all_of.items()}
    gaps = {name: [gap * 1e3 for timing_ in each for gap in timing_.gaps] for name, each in all_of.items()}
    blank = [""] * len(ratios)
    body = [
        ("time to first token, median", *(spread(each).show() for each in firsts.values()), *_shown(ratios, "first")),
        ("time to first token, p99", *(f"{percentile(each, _P99):.1f}" for each in firsts.values()), *blank),
        ("time per output token, median", *(spread(each).show(2) for each in means.values()), *_shown(ratios, "each")),
        ("from token to token, p99", *(f"{percentile(each, _P99):.2f}" for each in gaps.values()), *blank),
    ]
    return table(("ms", *found, *(f"times as fast as {peer}" for peer in ratios)), body)


def _shown(ratios: Mapping[str, Mapping[str, Any]], part: str) -> list[str]:
    return [each[part].show(2) for each in ratios.values()]
