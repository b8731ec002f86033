"""Answers from a server that speaks OpenAI's protocol."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from vattention.cli.answers import Piece
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import ConfigError, EngineError, InvalidRequest, VAttentionError

_OFTEN = 0.1
"""Seconds between two pieces at most, so that an answer that does not come can be stopped too."""

_PATIENCE = 30.0
"""Seconds to connect, and for the list of models."""

_OPENAI = ("temperature", "max_tokens")
"""Always sent. Other parameters only where they are not what they are by default: not every server knows them."""


class RemoteAnswers:
    """Answers of the chat endpoint of a server.

    Args:
        url: http://host:port, with or without /v1.
        api_key: None for none.
        model: as the server calls it; None: the first that it lists.

    Raises:
        ConfigError: no URL, no server there, one that wants a key, or one that does not say what it serves.
    """

    def __init__(self, url: str, *, api_key: str | None = None, model: str | None = None) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r} is no URL: {error}") from None
        if parts.scheme not in ("http", "https") or not self._host or parts.query or parts.fragment:
            raise ConfigError(f"{url!r} is no URL of a server: write http://HOST:PORT")
        self._tls = parts.scheme == "https"
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{self._base}"
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.model = self._first_model() if model is None else model

    def stream(self, messages: Sequence[Mapping[str, str]], params: SamplingParams) -> Generator[Piece, None, None]:
        """See `Answers`. Closing the generator closes the connection, which ends the request."""
        body = {"model": self.model, "messages": list(messages), **_fields_of(params)}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        prompt, tokens, finish = 0, 0, None
        connection = self._connect(None)
        try:
            with contextlib.closing(_often(partial(self._events, connection, body), connection.sock)) as events:
                for data in events:
                    text = ""
                    for choice in data.get("choices") or ():
                        text += (choice.get("delta") or {}).get("content") or ""
                        finish = choice.get("finish_reason") or finish
                    tokens += bool(text)  # about a token each; the server counts them at the end
                    if usage := data.get("usage"):
                        prompt, tokens = usage["prompt_tokens"], usage["completion_tokens"]
                    yield Piece(text=text, prompt_tokens=prompt, tokens=tokens, finish_reason=None)
        except (KeyError, TypeError, AttributeError) as error:
            raise EngineError(f"{self.url} sent what is no answer: {type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if finish is None:
            raise EngineError(f"{self.url} ended the answer without a reason")
        yield Piece(text="", prompt_tokens=prompt, tokens=tokens, finish_reason=finish)

    def memory(self) -> str:
        """See `Answers`."""
        return (
            f"the cache is the server's: {self.url}/dashboard and {self.url}/metrics show it, where it is one of ours"
        )

    def _first_model(self) -> str:
        connection = self._connect(_PATIENCE)
        try:
            connection.request("GET", f"{self._base}/v1/models", headers=self._headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(f"no server answers at {self.url}: {_say(error)}") from None
        finally:
            connection.close()
        if answer.status == 401:
            raise ConfigError(f"{self.url} wants an API key: --api-key, or VATTENTION_API_KEY in the environment")
        try:
            return str(json.loads(content)["data"][0]["id"])
        except (ValueError, TypeError, KeyError, IndexError):
            raise ConfigError(
                f"{self.url}/v1/models does not say what is served there (HTTP {answer.status}):"
                " name the model: vattention chat MODEL --url URL"
            ) from None

    def _connect(self, timeout: float | None) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_PATIENCE)
        try:
            connection.connect()
        except OSError as error:
            raise EngineError(f"no server answers at {self.url}: {_say(error)}") from None
        connection.sock.settimeout(timeout)
        return connection

    def _events(self, connection: http.client.HTTPConnection, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The objects of the stream, up to its [DONE]."""
        try:
            headers = {**self._headers, "Content-Type": "application/json"}
            connection.request("POST", f"{self._base}/v1/chat/completions", json.dumps(body).encode(), headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise self._refusal(answer.status, answer.read())
            for line in answer:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                found = json.loads(data)
                if "error" in found:
                    raise EngineError(f"{self.url} failed: {_message(found)}")
                yield found
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{self.url} broke the answer off: {_say(error)}") from None
        except ValueError as error:
            if isinstance(error, VAttentionError):
                raise
            raise EngineError(f"{self.url} sent what is no answer: {error}") from None
        raise EngineError(f"{self.url} broke the answer off")

    def _refusal(self, status: int, content: bytes) -> VAttentionError:
        try:
            message = _message(json.loads(content))
        except (ValueError, TypeError, KeyError):
            message = content.decode(errors="replace")[:200].strip() or "no reason given"
        if status == 401:
            message = f"{message} (--api-key, or VATTENTION_API_KEY in the environment)"
        kind = InvalidRequest if 400 <= status < 500 and status != 429 else EngineError
        return kind(f"{self.url} says {status}: {message}")


def _message(said: Mapping[str, Any]) -> str:
    error = said["error"]
    return str(error["message"] if isinstance(error, Mapping) else error)


def _say(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def _fields_of(params: SamplingParams) -> dict[str, Any]:
    """As OpenAI's field names, and vLLM's for what OpenAI has not."""
    found: dict[str, Any] = {}
    for each in fields(SamplingParams):
        value, default = getattr(params, each.name), each.default
        if each.name == "stop":
            default = ()
        if each.name in _OPENAI or value != default:
            found[each.name] = list(value) if isinstance(value, tuple) else value
    if found.get("max_tokens", 0) is None:
        del found["max_tokens"]  # as many as there is room for
    return found


def _often(read: Callable[[], Iterable[dict[str, Any]]], sock: socket.socket) -> Generator[dict[str, Any], None, None]:
    """What `read()` iterates over, read from `sock` in a thread; empty ones while nothing comes."""
    news: queue.SimpleQueue[tuple[dict[str, Any] | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        error: BaseException | None = None
        try:
            for each in read():
                news.put((each, None))
        except BaseException as caught:  # noqa: BLE001 - it is raised where it is waited for
            error = caught
        news.put((None, error))

    thread = threading.Thread(target=work, name="vattention-answer", daemon=True)
    thread.start()
    try:
        while True:
            try:
                each, error = news.get(timeout=_OFTEN)
            except queue.Empty:
                yield {}
                continue
            if error is not None:
                raise error
            if each is None:
                return
            yield each
    finally:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # under the thread that reads, which ends it
        thread.join()
