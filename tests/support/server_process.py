"""Servers as processes of their own, and clients of the rudest kinds."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 120.0
"""Seconds that anything may take on a busy machine before a test gives up."""


@dataclass
class Server:
    """`vattention serve`, as it runs."""

    process: subprocess.Popen[str]
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=100_000))
    port: int = 0

    def events(self, message: str | None = None) -> list[dict[str, Any]]:
        """The lines of its log, those with this message."""
        found = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [event for event in found if message in (None, event["message"])]

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait_for(self, message: str) -> dict[str, Any]:
        """The first event of the log with this message."""
        wait(lambda: self.events(message) or self.process.poll() is not None, lambda: f"no {message!r}: {self.log}")
        assert self.events(message), self.log
        return self.events(message)[0]

    def ask(
        self, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None, timeout: float = PATIENCE
    ) -> tuple[int, dict[str, str], bytes]:
        """GET, or POST a body: status, headers in lower case, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            named = {"Content-Type": "application/json", **(headers or {})}
            connection.request("GET" if body is None else "POST", path, content, named)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """Every number of /metrics by its name, those with several labels summed up, without `vattention:`."""
        status, _, body = self.ask("/metrics")
        assert status == 200, body
        numbers: dict[str, float] = {}
        for line in body.decode().splitlines():
            match = re.match(r"(?:vattention:)?([\w:]+)(?:\{.*\})? (\S+)", line)
            if match is not None:
                numbers[match.group(1)] = numbers.get(match.group(1), 0.0) + float(match.group(2))
        return numbers

    @property
    def is_idle(self) -> bool:
        """No request runs or waits, no slot is in use, and no page is held by one."""
        now = self.metrics()
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_live_slots", "kv_cache_mapped_bytes")
        return not any(now[name] for name in names)

    def stream(
        self,
        body: Any,
        path: str = "/v1/completions",
        headers: Mapping[str, str] | None = None,
        buffer: int | None = None,
    ) -> "Stream":
        """Begin a streamed answer, with so many bytes of the kernel's to receive it in."""
        return Stream(self.port, path, {**body, "stream": True}, headers or {}, buffer)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end: the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def status(self, name: str) -> int:
        """A number of /proc/PID/status."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
        assert match is not None, name
        return int(match.group(1))


class Stream:
    """A client that reads events from a socket, as slowly as a test likes, and can hang up in any way."""

    def __init__(self, port: int, path: str, body: Any, headers: Mapping[str, str], buffer: int | None) -> None:
        self._socket = socket.socket()
        self._socket.settimeout(PATIENCE)
        if buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self._socket.connect(("127.0.0.1", port))
        content = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""])
        self._socket.sendall(head.encode() + content)
        self.received = b""

    def read_until(self, text: bytes) -> bytes:
        """All that has come when `text` has."""
        while text not in self.received:
            part = self._socket.recv(65536)
            assert part, f"closed before {text!r}: {self.received!r}"
            self.received += part
        return self.received

    def read_to_the_end(self) -> bytes:
        """All that comes; the server has to close the connection, or the stream to end."""
        while not self.received.endswith(b"0\r\n\r\n"):
            part = self._socket.recv(65536)
            if not part:
                break
            self.received += part
        return self.received

    @property
    def status(self) -> int:
        return int(self.read_until(b"\r\n").split()[1])

    def close(self) -> None:
        """Hang up politely."""
        self._socket.close()

    def reset(self) -> None:
        """Hang up with an RST, as a process that is killed with unread data does."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


@contextlib.contextmanager
def serving(
    model: str | None, *flags: str, environ: Mapping[str, str] | None = None, ready: bool = True
) -> Iterator[Server]:
    """A server on a free port, which is killed at the end if it has not ended."""
    named = [] if model is None else [model]
    command = [sys.executable, "-m", "vattention.cli", "serve", *named, "--port", "0", "--no-compile"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VATTENTION_")}
    process = subprocess.Popen(
        [*command, "--log-format", "json", *flags],
        env={**clean, "OMP_NUM_THREADS": "1", **(environ or {})},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    server = Server(process)

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.lines.append(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        server.port = server.wait_for("listening")["port"]
        if ready:
            wait(lambda: server.ask("/ready")[0] == 200, lambda: f"not ready: {server.log}")
        yield server
    finally:
        process.kill()
        process.wait()
        reader.join()


def wait(
    until: Callable[[], Any], why: Callable[[], str] = lambda: "it did not happen", seconds: float = PATIENCE
) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, why()
        time.sleep(0.02)
