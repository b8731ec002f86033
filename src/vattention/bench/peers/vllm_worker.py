"""vLLM's offline engine, on the CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import wire  # type: ignore[import-not-found]


def _inside(worker: Any) -> dict[str, Any]:
    """What is so in the process that computes; vLLM sends this function there."""
    import torch

    runner = worker.model_runner
    caches = getattr(runner, "kv_caches", None) or []
    tensors = [t for cache in caches for t in (cache if isinstance(cache, (list, tuple)) else [cache])]
    return {
        "weights": sorted({str(p.dtype) for p in runner.model.parameters()}),
        "kv": sorted({str(t.dtype) for t in tensors}),
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ.get(name, "") for name in ("OMP_WAIT_POLICY", "LD_PRELOAD")},
    }


class _VLLM:
    def __init__(self, options: dict[str, Any]) -> None:
        # All cores for its threads: left to itself it keeps one free, and computes with one thread less than asked.
        # With this variable set to "auto" it can be seen doing that, and the command says that threads differ.
        cores = sorted(os.sched_getaffinity(0))[: options["threads"]]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for `_inside`
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        import vllm  # type: ignore[import-not-found]

        self._vllm = vllm
        more = (
            {}
            if options["max_num_batched_tokens"] is None
            else {"max_num_batched_tokens": options["max_num_batched_tokens"]}
        )
        self._llm = vllm.LLM(
            options["model"],
            dtype=options["dtype"],
            max_model_len=options["max_model_len"],
            max_num_seqs=options["max_num_seqs"],
            kv_cache_memory_bytes=options["kv_cache_memory"],
            enable_prefix_caching=options["enable_prefix_caching"],
            skip_tokenizer_init=True,
            **{**more, **options["more"]},
        )

    def conditions(self) -> dict[str, Any]:
        inside, config = self._llm.collective_rpc(_inside)[0], self._llm.llm_engine.vllm_config
        return {
            "engine": "vllm",
            "version": self._vllm.__version__,
            "weights": inside["weights"],
            "kv": inside["kv"],
            "threads": inside["threads"],
            "environment": inside["environment"],
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "compiled": config.compilation_config.mode.name,
        }

    def generate(self, prompts: Sequence[list[int]], outputs: Sequence[int]) -> list[int]:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = self._llm.generate(given, [self._params(output) for output in outputs], use_tqdm=False)
        return [len(result.outputs[0].token_ids) for result in results]

    def stream(self, prompt: list[int], output: int) -> list[float]:
        engine = self._llm.llm_engine
        engine.add_request(str(time.monotonic_ns()), {"prompt_token_ids": prompt}, self._params(output))
        times: list[float] = []
        while engine.has_unfinished_requests():
            for result in engine.step():
                times += [time.perf_counter()] * (len(result.outputs[0].token_ids) - len(times))
        return times

    def _params(self, output: int) -> Any:
        return self._vllm.SamplingParams(max_tokens=output, ignore_eos=True, temperature=0, detokenize=False)


if __name__ == "__main__":
    wire.serve(_VLLM)
