"""The HTTP routes, and a request from its body to the end of its answer, whole or as a stream of events.

A client may leave, or stop to read, at any time.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from statex_dist.inference.decoding import Progress
from statex_dist.inference.serving.limits import ServerMetrics
from statex_dist.inference.serving.protocol import (
    RequestError,
    choice_body,
    completion_body,
    shown,
    usage_body,
)
from statex_dist.inference.serving.service import RequestState, Service, index_of

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx hands events on at once
]


def error_response(error: RequestError) -> Response:
    """Return an error as the whole answer."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


class SseWriter:
    """Sends an answer as it comes.

    Nothing is sent before there is something to send, so that a request that fails before its first token is answered
    with the right status even where a stream was asked for.

    Args:
        service: Makes the answer.
        answer: The answer.
        send: To the client (ASGI).

    Attributes:
        started: Whether something was sent.
    """

    def __init__(self, service: Service, answer: RequestState, send: Send):
        self._service, self._answer, self._request, self._send = service, answer, answer.request, send
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.name,
            "seed": answer.seed,
        }
        self.started = False

    async def send(self) -> None:
        """Send the whole answer.

        Raises:
            RequestError: The answer failed.
        """
        if self._request.stream:
            await self._send_stream()
            return
        response = JSONResponse(await self._whole())
        self.started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": response.raw_headers})
        await self._send({"type": "http.response.body", "body": response.body, "more_body": True})
        # Every sending waits for the one before: without this one, a client that does not read would be done.
        await self._send({"type": "http.response.body"})

    async def send_error(self, error: RequestError) -> None:
        """End a stream that has begun."""
        await self._send_events([error.body()])
        await self._send({"type": "http.response.body"})

    async def _whole(self) -> dict[str, Any]:
        ended: dict[int, Progress] = {}
        async for progress in self._answer.progress():
            ended |= {index_of(item): item for item in progress if item.finish_reason is not None}
        choices = []
        for index, item in sorted(ended.items()):
            choices.append(choice_body(index, self._echo(item) + item.whole, item.finish_reason))
        return completion_body(self._head, choices, self._usage(sum(len(item.tokens) for item in ended.values())))

    async def _send_stream(self) -> None:
        begun: set[int] = set()
        num_tokens = 0
        async for progress in self._answer.progress():
            events = []
            for item in progress:
                index, text = index_of(item), item.text
                if index not in begun and (text or item.finish_reason is not None):
                    begun.add(index)
                    text = self._echo(item) + text
                if text or item.finish_reason is not None:
                    choice = choice_body(index, text, item.finish_reason)
                    events.append(completion_body(self._head, [choice], None))
                num_tokens += len(item.tokens)
            await self._send_events(events)
        if self._request.includes_usage:
            await self._send_events([completion_body(self._head, [], self._usage(num_tokens))])
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _send_events(self, bodies: Sequence[dict[str, Any]]) -> None:
        if not bodies:
            return
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        text = "".join(f"data: {json.dumps(body, separators=(',', ':'))}\n\n" for body in bodies)
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    def _echo(self, item: Progress) -> str:
        """Return the text in front of a completion: its prompt, where that is asked for."""
        if not self._request.echo:
            return ""
        place = index_of(item) // self._request.num_choices
        prompt = self._request.prompts[place]
        if isinstance(prompt, str) and not item.overlap:
            return prompt
        text = self._service.tokenizer.decode(self._answer.prompts[place])
        return text[: len(text) - item.overlap]

    def _usage(self, num_tokens: int) -> dict[str, int]:
        return usage_body(sum(map(len, self._answer.prompts)), num_tokens)


ABORT_EXTENSION = "statex.abort"
"""ASGI extension of our server: ``{"abort": ...}`` closes the connection and throws away what was not sent."""


def abort_of(scope: Scope) -> Callable[[], None]:
    """Return what cuts the connection of a request."""
    abort: Callable[[], None] = scope["extensions"][ABORT_EXTENSION]["abort"]
    return abort


class CompletionResponse(Response):
    """Parses, tokenizes and answers a request, and watches its client: one that leaves frees its places at once.

    A client that is there but does not read blocks its sender. Some seconds after the deadline its connection is cut.

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
        """RequestState (ASGI)."""
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
        reply: SseWriter | None = None
        try:
            body, self._content = self._content, b""  # which may wait for long, and is needed once
            request, prompts = await self._service.prepare(body, arrived=self._arrived)
            del body
            with self._service.answer(request, prompts, arrived=self._arrived) as answer:
                reply = SseWriter(self._service, answer, send)
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


def build_app(service: Service, *, api_key: str | None = None) -> FastAPI:
    """Return the application.

    Args:
        service: Answers the requests; the program that runs the application starts it.
        api_key: The bearer token that ``/v1`` demands; None demands none.
    """
    app = FastAPI(openapi_url=None)
    created = int(time.time())

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")  # as it was sent
        if api_key is not None and not secrets.compare_digest(given, f"Bearer {api_key}".encode()):
            raise RequestError(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key"
            )

    v1 = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])

    def model() -> dict[str, Any]:
        return {"id": service.name, "object": "model", "created": created, "owned_by": "statex-dist"}

    @v1.get("/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @v1.get("/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model()

    @v1.post("/completions")
    async def create_completion(request: Request) -> Response:
        arrived = asyncio.get_running_loop().time()
        seconds = min(service.limits.request_timeout, service.limits.body_timeout)
        try:
            service.check_health()
            with service.connection(abort_of(request.scope)):
                async with asyncio.timeout(seconds):
                    body = await _read_body(request, service.limits.max_body_bytes)
        except RequestError as error:
            service.metrics.count(error.outcome)
            raise
        except TimeoutError:
            service.metrics.count("timeout")
            raise RequestError(
                408, f"the body did not arrive in {seconds:g} s", code="timeout", headers={"Connection": "close"}
            ) from None
        except ClientDisconnect:
            service.metrics.count("disconnected")
            return Response(status_code=400)  # the client is gone
        return CompletionResponse(service, body, arrived)

    @v1.api_route("/chat/completions", methods=["GET", "POST"])
    async def refuse_chat() -> Response:
        raise RequestError(
            404,
            "chat is not supported, only completions; use POST /v1/completions",
            code="unsupported",
        )

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict[str, str]:
        service.check_health()
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=ServerMetrics.CONTENT_TYPE)

    app.include_router(v1)

    @app.exception_handler(RequestError)
    async def answer_error(request: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> Response:
        path, detail = shown(request.url.path), str(error.detail).lower()
        text = f"{request.method} {path}: {detail}; there are GET /v1/models, /health, /metrics, POST /v1/completions"
        code = "method_not_allowed" if error.status_code == 405 else "unknown_url"
        return error_response(RequestError(error.status_code, text, code=code, headers=error.headers))

    @app.exception_handler(Exception)
    async def answer_crash(request: Request, error: Exception) -> Response:
        return error_response(RequestError(500, "the server failed; its log says why"))

    return app


async def _read_body(request: Request, most: int) -> bytes:
    """Return a request's body, without reading on when it is larger than allowed.

    Raises:
        RequestError: It is (413).
    """
    body, announced = bytearray(), int(request.headers.get("content-length", "0"))
    if announced <= most:
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                break
    if max(announced, len(body)) <= most:
        return bytes(body)
    # Bytes that arrive after the answer are received and discarded: many clients read an answer only when they have
    # sent the whole body.
    raise RequestError(413, f"the body is larger than {most} bytes; send less at once", code="too_large")
