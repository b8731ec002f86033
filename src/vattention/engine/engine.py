"""The loop: schedule, map, compute, sample. One owner; `step` is one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from vattention.cache import KVCache
from vattention.engine import sampler
from vattention.engine.request import Chunk, Request
from vattention.engine.runner import Runner
from vattention.engine.sampling_params import SamplingParams, whole
from vattention.engine.scheduler import Scheduler
from vattention.errors import InvalidRequest


class Engine:
    """Requests in, tokens out.

    Args:
        runner: the model.
        cache: where its K and V live; nobody else may hold slots in it.
        vocab_size: token ids are below it.
        max_num_seqs: requests in one pass.
        max_num_batched_tokens: rows in one pass, at least `max_num_seqs`.
        max_model_len: tokens of one request, prompt and output.
        eos_token_ids: what ends a text, unless `ignore_eos`.
        seed: of requests that bring none.
    """

    def __init__(
        self,
        runner: Runner,
        cache: KVCache,
        *,
        vocab_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Collection[int] = (),
        seed: int = 0,
    ) -> None:
        self.scheduler = Scheduler(
            cache,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
        )
        self._runner = runner
        self._cache = cache
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seed = seed
        self._added = 0
        self._requests: dict[str, Request] = {}

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        """The prompt as a tuple of ints, if this engine can serve it.

        Raises:
            TypeError: not token ids, or not SamplingParams. InvalidRequest: empty, a token outside the vocabulary,
                or longer than can ever fit.
        """
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, not {type(params).__name__}")
        if isinstance(prompt_token_ids, (str, bytes)) or not hasattr(prompt_token_ids, "__iter__"):
            raise TypeError(f"prompt_token_ids must be a sequence of ints, not {type(prompt_token_ids).__name__}")
        prompt = tuple(whole("a prompt token id", t, at_least=0, below=self._vocab_size) for t in prompt_token_ids)
        if not prompt:
            raise InvalidRequest("the prompt is empty: give at least one token")
        needed = len(prompt) + 1
        if needed > self._max_model_len:
            raise InvalidRequest(
                f"a prompt of {len(prompt)} tokens and one more do not fit max_model_len={self._max_model_len}:"
                " shorten the prompt or raise max_model_len"
            )
        capacity = self._cache.capacity()
        if needed > capacity:
            raise InvalidRequest(
                f"a prompt of {len(prompt)} tokens and one more can never fit: the KV budget holds {capacity} tokens:"
                " shorten the prompt or raise kv_cache_memory"
            )
        return prompt

    def add_request(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, request_id: str | None = None
    ) -> Request:
        """Queue a request; `step` moves it on, and the returned object shows how far it is.

        Raises: as `check`, and InvalidRequest for a `request_id` that is in use.
        """
        prompt = self.check(prompt_token_ids, params)
        name = str(self._added) if request_id is None else request_id
        if name in self._requests:
            raise InvalidRequest(f"request_id {name!r} is in use by an unfinished request")
        seed = params.seed
        if seed is None:
            seed = int(sampler.random_bits([self._seed], [0], [self._added])[0])
        request = Request(name, prompt, params, seed)
        self._added += 1
        self._requests[name] = request
        self.scheduler.add(request)
        return request

    def abort(self, request_id: str) -> bool:
        """End a request between two steps, giving its slot back; False when there is none of that name (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._end(request)
        return True

    def step(self) -> list[Request]:
        """One forward pass. Returns the requests that got a token or ended, in no particular order.

        Whatever goes wrong, nothing leaks: requests that held a slot are aborted and their slots given back, those
        that wait are unharmed, and the engine can go on.

        Raises:
            OutOfPages: see `Scheduler.schedule`. Anything that the model raises.
        """
        try:
            before = list(self._requests.values())
            chunks = self.scheduler.schedule()
            moved = [request for request in before if request.finished]
            if chunks:
                # While the model computes, the next pass's pages are mapped: no driver call between two tokens.
                self.scheduler.prefetch(chunks)
                logits = self._runner.forward(chunks)
                moved += self._commit(chunks, self._sample(chunks, logits))
        except BaseException:
            for request in list(self._requests.values()):
                if request.slot is not None or request.finished:
                    self._end(request)
            raise
        for request in moved:
            if request.finished:
                self._end(request)
        return moved

    def warmup(self) -> None:
        """One small forward pass of a throwaway request, so that the first real one does not pay for set-up.

        Raises:
            InvalidRequest: requests are under way.
        """
        if self._requests:
            raise InvalidRequest("warm up before requests are added")
        request = Request("warmup", (0, 0), SamplingParams(), seed=0)
        slot = self._cache.alloc()
        if slot is None:
            raise InvalidRequest("no slot is free: somebody else uses this engine's cache")
        try:
            self._cache.step({slot: request.num_tokens})
            self._runner.forward([Chunk(request, slot, 0, request.num_tokens)])
        finally:
            self._cache.free(slot)

    def _sample(self, chunks: Sequence[Chunk], logits: torch.Tensor) -> list[int]:
        rows = [sampler.Row(c.request.params.temperature, c.request.seed, position=c.end) for c in chunks if c.samples]
        return sampler.sample(logits, rows)

    def _commit(self, chunks: Sequence[Chunk], tokens: Sequence[int]) -> list[Request]:
        """Note what was computed, hand the new tokens out, and see who is done."""
        sampled = [chunk.request for chunk in chunks if chunk.samples]
        for chunk in chunks:
            chunk.request.computed = chunk.end
        for request, token in zip(sampled, tokens, strict=True):
            request.output_token_ids.append(token)
            ends = token in self._eos_token_ids and not request.params.ignore_eos
            if ends or token in request.params.stop_token_ids:
                request.finish_reason = "stop"
            elif self.scheduler.last_token(request, len(request.output_token_ids)):
                request.finish_reason = "length"
        return sampled

    def _end(self, request: Request) -> None:
        """Forget a request, giving its slot back. One that has not finished is aborted."""
        request.finish_reason = request.finish_reason or "abort"
        self._requests.pop(request.request_id, None)
        self.scheduler.release(request)
