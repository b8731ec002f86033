"""Layouts on a device: tokens a page holds, waste on a trace, and what slicing costs a kernel (the paper, section 8).

Waste is arithmetic on the real layouts: pages that requests of these lengths have at their end, over what they need.
The kernel is what the engine would run, over slots of a cache laid out so, with all layers of the model there.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from statistics import median
from typing import Any

from vattention.bench.gpu.clock import Clock, Deadline
from vattention.bench.gpu.report import Panel, Report, Setting, left_out
from vattention.bench.gpu.sides import Case, Compute, data, ours
from vattention.bench.table import table
from vattention.bench.trace import Lengths, draw_requests, load_trace
from vattention.cache import KVLayout
from vattention.cache.choosing import Place, choose
from vattention.errors import VAttentionError
from vattention.memory.sizes import format_size

_BUDGET = 48 << 30  # for the choice that is shown beside: a model of 16 GB on a device of 80
_MEANS = (24_000, 512)  # tokens of synthetic prompts and answers: long contexts
_KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"kv_together": True},
    *({"kv_together": True, "layers_per_stream": layers} for layers in (2, 4, 8, 16, 32)),
    {"layers_per_stream": 32},
    {"head_major": True},
)


def layouts(setting: Setting) -> Report:
    """Every layout of Llama-3-8B's shape: tokens a page, waste by page size, microseconds of a decode and a prompt."""
    heads, width, layers = (2, 64, 3) if setting.tiny else (8, 128, 32)
    unit = 4096 if setting.tiny else 2 << 20
    pages = [unit << power for power in range(4)]
    lengths = [request.stored for request in _requests(setting)]
    base = KVLayout(layers, heads, width, setting.dtype, 1, max(lengths))
    kinds = [kind for kind in _KINDS if kind.get("layers_per_stream", 1) <= layers]
    found = [_about(dataclasses.replace(base, **kind), pages, lengths) for kind in kinds]
    late: list[str] = []
    deadline, clock = Deadline(setting.seconds), Clock(setting.device, tiny=setting.tiny)
    for number, (kind, each) in enumerate(zip(kinds, found, strict=True)):
        if deadline.over:
            late.append(each["layout"])
            continue
        share = deadline.left / (len(kinds) - number) / 2
        for what, case in _cases(setting, heads, width, layers).items():
            try:
                with data(case, **kind) as numbers:
                    each[what] = clock.samples(partial(_rotated, ours(numbers), layers), seconds=share)
            except (RuntimeError, VAttentionError) as error:
                each["missing"] = str(error).splitlines()[0]
    mean = sum(lengths) // len(lengths)
    chosen = choose(base, Place("cuda", _BUDGET, unit), expected_tokens=mean)
    head = ["layout", "streams", *(f"tokens a {format_size(page)} page" for page in pages[:1])]
    head += [f"waste, {format_size(page)}" for page in pages] + ["decode us", "prompt us"]
    rows = [
        [
            each["layout"],
            each["streams"],
            each["tokens_per_page"][0],
            *(f"{waste:.1%}" for waste in each["waste"]),
            *(f"{median(each[what]) * 1e6:.0f}" if what in each else "-" for what in ("decode", "prompt")),
        ]
        for each in found
    ]
    said = f"chosen for requests of {mean} tokens, {format_size(_BUDGET)}: {chosen}"
    sizes = [page / (1 << 20) for page in pages]
    series = {each["layout"]: list(zip(sizes, each["waste"], strict=True)) for each in found}
    panels = [Panel("waste on the trace", "MiB a page", "wasted over needed", series, logarithmic=True)]
    if timed := [each for each in found if "decode" in each]:
        points = [(each["tokens_per_page"][0], median(each["decode"]) * 1e6) for each in timed]
        each_layout = {"layouts": sorted(points)}
        panels.append(Panel("decode attention", "tokens a page", "us a layer", each_layout, logarithmic=True))
    samples = {"layouts": found, "page_sizes": pages, "lengths": lengths, "chosen": str(chosen), "left_out": late}
    return Report(samples, f"{table(head, rows)}\n{said}{left_out(late)}", panels)


def _requests(setting: Setting) -> list[Lengths]:
    if setting.trace is not None:
        return load_trace(setting.trace, limit=1000)
    count, means = (5, (40, 10)) if setting.tiny else (500, _MEANS)
    return draw_requests(count, *means, seed=setting.seed)


def _about(layout: KVLayout, pages: list[int], lengths: list[int]) -> dict[str, Any]:
    needed = sum(lengths) * layout.bytes_per_token
    mapped = [
        sum(-(-length * stream.token_bytes // page) * page for length in lengths for stream in layout.streams)
        for page in pages
    ]
    return {
        "layout": layout.name,
        "streams": len(layout.streams),
        "tokens_per_page": [page // max(stream.token_bytes for stream in layout.streams) for page in pages],
        "waste": [size / needed - 1 for size in mapped],
    }


def _cases(setting: Setting, heads: int, width: int, layers: int) -> dict[str, Case]:
    requests, length = (2, 40) if setting.tiny else (4, 16 << 10)
    case = Case(4 * heads, heads, width, requests, length, 1, layers, setting.dtype, setting.device)
    return {"decode": case, "prompt": dataclasses.replace(case, requests=1, rows=length)}


def _rotated(compute: Compute, layers: int, number: int) -> object:
    return compute(number % layers)
