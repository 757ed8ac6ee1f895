"""The ``perplexity`` suite: how well a model predicts whole documents, and where in them.

Documents are read from their first token to their EOS with a carried state, so that a document of any length is one
context. Several run side by side, each in its own row of the batch: at every step each row reads the next segment of
its document, and a row whose document has ended starts the next one from a zero state. Memory depends on the batch and
the segment, not on the documents, and the result on neither.

A document of ``n`` tokens has ``n - 1`` targets: all but its first token, its EOS included.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from statex_dist.data.store import Piece
from statex_dist.data.tokenizer import BytesTokenizer, Tokenizer
from statex_dist.data.types import IGNORE_INDEX
from statex_dist.errors import ConfigError, DataError
from statex_dist.evaluation.documents import up_to
from statex_dist.evaluation.report import RESULT_VERSION, Estimate, bootstrap, plot_curve, write_results
from statex_dist.evaluation.streaming import (
    DEFAULT_SEGMENT_LENGTH,
    check_finite,
    check_segment_length,
    device_of,
    evaluating,
    rows_that_fit,
)
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.sequence import LayerState
from statex_dist.ops.precision import wide_dtype

log = logging.getLogger(__name__)

_FIRST_EDGE = 64
_NUM_BUCKETS = 40
_NUM_BYTES = 256
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexitySettings:
    """How documents are read.

    Attributes:
        segment_length: Tokens of a document per forward pass.
        max_tokens: Tokens to read in all, the last document cut there; None for everything.
        batch_size: Documents side by side.
        seed: Of the interval.
    """

    segment_length: int = DEFAULT_SEGMENT_LENGTH
    max_tokens: int | None = None
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_segment_length(self.segment_length)
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ConfigError(
                f"max_tokens must be 2 or more, not {self.max_tokens}: a document's first token has no loss"
            )
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, not {self.batch_size}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, not {self.seed}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Loss of the targets at positions ``start <= p < end`` of their documents (position 0 is never a target)."""

    start: int
    end: int
    tokens: int
    loss_sum: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.loss_sum / self.tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityResult:
    """What the suite found.

    Attributes:
        settings: How the documents were read.
        loss: Nats per target token, with an interval over documents.
        loss_sum: Nats in all.
        tokens: Target tokens.
        bits_per_byte: ``loss_sum / ln 2`` over the targets that are bytes; None unless the tokenizer is bytes.
        buckets: Loss by position, empty buckets left out.
        documents: ``(tokens, loss_sum)`` of each document with targets, in order.
        seconds: Wall time.
    """

    settings: PerplexitySettings
    loss: Estimate
    loss_sum: float
    tokens: int
    bits_per_byte: float | None
    buckets: tuple[Bucket, ...]
    documents: tuple[tuple[int, float], ...]
    seconds: float

    @property
    def perplexity(self) -> float:
        """``exp`` of the loss; infinite where that is beyond a float."""
        return math.exp(self.loss.mean) if self.loss.mean < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Return the figures in the form of ``perplexity.json``."""
        return {
            "loss": self.loss.mean,
            "loss_low": self.loss.low,
            "loss_high": self.loss.high,
            # JSON has no infinity.
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "documents": len(self.documents),
            "by_position": [{**dataclasses.asdict(bucket), "loss": bucket.loss} for bucket in self.buckets],
            "settings": dataclasses.asdict(self.settings),
            "seconds": self.seconds,
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 1),
        }


@dataclass(slots=True)
class _Row:
    """A document being read: its number, and how many of its targets are done."""

    number: int
    piece: Piece
    at: int = 0

    @property
    def left(self) -> int:
        return len(self.piece.tokens) - 1 - self.at

    def segment(self, width: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the next inputs and labels, ``[min(width, left)]`` each; only they are turned to int64."""
        part = slice(self.at, self.at + min(width, self.left) + 1)
        tokens = self.piece.tokens[part].astype(np.int64)
        labels = tokens[1:]
        if self.piece.loss_mask is not None:
            labels = np.where(self.piece.loss_mask[part][1:] != 0, labels, IGNORE_INDEX)
        return tokens[:-1], labels


@dataclass(slots=True)
class _Totals:
    """Sums by document and by position bucket."""

    tokens_by_document: array = field(default_factory=lambda: array("q"))
    loss_by_document: array = field(default_factory=lambda: array("d"))
    tokens_by_bucket: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_NUM_BUCKETS, np.int64))
    loss_by_bucket: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(_NUM_BUCKETS))
    bytes: int = 0

    def add(self, row: _Row, labels: npt.NDArray[np.int64], losses: npt.NDArray[np.float64]) -> None:
        """Count the losses of the row's next targets."""
        counted = labels != IGNORE_INDEX
        bucket = _bucket_of(row.at + 1 + np.flatnonzero(counted))
        self.tokens_by_document[row.number] += int(counted.sum())
        self.loss_by_document[row.number] += float(losses[counted].sum())
        self.tokens_by_bucket += np.bincount(bucket, minlength=_NUM_BUCKETS)
        self.loss_by_bucket += np.bincount(bucket, weights=losses[counted], minlength=_NUM_BUCKETS)
        self.bytes += int((labels[counted] < _NUM_BYTES).sum())


def _bucket_of(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return 0 for positions below 64, then one bucket for each doubling."""
    return np.searchsorted(_FIRST_EDGE << np.arange(_NUM_BUCKETS - 1), positions, side="right")


def run_perplexity(
    model: RecurrentLM, documents: Iterable[Piece], settings: PerplexitySettings, *, tokenizer: Tokenizer | None = None
) -> PerplexityResult:
    """Run the suite.

    Args:
        model: The model, fp32 where the figures are to be compared.
        documents: Whole documents (:func:`~statex_dist.evaluation.documents.read_documents`); where a piece has a loss
            mask, only its ones are targets.
        settings: How to read them.
        tokenizer: The model's; bytes give bits per byte.

    Raises:
        DataError: There is no target, or a token is outside the model's vocabulary.
        CheckpointError: The model's output is not finite.
    """
    begin = time.monotonic()
    totals = _Totals()
    with evaluating(model):
        _stream(model, up_to(documents, settings.max_tokens), settings, totals)
    tokens = sum(totals.tokens_by_document)
    if not tokens:
        raise DataError("the data holds no target token: no document of two tokens or more that is not masked")
    by_document = tuple(
        (n, loss) for n, loss in zip(totals.tokens_by_document, totals.loss_by_document, strict=True) if n
    )
    edges = [0, *(_FIRST_EDGE << np.arange(_NUM_BUCKETS)).tolist()]
    buckets = (
        Bucket(start=max(start, 1), end=end, tokens=n, loss_sum=loss)
        for start, end, n, loss in zip(
            edges, edges[1:], totals.tokens_by_bucket.tolist(), totals.loss_by_bucket.tolist(), strict=False
        )
    )
    loss_sum = math.fsum(loss for _, loss in by_document)
    in_bytes = isinstance(tokenizer, BytesTokenizer) and totals.bytes > 0
    return PerplexityResult(
        settings=settings,
        loss=bootstrap([loss / n for n, loss in by_document], weights=[n for n, _ in by_document], seed=settings.seed),
        loss_sum=loss_sum,
        tokens=tokens,
        bits_per_byte=loss_sum / math.log(2) / totals.bytes if in_bytes else None,
        buckets=tuple(bucket for bucket in buckets if bucket.tokens),
        documents=by_document,
        seconds=round(time.monotonic() - begin, 3),
    )


def _stream(model: RecurrentLM, documents: Iterator[Piece], settings: PerplexitySettings, totals: _Totals) -> None:
    device = device_of(model)
    waiting = _open_rows(documents, totals)
    rows = list(itertools.islice(waiting, rows_that_fit(model, settings.segment_length, settings.batch_size)))
    states: list[LayerState] | None = None
    spoken = time.monotonic()
    while rows:
        width = min(settings.segment_length, max(row.left for row in rows))
        # A row that ends early is filled up on the right: a causal model's loss does not see it, its state is dropped.
        inputs, labels = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), IGNORE_INDEX, np.int64)
        for i, row in enumerate(rows):
            read, wanted = row.segment(width)
            inputs[i, : len(read)], labels[i, : len(read)] = read, wanted
        _check_tokens(inputs, labels, rows, model.config.vocab_size)
        output = model(torch.as_tensor(inputs, device=device), states=states, output_states=True)
        wide = output.logits.to(wide_dtype(output.logits.dtype))
        losses = F.cross_entropy(
            wide.flatten(0, 1), torch.as_tensor(labels, device=device).flatten(), reduction="none"
        ).view(labels.shape)
        check_finite(losses, f"documents {[row.number for row in rows]}, up to {width} tokens on")
        for row, wanted, row_losses in zip(rows, labels, losses.double().cpu().numpy(), strict=True):
            done = min(width, row.left)
            totals.add(row, wanted[:done], row_losses[:done])
            row.at += done
        rows, states = _next_rows(rows, output.states, waiting)
        if time.monotonic() - spoken > _SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            log.info("perplexity: %d target tokens done", sum(totals.tokens_by_document))


def _open_rows(documents: Iterator[Piece], totals: _Totals) -> Iterator[_Row]:
    for piece in documents:
        if len(piece.tokens) > 1:
            totals.tokens_by_document.append(0)
            totals.loss_by_document.append(0.0)
            yield _Row(len(totals.tokens_by_document) - 1, piece)


def _check_tokens(
    inputs: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], rows: list[_Row], vocab_size: int
) -> None:
    outside = (inputs < 0) | (inputs >= vocab_size) | (labels >= vocab_size)
    if outside.any():
        i, j = np.argwhere(outside)[0].tolist()
        raise DataError(
            f"document {rows[i].number} holds token {max(inputs[i, j], labels[i, j])}, the model's vocabulary ends at "
            f"{vocab_size - 1}; use the tokenizer that the model was trained with"
        )


def _next_rows(
    rows: list[_Row], states: list[LayerState], waiting: Iterator[_Row]
) -> tuple[list[_Row], list[LayerState] | None]:
    """Replace finished documents by waiting ones, from a zero state; close rows when none is waiting."""
    kept: list[int] = []
    fresh: list[int] = []
    result: list[_Row] = []
    for i, row in enumerate(rows):
        following = row if row.left else next(waiting, None)
        if following is not None:
            if following is not row:
                fresh.append(len(result))
            kept.append(i)
            result.append(following)
    if not fresh and len(kept) == len(rows):
        return result, states
    if len(fresh) == len(result):
        return result, None
    carried = [tuple(tensor[kept] for tensor in state) for state in states]
    for state in carried:
        for tensor in state:
            tensor[fresh] = 0
    return result, carried


def write_perplexity(result: PerplexityResult, directory: Path, *, model: dict[str, Any], data: str) -> list[Path]:
    """Write ``perplexity.json``, ``perplexity.jsonl`` and ``perplexity.png`` (loss by position).

    Args:
        result: What :func:`run_perplexity` returned.
        directory: An existing directory.
        model: What is known of the model.
        data: Where the documents came from.

    Returns:
        The files, the summary first.
    """
    losses = [Estimate(mean=b.loss, low=b.loss, high=b.loss, samples=b.tokens) for b in result.buckets]
    plot = plot_curve(
        [b.end for b in result.buckets],
        losses,
        title="Loss by position in the document",
        x_label="position (tokens), up to",
        y_label="nats per token",
        reference=([result.loss.mean] * len(losses), f"all positions: {result.loss.mean:.3f}"),
    )
    summary = {"version": RESULT_VERSION, "suite": "perplexity", "model": model, "data": data, **result.to_dict()}
    rows = ({"document": i, "tokens": n, "loss": loss / n} for i, (n, loss) in enumerate(result.documents))
    return write_results(directory, "perplexity", summary, rows, {"perplexity.png": plot})
