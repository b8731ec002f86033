"""An engine in its parts: what the measurements need to hold in their hands, where `LLM` hides it."""

from __future__ import annotations

from dataclasses import dataclass

from vattention.cache import KVCache
from vattention.engine.engine import Engine
from vattention.engine.loading import LoadedModel
from vattention.engine.opening import default_budget
from vattention.engine.request import Request
from vattention.engine.runner import Runner

_BATCHED_TOKENS = 512


@dataclass(frozen=True)
class EngineOptions:
    """As the arguments of `LLM`, with its defaults, but for `device`, where "auto" is the CPU, and for a layout that is
    fixed: token-major unless said otherwise."""

    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 16
    kv_cache_memory: str | None = None
    page_size: str | None = None
    max_num_batched_tokens: int | None = None
    head_major: bool = False
    layers_per_stream: int | None = 1
    kv_together: bool = False
    guard: bool = False
    poison: bool = False

    @property
    def place(self) -> str:
        """Where the model is loaded, and its cache opened."""
        return "cpu" if self.device == "auto" else self.device


def open_cache(loaded: LoadedModel, options: EngineOptions) -> KVCache:
    """A cache for `loaded`, where its weights are.

    Unless one is given, the budget is half of what the machine has left; of a GPU, nine tenths less what is in use.

    Raises: as `LLM` does.
    """
    shape = loaded.geometry
    layout = shape.layout(
        loaded.dtype,
        options.max_num_seqs,
        shape.longest_request(options.max_model_len),
        head_major=options.head_major,
        layers_per_stream=options.layers_per_stream,
        kv_together=options.kv_together,
    )
    default = default_budget(layout) if loaded.device.type == "cpu" else None
    return KVCache(
        layout,
        device=loaded.device,
        memory=options.kv_cache_memory or default,
        page_size=options.page_size,
        guard=options.guard,
        poison=options.poison,
    )


def open_engine(loaded: LoadedModel, cache: KVCache, runner: Runner, options: EngineOptions) -> Engine:
    """An engine that feeds `runner` from `cache`. Raises ConfigError for more slots than tokens in a pass."""
    rows = options.max_num_batched_tokens
    return Engine(
        runner,
        cache,
        vocab_size=loaded.geometry.vocab_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=max(_BATCHED_TOKENS, options.max_num_seqs) if rows is None else rows,
        max_model_len=cache.layout.max_model_len,
        eos_token_ids=loaded.eos_token_ids,
    )


def step(engine: Engine) -> list[Request]:
    """One forward pass. Raises what a request fails of: a measurement with a request less measures something else."""
    moved = engine.step()
    for sample in moved:
        if sample.error is not None:
            raise sample.error
    return moved
