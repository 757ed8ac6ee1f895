"""Work units, tokenised by worker processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_sentinels

import numpy as np

from statex_dist.data.corpus.document_rules import DocumentRules
from statex_dist.data.corpus.documents import file_facts, read_unit
from statex_dist.data.corpus.records import ReadReport, Record
from statex_dist.data.corpus.unit_files import UnitJob, UnitResult, UnitWriter
from statex_dist.data.tokenizer import load_tokenizer
from statex_dist.errors import DataError, shown, writing

_BATCH_RECORDS = 256
_BATCH_SIZE = 4 << 20


@dataclass(frozen=True, slots=True)
class TokenizeTask:
    """The settings that all units share."""

    tokenizer: str
    dtype: str
    rules: DocumentRules


class UnitTokenizer:
    """Tokenises units, each into files of its own."""

    def __init__(self, task: TokenizeTask):
        self._task = task
        self._tokenizer = load_tokenizer(task.tokenizer)
        self._text = self._tokenizer.for_corpus(task.rules.special_tokens)
        # Whether records that were read, but not yet written, hold a marker of a special token.
        self._marked: deque[bool] = deque()
        self._marker = ""
        # To name a line, a file is read from its start: this is done once in a process, not forevery unit.
        self._named = False
        self._reading = ReadReport()

    def run(self, job: UnitJob) -> UnitResult:
        """Tokenise the unit of ``job``.

        Raises:
            DataError: An input is unreadable or malformed, or changed since the run began.
        """
        with writing(job.base):
            writer = UnitWriter(job.base, self._task.dtype)
            try:
                return self._run(job, writer)
            except BaseException:
                writer.abort()
                raise

    def _run(self, job: UnitJob, writer: UnitWriter) -> UnitResult:
        rules = self._task.rules
        reading = self._reading = ReadReport()
        self._marked.clear()
        self._marker = ""
        short = long = 0
        records = read_unit(job.unit, self._tokenizer.vocab_size, rules, reading)
        for batch in _batches(self._watched(records)):
            for begin, ids, mask, end in self._encode(batch):
                marked = self._marked.popleft()
                length = len(ids) + (begin is not None) + (end is not None)
                # BOS and EOS alone are no document, though there is a target among them.
                if length < rules.min_tokens or (begin is not None and not len(ids)):
                    short += 1
                elif rules.max_tokens is not None and length > rules.max_tokens:
                    long += 1
                else:
                    writer.write(ids, mask, end, begin=begin, marked=marked)
        for path, facts in zip(job.unit.paths, job.facts, strict=True):
            if file_facts(path) != facts:
                raise DataError(f"{path} changed while it was being read; run the command again")
        # The place is known to the reader at work only; other processes cannot ask it.
        reading.here = str
        return writer.finish(short=short, long=long, reading=reading, marker=self._marker)

    def _watched(self, records: Iterator[Record]) -> Iterator[Record]:
        """Pass records on, and note which of them hold a marker of a special token in their text.

        Raises:
            DataError: One does, and the rules refuse it.
        """
        for record in records:
            marker = None if record.text is None else self._text.marker_in(record.text)
            self._marked.append(marker is not None)
            if marker is not None and not self._named:
                self._named = True
                self._marker = f"{self._reading.here()}: the text holds {shown(marker, 60)}, a special token's marker"
                if self._task.rules.special_tokens == "refuse":
                    raise DataError(
                        f"{self._marker}; take it out, or give --special-tokens split (as plain text) or keep (as the "
                        "control token)"
                    )
            yield record

    def _encode(self, records: list[Record]) -> Iterator[tuple[int | None, np.ndarray, np.ndarray | None, int | None]]:
        """Yield BOS, ids, mask and EOS; BOS and EOS only if they must be added."""
        bos = self._tokenizer.bos_token_id if self._task.rules.bos == "prepend" else None
        eos = self._tokenizer.eos_token_id if self._task.rules.eos == "append" else None
        try:
            encoded = self._text.encode_batch([record.text for record in records if record.text is not None])
        except DataError as error:
            raise DataError(f"{self._reading.here()}, or at most {len(records) - 1} records before: {error}") from error
        # Taken from the end of a reversed list, so that a document is let go of once it is written.
        encoded.reverse()
        for record in records:
            if record.input_ids is None:
                ids = encoded.pop()
                # A normalizer makes markers of other text: of full-width or capital letters.
                if self._task.rules.special_tokens == "keep" and not self._marked[0] and self._text.has_control(ids):
                    self._marked[0] = True
                    if not self._named:
                        self._named = True
                        place = f"{self._reading.here()}, or at most {len(records) - 1} records before"
                        self._marker = f"{place}: the normalizer makes a special token's marker of the text"
                yield bos, ids, None, eos
            else:
                ids = record.input_ids
                ending = self._tokenizer.eos_token_id
                self._reading.joined += ending is not None and bool((ids[1:-1] == ending).any())
                begun, ended = (len(ids) > 0 and ids[i] == added for i, added in ((0, bos), (-1, eos)))
                yield None if begun else bos, ids, record.loss_mask, None if ended else eos


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Group records for the tokenizer: many short ones, few long ones, so that a batch is small in memory."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.text or "")
        if size >= _BATCH_SIZE or len(batch) == _BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_WAITING_JOBS = 4


def tokenize_units(jobs: Sequence[UnitJob], task: TokenizeTask, workers: int) -> Iterator[tuple[int, UnitResult]]:
    """Yield the index and the result of every job, as they finish.

    A bad unit raises only after the results of all units before it, so that the error (or, where the caller has
    enough by then, its absence) does not depend on the number of workers. One worker is this process.

    Raises:
        DataError: The first bad unit's error, or a process that ended by itself.
    """
    workers = min(workers, max(1, len(jobs)))
    if workers == 1:
        tokenizer = UnitTokenizer(task)
        for i, job in enumerate(jobs):
            yield i, tokenizer.run(job)
        return
    # spawn: a fork of a process that runs threads (torch, a progress bar) may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (task,)) as pool:
        try:
            yield from _as_finished(pool, jobs, workers)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process ended by itself (out of memory, or a script without a main guard); use 1 worker"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _as_finished(pool: ProcessPoolExecutor, jobs: Sequence[UnitJob], workers: int) -> Iterator[tuple[int, UnitResult]]:
    pending: dict[Future[UnitResult], int] = {}
    source = iter(enumerate(jobs))
    first_bad: tuple[int, BaseException] | None = None
    while True:
        if first_bad is None:
            for i, job in itertools.islice(source, _WAITING_JOBS * workers - len(pending)):
                pending[pool.submit(_run_job, job)] = i
        if not pending or (first_bad is not None and min(pending.values()) > first_bad[0]):
            break
        finished, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in sorted(finished, key=lambda future: pending[future]):
            i = pending.pop(future)
            error = future.exception()
            if error is None:
                yield i, future.result()
            elif first_bad is None or i < first_bad[0]:
                first_bad = i, error
    if first_bad is not None:
        raise first_bad[1]


_tokenizer: UnitTokenizer | None = None


def _start_worker(task: TokenizeTask) -> None:
    global _tokenizer
    # Workers are the parallelism; threads inside each of them would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    _tokenizer = UnitTokenizer(task)


def _die_with(sentinel: int) -> None:
    # A pool's worker holds both ends of its own queue, so it would outlive a killed parent, waiting for work forever.
    wait_for_sentinels([sentinel])
    os._exit(1)


def _run_job(job: UnitJob) -> UnitResult:
    assert _tokenizer is not None
    return _tokenizer.run(job)
