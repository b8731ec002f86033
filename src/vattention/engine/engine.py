"""The loop: schedule, map, compute, sample. One owner; `step` is one forward pass."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from vattention.cache import Cache
from vattention.engine.adjustment import Adjuster
from vattention.engine.answer import Seen, request_output, update_text
from vattention.engine.attempt import attempt
from vattention.engine.constraint import Constraint
from vattention.engine.detokenizer import Vocabulary
from vattention.engine.grammar import Grammars
from vattention.engine.outputs import RequestOutput
from vattention.engine.randomness import random_bits
from vattention.engine.reading import New, Reading, read
from vattention.engine.request import Chunk, Request
from vattention.engine.runner import Runner
from vattention.engine.sampling_params import SamplingParams, whole
from vattention.engine.scheduler import Scheduler
from vattention.engine.snapshot import Snapshot, take_snapshot
from vattention.engine.tally import Tally
from vattention.errors import InvalidRequest, PromptTooLong


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
        tokenizer: of transformers; without one there is no text, no stop string can be found, and no form kept to.
    """

    def __init__(
        self,
        runner: Runner,
        cache: Cache,
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
        self._grammars = Grammars(tokenizer, vocab_size, self._eos_token_ids)
        self._added = 0
        self._tally = Tally()
        self._requests: dict[str, Request] = {}

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        """The prompt as a tuple of ints, if this engine can serve it.

        Any thread may ask. Reading the form of a structured answer can take tenths of a second, the first time.

        Raises:
            TypeError: not token ids, or not SamplingParams. InvalidRequest: empty, a token outside the vocabulary,
                or longer than can ever fit; parameters that name tokens outside it, or stop strings where there is no
                tokenizer; a structured output that cannot be read, see `Grammars.read`.
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
            raise PromptTooLong(
                f"a prompt of {len(prompt)} tokens and one more do not fit max_model_len={self._max_model_len}:"
                " shorten the prompt or raise max_model_len"
            )
        capacity = self._cache.capacity()
        if needed > capacity:
            raise PromptTooLong(
                f"a prompt of {len(prompt)} tokens and one more can never fit: the KV budget holds {capacity} tokens:"
                " shorten the prompt or raise kv_cache_memory"
            )
        if params.structured is not None:
            self._grammars.read(params.structured)
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
        grammar = None if params.structured is None else self._grammars.read(params.structured)
        family: list[Request] = []
        now, since_epoch = time.monotonic(), time.time()
        for sample in range(params.n):
            constraint = None if grammar is None else Constraint(grammar, ends, params.min_tokens)
            Request(
                request_id=name,
                prompt_token_ids=prompt,
                params=params,
                seed=seed,
                sample=sample,
                ends=ends,
                number=self._added,
                priority=priority,
                family=family,
                adjuster=Adjuster.needed(prompt, params, ends, constraint),
                constraint=constraint,
                arrival=now,
                arrival_time=since_epoch,
            )
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
        for sample in request.family:
            self._end(sample)
        return True

    def output(self, request: Request, prompt: str | None = None, seen: Seen | None = None) -> RequestOutput:
        """What has come of a request so far, all samples of it.

        Args:
            request: what `add_request` returned.
            prompt: the text of its prompt, to be handed through.
            seen: one object for each reader who wants what is new only: see `request_output`.
        """
        return request_output(request, self._vocabulary, prompt, seen)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return self._max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._vocab_size

    def snapshot(self) -> Snapshot:
        """Who waits and runs, the slots, the memory, and what was done so far. Cheap, and changes nothing."""
        return take_snapshot(self.scheduler, self._cache, self._tally)

    def step(self) -> list[Request]:
        """One forward pass. Returns what got a token or ended, in no particular order: each sample of a request.

        A request that cannot go on ends alone, with finish_reason "error" and the reason in its `error`; the others
        lose nothing. When a pass of several requests fails, they give their slots back and the next passes compute
        each of them alone: their tokens are the same, and the one that fails alone ends.

        Raises:
            KeyboardInterrupt, SystemExit, and InvalidRequest once the cache is closed: requests that held a slot are
            aborted and their slots given back, those that wait are unharmed, and the engine can go on.
        """
        try:
            moved: list[Request] = []
            chunks = self.scheduler.schedule()
            if chunks:
                reading = attempt(lambda: self._compute(chunks))
                if isinstance(reading, Exception):
                    self.scheduler.set_back(chunks, reading)
                else:
                    self._note(chunks, reading)
                    moved = reading.samples
        except BaseException:
            self._abort_the_harmed()
            raise
        moved = list(dict.fromkeys([*moved, *self.scheduler.ended()]))
        for sample in moved:
            if sample.finished:
                self._end(sample)
        return moved

    def warmup(self, *, wait: bool = True) -> None:
        """Whatever is made ready on first use, made ready: compiled code, graphs, and a small forward pass.

        Args:
            wait: for what is being compiled; otherwise it goes on in the background, while requests are served.

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
            self._runner.get_ready(slot, wait=wait)
            self._runner.forward([Chunk(request, slot, 0, request.num_tokens)])
        finally:
            self._cache.free(slot)

    def _compute(self, chunks: list[Chunk]) -> Reading:
        """The forward pass and what comes of it. No request is changed, but for `scheduled`: it can be done again."""
        now = time.monotonic()
        for chunk in chunks:
            if chunk.request.scheduled is None:
                chunk.request.scheduled = now
        # While the model computes, the next pass's pages are mapped: no driver call between two tokens.
        self.scheduler.prefetch(chunks)
        text_of = None if self._vocabulary is None else self._vocabulary.text_of
        return read(chunks, self._runner.forward(chunks), text_of)

    def _note(self, chunks: Sequence[Chunk], reading: Reading) -> None:
        """Hand new tokens out, and see who is done. What fails here fails for one request alone."""
        self._tally.passed(chunks)
        for chunk, score in zip(chunks, reading.scores, strict=True):
            chunk.request.computed = chunk.end
            chunk.request.suspect &= not chunk.samples
            if isinstance(score, Exception):
                self.scheduler.fail(chunk.request, score)
            else:
                chunk.request.prompt_logprobs += score
        now = time.monotonic()
        for sample, new in zip(reading.samples, reading.new, strict=True):
            if sample.error is not None:
                continue
            error = new if isinstance(new, Exception) else attempt(partial(self._append, sample, new, now))
            if error is not None:
                sample.finish_reason = sample.stop_reason = None  # it may have got as far as an end
                self.scheduler.fail(sample, error)
        for leader in [sample for sample in reading.samples if sample.unbranched and sample.error is None]:
            leader.unbranched = False
            others = [other for other in leader.family[1:] if not other.finished]
            error = attempt(partial(self.scheduler.branch, leader, others))
            if error is not None:
                self.scheduler.fail(leader, error)

    def _append(self, sample: Request, new: New, now: float) -> None:
        sample.output_token_ids.append(new.token)
        sample.scheduled = sample.scheduled or sample.family[0].scheduled  # its first pass was the leader's
        sample.token_times.append(now)
        self._tally.token(sample)
        if new.logprobs is not None:
            sample.logprobs.append(new.logprobs)
        self._see_whether_it_ends(sample, new.token)

    def _see_whether_it_ends(self, sample: Request, token: int) -> None:
        if token in sample.ends:
            sample.finish_reason = "stop"
            sample.stop_reason = token if token in sample.params.stop_token_ids else None
        elif sample.constraint is not None and sample.constraint.complete(sample.output_token_ids):
            sample.finish_reason = "stop"
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

    def _abort_the_harmed(self) -> None:
        """End whoever is not safely in the queue."""
        for sample in self.scheduler.ended():
            self._end(sample)
        waiting = set(self.scheduler.waiting)
        for leader in list(self._requests.values()):
            ahead = [leader] if leader.unbranched else leader.family
            if not all(sample.finished or sample in waiting for sample in ahead) or leader.all_finished:
                for sample in leader.family:
                    # In a cache that is closed there is no slot to give back; what is raised is why we are here.
                    attempt(partial(self._end, sample))

    def _end(self, sample: Request) -> None:
        """Be done with a sample, giving its slot back. One that has not finished is aborted."""
        sample.finish_reason = sample.finish_reason or "abort"
        if sample.all_finished and self._requests.pop(sample.request_id, None) is not None:
            self._tally.over(sample.family[0])
        self.scheduler.release(sample)
