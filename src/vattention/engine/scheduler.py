"""Who runs next. Continuous batching with chunked prefill, first come first served.

Every pass takes one token of each decoding request and fills what is left of `max_num_batched_tokens` with prompt
chunks, so that a long prompt never stalls the others (Sarathi-Serve, arXiv 2403.02310). Memory is asked for in tokens,
never in pages: `fits` before a request is admitted, `step` before a pass. Where `step` says no, the request admitted
last gives its slot back and is computed again later; its generated tokens are kept. The request admitted first is
never the one to give way, so somebody always gets to the end: no starvation, no livelock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from vattention.cache import KVCache
from vattention.engine.request import Chunk, Request
from vattention.errors import ConfigError, OutOfPages


class Scheduler:
    """Owns the queue and the slots of the requests in it.

    Attributes:
        waiting: in order of arrival, preempted requests first.
        running: those that hold a slot, in order of admission.
        preemptions: how often a request had to give its slot back.
    """

    def __init__(self, cache: KVCache, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={max_num_batched_tokens} cannot give each of max_num_seqs={max_num_seqs}"
                " requests a token: raise it, or lower max_num_seqs"
            )
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self._cache = cache
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len

    def add(self, request: Request) -> None:
        """Queue a request. It must be one that can fit when it is alone."""
        self.waiting.append(request)

    def branch(self, request: Request, others: Sequence[Request]) -> None:
        """Start other samples of a running request: each continues the tokens that `request` has computed.

        Where a slot and memory are at hand, what is computed is shared (`KVCache.fork`). The others are queued before
        everybody, as they came before everybody there, and compute it again.

        Raises:
            DriverError: from forking; `others` may have slots then, or be queued.
        """
        place = self.running.index(request)
        assert request.slot is not None
        queued: list[Request] = []
        for other in others:
            slot = None
            if not queued and len(self.running) < self._max_num_seqs:
                with suppress(OutOfPages):
                    slot = self._cache.fork(request.slot)
            if slot is None:
                queued.append(other)
                continue
            other.slot, other.computed = slot, request.computed
            place += 1
            # Beside the one it came with: who came later makes room first, and only the last may be at its prompt.
            self.running.insert(place, other)
        self.waiting.extendleft(reversed(queued))

    def release(self, request: Request) -> None:
        """Take a request out, wherever it is, and give its slot back. What it has generated stays with it."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        slot, request.slot, request.computed = request.slot, None, 0
        if slot is not None:
            self._cache.free(slot)

    def schedule(self) -> list[Chunk]:
        """The next pass, with pages behind every token of it; decodes first, then prompt chunks.

        A request that has outgrown all of the memory, alone in it, ends here with finish_reason "length". The list is
        empty when nobody is left.

        Raises:
            OutOfPages: a prompt that fitted when it was added does not fit now, with nobody else to blame in this
                engine. That request is aborted.
        """
        admit = True
        while self.running or self.waiting:
            chunks = self._plan(admit)
            if not chunks:
                self._give_up(self.waiting[0], OutOfPages(1, 0, "slots", "somebody else holds this cache's slots"))
                continue
            try:
                self._cache.step({chunk.slot: chunk.end for chunk in chunks})
            except OutOfPages as refused:
                # A request that has just made room must not take it back: where `fits` and `step` disagree, because
                # the machine has less than the budget, that would go on for ever.
                admit = False
                if len(self.running) > 1:
                    self._preempt(self.running[-1])
                else:
                    self._give_up(self.running[0], refused)
                continue
            return chunks
        return []

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
        limit = request.params.max_tokens
        return (limit is not None and outputs >= limit) or (
            len(request.prompt_token_ids) + outputs >= self._max_model_len
        )

    def _plan(self, admit: bool) -> list[Chunk]:
        """Share the rows of a pass out, admitting those for whom there is room. Empty when nobody can run."""
        room = self._max_num_batched_tokens
        chunks: list[Chunk] = []
        # Only the one admitted last can still be at its prompt, as it took all the room there was. The others decode,
        # a row each, and max_num_batched_tokens is at least max_num_seqs: nobody goes without.
        for request in self.running:
            room -= self._take(chunks, request, room)
        while admit and room > 0 and self.waiting and len(self.running) < self._max_num_seqs:
            request = self.waiting[0]
            # All of the prompt must fit now, beside all that the others are about to hold. With nobody else to wait
            # for there is no use in asking: it goes as far as it can.
            wanted = {r.slot: r.num_tokens for r in self.running if r.slot is not None}
            if wanted and not self._cache.fits(wanted, new=[request.num_tokens]):
                break
            slot = self._cache.alloc(tokens=request.num_tokens)
            if slot is None:
                break
            request.slot = slot
            self.running.append(self.waiting.popleft())
            room -= self._take(chunks, request, room)
        return chunks

    @staticmethod
    def _take(chunks: list[Chunk], request: Request, room: int) -> int:
        """Add the next rows of `request`, at most `room`; return how many."""
        rows = min(request.remaining, room)
        assert request.slot is not None
        chunks.append(Chunk(request, request.slot, request.computed, request.computed + rows))
        return rows

    def _preempt(self, request: Request) -> None:
        """Give a running request's slot back and put it first in the queue, to be computed again."""
        self.release(request)
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def _give_up(self, request: Request, reason: OutOfPages) -> None:
        """End a request that cannot go on though it is alone."""
        self.release(request)
        if not request.output_token_ids:
            request.finish_reason = "abort"
            raise reason
        request.finish_reason = "length"
