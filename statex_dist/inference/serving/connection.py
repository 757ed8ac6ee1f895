"""A connection and the time that it has: uvicorn's h11 protocol with deadlines, a limit, and half-closed connections.

uvicorn has a time-out for idle connections only. A client that sends half a request, or does not read, would keep its
connection forever. Here every connection has a deadline at every moment, and above the limit of connections the one
that has waited longest for its client is cut for a new one.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from http import HTTPStatus
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from statex_dist.inference.serving.app import ABORT_EXTENSION, error_response
from statex_dist.inference.serving.limits import RESERVE
from statex_dist.inference.serving.protocol import RequestError
from statex_dist.inference.serving.service import RETRY_AFTER_SECONDS, Service

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 << 10
MAX_HEADERS = 100

_RECEIVED_AT_ONCE = 16 << 10
"""Bytes."""

ALWAYS_ANSWERED = ("/health", "/metrics")
"""Routes that the limit of connections does not concern."""

PROBE_SECONDS = 0.5
"""From the end of a client's sending side to the first interim response."""


class Phase(Enum):
    """Phase of a connection: the event that it waits for. The value is the phase's name in metrics."""

    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    IDLE = "idle"
    CLOSING = "close"


class OpenConnections:
    """The open connections of a server.

    Args:
        service: Has the limits, and counts connections.
    """

    def __init__(self, service: Service):
        self.metrics = service.metrics
        self._service = service
        self._most = service.limits.max_connections
        self._open: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}
        """Connections that wait for their clients, longest first."""
        self._with_request: set[Connection] = set()
        """Connections that hold a place for a request."""

    def seconds(self, phase: Phase) -> float | None:
        """Return how long a connection may wait, or None for an idle one: that is uvicorn's to close."""
        limits, last_words = self._service.limits, self._service.last_words_seconds
        return {
            Phase.HEAD: limits.header_timeout,
            # A wait inside the application ends sooner, with an answer.
            Phase.BODY: limits.body_timeout + last_words,
            Phase.ANSWER: limits.request_timeout + 2 * last_words,
            Phase.CLOSING: limits.body_timeout,
        }.get(phase)

    def enter(self, connection: Connection) -> None:
        """Take a new connection. Above the limit, cut the one that has waited longest for its client."""
        self._open.add(connection)
        self.metrics.connections.set(len(self._open))
        if len(self._open) > self._most + RESERVE:
            next(iter(self._waiting), connection).evict()

    def leave(self, connection: Connection) -> None:
        """Forget a connection. It may be called twice."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)
        self._with_request.discard(connection)
        self.metrics.connections.set(len(self._open))

    def wait(self, connection: Connection) -> None:
        """Note that a connection waits for its client, if that is new."""
        if connection in self._open:
            self._waiting.setdefault(connection)

    def stop_waiting(self, connection: Connection) -> None:
        """Note that a connection does not wait for its client."""
        self._waiting.pop(connection, None)

    @contextmanager
    def request(self, connection: Connection) -> Iterator[None]:
        """Hold a place for the request of a connection. Where there is none, cut one that waits for its client.

        Raises:
            RequestError: All places are those of answers in the making (503).
        """
        if len(self._with_request) >= self._most:
            longest = next((other for other in self._waiting if other in self._with_request), None)
            if longest is None:
                self.metrics.refused_connections.inc()
                logger.warning("refused a request: %d connections have one, which is the limit", self._most)
                raise _full()
            longest.evict()
        self._with_request.add(connection)
        try:
            yield
        finally:
            self._with_request.discard(connection)


class Connection(H11Protocol):
    """A connection, from its acceptance to its end.

    Args:
        connections: The open connections, to which this one is added.
        arguments: uvicorn's.
    """

    def __init__(self, *, connections: OpenConnections, **arguments: Any):
        super().__init__(**arguments)
        self._others = connections
        self._phase: Phase | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._probe: asyncio.TimerHandle | None = None
        self._half_closed = False
        self.app = self._run_app

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Register the connection (asyncio)."""
        super().connection_made(transport)
        # What asyncio receives in one call, h11 parses in one go: 256 KiB of chunks of one byte take 1 s.
        transport.max_size = _RECEIVED_AT_ONCE  # type: ignore[attr-defined]
        self._others.enter(self)
        self._see(Phase.HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection (asyncio)."""
        super().connection_lost(exc)
        self._others.leave(self)
        for timer in (self._deadline, self._probe):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Read on (asyncio)."""
        super().data_received(data)
        self._see(Phase.HEAD)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection of a client that waits for its answer (asyncio)."""
        if self._phase is not Phase.ANSWER:
            return False
        if not self._half_closed:
            self._half_closed = True
            self._probe = self.loop.call_later(PROBE_SECONDS, self._send_interim_response, PROBE_SECONDS)
        return True

    def pause_writing(self) -> None:
        """Note that the client does not read (asyncio)."""
        super().pause_writing()
        self._others.wait(self)

    def resume_writing(self) -> None:
        """Note that the client reads again (asyncio)."""
        super().resume_writing()
        if self._phase is Phase.ANSWER:
            self._others.stop_waiting(self)

    def on_response_complete(self) -> None:
        """Start to wait for the next request (uvicorn)."""
        self._phase = None
        super().on_response_complete()
        self._see(Phase.IDLE)
        if self._half_closed and self._phase is not Phase.ANSWER:
            self.transport.close()
            self._see(Phase.IDLE)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection (uvicorn)."""
        super().timeout_keep_alive_handler()
        self._see(Phase.IDLE)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP (uvicorn), also where an answer has begun: uvicorn's own raises an error there."""
        self._others.metrics.bad_http.inc()
        self._end_with(RequestError(400, "the request is not HTTP/1.1, or its head is too large", code="bad_http"))

    def evict(self) -> None:
        """Cut the connection, so that another one has its place."""
        self._others.leave(self)
        self._others.metrics.refused_connections.inc()
        logger.warning("cut the connection that has waited longest for its client: the limit of connections is reached")
        if self._has_part_of_a_request():
            self._end_with(_full())
        self.transport.abort()

    def _see(self, quiet: Phase) -> None:
        """Set the deadline of the phase that the connection is in: ``quiet`` where no part of a request has come."""
        state = self.conn.their_state
        if self.transport.is_closing():
            phase = Phase.CLOSING
        elif state is h11.IDLE:
            phase = quiet
        else:
            phase = Phase.BODY if state is h11.SEND_BODY else Phase.ANSWER
        # The same deadline, however often a byte comes.
        if phase is self._phase:
            return
        self._phase = phase
        if self._deadline is not None:
            self._deadline.cancel()
        seconds = self._others.seconds(phase)
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._expire)
        if phase is Phase.ANSWER and not self.flow.write_paused:
            self._others.stop_waiting(self)
        else:
            self._others.wait(self)

    def _expire(self) -> None:
        assert self._phase is not None
        name, seconds = self._phase.value, self._others.seconds(self._phase)
        self._others.metrics.timed_out_connections.labels(name).inc()
        logger.info("closed a connection that waited %g s for its client (%s)", seconds, name)
        if self._phase is Phase.HEAD and self._has_part_of_a_request():
            self._end_with(RequestError(408, f"the head did not arrive in {seconds:g} s", code="timeout"))
        self.transport.abort()

    def _has_part_of_a_request(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])

    def _end_with(self, error: RequestError) -> None:
        """RequestState with an error, unless another answer has begun, and close."""
        state = self.conn.our_state
        if state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            to_head = state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
            events = (
                h11.Response(status_code=error.status, headers=headers, reason=HTTPStatus(error.status).phrase),
                h11.Data(data=b"" if to_head else body),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        if self.cycle is not None:
            # Or the application would answer too before the connection is lost, and h11 raise an error.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _send_interim_response(self, seconds: float) -> None:
        """Send an interim response, which HTTP/1.1 allows at any time before the answer.

        A client that closed its connection altogether looks like one that closed its sending side. The operating system
        of the former resets the connection when something is sent.
        """
        if (
            not self.transport.is_closing()
            and self.conn.our_state is h11.SEND_RESPONSE
            and self.scope["http_version"] == "1.1"
        ):
            response = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(response) or b"")
        self._probe = self.loop.call_later(seconds, self._send_interim_response, 2 * seconds)

    async def _run_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        # ASGI cannot cut a connection, and one that is blocked cannot be closed.
        scope.setdefault("extensions", {})[ABORT_EXTENSION] = {"abort": self.transport.abort}
        with ExitStack() as place:
            try:
                self._check_head(scope)
                if scope["path"] not in ALWAYS_ANSWERED:
                    place.enter_context(self._others.request(self))
            except RequestError as error:
                # A client that sends its body still would miss the answer if the connection were closed.
                if self.conn.their_state is not h11.SEND_BODY:
                    error.headers["Connection"] = "close"
                await error_response(error)(scope, receive, send)
                return
            await self.config.loaded_app(scope, receive, send)

    def _check_head(self, scope: Scope) -> None:
        """Raise if the head is beyond the limits: h11 sees to them only where a head arrives in pieces.

        Raises:
            RequestError: It is (431), or the version is another than HTTP/1 (400).
        """
        headers = scope["headers"]
        size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(k) + len(v) for k, v in headers)
        if not scope["http_version"].startswith("1."):
            error = RequestError(400, f"HTTP/{scope['http_version']} is not spoken here; use HTTP/1.1", code="bad_http")
        elif len(headers) > MAX_HEADERS or size > MAX_HEAD_BYTES:
            text = f"the head has {size} bytes and {len(headers)} headers"
            error = RequestError(431, f"{text}; allowed are {MAX_HEAD_BYTES} and {MAX_HEADERS}", code="too_large")
        else:
            return
        self._others.metrics.bad_http.inc()
        raise error


def _full() -> RequestError:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return RequestError(503, "the server has too many connections; try again", code="unavailable", headers=headers)
