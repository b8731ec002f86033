"""The whole engine: decode steps against the bandwidth, long contexts over slots and over blocks, and vLLM beside."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from vattention.bench.gpu.clock import Clock
from vattention.bench.gpu.model import SHAPES, configuration, random_model
from vattention.bench.gpu.report import Panel, Report, Setting
from vattention.bench.gpu.work import Served, Sizes, decode_steps, engine, prompts, serve, sizes, workload
from vattention.bench.side import Side
from vattention.bench.table import table
from vattention.engine.loading import LoadedModel
from vattention.errors import ConfigError, EngineError, VAttentionError

_BLOCK = 256
_SLOTS, _NO_GRAPHS, _BLOCKS = "slots", "slots, no graphs", f"blocks of {_BLOCK}"
_ENGINES: dict[str, dict[str, Any]] = {
    _SLOTS: {},
    _NO_GRAPHS: {"cuda_graphs": False},  # as blocks have none: what is left between these two is the layout
    _BLOCKS: {"cache": "paged", "block_size": _BLOCK},
}
_WORKER = Path(__file__).parents[1] / "peers" / "vllm_worker.py"


def serving(setting: Setting, *, model: LoadedModel | None = None) -> Report:
    """Decode steps at small and large batches as a share of the limit, and requests a minute, by cache."""
    model = model or random_model(sizes(setting, 0).shape, setting.device, setting.dtype, seed=setting.seed)
    wanted = sizes(setting, model.weight_bytes)
    copied = Clock(setting.device, tiny=setting.tiny).bandwidth(seconds=min(1.0, setting.seconds / 10))
    requests = workload(setting, wanted)
    vocabulary = model.geometry.vocab_size
    long = prompts(setting, [request.prompt for request in requests], vocabulary)
    steps: dict[str, dict[int, list[float]]] = {}
    served: dict[str, Served] = {}
    notes: list[str] = []
    for name, options in _ENGINES.items():
        try:
            with engine(model, wanted, **options) as llm:
                notes.append(f"{name}: {_attention(llm, setting.device)}; {llm.layout or 'taken up front'}")
                steps[name] = {}
                for batch in wanted.batches:
                    tokens = prompts(setting, [wanted.prompt] * batch, vocabulary)
                    decode_steps(llm, tokens, 6)
                    steps[name][batch] = decode_steps(llm, tokens, wanted.output).seconds
                outputs = [request.output for request in requests]
                served[name] = serve(llm, long, outputs, seconds=setting.seconds / len(_ENGINES))
        except (RuntimeError, VAttentionError) as error:
            notes.append(f"{name}: not measured: {type(error).__name__}: {str(error).splitlines()[0]}")
    return _report(model, wanted, copied, steps, served, notes)


def _attention(llm: Any, device: torch.device) -> str:
    """Which kernel computes decodes, in words: what the figures are of."""
    from vattention.attention import through_table, varlen

    if device.type == "cpu":
        return "the CPU kernel" if llm.layout is not None else "the CPU kernel through a block table"
    if llm.layout is None:
        follows = through_table.available(device, _BLOCK)
        return "torch's FlashAttention through a block table" if follows else "blocks gathered, then as over slots"
    return "torch's FlashAttention" if varlen.available(device) else "plain operations"


def limit(model: LoadedModel, wanted: Sizes, batch: int, copied: float) -> float:
    """Seconds that reading the weights, the embedding apart, and the K and V of a step takes at a copy's rate."""
    network: Any = model.model
    embedding = network.get_input_embeddings().weight.nbytes
    shapes = model.geometry.shapes
    token = sum(shape.num_kv_heads * (shape.key_dim + shape.value_dim) for shape in shapes) * model.dtype.itemsize
    length = wanted.prompt + wanted.output / 2
    return float((model.weight_bytes - embedding + batch * length * token) / copied)


def _report(
    model: LoadedModel,
    wanted: Sizes,
    copied: float,
    steps: dict[str, dict[int, list[float]]],
    served: dict[str, Served],
    notes: list[str],
) -> Report:
    rows = []
    for name, by_batch in steps.items():
        for batch, seconds in by_batch.items():
            share = limit(model, wanted, batch, copied) / median(seconds)
            rows.append([name, batch, f"{median(seconds) * 1e3:.2f}", f"{max(seconds) * 1e3:.2f}", f"{share:.2f}"])
    first = table(["decode steps", "requests", "median ms", "worst ms", "of the limit"], rows)
    text = f"{model.name}; a copy reaches {copied / 1e9:.0f} GB/s\n" + "\n".join(notes) + f"\n{first}"
    if served:
        text += "\n" + _served_table(served)
    ratios = {}
    for name in (_SLOTS, _NO_GRAPHS):
        if name in served and _BLOCKS in served and served[_BLOCKS].done:
            ratios[name] = served[name].per_minute / served[_BLOCKS].per_minute
            text += f"\n{name} over {_BLOCKS}, requests a minute: {ratios[name]:.3f}"
    samples = {
        "model": model.name,
        "copy_bytes_per_second": copied,
        "notes": notes,
        "decode_seconds": steps,
        "limit_seconds": {batch: limit(model, wanted, batch, copied) for batch in wanted.batches},
        "served": {name: _as_json(each) for name, each in served.items()},
        "over_blocks": ratios,
        "memory": wanted.memory,
    }
    series = {
        name: [(float(batch), limit(model, wanted, batch, copied) / median(seconds)) for batch, seconds in each.items()]
        for name, each in steps.items()
    }
    done = {
        name: [(latency, float(number)) for number, latency in enumerate(each.latencies, start=1)]
        for name, each in served.items()
    }
    panels = [
        Panel("decode steps", "requests", "share of the bandwidth limit", series),
        Panel("long contexts, all at once", "seconds", "requests that have ended", done),
    ]
    return Report(samples, text, panels)


def _served_table(served: dict[str, Served]) -> str:
    rows = []
    for name, each in served.items():
        middle = [f"{value:.1f}" for value in _percentiles(each.latencies)] or ["-", "-"]
        rows.append([name, f"{each.done} of {each.requests}", f"{each.seconds:.1f}", f"{each.per_minute:.2f}", *middle])
    return table(["long contexts", "ended", "seconds", "a minute", "median s", "90% s"], rows)


def _percentiles(latencies: Sequence[float]) -> list[float]:
    """The middle one, and the one that nine tenths stay under."""
    if len(latencies) < 2:
        return [*latencies, *latencies]
    return [median(latencies), quantiles(latencies, n=10, method="inclusive")[8]]


def _as_json(each: Served) -> dict[str, Any]:
    return {
        "seconds": each.seconds,
        "latencies": each.latencies,
        "done": each.done,
        "requests": each.requests,
        "per_minute": each.per_minute,
    }


# -- vLLM -----------------------------------------------------------------------------------------------------------


def vllm(setting: Setting, *, worker: Path = _WORKER) -> Report:
    """The same workload through the real vLLM, in its own environment, on random weights of the same shape."""
    if setting.vllm_python is None:
        return Report({}, "", skipped="no vLLM here: give --vllm-python, the Python of an environment with it")
    wanted = sizes(setting, _bytes_of("tiny" if setting.tiny else "Llama-3-8B", setting))
    requests = workload(setting, wanted)
    vocabulary = SHAPES[wanted.shape]["vocab_size"]
    tokens = prompts(setting, [request.prompt for request in requests], vocabulary)
    outputs = [request.output for request in requests]
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(wanted.shape)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        options = {
            "model": folder,
            "dtype": "bfloat16",
            "threads": 1,
            "max_model_len": wanted.longest,
            "max_num_seqs": max(wanted.batches),
            "max_num_batched_tokens": wanted.rows,
            "kv_cache_memory": wanted.memory,
            "enable_prefix_caching": False,
            "more": {"load_format": "dummy"},
        }
        try:
            side = Side("vllm", [setting.vllm_python, str(worker)], os.environ, timeout=max(60.0, 4 * setting.seconds))
            with side:
                said = side.ask(do="start", options=options)["conditions"]
                side.ask(do="generate", prompts=tokens[:1], outputs=[4])
                started = time.perf_counter()
                counts = side.ask(do="generate", prompts=tokens, outputs=outputs)["counts"]
                seconds = time.perf_counter() - started
        except (ConfigError, EngineError) as error:
            return Report({}, "", skipped=f"vLLM: {str(error).splitlines()[0]}")
    if counts != outputs:
        return Report({}, "", skipped=f"vLLM: gave other numbers of tokens than asked for: {json.dumps(counts)}")
    per_minute = 60 * len(requests) / seconds
    text = f"vLLM {said['version']}: {len(requests)} requests in {seconds:.1f} s, {per_minute:.2f} a minute"
    return Report({"seconds": seconds, "per_minute": per_minute, "conditions": said, "requests": len(requests)}, text)


def _bytes_of(shape: str, setting: Setting) -> int:
    """Of the weights, in about the way a Llama has them."""
    numbers = SHAPES[shape]
    width, inner = numbers["hidden_size"], numbers["intermediate_size"]
    kv = width * numbers["num_key_value_heads"] // numbers["num_attention_heads"]
    layer = 2 * width * width + 2 * width * kv + 3 * width * inner
    return int((numbers["num_hidden_layers"] * layer + 2 * numbers["vocab_size"] * width) * setting.dtype.itemsize)
