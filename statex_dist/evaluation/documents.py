"""Whole documents for evaluation, from a prepared dataset or straight from text files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from statex_dist.batch import IGNORE_INDEX
from statex_dist.data.corpus.documents import find_files, read_unit, split_units
from statex_dist.data.formats import open_store
from statex_dist.data.manifest import is_hash_of
from statex_dist.data.store import DocumentSlice, sequential_documents
from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import DataError
from statex_dist.evaluation.journal import Record
from statex_dist.inference.prefill import device_of, evaluating, explain_row, rows_that_fit
from statex_dist.inference.rows import clear_rows, take_rows
from statex_dist.inference.vocabulary import token_outside
from statex_dist.models.core.sequences import LayerState
from statex_dist.models.lm import RecurrentLM


def read_documents(path: Path, tokenizer: Tokenizer) -> Iterator[DocumentSlice]:
    """Yield whole documents, one in memory at a time.

    Args:
        path: A prepared dataset (a directory with ``index.json``), or text, JSON-lines or parquet files: a file, a
            directory or a glob. Those are tokenised as they are read, as ``statex prepare`` does by default: markers of
            special tokens become plain text, and an EOS stands behind each document if the tokenizer has one.
        tokenizer: The model's tokenizer.

    Raises:
        DataError: Nothing is there, a file cannot be read, or the dataset was made with another tokenizer.
    """
    if path.is_dir() and (path / "index.json").is_file():
        store = open_store(path)
        if store.manifest is not None and not is_hash_of(tokenizer, store.manifest.tokenizer_hash):
            raise DataError(
                f"dataset {path} was prepared with tokenizer {store.manifest.tokenizer!r}, the model has another "
                f"({tokenizer.spec!r}); prepare it with the model's tokenizer"
            )
        yield from sequential_documents(store)
        return
    if path.is_dir() and not any(path.iterdir()):
        raise DataError(f"data directory {path} is empty; give text files or what `statex prepare` wrote")
    units, _ = split_units(find_files([path]))
    eos = tokenizer.eos_token_id
    text = tokenizer.for_corpus("split")
    for unit in units:
        for record in read_unit(unit, tokenizer.vocab_size):
            ids, mask = record.input_ids, record.loss_mask
            if ids is None:
                ids = text.encode_batch([record.text or ""])[0].astype(np.int64)
            if eos is not None and (not len(ids) or ids[-1] != eos):
                ids = np.append(ids, eos)
                mask = None if mask is None else np.append(mask, np.uint8(0))
            yield DocumentSlice(ids, mask)


def up_to(documents: Iterable[DocumentSlice], max_tokens: int | None) -> Iterator[DocumentSlice]:
    """Yield documents until ``max_tokens`` are given out, cutting the last one there."""
    left = max_tokens
    for piece in documents:
        if left is not None and len(piece.tokens) >= left:
            yield DocumentSlice(piece.tokens[:left], None if piece.loss_mask is None else piece.loss_mask[:left])
            return
        if left is not None:
            left -= len(piece.tokens)
        yield piece


def pack(documents: Iterable[DocumentSlice], length: int) -> Iterator[DocumentSlice]:
    """Yield the documents joined and cut into pieces of ``length`` tokens, the last one shorter.

    A document's first token is no target: nothing before it foretells it.
    """
    tokens: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    held = 0
    for piece in documents:
        mask = np.ones(len(piece.tokens), np.uint8) if piece.loss_mask is None else piece.loss_mask.copy()
        mask[:1] = 0
        tokens.append(piece.tokens.astype(np.int64))
        masks.append(mask)
        held += len(mask)
        if held >= length:
            joined, joined_mask = np.concatenate(tokens), np.concatenate(masks)
            whole = held - held % length
            for start in range(0, whole, length):
                yield DocumentSlice(joined[start : start + length], joined_mask[start : start + length])
            tokens, masks, held = [joined[whole:]], [joined_mask[whole:]], held - whole
    if held:
        yield DocumentSlice(np.concatenate(tokens), np.concatenate(masks))


FIRST_EDGE = 64
"""The first bucket of positions ends here; each further one is twice as long as all before it."""

_NUM_BUCKETS = 40
_NUM_BYTES = 256


@dataclass(slots=True)
class DocumentRow:
    """A document being read: its number, how many of its targets are done, and their sums by position bucket."""

    number: int
    piece: DocumentSlice
    at: int = 0
    bytes: int = 0
    loss_sum: float = 0.0
    tokens_by_bucket: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_NUM_BUCKETS, np.int64))
    loss_by_bucket: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(_NUM_BUCKETS))

    @property
    def left(self) -> int:
        """Targets that are not read yet."""
        return len(self.piece.tokens) - 1 - self.at

    def segment(self, width: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the next inputs and labels, ``[min(width, left)]`` each; only they are turned to int64."""
        part = slice(self.at, self.at + min(width, self.left) + 1)
        tokens = self.piece.tokens[part].astype(np.int64)
        labels = tokens[1:]
        if self.piece.loss_mask is not None:
            labels = np.where(self.piece.loss_mask[part][1:] != 0, labels, IGNORE_INDEX)
        return tokens[:-1], labels

    def add(self, labels: npt.NDArray[np.int64], losses: npt.NDArray[np.float64]) -> None:
        """Count the losses of the next targets and move on behind them."""
        counted = labels != IGNORE_INDEX
        bucket = _bucket_of(self.at + 1 + np.flatnonzero(counted))
        self.loss_sum += float(losses[counted].sum())
        self.tokens_by_bucket += np.bincount(bucket, minlength=_NUM_BUCKETS)
        self.loss_by_bucket += np.bincount(bucket, weights=losses[counted], minlength=_NUM_BUCKETS)
        self.bytes += int((labels[counted] < _NUM_BYTES).sum())
        self.at += len(labels)

    def record(self) -> Record:
        """Return what was found; ``by_position`` holds first position, targets and nats of each bucket."""
        filled = np.flatnonzero(self.tokens_by_bucket).tolist()
        return {
            "document": self.number,
            "tokens": int(self.tokens_by_bucket.sum()),
            "loss_sum": self.loss_sum,
            "bytes": self.bytes,
            "by_position": [
                [max(_edge(i), 1), int(self.tokens_by_bucket[i]), float(self.loss_by_bucket[i])] for i in filled
            ],
        }


def _bucket_of(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return 0 for positions below 64, then one bucket for each doubling."""
    return np.searchsorted(FIRST_EDGE << np.arange(_NUM_BUCKETS - 1), positions, side="right")


def _edge(bucket: int) -> int:
    return FIRST_EDGE << (bucket - 1) if bucket else 0


def read_rows(model: RecurrentLM, documents: Sequence[DocumentRow], *, segment_length: int, batch_size: int) -> None:
    """Read documents and count their losses.

    Args:
        model: The model, fp32 where the figures are to be compared.
        documents: Documents of two tokens or more, of which nothing is read yet.
        segment_length: Tokens of a document per forward pass.
        batch_size: Documents side by side, fewer where the logits would take too much memory.

    Raises:
        DataError: A token is outside the model's vocabulary.
        CheckpointError: The model's output is not finite; layer and position are named.
    """
    with evaluating(model):
        _read(model, iter(documents), segment_length, rows_that_fit(model, segment_length, batch_size))


def _read(model: RecurrentLM, waiting: Iterator[DocumentRow], segment_length: int, batch_size: int) -> None:
    device = device_of(model)
    rows = list(itertools.islice(waiting, batch_size))
    states: list[LayerState] | None = None
    while rows:
        width = min(segment_length, max(row.left for row in rows))
        # A row that ends early is filled up on the right: a causal model's loss does not see it, its state is dropped.
        inputs, labels = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), IGNORE_INDEX, np.int64)
        for i, row in enumerate(rows):
            read, wanted = row.segment(width)
            inputs[i, : len(read)], labels[i, : len(read)] = read, wanted
        _check_tokens(inputs, labels, rows, model.config.vocab_size)
        ids = torch.as_tensor(inputs, device=device)
        output = model(ids, states=states, output_states=True)
        wide = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
        losses = F.cross_entropy(
            wide.flatten(0, 1), torch.as_tensor(labels, device=device).flatten(), reduction="none"
        ).view(labels.shape)
        if not torch.isfinite(losses).all():
            bad = (~torch.isfinite(losses)).any(dim=1)
            raise explain_row(model, ids, states, bad, [row.at for row in rows])
        for row, wanted, row_losses in zip(rows, labels, losses.double().cpu().numpy(), strict=True):
            done = min(width, row.left)
            row.add(wanted[:done], row_losses[:done])
        rows, states = _next_rows(rows, output.states, waiting)


def _check_tokens(
    inputs: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], rows: list[DocumentRow], vocab_size: int
) -> None:
    outside = (inputs < 0) | (inputs >= vocab_size) | (labels >= vocab_size)
    if outside.any():
        i, j = np.argwhere(outside)[0].tolist()
        raise token_outside(max(inputs[i, j], labels[i, j]), vocab_size, f"document {rows[i].number}")


def _next_rows(
    rows: list[DocumentRow], states: list[LayerState], waiting: Iterator[DocumentRow]
) -> tuple[list[DocumentRow], list[LayerState] | None]:
    """Replace finished documents by waiting ones, from a zero state; close rows when none is waiting."""
    kept: list[int] = []
    fresh: list[int] = []
    result: list[DocumentRow] = []
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
    return result, clear_rows(take_rows(states, kept), fresh)
