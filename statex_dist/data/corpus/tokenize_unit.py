"""One work unit, tokenised: what a worker process does."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from statex_dist.data.corpus.documents import Unit, file_facts, read_unit
from statex_dist.data.corpus.records import ReadReport, Record
from statex_dist.data.corpus.rules import DocumentRules
from statex_dist.data.corpus.unit_files import UnitResult, UnitWriter
from statex_dist.data.tokenizer import load_tokenizer
from statex_dist.errors import DataError, shown, writing

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
        self._text = self._tokenizer.for_corpus(task.rules.special_tokens)
        # Whether records that were read, but not yet written, hold a marker of a special token.
        self._marked: deque[bool] = deque()
        self._marker = ""
        # To name a line, a file is read from its start: this is done once in a process, not for every unit.
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
