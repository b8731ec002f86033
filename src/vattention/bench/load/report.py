"""Figures of servers under load, as tables and for files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from vattention.bench.load.figures import RATES, STATISTICS, TIMES, Figures
from vattention.bench.ratios import Spread, ratio, spread
from vattention.bench.table import table
from vattention.bench.throughput import Line


class Phase(Protocol):
    """Rounds of every side with one kind of arrivals."""

    @property
    def name(self) -> str:
        """For the tables."""
        ...

    @property
    def rounds(self) -> dict[str, list[Figures]]:
        """By side, ours first."""
        ...


BARS = ("output_throughput", "p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms")
_COMPARED = ("output_throughput", "request_throughput", *(f"{s}_{t}_ms" for t in TIMES for s in ("p50", "p99")))


def label_of(name: str) -> str:
    """A figure in words."""
    if name in RATES:
        return RATES[name]
    which, time, _ = name.split("_")
    return f"{TIMES[time]}, {which}, ms"


def lines_of(phase: Phase) -> list[Line]:
    """Every figure that is compared: medians of the rounds, and how many times as good the first side is."""
    lines = []
    for name in _COMPARED:
        values = {side: [each.values.get(name) for each in rounds] for side, rounds in phase.rounds.items()}
        if any(value is None for each in values.values() for value in each):
            continue
        known = {side: [float(value or 0) for value in each] for side, each in values.items()}
        first, *peers = known
        if any(value <= 0 for each in known.values() for value in each):
            continue
        ratios = {peer: ratio(known[first], known[peer], faster_is_more=name in RATES) for peer in peers}
        lines.append(Line(phase.name, label_of(name), {side: spread(each) for side, each in known.items()}, ratios))
    return lines


def bars_of(phases: Sequence[Phase]) -> list[str]:
    """In words, every bar in which the first side is not better than another: in the median of the ratios."""
    failures = []
    for phase in phases:
        lines = {line.metric: line for line in lines_of(phase)}
        for bar in map(label_of, BARS):
            if bar not in lines:
                failures.append(f"{phase.name}: {bar}: not every round has it")
                continue
            for peer, found in lines[bar].ratios.items():
                if found.median <= 1:
                    failures.append(f"{phase.name}: {bar}: {found.median:.2f} times as good as {peer}")
    return failures


def print_phases(phases: Sequence[Phase], rounds: int) -> None:
    """Tables of every phase."""
    for phase in phases:
        print(f"\n{phase.name}; {'one round' if rounds == 1 else f'median (lowest .. highest) of {rounds} rounds'}")
        if len(phase.rounds) > 1:
            print(_compared(phase))
        else:
            for found in phase.rounds.values():
                print(_alone(found))
        for name, each in phase.rounds.items():
            short, long = min(f.prompt_range[0] for f in each), max(f.prompt_range[1] for f in each)
            prompts = f"{short}" if short == long else f"{short} to {long}"
            failed = sum(sum(f.failures.values()) for f in each)
            print(
                f"{name}: {sum(f.completed for f in each)} answers, {failed} failures; prompts of {prompts} tokens, "
                f"{sum(f.output_tokens for f in each)} tokens of output, as it counts them"
            )


def _compared(phase: Phase) -> str:
    peers = list(phase.rounds)[1:]
    header = ("", *phase.rounds, *(f"times as good as {peer}" for peer in peers))
    rows = [
        (
            line.metric,
            *(_show(line.values[name]) for name in phase.rounds),
            *(line.ratios[peer].show(2) for peer in peers),
        )
        for line in lines_of(phase)
    ]
    return table(header, rows)


def _alone(rounds: Sequence[Figures]) -> str:
    """One server: rates, then its times by statistics."""

    def median(name: str) -> str:
        values = [each.values[name] for each in rounds if name in each.values]
        return f"{spread(values).median:.1f}" if values else "-"

    rates = [(label, _show(spread([each.values[name] for each in rounds]))) for name, label in RATES.items()]
    times = [(f"{label}, ms", *(median(f"{s}_{name}_ms") for s in STATISTICS)) for name, label in TIMES.items()]
    return f"{table(('', 'rate'), rates)}\n\n{table(('', *STATISTICS), times)}"


def _show(value: Spread) -> str:
    return value.show(1 if value.median >= 10 else 2)


def record_of(phase: Phase) -> dict[str, Any]:
    """For a file."""
    return {
        "name": phase.name,
        "figures": [asdict(line) for line in lines_of(phase)],
        "rounds": {name: [asdict(each) for each in rounds] for name, rounds in phase.rounds.items()},
    }
