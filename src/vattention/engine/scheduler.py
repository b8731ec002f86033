"""Who runs next. Continuous batching with chunked prefill, by priority, then first come first served.

Every pass takes one token of each decoding request and fills what is left of `max_num_batched_tokens` with prompt
chunks, so that a long prompt never stalls the others (Sarathi-Serve, arXiv 2403.02310). Memory is asked for in tokens,
never in pages: `fits` before a request is admitted, `step` before a pass. Where `step` says no, the least urgent gives
its slot back and is computed again later; its generated tokens are kept.

A request that waits never takes the slot of one that runs, however urgent it is: priorities decide who is admitted
next and who gives way when memory is short. That is what users of vLLM's priority policy know.

Everybody gets to the end, because three things are bounded:

- Preemptions. Whoever has given way `MAX_PREEMPTIONS` times comes back only when all that it and the others in that
  state may ever need fits together, and they give way after everybody else; so not again, where `KVCache.fits` can be
  relied on. Where the machine has less memory than the budget it may happen once more, and then the request comes back
  when nobody else runs, and stays. So a request gives way `MAX_PREEMPTIONS` times, and `MAX_PREEMPTIONS + 1` at most.
- Overtaking. At most `MAX_PASSED` admissions in a row go past the oldest that waits; then it is next, whatever its
  priority. So later arrivals overtake a request at most `MAX_PASSED` times for each time that it waits and for each
  admission of an older one meanwhile. (With a count for each request instead, a long queue of requests that have waited
  would come before the urgent ones all at once.)
- Failures. A pass that fails is never tried again as it was: each of its requests is computed alone until it has a
  token more, and ends if that fails too. So between two failing passes that it shares, a request gets a token.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from vattention.cache import Cache
from vattention.engine.attempt import attempt
from vattention.engine.outputs import FinishReason
from vattention.engine.request import Chunk, Request
from vattention.errors import ConfigError, DriverError, OutOfPages

MAX_PREEMPTIONS = 3
"""How often a request gives way before it is promised all the memory it may need."""

MAX_PASSED = 32
"""Admissions in a row that may go past the oldest request that waits."""


def urgency(request: Request) -> tuple[int, int, int]:
    """Sorts requests, the most urgent first: priority, order of arrival, sample."""
    return request.priority, request.number, request.sample


class Scheduler:
    """Owns the queue and the slots of the requests in it.

    Attributes:
        waiting: the most urgent first.
        running: those that hold a slot, in order of admission.
        preemptions: how often a request had to give its slot back for lack of memory.
    """

    def __init__(self, cache: Cache, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={max_num_batched_tokens} cannot give each of max_num_seqs={max_num_seqs}"
                " requests a token: raise it, or lower max_num_seqs"
            )
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self._cache = cache
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._passed = 0
        self._ended: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request. It must be one that can fit when it is alone."""
        insort(self.waiting, request, key=urgency)

    def branch(self, request: Request, others: Sequence[Request]) -> None:
        """Start other samples of a running request: each continues the tokens that `request` has computed.

        Where a slot and memory are at hand, what is computed is shared (`KVCache.fork`). The others are queued, in
        their request's place, and compute it again.
        """
        place = self.running.index(request)
        assert request.slot is not None
        forks = True
        for other in others:
            slot = None
            if forks and len(self.running) < self._max_num_seqs:
                # After each of these nothing has changed, and computing again does without forks.
                with suppress(OutOfPages, DriverError):
                    slot = self._cache.fork(request.slot)
            if slot is None:
                forks = False
                self.add(other)
                continue
            other.slot, other.computed = slot, request.computed
            place += 1
            # Beside the one it came with: only the last may be at its prompt.
            self.running.insert(place, other)

    def release(self, request: Request) -> None:
        """Take a request out, wherever it is, and give its slot back. What it has generated stays with it."""
        if request in self.running:
            self.running.remove(request)
        else:
            place = bisect_left(self.waiting, urgency(request), key=urgency)
            if place < len(self.waiting) and self.waiting[place] is request:
                del self.waiting[place]
        slot, request.slot, request.computed = request.slot, None, 0
        if slot is not None:
            self._cache.free(slot)

    def schedule(self) -> list[Chunk]:
        """The next pass, with pages behind every token of it; decodes first, then prompt chunks.

        The list is empty when nobody is left. Who can never go on ends here, see `ended`: a request that has outgrown
        all of the memory, alone in it, with finish_reason "length", and one that fails alone with "error".
        """
        admit = True
        while self.running or self.waiting:
            chunks = self._plan(admit or not self.running)
            if not chunks:
                continue  # the one whose turn it was has failed
            refused = attempt(partial(self._cache.step, {chunk.slot: chunk.end for chunk in chunks}))
            if refused is None:
                return chunks
            if isinstance(refused, OutOfPages):
                # A request that has just made room must not take it back: where `fits` and `step` disagree, because
                # the machine has less than the budget, that would go on for ever.
                admit = False
                if len(self.running) > 1:
                    self._preempt()
                else:
                    self._give_up(self.running[0], refused)
            else:
                self.set_back(chunks, refused)
        return []

    def set_back(self, chunks: Sequence[Chunk], error: Exception) -> None:
        """A pass failed. Its requests give their slots back, to be computed alone; one that was alone ends."""
        if len(chunks) == 1:
            self.fail(chunks[0].request, error)
            return
        for chunk in chunks:
            chunk.request.suspect = True
            self._requeue(chunk.request)

    def fail(self, request: Request, error: Exception) -> None:
        """End all samples of a request that have not ended, with this error."""
        for sample in request.family:
            sample.error = error
            if not sample.finished:
                self._end(sample, "error")

    def ended(self) -> list[Request]:
        """Those that ended in `schedule`, `set_back` or `fail` since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def prefetch(self, chunks: list[Chunk]) -> None:
        """Have the pages of the pass after `chunks` mapped while this one computes (paper: background allocation)."""
        ahead: dict[int, int] = {}
        for chunk in chunks:
            request = chunk.request
            if not chunk.samples:
                ahead[chunk.slot] = min(request.num_tokens, chunk.end + self._max_num_batched_tokens)
            elif not self.last_token(request, len(request.output_token_ids) + 1):
                ahead[chunk.slot] = chunk.end + 1
        if ahead:
            self._cache.prefetch(ahead)

    def last_token(self, request: Request, outputs: int) -> bool:
        """Whether a request with `outputs` generated tokens may have no more."""
        return len(request.prompt_token_ids) + outputs >= self._longest(request)

    def _longest(self, request: Request) -> int:
        """Tokens that a request may come to, prompt and output."""
        limit = request.params.max_tokens
        if limit is None:
            return self._max_model_len
        return min(len(request.prompt_token_ids) + limit, self._max_model_len)

    def _plan(self, admit: bool) -> list[Chunk]:
        """Share the rows of a pass out, admitting those for whom there is room. Empty when nobody can run."""
        room = self._max_num_batched_tokens
        chunks: list[Chunk] = []
        alone = next((request for request in self.running if request.suspect), None)
        if alone is not None:
            self._take(chunks, alone, room)
            return chunks
        # Only the one admitted last can still be at its prompt, as it took all the room there was. The others decode,
        # a row each, and max_num_batched_tokens is at least max_num_seqs: nobody goes without.
        for request in self.running:
            room -= self._take(chunks, request, room)
        before = len(chunks)
        while admit and room > 0 and self.waiting and len(self.running) < self._max_num_seqs:
            request = self._next()
            if request.suspect and len(chunks) > before:
                break  # it takes the next pass for itself
            if not self._admit(request):
                # It may have failed, and other samples of its request with it.
                return [chunk for chunk in chunks if not chunk.request.finished]
            if request.suspect:
                chunks, room = [], self._max_num_batched_tokens
                self._take(chunks, request, room)
                break
            room -= self._take(chunks, request, room)
        return chunks

    @staticmethod
    def _take(chunks: list[Chunk], request: Request, room: int) -> int:
        """Add the next rows of `request`, at most `room`; return how many."""
        rows = min(request.remaining, room)
        assert request.slot is not None
        chunks.append(Chunk(request, request.slot, request.computed, request.computed + rows))
        return rows

    def _next(self) -> Request:
        """Who is to be admitted next."""
        return self._oldest() if self._passed >= MAX_PASSED else self.waiting[0]

    def _oldest(self) -> Request:
        """The one that came first, of those that wait: the first of its priority."""
        oldest, place = self.waiting[0], 0
        while place < len(self.waiting):
            first = self.waiting[place]
            oldest = min(oldest, first, key=lambda request: urgency(request)[1:])
            place = bisect_right(self.waiting, first.priority, key=lambda request: request.priority)
        return oldest

    def _admit(self, request: Request) -> bool:
        """Give a waiting request a slot, where there is one and room for its tokens. One that is alone must get it."""
        if self.running and not self._has_room(request):
            return False
        try:
            slot = self._cache.alloc(tokens=self._longest(request))  # to keep what it would map again
        except DriverError as error:
            if request.suspect or not self.running:
                self.fail(request, error)
            request.suspect = True
            return False
        if slot is None:
            if not self.running:
                self.fail(request, OutOfPages(1, 0, "slots", "somebody else holds this cache's slots"))
            return False
        self._passed = 0 if request is self._oldest() else self._passed + 1
        self.release(request)
        request.slot = slot
        self.running.append(request)
        return True

    def _has_room(self, request: Request) -> bool:
        """Whether a request fits beside those that run, all of its tokens beside all that they are about to hold.

        With nobody else to wait for there is no use in asking: it goes as far as it can.
        """
        if request.preemptions > MAX_PREEMPTIONS:
            return False  # the promise could not be kept: it has to be alone
        promised = request.preemptions == MAX_PREEMPTIONS

        def tokens(other: Request) -> int:
            if promised and other.preemptions >= MAX_PREEMPTIONS:
                return self._longest(other) - 1  # the last token is only ever chosen, never computed
            return other.num_tokens

        wanted = {other.slot: tokens(other) for other in self.running if other.slot is not None}
        return self._cache.fits(wanted, new=[tokens(request)])

    def _preempt(self) -> None:
        """Have the least urgent request give its slot back, to be computed again; the promised ones come last."""
        request = min(self.running, key=lambda r: (max(r.preemptions, MAX_PREEMPTIONS - 1), *(-n for n in urgency(r))))
        request.preemptions += 1
        self.preemptions += 1
        self._requeue(request)

    def _requeue(self, request: Request) -> None:
        self.release(request)
        self.add(request)

    def _give_up(self, request: Request, reason: OutOfPages) -> None:
        """End a request that cannot go on though it is alone."""
        if request.output_token_ids:
            self._end(request, "length")
        else:
            self.fail(request, reason)

    def _end(self, sample: Request, reason: FinishReason) -> None:
        self.release(sample)
        sample.finish_reason = reason
        self._ended.append(sample)
