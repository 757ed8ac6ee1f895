"""The process around the service: the port, the event loop, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import math
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock

import uvicorn
from fastapi import FastAPI

from statex_dist.errors import ConfigError, StateXError
from statex_dist.inference.serving import connection
from statex_dist.inference.serving.connection import MAX_HEAD_BYTES, Connection, OpenConnections
from statex_dist.inference.serving.limits import ACCEPTS_AT_ONCE
from statex_dist.inference.serving.service import LAST_WORDS_SECONDS, Service

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 60.0

_MOST_RECORDS = 5
"""Of a kind in a period."""

_MOST_KINDS = 32
"""That are told apart in a period."""

_MOST_CHARACTERS = 200
"""Of an example."""

_Kind = tuple[str, int, str]


class LogLimit(logging.Filter):
    """Lets the first records of each kind in a period pass, and counts the others. A kind is a logger, level and text.

    The text is the first line of the record's message before its values are put in. Traceback and values do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[_Kind] = Counter()
        self._examples: dict[_Kind, str] = {}
        self._lock = Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether ``record`` is written."""
        kind = (record.name, record.levelno, str(record.msg).partition("\n")[0][:_MOST_CHARACTERS])
        with self._lock:
            if kind not in self._counts and len(self._counts) >= _MOST_KINDS:
                kind = ("", logging.WARNING, "other messages")
            self._counts[kind] += 1
            self._examples.setdefault(kind, record.getMessage().partition("\n")[0][:_MOST_CHARACTERS])
            return self._counts[kind] <= _MOST_RECORDS

    def end_period(self) -> None:
        """Write how many records of each kind were left out, and start a new count."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            examples, self._examples = self._examples, {}
        for kind, count in counts.items():
            if count > _MOST_RECORDS:
                more = count - _MOST_RECORDS
                logger.log(kind[1], "%d more in %g s or less like: %s", more, PERIOD_SECONDS, examples[kind])

    @contextmanager
    def on(self, *names: str) -> Iterator[None]:
        """Limit the loggers of these names until the block ends."""
        for name in names:
            logging.getLogger(name).addFilter(self)
        try:
            yield
        finally:
            for name in names:
                logging.getLogger(name).removeFilter(self)
            self.end_period()


_SWITCH_SECONDS = 0.0002
"""Between Python's threads. The decoding thread gives the interpreter away at every operation of the model and waits so
long to have it back while the event loop is busy: with Python's own 5 ms, 2000 bad requests a second left a stream with
13 % of its speed, with this 50 %."""


_BACKLOG = 2048
"""Connections that wait in the system until they are accepted."""


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; connections wait in it until the server runs.

    Args:
        host: Name or address.
        port: 0 picks a free one.

    Raises:
        ConfigError: The address does not belong to this machine, or the port is in use.
    """
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port must be 0 to {(1 << 16) - 1}, not {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except UnicodeError:
        raise ConfigError(f"--host {host!r} is no host name; give a name or an address of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use; choose another with --port, or --port 0 for a free one"
            ) from None
        raise ConfigError(f"cannot listen on port {port} of {host}: {error.strerror}; see --host, --port") from None
    # Connections inherit it. asyncio sets it only where a socket names its protocol, which these do not.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server:
    """Serves an application until it is told to stop, or its decoding thread dies.

    Args:
        app: The application.
        service: The service behind it.
        grace_seconds: What open requests are given to end when the server is told to stop.
    """

    def __init__(self, app: FastAPI, service: Service, *, grace_seconds: float):
        self._service, self._grace_seconds = service, grace_seconds
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                http=partial(Connection, connections=OpenConnections(service)),  # type: ignore[arg-type]
                backlog=ACCEPTS_AT_ONCE,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                timeout_keep_alive=service.limits.keep_alive_timeout,  # type: ignore[arg-type]
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=math.ceil(LAST_WORDS_SECONDS),
            )
        )
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Task[None] | None = None

    def run(
        self, listener: socket.socket, *, signals: Sequence[int] = (), on_ready: Callable[[], None] = lambda: None
    ) -> None:
        """Serve, and return when an orderly stop is complete.

        Args:
            listener: Of :func:`bind`.
            signals: What stops the server, like :meth:`request_stop`; in the main thread only.
            on_ready: Called when it serves and listens to the signals.

        Raises:
            StateXError: The decoding thread died or hangs.
        """
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        # A body of 700,000 lists makes the collector look at all objects of the process again and again: 0.8 s in which
        # no thread runs. What is there before the first request is not looked at any more.
        gc.collect()
        gc.freeze()
        try:
            asyncio.run(self._run(listener, signals, on_ready))
        finally:
            gc.unfreeze()
            sys.setswitchinterval(before)
        if self._service.dead:
            raise StateXError("the decoding thread died or hangs; the log above says where")

    def request_stop(self) -> None:
        """Stop, from any thread. Asked again, do not wait for open requests."""
        assert self._event_loop is not None
        self._event_loop.call_soon_threadsafe(self._stop)

    async def _run(self, listener: socket.socket, signals: Sequence[int], on_ready: Callable[[], None]) -> None:
        self._event_loop = asyncio.get_running_loop()
        for number in signals:
            self._event_loop.add_signal_handler(number, self._stop)
        self._service.on_death = self._stop
        self._service.start()
        on_ready()
        log_limit = LogLimit()
        # asyncio's: what it cannot accept, and errors in handlers.
        with log_limit.on("asyncio", "uvicorn.error", connection.__name__):
            summing_up = asyncio.ensure_future(_sum_up(log_limit))
            await self._uvicorn.serve(sockets=[listener])
            assert self._stopping is not None
            await self._stopping
            summing_up.cancel()

    def _stop(self) -> None:
        if self._stopping is not None:
            self._service.give_up()
            return
        logger.info("stopping: no more requests are taken, those that are open have %g s", self._grace_seconds)
        self._stopping = asyncio.ensure_future(self._stop_orderly())

    async def _stop_orderly(self) -> None:
        # Until then the port is open, and says that the server is stopping.
        await self._service.stop(self._grace_seconds)
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """Leaves signals alone: uvicorn would end the process with the signal, however orderly it stopped.

    asyncio has one number for the connections that it accepts in a turn and for those that wait in the system. The
    former must be small, or a burst takes all descriptors before its first connection can be refused.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _sum_up(log_limit: LogLimit) -> None:
    while True:
        await asyncio.sleep(PERIOD_SECONDS)
        log_limit.end_period()
