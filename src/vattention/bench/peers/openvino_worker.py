"""OpenVINO GenAI's continuous batching. The model is an exported one (optimum-cli export openvino).

Its KV cache would have 8 bits by default; here it has the model's precision, for equal work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import wire  # type: ignore[import-not-found]

_NAMES = {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}
_TYPES = {short: name for name, short in _NAMES.items()}


class _OpenVINO:
    """`more`: properties of the plugin."""

    def __init__(self, options: dict[str, Any]) -> None:
        import openvino  # type: ignore[import-not-found]
        import openvino_genai  # type: ignore[import-not-found]

        self._ov, self._genai, self._options = openvino, openvino_genai, options
        self._scheduler = scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = max(1, options["kv_cache_memory"] >> 30)  # whole GiB
        scheduler.max_num_seqs = options["max_num_seqs"]
        scheduler.max_num_batched_tokens = options["max_num_batched_tokens"] or 2048  # its own 256 is slower
        scheduler.enable_prefix_caching = options["enable_prefix_caching"]
        self._properties = {
            "INFERENCE_PRECISION_HINT": _NAMES[options["dtype"]],
            "KV_CACHE_PRECISION": _NAMES[options["dtype"]],
            "INFERENCE_NUM_THREADS": options["threads"],
            "NUM_STREAMS": 1,
            **options["more"],
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            options["model"], scheduler, "CPU", dict(self._properties)
        )
        self._added = 0

    def conditions(self) -> dict[str, Any]:
        weights, kv, threads = self._compiled()
        return {
            "engine": "openvino-genai",
            "version": self._genai.__version__,
            "weights": weights,
            "kv": kv,
            "threads": threads,
            "prefix_caching": bool(self._scheduler.enable_prefix_caching),
            "max_num_batched_tokens": self._scheduler.max_num_batched_tokens,
            "max_num_seqs": self._scheduler.max_num_seqs,
            "compiled": "True",
        }

    def _compiled(self) -> tuple[list[str], list[str], int]:
        """What the plugin makes of the same model and properties; the pipeline does not let anyone look inside."""
        core = self._ov.Core()
        model = core.read_model(f"{self._options['model']}/openvino_model.xml")
        types: dict[str, int] = {}
        for op in model.get_ops():
            if op.get_type_name() == "Constant":
                name = op.get_element_type().get_type_name()
                types[name] = types.get(name, 0) + op.get_byte_size()
        stored = max(types, key=lambda name: types[name])  # a few constants of other types are no weights
        compiled = core.compile_model(model, "CPU", dict(self._properties))
        kv = compiled.get_property("KV_CACHE_PRECISION").get_type_name()
        return [_TYPES.get(stored, stored)], [_TYPES.get(kv, kv)], int(compiled.get_property("INFERENCE_NUM_THREADS"))

    def generate(self, prompts: Sequence[list[int]], outputs: Sequence[int]) -> list[int]:
        results = self._pipeline.generate([self._ids(p) for p in prompts], [self._config(n) for n in outputs])
        return [len(result.m_generation_ids[0]) for result in results]

    def stream(self, prompt: list[int], output: int) -> list[float]:
        self._added += 1
        handle = self._pipeline.add_request(self._added, self._ids(prompt), self._config(output))
        times: list[float] = []
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            while handle.can_read():
                for part in handle.read().values():
                    times += [time.perf_counter()] * len(part.generated_ids)
        return times

    def _ids(self, prompt: list[int]) -> Any:
        return self._ov.Tensor(np.array([prompt], dtype=np.int64))

    def _config(self, output: int) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output
        config.ignore_eos, config.do_sample = True, False
        return config


if __name__ == "__main__":
    wire.serve(_OpenVINO)
