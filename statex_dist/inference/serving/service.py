"""The service behind the HTTP routes: it hands requests to the worker and brings progress back to their answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.inference.decoding import Progress
from statex_dist.inference.prefill import DEFAULT_SEGMENT_LENGTH, Tokens
from statex_dist.inference.serving.answer import Answer
from statex_dist.inference.serving.batch import ContinuousBatch, Turn
from statex_dist.inference.serving.limits import Limits
from statex_dist.inference.serving.metrics import Metrics
from statex_dist.inference.serving.protocol import CompletionRequest, RequestError
from statex_dist.inference.serving.worker import BusyError, Worker
from statex_dist.models.lm import RecurrentLM

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1


class Service:
    """Answers requests for completions with one model. It belongs to the event loop that starts it.

    Args:
        model: The model.
        tokenizer: The model's tokenizer.
        name: What requests call the model.
        limits: What is taken.
        segment_length: Most tokens that are read between two steps.

    Attributes:
        metrics: What Prometheus is told.
        dead: Whether the decoding thread has died, or hangs.
        on_death: Called when it has.
    """

    def __init__(
        self,
        model: RecurrentLM,
        tokenizer: Tokenizer,
        *,
        name: str,
        limits: Limits,
        segment_length: int = DEFAULT_SEGMENT_LENGTH,
    ):
        self.name, self.limits, self.tokenizer = name, limits, tokenizer
        self.dead = False
        self.on_death: Callable[[], None] = lambda: None
        self._vocab_size = model.config.vocab_size
        batch = ContinuousBatch(model, tokenizer, max_rows=limits.max_batch_size, segment_length=segment_length)
        self._worker = Worker(
            model, batch, max_open=limits.max_open, on_turn=self._hand_over, on_death=self._hand_over_death
        )
        self.metrics = Metrics(batch, lambda: self._worker.waiting)
        self._answers: dict[int, Answer] = {}
        self._num_requests = 0
        self._closed = ""
        """Why nothing is taken any more."""
        self._idle = asyncio.Event()
        self._idle.set()

    def start(self) -> None:
        """Start to decode."""
        self._event_loop = asyncio.get_running_loop()
        self._worker.start()

    async def stop(self, grace_seconds: float) -> None:
        """Take no more requests, give those that are open some time, fail the others and end the decoding thread."""
        self._closed = self._closed or "the server is stopping"
        try:
            async with asyncio.timeout(grace_seconds):
                await self._idle.wait()
        except TimeoutError:
            self.give_up()
        if not await asyncio.to_thread(self._worker.stop):
            logger.error("the decoding thread hangs; it is left behind")
            self.dead = True

    def give_up(self) -> None:
        """Fail the requests that are open."""
        logger.warning("stopping with %d requests unanswered", len(self._answers))
        self._fail_all(503, "the server stopped before the answer was complete; try again")

    def check_health(self) -> None:
        """Raise if no request is taken any more.

        Raises:
            RequestError: The server is stopping, or its decoding thread has died (503).
        """
        if self._closed:
            raise RequestError(503, self._closed, code="unavailable")

    def check_model(self, name: str) -> None:
        """Raise unless ``name`` is the model's.

        Raises:
            RequestError: It is not (404).
        """
        if name != self.name:
            raise RequestError(
                404, f"model {name!r} is not served here; {self.name!r} is", param="model", code="model_not_found"
            )

    async def encode(self, request: CompletionRequest) -> list[list[int]]:
        """Return the tokens of a request's prompts.

        Raises:
            RequestError: The request is for another model (404) or beyond the limits (400).
        """
        self.check_model(request.model)
        self.limits.check(request)
        # In a thread: a tokenizer may take seconds for a long text, and all streams would stand still.
        return await asyncio.to_thread(self.limits.encode, request.prompts, self.tokenizer, self._vocab_size)

    @contextmanager
    def answer(self, request: CompletionRequest, prompts: Sequence[Tokens], *, arrived: float) -> Iterator[Answer]:
        """Give the answer to a request. When it is left, finished or not, its slots are free.

        Args:
            request: The request.
            prompts: Of :meth:`encode`.
            arrived: When it arrived, on the event loop's clock.

        Raises:
            RequestError: Nothing is taken any more (503), or there is no place (429).
        """
        self.check_health()
        self._num_requests += 1
        max_tokens = self.limits.completion_tokens(request)
        answer = Answer(self._num_requests, request, prompts, max_tokens=max_tokens, arrived=arrived)
        try:
            self._worker.submit(answer.to_do())
        except BusyError as error:
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            raise RequestError(429, f"{error}; try again", code="queue_full", headers=headers) from None
        self._answers[answer.number] = answer
        self._idle.clear()
        timer = self._event_loop.call_at(arrived + self.limits.request_timeout, self._expire, answer)
        try:
            yield answer
        finally:
            timer.cancel()
            self._worker.cancel(answer.unfinished)
            del self._answers[answer.number]
            if not self._answers:
                self._idle.set()

    def _expire(self, answer: Answer) -> None:
        # The slots are freed here: a client that does not read what it is sent must not keep them.
        self._worker.cancel(answer.unfinished)
        seconds = self.limits.request_timeout
        answer.fail(
            RequestError(504, f"the answer was not complete after {seconds:g} s and was given up", code="timeout")
        )

    def _fail_all(self, status: int, message: str) -> None:
        for answer in self._answers.values():
            answer.fail(RequestError(status, message))

    def _hand_over(self, turn: Turn) -> None:
        """Bring a turn from the decoding thread to the event loop, in one call for all rows."""
        self.metrics.see_turn(turn)
        if turn.progress:
            self._event_loop.call_soon_threadsafe(self._dispatch, turn.progress)

    def _dispatch(self, progress: Sequence[Progress]) -> None:
        now = self._event_loop.time()
        for item in progress:
            assert isinstance(item.key, tuple)
            if (answer := self._answers.get(item.key[0])) is not None:
                answer.take(item, now, self.metrics)

    def _hand_over_death(self) -> None:
        self._event_loop.call_soon_threadsafe(self._die)

    def _die(self) -> None:
        self.dead, self._closed = True, "the decoding thread died; the server's log says of what"
        self._fail_all(500, self._closed)
        self.on_death()
