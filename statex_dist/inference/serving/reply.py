"""The reply to a request for completions, whole or as a stream of events, to a client that may leave at any time."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from statex_dist.inference.decoding import Progress
from statex_dist.inference.prefill import Tokens
from statex_dist.inference.serving.answer import Answer, index_of
from statex_dist.inference.serving.protocol import (
    CompletionRequest,
    RequestError,
    choice_body,
    completion_body,
    usage_body,
)
from statex_dist.inference.serving.service import Service
from statex_dist.inference.text import cut

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx hands events on at once
]


def error_response(error: RequestError) -> Response:
    """Return an error as the whole answer."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


class Reply(Response):
    """Answers a request while it watches whether the client is there: one that leaves frees its slots at once.

    Nothing is sent before there is something to send, so that a request that fails before its first token is answered
    with the right status even where a stream was asked for.

    Args:
        service: Answers the request.
        request: The request.
        prompts: Tokens of its prompts.
        arrived: When it arrived, on the event loop's clock.
    """

    def __init__(self, service: Service, request: CompletionRequest, prompts: Sequence[Tokens], arrived: float):
        super().__init__()
        self._service, self._request, self._prompts, self._arrived = service, request, prompts, arrived
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer (ASGI)."""
        answering = asyncio.create_task(self._answer(scope, receive, send))
        leaving = asyncio.create_task(_until_client_leaves(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            answering.cancel()  # no effect where it is done
            with suppress(asyncio.CancelledError):
                await answering

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "failed"
        try:
            with self._service.answer(self._request, self._prompts, arrived=self._arrived) as answer:
                self._head["seed"] = answer.seed
                if self._request.stream:
                    await self._send_stream(answer, send)
                else:
                    await JSONResponse(await self._whole(answer))(scope, receive, send)
            outcome = "ok"
        except RequestError as error:
            outcome = error.outcome
            if self._started:
                await self._send_events([error.body()], send)
                await send({"type": "http.response.body"})
            else:
                await error_response(error)(scope, receive, send)
        except asyncio.CancelledError:
            outcome = "disconnected"
            raise
        finally:
            self._service.metrics.count(outcome)

    async def _whole(self, answer: Answer) -> dict[str, Any]:
        ended: dict[int, Progress] = {}
        async for progress in answer.progress():
            ended |= {index_of(item): item for item in progress if item.finish_reason is not None}
        choices = []
        for index, item in sorted(ended.items()):
            # Decoded as one: some tokenizers join what they decode to.
            text = cut(self._service.tokenizer.decode(item.tokens), self._request.stops)
            choices.append(choice_body(index, self._echo(index) + text, item.finish_reason))
        return completion_body(self._head, choices, self._usage(sum(len(item.tokens) for item in ended.values())))

    async def _send_stream(self, answer: Answer, send: Send) -> None:
        begun: set[int] = set()
        num_tokens = 0
        async for progress in answer.progress():
            events = []
            for item in progress:
                index, text = index_of(item), item.text
                if index not in begun:
                    begun.add(index)
                    text = self._echo(index) + text
                if text or item.finish_reason is not None:
                    choice = choice_body(index, text, item.finish_reason)
                    events.append(completion_body(self._head, [choice], None))
                num_tokens += len(item.tokens)
            await self._send_events(events, send)
        if self._request.includes_usage:
            await self._send_events([completion_body(self._head, [], self._usage(num_tokens))], send)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _send_events(self, bodies: Sequence[dict[str, Any]], send: Send) -> None:
        if not bodies:
            return
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        text = "".join(f"data: {json.dumps(body, separators=(',', ':'))}\n\n" for body in bodies)
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    def _echo(self, index: int) -> str:
        """Return the text in front of a completion: its prompt, where that is asked for."""
        if not self._request.echo:
            return ""
        prompt = self._request.prompts[index // self._request.num_choices]
        return prompt if isinstance(prompt, str) else self._service.tokenizer.decode(prompt)

    def _usage(self, num_tokens: int) -> dict[str, int]:
        return usage_body(sum(map(len, self._prompts)), num_tokens)


async def _until_client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
