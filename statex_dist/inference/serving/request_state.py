"""An answer in the making: what the worker is to do for a request, and what has come of it so far."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Hashable, Sequence

from statex_dist.inference.decoding import Progress, Row
from statex_dist.inference.prefill import Tokens
from statex_dist.inference.sampling import Sampling
from statex_dist.inference.serving.batch import Prompt
from statex_dist.inference.serving.metrics import Metrics
from statex_dist.inference.serving.protocol import CompletionRequest, RequestError


class Answer:
    """What becomes of a request, as it comes. It belongs to the event loop.

    Args:
        number: Of the request; a completion's key is the number and its index.
        request: The request.
        prompts: Tokens of its prompts.
        max_tokens: Tokens of a completion at most.
        arrived: When the request arrived, on the event loop's clock.

    Attributes:
        seed: Of the first completion; the i-th is drawn with ``seed + i``.
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

    def take(self, progress: Progress, now: float, metrics: Metrics) -> None:
        """Take the progress of a completion."""
        index = index_of(progress)
        if progress.token is not None:
            if index in self._last:
                metrics.see_token(now - self._last[index])
            elif not self._last:
                metrics.see_first_token(now - self.arrived)
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
