"""The inputs of ``statex prepare`` on their way to tokenised units."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from statex_dist.data.corpus.documents import Unit, check_filterable, find_files, split_units
from statex_dist.data.corpus.first_records import check_first_records
from statex_dist.data.corpus.records import LISTED, ReadReport
from statex_dist.data.corpus.rules import DocumentRules
from statex_dist.data.corpus.tokenize_unit import TokenizeTask, UnitJob
from statex_dist.data.corpus.unit_files import UnitResult
from statex_dist.data.corpus.unit_results import BadRecordNames, UnitResults, finished_units
from statex_dist.data.corpus.work import Part, WorkDirectory
from statex_dist.data.corpus.worker_pool import tokenize_units
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


class Source:
    """The inputs, found and split, and what tokenises them.

    Args:
        inputs: Files, directories or globs.
        tokenizer: What :func:`load_tokenizer` takes.
        rules: How records become documents.
        suffixes: Suffixes taken from directories.
        workers: Processes; ``None``: one for each core, one in all for small inputs.
        max_documents: Documents that are enough, in input order; ``None`` for all.

    Attributes:
        files: The input files.
        dtype: Type of the tokens.

    Raises:
        ConfigError: An argument is out of its range.
        DataError: An input is missing or unreadable.
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        tokenizer: str | Path,
        rules: DocumentRules,
        suffixes: Sequence[str],
        workers: int | None,
        max_documents: int | None,
    ):
        for name, value in (("workers", workers), ("max_documents", max_documents)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        self._loaded: Tokenizer = load_tokenizer(tokenizer)
        self._rules = rules
        _check_added(self._loaded, rules)
        self._limit = max_documents
        self._honoured: set[str] = set()
        self._unused: set[str] = set()
        self.files = find_files(inputs, suffixes)
        self._units, total_bytes = split_units(self.files)
        if rules.where:
            check_filterable(self._units)
        self.dtype = "uint16" if self._loaded.vocab_size <= 65535 else "uint32"
        self._warned = False
        self._task = TokenizeTask(str(tokenizer), self.dtype, rules)
        # A job of a scheduler may have fewer cores than the machine.
        self._workers = workers or (1 if total_bytes < _SERIAL_BYTES else len(os.sched_getaffinity(0)))

    def open_work(
        self, out: str | Path, work: str | Path | None, *, part: Part | None = None, merge: bool = False
    ) -> WorkDirectory:
        """Return the work directory of ``out``, not entered yet."""
        target = Path(out).resolve()
        path = Path(work) if work is not None else target.parent / f".{target.name}.work"
        settings = {"tokenizer_hash": self._loaded.hash, "dtype": self.dtype, **self._rules.as_dict()}
        return WorkDirectory(path, settings, self._units, part=part, merge=merge)

    def check_first_records(self) -> None:
        """Check the first records of the inputs before any work begins.

        Raises:
            DataError: An input is unreadable or malformed.
        """
        # With enough documents in the first unit, later inputs are not read: they must not fail the run.
        units = self._units if self._limit is None else self._units[:1]
        check_first_records(units, self._loaded.vocab_size, self._rules)

    def tokenize(self, jobs: Sequence[UnitJob]) -> UnitResults:
        """Do what is left to do of ``jobs``.

        Raises:
            DataError: An input is unreadable or malformed.
        """
        results, todo = finished_units(jobs, self.dtype, self._limit)
        self._warn(results.taken())
        if results.before:
            log.info("resuming: %d of %d units are done", results.before, len(jobs))
        if results.enough:
            return results
        log_bad = _BadRecordLog([job.unit for job in jobs], set(todo))
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
        results, missing = finished_units(work.jobs, self.dtype, self._limit)
        if results.enough:
            self._warn(results.taken())
            return results
        if work.parts is None:
            raise DataError(f"{len(missing)} of {len(work.jobs)} units are to do; run without --merge to do them")
        lacking = []
        for index in range(1, work.parts + 1):
            jobs = work.jobs[index - 1 :: work.parts]
            if to_do := finished_units(jobs, self.dtype, self._limit)[0].missing:
                lacking.append(f"part {index}/{work.parts} has {to_do} of {len(jobs)} units to do")
        raise DataError(f"{'; '.join(lacking)}; run {'it' if len(lacking) == 1 else 'them'} again, then --merge")

    def _warn(self, results: Sequence[UnitResult]) -> None:
        """Name the first record with a marker of a special token in its text, once."""
        first = next((result.marker for result in results if result.marker), "")
        if first and not self._warned:
            self._warned = True
            log.warning("%s; %s; all such documents are counted", first, _MARKER_FATES[self._rules.special_tokens])

    def manifest(
        self,
        format: str,
        seed: int,
        lengths: np.ndarray,
        loss_mask: bool,
        marked: int,
        shard_documents: list[int],
        left_out: dict[str, int],
        rows: dict[str, Any],
    ) -> DatasetManifest:
        """Return the manifest of documents with ``lengths``, in stored order."""
        powers = np.frexp(lengths.astype(np.float64))[1] - 1
        ends = np.cumsum(shard_documents)
        return DatasetManifest(
            format=format,
            tokenizer=self._task.tokenizer,
            tokenizer_hash=self._loaded.hash,
            vocab_size=self._loaded.vocab_size,
            eos_token_id=self._loaded.eos_token_id,
            eos=self._rules.eos,
            bos_token_id=self._loaded.bos_token_id,
            bos=self._rules.bos,
            special_tokens=self._rules.special_tokens,
            special_token_documents=marked,
            documents=len(lengths),
            tokens=int(lengths.sum()),
            dtype=self.dtype,
            loss_mask=loss_mask,
            seed=seed,
            shard_documents=shard_documents,
            shard_tokens=[int(part.sum()) for part in np.split(lengths, ends[:-1])],
            lengths_hash=hash_lengths(lengths),
            length_histogram=np.bincount(powers).tolist(),
            left_out=left_out,
            rows=rows,
        )


class _BadRecordLog:
    """Logs the bad records of units in input order, up to a bound.

    Args:
        units: All units.
        new: Those that are done now; the others' bad records were logged before.
    """

    def __init__(self, units: Sequence[Unit], new: Collection[int]):
        self._units = units
        self._new = new
        self._names = BadRecordNames()
        self._next = self._logged = 0

    def follow(self, results: UnitResults) -> None:
        """Log those of the units taken, as far as they are not logged yet."""
        for result in results.taken(self._next):
            for name in self._names.of(self._units[self._next], result.reading):
                if self._next in self._new and self._logged < LISTED:
                    self._logged += 1
                    log.warning("left out: %s", name)
            self._next += 1


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
