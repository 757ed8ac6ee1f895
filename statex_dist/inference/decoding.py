"""The decoding loop: rows that take one step a token together, and come and go between steps.

Every row has its own sampling, random numbers, text and end. A row is its state, of one size however much it read, and
a hybrid's keys and values, which grow. A batch is the states of its rows side by side: joining is a concatenation and
leaving a selection, and a step writes over them. ``statex generate`` and the server run this same loop.

The next token is the most likely one, or drawn with temperature, top-k and top-p, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError, StateXError
from statex_dist.inference.prefill import explain_step
from statex_dist.inference.rows import join_rows, key_value_bytes, state_bytes, take_rows
from statex_dist.inference.text import TextStream, end_ids
from statex_dist.models.core.sequences import LayerState
from statex_dist.models.lm import RecurrentLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a continuation is drawn.

    Attributes:
        max_tokens: Tokens at most.
        until: Strings that end a continuation and are no part of it. EOS always does, unless ``ignore_eos``.
        temperature: 0 takes the most likely token.
        top_k: Draw from this number of most likely tokens only; 0 for all.
        top_p: Draw from the fewest tokens whose probability is at least this (arXiv 1904.09751).
        ignore_eos: Whether a continuation continues after EOS, always to ``max_tokens`` (for measurements).
    """

    max_tokens: int
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be 1 or more, not {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ConfigError(
                f"temperature {self.temperature:g}, top_k {self.top_k} and top_p {self.top_p:g} make no sampling; "
                "allowed: temperature and top_k of 0 or more, top_p above 0 and at most 1"
            )
        if "" in self.until:
            raise ConfigError("a stop string is empty; give one character or more")


def choose_tokens(
    logits: torch.Tensor, samplings: Sequence[Sampling], generators: Sequence[np.random.Generator]
) -> torch.Tensor:
    """Return each row's next token, ``[B]`` int64 on the device of ``logits [B, vocab]``.

    Args:
        logits: ``[B, vocab]``, finite.
        samplings: How each row is drawn.
        generators: Each row's own: what it draws does not depend on the rows beside it.
    """
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen[rows] = _draw(logits[rows], [samplings[row] for row in drawn], [generators[row] for row in drawn])
    return chosen


def _draw(
    logits: torch.Tensor, samplings: Sequence[Sampling], generators: Sequence[np.random.Generator]
) -> torch.Tensor:
    """Draw one token a row, in float64: a small top-p share of a large vocabulary is lost in fp32."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    # From the largest down: a tiny temperature then makes the others -inf, and never one infinite and all the rest NaN.
    scaled = logits.double() - logits.amax(dim=-1, keepdim=True)
    scaled /= column([sampling.temperature for sampling in samplings])
    values, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    kept = column([sampling.top_k or logits.shape[-1] for sampling in samplings])
    values = values.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= kept, -torch.inf)
    shares = values.softmax(dim=-1)
    # A token is left out where those before it have the wanted probability already.
    before = shares.cumsum(dim=-1) - shares
    shares = shares.masked_fill(before >= column([sampling.top_p for sampling in samplings]), 0.0)
    bounds = shares.cumsum(dim=-1) / shares.sum(dim=-1, keepdim=True)
    points = column([generator.random() for generator in generators])
    # Rounding may leave the last bound below 1: never go beyond the last token that has a share.
    last = (shares > 0).sum(dim=-1, keepdim=True) - 1
    places = torch.searchsorted(bounds, points, right=True).minimum(last)
    return tokens.gather(1, places)[:, 0]


FinishReason = Literal["stop", "length", "error"]
"""Why a row ended: EOS or a stop string, its ``max_tokens``, or numbers that are not finite."""

Agree = Callable[[torch.Tensor], torch.Tensor]
"""Gives every rank the tokens ``[B]`` that rank 0 has chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A continuation to be drawn.

    Attributes:
        key: What its progress is reported under, unlike that of any other row in the loop.
        sampling: How it is drawn.
        seed: Of its random numbers.
        position: Tokens read before it, for messages.
        context: Tokens read before it, or the last of them: its text depends on them.
    """

    key: Hashable
    sampling: Sampling
    seed: int = 0
    position: int = 0
    context: Sequence[int] = ()

    @property
    def most_tokens(self) -> int:
        """Tokens at its end, those before it among them."""
        return self.position + self.sampling.max_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Result of a step for a row.

    Attributes:
        key: Key of the row.
        token: The token that the row produced; None for a token that ends a text and is no part of it.
        text: Text that is final now, perhaps empty: whole characters, nothing of a stop string.
        overlap: Characters at the end of the prompt's text that the row's text replaces; final with its first text.
        finish_reason: Why the row ended and left, or None.
        tokens: All tokens that the row has produced, if it ended; else empty.
        whole: All text of the row, if it ended; else empty.
        error: The error, if ``finish_reason`` is ``error``.
    """

    key: Hashable
    token: int | None
    text: str
    overlap: int = 0
    finish_reason: FinishReason | None = None
    tokens: Sequence[int] = ()
    whole: str = ""
    error: StateXError | None = None


@dataclass(kw_only=True, slots=True)
class _Running:
    row: Row
    generator: np.random.Generator
    text: TextStream
    ends: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def take(self, token: int) -> Progress:
        """Add a token to the row and say what became of it."""
        if token in self.ends:
            return self._finished("stop", None, self.text.finish())
        self.tokens.append(token)
        text = self.text.push(token)
        if self.text.stopped:
            return self._finished("stop", token, text)
        if len(self.tokens) == self.row.sampling.max_tokens:
            return self._finished("length", token, text + self.text.finish())
        self.said.append(text)
        return Progress(key=self.row.key, token=token, text=text, overlap=self.text.overlap)

    def failed(self, error: StateXError) -> Progress:
        return Progress(
            key=self.row.key, token=None, text="", finish_reason="error", tokens=tuple(self.tokens), error=error
        )

    def _finished(self, reason: FinishReason, token: int | None, text: str) -> Progress:
        return Progress(
            key=self.row.key,
            token=token,
            text=text,
            overlap=self.text.overlap,
            finish_reason=reason,
            tokens=tuple(self.tokens),
            whole="".join([*self.said, text]),
        )


class DecodingLoop:
    """Rows that decode together. To be used inside :func:`~statex_dist.inference.prefill.evaluating`.

    Args:
        model: The model.
        tokenizer: The model's tokenizer.
        agree: Where several ranks hold parts of the model: makes them all take the same tokens.
    """

    def __init__(self, model: RecurrentLM, tokenizer: Tokenizer, *, agree: Agree | None = None):
        self._model, self._tokenizer, self._agree = model, tokenizer, agree
        self._rows: list[_Running] = []
        self._logits: torch.Tensor | None = None
        self._states: list[LayerState] = []
        self._owns_states = False
        """Whether nobody else has them: a step then writes over them."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[Row]:
        """The rows, in the order in which they joined."""
        return [running.row for running in self._rows]

    @property
    def state_bytes(self) -> int:
        """Bytes of all rows' states, keys and values among them."""
        return state_bytes(self._states)

    @property
    def key_value_bytes(self) -> int:
        """Bytes of all rows' keys and values."""
        return key_value_bytes(self._states)

    def add(self, rows: Sequence[Row], logits: torch.Tensor, states: Sequence[LayerState]) -> None:
        """Let rows join.

        Args:
            rows: ``n`` of them.
            logits: ``[n, vocab]`` after what each has read.
            states: Each layer's state ``[n, ...]`` there.
        """
        assert len(rows) == len(logits), (len(rows), logits.shape)
        for row in rows:
            until, ignore_eos = row.sampling.until, row.sampling.ignore_eos
            self._rows.append(
                _Running(
                    row=row,
                    generator=np.random.Generator(np.random.Philox(row.seed)),
                    text=TextStream(self._tokenizer, until, context=row.context),
                    ends=end_ids(until, self._tokenizer, ignore_eos=ignore_eos),
                )
            )
        if self._logits is None:
            self._logits, self._states, self._owns_states = logits, list(states), False
            return
        self._logits = torch.cat([self._logits, logits])
        self._states = join_rows(self._states, states)
        self._owns_states = True

    def drop(self, keys: Collection[Hashable]) -> None:
        """Let rows leave before their end; keys that are not in the loop are passed over."""
        self._keep([i for i, running in enumerate(self._rows) if running.row.key not in keys])

    def step(self) -> list[Progress]:
        """Produce one token for every row and report each, in the order in which they joined.

        A row whose numbers are not finite ends with an error; the others continue.
        """
        if not self._rows:
            return []
        assert self._logits is not None
        samplings = [running.row.sampling for running in self._rows]
        chosen = choose_tokens(self._logits, samplings, [running.generator for running in self._rows])
        if self._agree is not None:
            chosen = self._agree(chosen)
        progress = [running.take(token) for running, token in zip(self._rows, chosen.tolist(), strict=True)]
        going = [i for i, done in enumerate(progress) if done.finish_reason is None]
        self._keep(going)
        if not going:
            return progress
        ids = (chosen if len(going) == len(chosen) else chosen[going])[:, None]
        output = self._model(
            ids, states=self._states, output_states=True, overwrite_states=self._owns_states, logits_to_keep=1
        )
        self._logits, self._states, self._owns_states = output.logits[:, -1], output.states, True
        bad = ~torch.isfinite(self._logits).all(dim=-1)
        if bad.any():
            for i, place in enumerate(going):
                if bad[i]:
                    position = self._rows[i].row.position + len(self._rows[i].tokens) - 1
                    progress[place] = self._rows[i].failed(
                        explain_step(self._model, self._states, i, position=position)
                    )
            self._keep((~bad).nonzero()[:, 0].tolist())
        return progress

    def _keep(self, places: Sequence[int]) -> None:
        if len(places) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in places]
        if not places:
            self._logits, self._states = None, []
            return
        assert self._logits is not None
        self._logits, self._states = self._logits[places], take_rows(self._states, places)
        self._owns_states = True
