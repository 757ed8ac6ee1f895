"""Whole documents for evaluation, from a prepared dataset or straight from text files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from statex_dist.data.corpus.documents import find_files, read_unit, split_units
from statex_dist.data.formats import open_store
from statex_dist.data.manifest import is_hash_of
from statex_dist.data.store import Piece, sequential_documents
from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import DataError


def read_documents(path: Path, tokenizer: Tokenizer) -> Iterator[Piece]:
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
            yield Piece(ids, mask)


def up_to(documents: Iterable[Piece], max_tokens: int | None) -> Iterator[Piece]:
    """Yield documents until ``max_tokens`` are given out, cutting the last one there."""
    left = max_tokens
    for piece in documents:
        if left is not None and len(piece.tokens) >= left:
            yield Piece(piece.tokens[:left], None if piece.loss_mask is None else piece.loss_mask[:left])
            return
        if left is not None:
            left -= len(piece.tokens)
        yield piece


def pack(documents: Iterable[Piece], length: int) -> Iterator[Piece]:
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
                yield Piece(joined[start : start + length], joined_mask[start : start + length])
            tokens, masks, held = [joined[whole:]], [joined_mask[whole:]], held - whole
    if held:
        yield Piece(np.concatenate(tokens), np.concatenate(masks))
