"""The service behind the HTTP routes: it hands requests to the worker and brings progress back to their answers."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.inference.decoding import Progress, Row, Sampling
from statex_dist.inference.memory import has_attention, measure_row
from statex_dist.inference.prefill import DEFAULT_SEGMENT_LENGTH, Tokens
from statex_dist.inference.serving.batch import BatchStepResult, ContinuousBatch, Prompt, Worker
from statex_dist.inference.serving.limits import BoundedExecutor, Limits, ServerMetrics, check_key_values
from statex_dist.inference.serving.protocol import BusyError, CompletionRequest, RequestError, parse_request, shown
from statex_dist.inference.text import stop_with_special_token
from statex_dist.models.lm import RecurrentLM


class RequestState:
    """State of a request while it is answered. It belongs to the event loop.

    Args:
        number: Number of the request; a completion's key is the number and its index.
        request: The request.
        prompts: Tokens of its prompts.
        max_tokens: Tokens of a completion at most.
        arrived: When the request arrived, on the event loop's clock.

    Attributes:
        seed: Seed of the first completion; the i-th is drawn with ``seed + i``.
        unfinished: Keys of the completions that are not at their end.
    """

    def __init__(
        self, number: int, request: CompletionRequest, prompts: Sequence[Tokens], *, max_tokens: int, arrived: float
    ):
        self.number, self.request, self.prompts, self.arrived = number, request, prompts, arrived
        self.seed = secrets.randbits(63) if request.seed is None else request.seed
        self.unfinished: set[Hashable] = {(number, index) for index in range(len(prompts) * request.num_choices)}
        self._max_tokens = max_tokens
        self._last: dict[int, float] = {}
        """When each completion got its last token."""
        self._items: asyncio.Queue[Progress | RequestError] = asyncio.Queue()

    def to_do(self) -> list[Prompt]:
        """Return the prompts with the rows that are drawn of them."""
        request = self.request
        sampling = Sampling(
            max_tokens=self._max_tokens,
            until=request.stops,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_k=request.top_k or 0,
            top_p=1.0 if request.top_p is None else request.top_p,
            ignore_eos=bool(request.ignore_eos),
        )
        count = request.num_choices
        return [
            Prompt(
                tokens=tokens,
                rows=[
                    Row(
                        key=(self.number, index),
                        sampling=sampling,
                        seed=(self.seed + index) % (1 << 64),
                        position=len(tokens),
                        context=tokens,
                    )
                    for index in range(place * count, (place + 1) * count)
                ],
            )
            for place, tokens in enumerate(self.prompts)
        ]

    def take(self, progress: Progress, now: float, metrics: ServerMetrics) -> None:
        """Take the progress of a completion."""
        index = index_of(progress)
        if progress.token is not None:
            if index in self._last:
                metrics.per_token.observe(now - self._last[index])
            elif not self._last:
                metrics.first_token.observe(now - self.arrived)
            self._last[index] = now
        if progress.error is not None:
            self.fail(RequestError(500, str(progress.error)))
            return
        if progress.finish_reason is not None:
            self.unfinished.discard(progress.key)
        self._items.put_nowait(progress)

    def fail(self, error: RequestError) -> None:
        """End the answer with an error, behind the progress that it has made."""
        self._items.put_nowait(error)

    async def progress(self) -> AsyncIterator[list[Progress]]:
        """Yield what is there, as often as there is something, to the end of all completions.

        Raises:
            RequestError: The answer failed.
        """
        left = len(self.unfinished)
        while left:
            items = [await self._items.get()]
            while not self._items.empty():
                items.append(self._items.get_nowait())
            ready = [item for item in items if isinstance(item, Progress)]
            if ready:
                yield ready
            left -= sum(item.finish_reason is not None for item in ready)
            if left:
                for item in items:
                    if isinstance(item, RequestError):
                        raise item


def index_of(progress: Progress) -> int:
    """Return the index of a completion among those of its request."""
    assert isinstance(progress.key, tuple)
    return progress.key[1]


logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1

LAST_WORDS_SECONDS = 5.0
SHORT_BODY_BYTES = 64 << 10
"""Bodies up to this are prepared in milliseconds, and do not wait for longer ones."""

LONG_PLACES = 16
"""Longer bodies that may wait to be prepared: seconds of work, and tens of megabytes."""


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
        last_words_seconds: For answers that are complete or failed to reach their clients, before those are cut.
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
        self.last_words_seconds = LAST_WORDS_SECONDS
        self.on_death: Callable[[], None] = lambda: None
        self._vocab_size = model.config.vocab_size
        self._kv_tokens: int | None = None
        if limits.max_kv_bytes is not None and has_attention(model):
            self._kv_tokens = limits.max_kv_bytes // measure_row(model).per_token
        batch = ContinuousBatch(
            model,
            tokenizer,
            max_rows=limits.max_batch_size,
            segment_length=segment_length,
            max_kv_tokens=self._kv_tokens,
        )
        self._worker = Worker(
            model, batch, max_open=limits.max_open, on_step=self._hand_over, on_death=self._hand_over_death
        )
        self._short = BoundedExecutor("requests", places=limits.max_open)
        self._long = BoundedExecutor("long requests", places=min(LONG_PLACES, limits.max_open))
        self.metrics = ServerMetrics(batch, lambda: self._worker.waiting, lambda: len(self._short) + len(self._long))
        self._answers: dict[int, RequestState] = {}
        self._num_requests = 0
        self._closed = ""
        """Why nothing is taken any more."""
        self._connections: set[Callable[[], None]] = set()
        """What cuts the connections of requests for completions that are open."""
        self._settled = asyncio.Event()
        """Whether there is no answer, or none that a stop has to wait for."""
        self._settled.set()
        self._left = asyncio.Event()
        """Whether no such connection is there."""
        self._left.set()

    def start(self) -> None:
        """Start to decode."""
        self._event_loop = asyncio.get_running_loop()
        self._worker.start()

    async def stop(self, grace_seconds: float) -> None:
        """Take no more requests, give those that are open some time, fail the others and end the decoding thread."""
        self._closed = self._closed or "the server is stopping"
        try:
            async with asyncio.timeout(grace_seconds):
                await self._settled.wait()
        except TimeoutError:
            self.give_up()
        try:
            async with asyncio.timeout(self.last_words_seconds):
                await self._left.wait()
        except TimeoutError:
            logger.warning("cutting %d connections whose clients do not read or write", len(self._connections))
            for abort in self._connections:
                abort()
        if not await asyncio.to_thread(self._worker.stop):
            logger.error("the decoding thread hangs; it is left behind")
            self.dead = True

    def give_up(self) -> None:
        """Fail the requests that are open."""
        logger.warning("stopping with %d requests unanswered", len(self._answers))
        self._fail_all(503, "the server stopped before the answer was complete; try again")
        self._settled.set()

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
                404, f"model {shown(name)} is not served here; {self.name!r} is", param="model", code="model_not_found"
            )

    @contextmanager
    def connection(self, abort: Callable[[], None]) -> Iterator[None]:
        """Know of a connection while it has a request for completions, to cut it when the server stops."""
        self._connections.add(abort)
        self._left.clear()
        try:
            yield
        finally:
            self._connections.discard(abort)
            if not self._connections:
                self._left.set()

    async def prepare(self, body: bytes, *, arrived: float) -> tuple[CompletionRequest, list[list[int]]]:
        """Return the request that a body holds and the tokens of its prompts.

        Raises:
            RequestError: It is none or beyond the limits (400), for another model (404), too much is being prepared
                (429), or it has no time left (504).
        """
        # In a thread: both may take long for a long text, and all streams would stand still.
        lane = self._short if len(body) <= SHORT_BODY_BYTES else self._long
        try:
            async with asyncio.timeout_at(arrived + self.limits.request_timeout):
                return await lane.run(lambda: self._parse_and_encode(body))
        except BusyError as error:
            raise _busy(error) from None
        except TimeoutError:
            raise self._too_late() from None

    def _parse_and_encode(self, body: bytes) -> tuple[CompletionRequest, list[list[int]]]:
        request = parse_request(body)
        self.check_model(request.model)
        self.limits.check(request)
        if (stop := stop_with_special_token(request.stops, self.tokenizer)) is not None:
            text = f"stop {shown(stop)} is a special token with other text, which no completion has"
            raise RequestError(400, f"{text}; give the special token alone", param="stop", code="invalid_value")
        prompts = self.limits.encode(request.prompts, self.tokenizer, self._vocab_size)
        check_key_values(request, prompts, self.limits.completion_tokens(request), self._kv_tokens)
        return request, prompts

    @contextmanager
    def answer(
        self, request: CompletionRequest, prompts: Sequence[Tokens], *, arrived: float
    ) -> Iterator[RequestState]:
        """Give the answer to a request. When it is left, finished or not, its slots are free.

        Args:
            request: The request.
            prompts: Of :meth:`prepare`.
            arrived: When it arrived, on the event loop's clock.

        Raises:
            RequestError: Nothing is taken any more (503), or there is no place (429).
        """
        self.check_health()
        self._num_requests += 1
        max_tokens = self.limits.completion_tokens(request)
        answer = RequestState(self._num_requests, request, prompts, max_tokens=max_tokens, arrived=arrived)
        try:
            self._worker.submit(answer.to_do())
        except BusyError as error:
            raise _busy(error) from None
        self._answers[answer.number] = answer
        self._settled.clear()
        timer = self._event_loop.call_at(arrived + self.limits.request_timeout, self._expire, answer)
        try:
            yield answer
        finally:
            timer.cancel()
            self._worker.cancel(answer.unfinished)
            del self._answers[answer.number]
            if not self._answers:
                self._settled.set()

    def _expire(self, answer: RequestState) -> None:
        # The slots are freed here: a client that does not read what it is sent must not keep them.
        self._worker.cancel(answer.unfinished)
        answer.fail(self._too_late())

    def _too_late(self) -> RequestError:
        seconds = self.limits.request_timeout
        return RequestError(504, f"the answer was not complete after {seconds:g} s and was given up", code="timeout")

    def _fail_all(self, status: int, message: str) -> None:
        for answer in self._answers.values():
            answer.fail(RequestError(status, message))

    def _hand_over(self, result: BatchStepResult) -> None:
        """Bring an iteration's results from the decoding thread to the event loop, in one call for all rows."""
        self.metrics.see_step(result)
        if result.progress:
            self._event_loop.call_soon_threadsafe(self._dispatch, result.progress)

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
        self._settled.set()
        self.on_death()


def _busy(error: BusyError) -> RequestError:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return RequestError(429, f"{error}; try again", code="queue_full", headers=headers)
