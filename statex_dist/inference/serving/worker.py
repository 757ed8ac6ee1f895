"""The thread that owns the model: everybody else hands it prompts and is told what became of them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence

import torch

from statex_dist.errors import StateXError
from statex_dist.inference.prefill import device_of, evaluating
from statex_dist.inference.serving.batch import ContinuousBatch, Prompt, Turn
from statex_dist.models.lm import RecurrentLM

logger = logging.getLogger(__name__)

LAST_TURN_SECONDS = 30.0
"""A turn is a segment and a step at most; one that takes longer hangs, and would keep the process for ever."""


class BusyError(StateXError):
    """Slots and queue are full; the same request may be taken later."""


class Worker:
    """Decodes in a thread of its own, first come, first served.

    Args:
        model: The model, used by nobody else from :meth:`start` to :meth:`stop`.
        batch: Its batch.
        max_open: Rows that may be in the batch or wait for a slot.
        on_turn: Told of every turn, in the thread; it must not wait.
        on_death: Told, in the thread, that an error ended it. Rows that were open then get no further progress.
    """

    def __init__(
        self,
        model: RecurrentLM,
        batch: ContinuousBatch,
        *,
        max_open: int,
        on_turn: Callable[[Turn], None],
        on_death: Callable[[], None],
    ):
        self._model, self._batch, self._max_open = model, batch, max_open
        self._on_turn, self._on_death = on_turn, on_death
        self._changed = threading.Condition()
        self._waiting: deque[Prompt] = deque()
        self._leaving: set[Hashable] = set()
        self._open: set[Hashable] = set()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    @property
    def waiting(self) -> int:
        """Rows that have no slot yet."""
        return sum(len(prompt.rows) for prompt in tuple(self._waiting))

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Put prompts into the queue, all or none.

        Raises:
            BusyError: There is no place for all of their rows.
        """
        keys = [row.key for prompt in prompts for row in prompt.rows]
        with self._changed:
            if len(self._open) + len(keys) > self._max_open:
                raise BusyError(f"{len(self._open)} completions are running or waiting, {self._max_open} are allowed")
            self._open.update(keys)
            self._waiting.extend(prompts)
            self._changed.notify()

    def cancel(self, keys: Collection[Hashable]) -> None:
        """Free the places of rows that nobody waits for any more, those of a prompt all together.

        Places in the queue are free at once, slots when the turn that runs is over.
        """
        with self._changed:
            gone = [prompt for prompt in self._waiting if prompt.rows[0].key in keys]
            if gone:
                self._waiting = deque(prompt for prompt in self._waiting if prompt.rows[0].key not in keys)
                self._open.difference_update(row.key for prompt in gone for row in prompt.rows)
            self._leaving.update(self._open.intersection(keys))
            self._changed.notify()

    def stop(self) -> bool:
        """End the thread after the turn that runs; open rows get no further progress.

        Returns:
            Whether it ended within :data:`LAST_TURN_SECONDS`.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(LAST_TURN_SECONDS)
        return not self._thread.is_alive()

    def _run(self) -> None:
        device = device_of(self._model)
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own
            with evaluating(self._model):
                while self._prepare():
                    turn = self._batch.turn()
                    with self._changed:
                        if self._stopping:  # and nobody may be there any more
                            return
                        self._open.difference_update(p.key for p in turn.progress if p.finish_reason is not None)
                    self._on_turn(turn)
        except BaseException:
            logger.exception("the decoding thread died")
            self._on_death()

    def _prepare(self) -> bool:
        """Wait for work, let rows leave and join; False to stop."""
        with self._changed:
            while not (self._stopping or self._leaving or self._waiting or self._batch.running or self._batch.reading):
                self._changed.wait()
            self._batch.drop(self._leaving)
            self._open -= self._leaving
            self._leaving.clear()
            while self._waiting and self._batch.free > 0:
                self._batch.admit(self._waiting.popleft())
            return not self._stopping
