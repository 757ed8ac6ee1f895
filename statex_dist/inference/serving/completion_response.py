"""A request from its body to the end of its answer, with a client that may leave, or stop to read, at any time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from statex_dist.inference.serving.protocol import RequestError
from statex_dist.inference.serving.service import Service
from statex_dist.inference.serving.sse_writer import Reply, error_response

ABORT_EXTENSION = "statex.abort"
"""ASGI extension of our server: ``{"abort": ...}`` closes the connection and throws away what was not sent."""


def abort_of(scope: Scope) -> Callable[[], None]:
    """Return what cuts the connection of a request."""
    abort: Callable[[], None] = scope["extensions"][ABORT_EXTENSION]["abort"]
    return abort


class Exchange(Response):
    """Parses, tokenizes and answers a request, and watches its client: one that leaves frees its places at once.

    A client that is there but does not read blocks whoever sends. A while after the deadline its connection is cut.

    Args:
        service: Answers the request.
        body: Of the request.
        arrived: When the request began to arrive, on the event loop's clock.
    """

    def __init__(self, service: Service, body: bytes, arrived: float):
        super().__init__()
        self._service, self._content, self._arrived = service, body, arrived
        self._if_cancelled = "disconnected"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer (ASGI)."""
        abort = abort_of(scope)
        end = self._arrived + self._service.limits.request_timeout + self._service.last_words_seconds
        with self._service.connection(abort):
            answering = asyncio.create_task(self._answer(scope, receive, send))
            leaving = asyncio.create_task(_until_client_leaves(receive))
            try:
                left = max(0.0, end - asyncio.get_running_loop().time())
                await asyncio.wait({answering, leaving}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not answering.done() and not leaving.done():
                    self._if_cancelled = "timeout"
                    answering.cancel()
                    abort()
                    await leaving  # or uvicorn would say that the answer is not complete
            finally:
                leaving.cancel()
                answering.cancel()  # no effect where it is done
                with suppress(asyncio.CancelledError):
                    await answering

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "failed"
        reply: Reply | None = None
        try:
            body, self._content = self._content, b""  # which may wait for long, and is needed once
            request, prompts = await self._service.prepare(body, arrived=self._arrived)
            del body
            with self._service.answer(request, prompts, arrived=self._arrived) as answer:
                reply = Reply(self._service, answer, send)
                await reply.send()
            outcome = "ok"
        except RequestError as error:
            outcome = error.outcome
            if reply is not None and reply.started:
                await reply.send_error(error)
            else:
                await error_response(error)(scope, receive, send)
        except asyncio.CancelledError:
            outcome = self._if_cancelled
            raise
        finally:
            self._service.metrics.count(outcome)


async def _until_client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
