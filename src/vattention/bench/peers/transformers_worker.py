"""transformers' own `generate`, with static batches: as many requests as asked for, padded on the left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
import wire  # type: ignore[import-not-found]


class _Times:
    """A streamer that only looks at the clock. The first call brings the prompt."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, _: Any) -> None:
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        pass


class _Transformers:
    """`more`: `cache`, "dynamic" (its default) or "static"; `compile`, of static caches; `attn_implementation`."""

    def __init__(self, options: dict[str, Any]) -> None:
        more = dict(options["more"])
        self._cache, self._compile = more.pop("cache", "dynamic"), bool(more.pop("compile", False))
        self._batch = options["max_num_seqs"]
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            options["model"], dtype=getattr(torch, options["dtype"]), local_files_only=True, **more
        ).eval()

    def conditions(self) -> dict[str, Any]:
        out = self._run([[1, 2]], 2, None)
        return {
            "engine": "transformers",
            "version": transformers.__version__,
            "weights": sorted({str(p.dtype) for p in self._model.parameters()}),
            "kv": sorted({str(layer.keys.dtype) for layer in out.past_key_values.layers}),
            "threads": torch.get_num_threads(),
            "prefix_caching": False,
            "max_num_batched_tokens": None,
            "max_num_seqs": self._batch,
            "compiled": str(self._compile),
            "cache": self._cache,
            "vocab_size": self._model.config.get_text_config().vocab_size,
        }

    def generate(self, prompts: Sequence[list[int]], outputs: Sequence[int]) -> list[int]:
        counts: list[int] = []
        for first in range(0, len(prompts), self._batch):
            batch, wanted = prompts[first : first + self._batch], outputs[first : first + self._batch]
            longest = max(map(len, batch))
            came = self._run(batch, max(wanted), None).sequences.shape[1] - longest
            counts += [min(came, want) for want in wanted]  # a batch runs until its longest is done
        return counts

    def stream(self, prompt: list[int], output: int) -> list[float]:
        times = _Times()
        self._run([prompt], output, times)
        return times.seen[1:]

    def _run(self, prompts: Sequence[list[int]], output: int, streamer: Any) -> Any:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=output,
            eos_token_id=[],
            pad_token_id=0,
            return_dict_in_generate=True,
            cache_implementation="static" if self._cache == "static" else None,
            disable_compile=not self._compile,
        )
        if self._compile:
            config.compile_config = transformers.CompileConfig(fullgraph=False)
            config.compile_config._compile_all_devices = True
        with torch.inference_mode():
            return self._model.generate(ids, attention_mask=mask, generation_config=config, streamer=streamer)


if __name__ == "__main__":
    wire.serve(_Transformers)
