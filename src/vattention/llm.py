"""The offline front door: a model, its engine, `generate` and `chat`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch

from vattention.cache import CacheStats, KVCache, KVLayout
from vattention.engine.chat import Message, chat_text
from vattention.engine.engine import Engine
from vattention.engine.loading import LoadedModel, load_model, parse_dtype
from vattention.engine.outputs import RequestOutput
from vattention.engine.request import Request
from vattention.engine.runner import Runner
from vattention.engine.sampling_params import SamplingParams, whole
from vattention.errors import ConfigError, InvalidRequest
from vattention.memory.limits import memory_headroom
from vattention.memory.sizes import format_size, parse_size

Prompt = str | Mapping[str, Any]
"""Text, `{"prompt": text}` or `{"prompt_token_ids": [int, ...]}`."""

_DEFAULT_BATCHED_TOKENS = 512
"""Rows of a pass on a CPU: enough to keep matrix products efficient, few enough that decodes are not held up long."""

_DEFAULT_MEMORY_SHARE = 2
"""The default KV budget is the memory left after the weights, divided by this. Pages come on demand: a budget that is
not used costs nothing, and half leaves room for activations and for other processes."""


class LLM:
    """A model that generates text, its KV cache in virtual memory.

    Args:
        model: a directory, a .gguf file, a hub id, None for the demo model, or a `LoadedModel` to share weights.
        dtype: "auto", "float32", "bfloat16", "float16" or the torch dtype.
        device: "auto" or "cpu".
        max_model_len: tokens of the longest request, prompt and output; None: the model's maximum. Only virtual
            memory is reserved for it.
        max_num_seqs: requests computed at once.
        kv_cache_memory: physical memory for K and V, bytes or a string like "2GiB"; None: half of what is left after
            the weights, or the whole reservation where that is less.
        page_size: bytes or a string, None to let the cache choose.
        cache: "virtual".
        enable_prefix_caching, compile: not built yet.
        seed: of requests whose `SamplingParams` have none.
        trust_remote_code: see `load_model`.
        max_num_batched_tokens: tokens in one forward pass; longer prompts are computed in chunks.
        head_major, layers_per_stream, kv_together: the layout, see `KVLayout`.
        guard: make a read outside mapped memory crash. For tests.
        poison: fill mapped memory at or past each request's length with NaN before each pass. For tests.

    Raises:
        ConfigError: an option that cannot work, is not built, or a model that cannot be read.
        UnsupportedModel: a model this engine would not compute exactly.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LoadedModel | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        kv_cache_memory: int | str | None = None,
        page_size: int | str | None = None,
        cache: str = "virtual",
        enable_prefix_caching: bool = False,
        compile: bool = False,
        seed: int = 0,
        trust_remote_code: bool = False,
        max_num_batched_tokens: int | None = None,
        head_major: bool = False,
        layers_per_stream: int | None = 1,
        kv_together: bool = False,
        guard: bool = False,
        poison: bool = False,
    ) -> None:
        self._cache: KVCache | None = None
        self._engine: Engine | None = None
        _refuse_what_is_not_built(device, cache, enable_prefix_caching, compile)
        with _as_config_errors():
            max_num_seqs = whole("max_num_seqs", max_num_seqs, at_least=1)
            seed = whole("seed", seed, at_least=0, below=2**64)
            if max_model_len is not None:
                max_model_len = whole("max_model_len", max_model_len, at_least=2)
            rows = max_num_batched_tokens
            if rows is None:
                rows = max(_DEFAULT_BATCHED_TOKENS, max_num_seqs)
            rows = whole("max_num_batched_tokens", rows, at_least=1)
        budget = None if kv_cache_memory is None else parse_size(kv_cache_memory, "kv_cache_memory")
        page = None if page_size is None else parse_size(page_size, "page_size")

        if isinstance(model, LoadedModel):
            loaded = model
            if parse_dtype(dtype) not in (None, loaded.dtype):
                raise ConfigError(f"the model was loaded in {loaded.dtype}, not {dtype}")
        else:
            loaded = load_model(model, dtype=dtype, max_model_len=max_model_len, trust_remote_code=trust_remote_code)
        shape = loaded.geometry
        max_model_len = shape.longest_request(max_model_len)
        layout = shape.layout(
            loaded.dtype,
            max_num_seqs,
            max_model_len,
            head_major=head_major,
            layers_per_stream=layers_per_stream,
            kv_together=kv_together,
        )
        if budget is None:
            budget = _default_budget(layout)
        self._loaded = loaded
        self._cache = KVCache(layout, memory=budget, page_size=page, guard=guard, poison=poison)
        try:
            self._engine = Engine(
                Runner(loaded.model, self._cache),
                self._cache,
                vocab_size=shape.vocab_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=rows,
                max_model_len=max_model_len,
                eos_token_ids=loaded.eos_token_ids,
                seed=seed,
                tokenizer=loaded.tokenizer,
            )
            self._announce(layout, budget)
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> Engine:
        """The engine, for callers that add requests and step themselves. Raises InvalidRequest once closed."""
        if self._engine is None:
            raise InvalidRequest("this LLM is closed")
        return self._engine

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer of transformers, or None for a model that came without."""
        return self._loaded.tokenizer

    def stats(self) -> CacheStats:
        """Bytes, pages and driver calls of the KV cache. Raises InvalidRequest once closed."""
        if self._cache is None:
            raise InvalidRequest("this LLM is closed")
        return self._cache.stats()

    def warmup(self) -> None:
        """Return when every path that is made ready on first use is ready. Raises InvalidRequest once closed."""
        self.engine.warmup()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt.

        Args:
            prompts: one prompt or a sequence of them, see `Prompt`.
            sampling_params: one for all, one for each, or None for the defaults.
            use_tqdm: show a progress bar on stderr.

        Returns:
            One output a prompt, in order.

        Raises:
            TypeError, InvalidRequest: a prompt or parameters that cannot be served; nothing has run then.
            OutOfPages: see `Engine.step`. After any error, KeyboardInterrupt included, none of these prompts is left
                in the engine.
        """
        engine = self.engine
        given = [prompts] if isinstance(prompts, (str, Mapping)) else prompts
        if not isinstance(given, Sequence):
            raise TypeError(f"prompts must be a prompt or a sequence of them, not {type(prompts).__name__}")
        pairs = []
        for i, prompt in enumerate(given):
            with _naming(f"prompt {i}", len(given)):
                pairs.append(self._tokenize(prompt))
        return self._generate(engine, pairs, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer conversations, put into the model's chat template.

        Args:
            messages: one conversation, a sequence of `{"role": ..., "content": ...}`, or a sequence of conversations.
            sampling_params, use_tqdm: as in `generate`.
            chat_template: in place of the tokenizer's own.
            add_generation_prompt: begin the answer.
            template_options: what else the template knows, such as `tools`.

        Returns:
            One output a conversation, in order; `prompt` is the text that the template made.

        Raises: as `generate`; InvalidRequest where there is no chat template, or it refuses the messages.
        """
        engine = self.engine
        several = isinstance(messages, Sequence) and bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Any = messages if several and not isinstance(messages, (str, bytes)) else [messages]
        prompts: list[tuple[str | None, Sequence[int]]] = []
        for i, conversation in enumerate(conversations):
            with _naming(f"conversation {i}", len(conversations)):
                text = chat_text(
                    self.tokenizer,
                    conversation,
                    template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    **template_options,
                )
                # The template has written its own special tokens.
                ids = self._loaded.tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # type: ignore[misc]
                prompts.append((text, ids))
        return self._generate(engine, prompts, sampling_params, use_tqdm)

    def close(self) -> None:
        """Give the memory of the KV cache back. Idempotent; anything but `close` raises InvalidRequest afterwards."""
        self._engine = None
        cache, self._cache = self._cache, None
        if cache is not None:
            cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _generate(
        engine: Engine,
        prompts: Sequence[tuple[str | None, Sequence[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        """`generate` for prompts that have both a text, where there is one, and token ids."""
        params = _one_each(sampling_params, len(prompts))
        ids = []
        for i, (_, token_ids) in enumerate(prompts):
            with _naming(f"prompt {i}", len(prompts)):
                ids.append(engine.check(token_ids, params[i]))
        requests: list[Request] = []
        try:
            for token_ids, wanted in zip(ids, params, strict=True):
                requests.append(engine.add_request(token_ids, wanted))
            _run(engine, requests, use_tqdm)
        except BaseException:
            for request in requests:
                engine.abort(request.request_id)
            raise
        return [engine.output(request, text) for request, (text, _) in zip(requests, prompts, strict=True)]

    def _tokenize(self, prompt: object) -> tuple[str | None, Sequence[int]]:
        """The text, where it was one, and the token ids of a prompt."""
        if isinstance(prompt, Mapping):
            if len(prompt) != 1 or next(iter(prompt)) not in ("prompt", "prompt_token_ids"):
                raise InvalidRequest('a prompt dictionary has one key, "prompt" or "prompt_token_ids"')
            if "prompt_token_ids" in prompt:
                return None, prompt["prompt_token_ids"]
            prompt = prompt["prompt"]
        if not isinstance(prompt, str):
            raise TypeError(
                f"a prompt is a str or a dictionary, not {type(prompt).__name__};"
                ' token ids go into {"prompt_token_ids": [...]}'
            )
        if self.tokenizer is None:
            raise InvalidRequest("this model came without a tokenizer: pass prompt_token_ids")
        return prompt, self.tokenizer(prompt, verbose=False).input_ids

    def _announce(self, layout: KVLayout, budget: int) -> None:
        """One line about memory on stderr, and a warning where the longest request does not fit."""
        assert self._cache is not None
        capacity, stats = self._cache.capacity(), self._cache.stats()
        sys.stderr.write(
            f"vattention: {format_size(self._loaded.weight_bytes)} of weights"
            f" ({str(self._loaded.dtype).removeprefix('torch.')}{_origin(self._loaded)});"
            f" KV cache: {format_size(stats.reserved)} reserved for {layout.max_num_seqs} x {layout.max_model_len}"
            f" tokens, {format_size(budget)} physical budget, {capacity} tokens fit\n"
        )
        if layout.max_model_len > capacity:
            warnings.warn(
                f"max_model_len={layout.max_model_len} is more than the KV budget holds ({capacity} tokens): a request"
                ' that outgrows it ends with finish_reason "length"; raise kv_cache_memory or lower max_model_len',
                stacklevel=3,
            )


def _origin(loaded: LoadedModel) -> str:
    """That the weights were quantised, and what keeping them dequantised costs."""
    size = loaded.dequantised_from
    return "" if size is None else f", dequantised from {format_size(size)}"


def _run(engine: Engine, requests: Sequence[Request], use_tqdm: bool) -> None:
    """Step until all of `requests` have ended."""
    from tqdm.auto import tqdm

    with tqdm(total=len(requests), desc="Prompts", unit="prompt", disable=not use_tqdm) as bar:
        left = set(requests)
        while left:
            engine.step()
            done = {request for request in left if request.all_finished}
            left -= done
            bar.set_postfix_str(
                f"{sum(len(s.output_token_ids) for r in requests for s in r.family)} tokens", refresh=False
            )
            bar.update(len(done))


def _one_each(params: object, count: int) -> Sequence[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if isinstance(params, (str, bytes)) or not isinstance(params, Sequence):
        raise TypeError(f"sampling_params must be SamplingParams or a sequence of them, not {type(params).__name__}")
    if len(params) != count:
        raise InvalidRequest(f"{count} prompts and {len(params)} sampling_params: give one, or one for each")
    return params


def _default_budget(layout: KVLayout) -> int:
    """Physical bytes for the KV cache where the caller names none."""
    headroom = memory_headroom()
    return layout.size if headroom is None else max(1, min(layout.size, headroom // _DEFAULT_MEMORY_SHARE))


def _refuse_what_is_not_built(device: str, cache: str, enable_prefix_caching: bool, compile: bool) -> None:
    if device not in ("auto", "cpu"):
        raise ConfigError(f'device={device!r} is not built yet: use "cpu"')
    if cache != "virtual":
        raise ConfigError(f'cache={cache!r} is not built yet: use "virtual"')
    if enable_prefix_caching:
        raise ConfigError("enable_prefix_caching is not built yet: leave it off")
    if compile:
        raise ConfigError("compile is not built yet: leave it off")


@contextmanager
def _as_config_errors() -> Iterator[None]:
    """An option out of range is a matter of configuration, not of a request."""
    try:
        yield
    except InvalidRequest as error:
        raise ConfigError(str(error)) from None


@contextmanager
def _naming(what: str, count: int) -> Iterator[None]:
    """Say which prompt of several an error is about."""
    try:
        yield
    except (InvalidRequest, TypeError) as error:
        if count == 1:
            raise
        raise type(error)(f"{what}: {error}") from None
