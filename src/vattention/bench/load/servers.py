"""Servers that a measurement starts, lets work in turns, and ends."""

from __future__ import annotations

import http.client
import os
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from vattention.bench.child import Child
from vattention.errors import EngineError

HOST = "127.0.0.1"

_GOODBYE = 15.0
"""Seconds for a server to end by itself."""

_DIES_WITH_US = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
"""What a server is started through: PR_SET_PDEATHSIG, which outlives the execv."""


class ServerProcess:
    """A server and the processes it starts. It is ready when `/health` says 200.

    Args:
        name: what people call it.
        arguments: of `python`, which must serve on `port`.
        environment: of the process.
        cores: what it may run on.
        timeout: seconds until it is ready.

    Raises:
        ConfigError: python cannot be run.
    """

    def __init__(
        self,
        name: str,
        python: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        port: int,
        cores: Collection[int] | None,
        timeout: float,
    ) -> None:
        self.name = name
        self.url = f"http://{HOST}:{port}"
        self._port = port
        self._timeout = timeout
        command = [python, "-c", _DIES_WITH_US, *arguments]
        self._child = Child(name, command, environment, cores=cores, piped=False)
        self.session = self._child.session

    def wait_ready(self) -> float:
        """Return when it can generate, with the seconds that took. Raises EngineError if it ends, or takes too long."""
        began = time.monotonic()
        while not self._healthy():
            if self._child.process.poll() is not None:
                raise EngineError(
                    f"{self.name} ended with exit code {self._child.process.returncode}{self._child.last_words()}"
                )
            if time.monotonic() - began > self._timeout:
                raise EngineError(f"{self.name} was not ready after {self._timeout:g} s{self._child.last_words()}")
            time.sleep(0.25)
        return time.monotonic() - began

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def at_work(self) -> AbstractContextManager[None]:
        """The others must be stopped meanwhile; this one is, afterwards."""
        return self._child.at_work()

    def stop(self) -> None:
        """Let it rest."""
        self._child.stop()

    def cpu_seconds(self) -> float:
        """CPU time used so far, by all its processes."""
        return self._child.cpu_seconds()

    def close(self) -> None:
        """End it, by asking; what does not end is killed. Idempotent."""
        self._child.end(self._child.process.terminate, _GOODBYE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def ours(model: str | None, port: int, options: Mapping[str, Any]) -> list[str]:
    """Arguments of python for `vattention serve`; `options` by the names of `LLM`."""
    arguments = ["-m", "vattention.cli", "serve", *([model] if model else []), "--host", HOST, "--port", str(port)]
    return arguments + _flags(options) + ["--warm", "--log-level", "warning"]


def vllm(model: str, port: int, options: Mapping[str, Any]) -> list[str]:
    """Arguments of python for `vllm serve`; `options` by the names of `vllm.LLM`."""
    arguments = ["-m", "vllm.entrypoints.cli.main", "serve", model, "--host", HOST, "--port", str(port)]
    return arguments + _flags(options) + ["--disable-uvicorn-access-log"]


def vllm_environment(threads: int) -> dict[str, str]:
    """What `vllm serve` reads from its environment to compute with all of `threads`: by itself it keeps a core free."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores))),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Options as the command lines of both take them."""
    flags: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif value is False:
            flags.append(f"--no-{name.replace('_', '-')}")
        elif value is None:
            flags += [flag, "all"] if name == "layers_per_stream" else []
        else:
            flags += [flag, str(value)]
    return flags
