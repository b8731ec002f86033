"""The front door for asyncio: outputs as they come, for as many readers as there are."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from vattention.cache import CacheStats
from vattention.engine.answer import joined
from vattention.engine.chat import Message
from vattention.engine.loop import EngineLoop
from vattention.engine.opening import LLMOptions, Model, open_engine
from vattention.engine.outputs import RequestOutput
from vattention.engine.prompts import Prompt, TokenizedPrompt, tokenize, tokenize_chat
from vattention.engine.sampling_params import RequestOutputKind, SamplingParams
from vattention.engine.snapshot import Snapshot

_UNREAD = 64
"""Deltas that are kept apart for a reader that does not come; more are made one."""


T = TypeVar("T")

_SHORT = 2048
"""Characters, or tokens, of a prompt that the event loop makes ready itself."""


class AsyncLLM:
    """A model that serves many readers at once, its KV cache in virtual memory.

    >>> async with AsyncLLM(kv_cache_memory="512MiB") as llm:
    ...     async for output in llm.generate("Once upon a time", SamplingParams(max_tokens=64)):
    ...         print(output.outputs[0].text)  # all of it so far

    The engine computes in a thread of its own and no event loop waits for it. It belongs to no event loop: any number
    of them, in any threads, one after the other or at the same time, may use one AsyncLLM. Opening it takes as long as
    loading the model does; inside an event loop, `await asyncio.to_thread(AsyncLLM, model)` keeps the others going.

    One that is dropped without `close` ends its thread and gives its memory back when it is collected. After `os.fork`
    the child cannot use it.

    Args:
        model, options: as those of `LLM`. Errors too.
    """

    def __init__(self, model: Model = None, **options: Unpack[LLMOptions]) -> None:
        opened = open_engine(model, **options)
        try:
            self._bell = _Bell()
            self._loop = EngineLoop(opened.engine, together=self._bell.once)
        except BaseException:
            opened.cache.close()
            raise
        self._engine = opened.engine
        self._cache = opened.cache
        self._tokenizer = opened.loaded.tokenizer
        self._close_once = threading.Lock()
        # Collection may happen in any thread at any moment, so it does not wait: the cache goes with the thread.
        self._dropped = weakref.finalize(self, self._loop.stop)
        self._dropped.atexit = False  # the loop sees to that itself

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer of transformers, or None for a model that came without."""
        return self._tokenizer

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return self._engine.max_model_len

    @property
    def max_num_seqs(self) -> int:
        """Requests computed at once."""
        return self._cache.layout.max_num_seqs

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._engine.vocab_size

    @property
    def running(self) -> bool:
        """Whether requests are taken: not closed, and the engine has not stopped."""
        return self._loop.running

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> TokenizedPrompt:
        """The token ids of a prompt, not checked; the event loop does not wait for long ones.

        Raises: TypeError, InvalidRequest: see `generate`.
        """
        make = partial(tokenize, self._tokenizer, prompt, add_special_tokens=add_special_tokens)
        return await _aside(make, here=_is_short(prompt))

    async def tokenize_chat(self, messages: Sequence[Message], **options: Any) -> TokenizedPrompt:
        """The text of a conversation in the model's chat template, and its token ids. Options and errors: `chat`."""
        options["template"] = options.pop("chat_template", None)
        return await asyncio.to_thread(partial(tokenize_chat, self._tokenizer, messages, **options))

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continue a prompt: outputs as they come, the last one `finished`.

        Each holds everything so far, or what `SamplingParams.output_kind` says. The request is handed in when the first
        output is asked for. A reader that is slower than the engine gets the newest output, not all of them; of
        deltas, all that it has missed in one. Closing the generator, leaving the loop over it or cancelling the task
        that reads it aborts the request; where it may live on in a variable, close it: `contextlib.aclosing`.

        Args:
            prompt: see `Prompt`.
            sampling_params: None for the defaults.
            request_id: a name that no unfinished request has; None: a new one.
            priority: lower numbers are served earlier, equal ones in order of arrival.

        Raises:
            TypeError, InvalidRequest: a prompt or parameters that cannot be served, a name that is in use, or this
                AsyncLLM is closed.
            EngineError: the engine failed with this request in it, or was closed, or has stopped for good.
            OutOfPages, or what else the engine raises for this request alone.
        """
        make = partial(tokenize, self._tokenizer, prompt)
        return self._outputs(make, sampling_params, request_id, priority, short=_is_short(prompt))

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation, put into the model's chat template: `generate` with the arguments of `LLM.chat`.

        Args:
            messages: a sequence of `{"role": ..., "content": ...}`.
            sampling_params, request_id, priority: as in `generate`.
            chat_template: in place of the tokenizer's own.
            add_generation_prompt: begin the answer.
            template_options: what else the template knows, such as `tools`.

        Raises: as `generate`; InvalidRequest where there is no chat template, or it refuses the messages.
        """
        make = partial(
            tokenize_chat,
            self._tokenizer,
            messages,
            template=chat_template,
            add_generation_prompt=add_generation_prompt,
            **template_options,
        )
        return self._outputs(make, sampling_params, request_id, priority)

    async def abort(self, request_id: str) -> bool:
        """End a request by its name. Its reader gets a last output, with finish_reason "abort".

        Returns:
            Whether the engine had a request of that name, not ended.

        Raises:
            InvalidRequest: closed. EngineError: the engine has stopped.
        """
        return await asyncio.wrap_future(self._loop.abort_id(request_id))

    async def warmup(self, *, wait: bool = True) -> None:
        """Return when every path that is made ready on first use is ready.

        Args:
            wait: for what is being compiled; otherwise it goes on in the background, while requests are served.

        Raises:
            InvalidRequest: requests are under way, or closed.
        """
        await asyncio.wrap_future(self._loop.call(partial(self._engine.warmup, wait=wait)))

    def stats(self) -> CacheStats:
        """Bytes, pages and driver calls of the KV cache. Raises InvalidRequest once closed."""
        return self._cache.stats()

    async def snapshot(self) -> Snapshot:
        """Who waits and runs, the slots, the memory, and what was done so far, between two steps of the engine.

        It waits for the forward pass under way, and takes far less time than one.

        Raises:
            InvalidRequest: closed. EngineError: the engine has stopped.
        """
        return await asyncio.wrap_future(self._loop.call(self._engine.snapshot))

    def close(self) -> None:
        """End every request with an EngineError for its reader, and give the memory of the KV cache back. Idempotent.

        Waits for the forward pass under way: `async with` does that without holding up the event loop. Anything but
        `close` raises InvalidRequest afterwards.
        """
        self._dropped.detach()
        self._loop.close()
        with self._close_once:
            self._cache.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    async def _outputs(
        self,
        make: Callable[[], TokenizedPrompt],
        sampling_params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        *,
        short: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        params = SamplingParams() if sampling_params is None else sampling_params
        prompt = await _aside(
            partial(self._prepare, make, params), here=short and getattr(params, "structured", self) is None
        )
        mailbox = _Mailbox(self._bell, deltas=params.output_kind is RequestOutputKind.DELTA)
        ticket = self._loop.submit(
            prompt.token_ids, params, mailbox.put, request_id=request_id, priority=priority, prompt=prompt.text
        )
        try:
            while True:
                output = await mailbox.get()
                yield output
                if output.finished:
                    return
        finally:
            self._loop.abort(ticket)

    def _prepare(self, make: Callable[[], TokenizedPrompt], params: SamplingParams) -> TokenizedPrompt:
        text, token_ids = make()
        return TokenizedPrompt(text, self._engine.check(token_ids, params))


def _is_short(prompt: Prompt) -> bool:
    """Whether a prompt is made ready in well under a millisecond."""
    content: Any = prompt
    if isinstance(prompt, dict):
        content = prompt.get("prompt_token_ids", prompt.get("prompt"))
    return isinstance(content, (str, list, tuple)) and len(content) <= _SHORT


async def _aside(work: Callable[[], T], *, here: bool) -> T:
    """The result of `work`, done in a thread unless `here`. With all cores at work that costs milliseconds."""
    return work() if here else await asyncio.to_thread(work)


class _Bell:
    """Rings in event loops for the readers of one engine: once for all that a step brings.

    Each call into another thread is a write to a socket, which hands the interpreter over in the middle of the engine's
    work: one for every reader would cost more than what the readers do.
    """

    def __init__(self) -> None:
        self._held: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        self._holder: int | None = None  # the thread that rings later; any other one rings at once

    @contextmanager
    def once(self) -> Iterator[None]:
        """Ring at the end of the block for what this thread has rung for within it. One thread's alone."""
        self._holder = threading.get_ident()
        try:
            yield
        finally:
            self._holder = None
            held, self._held = self._held, {}
            for loop, calls in held.items():
                _call(loop, partial(_call_all, calls))

    def ring(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> bool:
        """Have `loop` call `call`. False when it has been closed."""
        if self._holder != threading.get_ident():
            return _call(loop, call)
        self._held.setdefault(loop, []).append(call)
        return not loop.is_closed()


def _call(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> bool:
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        if loop.is_closed():
            return False
        raise
    return True


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


class _Mailbox:
    """From the engine's thread to one reader in the event loop that is running now.

    Holds the newest news only, or where they are deltas, no more of them than there are tokens in the answer.
    """

    def __init__(self, bell: _Bell, *, deltas: bool) -> None:
        self._bell = bell
        self._loop = asyncio.get_running_loop()
        self._deltas = deltas
        self._lock = threading.Lock()  # held for moments, and by nobody who waits
        self._news: list[RequestOutput] = []
        self._error: BaseException | None = None
        self._reader: asyncio.Future[None] | None = None  # who waits
        self._ringing = False

    def put(self, news: RequestOutput | BaseException) -> bool:
        """Add news, or replace them. False when there is nobody left to read them."""
        with self._lock:
            if isinstance(news, BaseException):
                self._error = news
            elif self._deltas:
                self._news.append(news)
                if len(self._news) > _UNREAD:
                    self._news = [joined(self._news)]
            else:
                self._news = [news]
            if self._ringing:  # one call a reader waits in the event loop at most, however long that is busy
                return not self._loop.is_closed()
            self._ringing = True
        return self._bell.ring(self._loop, self.look)

    async def get(self) -> RequestOutput:
        """Wait for news. Raises them if they are an error."""
        while True:
            with self._lock:
                news, self._news = self._news, []
                if self._error is not None and not (news and self._deltas):
                    raise self._error
                if not news:
                    self._reader = reader = self._loop.create_future()
            if news:
                return joined(news)
            await reader

    def look(self) -> None:
        """Wake the reader, in its event loop."""
        with self._lock:
            self._ringing = False  # before the reader looks: news that come now are seen, later ones ring again
            reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)
