"""The engine of this package, through the same door as the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import wire  # type: ignore[import-not-found]

from vattention.bench.machine import version
from vattention.bench.setup import step
from vattention.engine.sampling_params import SamplingParams
from vattention.llm import LLM


class _Ours:
    def __init__(self, options: dict[str, Any]) -> None:
        rows = options["max_num_batched_tokens"]
        prefix: dict[str, Any] = {"enable_prefix_caching": True} if options["enable_prefix_caching"] else {}
        self._llm = LLM(
            options["model"],
            dtype=options["dtype"],
            max_model_len=options["max_model_len"],
            max_num_seqs=options["max_num_seqs"],
            kv_cache_memory=options["kv_cache_memory"],
            **({} if rows is None else {"max_num_batched_tokens": rows}),
            **prefix,
            **options["more"],
        )
        self._more, self._prefix_caching = options["more"], options["enable_prefix_caching"]
        self._text = bool(options.get("text"))
        self._llm.warmup()

    def conditions(self) -> dict[str, Any]:
        engine, model = self._llm.engine, self._llm.model
        return {
            "engine": "vattention",
            "version": version("vattention"),
            "weights": sorted({str(p.dtype) for p in model.parameters()}),
            "kv": [str(self._llm._opened().cache.layer(0)[0].dtype)],
            "threads": torch.get_num_threads(),
            "prefix_caching": self._prefix_caching,
            "max_num_batched_tokens": engine.scheduler._max_num_batched_tokens,
            "max_num_seqs": engine.scheduler._max_num_seqs,
            "compiled": str(self._more.get("compile", False)),
            "vocab_size": engine._vocab_size,
        }

    def generate(self, prompts: Sequence[list[int]], outputs: Sequence[int]) -> list[int]:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = self._llm.generate(given, [_params(output, self._text) for output in outputs], use_tqdm=False)
        return [len(result.outputs[0].token_ids) for result in results]

    def stream(self, prompt: list[int], output: int) -> list[float]:
        request = self._llm.engine.add_request(prompt, _params(output))
        times: list[float] = []
        while not request.all_finished:
            step(self._llm.engine)
            times += [time.perf_counter()] * (len(request.output_token_ids) - len(times))
        return times


def _params(output: int, text: bool = False) -> SamplingParams:
    return SamplingParams(max_tokens=output, ignore_eos=True, temperature=0, detokenize=text)


if __name__ == "__main__":
    wire.serve(_Ours)
