"""`vattention bench memory`: what a request trace takes in a real cache, beside static reservation and paged blocks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from vattention.bench.geometry import GEOMETRIES, ModelGeometry
from vattention.bench.machine import check_writable, settings_of, write_json
from vattention.bench.plot import check_plotting, plot_memory
from vattention.bench.replay import BACKED, Replay, replay
from vattention.bench.table import table
from vattention.bench.trace import Lengths, draw_requests, load_trace, mean, scaled
from vattention.cache import KVCache, KVLayout
from vattention.engine.loading import parse_dtype
from vattention.errors import ConfigError
from vattention.memory.limits import memory_headroom
from vattention.memory.sizes import format_size, parse_size

_FEW_LAYERS = 2
_ROWS = 10  # of the table over time
_POINTS = 1000  # of each series in the JSON file
_NAMES = {
    "mapped": "mapped (live slots)",
    "paged_16": "paged, blocks of 16",
    "paged_256": "paged, blocks of 256",
    "static": "static reservation",
}


@dataclass(frozen=True)
class MemoryBench:
    """The options of the command; None where the default depends on others.

    Attributes:
        trace: a CSV file; None: `requests` requests are drawn, of these mean lengths.
        limit_requests: of a trace, at most; 0: all.
        scale: every length is multiplied by this.
        model_geometry: a name in GEOMETRIES; layers, kv_heads, head_dim, dtype and max_model_len replace its numbers.
        layers_replayed: layers that the cache has; None: 2, or what a stream holds if that is more.
        memory: physical budget for K and V of the whole model; None: no limit but the machine's.
        max_ratio: the check fails where mapped / needed, over all steps, is more.
    """

    trace: str | None = None
    requests: int = 1000
    prompt_tokens: float = 1000
    output_tokens: float = 200
    limit_requests: int = 1000
    scale: float = 1.0
    seed: int = 0
    model_geometry: str = "llama-3-8b"
    layers: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    dtype: str | None = None
    max_model_len: int | None = None
    layers_replayed: int | None = None
    max_num_seqs: int = 32
    memory: str | None = None
    page_size: str | None = None
    head_major: bool = False
    layers_per_stream: int | None = 1
    kv_together: bool = False
    prefetch: bool = True
    max_ratio: float | None = None
    json: str | None = None
    plot: str | None = None
    command: str = ""


def run(options: MemoryBench) -> int:
    """Replay, print the report, write the files asked for. Returns the exit code: 1 if `max_ratio` was passed.

    Raises:
        ConfigError: options or a trace that cannot be replayed.
    """
    check_writable(options.json)
    check_writable(options.plot)
    if options.plot is not None:
        check_plotting()
    requests = _requests(options)
    model = _model(options, requests)
    layers = _layers_replayed(options, model)
    layout = model.layout(
        options.max_num_seqs,
        layers=layers,
        head_major=options.head_major,
        layers_per_stream=options.layers_per_stream,
        kv_together=options.kv_together,
    )
    budget = _budget(options, layout, model)
    with KVCache(layout, memory=budget, page_size=options.page_size) as cache:
        page = cache.pool.page_size
        print(_setting(options, requests, model, layout, page, budget), flush=True)
        result = replay(cache, requests, prefetch=options.prefetch)
        limit = cache.stats().mapping_limit
    print(_report(result, model, layout, limit))
    ratio = result.series.over_needed("mapped")[0]
    write_json(options.json, options.command, _record(options, requests, model, layout, page, budget, result))
    if options.plot is not None:
        title = f"{options.model_geometry}, {format_size(page)} pages, {layout.name}"
        plot_memory(options.plot, result.series, title=title, unit=f"GiB in {_layers(layout, model)}")
    if options.max_ratio is None:
        return 0
    passed = ratio <= options.max_ratio
    print(f"\n{'PASS' if passed else 'FAIL'}: mapped / needed is {ratio:.4f}, at most {options.max_ratio} is allowed")
    return 0 if passed else 1


# -- settings -------------------------------------------------------------------------------------------------------


def _requests(options: MemoryBench) -> list[Lengths]:
    if options.limit_requests < 0:
        raise ConfigError("--limit-requests must not be negative; 0 takes all")
    if options.trace is None:
        requests = draw_requests(options.requests, options.prompt_tokens, options.output_tokens, seed=options.seed)
    else:
        requests = load_trace(options.trace, options.limit_requests or None)
    return scaled(requests, options.scale)


def _model(options: MemoryBench, requests: list[Lengths]) -> ModelGeometry:
    """The geometry, with a context long enough for every request unless one was asked for."""
    model = GEOMETRIES[options.model_geometry]
    dtype = None if options.dtype is None else parse_dtype(options.dtype)
    longest = max(request.stored for request in requests)
    return replace(
        model,
        layers=model.layers if options.layers is None else options.layers,
        kv_heads=model.kv_heads if options.kv_heads is None else options.kv_heads,
        head_dim=model.head_dim if options.head_dim is None else options.head_dim,
        dtype=dtype or model.dtype,
        max_model_len=options.max_model_len or max(model.max_model_len, longest),
    )


def _layers_replayed(options: MemoryBench, model: ModelGeometry) -> int:
    """Layers of the replay: whole streams of the model, so that each stream has the same arithmetic as in all of it.

    Raises:
        ConfigError: more than the model has, or a part of a stream.
    """
    group = min(options.layers_per_stream or model.layers, model.layers)
    if options.layers_replayed is None:
        return min(model.layers, max(group, _FEW_LAYERS // group * group))
    layers = options.layers_replayed
    if not 1 <= layers <= model.layers or (layers % group and layers != model.layers):
        raise ConfigError(
            f"--layers-replayed {layers} must be at most {model.layers} and whole streams of {group} layers"
        )
    return layers


def _budget(options: MemoryBench, layout: KVLayout, model: ModelGeometry) -> int:
    """Physical bytes for the layers replayed."""
    if options.memory is not None:
        return max(1, parse_size(options.memory, "memory") * layout.num_layers // model.layers)
    headroom = memory_headroom()
    return layout.size if headroom is None else max(1, min(layout.size, headroom // 2))


# -- the report -----------------------------------------------------------------------------------------------------


def _layers(layout: KVLayout, model: ModelGeometry) -> str:
    few = f"{layout.num_layers} of " if layout.num_layers != model.layers else "all "
    return f"{few}{model.layers} layers"


def _setting(
    options: MemoryBench, requests: list[Lengths], model: ModelGeometry, layout: KVLayout, page: int, budget: int
) -> str:
    source = "drawn" if options.trace is None else f"from {options.trace}"
    scale = "" if options.scale == 1 else f", lengths scaled by {options.scale:g}"
    prompts, outputs = [request.prompt for request in requests], [request.output for request in requests]
    dtype = str(model.dtype).removeprefix("torch.")
    factor = model.layers / layout.num_layers
    replayed = _layers(layout, model)
    if factor != 1:
        replayed += f": the arithmetic is the same in each, all of them take {factor:g} times"
    rows = [
        ("requests", f"{len(requests)} {source}{scale}"),
        ("prompt tokens", f"mean {mean(prompts):.0f}, longest {max(prompts)}"),
        ("output tokens", f"mean {mean(outputs):.0f}, longest {max(outputs)}"),
        ("model", f"{options.model_geometry}: {model.kv_heads} KV heads of {model.head_dim}, {dtype}"),
        ("replayed", replayed),
        ("layout", f"{layout.name}, {format_size(page)} pages"),
        ("slots", f"{layout.max_num_seqs} of {layout.max_model_len} tokens"),
        ("physical budget", f"{format_size(budget)} for the layers replayed"),
    ]
    return table(("", ""), rows, left=2)


def _report(result: Replay, model: ModelGeometry, layout: KVLayout, limit: int | None) -> str:
    return "\n\n".join(
        [
            _over_time(result),
            _fullest(result, model, layout),
            _over_all_steps(result),
            _driver(result, model, layout, limit),
        ]
    )


def _over_time(result: Replay) -> str:
    series = result.series
    last = len(series) - 1
    picked = sorted({round(last * row / (_ROWS - 1)) for row in range(_ROWS)})
    header = ("step", "live", "tokens", "needed", "mapped", "wasted", "created", "mapped/needed", "mappings")
    rows = [
        (
            step + 1,
            series.live[step],
            series.tokens[step],
            format_size(series.needed[step]),
            format_size(series.mapped[step]),
            format_size(series.mapped[step] - series.needed[step]),
            format_size(series.created[step]),
            f"{series.mapped[step] / series.needed[step]:.4f}",
            series.mappings[step],
        )
        for step in picked
    ]
    return "over time\n" + table(header, rows, left=0)


def _fullest(result: Replay, model: ModelGeometry, layout: KVLayout) -> str:
    series = result.series
    step = max(range(len(series)), key=series.needed.__getitem__)
    needed = series.needed[step]
    figures = [("reserved", layout.size), ("created", series.created[step])]
    figures += [("needed", needed), (_NAMES["mapped"], series.mapped[step])]
    figures += [("wasted", series.mapped[step] - needed)]
    figures += [(_NAMES[column], getattr(series, column)[step]) for column in BACKED[1:]]
    factor = model.layers / layout.num_layers
    whole = () if factor == 1 else (f"all {model.layers} layers",)
    rows = [
        (name, format_size(size), *(format_size(round(size * factor)) for _ in whole), f"{size / needed:.4f}")
        for name, size in figures
    ]
    head = f"at the fullest step, {step + 1}: {series.live[step]} live requests, {series.tokens[step]} tokens"
    return head + "\n" + table(("", _layers(layout, model), *whole, "over needed"), rows)


def _over_all_steps(result: Replay) -> str:
    rows = []
    for column in BACKED:
        total, worst, step = result.series.over_needed(column)
        rows.append((_NAMES[column], f"{total:.4f}", f"{worst:.4f}", step + 1))
    head = f"over needed, all {len(result.series)} steps (a step weighs as many bytes as it needs)"
    return head + "\n" + table(("", "all steps", "worst step", "which"), rows)


def _driver(result: Replay, model: ModelGeometry, layout: KVLayout, limit: int | None) -> str:
    peak = max(result.series.mappings)
    share = "" if not limit else f" of {limit} allowed, {peak / limit:.1%}"
    factor = model.layers / layout.num_layers
    scaled_peak = "" if factor == 1 else f"; for all {model.layers} layers {round(peak * factor)}"
    calls = sum(result.driver_calls.values())
    verbs = ", ".join(f"{count} {verb}" for verb, count in sorted(result.driver_calls.items()) if count)
    mean_call = f", {result.driver_seconds / calls * 1e6:.0f} us each" if calls else ""
    rows = [
        ("mappings", f"{peak} at most{share}{scaled_peak}"),
        ("driver calls", f"{calls} ({verbs})"),
        ("by thread", f"{result.calls_here} on the thread that steps, {calls - result.calls_here} in the background"),
        ("driver time", f"{result.driver_seconds:.2f} s{mean_call}; the replay took {result.seconds:.1f} s"),
        ("preemptions", result.preemptions),
    ]
    return table(("", ""), rows, left=2)


def _record(
    options: MemoryBench,
    requests: list[Lengths],
    model: ModelGeometry,
    layout: KVLayout,
    page: int,
    budget: int,
    result: Replay,
) -> dict[str, Any]:
    """The JSON result: settings, summary over every step, and the series thinned out."""
    series = result.series
    stride = -(-len(series) // _POINTS)
    ratios = {column: series.over_needed(column) for column in BACKED}
    return {
        "settings": {
            **settings_of(options),
            "requests": len(requests),
            "model": {**asdict(model), "dtype": str(model.dtype).removeprefix("torch.")},
            "layers_replayed": layout.num_layers,
            "page_size": page,
            "budget": budget,
        },
        "summary": {
            "steps": len(series),
            "reserved": layout.size,
            "peak": {name: max(values) for name, values in vars(series).items()},
            "over_needed": {
                column: {"all_steps": total, "worst_step": worst, "which": step + 1}
                for column, (total, worst, step) in ratios.items()
            },
            "preemptions": result.preemptions,
            "driver_calls": result.driver_calls,
            "driver_calls_by_the_stepping_thread": result.calls_here,
            "driver_seconds": result.driver_seconds,
            "seconds": result.seconds,
        },
        "series": {
            "step": list(range(1, len(series) + 1, stride)),
            **{name: values[::stride] for name, values in vars(series).items()},
        },
    }
