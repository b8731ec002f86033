"""The offline front door: a model, its engine, `generate` and `chat`. `AsyncLLM` is the same for asyncio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import torch

from vattention.async_llm import AsyncLLM
from vattention.cache import CacheStats
from vattention.cache.choosing import Choice
from vattention.engine.chat import Message
from vattention.engine.engine import Engine
from vattention.engine.opening import LLMOptions, Model, OpenEngine, open_engine
from vattention.engine.outputs import RequestOutput
from vattention.engine.prompts import Prompt, TokenizedPrompt, naming, tokenize, tokenize_chat
from vattention.engine.request import Request
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import InvalidRequest

__all__ = ["LLM", "AsyncLLM", "Prompt"]

T = TypeVar("T")


class LLM:
    """A model that generates text, its KV cache in virtual memory.

    Args:
        model: a directory, a .gguf file, a hub id, None for the demo model, or a `LoadedModel` to share weights.
        dtype: "auto" (the default), "float32", "bfloat16", "float16" or the torch dtype.
        device: "cpu", "cuda", "cuda:N", or "auto": a GPU where there is one that can hold a cache, else the CPU. What
            has run on a GPU is in docs/gpu.md.
        max_model_len: tokens of the longest request, prompt and output; None: the model's maximum. Only virtual
            memory is reserved for it.
        max_num_seqs: requests computed at once; None: 16, or max_num_batched_tokens where that is less.
        kv_cache_memory: physical memory for K and V, bytes or a string like "2GiB"; None: half of what is left after
            the weights, or the whole reservation where that is less; of a GPU, what `memory_utilization` leaves.
        page_size: bytes or a string, None to let the cache choose.
        cache: "virtual", or "paged": K and V in blocks behind a block table, taken up front, as other engines keep
            them. For comparison; it takes none of page_size, guard and what is about the layout.
        block_size: tokens of a block where cache is "paged"; None: 16.
        enable_prefix_caching: not built yet.
        compile: compile the model's layers, which takes the processors for some seconds; passes are faster from then
            on. True: in the background, from the start. None, the default: on a CPU, when `warmup` is called. Where it
            is not possible there is one warning. With cuda_graphs opening waits for it. On a CPU weights in bfloat16
            and float16 are copied for it, into another order, if that takes at most half of the memory left.
        cuda_graphs: of a GPU: capture passes of decodes into CUDA graphs when opening, which takes seconds; on unless
            False. Where that is not possible there is one warning. On a CPU False keeps compiled decode passes from
            being recorded and replayed. Tokens are the same with and without.
        memory_utilization: share of a GPU's memory that is in use when the cache is full, 0.9 by default: weights,
            graphs, the largest pass and whatever else is there count. Not with kv_cache_memory.
        seed: of requests whose `SamplingParams` have none; 0.
        trust_remote_code: see `load_model`.
        attention_kernel: None or "auto" picks the fastest for each layer. A name asks for one kernel: "flash" (torch's
            own FlashAttention), "flex", "flashinfer", "flash-attn-2", "flash-attn-3", "sdpa" or "blocked". What does
            not run on the device, is not installed, or does not compute the model's attention is refused.
        max_num_batched_tokens: tokens in one forward pass; longer prompts are computed in chunks.
        head_major, layers_per_stream, kv_together: the layout, see `KVLayout`; "auto", the default of each, chooses it
            with the page, and says so in a line. `layers_per_stream=None` means all.
        expected_tokens: of a typical request, prompt and output, for that choice; None: max_model_len.
        guard: make a read outside mapped memory crash. For tests.
        poison: fill mapped memory at or past each request's length with NaN before each pass. For tests.

    Raises:
        ConfigError: an option that cannot work, is not built, or a model that cannot be read.
        UnsupportedModel: a model this engine would not compute exactly.
    """

    def __init__(self, model: Model = None, **options: Unpack[LLMOptions]) -> None:
        self._open: OpenEngine | None = None
        self._open = open_engine(model, **options)
        self._tokenizer = self._open.loaded.tokenizer

    @property
    def engine(self) -> Engine:
        """The engine, for callers that add requests and step themselves. Raises InvalidRequest once closed."""
        return self._opened().engine

    @property
    def model(self) -> torch.nn.Module:
        """The network of transformers, its attention replaced by ours; for callers that hook into its
        passes. Raises InvalidRequest once closed.
        """
        return self._opened().loaded.model

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer of transformers, or None for a model that came without."""
        return self._tokenizer

    def stats(self) -> CacheStats:
        """Bytes, pages and driver calls of the KV cache. Raises InvalidRequest once closed."""
        return self._opened().cache.stats()

    @property
    def layout(self) -> Choice | None:
        """How K and V lie in memory, and why: None for a paged cache. Raises InvalidRequest once closed."""
        return self._opened().layout

    def warmup(self) -> None:
        """Return when every path that is made ready on first use is ready. Raises InvalidRequest once closed."""
        self.engine.warmup()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Continue each prompt.

        Args:
            prompts: one prompt or a sequence of them, see `Prompt`.
            sampling_params: one for all, one for each, or None for the defaults.
            use_tqdm: show a progress bar on stderr.
            priority: one for all or one for each; lower numbers are served earlier, equal ones in order.

        Returns:
            One output a prompt, in order.

        Raises:
            TypeError, InvalidRequest: a prompt or parameters that cannot be served; nothing has run then.
            OutOfPages, or whatever else one of the prompts fails of, see `Engine.step`. After any error,
                KeyboardInterrupt included, none of these prompts is left in the engine.
        """
        engine = self.engine
        given = [prompts] if isinstance(prompts, (str, Mapping)) else prompts
        if not isinstance(given, Sequence):
            raise TypeError(f"prompts must be a prompt or a sequence of them, not {type(prompts).__name__}")
        tokenized = []
        for i, prompt in enumerate(given):
            with naming(f"prompt {i}", len(given)):
                tokenized.append(tokenize(self.tokenizer, prompt))
        return _generate(engine, tokenized, sampling_params, priority, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer conversations, put into the model's chat template.

        Args:
            messages: one conversation, a sequence of `{"role": ..., "content": ...}`, or a sequence of conversations.
            sampling_params, use_tqdm, priority: as in `generate`.
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
        tokenized = []
        for i, conversation in enumerate(conversations):
            with naming(f"conversation {i}", len(conversations)):
                tokenized.append(
                    tokenize_chat(
                        self.tokenizer,
                        conversation,
                        template=chat_template,
                        add_generation_prompt=add_generation_prompt,
                        **template_options,
                    )
                )
        return _generate(engine, tokenized, sampling_params, priority, use_tqdm)

    def close(self) -> None:
        """Give the memory of the KV cache back. Idempotent; anything but `close` raises InvalidRequest afterwards."""
        opened, self._open = self._open, None
        if opened is not None:
            opened.cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self) -> OpenEngine:
        if self._open is None:
            raise InvalidRequest("this LLM is closed")
        return self._open


def _generate(
    engine: Engine,
    prompts: Sequence[TokenizedPrompt],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    priority: int | Sequence[int],
    use_tqdm: bool,
) -> list[RequestOutput]:
    """Check all, add all, and step until all have ended."""
    count = len(prompts)
    default = SamplingParams() if sampling_params is None else sampling_params
    params = _one_each("sampling_params", default, SamplingParams, count)
    priorities = _one_each("priority", priority, int, count)
    ids = []
    for i, prompt in enumerate(prompts):
        with naming(f"prompt {i}", count):
            ids.append(engine.check(prompt.token_ids, params[i]))
    requests: list[Request] = []
    try:
        for i, token_ids in enumerate(ids):
            with naming(f"prompt {i}", count):
                requests.append(engine.add_request(token_ids, params[i], priority=priorities[i]))
        _run(engine, requests, use_tqdm)
    except BaseException:
        for request in requests:
            engine.abort(request.request_id)
        raise
    return [engine.output(request, prompt.text) for request, prompt in zip(requests, prompts, strict=True)]


def _run(engine: Engine, requests: Sequence[Request], use_tqdm: bool) -> None:
    """Step until all of `requests` have ended."""
    from tqdm.auto import tqdm

    with tqdm(total=len(requests), desc="Prompts", unit="prompt", disable=not use_tqdm) as bar:
        left = set(requests)
        while left:
            for sample in engine.step():
                if sample.error is not None and sample.family[0] in left:
                    raise sample.error
            done = {request for request in left if request.all_finished}
            left -= done
            bar.set_postfix_str(
                f"{sum(len(s.output_token_ids) for r in requests for s in r.family)} tokens", refresh=False
            )
            bar.update(len(done))


def _one_each(what: str, given: T | Sequence[T], kind: type[T], count: int) -> Sequence[T]:
    """`given` once for each prompt, whether it was one for all or one for each."""
    if isinstance(given, kind):
        return [given] * count
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise TypeError(f"{what} must be {kind.__name__} or a sequence of them, not {type(given).__name__}")
    if len(given) != count:
        raise InvalidRequest(f"{count} prompts and {len(given)} {what}: give one, or one for each")
    return given
