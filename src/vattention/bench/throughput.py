"""`vattention bench throughput`: all requests at once, ours and other engines in turns.

A round of a case is two runs on each side: the prompts with one token of output each, which is prefill, and the whole.
Decoding is what the second takes longer than the first. No two runs share a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from vattention.bench.conditions import differences
from vattention.bench.contest import OURS, Contest, ContestOptions, contest, run_case, tell
from vattention.bench.machine import check_writable, settings_of, write_json
from vattention.bench.ratios import Spread, ratio, spread
from vattention.bench.side import Side
from vattention.bench.table import table
from vattention.bench.workload import Case, fixed, sampled
from vattention.errors import ConfigError

METRICS = ("prefill", "decode", "output")
"""Tokens per second: of prompts until their first tokens; of outputs after those; of outputs, over all."""


@dataclass(frozen=True)
class ThroughputBench:
    """The options of the command.

    Attributes:
        requests, prompt_tokens: a case for each combination; of a trace, the first number alone.
        longest: what the requests of a trace are fitted to.
        shared_prefix: tokens that all prompts of a case have in common.
        rounds: of each side.
        at_least: "METRIC" or "PEER.METRIC" -> the smallest ratio that passes.
        contest: the sides.
    """

    requests: Sequence[int] = (8,)
    prompt_tokens: Sequence[int] = (512,)
    output_tokens: int = 64
    trace: str | None = None
    longest: int = 2048
    shared_prefix: int = 0
    rounds: int = 3
    seed: int = 0
    at_least: Mapping[str, float] = field(default_factory=dict)
    contest: ContestOptions = field(default_factory=ContestOptions)
    json: str | None = None
    plot: str | None = None
    command: str = ""


@dataclass(frozen=True)
class Run:
    """One round of one side, in seconds: all prompts up to their first tokens, and everything."""

    prefill: float
    total: float

    def rates(self, case: Case) -> dict[str, float]:
        """Tokens per second; "decode" only where there is some."""
        rates = {"prefill": case.prompt_tokens / self.prefill, "output": case.output_tokens / self.total}
        later = case.output_tokens - len(case.requests)
        if later and self.total > self.prefill:
            rates["decode"] = later / (self.total - self.prefill)
        return rates


def run(options: ThroughputBench) -> int:
    """Measure, and print a table with the ratios last.

    Returns:
        The exit code: 1 if conditions differ, or a ratio is below `at_least`.

    Raises:
        ConfigError: options that cannot work. EngineError: a side that failed.
    """
    check_writable(options.json)
    if options.plot is not None:
        from vattention.bench.plot import check_plotting

        check_plotting()
        check_writable(options.plot)
    if options.rounds < 1:
        raise ConfigError("rounds must be at least 1")
    _check_bars(options)
    cases = _cases(options)
    with contest(options.contest, max(case.longest for case in cases)) as sides:
        runs = _measure(options, cases, sides)
        return _report(options, cases, sides, runs)


def _check_bars(options: ThroughputBench) -> None:
    for bar in options.at_least:
        peer, _, metric = bar.rpartition(".")
        if metric not in METRICS or peer not in ("", *options.contest.peers):
            raise ConfigError(f"--at-least {bar}: METRIC=X or PEER.METRIC=X, of {', '.join(METRICS)}")
    if options.at_least and not options.contest.peers:
        raise ConfigError("--at-least is about ratios: name a --peer")


def _cases(options: ThroughputBench) -> list[Case]:
    if options.trace is None:
        return fixed(options.requests, options.prompt_tokens, options.output_tokens, shared=options.shared_prefix)
    count, seed, shared = options.requests[0], options.seed, options.shared_prefix
    return [sampled(options.trace, count, options.longest, seed=seed, shared=shared)]


def _measure(options: ThroughputBench, cases: Sequence[Case], sides: Contest) -> list[dict[str, list[Run]]]:
    """For each case and side its rounds."""

    def run_of(side: Side, case: Case, label: str) -> Run:
        first, whole = (case.prompts(sides.vocab_size, f"{options.seed} {label} {run}") for run in range(2))
        return Run(run_case(side, case, first, [1] * len(first)), run_case(side, case, whole))

    sides.warm_up(lambda side: [run_of(side, case, "warm-up") for case in cases])
    runs: list[dict[str, list[Run]]] = [{name: [] for name in sides.names} for _ in cases]
    for number in range(options.rounds):
        for case, rounds in zip(cases, runs, strict=True):
            label = f"round {number}"
            results = sides.round(number, lambda side, case=case, label=label: run_of(side, case, label))  # type: ignore[misc]
            for name, result in results.items():
                rounds[name].append(result)
            seconds = ", ".join(
                f"{name} {result.prefill:.2f} + {result.total:.2f} s" for name, result in results.items()
            )
            tell(f"round {number + 1} of {options.rounds}, {case.name}: {seconds}")
    return runs


# -- the report -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One metric of one case: a value a side, and for each peer how many times as fast we are."""

    case: str
    metric: str
    values: dict[str, Spread]
    ratios: dict[str, Spread]


def lines_of(case: Case, rounds: Mapping[str, Sequence[Run]]) -> list[Line]:
    """The metrics of a case; without "decode" where a round has none."""
    rates = {name: [run.rates(case) for run in runs] for name, runs in rounds.items()}
    lines = []
    for metric in METRICS:
        if all(metric in found for each in rates.values() for found in each):
            values = {name: [found[metric] for found in each] for name, each in rates.items()}
            lines.append(
                Line(
                    case.name,
                    metric,
                    {name: spread(each) for name, each in values.items()},
                    {name: ratio(values[OURS], each) for name, each in values.items() if name != OURS},
                )
            )
    return lines


def failures_of(lines: Sequence[Line], at_least: Mapping[str, float]) -> list[str]:
    """In words, every ratio that is less than asked for."""
    return [
        f"{line.case}: {line.metric} is {found.median:.2f} x {peer}, less than {bar:g}"
        for line in lines
        for peer, found in line.ratios.items()
        for name, bar in at_least.items()
        if name in (line.metric, f"{peer}.{line.metric}") and found.median < bar
    ]


def _report(
    options: ThroughputBench, cases: Sequence[Case], sides: Contest, runs: Sequence[dict[str, list[Run]]]
) -> int:
    lines = [line for case, rounds in zip(cases, runs, strict=True) for line in lines_of(case, rounds)]
    peers = sides.names[1:]
    header = ("requests x in/out", "tokens/s", *sides.names, *(f"ratio to {peer}" for peer in peers))
    body = [
        (
            line.case,
            line.metric,
            *(line.values[name].show() for name in sides.names),
            *(line.ratios[peer].show(2) for peer in peers),
        )
        for line in lines
    ]
    print(sides.report())
    print(f"\nmedian (lowest .. highest) of {options.rounds} rounds, {options.contest.dtype}")
    print(table(header, body, left=2))
    failures = [f"different conditions: {words}" for words in differences(sides.conditions)]
    failures += failures_of(lines, options.at_least)
    for failure in failures:
        print(f"FAIL: {failure}")
    if options.at_least and not failures:
        print("PASS: " + ", ".join(f"{name} at least {bar:g}" for name, bar in options.at_least.items()))
    write_json(
        options.json,
        options.command,
        {
            "settings": settings_of(options),
            "conditions": sides.record(),
            "failures": failures,
            "lines": [asdict(line) for line in lines],
            "rounds": [
                {
                    "case": case.name,
                    "requests": [tuple(request) for request in case.requests],
                    "sides": {name: [asdict(run) for run in each] for name, each in rounds.items()},
                }
                for case, rounds in zip(cases, runs, strict=True)
            ],
        },
    )
    if options.plot is not None:
        from vattention.bench.plot_sides import plot_sides

        plot_sides(options.plot, lines, sides.names, title=f"tokens per second, {options.contest.dtype}")
    return 1 if failures else 0
