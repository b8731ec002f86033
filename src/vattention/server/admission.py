"""How many answers are owed, and who has to come back later."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Self

from vattention.errors import InvalidRequest

_LONGEST_WAIT = 60
_MEMORY = 0.9  # of the mean: the last ten or so requests count


class Overloaded(Exception):
    """No room now.

    Attributes:
        retry_after: whole seconds after which there may be some.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"no room for {retry_after} s or so")
        self.retry_after = retry_after


class Admission:
    """Counts the answers that are computed or wait for that, and refuses what is more than `at_once + queue`.

    Not for several threads: the event loop's alone.

    Args:
        at_once: answers that are computed together (`max_num_seqs`).
        queue: answers that may wait.
        clock: seconds.
    """

    def __init__(self, *, at_once: int, queue: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._at_once = at_once
        self._limit = at_once + queue
        self._clock = clock
        self._inside = 0
        self._mean: float | None = None

    @property
    def inside(self) -> int:
        """Answers now."""
        return self._inside

    @property
    def limit(self) -> int:
        """Answers at most."""
        return self._limit

    def enter(self) -> Stay:
        """Let one answer in, until its `Stay` is closed. Raises Overloaded."""
        return Stay(self)

    def _add(self, answers: int) -> None:
        if self._inside + answers > self._limit:
            raise Overloaded(self._retry_after())
        self._inside += answers

    def _remove(self, answers: int, seconds: float) -> None:
        self._inside -= answers
        self._mean = seconds if self._mean is None else _MEMORY * self._mean + (1 - _MEMORY) * seconds

    def _retry_after(self) -> int:
        """Until about one in `at_once` of those inside has ended: 1 to 60 s."""
        mean = 1.0 if self._mean is None else self._mean
        return min(max(math.ceil(mean / max(self._at_once, 1)), 1), _LONGEST_WAIT)


class Stay:
    """The place of one HTTP request: of one answer when it comes in, of more once its body has been read."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._answers = 0
        self._began = admission._clock()
        self.hold(1)

    def hold(self, answers: int) -> None:
        """Take the places of so many answers in all.

        Raises:
            InvalidRequest: so many will never be let in. Overloaded: not now; it keeps the places that it had.
        """
        if answers > self._admission.limit:
            raise InvalidRequest(f"{answers} answers in one request: this server takes {self._admission.limit} at most")
        self._admission._add(answers - self._answers)
        self._answers = answers

    def close(self) -> None:
        """Give the places back. Idempotent."""
        if self._answers:
            self._admission._remove(self._answers, self._admission._clock() - self._began)
            self._answers = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_current: ContextVar[Stay | None] = ContextVar("vattention_stay", default=None)


@contextmanager
def staying(stay: Stay) -> Iterator[None]:
    """Make `stay` that of the request that this task serves, and close it at the end."""
    token = _current.set(stay)
    try:
        with stay:
            yield
    finally:
        _current.reset(token)


def hold(answers: int) -> None:
    """What a route calls when it knows how many answers its request asks for: prompts, times samples of each.

    Raises: as `Stay.hold`. Nothing where no middleware admits.
    """
    stay = _current.get()
    if stay is not None:
        stay.hold(answers)
