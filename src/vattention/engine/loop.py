"""The engine in a thread of its own: requests come and go from any thread, between two steps.

One thread owns the engine. Others leave messages in an inbox and never wait for it; it calls `Listener`s and never
waits for them. No lock is held across a forward pass, because there is no lock: the inbox is the only thing shared.
"""

from __future__ import annotations

import atexit
import os
import threading
import uuid
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from vattention.engine.answer import Seen
from vattention.engine.engine import Engine
from vattention.engine.outputs import RequestOutput
from vattention.engine.request import Request
from vattention.engine.sampling_params import RequestOutputKind, SamplingParams
from vattention.errors import EngineError, InvalidRequest, VAttentionError

T = TypeVar("T")

Listener = Callable[[RequestOutput | BaseException], object]
"""Told of one request, in the engine's thread, each time something new came: as much of it as its `output_kind` says.
The last call has an output that is `finished`, or the error that ended the request; after that there is none. It must
not block. Returning False, or raising, says that nobody listens any more, and aborts the request."""

_EXIT_SECONDS = 10.0
"""How long the end of the interpreter waits for the pass under way."""


@dataclass(eq=False)
class Ticket:
    """One request that was submitted. Only the engine's thread changes it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    priority: int
    listener: Listener
    seen: Seen | None = None
    request: Request | None = None
    over: bool = False


@dataclass(frozen=True, eq=False)
class _Abort:
    ticket: Ticket


@dataclass(frozen=True, eq=False)
class _Call:
    function: Callable[[], Any]
    future: Future[Any]


class _Wake:
    """Look at what the loop is asked to be."""


class EngineLoop:
    """Steps an engine while it has requests, and sleeps while it has none. It starts at once.

    `submit`, `abort`, `abort_id`, `call`, `stop` and `close` may be used from any thread, and return without waiting
    for a forward pass, except `close`.

    A request that fails is an error for its own listener, and the loop goes on. Where the engine itself cannot go on,
    every listener is told so with an EngineError, and what is submitted later is refused with the reason. After
    `os.fork` the child cannot use it.

    Args:
        engine: from now on only this loop's thread may touch it.
        together: entered in the engine's thread while the listeners are told what one step has brought.
    """

    def __init__(self, engine: Engine, *, together: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self._engine = engine
        self._together = together
        # SimpleQueue, because `put` never waits, not even in a finalizer that interrupts another `put`.
        self._inbox: SimpleQueue[Ticket | _Abort | _Call | _Wake] = SimpleQueue()
        self._tickets: dict[str, Ticket] = {}  # only of the engine's thread
        self._closing = False  # nothing new is taken
        self._cut = False  # and what there is does not go on
        self._ended = False
        self._cause: BaseException | None = None
        self._owner = os.getpid()
        # A daemon, so that the interpreter does not wait for it; `_stop_all` ends it before anything is torn down.
        self._thread = threading.Thread(target=self._run, name="vattention-engine", daemon=True)
        self._thread.start()
        _loops.add(self)

    # -- for every thread -----------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether requests are taken."""
        return not (self._closing or self._ended)

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        listener: Listener,
        *,
        request_id: str | None = None,
        priority: int = 0,
        prompt: str | None = None,
    ) -> Ticket:
        """Hand a request in; the engine's next step has it. Whatever is wrong with it, the listener is told.

        Check long prompts with `Engine.check` first, in a thread of the caller: the engine does it between two steps.

        Args:
            prompt_token_ids, params, priority: see `Engine.add_request`.
            listener: see `Listener`.
            request_id: a name that no unfinished request has; None: a new one.
            prompt: the text of the prompt, for its outputs.

        Raises:
            TypeError: a `request_id` that is no string. InvalidRequest: the loop is closed. EngineError: it has died.
        """
        if request_id is None:
            request_id = uuid.uuid4().hex  # the engine's own names, 0, 1, 2, might be somebody's
        elif not isinstance(request_id, str):
            raise TypeError(f"request_id must be a str, not {type(request_id).__name__}")
        ticket = Ticket(request_id, prompt, prompt_token_ids, params, priority, listener)
        self._post(ticket)
        return ticket

    def abort(self, ticket: Ticket) -> None:
        """End a request before the next step, wherever it is by then. Never fails; nothing if it has ended."""
        if not self._ended and os.getpid() == self._owner:
            self._inbox.put(_Abort(ticket))

    def abort_id(self, request_id: str) -> Future[bool]:
        """The same by name, for those who do not have the ticket. The result: whether there was such a request."""
        return self.call(partial(self._abort_id, request_id))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have the engine's thread call `function` between two steps. It holds everybody up: be quick.

        Raises:
            InvalidRequest: the loop has ended. EngineError: it has died.
        """
        future: Future[T] = Future()
        self._post(_Call(function, future))
        return future

    def stop(self, *, drain: bool = False) -> None:
        """Take nothing new, and end: with `drain` when all requests have, else after the pass under way.

        Listeners of requests that are cut off get an EngineError.
        """
        self._closing = True
        self._cut = self._cut or not drain
        if os.getpid() == self._owner:
            self._inbox.put(_Wake())

    def close(self, *, drain: bool = False, timeout: float | None = None) -> bool:
        """`stop`, and wait until the thread has ended. Idempotent.

        Args:
            drain: let the requests there are come to their end first.
            timeout: wait at most so many seconds.

        Returns:
            Whether the thread has ended. The engine may be touched again then.
        """
        self.stop(drain=drain)
        if os.getpid() == self._owner and threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _post(self, message: Ticket | _Call) -> None:
        if os.getpid() != self._owner:
            raise InvalidRequest("this engine belongs to the parent process: open a new one after fork")
        if self._ended or (self._closing and isinstance(message, Ticket)):
            raise self._refusal()
        self._inbox.put(message)
        if self._ended:  # just now, and nobody may have seen the message
            self._refuse_inbox()

    def _refusal(self) -> VAttentionError:
        """Why nothing is taken, a new exception each time: one that is raised twice mixes up both tracebacks."""
        if self._cause is None:
            return InvalidRequest("this engine is closed")
        return self._failure("the engine has stopped and must be opened again", self._cause)

    def _cut_off(self) -> VAttentionError:
        """Why a request that was taken does not come to its end."""
        if self._cause is None:
            return EngineError("the engine was closed before this request had ended")
        return self._refusal()

    @staticmethod
    def _failure(what: str, cause: BaseException) -> EngineError:
        error = EngineError(f"{what}: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        return error

    def _refuse_inbox(self) -> None:
        """Answer everything in the inbox, after the end. Any thread may do that, several at once too."""
        with suppress(Empty):
            while True:
                message = self._inbox.get_nowait()
                if isinstance(message, Ticket):
                    self._tell(message, self._cut_off())
                elif isinstance(message, _Call) and message.future.set_running_or_notify_cancel():
                    message.future.set_exception(self._refusal())

    # -- the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._read_inbox():
                if self._engine.unfinished:
                    self._step()
        except BaseException as error:  # noqa: BLE001
            self._cause = error
        self._end()

    def _read_inbox(self) -> bool:
        """Do what came in since the last step; sleep while there is nothing to do. False: it is time to end."""
        if not self._engine.unfinished and not self._closing:
            self._handle(self._inbox.get())
        for _ in range(self._inbox.qsize()):  # what comes in meanwhile has to wait for a step
            self._handle(self._inbox.get())
        return not self._cut and bool(self._engine.unfinished or not self._closing)

    def _handle(self, message: Ticket | _Abort | _Call | _Wake) -> None:
        if isinstance(message, Ticket):
            self._add(message)
        elif isinstance(message, _Abort):
            self._abort(message.ticket)
        elif isinstance(message, _Call) and message.future.set_running_or_notify_cancel():
            try:
                message.future.set_result(message.function())
            except BaseException as error:  # noqa: BLE001
                message.future.set_exception(error)

    def _add(self, ticket: Ticket) -> None:
        try:
            ticket.request = self._engine.add_request(
                ticket.prompt_token_ids, ticket.params, ticket.request_id, priority=ticket.priority
            )
        except BaseException as error:  # noqa: BLE001
            self._tell(ticket, error)
        else:
            ticket.seen = Seen() if ticket.params.output_kind is RequestOutputKind.DELTA else None
            self._tickets[ticket.request_id] = ticket

    def _abort(self, ticket: Ticket) -> None:
        if ticket.over or ticket.request is None:
            return
        self._engine.abort(ticket.request_id)
        self._publish(ticket, ticket.request)

    def _abort_id(self, request_id: str) -> bool:
        ticket = self._tickets.get(request_id)
        if ticket is not None:
            self._abort(ticket)
        return ticket is not None

    def _step(self) -> None:
        try:
            moved = self._engine.step()
        except Exception as error:
            # The engine has ended the requests that it could not save, and can go on with the others.
            ended = [each for each in self._tickets.values() if each.request and each.request.all_finished]
            if not ended:
                raise  # nothing has changed, so it would fail again, and for ever
            for each in ended:
                self._tell(each, self._failure("the engine failed while it computed this request", error))
        else:
            with self._together():
                for leader in dict.fromkeys(sample.family[0] for sample in moved):
                    ticket = self._tickets.get(leader.request_id)
                    if ticket is not None and ticket.request is leader:
                        self._publish(ticket, leader)

    def _publish(self, ticket: Ticket, request: Request) -> None:
        """Tell the listener how far its request is."""
        if request.error is not None:
            self._tell(ticket, request.error)
            return
        if ticket.params.output_kind is RequestOutputKind.FINAL_ONLY and not request.all_finished:
            return
        try:
            output = self._engine.output(request, ticket.prompt, ticket.seen)
        except Exception as error:  # noqa: BLE001
            self._engine.abort(ticket.request_id)
            self._tell(ticket, error)
        else:
            self._tell(ticket, output)

    def _tell(self, ticket: Ticket, news: RequestOutput | BaseException) -> None:
        ticket.over = not isinstance(news, RequestOutput) or news.finished
        if ticket.over and self._tickets.get(ticket.request_id) is ticket:
            del self._tickets[ticket.request_id]
        try:
            heard = ticket.listener(news)
        except BaseException as error:  # noqa: BLE001
            threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, self._thread)))
            heard = False
        if heard is False and not ticket.over:
            ticket.over = True
            del self._tickets[ticket.request_id]
            self._engine.abort(ticket.request_id)

    def _end(self) -> None:
        """Give everything back, and tell everybody."""
        self._closing = self._ended = True
        for ticket in list(self._tickets.values()):
            with suppress(Exception):  # after an engine has died, that is what everybody is told about
                self._engine.abort(ticket.request_id)
            self._tell(ticket, self._cut_off())
        self._refuse_inbox()


_loops: weakref.WeakSet[EngineLoop] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """End every loop before the interpreter is taken down under a thread that computes."""
    loops = list(_loops)
    for loop in loops:
        loop.stop()
    for loop in loops:
        loop.close(timeout=_EXIT_SECONDS)
