"""A server of OpenAI's protocol that does as it is told, well or badly; and one that only speaks bytes."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandIn(ThreadingHTTPServer):
    """Answers every request with as many words as `max_tokens` says, unless `behaviour` says otherwise.

    Attributes:
        behaviour: called with the number of a request and its body; returns one of "good", "busy" (429), "cut",
            "error", "garbage", "short", "silent" (nothing until it is left), "uncounted", "unfinished" or "wordless".
        seen: the bodies of all requests, with their "Authorization" as "key".
        most: requests that were answered at the same time.
        left: requests whose client went away.
    """

    daemon_threads = True

    def __init__(self, behaviour: Callable[[int, dict[str, Any]], str] = lambda number, body: "good") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = behaviour
        self.seen: list[dict[str, Any]] = []
        self.pause = 0.0
        self.key: str | None = None
        self.template = 0  # tokens that a chat template adds
        self.now, self.most, self.left = 0, 0, 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of it."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: StandIn

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.server.key is not None and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self._plain(401, {"error": {"message": "no key"}})
        elif self.path == "/v1/models":
            self._plain(200, {"data": [{"id": "stand-in"}, {"id": "other"}]})
        else:
            self._plain(404, {"error": {"message": "nothing here"}})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.seen)
            server.seen.append({**body, "path": self.path, "key": self.headers["Authorization"]})
            server.now += 1
            server.most = max(server.most, server.now)
            self._working = True
        try:
            self._answer(body, server.behaviour(number, body))
        except (BrokenPipeError, ConnectionResetError):
            with server.lock:
                server.left += 1
        finally:
            self._leave()

    def _leave(self) -> None:
        """Count as answered. Before the last words: who has read them may ask again at once."""
        with self.server.lock:
            self.server.now -= self._working
            self._working = False

    def _plain(self, status: int, content: Any) -> None:
        written = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(written)))
        self.end_headers()
        self.wfile.write(written)

    def _answer(self, body: dict[str, Any], how: str) -> None:
        if how == "busy":
            self._plain(429, {"error": {"message": "too busy"}})
            return
        if body["model"] not in ("stand-in", "other"):
            self._plain(404, {"error": {"message": f"no model {body['model']}"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if how == "silent":
            while True:
                self._chunk(b": nothing yet\n\n")
                time.sleep(0.02)
        chat = "messages" in body
        wanted = body["max_tokens"] - (how == "short")
        if chat:
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for index in range(wanted):
            time.sleep(self.server.pause)
            text = "" if how == "wordless" else f" w{index}"
            last = "length" if index == wanted - 1 and how != "unfinished" else None
            part = {"delta": {"content": text}} if chat else {"text": text}
            self._event({"choices": [{**part, "finish_reason": last}]})
            if how == "cut":
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if how == "error":
                self._event({"error": {"message": "it broke"}})
                break
            if how == "garbage":
                self._chunk(b"data: {not json\n\n")
        if how != "uncounted":
            usage = {"prompt_tokens": self._prompt_tokens(body), "completion_tokens": wanted}
            self._event({"choices": [], "usage": usage})
        self._leave()
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _prompt_tokens(self, body: dict[str, Any]) -> int:
        if "messages" in body:
            return self.server.template + sum(len(each["content"].split()) for each in body["messages"])
        prompt = body["prompt"]
        return len(prompt.split()) if isinstance(prompt, str) else len(prompt)

    def _event(self, content: Any) -> None:
        self._chunk(b"data: " + json.dumps(content).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


@contextmanager
def stand_in(behaviour: Callable[[int, dict[str, Any]], str] = lambda number, body: "good") -> Iterator[StandIn]:
    """A server, as long as the block."""
    with StandIn(behaviour) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def bytes_server(pieces: list[bytes], pause: float = 0.0) -> Iterator[str]:
    """Whatever is asked, the answer is `pieces`, each in a packet of its own, and the end of the connection. Gives the
    URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def work() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):  # the client may have what it wants
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    connection.recv(1 << 16)
                    for piece in pieces:
                        connection.sendall(piece)
                        time.sleep(pause)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()
