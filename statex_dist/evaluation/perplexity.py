"""The ``perplexity`` suite: how well a model predicts text, and where in it.

Documents are read from their first token to their EOS with a carried state, so that a document of any length is one
context; several run side by side (:mod:`~statex_dist.evaluation.documents`).

A document of ``n`` tokens has ``n - 1`` targets: all but its first token, its EOS included. Packed, the same documents
are joined and cut into sequences of equal length, each one context; a document's first token is no target there either.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from statex_dist.data.store import DocumentSlice
from statex_dist.data.tokenizer import BytesTokenizer, Tokenizer
from statex_dist.errors import ConfigError, DataError
from statex_dist.evaluation.documents import FIRST_EDGE, DocumentRow, pack, read_rows, up_to
from statex_dist.evaluation.journal import EvalUnit, Record, work
from statex_dist.evaluation.report import Estimate, bootstrap, check_reading, plot_curve, write_results
from statex_dist.inference.prefill import DEFAULT_SEGMENT_LENGTH
from statex_dist.models.lm import RecurrentLM

_UNIT_TOKENS = 1 << 17
_UNIT_DOCUMENTS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexitySettings:
    """Settings of reading documents.

    Attributes:
        segment_length: Tokens of a document per forward pass.
        packed_length: Join the documents and cut sequences of this number of tokens; None reads whole documents.
        max_tokens: Tokens to read in all, the last document cut there; None for everything.
        batch_size: Documents per forward pass.
        seed: Seed of the intervals.
    """

    segment_length: int = DEFAULT_SEGMENT_LENGTH
    packed_length: int | None = None
    max_tokens: int | None = None
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_reading(self)
        if self.packed_length is not None and self.packed_length < 2:
            raise ConfigError(f"packed_length must be 2 or more, not {self.packed_length}: its first token has no loss")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ConfigError(
                f"max_tokens must be 2 or more, not {self.max_tokens}: a document's first token has no loss"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossBucket:
    """Loss of the targets at positions ``start <= p < end`` of their contexts (position 0 is never a target).

    Attributes:
        start: First position.
        end: One past the last.
        tokens: Targets.
        loss_sum: Nats in all.
        loss: Nats per target, with an interval over documents (or packed sequences).
    """

    start: int
    end: int
    tokens: int
    loss_sum: float
    loss: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        place = {"start": self.start, "end": self.end, "tokens": self.tokens, "loss_sum": self.loss_sum}
        return {**place, **self.loss.to_dict("loss")}


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityResult:
    """Result of the suite.

    Attributes:
        settings: Settings of reading the documents.
        loss: Nats per target token, with an interval over documents (or packed sequences).
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
    buckets: tuple[LossBucket, ...]
    documents: tuple[tuple[int, float], ...]
    seconds: float = 0.0

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
            "by_position": [bucket.to_dict() for bucket in self.buckets],
            "settings": dataclasses.asdict(self.settings),
        }


def perplexity_units(
    model: RecurrentLM, documents: Iterable[DocumentSlice], settings: PerplexitySettings
) -> Iterator[EvalUnit]:
    """Yield the suite's units: some documents each, enough to fill batches, with a digest of their tokens in the key.

    Args:
        model: The model, fp32 where the figures are to be compared.
        documents: Whole documents (:func:`~statex_dist.evaluation.documents.read_documents`); where a piece has a loss
            mask, only its ones are targets.
        settings: How to read them.
    """
    pieces = up_to(documents, settings.max_tokens)
    if settings.packed_length is not None:
        pieces = pack(pieces, settings.packed_length)
    rows: list[DocumentRow] = []
    number = tokens = 0
    for piece in pieces:
        if len(piece.tokens) < 2:
            continue
        rows.append(DocumentRow(number, piece))
        number, tokens = number + 1, tokens + len(piece.tokens)
        if tokens >= _UNIT_TOKENS or len(rows) == _UNIT_DOCUMENTS:
            yield _unit(model, rows, settings, tokens)
            rows, tokens = [], 0
    if rows:
        yield _unit(model, rows, settings, tokens)


def _unit(model: RecurrentLM, rows: list[DocumentRow], settings: PerplexitySettings, tokens: int) -> EvalUnit:
    digest = xxhash.xxh3_64()
    for row in rows:
        digest.update(np.ascontiguousarray(row.piece.tokens, np.int64).tobytes())
        digest.update(b"" if row.piece.loss_mask is None else np.ascontiguousarray(row.piece.loss_mask).tobytes())
    return EvalUnit(
        key=f"documents {rows[0].number}..{rows[-1].number}, {digest.hexdigest()}",
        run=functools.partial(_read, model, rows, settings),
        tokens=tokens,
    )


def _read(model: RecurrentLM, rows: list[DocumentRow], settings: PerplexitySettings) -> list[Record]:
    read_rows(model, rows, segment_length=settings.segment_length, batch_size=settings.batch_size)
    return [row.record() for row in rows]


def run_perplexity(
    model: RecurrentLM,
    documents: Iterable[DocumentSlice],
    settings: PerplexitySettings,
    *,
    tokenizer: Tokenizer | None = None,
) -> PerplexityResult:
    """Run the suite in this process, in memory.

    Args:
        model: The model, fp32 where the figures are to be compared.
        documents: As in :func:`perplexity_units`.
        settings: How to read them.
        tokenizer: The model's; bytes give bits per byte.

    Raises:
        DataError: There is no target, or a token is outside the model's vocabulary.
        CheckpointError: The model's output is not finite; layer and position are named.
    """
    begin = time.monotonic()
    records = work(perplexity_units(model, documents, settings))
    assert records is not None
    result = summarise_perplexity(records, settings, tokenizer=tokenizer)
    return dataclasses.replace(result, seconds=round(time.monotonic() - begin, 3))


def summarise_perplexity(
    records: Sequence[Record], settings: PerplexitySettings, *, tokenizer: Tokenizer | None = None
) -> PerplexityResult:
    """Return the figures of all documents together.

    Raises:
        DataError: There is no target.
    """
    with_targets = [record for record in records if record["tokens"]]
    if not with_targets:
        raise DataError("the data holds no target token: no document of two tokens or more that is not masked")
    by_position: dict[int, list[tuple[int, float]]] = {}
    for record in with_targets:
        for start, tokens, loss_sum in record["by_position"]:
            by_position.setdefault(start, []).append((tokens, loss_sum))
    documents = tuple((record["tokens"], record["loss_sum"]) for record in with_targets)
    loss_sum = math.fsum(loss for _, loss in documents)
    num_bytes = sum(record["bytes"] for record in with_targets)
    return PerplexityResult(
        settings=settings,
        loss=_ratio(documents, settings),
        loss_sum=loss_sum,
        tokens=sum(n for n, _ in documents),
        bits_per_byte=loss_sum / math.log(2) / num_bytes
        if isinstance(tokenizer, BytesTokenizer) and num_bytes
        else None,
        buckets=tuple(
            LossBucket(
                start=start,
                end=max(2 * start, FIRST_EDGE),
                tokens=sum(n for n, _ in parts),
                loss_sum=math.fsum(loss for _, loss in parts),
                loss=_ratio(parts, settings),
            )
            for start, parts in sorted(by_position.items())
        ),
        documents=documents,
    )


def _ratio(parts: Sequence[tuple[int, float]], settings: PerplexitySettings) -> Estimate:
    """Return nats per target of documents' ``(tokens, loss_sum)``, drawn as whole documents."""
    return bootstrap([loss / n for n, loss in parts], weights=[n for n, _ in parts], seed=settings.seed)


def write_perplexity(
    result: PerplexityResult,
    directory: Path,
    *,
    records: Sequence[Record],
    model: Mapping[str, Any],
    data: str,
    timing: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``perplexity.json``, ``perplexity.jsonl`` and ``perplexity.png`` (loss by position)."""
    what = "document" if result.settings.packed_length is None else "packed sequence"
    plot = plot_curve(
        [bucket.end for bucket in result.buckets],
        [bucket.loss for bucket in result.buckets],
        title=f"Loss by position in the {what}",
        x_label="position (tokens), up to",
        y_label="nats per token (band: 95 % interval)",
        reference=([result.loss.mean] * len(result.buckets), f"all positions: {result.loss.mean:.3f}"),
    )
    summary = {"model": model, "data": data, **result.to_dict(), "timing": timing or {}}
    return write_results(directory, "perplexity", summary, records, {"perplexity.png": plot})
