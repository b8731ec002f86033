"""Attention over slots and over blocks: prompts of 1K to 192K tokens, decodes at 16K (the paper, sections 3 and 7)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

from vattention.bench.gpu.clock import Clock, Deadline
from vattention.bench.gpu.report import Panel, Report, Setting, left_out
from vattention.bench.gpu.sides import Case, Compute, Sides, data, ready, sides
from vattention.bench.table import table
from vattention.errors import VAttentionError

_SHAPES = {"Yi-6B": (32, 4, 128), "Llama-3-8B": (32, 8, 128)}
_PROMPTS = tuple(tokens << 10 for tokens in (1, 4, 16, 32, 64, 128, 192))
_BATCHES = (1, 2, 4, 8, 16, 32)
_CONTEXT = 16 << 10
_ROTATED = 512 << 20  # bytes of K and V that decodes go through before they come back to the first


@dataclass(frozen=True)
class Measured:
    """One case of one model: seconds of each side, and why others are missing."""

    model: str
    case: Case
    seconds: dict[str, list[float]]
    missing: dict[str, str]

    def ratio(self, library: str) -> float | None:
        """Paged over contiguous of a library; None where one of them is missing."""
        pair = [self.seconds.get(f"{library}, {kind}") for kind in ("paged", "contiguous")]
        return None if not (pair[0] and pair[1]) else median(pair[0]) / median(pair[1])

    def as_json(self) -> dict[str, Any]:
        """Everything but tensors."""
        case = self.case
        return {
            "model": self.model,
            "heads": [case.q_heads, case.kv_heads, case.width],
            "requests": case.requests,
            "tokens": case.length,
            "new_rows": case.rows,
            "kv_bytes": case.bytes,
            "operations": case.operations,
            "seconds": self.seconds,
            "missing": self.missing,
        }


def prefill(setting: Setting, made: Sides | None = None) -> Report:
    """One prompt at once, seconds of one layer by its tokens, of every side."""
    shapes = {"tiny": (4, 2, 64)} if setting.tiny else _SHAPES
    prompts = (48, 80) if setting.tiny else _PROMPTS
    cases = [
        (model, _case(setting, shape, requests=1, length=tokens, rows=tokens, layers=1))
        for tokens, (model, shape) in itertools.product(prompts, shapes.items())
    ]
    measured, late = _measure(setting, cases, made)
    return _report(
        measured, late, "tokens", "operations a second, 10^12",
        key=lambda case: case.length, value=lambda case, seconds: case.operations / seconds / 1e12, unit="TFLOP/s",
    )  # fmt: skip


def decode(setting: Setting, made: Sides | None = None) -> Report:
    """One new token each, at 16K tokens: the share of a copy's bandwidth by requests, of every side."""
    shapes = {"tiny": (4, 2, 64)} if setting.tiny else _SHAPES
    batches = (1, 3) if setting.tiny else _BATCHES
    context = 70 if setting.tiny else _CONTEXT
    copied = Clock(setting.device, tiny=setting.tiny).bandwidth(seconds=min(1.0, setting.seconds / 10))
    cases = []
    for requests, (model, shape) in itertools.product(batches, shapes.items()):
        case = _case(setting, shape, requests=requests, length=context, rows=1, layers=2)
        if not setting.tiny:
            layers = max(2, -(-_ROTATED // case.bytes))
            case = _case(setting, shape, requests=requests, length=context, rows=1, layers=layers)
        cases.append((model, case))
    measured, late = _measure(setting, cases, made)
    report = _report(
        measured, late, "requests", "share of a copy's bandwidth",
        key=lambda case: case.requests, value=lambda case, seconds: case.bytes / seconds / copied, unit="of a copy",
    )  # fmt: skip
    head = f"a copy reaches {copied / 1e9:.0f} GB/s, bytes read and written both counted; {context} tokens each"
    samples = {**report.samples, "copy_bytes_per_second": copied}
    return Report(samples, f"{head}\n{report.text}", report.panels)


def _case(setting: Setting, shape: tuple[int, int, int], **more: int) -> Case:
    return Case(*shape, **more, dtype=setting.dtype, device=setting.device)


def _measure(setting: Setting, cases: list[tuple[str, Case]], made: Sides | None) -> tuple[list[Measured], list[str]]:
    clock, deadline = Clock(setting.device, tiny=setting.tiny), Deadline(setting.seconds)
    made = sides(setting.device) if made is None else made
    found: list[Measured] = []
    late: list[str] = []
    for number, (model, case) in enumerate(cases):
        if deadline.over:
            late.append(f"{model} {case.requests} x {case.length}")
            continue
        share = deadline.left / (len(cases) - number) / len(made)
        try:
            found.append(Measured(model, case, *_sample(clock, case, made, share)))
        except (RuntimeError, VAttentionError) as error:  # too large for this device; others need not be
            found.append(Measured(model, case, {}, {"every side": str(error).splitlines()[0]}))
    return found, late


def _sample(clock: Clock, case: Case, made: Sides, seconds: float) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every side, each measured for about `seconds`, and why others are missing."""
    found: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    first = next(iter(made))
    with data(case) as numbers:
        for name in made:  # one at a time: blocks of another size take the place of the last ones
            computes, reasons = ready({each: made[each] for each in (first, name)}, numbers)
            missing |= reasons
            if name in computes:
                found[name] = clock.samples(partial(_rotated, computes[name], case.layers), seconds=seconds)
    return found, missing


def _rotated(compute: Compute, layers: int, number: int) -> object:
    return compute(number % layers)


def _report(measured: list[Measured], late: list[str], x: str, y: str, *, key: Any, value: Any, unit: str) -> Report:
    names = list(dict.fromkeys(name for each in measured for name in each.seconds))
    libraries = list(dict.fromkeys(name.rsplit(", ", 1)[0] for name in names))
    rows = []
    for each in measured:
        cells = []
        for name in names:
            seconds = each.seconds.get(name)
            cells.append(
                "-" if not seconds else f"{median(seconds) * 1e6:.0f} ({value(each.case, median(seconds)):.2f})"
            )
        ratios = [each.ratio(library) for library in libraries]
        cells += ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        rows.append([each.model, key(each.case), *cells])
    head = ["model", x, *names, *(f"paged/cont. {library}" for library in libraries)]
    missing = {name: reason for each in measured for name, reason in each.missing.items()}
    text = f"microseconds a layer, median ({unit})\n{table(head, rows)}{left_out(late)}"
    text += "".join(f"\n{name}: left out: {reason}" for name, reason in missing.items())
    panels = []
    for model in dict.fromkeys(each.model for each in measured):
        series = {
            name: [
                (key(each.case), *_spread([value(each.case, s) for s in each.seconds[name]]))
                for each in measured
                if each.model == model and name in each.seconds
            ]
            for name in names
        }
        panels.append(Panel(model, x, y, series, logarithmic=True))
    samples = {"cases": [each.as_json() for each in measured], "left_out": late}
    return Report(samples, text, panels)


def _spread(values: list[float]) -> tuple[float, float, float]:
    """Median, and the middle half."""
    low, _, high = quantiles(values, n=4)
    return median(values), low, high
