"""A process that a measurement starts, lets work and rest, and ends, with all that it starts in turn."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from vattention.bench import processes
from vattention.errors import ConfigError


class Child:
    """A process in a session of its own. What it says is kept, for the day it dies.

    Args:
        name: what people call it.
        command: what to run.
        environment: of the process.
        cores: what its threads may run on; None: all.
        piped: its input and output are pipes; otherwise it has no input, and its output is kept too.

    Attributes:
        process: to talk to, and to wait for.
        session: the processes it starts are in it.

    Raises:
        ConfigError: the command cannot be run.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        cores: Collection[int] | None,
        piped: bool,
    ) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        try:
            with _confined(cores):
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if piped else self._log,
                    stderr=self._log,
                    env=dict(environment),
                    start_new_session=True,
                )
        except OSError as error:
            self._log.close()
            raise ConfigError(f"cannot run {command[0]} for {name}: {error.strerror}") from None
        self.session = self.process.pid

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._log.closed

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The others must be stopped meanwhile; this one is, afterwards."""
        self.resume()
        try:
            yield
        finally:
            self.stop()

    def resume(self) -> None:
        """Let it work."""
        processes.send(self.session, signal.SIGCONT)

    def stop(self) -> None:
        """Let it rest."""
        processes.send(self.session, signal.SIGSTOP)

    def cpu_seconds(self) -> float:
        """CPU time used so far, by all its processes."""
        return processes.cpu_seconds(self.session)

    def last_words(self) -> str:
        """The end of what it has said, to be put behind an error; nothing if it has said nothing."""
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"; its last words: {end_of(' | '.join(lines[-4:]))}" if lines else ""

    def end(self, ask: Callable[[], object], seconds: float) -> None:
        """`ask` it to end, and wait so long; then kill what is left of it. Idempotent."""
        if self.closed:
            return
        self.resume()
        try:
            ask()
            self.process.wait(seconds)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            pass  # it will be killed
        self.close()

    def close(self) -> None:
        """Kill what is left of it. Idempotent."""
        if self.closed:
            return
        processes.kill(self.session)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:  # a command that nobody has read
                continue
        self._log.close()


def end_of(text: str) -> str:
    """As much of a text as fits an error."""
    return text if len(text) <= 600 else "... " + text[-600:]


@contextmanager
def _confined(cores: Collection[int] | None) -> Iterator[None]:
    """What is started in here may only run on `cores`."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
