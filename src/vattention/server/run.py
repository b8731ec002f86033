"""A server's life: listen, load, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn, TypeVar

import uvicorn
import uvloop
from uvicorn.protocols.http.h11_impl import H11Protocol

from vattention.async_llm import AsyncLLM
from vattention.server import logs
from vattention.server.admission import Admission
from vattention.server.app import create_app
from vattention.server.front import Front
from vattention.server.listening import listen, raise_file_limit
from vattention.server.settings import ServerSettings

T = TypeVar("T")

LOGGER = logging.getLogger("vattention.server")

STOPPED, DIED = 0, 1
_TICK = 0.05
_GRACE = 2
"""Seconds that connections get after the drain to take what has been written for them."""


def serve(open_llm: Callable[[], AsyncLLM], settings: ServerSettings) -> int:
    """Serve until a signal says stop.

    The port answers 503 while `open_llm` loads the model, in a thread. SIGTERM or SIGINT: new work is refused with 503,
    `/ready` says so, what runs gets `settings.drain_timeout` seconds to end, and the rest is told that the server
    stops. A second signal ends the process at once, with 128 plus its number as the exit code. To be called in the main
    thread.

    Returns:
        The exit code: 0 after an orderly stop, whenever the signal came; 1 if the engine has died.

    Raises:
        ConfigError: nothing can listen there. What `open_llm` raises.
    """
    logs.configure(settings)
    raise_file_limit()
    listener = listen(settings.host, settings.port, stall_timeout=settings.stall_timeout)
    host, port = listener.getsockname()[:2]
    LOGGER.info("listening", extra={"fields": {"host": host, "port": port}})
    with listener:
        return uvloop.run(_Life(open_llm, settings).live(listener))


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to us: it would close the port before anybody has drained."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class _Life:
    def __init__(self, open_llm: Callable[[], AsyncLLM], settings: ServerSettings) -> None:
        self._open_llm = open_llm
        self._settings = settings
        self._front = Front()
        self._stopping = asyncio.Event()
        self._server = _Server(
            uvicorn.Config(
                self._front,
                http=H11Protocol,  # the one that is tested, whatever else is installed
                ws="none",
                lifespan="off",  # of the front, which has none; the application's is entered below
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_GRACE,
            )
        )

    async def live(self, listener: socket.socket) -> int:
        """From the open port to the exit code."""
        loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, self._signalled, each)
        serving = asyncio.create_task(self._server.serve([listener]))
        sweeping = asyncio.create_task(self._sweep())
        try:
            llm = await self._load()
            try:
                return await self._serve(llm)
            finally:
                await self._end(serving)  # nobody asks a model that has been closed
                await asyncio.to_thread(llm.close)
        finally:
            sweeping.cancel()
            await self._end(serving)

    async def _sweep(self) -> None:
        """Hang up on whoever has had a connection open for `body_timeout` seconds without sending a whole request."""
        waiting: dict[H11Protocol, float] = {}
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(min(self._settings.body_timeout / 2, 5))
            open_ = [each for each in self._server.server_state.connections if isinstance(each, H11Protocol)]
            idle = [each for each in open_ if each.cycle is None or each.cycle.response_complete]
            waiting = {each: waiting.get(each, clock()) for each in idle}
            for each, since in waiting.items():
                if clock() - since > self._settings.body_timeout:
                    each.transport.abort()

    async def _load(self) -> AsyncLLM:
        """The model. A signal meanwhile ends the process: loading cannot be cut short, and nobody has asked yet."""
        loading = asyncio.create_task(_in_thread(self._open_llm))
        stopped = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
        if self._stopping.is_set():
            LOGGER.info("stopped before the model was ready")
            _leave(STOPPED)
        stopped.cancel()
        return loading.result()

    async def _serve(self, llm: AsyncLLM) -> int:
        app = create_app(llm, self._settings)
        async with app.router.lifespan_context(app):
            self._front.app = app
            LOGGER.info("ready", extra={"fields": {"model": self._settings.served_model_names[0]}})
            while not self._stopping.is_set() and llm.running:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), timeout=1)
            if not llm.running:
                LOGGER.critical("the engine has stopped, and this server ends")
                return DIED
            app.state.server.draining = True
            await self._drain(app.state.server.admission)
            # Whoever has not ended by now is told so, while there is still a connection to say it on.
            await asyncio.to_thread(llm.close)
        return STOPPED

    async def _drain(self, admission: Admission) -> None:
        """Wait until nobody is inside, or the time is over."""
        clock = asyncio.get_running_loop().time
        until = clock() + self._settings.drain_timeout
        while admission.inside and clock() < until:
            await asyncio.sleep(_TICK)
        if admission.inside:
            LOGGER.warning("the time to drain is over", extra={"fields": {"answers_cut_off": admission.inside}})

    async def _end(self, serving: asyncio.Task[None]) -> None:
        self._server.should_exit = True
        await serving

    def _signalled(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            LOGGER.warning("stopped at once", extra={"fields": {"signal": number.name}})
            _leave(128 + number)
        LOGGER.info("stopping: a second signal ends the server at once", extra={"fields": {"signal": number.name}})
        self._stopping.set()


async def _in_thread(function: Callable[[], T]) -> T:
    """Call it in a thread that the end of the process does not wait for, unlike those of `asyncio.to_thread`."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def call() -> None:
        tell: Callable[[], object]
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001
            tell = partial(future.set_exception, error)
        else:
            tell = partial(future.set_result, result)
        with contextlib.suppress(RuntimeError):  # nobody waits any more
            loop.call_soon_threadsafe(tell)

    threading.Thread(target=call, name="vattention-open", daemon=True).start()
    return await future


def _leave(code: int) -> NoReturn:
    """End the process without waiting for any thread. Its memory goes with it."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
