"""The inputs of ``statex prepare`` on their way to tokenised units."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from statex_dist.data.corpus.document_rules import DocumentRules
from statex_dist.data.corpus.documents import (
    DEFAULT_SUFFIXES,
    WorkUnit,
    check_filterable,
    find_files,
    read_unit,
    split_units,
)
from statex_dist.data.corpus.records import BadRecordError, ReadReport
from statex_dist.data.corpus.text_files import check_text
from statex_dist.data.corpus.tokenize_units import TokenizeTask, tokenize_units
from statex_dist.data.corpus.unit_files import UnitDocuments, UnitJob, UnitResult
from statex_dist.data.corpus.unit_results import BadRecordLog, BadRecordNames, UnitResults, finished_units
from statex_dist.data.corpus.work import WorkDirectory, WorkPart
from statex_dist.data.manifest import DatasetManifest, hash_lengths
from statex_dist.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer
from statex_dist.durable.progress import ProgressLine
from statex_dist.errors import ConfigError, DataError

log = logging.getLogger(__name__)

# Below this, starting processes costs more than it saves.
_SERIAL_BYTES = 8 << 20
_MARKER_FATES = {
    "split": "it is encoded as plain text (--special-tokens keep: as the control token)",
    "keep": "the tokenizer encodes it, most often as a control token (--special-tokens split: as plain text)",
    "refuse": "it is refused",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkOptions:
    """How the work is done; but for ``max_documents``, the result does not depend on it.

    Attributes:
        workers: Processes; ``None``: one for each core, one in all for small inputs.
        max_documents: Documents that are enough, in input order; ``None`` for all.
        suffixes: Suffixes taken from directories, each also with ``.gz`` or ``.zst`` behind it.
        overwrite: Replace an existing dataset.
        work: Work directory; ``None``: ``.{name}.work`` beside the dataset. Removed when the dataset is complete.
    """

    workers: int | None = None
    max_documents: int | None = None
    suffixes: Sequence[str] = DEFAULT_SUFFIXES
    overwrite: bool = False
    work: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "max_documents"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")


class Source:
    """The inputs, found and split, and what tokenises them.

    Raises:
        ConfigError: The tokenizer lacks a token that the rules need.
        DataError: An input is missing or unreadable.
    """

    def __init__(self, inputs: Sequence[str | Path], tokenizer: str | Path, rules: DocumentRules, options: WorkOptions):
        self._loaded: Tokenizer = load_tokenizer(tokenizer)
        self.rules = rules
        self.options = options
        _check_added(self._loaded, rules)
        self._honoured: set[str] = set()
        self._unused: set[str] = set()
        self.files = find_files(inputs, options.suffixes)
        self._units, total_bytes = split_units(self.files)
        if rules.where:
            check_filterable(self._units)
        self.dtype = "uint16" if self._loaded.vocab_size <= 65535 else "uint32"
        self._warned = False
        self._task = TokenizeTask(str(tokenizer), self.dtype, rules)
        # A job of a scheduler may have fewer cores than the machine.
        self._workers = options.workers or (1 if total_bytes < _SERIAL_BYTES else len(os.sched_getaffinity(0)))

    def open_work(self, out: str | Path, *, part: WorkPart | None = None, merge: bool = False) -> WorkDirectory:
        """Return the work directory of ``out``, not entered yet."""
        target = Path(out).resolve()
        path = Path(self.options.work) if self.options.work is not None else target.parent / f".{target.name}.work"
        settings = {"tokenizer_hash": self._loaded.hash, "dtype": self.dtype, **self.rules.as_dict()}
        return WorkDirectory(path, settings, self._units, part=part, merge=merge)

    def check_first_records(self) -> None:
        """Check the first records of the inputs before any work begins.

        Raises:
            DataError: An input is unreadable or malformed.
        """
        # With enough documents in the first unit, later inputs are not read: they must not fail the run.
        units = self._units if self.options.max_documents is None else self._units[:1]
        check_first_records(units, self._loaded.vocab_size, self.rules)

    def tokenize(self, jobs: Sequence[UnitJob]) -> UnitResults:
        """Do what is left to do of ``jobs``.

        Raises:
            DataError: An input is unreadable or malformed.
        """
        results, todo = finished_units(jobs, self.dtype, self.options.max_documents)
        self._warn(results.taken())
        if results.before:
            log.info("resuming: %d of %d units are done", results.before, len(jobs))
        if results.enough:
            return results
        log_bad = BadRecordLog([job.unit for job in jobs], set(todo))
        with ProgressLine("tokenize", len(jobs), "units", done=results.before) as progress:
            for k, result in tokenize_units([jobs[i] for i in todo], self._task, self._workers):
                self._report(result.reading)
                self._warn([result])
                results.add(todo[k], result)
                log_bad.follow(results)
                progress.advance(1, int(result.lengths.sum()))
                if results.enough:
                    break
        return results

    def _report(self, reading: ReadReport) -> None:
        """Log which files a unit could not decode, and which fields were honoured or not used."""
        for message in reading.undecodable:
            log.warning("left out: %s", message)
        if honoured := [name for name in reading.columns if name not in self._honoured]:
            self._honoured.update(honoured)
            log.info("fields read beside input_ids: %s", ", ".join(honoured))
        if unused := [name for name in reading.unused if name not in self._unused]:
            self._unused.update(unused)
            level = logging.WARNING if reading.kind == "text" else logging.INFO
            log.log(level, "fields that are not used, in rows of %s: %s", reading.kind, ", ".join(unused))

    def merge(self, work: WorkDirectory) -> UnitResults:
        """Return what the parts have done.

        Raises:
            DataError: A part has units to do.
        """
        results, missing = finished_units(work.jobs, self.dtype, self.options.max_documents)
        if results.enough:
            self._warn(results.taken())
            return results
        if work.parts is None:
            raise DataError(f"{len(missing)} of {len(work.jobs)} units are to do; run without --merge to do them")
        lacking = []
        for index in range(1, work.parts + 1):
            jobs = work.jobs[index - 1 :: work.parts]
            if to_do := finished_units(jobs, self.dtype, self.options.max_documents)[0].missing:
                lacking.append(f"part {index}/{work.parts} has {to_do} of {len(jobs)} units to do")
        raise DataError(f"{'; '.join(lacking)}; run {'it' if len(lacking) == 1 else 'them'} again, then --merge")

    def _warn(self, results: Sequence[UnitResult]) -> None:
        """Name the first record with a marker of a special token in its text, once."""
        first = next((result.marker for result in results if result.marker), "")
        if first and not self._warned:
            self._warned = True
            log.warning("%s; %s; all such documents are counted", first, _MARKER_FATES[self.rules.special_tokens])

    def manifest(
        self,
        documents: UnitDocuments,
        found: UnitResults,
        lengths: np.ndarray,
        shard_documents: list[int],
        *,
        format: str,
        seed: int,
    ) -> DatasetManifest:
        """Return the manifest of ``documents``, whose ``lengths`` ``[documents]`` are in stored order."""
        powers = np.frexp(lengths.astype(np.float64))[1] - 1
        ends = np.cumsum(shard_documents)
        return DatasetManifest(
            format=format,
            tokenizer=self._task.tokenizer,
            tokenizer_hash=self._loaded.hash,
            vocab_size=self._loaded.vocab_size,
            eos_token_id=self._loaded.eos_token_id,
            eos=self.rules.eos,
            bos_token_id=self._loaded.bos_token_id,
            bos=self.rules.bos,
            special_tokens=self.rules.special_tokens,
            special_token_documents=documents.marked,
            documents=len(lengths),
            tokens=int(lengths.sum()),
            dtype=self.dtype,
            loss_mask=documents.has_masks,
            seed=seed,
            shard_documents=shard_documents,
            shard_tokens=[int(part.sum()) for part in np.split(lengths, ends[:-1])],
            lengths_hash=hash_lengths(lengths),
            length_histogram=np.bincount(powers).tolist(),
            left_out=found.left_out(),
            rows=found.rows,
        )


def _check_added(tokenizer: Tokenizer, rules: DocumentRules) -> None:
    """Refuse rules that need a token which the tokenizer lacks; log the tokens that its template would add.

    Raises:
        ConfigError: There is no BOS or EOS to add.
    """
    if rules.eos == "append" and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"tokenizer {tokenizer.spec} has no EOS token to end documents with; give --eos none, or set eos_token in "
            "its tokenizer_config.json"
        )
    if rules.bos == "prepend" and tokenizer.bos_token_id is None:
        or_set = "" if isinstance(tokenizer, BytesTokenizer) else ", or set bos_token in its tokenizer_config.json"
        raise ConfigError(
            f"tokenizer {tokenizer.spec} has no BOS token to begin documents with; give --bos none{or_set}"
        )
    start = tokenizer.template_start()
    if rules.bos == "none" and start:
        names = ", ".join(f"{tokenizer.token_name(token)} (id {token})" for token in start)
        advice = "; --bos prepend begins documents with it" if start == [tokenizer.bos_token_id] else ""
        log.info("tokenizer %s puts %s in front of a text; --bos none leaves it out%s", tokenizer.spec, names, advice)


_MOST_FILES = 32
_FIRST_RECORDS = 16
_FIRST_BYTES = 1 << 20


def check_first_records(units: Sequence[WorkUnit], vocab_size: int, rules: DocumentRules) -> None:
    """Read the first records of up to 32 files, spread over all; warn if all are bad and bad ones are skipped.

    Raises:
        DataError: A record is no document, or a file is not readable.
    """
    firsts = [unit for unit in units if not unit.begin]
    count = min(len(firsts), _MOST_FILES)
    bad: list[str] = []
    good = 0
    for i in range(count):
        unit = firsts[i * len(firsts) // count]
        if unit.kind == "text":
            good += _check_text(unit.paths[0], rules)
            continue
        report = ReadReport()
        for _ in islice(read_unit(unit, vocab_size, rules, report, sample=True), _FIRST_RECORDS):
            good += 1
        good += report.filtered
        bad += BadRecordNames().of(unit, report)
    if bad and not good:
        log.warning("all of the first records are bad: %s", bad[0])


def _check_text(path: str, rules: DocumentRules) -> bool:
    """Return whether the start of a text file is good; raise if bad ones are not skipped."""
    try:
        check_text(path, _FIRST_BYTES)
    except BadRecordError:
        if not (rules.skip_bad_records or rules.skip_undecodable):
            raise
        return False
    return True
