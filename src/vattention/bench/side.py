"""One engine in a process of its own, as whoever measures sees it.

A side that is not at work is stopped (SIGSTOP, every process of it), so that it cannot take the cores from the others
by waiting busily: all sides alike.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vattention.bench.child import Child, end_of
from vattention.errors import ConfigError, EngineError

_GOODBYE = 20.0
"""Seconds for an engine to end by itself."""


class Side:
    """A worker (see `peers.wire`) and the processes it starts.

    Args:
        name: what people call it.
        command: what to run.
        environment: of the process.
        cores: what its threads may run on; None: all.
        timeout: seconds for any answer.

    Raises:
        ConfigError: the command cannot be run.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        cores: Collection[int] | None = None,
        timeout: float,
    ) -> None:
        self.name = name
        self._timeout = timeout
        self._unread = b""
        self._child = Child(name, command, environment, cores=cores, piped=True)
        self._process, self.session = self._child.process, self._child.session

    def ask(self, **command: Any) -> dict[str, Any]:
        """One command, and the answer to it.

        Raises:
            EngineError: it failed, died or did not answer in time. Nothing of it is left running then.
        """
        try:
            return self._answer(command)
        except BaseException:
            self.close(at_once=True)
            raise

    def _answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        deadline = time.monotonic() + self._timeout
        with suppress(BrokenPipeError):  # it has died: reading says how
            self._send(command)
        answer: dict[str, Any] = json.loads(self._line(command["do"], deadline))
        if "error" in answer:
            raise EngineError(
                f"{self.name} failed to {command['do']}: {end_of(answer['error'])}{self._child.last_words()}"
            )
        return answer

    def _send(self, command: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()

    def at_work(self) -> AbstractContextManager[None]:
        """The others must be stopped meanwhile; this one is, afterwards."""
        return self._child.at_work()

    def cpu_seconds(self) -> float:
        """CPU time used so far, by all its processes."""
        return self._child.cpu_seconds()

    def close(self, *, at_once: bool = False) -> None:
        """End it, by asking unless `at_once`; what does not end is killed. Idempotent."""
        if at_once:
            self._child.close()
        else:
            self._child.end(lambda: self._send({"do": "quit"}), _GOODBYE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()  # by asking even after an error elsewhere: who is killed leaves shared memory behind

    def _line(self, doing: str, deadline: float) -> bytes:
        """The next line it writes."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise EngineError(
                    f"{self.name} did not {doing} within {self._timeout:g} s and was killed: raise --timeout, or give"
                    f" it less to do{self._child.last_words()}"
                )
            read = os.read(pipe, 1 << 16)
            if not read:
                raise EngineError(
                    f"{self.name} died of {self._death()} when asked to {doing}{self._child.last_words()}"
                )
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _death(self) -> str:
        try:
            code = self._process.wait(_GOODBYE)
        except subprocess.TimeoutExpired:
            return "an unknown cause (it closed its output)"
        if code == -signal.SIGKILL:
            return "SIGKILL (out of memory, most likely: fewer requests, or a smaller --kv-cache-memory)"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def environment_for(
    python: str | None, *, threads: int, preload: str | None = None, wait_policy: str | None = None
) -> dict[str, str]:
    """The environment of a worker: this one, with the threads, the preloaded libraries and the OMP_WAIT_POLICY that
    every side gets.

    Args:
        python: of another environment; None: this one's, which may need `PYTHONPATH`.
    """
    variables = dict(os.environ)
    if python is not None:
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            variables.pop(name, None)
    variables |= {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if preload is not None:
        variables["LD_PRELOAD"] = preload
    if wait_policy is not None:
        variables["OMP_WAIT_POLICY"] = wait_policy
    return variables


def python_in(folder: str) -> str:
    """The Python of a virtual environment. Raises ConfigError where there is none."""
    python = Path(folder, "bin", "python")
    if not os.access(python, os.X_OK):
        raise ConfigError(f"{folder} is no virtual environment: there is no {python}")
    return str(python.absolute())
