"""The parts of `make gpu-check` that measure the cache, its kernels and the engine, by name."""

from __future__ import annotations

from collections.abc import Callable

from vattention.bench.gpu.attention import decode, prefill
from vattention.bench.gpu.layouts import layouts
from vattention.bench.gpu.overlap import overlap
from vattention.bench.gpu.report import Report, Setting
from vattention.bench.gpu.serving import serving, vllm

PARTS: dict[str, Callable[[Setting], Report]] = {
    "prefill": prefill,
    "decode": decode,
    "layouts": layouts,
    "overlap": overlap,
    "engine": serving,
    "vllm": vllm,
}
