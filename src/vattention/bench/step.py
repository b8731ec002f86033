"""Where the time of a pass goes, beside what the machine could do.

The parts of an engine's pass are timed by the clock, from the outside: by wrapping the functions they go through. What
a decode pass cannot be faster than is the time it takes to read its bytes, weights and K and V; what a pass of prompts
cannot be faster than is its arithmetic at the rate of a large product of matrices. Both rates are measured in the same
run, between passes. In a pass that was recorded every call is timed by itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch

from vattention.attention.base import AttentionBatch
from vattention.bench.machine import check_writable, settings_of, write_json
from vattention.bench.table import table
from vattention.engine import compiled, cpu_program, linears
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import ConfigError
from vattention.llm import LLM

_PARTS = ("linear layers", "output layer", "attention", "rest of the layers", "rest of the model", "rest of the engine")
_MATRIX = 2048
"""Rows and columns of the product of matrices whose rate is the limit."""


@dataclass(frozen=True)
class Result:
    """One kind of pass.

    Attributes:
        kind: "decode" or "prefill".
        passes: how many were timed.
        milliseconds: of a pass, by part, medians; "pass" is the whole.
        tokens: of a pass, new ones.
        limits: milliseconds that the machine needs at least, by part; "pass" is their sum.
        rates: what was measured of the machine: bytes, or operations, a second.
    """

    kind: str
    passes: int
    milliseconds: Mapping[str, float]
    tokens: int
    limits: Mapping[str, float]
    rates: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class StepBench:
    """What to measure, and where to write it.

    Attributes:
        model: as `LLM` takes it.
        passes: of decodes, timed.
        compile: the model's layers, before anything is timed.
        threads: None: torch's own number.
        json, plot: files, or None.
    """

    model: str | None = None
    dtype: str = "bfloat16"
    requests: int = 8
    prompt_tokens: int = 512
    passes: int = 40
    compile: bool = True
    threads: int | None = None
    json: str | None = None
    plot: str | None = None
    command: str = "vattention bench step"


def measure(bench: StepBench, *, layout: Mapping[str, Any]) -> int:
    """Open the model, time its passes, and print and write what was found. `layout` as options of `LLM`.

    Raises:
        ConfigError: numbers below 1, a file that cannot be written, or what `LLM` raises.
    """
    for path in (bench.json, bench.plot):
        check_writable(path)
    if min(bench.requests, bench.prompt_tokens, bench.passes, bench.threads or 1) < 1:
        raise ConfigError("--requests, --prompt-tokens, --passes and --threads are at least 1")
    if bench.threads is not None:
        torch.set_num_threads(bench.threads)
    with LLM(
        bench.model,
        device="cpu",
        dtype=bench.dtype,
        max_num_seqs=bench.requests,
        max_model_len=bench.prompt_tokens + bench.passes + 8,
        compile=bench.compile,
        **layout,
    ) as llm:
        llm.warmup()
        results = run(llm, requests=bench.requests, prompt_tokens=bench.prompt_tokens, passes=bench.passes)
    print(report(results))
    if bench.plot:
        compiled = "compiled" if bench.compile else "uncompiled"
        plot(bench.plot, results, title=f"{bench.requests} x {bench.prompt_tokens} tokens, {bench.dtype}, {compiled}")
    found = {"settings": settings_of(bench), "layout": dict(layout), "results": [asdict(result) for result in results]}
    write_json(bench.json, bench.command, found)
    return 0


def run(llm: LLM, *, requests: int, prompt_tokens: int, passes: int) -> list[Result]:
    """Prompts first, then decodes of all of them.

    Args:
        llm: compiled, or not to be; on a CPU.
        requests: at once, each with `prompt_tokens`.
        passes: decode passes that are timed.

    Raises:
        ConfigError: the model serves fewer tokens than that.
    """
    engine, model = llm.engine, llm.model
    room = llm._opened().cache.layout.max_model_len
    if prompt_tokens + passes + 2 > room:
        raise ConfigError(f"{prompt_tokens} tokens and {passes} passes do not fit max_model_len={room}")
    params = SamplingParams(temperature=0, max_tokens=passes + 2, ignore_eos=True, detokenize=False)
    generator = torch.Generator().manual_seed(0)
    vocabulary = engine._vocab_size
    clock = _Clock()
    found: dict[str, list[dict[str, float]]] = {"prefill": [], "decode": []}
    rates: dict[str, list[float]] = {"bytes": [], "operations": []}
    for timed in (False, True):
        for _ in range(requests):
            prompt = torch.randint(vocabulary, (prompt_tokens,), generator=generator).tolist()
            engine.add_request(prompt, params)
        while engine.unfinished:
            before = sum(request.computed < prompt_tokens for request in engine._requests.values())
            with clock.watching(llm) as parts:
                started = time.perf_counter()
                engine.step()
                parts["pass"] = time.perf_counter() - started
            kind = "prefill" if before else "decode"
            live = engine.unfinished == requests
            if timed and (kind == "prefill" or live):
                found[kind].append(dict(parts))
            if timed and len(found[kind]) % 8 == 1:
                rates["bytes"].append(_read_rate())
                rates["operations"].append(_matrix_rate(next(model.parameters()).dtype))
    rate = {name: statistics.median(values) for name, values in rates.items()}
    return [_result(kind, found[kind], rate, llm, requests, prompt_tokens, passes) for kind in found if found[kind]]


def report(results: list[Result]) -> str:
    """A table for each kind of pass. Uncompiled, the linear layers are part of the rest of the layers."""
    blocks = []
    for result in results:
        rows = []
        for part in (*_PARTS, "pass"):
            taken, limit = result.milliseconds[part], result.limits.get(part)
            share = f"{limit / taken:.0%}" if limit and taken else ""
            rows.append((part, f"{taken:.2f}", "" if limit is None else f"{limit:.2f}", share))
        rate = (
            f"reading {result.rates['bytes'] / 1e9:.1f} GB/s"
            if result.kind == "decode"
            else f"multiplying {result.rates['operations'] / 1e9:.0f} GFLOP/s"
        )
        speed = result.tokens / result.milliseconds["pass"] * 1e3
        title = f"{result.kind}: {result.passes} passes of {result.tokens} tokens, {speed:.0f} tokens/s; {rate}"
        blocks.append(title + "\n" + table((result.kind, "ms", "limit, ms", "of the limit"), rows))
    return "\n\n".join(blocks)


def plot(path: str, results: list[Result], *, title: str) -> None:
    """A bar for each kind of pass, by parts, beside the one of its limit; the suffix of `path` picks the format.

    Raises:
        ConfigError: the file cannot be written, or its format is not known.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 1.3 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    colours = dict(zip(_PARTS, ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#cccccc", "#999999"), strict=True))
    panels = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for axes, result in zip(panels, results, strict=True):
        for height, values in ((1, result.milliseconds), (0, result.limits)):
            start = 0.0
            for part in _PARTS:
                axes.barh(height, values.get(part, 0), 0.7, left=start, color=colours[part], label=part)
                start += values.get(part, 0)
        axes.set_yticks([0, 1], ["limit", result.kind])
        axes.set_xlabel(f"ms for {result.tokens} tokens")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_title(title, loc="left")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[: len(_PARTS)], labels[: len(_PARTS)], loc="outside lower center", ncols=3, frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot {path}: {error}") from None


class _Clock:
    """Adds up what is spent in the parts of a pass."""

    @contextmanager
    def watching(self, llm: LLM) -> Iterator[dict[str, float]]:
        """The seconds of each part until the end."""
        recorded: dict[str, float] = dict.fromkeys(_PARTS, 0.0)
        spent = dict.fromkeys((*_PARTS, "layers", "model", "linears"), 0.0)
        model: Any = llm.model
        head = model.get_output_embeddings()

        def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                started = time.perf_counter()
                try:
                    return function(*args, **kwargs)
                finally:
                    spent[part] += time.perf_counter() - started

            return call

        runner: Any = llm.engine._runner
        with ExitStack() as stack:

            def watch(owner: Any, name: str, part: str) -> None:
                stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))

            watch(runner, "_logits", "model")
            replay = mock.patch.object(cpu_program.Program, "__call__", lambda program: _replay(program, recorded))
            stack.enter_context(replay)
            watch(AttentionBatch, "compute", "attention")
            watch(linears, "_multiply", "linears")
            for layer in compiled.decoder_layers(model):
                watch(layer, "_compiled_call_impl" if layer._compiled_call_impl else "forward", "layers")
            if head is not None:
                watch(head, "_compiled_call_impl" if head._compiled_call_impl else "forward", "output layer")
            yield spent
        # Compiled, the output layer goes the way of all linear layers; uncompiled, those of the layers cannot be told.
        apart = bool(head is not None and head._compiled_call_impl)
        spent["linear layers"] = max(0.0, spent["linears"] - (spent["output layer"] if apart else 0))
        spent["rest of the layers"] = spent["layers"] - spent["attention"] - spent["linear layers"]
        spent["rest of the model"] = spent["model"] - spent["layers"] - spent["output layer"]
        for part, seconds in recorded.items():
            spent[part] += seconds


def _replay(program: cpu_program.Program, spent: dict[str, float]) -> None:
    """A recorded pass. What is before the first function that was generated, and after the last, is not in layers."""
    calls = list(program.timed())
    generated = [index for index, (name, _) in enumerate(calls) if name.startswith("cpp_")]
    for index, (name, seconds) in enumerate(calls):
        inside = bool(generated) and generated[0] <= index <= generated[-1]
        if name in ("vattention_decode", "vattention_write"):
            part = "attention"
        elif not name.startswith("cpp_") and any(word in name for word in ("linear", "mm")):
            part = "linear layers" if inside else "output layer"
        else:
            part = "rest of the layers" if inside else "rest of the model"
        spent[part] += seconds


def _result(
    kind: str,
    parts: list[dict[str, float]],
    rates: Mapping[str, float],
    llm: LLM,
    requests: int,
    prompt_tokens: int,
    passes: int,
) -> Result:
    times = {name: statistics.median(part[name] for part in parts) * 1e3 for name in (*_PARTS, "pass")}
    times["rest of the engine"] = max(0.0, times["pass"] - sum(times[part] for part in _PARTS[:-1]))
    model: Any = llm.model
    layout = llm._opened().cache.layout
    head = model.get_output_embeddings()
    weights = [p for layer in compiled.decoder_layers(model) for p in layer.parameters() if p.dim() == 2]
    numbers = sum(weight.numel() for weight in weights)
    if kind == "decode":
        tokens = requests
        context = prompt_tokens + passes / 2
        needed = {
            "linear layers": numbers * weights[0].element_size(),
            "output layer": 0 if head is None else head.weight.numel() * head.weight.element_size(),
            "attention": int(requests * context * layout.bytes_per_token),
        }
        rate = rates["bytes"]
    else:
        batched = llm.engine.scheduler._max_num_batched_tokens
        tokens = min(batched, requests * prompt_tokens)
        config = model.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # Of every row with the keys it sees: scores and weighted values, a product and a sum each.
        seen = (prompt_tokens + 1) / 2
        needed = {
            "linear layers": 2 * numbers * tokens,
            "attention": int(4 * tokens * seen * config.num_attention_heads * width * layout.num_layers),
        }
        rate = rates["operations"]
    limits = {part: amount / rate * 1e3 for part, amount in needed.items()}
    return Result(kind, len(parts), times, tokens, {**limits, "pass": sum(limits.values())}, dict(rates))


def _read_rate() -> float:
    """Bytes a second that all threads read together, of more than any cache holds."""
    numbers = torch.ones(64 << 20)
    return _fastest(numbers.sum, numbers.nbytes)


def _matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of a large product of matrices."""
    a, b = (torch.ones(_MATRIX, _MATRIX, dtype=dtype) for _ in range(2))
    return _fastest(lambda: a @ b, 2 * _MATRIX**3)


def _fastest(work: Callable[[], object], amount: int) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return amount / statistics.median(times)
