"""transformers' continuous batching, with its defaults but for prefix sharing, which is off unless asked for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
import wire  # type: ignore[import-not-found]


class _Continuous:
    """`more`: fields of `ContinuousBatchingConfig`."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            options["model"], dtype=getattr(torch, options["dtype"]), local_files_only=True
        ).eval()
        size = self._model.config.get_text_config()
        head = getattr(size, "head_dim", None) or size.hidden_size // size.num_attention_heads
        token = 2 * size.num_hidden_layers * size.num_key_value_heads * head * self._model.dtype.itemsize
        page = options["more"].get("page_size", 256)
        settings = {
            "allow_block_sharing": options["enable_prefix_caching"],
            "num_blocks": max(1, options["kv_cache_memory"] // (token * page)),
            "max_requests_per_batch": options["max_num_seqs"],
            "max_batch_tokens": options["max_num_batched_tokens"] or 2048,
            **options["more"],
        }
        self._settings = transformers.ContinuousBatchingConfig(**settings)
        config = transformers.GenerationConfig(do_sample=False, eos_token_id=[], pad_token_id=0)
        self._manager = self._model.init_continuous_batching(
            generation_config=config, continuous_batching_config=self._settings
        )
        self._manager.start()

    def conditions(self) -> dict[str, Any]:
        self.generate([[1, 2]], [2])
        cache = self._manager.batch_processor.cache
        return {
            "engine": "transformers continuous batching",
            "version": transformers.__version__,
            "weights": sorted({str(p.dtype) for p in self._model.parameters()}),
            "kv": [str(cache.dtype)],
            "threads": torch.get_num_threads(),
            "prefix_caching": bool(cache.use_prefix_sharing),
            "max_num_batched_tokens": self._settings.max_batch_tokens,
            "max_num_seqs": self._settings.max_requests_per_batch,
            "compiled": "False",
            "vocab_size": self._model.config.get_text_config().vocab_size,
        }

    def generate(self, prompts: Sequence[list[int]], outputs: Sequence[int]) -> list[int]:
        names = [
            self._manager.add_request(list(prompt), max_new_tokens=output)
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        done: dict[str, int] = {}
        while len(done) < len(names):
            result = self._manager.get_result(timeout=1)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("its generation thread has ended")
            elif result.error is not None:
                raise RuntimeError(result.error)
            elif result.is_finished():
                done[result.request_id] = len(result.generated_tokens)
        return [done[name] for name in names]

    def stream(self, prompt: list[int], output: int) -> list[float]:
        name = self._manager.add_request(list(prompt), max_new_tokens=output, streaming=True)
        times: list[float] = []
        for result in self._manager.request_id_iter(name):
            times += [time.perf_counter()] * (len(result.generated_tokens) - len(times))
        return times

    def close(self) -> None:
        self._manager.stop(block=True, timeout=5)


if __name__ == "__main__":
    wire.serve(_Continuous)
