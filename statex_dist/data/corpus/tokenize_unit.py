"""One work unit, tokenised: what a worker process does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from statex_dist.data.corpus.documents import Unit, file_facts, read_unit
from statex_dist.data.corpus.records import ReadReport, Record
from statex_dist.data.corpus.rules import DocumentRules
from statex_dist.data.corpus.spill import UnitResult, UnitWriter
from statex_dist.data.tokenizer import load_tokenizer
from statex_dist.errors import DataError

_BATCH_RECORDS = 256
_BATCH_SIZE = 4 << 20


@dataclass(frozen=True, slots=True)
class TokenizeTask:
    """What is the same for all units.

    Attributes:
        tokenizer: What :func:`load_tokenizer` takes.
        dtype: Type of the tokens.
        rules: How a record becomes a document.
    """

    tokenizer: str
    dtype: str
    rules: DocumentRules


@dataclass(frozen=True, slots=True)
class UnitJob:
    """A unit to tokenise.

    Attributes:
        unit: What to read.
        facts: Size and modification time of each of its files when the run began.
        base: Path of the result's files, without their suffixes.
    """

    unit: Unit
    facts: tuple[tuple[int, int], ...]
    base: str


class UnitTokenizer:
    """Tokenises units, each into files of its own."""

    def __init__(self, task: TokenizeTask):
        self._task = task
        self._tokenizer = load_tokenizer(task.tokenizer)

    def run(self, job: UnitJob) -> UnitResult:
        """Tokenise the unit of ``job``.

        Raises:
            DataError: An input is unreadable or malformed, or changed since the run began.
        """
        writer = UnitWriter(job.base, self._task.dtype)
        try:
            return self._run(job, writer)
        except BaseException:
            writer.abort()
            raise

    def _run(self, job: UnitJob, writer: UnitWriter) -> UnitResult:
        rules = self._task.rules
        reading = ReadReport()
        short = long = 0
        records = read_unit(job.unit, self._tokenizer.vocab_size, rules, reading)
        for batch in _batches(records):
            for ids, mask, end in self._encode(batch):
                length = len(ids) + (end is not None)
                if length < rules.min_tokens:
                    short += 1
                elif rules.max_tokens is not None and length > rules.max_tokens:
                    long += 1
                else:
                    writer.write(ids, mask, end)
        for path, facts in zip(job.unit.paths, job.facts, strict=True):
            if file_facts(path) != facts:
                raise DataError(f"{path} changed while it was being read; run the command again")
        return writer.finish(short=short, long=long, reading=reading)

    def _encode(self, records: list[Record]) -> Iterator[tuple[np.ndarray, np.ndarray | None, int | None]]:
        """Yield ids, mask and the EOS that is to follow them, if it is."""
        eos = self._tokenizer.eos_token_id if self._task.rules.eos == "append" else None
        encoded = self._tokenizer.encode_batch([record.text for record in records if record.text is not None])
        # Taken from the end of a reversed list, so that a document is let go of once it is written.
        encoded.reverse()
        for record in records:
            if record.input_ids is None:
                yield encoded.pop(), None, eos
            else:
                ended = len(record.input_ids) > 0 and record.input_ids[-1] == eos
                yield record.input_ids, record.loss_mask, None if ended else eos


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
