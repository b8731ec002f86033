"""From the options of `LLM` and `AsyncLLM` to an engine that is ready: a model, its cache, one line about memory."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import torch

from vattention.attention import choose
from vattention.cache import Cache, KVCache, KVLayout, PagedKVCache, choosing
from vattention.cache.choosing import Auto, Choice, Given
from vattention.cache.opening import look
from vattention.cache.paged import DEFAULT_BLOCK_SIZE
from vattention.engine.budget import activation_bytes, check_share, settle_budget
from vattention.engine.devices import pick_device
from vattention.engine.engine import Engine
from vattention.engine.graphs import CudaCapture
from vattention.engine.kernels import check_layers, named_kernel
from vattention.engine.loading import LoadedModel, load_model, parse_dtype
from vattention.engine.runner import Runner
from vattention.engine.sampling_params import whole
from vattention.errors import ConfigError, InvalidRequest
from vattention.memory.limits import memory_headroom
from vattention.memory.sizes import format_size, parse_size

_DEFAULT_SEQS = 16
"""Requests computed at once."""

_DEFAULT_BATCHED_TOKENS = 2048
"""Rows of a pass: enough to keep matrix products efficient, few enough that decodes are not held up long."""

_DEFAULT_MEMORY_SHARE = 2
"""The default KV budget is the memory left after the weights, divided by this. Pages come on demand: a budget that is
not used costs nothing, and half leaves room for activations and for other processes."""

Model = str | os.PathLike[str] | LoadedModel | None
"""A directory, a .gguf file, a hub id, None for the demo model, or a `LoadedModel` to share weights."""


class LLMOptions(TypedDict, total=False):
    """The options of `LLM` and `AsyncLLM`, for type checkers: meanings are in `LLM`, defaults in `open_engine`."""

    dtype: str | torch.dtype
    device: str
    max_model_len: int | None
    max_num_seqs: int | None
    kv_cache_memory: int | str | None
    page_size: int | str | None
    cache: str
    block_size: int | None
    enable_prefix_caching: bool
    compile: bool | None
    cuda_graphs: bool | None
    memory_utilization: float | None
    seed: int
    trust_remote_code: bool
    attention_kernel: str | None
    max_num_batched_tokens: int | None
    head_major: bool | Auto
    layers_per_stream: int | Auto | None
    kv_together: bool | Auto
    expected_tokens: int | None
    guard: bool
    poison: bool


@dataclass(frozen=True, eq=False)
class OpenEngine:
    """An engine, what its owner has to close: the cache, and why that is laid out as it is (unless it is paged)."""

    loaded: LoadedModel
    cache: Cache
    engine: Engine
    layout: Choice | None = None


def open_engine(
    model: Model = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    kv_cache_memory: int | str | None = None,
    page_size: int | str | None = None,
    cache: str = "virtual",
    block_size: int | None = None,
    enable_prefix_caching: bool = False,
    compile: bool | None = None,
    cuda_graphs: bool | None = None,
    memory_utilization: float | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    attention_kernel: str | None = None,
    max_num_batched_tokens: int | None = None,
    head_major: bool | Auto = "auto",
    layers_per_stream: int | Auto | None = "auto",
    kv_together: bool | Auto = "auto",
    expected_tokens: int | None = None,
    guard: bool = False,
    poison: bool = False,
) -> OpenEngine:
    """Load a model and open its cache and engine. Arguments and errors are those of `LLM`, which calls it."""
    place = _place(model, device)
    _refuse_what_is_not_built(enable_prefix_caching)
    if cuda_graphs and (place.type != "cuda" or cache == "paged"):
        raise ConfigError("cuda_graphs=True is for a GPU and the virtual cache: leave it out")
    graphs = place.type == "cuda" and cache != "paged" and cuda_graphs is not False
    check_share(memory_utilization, place, given=kv_cache_memory is not None)
    _check_cache(
        cache,
        block_size,
        page_size=page_size is not None,
        head_major=head_major not in (False, "auto"),
        layers_per_stream=layers_per_stream not in (1, "auto"),
        kv_together=kv_together not in (False, "auto"),
        expected_tokens=expected_tokens is not None,
        guard=guard,
    )
    kernel = named_kernel(attention_kernel, place, paged=cache == "paged")
    with _as_config_errors():
        if block_size is not None:
            block_size = whole("block_size", block_size, at_least=1)
        seed = whole("seed", seed, at_least=0, below=2**64)
        if max_model_len is not None:
            max_model_len = whole("max_model_len", max_model_len, at_least=2)
        if expected_tokens is not None:
            expected_tokens = whole("expected_tokens", expected_tokens, at_least=1)
        rows = max_num_batched_tokens
        if rows is not None:
            rows = whole("max_num_batched_tokens", rows, at_least=1)
        if max_num_seqs is None:  # each of them must get a row
            max_num_seqs = _DEFAULT_SEQS if rows is None else min(_DEFAULT_SEQS, rows)
        max_num_seqs = whole("max_num_seqs", max_num_seqs, at_least=1)
        if rows is None:
            rows = max(_DEFAULT_BATCHED_TOKENS, max_num_seqs)
    budget = None if kv_cache_memory is None else parse_size(kv_cache_memory, "kv_cache_memory")
    page = None if page_size is None else parse_size(page_size, "page_size")

    if isinstance(model, LoadedModel):
        loaded = model
        if parse_dtype(dtype) not in (None, loaded.dtype):
            raise ConfigError(f"the model was loaded in {loaded.dtype}, not {dtype}")
    else:
        loaded = load_model(
            model, dtype=dtype, device=place, max_model_len=max_model_len, trust_remote_code=trust_remote_code
        )
    shape = loaded.geometry
    layout = shape.layout(loaded.dtype, max_num_seqs, shape.longest_request(max_model_len))
    if budget is None and place.type == "cpu":
        budget = default_budget(layout)
    elif place.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps in reserve is not free to others, the cache among them
    choice: Choice | None = None
    kv_cache: Cache
    if cache == "paged":
        memory = look(place, budget, memory_utilization).budget
        size = block_size or DEFAULT_BLOCK_SIZE
        kv_cache = PagedKVCache(layout, memory=memory, device=place, block_size=size, poison=poison)
    else:
        given = Given(head_major, layers_per_stream, kv_together, page)
        found = look(place, budget, memory_utilization)
        choice = choosing.choose(layout, found, expected_tokens=expected_tokens, given=given)
        # Of a GPU, and without a size, the budget is provisional: graphs need the addresses to be there.
        kv_cache = KVCache(
            choice.layout,
            device=place,
            memory=budget,
            memory_utilization=memory_utilization,
            page_size=choice.page_size,
            guard=guard,
            poison=poison,
        )
    try:
        if kernel is not None:
            check_layers(kernel, loaded.model, kv_cache)
        runner = Runner(
            loaded.model,
            kv_cache,
            kernel=kernel or choose.prepare,
            compile=compile,
            capture=CudaCapture(place) if graphs else None,
            record=place.type == "cpu" and compile is not False and cuda_graphs is not False and kernel is None,
            plan=choose.decode_plan if kernel is None else partial(choose.decode_plan, kernel=kernel.name),
        )
        engine = Engine(
            runner,
            kv_cache,
            vocab_size=shape.vocab_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=rows,
            max_model_len=layout.max_model_len,
            eos_token_ids=loaded.eos_token_ids,
            seed=seed,
            tokenizer=loaded.tokenizer,
        )
        if graphs:
            engine.warmup()  # so that what they take is known before pages take it
            torch.cuda.empty_cache()  # of what the passes before each capture took
        if place.type == "cuda" and budget is None and isinstance(kv_cache, KVCache):
            taken = activation_bytes(loaded.model, rows, max_num_seqs)
            settle_budget(kv_cache, memory_utilization, taken)
        _announce(loaded, kv_cache, budget, choice)
    except BaseException:
        kv_cache.close()
        raise
    return OpenEngine(loaded, kv_cache, engine, choice)


def _announce(loaded: LoadedModel, cache: Cache, budget: int | None, choice: Choice | None) -> None:
    """A line about memory and one about the layout on stderr, and a warning where the longest request does not fit."""
    layout, capacity, stats = cache.layout, cache.capacity(), cache.stats()
    sys.stderr.write(
        f"vattention: {format_size(loaded.weight_bytes)} of weights"
        f" ({str(loaded.dtype).removeprefix('torch.')}{_origin(loaded)});"
        f" KV cache: {format_size(stats.reserved)} reserved for {layout.max_num_seqs} x {layout.max_model_len}"
        f" tokens, {format_size(stats.budget if budget is None else budget)} physical budget, {capacity} tokens fit\n"
    )
    if choice is not None:
        sys.stderr.write(f"vattention: {choice}\n")
    if layout.max_model_len > capacity:
        warnings.warn(
            f"max_model_len={layout.max_model_len} is more than the KV budget holds ({capacity} tokens): a request"
            ' that outgrows it ends with finish_reason "length"; raise kv_cache_memory or lower max_model_len',
            stacklevel=4,  # whoever makes the LLM
        )


def _origin(loaded: LoadedModel) -> str:
    """That the weights were quantised, and what keeping them dequantised costs."""
    size = loaded.dequantised_from
    return "" if size is None else f", dequantised from {format_size(size)}"


def default_budget(layout: KVLayout) -> int:
    """Physical bytes for the KV cache where the caller names none."""
    headroom = memory_headroom()
    return layout.size if headroom is None else max(1, min(layout.size, headroom // _DEFAULT_MEMORY_SHARE))


def _place(model: Model, device: str) -> torch.device:
    """The device that everything is on: that of the weights, where they are loaded already."""
    if not isinstance(model, LoadedModel):
        return pick_device(device)
    if device != "auto" and pick_device(device) != model.device:
        raise ConfigError(f"the model was loaded on {model.device}, not {device}: say so when loading it")
    return model.device


def _refuse_what_is_not_built(enable_prefix_caching: bool) -> None:
    if enable_prefix_caching:
        raise ConfigError("enable_prefix_caching is not built yet: leave it off")


def _check_cache(cache: str, block_size: int | None, **virtual: bool) -> None:
    """Raises ConfigError for a cache that there is not, or options of the other one; `virtual` says which are given."""
    if cache not in ("virtual", "paged"):
        raise ConfigError(f'cache={cache!r}: use "virtual" or "paged"')
    if cache == "virtual" and block_size is not None:
        raise ConfigError('block_size is for cache="paged": leave it out, or see page_size')
    given = [name for name, said in virtual.items() if said]
    if cache == "paged" and given:
        raise ConfigError(f'{", ".join(given)} mean nothing to cache="paged": leave them out')


@contextmanager
def _as_config_errors() -> Iterator[None]:
    """An option out of range is a matter of configuration, not of a request."""
    try:
        yield
    except InvalidRequest as error:
        raise ConfigError(str(error)) from None
