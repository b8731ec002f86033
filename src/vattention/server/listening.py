"""The socket a server listens on, and how many files a process may have open."""

from __future__ import annotations

import errno
import resource
import socket

from vattention.errors import ConfigError

_BACKLOG = 4096


def listen(host: str, port: int, *, stall_timeout: float) -> socket.socket:
    """A socket that listens on `host` and `port`.

    Connections whose client reads nothing for `stall_timeout` seconds, though there is something to read, are ended by
    the kernel: a stream that nobody reads does not keep its place for ever.

    Raises:
        ConfigError: somebody else has the port, or there is no such address, or it is not allowed.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except OSError as error:
        raise ConfigError(f"host {host!r}: {error.strerror}") from None
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(int(stall_timeout * 1000), 1))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(_reason(error, host, port)) from None
    listener.setblocking(False)
    return listener


def _reason(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use: stop who has it, or choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} of {host} is not for this user: choose one above 1023 with --port"
    return f"cannot listen on port {port} of {host}: {error.strerror}"


def raise_file_limit() -> int:
    """Let this process have as many files open as the system allows it: every connection is one. The new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
