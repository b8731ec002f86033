"""A server on a real port, in a thread of this process."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

LONG = 60.0
"""Seconds after which a server that does not start, or does not end, is a failure."""


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve `app`, and give its address: "http://127.0.0.1:PORT". Nothing is left of it afterwards."""
    listener = socket.create_server(("127.0.0.1", 0))
    # Connections inherit it: a client that does not read is felt soon, whatever the kernel would have bought itself.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        _wait_until(lambda: server.started or not thread.is_alive())
        assert server.started, "the server did not start"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(LONG)
        listener.close()
        assert not thread.is_alive(), "the server did not end"


def _wait_until(done: object) -> None:
    end = time.monotonic() + LONG
    while not done() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.01)
