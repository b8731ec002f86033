"""llama.cpp, through llama-cpp-python's binding of its C interface: several sequences in one context.

As its own benchmark of batches does it: all prompts of a group first, packed into passes, then a token of each at a
time. A group is as many requests as there may be in a pass.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import wire  # type: ignore[import-not-found]

_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}
"""ggml's numbers; the binding lacks a name for the last."""
_FILES = {"0": "float32", "1": "float16", "32": "bfloat16"}
"""What `general.file_type` of a .gguf file says; matrices are of that type, vectors of 32 bits."""


class _LlamaCpp:
    """`more`: fields of `llama_context_params`."""

    def __init__(self, options: dict[str, Any]) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self._c, self._sequences = llama_cpp, options["max_num_seqs"]
        llama_cpp.llama_backend_init()
        file = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(options["model"].encode(), file)
        if not self._model:
            raise ValueError(f"cannot load {options['model']}")
        params = llama_cpp.llama_context_default_params()
        params.type_k = params.type_v = _TYPES[options["dtype"]]
        self._kv = options["dtype"]
        params.n_seq_max = self._sequences
        params.n_ctx = self._sequences * -(-options["max_model_len"] // 256) * 256
        params.n_batch = self._rows = options["max_num_batched_tokens"] or 2048
        params.n_threads = params.n_threads_batch = options["threads"]
        for name, value in options["more"].items():
            setattr(params, name, value)
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"no context of {params.n_ctx} tokens")
        self._batch = llama_cpp.llama_batch_init(self._rows, 0, 1)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def conditions(self) -> dict[str, Any]:
        said = ctypes.create_string_buffer(32)
        self._c.llama_model_meta_val_str(self._model, b"general.file_type", said, len(said))
        kind = said.value.decode()
        return {
            "engine": "llama.cpp",
            "version": f"llama-cpp-python {self._c.__version__}",
            "weights": [_FILES.get(kind, f"gguf file type {kind}")],
            "kv": [self._kv],  # what was asked for, and would not have started otherwise; there is no way to read it
            "threads": self._c.llama_n_threads(self._context),
            "prefix_caching": False,
            "max_num_batched_tokens": self._rows,
            "max_num_seqs": self._sequences,
            "compiled": "ahead of time",
            "vocab_size": self._vocabulary,
        }

    def generate(self, prompts: Sequence[list[int]], outputs: Sequence[int]) -> list[int]:
        counts: list[int] = []
        for first in range(0, len(prompts), self._sequences):
            last = first + self._sequences
            counts += map(len, self._group(prompts[first:last], outputs[first:last]))
        return counts

    def stream(self, prompt: list[int], output: int) -> list[float]:
        return self._group([prompt], [output])[0]

    def _group(self, prompts: Sequence[list[int]], outputs: Sequence[int]) -> list[list[float]]:
        """When each token came, for each prompt."""
        c = self._c
        c.llama_memory_clear(c.llama_get_memory(self._context), False)
        times: list[list[float]] = [[] for _ in prompts]
        rows = [
            (token, place, number, place == len(prompt) - 1)
            for number, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        while rows:
            following = []
            for first in range(0, len(rows), self._rows):
                part = rows[first : first + self._rows]
                chosen = self._pass(part)
                now = time.perf_counter()
                for number, token in chosen.items():
                    times[number].append(now)
                    if len(times[number]) < outputs[number]:
                        place = len(prompts[number]) + len(times[number]) - 1
                        following.append((token, place, number, True))
            rows = following
        return times

    def _pass(self, rows: Sequence[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Compute rows of token, position, sequence and whether its next token is wanted; sequence -> that token."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, place, number, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, wanted
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = number
        if code := self._c.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        chosen = {}
        for i, (_, _, number, wanted) in enumerate(rows):
            if wanted:
                logits = np.ctypeslib.as_array(self._c.llama_get_logits_ith(self._context, i), (self._vocabulary,))
                chosen[number] = int(logits.argmax())
        return chosen


if __name__ == "__main__":
    wire.serve(_LlamaCpp)
