"""The loop: schedule, map, compute, sample. One owner; `step` is one forward pass."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import torch

from vattention.cache import KVCache
from vattention.engine import sampler
from vattention.engine.adjustment import Adjuster
from vattention.engine.answer import request_output, update_text
from vattention.engine.detokenizer import Vocabulary
from vattention.engine.logprobs import top_logprobs
from vattention.engine.outputs import Logprob, RequestOutput
from vattention.engine.randomness import random_bits
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
        tokenizer: of transformers; without one there is no text, and no stop string can be found.
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
        tokenizer: Any | None = None,
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
        self._vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
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
                or longer than can ever fit; parameters that name tokens outside it, or stop strings where there is no
                tokenizer.
        """
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, not {type(params).__name__}")
        self._check_params(params)
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
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> Request:
        """Queue a request; `step` moves it on, and the returned object shows how far it is.

        Args:
            request_id: None: a new one.
            priority: requests with a lower number are served earlier, equal ones in order of arrival.

        Raises: as `check`, and InvalidRequest for a `request_id` that is in use.
        """
        priority = whole("priority", priority, at_least=-(2**63), below=2**63)
        prompt = self.check(prompt_token_ids, params)
        name = str(self._added) if request_id is None else request_id
        if name in self._requests:
            raise InvalidRequest(f"request_id {name!r} is in use by an unfinished request")
        seed = params.seed
        if seed is None:
            seed = int(random_bits([self._seed], [0], [self._added])[0])
        ends = self._ends(params)
        family: list[Request] = []
        now, since_epoch = time.monotonic(), time.time()
        for sample in range(params.n):
            request = Request(
                name, prompt, params, seed, sample, ends, priority, family, arrival=now, arrival_time=since_epoch
            )
            request.adjuster = Adjuster.needed(prompt, params, ends)
        leader = family[0]
        leader.unbranched = params.n > 1
        self._added += 1
        self._requests[name] = leader
        self.scheduler.add(leader)
        return leader

    def abort(self, request_id: str) -> bool:
        """End a request between two steps, giving its slots back; False when there is none of that name (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._end_all(request)
        return True

    def output(self, request: Request, prompt: str | None = None) -> RequestOutput:
        """What has come of a request so far, all samples of it.

        Args:
            request: what `add_request` returned.
            prompt: the text of its prompt, to be handed through.
        """
        return request_output(request, self._vocabulary, prompt)

    def step(self) -> list[Request]:
        """One forward pass. Returns what got a token or ended, in no particular order: each sample of a request.

        Whatever goes wrong, nothing leaks: requests that held a slot are aborted and their slots given back, those
        that wait are unharmed, and the engine can go on.

        Raises:
            OutOfPages: see `Scheduler.schedule`. Anything that the model raises.
        """
        try:
            before = [sample for leader in self._requests.values() for sample in leader.family if not sample.finished]
            chunks = self.scheduler.schedule()
            moved = [sample for sample in before if sample.finished]
            if chunks:
                now = time.monotonic()
                for chunk in chunks:
                    if chunk.request.scheduled is None:
                        chunk.request.scheduled = now
                # While the model computes, the next pass's pages are mapped: no driver call between two tokens.
                self.scheduler.prefetch(chunks)
                moved += self._commit(chunks, self._runner.forward(chunks))
        except BaseException:
            for leader in list(self._requests.values()):
                harmed = any(sample.slot is not None for sample in leader.family)
                # A leader that is given up before the others branch off takes them with it: nobody has queued them.
                if harmed or leader.all_finished or (leader.finished and leader.unbranched):
                    self._end_all(leader)
            raise
        for sample in moved:
            if sample.finished:
                self._end(sample)
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

    def _commit(self, chunks: Sequence[Chunk], logits: torch.Tensor) -> list[Request]:
        """Note what was computed, hand new tokens out, and see who is done. `logits`: see `Runner.forward`."""
        for chunk in chunks:
            chunk.request.computed = chunk.end
        samples, rows = self._score_prompts(chunks, logits)
        if rows != list(range(len(logits))):
            logits = logits[rows]
        tokens = sampler.sample(logits, [self._row(sample) for sample in samples])
        scored = [i for i, sample in enumerate(samples) if sample.params.logprobs is not None]
        if scored:
            part = logits if len(scored) == len(samples) else logits[scored]
            entries = self._logprobs(part, [tokens[i] for i in scored], [samples[i].params.logprobs for i in scored])
            for i, entry in zip(scored, entries, strict=True):
                samples[i].logprobs.append(entry)
        now = time.monotonic()
        for sample, token in zip(samples, tokens, strict=True):
            sample.output_token_ids.append(token)
            sample.token_times.append(now)
            self._see_whether_it_ends(sample, token)
        for leader in [sample for sample in samples if sample.unbranched]:
            leader.unbranched = False
            for other in leader.family[1:]:
                other.scheduled = leader.scheduled
            self.scheduler.branch(leader, [other for other in leader.family[1:] if not other.finished])
        return samples

    def _score_prompts(self, chunks: Sequence[Chunk], logits: torch.Tensor) -> tuple[list[Request], list[int]]:
        """Keep the log-probabilities of prompts. Returns who gets a token, and from which row of `logits`."""
        samples: list[Request] = []
        rows: list[int] = []
        row = 0
        for chunk in chunks:
            request, scored = chunk.request, chunk.scored
            if scored:
                part = logits[row : row + len(scored)]
                tokens = request.tokens(scored.start + 1, scored.stop + 1)
                wanted = [request.params.prompt_logprobs] * len(scored)
                request.prompt_logprobs += self._logprobs(part, tokens, wanted)
                row += len(scored)
            if chunk.samples:
                # The others have the same prompt, and so the same logits.
                new = request.family if request.unbranched else [request]
                samples += new
                rows += [row] * len(new)
                row += 1
        return samples, rows

    def _logprobs(
        self, logits: torch.Tensor, tokens: Sequence[int], wanted: Sequence[int | None]
    ) -> list[dict[int, Logprob]]:
        text_of = None if self._vocabulary is None else self._vocabulary.text_of
        return top_logprobs(logits, tokens, [count or 0 for count in wanted], text_of)

    @staticmethod
    def _row(sample: Request) -> sampler.Row:
        adjustment = None if sample.adjuster is None else sample.adjuster.next(sample.output_token_ids)
        return sampler.Row(sample.params, sample.seed, sample.num_tokens, sample.sample, adjustment)

    def _see_whether_it_ends(self, sample: Request, token: int) -> None:
        if token in sample.ends:
            sample.finish_reason = "stop"
            sample.stop_reason = token if token in sample.params.stop_token_ids else None
        elif self.scheduler.last_token(sample, len(sample.output_token_ids)):
            sample.finish_reason = "length"
        if sample.params.stop_strings:
            stop = update_text(sample, self._vocabulary, last=sample.finished)
            if stop is not None:
                sample.finish_reason, sample.stop_reason = "stop", stop

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_token_ids)

    def _check_params(self, params: SamplingParams) -> None:
        """Raises InvalidRequest for parameters that mean nothing to this model."""
        for what, tokens in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias or ())):
            for token in tokens:
                if token >= self._vocab_size:
                    raise InvalidRequest(f"{what} has token {token}, the model has {self._vocab_size} tokens")
        for what, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
            if count is not None and count > self._vocab_size:
                raise InvalidRequest(f"{what}={count} is more than the model's {self._vocab_size} tokens")
        if params.min_tokens and len(self._ends(params)) >= self._vocab_size:
            raise InvalidRequest(f"min_tokens={params.min_tokens} leaves no token to choose: all of them end the text")
        if params.stop_strings and self._vocabulary is None:
            raise InvalidRequest("stop strings need a tokenizer, and this model came without: use stop_token_ids")

    def _end_all(self, leader: Request) -> None:
        for sample in leader.family:
            self._end(sample)

    def _end(self, sample: Request) -> None:
        """Be done with a sample, giving its slot back. One that has not finished is aborted."""
        sample.finish_reason = sample.finish_reason or "abort"
        self.scheduler.release(sample)
        if sample.all_finished:
            self._requests.pop(sample.request_id, None)
