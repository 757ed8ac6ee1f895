"""The reply to a request for completions, whole or as a stream of events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Send

from statex_dist.inference.decoding import Progress
from statex_dist.inference.serving.protocol import (
    RequestError,
    choice_body,
    completion_body,
    usage_body,
)
from statex_dist.inference.serving.request_state import Answer, index_of
from statex_dist.inference.serving.service import Service

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx hands events on at once
]


def error_response(error: RequestError) -> Response:
    """Return an error as the whole answer."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


class Reply:
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

    def __init__(self, service: Service, answer: Answer, send: Send):
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
        # Every sending waits for what was sent before: without this one, a client that does not read would be done.
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
