"""Text, JSON lines and parquet to shards of tokenised documents.

1. The inputs are split into work units (:mod:`statex_dist.data.documents`).
2. Worker processes tokenise units; each appends its documents to a spill file of its own and reports their lengths.
3. All documents are permuted by the seed and written as shards, read from the memory-mapped spill files. Shards are
   thus shuffled globally, which the loader's shuffle within windows relies on.
4. The manifest is written last, everything is flushed, and the directory is renamed into place.

Memory holds the documents' lengths and one shard, never the corpus; the disk holds the tokens twice while it works.
The result does not depend on the number of workers.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from statex_dist.data.documents import DEFAULT_SUFFIXES, Record, Unit, find_files, read_unit, split_units
from statex_dist.data.manifest import LENGTHS_NAME, DatasetManifest, hash_lengths, pack_lengths
from statex_dist.data.mds import MdsShardWriter
from statex_dist.data.plan import permutation
from statex_dist.data.progress import ProgressLine
from statex_dist.data.spill import Spill, UnitResult, append
from statex_dist.data.staging import Staging
from statex_dist.data.tokenizer import Tokenizer, load_tokenizer
from statex_dist.errors import ConfigError, DataError

log = logging.getLogger(__name__)

FORMATS = ("mds",)
COMPRESSIONS = ("none", "zstd")
# Below this, starting processes costs more than it saves.
_SERIAL_BYTES = 8 << 20
_BATCH_TEXTS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSummary:
    """What :func:`prepare` did.

    Attributes:
        out: The dataset directory.
        files: Input files.
        documents: Documents written.
        short_documents: Documents left out because they had fewer than ``min_tokens`` tokens.
        undecodable_files: Text files left out because they are not UTF-8 (with ``skip_undecodable``).
        tokens: Tokens written, EOS included.
        shards: Shards written.
        dtype: Type of the tokens.
        seconds: Wall time.
    """

    out: str
    files: int
    documents: int
    short_documents: int
    undecodable_files: int
    tokens: int
    shards: int
    dtype: str
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens written per second of wall time."""
        return self.tokens / max(self.seconds, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for ``--json``."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path = "bytes",
    *,
    format: str = "mds",
    workers: int | None = None,
    text_field: str = "text",
    seed: int = 0,
    shard_bytes: int = 64 << 20,
    compression: str = "none",
    min_tokens: int = 2,
    max_documents: int | None = None,
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    skip_undecodable: bool = False,
    overwrite: bool = False,
) -> PrepareSummary:
    """Tokenise ``inputs`` into shards under ``out``.

    A text file is one document; a line of ``.jsonl`` and a row of ``.parquet`` are one document each, from their
    ``text_field`` or, tokenised already, from ``input_ids`` with an optional ``loss_mask``. EOS is appended to every
    document (to ``input_ids`` only where it is missing, with mask 0 where there is a mask).

    Args:
        inputs: Files, directories or globs.
        out: Directory to make. It appears complete or not at all.
        tokenizer: ``"bytes"`` or a directory with a Hugging Face fast tokenizer.
        format: ``"mds"``.
        workers: Processes; default: one for each core, one in all for small inputs.
        text_field: Field or column of the text.
        seed: Seed of the document shuffle.
        shard_bytes: Size limit of a raw shard.
        compression: ``"none"`` or ``"zstd"``.
        min_tokens: Shorter documents (EOS included) are left out; a document below 2 tokens has no target.
        max_documents: Stop after so many documents, in input order.
        suffixes: Suffixes taken from directories.
        skip_undecodable: Leave out text files that are not UTF-8, with a warning each, instead of stopping.
        overwrite: Replace an existing dataset.

    Raises:
        ConfigError: An argument is out of its range, or ``out`` exists and is not to be replaced.
        DataError: An input is missing, empty, unreadable or malformed.
    """
    begin = time.monotonic()
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}; allowed: {', '.join(FORMATS)}")
    if compression not in COMPRESSIONS:
        raise ConfigError(f"compression is {compression!r}; allowed: {', '.join(COMPRESSIONS)}")
    for name, value in (("workers", workers), ("min_tokens", min_tokens), ("max_documents", max_documents)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    loaded = load_tokenizer(tokenizer)
    files = find_files(inputs, suffixes)
    units, total_bytes = split_units(files)
    dtype = "uint16" if loaded.vocab_size <= 65535 else "uint32"
    if workers is None:
        workers = 1 if total_bytes < _SERIAL_BYTES else os.cpu_count() or 1

    with Staging(Path(out), overwrite=overwrite, inputs=files) as staging:
        task = _Task(str(tokenizer), str(staging.scratch), dtype, text_field, min_tokens, skip_undecodable)
        results: list[UnitResult] = []
        found = 0
        with ProgressLine("tokenize", len(units), "units") as progress:
            for result in _tokenize(units, task, min(workers, max(1, len(units)))):
                results.append(result)
                for message in result.undecodable:
                    log.warning("left out: %s", message)
                found += len(result.lengths)
                progress.advance(1, int(result.lengths.sum()))
                if max_documents is not None and found >= max_documents:
                    break
        spill = Spill(results, dtype, max_documents)
        short = sum(result.short for result in results)
        if not len(spill.lengths):
            raise DataError(
                f"no documents in {len(files)} input file{'s' * (len(files) != 1)} ({short} shorter than "
                f"{min_tokens} tokens); give files with text in them"
            )
        writer = MdsShardWriter(
            staging.directory, dtype=dtype, loss_mask=spill.has_masks, compression=compression, shard_bytes=shard_bytes
        )
        try:
            order = permutation(len(spill.lengths), seed, "prepare")
            with ProgressLine("write", len(order), "documents") as progress:
                for i in order.tolist():
                    tokens, mask = spill.read(i)
                    writer.write(tokens, mask)
                    progress.advance(1, len(tokens))
            writer.finish()
        except BaseException:
            writer.abort()
            raise
        lengths = spill.lengths[order]
        (staging.directory / LENGTHS_NAME).write_bytes(pack_lengths(lengths))
        left_out = {"short": short, "undecodable": sum(len(result.undecodable) for result in results)}
        manifest = _manifest(loaded, tokenizer, lengths, spill.has_masks, dtype, seed, writer.shard_documents, left_out)
        staging.commit(manifest)
    return PrepareSummary(
        out=str(out),
        files=len(files),
        documents=manifest.documents,
        short_documents=short,
        undecodable_files=sum(len(result.undecodable) for result in results),
        tokens=manifest.tokens,
        shards=len(manifest.shard_tokens),
        dtype=dtype,
        seconds=time.monotonic() - begin,
    )


def _manifest(
    loaded: Tokenizer,
    tokenizer: str | Path,
    lengths: np.ndarray,
    loss_mask: bool,
    dtype: str,
    seed: int,
    shard_documents: list[int],
    left_out: dict[str, int],
) -> DatasetManifest:
    powers = np.frexp(lengths.astype(np.float64))[1] - 1
    ends = np.cumsum(shard_documents)
    return DatasetManifest(
        format="mds",
        tokenizer=str(tokenizer),
        tokenizer_hash=loaded.hash,
        vocab_size=loaded.vocab_size,
        eos_token_id=loaded.eos_token_id,
        eos="append",
        documents=len(lengths),
        tokens=int(lengths.sum()),
        dtype=dtype,
        loss_mask=loss_mask,
        seed=seed,
        shard_documents=shard_documents,
        shard_tokens=[int(part.sum()) for part in np.split(lengths, ends[:-1])],
        lengths_hash=hash_lengths(lengths),
        length_histogram=np.bincount(powers).tolist(),
        left_out=left_out,
    )


@dataclass(frozen=True, slots=True)
class _Task:
    tokenizer: str
    scratch: str
    dtype: str
    text_field: str
    min_tokens: int
    skip_undecodable: bool


def _tokenize(units: list[Unit], task: _Task, workers: int) -> Iterator[UnitResult]:
    """Yield the result of every unit, in order; the first bad unit in that order raises."""
    if workers == 1:
        worker = _Worker(task)
        yield from map(worker.run, units)
        return
    # spawn: a fork of a process that runs threads (torch, a progress bar) may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (task,)) as pool:
        pending: deque[Future[UnitResult]] = deque()
        source = iter(units)
        try:
            pending.extend(pool.submit(_run_unit, unit) for unit in itertools.islice(source, 4 * workers))
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(_run_unit, unit) for unit in itertools.islice(source, 1))
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process ended by itself (out of memory, or a script without a main guard); use 1 worker"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """Tokenises units and appends them to spill files that belong to this process alone."""

    def __init__(self, task: _Task):
        self._task = task
        self._tokenizer = load_tokenizer(task.tokenizer)
        self._dtype = np.dtype(task.dtype)
        self._path = str(Path(task.scratch) / f"spill-{os.getpid()}")

    def run(self, unit: Unit) -> UnitResult:
        tokens: list[np.ndarray] = []
        masks: list[np.ndarray | None] = []
        short = 0
        undecodable: list[str] = []
        skipping = undecodable if self._task.skip_undecodable else None
        records = read_unit(unit, self._tokenizer.vocab_size, self._task.text_field, skipping)
        while batch := list(itertools.islice(records, _BATCH_TEXTS)):
            for ids, mask in self._encode(batch):
                if len(ids) < self._task.min_tokens:
                    short += 1
                    continue
                tokens.append(ids.astype(self._dtype, copy=False))
                masks.append(mask)
        lengths = np.array([len(ids) for ids in tokens], np.int64)
        masks_at = None
        if any(mask is not None for mask in masks):
            whole = [
                np.ones(len(ids), np.uint8) if mask is None else mask for ids, mask in zip(tokens, masks, strict=True)
            ]
            masks_at = append(self._path + "m", whole)
        return UnitResult(self._path, append(self._path, tokens), masks_at, lengths, short, undecodable)

    def _encode(self, records: list[Record]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        eos = self._tokenizer.eos_token_id
        encoded = iter(self._tokenizer.encode_batch([record.text for record in records if record.text is not None]))
        for record in records:
            ids, mask = record.input_ids, record.loss_mask
            if ids is None:
                yield np.append(next(encoded), np.uint32(eos)), None
            elif len(ids) and ids[-1] == eos:
                yield ids, mask
            else:
                yield np.append(ids, eos), None if mask is None else np.append(mask, np.uint8(0))


_worker: _Worker | None = None


def _start_worker(task: _Task) -> None:
    global _worker
    # Workers are the parallelism; threads inside each of them would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    _worker = _Worker(task)


def _die_with(sentinel: int) -> None:
    # A pool's worker holds both ends of its own queue, so it would outlive a killed parent, waiting for work for ever.
    wait([sentinel])
    os._exit(1)


def _run_unit(unit: Unit) -> UnitResult:
    assert _worker is not None
    return _worker.run(unit)
