"""One HTTP request and the events of its answer, each with the time at which it came.

Written on bare asyncio, because the generator shares the machine with the server that it measures: an event costs some
ten microseconds here, a tenth of what the usual client libraries take.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from vattention.errors import ConfigError

Event = Callable[[float, bytes], None]
"""Told of the data of a server-sent event, and when it came on `time.perf_counter`."""

_MOST_OF_AN_ERROR = 4096
"""Bytes kept of an answer that is no stream of events."""


@dataclass(frozen=True)
class Address:
    """Where requests go.

    Attributes:
        base: the path before that of the endpoint, without a slash at its end.
    """

    host: str
    port: int
    tls: bool
    base: str

    @property
    def url(self) -> str:
        """As people write it."""
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}{self.base}"


def address_of(url: str) -> Address:
    """Of a server, as http://host:port, with or without the /v1 of OpenAI's paths. Raises ConfigError for no URL."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is no URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} is no URL of a server: write http://HOST:PORT")
    base = parts.path.rstrip("/").removesuffix("/v1")
    return Address(parts.hostname, port or (443 if parts.scheme == "https" else 80), parts.scheme == "https", base)


class Broken(Exception):
    """The answer ended, or went on, as HTTP does not."""


async def exchange(
    address: Address,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes,
    event: Event,
) -> tuple[int, bytes]:
    """Send a request on a connection of its own, and read the answer to its end.

    Returns:
        The status, and the body where it is no stream of events: at most its beginning.

    Raises:
        OSError: no connection. Broken: it is cut off, or no HTTP.
    """
    loop = asyncio.get_running_loop()
    context = ssl.create_default_context() if address.tls else None
    transport, protocol = await loop.create_connection(
        lambda: _Answer(loop.create_future(), event), address.host, address.port, ssl=context
    )
    lines = [f"{method} {address.base}{path} HTTP/1.1", f"Host: {address.host}:{address.port}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    try:
        transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        return await protocol.ended
    finally:
        transport.close()


class _Answer(asyncio.Protocol):
    """Reads one answer: its head, then a body of known length, in chunks, or up to the end of the connection."""

    def __init__(self, ended: asyncio.Future[tuple[int, bytes]], event: Event) -> None:
        self.ended = ended
        self._event = event
        self._raw = bytearray()  # not decoded yet
        self._body = bytearray()  # decoded, and not handed out yet
        self._status = 0
        self._is_events = False
        self._left: int | None = None  # bytes of the body or of the chunk to come; None: up to the end
        self._chunked = False
        self._whole = False

    def data_received(self, data: bytes) -> None:
        """More has come."""
        now = time.perf_counter()
        self._raw += data
        try:
            if self._status == 0 and not self._head():
                return
            if self._chunked:
                self._chunks()
            else:
                self._plain()
            if self._is_events:
                self._events(now)
        except (ValueError, IndexError) as error:
            self._end(Broken(f"not HTTP: {error}"))
            return
        if self._whole:
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        """The end, in time or not."""
        if self._status and not self._chunked and self._left is None and error is None:
            self._end(None)
        else:
            self._end(Broken(f"cut off{f': {error}' if error else ''}"))

    def _end(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is not None:
            self.ended.set_exception(error)
        else:
            self.ended.set_result((self._status, bytes(self._body[:_MOST_OF_AN_ERROR])))

    def _head(self) -> bool:
        """Read the head. Returns False where more of it is to come."""
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *rest = self._raw[:end].decode("latin-1").split("\r\n")
        del self._raw[: end + 4]
        version, status, *_ = first.split(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(first[:80])
        headers: dict[str, str] = {}
        for line in rest:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        if int(status) < 200:  # "continue" and its kind: the answer follows
            return self._head()
        self._status = int(status)
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self._is_events = self._status == 200 and headers.get("content-type", "").startswith("text/event-stream")
        self._left = 0 if self._chunked else int(headers["content-length"]) if "content-length" in headers else None
        return True

    def _plain(self) -> None:
        self._body += self._raw
        if self._left is not None:
            self._left -= len(self._raw)
            self._whole = self._left <= 0
        self._raw.clear()

    def _chunks(self) -> None:
        raw, at = self._raw, 0
        while not self._whole:
            assert self._left is not None
            if self._left == 0:  # before the size of the next one
                line = raw.find(b"\r\n", at)
                if line < 0:
                    break
                size = int(raw[at:line].split(b";")[0], 16)
                at = line + 2
                self._whole = size == 0
                self._left = size + 2  # with the end of its line
            else:
                taken = min(self._left, len(raw) - at)
                if taken == 0:
                    break
                text = max(0, min(taken, self._left - 2))
                self._body += raw[at : at + text]
                at += taken
                self._left -= taken
        del raw[:at]

    def _events(self, now: float) -> None:
        body = self._body
        if b"\r" in body:
            body[:] = body.replace(b"\r\n", b"\n")
        while (end := body.find(b"\n\n")) >= 0:
            lines = bytes(body[:end]).split(b"\n")
            del body[: end + 2]
            data = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")]
            if data:
                self._event(now, b"\n".join(data))


async def get_json(address: Address, path: str, headers: Mapping[str, str]) -> tuple[int, Any]:
    """The status and the JSON at a path, None where it is none. Raises as `exchange`."""
    import json

    status, body = await exchange(address, "GET", path, headers, b"", lambda now, data: None)
    try:
        return status, json.loads(body)
    except ValueError:
        return status, None
