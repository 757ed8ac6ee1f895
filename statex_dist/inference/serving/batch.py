"""Continuous batching: prompts are read between the steps of rows that are being written, and join them when read.

A row's state has one size whatever it has read, so a slot is a slot: there is nothing to page, to evict or to move.
Keys and values of a hybrid grow, and those of a batch are as long as its longest row: a prompt waits until all rows fit
into memory at the greatest length that any of them may reach. All else that has to be planned is who reads when.

A prompt is admitted when a slot is free; where it has more rows than there are slots, its first rows start when it is
read and the others as slots come free, before anybody who came later. An iteration reads a bounded piece and then takes
one step, so that a long prompt holds up running rows by a segment at a time; prompts take turns in reading, so that a
short one overtakes a long one.

The worker is the thread that owns the model: everybody else hands it prompts and is told what became of them.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass

import torch

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import CheckpointError
from statex_dist.inference.decoding import DecodingLoop, Progress, Row
from statex_dist.inference.prefill import DEFAULT_SEGMENT_LENGTH, Tokens, device_of, evaluating, prefill
from statex_dist.inference.rows import take_rows
from statex_dist.inference.serving.protocol import BusyError
from statex_dist.models.core.sequences import LayerState
from statex_dist.models.lm import RecurrentLM

MAX_PASSES = 8
"""Forward passes of reading in an iteration. Short prompts cost a pass each, whatever their number of tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt with the continuations that are drawn of it.

    Attributes:
        tokens: One or more.
        rows: One or more; the prompt is read once for all of them.
    """

    tokens: Tokens
    rows: Sequence[Row]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchStepResult:
    """Result of an iteration.

    Attributes:
        progress: Progress of every row that took a step or ended.
        tokens_read: Tokens of prompts that were read.
        rows: Rows that took the step.
    """

    progress: Sequence[Progress]
    tokens_read: int
    rows: int


@dataclass(kw_only=True, slots=True)
class _PromptReading:
    prompt: Prompt
    rows: list[Row]
    """Those that have not started."""
    at: int = 0
    states: list[LayerState] | None = None
    logits: torch.Tensor | None = None
    """After the last token, when all are read."""


class ContinuousBatch:
    """Rows that are read and written together. To be used inside :func:`~statex_dist.inference.prefill.evaluating`.

    Every prompt is read by itself and cut at multiples of the segment length, as it would be alone: what a request is
    answered does not depend on its company.

    Args:
        model: The model.
        tokenizer: The model's tokenizer.
        max_rows: Slots.
        segment_length: Most tokens that are read between two steps.
        max_kv_tokens: Tokens of all rows together whose keys and values may be kept, or None for any number.
    """

    def __init__(
        self,
        model: RecurrentLM,
        tokenizer: Tokenizer,
        *,
        max_rows: int,
        segment_length: int = DEFAULT_SEGMENT_LENGTH,
        max_kv_tokens: int | None = None,
    ):
        self._model, self._segment_length, self._max_rows = model, segment_length, max_rows
        self._max_kv_tokens = max_kv_tokens
        self._device = device_of(model)
        self._loop = DecodingLoop(model, tokenizer)
        self._admitted: list[_PromptReading] = []
        """Prompts with rows that have not started, as they came."""
        self._reading: deque[_PromptReading] = deque()
        """Those that are not read yet, the next in front."""

    @property
    def running(self) -> int:
        """Rows that are being written."""
        return len(self._loop)

    @property
    def reading(self) -> int:
        """Rows whose prompt is being read, or is read while their slots are not free yet."""
        return sum(len(reading.rows) for reading in tuple(self._admitted))

    @property
    def free(self) -> int:
        """Slots without a row; below 0 while admitted rows wait for their slots."""
        return self._max_rows - self.running - self.reading

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of rows that are being written."""
        return self._loop.state_bytes

    @property
    def key_value_bytes(self) -> int:
        """Bytes of keys and values of rows that are being written; a part of :attr:`state_bytes`."""
        return self._loop.key_value_bytes

    def fits(self, prompt: Prompt) -> bool:
        """Return whether a prompt may be admitted: a slot is free, and there is memory for keys and values."""
        rows = [*self._loop.rows, *(row for reading in self._admitted for row in reading.rows)]
        if self.free <= 0:
            return False
        if self._max_kv_tokens is None or not rows:
            return True
        rows += prompt.rows
        return len(rows) * max(row.most_tokens for row in rows) <= self._max_kv_tokens

    def admit(self, prompt: Prompt) -> None:
        """Read a prompt, and give its rows the slots that are free and those that come free next."""
        assert len(prompt.tokens)
        assert self.free > 0
        reading = _PromptReading(prompt=prompt, rows=list(prompt.rows))
        self._admitted.append(reading)
        self._reading.append(reading)

    def drop(self, keys: Collection[Hashable]) -> None:
        """Let rows leave before their end; keys that are not here are passed over."""
        self._loop.drop(keys)
        for reading in self._admitted:
            reading.rows = [row for row in reading.rows if row.key not in keys]
        self._forget_started()

    def step(self) -> BatchStepResult:
        """Read a piece of the waiting prompts, and take one step."""
        failed, tokens_read = self._read()
        self._start()
        rows = self.running
        return BatchStepResult(progress=failed + self._loop.step(), tokens_read=tokens_read, rows=rows)

    def _read(self) -> tuple[list[Progress], int]:
        """Read up to a segment of tokens in a few passes; return the rows whose prompt the model cannot take."""
        failed: list[Progress] = []
        tokens_read = 0
        for _ in range(MAX_PASSES):
            if not self._reading:
                break
            reading = self._reading[0]
            piece = reading.prompt.tokens[reading.at : reading.at + self._segment_length]
            if tokens_read + len(piece) > self._segment_length:
                break
            self._reading.popleft()
            failed += self._read_piece(reading, piece)
            tokens_read += len(piece)
        return failed, tokens_read

    def _read_piece(self, reading: _PromptReading, piece: Tokens) -> list[Progress]:
        ids = torch.tensor([list(piece)], device=self._device)
        try:
            logits, states = prefill(
                self._model, ids, segment_length=self._segment_length, states=reading.states, position=reading.at
            )
        except CheckpointError as error:
            failed, reading.rows = reading.rows, []
            return [Progress(key=row.key, token=None, text="", finish_reason="error", error=error) for row in failed]
        reading.at, reading.states = reading.at + len(piece), states
        if reading.at < len(reading.prompt.tokens):
            self._reading.append(reading)
        else:
            reading.logits = logits
        return []

    def _start(self) -> None:
        """Let rows whose prompt is read have the slots that are not promised to those who came before them."""
        if not self._admitted:
            return
        room = self._max_rows - self.running
        for reading in self._admitted:
            if room <= 0:
                break
            starting = reading.rows[:room]
            room -= len(starting)
            if reading.logits is not None and starting:
                assert reading.states is not None
                copies = [0] * len(starting)
                self._loop.add(starting, reading.logits[copies], take_rows(reading.states, copies))
                reading.rows = reading.rows[len(starting) :]
        self._forget_started()

    def _forget_started(self) -> None:
        self._admitted = [reading for reading in self._admitted if reading.rows]
        self._reading = deque(reading for reading in self._reading if reading.rows)


logger = logging.getLogger(__name__)

LAST_STEP_SECONDS = 30.0
"""An iteration is a segment and a step at most; one that takes longer hangs, and would never let the process end."""


class Worker:
    """Decodes in a thread of its own, first come, first served.

    Args:
        model: The model, used by no other thread from :meth:`start` to :meth:`stop`.
        batch: Its batch.
        max_open: Rows that may be in the batch or wait for a slot.
        on_step: Told of every iteration, in the thread; it must not wait.
        on_death: Told, in the thread, that an error ended it. Rows that were open then get no further progress.
    """

    def __init__(
        self,
        model: RecurrentLM,
        batch: ContinuousBatch,
        *,
        max_open: int,
        on_step: Callable[[BatchStepResult], None],
        on_death: Callable[[], None],
    ):
        self._model, self._batch, self._max_open = model, batch, max_open
        self._on_step, self._on_death = on_step, on_death
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
        """Free the places of rows that no client waits for any more, those of a prompt all together.

        Places in the queue are free at once, slots when the iteration that runs is over.
        """
        with self._changed:
            gone = [prompt for prompt in self._waiting if prompt.rows[0].key in keys]
            if gone:
                self._waiting = deque(prompt for prompt in self._waiting if prompt.rows[0].key not in keys)
                self._open.difference_update(row.key for prompt in gone for row in prompt.rows)
            self._leaving.update(self._open.intersection(keys))
            self._changed.notify()

    def stop(self) -> bool:
        """End the thread after the iteration that runs; open rows get no further progress.

        Returns:
            Whether it ended within :data:`LAST_STEP_SECONDS`.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(LAST_STEP_SECONDS)
        return not self._thread.is_alive()

    def _run(self) -> None:
        device = device_of(self._model)
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own
            with evaluating(self._model):
                while self._prepare():
                    result = self._batch.step()
                    with self._changed:
                        if self._stopping:  # and no listener may be there any more
                            return
                        self._open.difference_update(p.key for p in result.progress if p.finish_reason is not None)
                    self._on_step(result)
        except BaseException:
            logger.exception("the decoding thread died")
            self._on_death()

    def _prepare(self) -> bool:
        """Wait for work, let rows leave and join; False to stop."""
        with self._changed:
            while not (self._stopping or self._leaving or self._waiting or self._batch.running or self._batch.reading):
                self._changed.wait()
            if self._leaving:
                self._batch.drop(self._leaving)
                self._open -= self._leaving
                self._leaving.clear()
            while self._waiting and self._batch.fits(self._waiting[0]):
                self._batch.admit(self._waiting.popleft())
            return not self._stopping
