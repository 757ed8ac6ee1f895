"""Text, JSON lines and parquet to shards of tokenised documents.

1. The inputs are split into work units (:mod:`statex_dist.data.corpus.documents`).
2. Worker processes tokenise units; each unit becomes files in a work directory
   (:mod:`statex_dist.data.corpus.work`), where they outlive a killed run. Machines that share it may each do a part of
   the units.
3. All documents are permuted by the seed and written as shards, read from the memory-mapped units. Shards are thus
   shuffled globally, which the loader's shuffle within windows relies on.
4. The manifest is written last, everything is flushed, and the directory is renamed into place.

Memory holds the documents' lengths and one shard, never the corpus; the disk holds the tokens twice while it works.
The result does not depend on the number of workers or parts, nor on how often the work was cut off.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statex_dist.checkpoint.json_file import read_bytes
from statex_dist.data.corpus.documents import DEFAULT_SUFFIXES
from statex_dist.data.corpus.rules import MAX_DOCUMENT_BYTES, DocumentRules
from statex_dist.data.corpus.source import Source
from statex_dist.data.corpus.staging import Staging
from statex_dist.data.corpus.unit_files import Spill, UnitResult
from statex_dist.data.corpus.work import Part
from statex_dist.data.manifest import LENGTHS_NAME, MANIFEST_NAME, DatasetManifest, pack_lengths, parse_manifest
from statex_dist.data.plan import permutation
from statex_dist.data.storage.mds import MdsShardWriter
from statex_dist.durable.progress import ProgressLine
from statex_dist.errors import ConfigError, DataError, bounded_line, writing

if TYPE_CHECKING:
    from statex_dist.data.storage.tar import WdsShardWriter

log = logging.getLogger(__name__)

FORMATS = ("mds", "wds")
BAD_RECORDS_NAME = "bad_records.txt"
COMPRESSIONS = ("none", "zstd", "gz")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSummary:
    """What :func:`prepare` did.

    Attributes:
        out: The dataset directory.
        files: Input files.
        documents: Documents written.
        short_documents: Documents left out because they had fewer than ``min_tokens`` tokens.
        long_documents: Documents left out because they had more than ``max_tokens`` tokens.
        filtered_documents: Records left out because they did not meet a condition.
        undecodable_files: Text files left out because they are not UTF-8 (with ``skip_undecodable``).
        bad_records: Records left out because they are no documents (with ``skip_bad_records``).
        bad_records_listed: Place and reason of the first 100 of them, in input order.
        special_token_documents: Documents whose text holds a marker of a special token.
        tokens: Tokens written, BOS and EOS included.
        shards: Shards written.
        dtype: Type of the tokens.
        seconds: Wall time.
        finished_before: Whether a killed run had made the dataset, and this one only removed what was left.
    """

    out: str
    files: int
    documents: int
    short_documents: int
    long_documents: int
    filtered_documents: int
    undecodable_files: int
    bad_records: int
    bad_records_listed: list[str]
    special_token_documents: int
    tokens: int
    shards: int
    dtype: str
    seconds: float
    finished_before: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Tokens written per second of wall time."""
        return self.tokens / max(self.seconds, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for ``--json``."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSummary:
    """What :func:`prepare_part` did.

    Attributes:
        work: The work directory.
        part: Which part of how many.
        units: Units of the part that are done, and needed.
        units_before: Those of them that were done before this run.
        documents: Documents in them.
        special_token_documents: Those of them whose text holds a marker of a special token.
        tokens: Tokens in them.
        bad_records: Records left out of them because they are no documents.
        seconds: Wall time.
    """

    work: str
    part: str
    units: int
    units_before: int
    documents: int
    special_token_documents: int
    tokens: int
    bad_records: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for ``--json``."""
        return asdict(self)


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path = "bytes",
    *,
    format: str = "mds",
    workers: int | None = None,
    text_field: str = "text",
    where: Sequence[str] = (),
    eos: str = "append",
    bos: str = "none",
    special_tokens: str = "split",
    seed: int = 0,
    shard_bytes: int = 64 << 20,
    compression: str = "none",
    min_tokens: int = 2,
    max_tokens: int | None = None,
    max_documents: int | None = None,
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    skip_undecodable: bool = False,
    skip_bad_records: bool = False,
    rows: str = "auto",
    ignore_fields: Sequence[str] = (),
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    overwrite: bool = False,
    work: str | Path | None = None,
    merge: bool = False,
) -> PrepareSummary:
    """Tokenise ``inputs`` into shards under ``out``.

    A text file is one document; a line of ``.jsonl`` and a row of ``.parquet`` are one document each, from their
    ``text_field`` or, tokenised already, from ``input_ids`` with an optional ``loss_mask``. EOS is appended to every
    document (to ``input_ids`` only where it is missing, with mask 0 where there is a mask). A run that was cut off is
    gone on with by the same call.

    Args:
        inputs: Files, directories or globs.
        out: Directory to make. It appears complete or not at all.
        tokenizer: ``"bytes"`` or a directory with a Hugging Face fast tokenizer.
        format: ``"mds"`` or ``"wds"``.
        workers: Processes; default: one for each core, one in all for small inputs.
        text_field: Field or column of the text.
        where: Conditions on fields, see :class:`DocumentRules`.
        eos: ``"append"``, or ``"none"`` to take documents as they are.
        bos: ``"none"``, or ``"prepend"`` to begin every document with BOS.
        special_tokens: How markers of special tokens in text are encoded: ``"split"`` (as plain text), ``"keep"`` (by
            the tokenizer) or ``"refuse"``.
        seed: Seed of the document shuffle.
        shard_bytes: Size limit of a raw shard.
        compression: ``"none"``, ``"zstd"`` or ``"gz"``.
        min_tokens: Shorter documents (EOS included) are left out; a document below 2 tokens has no target.
        max_tokens: Longer documents are left out.
        max_documents: Stop after so many documents, in input order.
        suffixes: Suffixes taken from directories, each also with ``.gz`` or ``.zst`` behind it.
        skip_undecodable: Leave out text files that are not UTF-8, with a warning each, instead of stopping.
        skip_bad_records: Leave out, count and list records that are no documents, instead of stopping.
        rows: ``"auto"``, ``"text"`` or ``"tokens"``, see :class:`DocumentRules`.
        ignore_fields: Fields beside ``input_ids`` that are left out whatever they hold.
        max_document_bytes: Bytes that a line, a text file or a row may have.
        overwrite: Replace an existing dataset.
        work: Work directory; default: ``.{name}.work`` beside ``out``. Removed when the dataset is complete.
        merge: Tokenise nothing; take what :func:`prepare_part` left in the work directory.

    Raises:
        ConfigError: An argument is out of its range, or ``out`` exists and is not to be replaced.
        DataError: An input is missing, empty, unreadable or malformed, or a part has not done its units.
    """
    begin = time.monotonic()
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}; allowed: {', '.join(FORMATS)}")
    if compression not in COMPRESSIONS:
        raise ConfigError(f"compression is {compression!r}; allowed: {', '.join(COMPRESSIONS)}")
    rules = DocumentRules(
        text_field=text_field,
        where=tuple(where),
        eos=eos,
        bos=bos,
        special_tokens=special_tokens,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        skip_undecodable=skip_undecodable,
        skip_bad_records=skip_bad_records,
        rows=rows,
        ignore_fields=tuple(ignore_fields),
        max_document_bytes=max_document_bytes,
    )
    source = Source(inputs, tokenizer, rules, suffixes, workers, max_documents)
    directory = source.open_work(out, work, merge=merge)
    command = _digest([*directory.identity(), format, seed, shard_bytes, compression, max_documents])
    staging = Staging(Path(out), overwrite=overwrite, inputs=source.files, command=command)
    if staging.finished:
        directory.finish()
        manifest = parse_manifest(read_bytes(staging.out / MANIFEST_NAME), str(staging.out / MANIFEST_NAME))
        staging.clean()
        return _summary(str(out), len(source.files), manifest, time.monotonic() - begin, finished_before=True)
    if not merge:
        source.check_first_records()
    with staging, directory:
        found = source.merge(directory) if merge else source.tokenize(directory.jobs)
        results = found.taken()
        _warn_of_joined(results)
        left_out = {
            "short": sum(result.short for result in results),
            "long": sum(result.long for result in results),
            "filtered": sum(result.reading.filtered for result in results),
            "undecodable": sum(len(result.reading.undecodable) for result in results),
            "bad": sum(result.reading.bad for result in results),
        }
        spill = Spill(results, source.dtype, max_documents)
        if not len(spill.lengths):
            directory.remove()
            bad = next(iter(found.bad_records()), "")
            raise DataError(_nothing(len(source.files), left_out, rules, bad))
        writer = _writer_class(format)(
            staging.directory,
            dtype=source.dtype,
            loss_mask=spill.has_masks,
            compression=compression,
            shard_bytes=shard_bytes,
        )
        order = permutation(len(spill.lengths), seed, "prepare")
        try:
            with writing(staging.directory), ProgressLine("write", len(order), "documents") as progress:
                for i in order.tolist():
                    tokens, mask = spill.read(i)
                    writer.write(tokens, mask)
                    progress.advance(1, len(tokens))
            with writing(staging.directory):
                writer.finish()
        except BaseException:
            writer.abort()
            raise
        if listed := found.bad_records():
            text = "".join(f"{line}\n" for line in listed)
            with writing(staging.directory):
                (staging.directory / BAD_RECORDS_NAME).write_text(text, encoding="utf-8", errors="backslashreplace")
        lengths = spill.lengths[order]
        with writing(staging.directory):
            (staging.directory / LENGTHS_NAME).write_bytes(pack_lengths(lengths))
        manifest = source.manifest(
            format, seed, lengths, spill.has_masks, spill.marked, writer.shard_documents, left_out, found.rows
        )
        staging.commit(manifest)
        directory.remove()
        staging.clean()
    return _summary(str(out), len(source.files), manifest, time.monotonic() - begin)


def _summary(
    out: str, files: int, manifest: DatasetManifest, seconds: float, *, finished_before: bool = False
) -> PrepareSummary:
    return PrepareSummary(
        out=out,
        files=files,
        documents=manifest.documents,
        short_documents=manifest.left_out["short"],
        long_documents=manifest.left_out["long"],
        filtered_documents=manifest.left_out["filtered"],
        undecodable_files=manifest.left_out["undecodable"],
        bad_records=manifest.left_out.get("bad", 0),
        bad_records_listed=_listed(Path(out) / BAD_RECORDS_NAME),
        special_token_documents=manifest.special_token_documents or 0,
        tokens=manifest.tokens,
        shards=len(manifest.shard_tokens),
        dtype=manifest.dtype,
        seconds=seconds,
        finished_before=finished_before,
    )


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def prepare_part(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path,
    part: Part,
    rules: DocumentRules,
    *,
    workers: int | None = None,
    max_documents: int | None = None,
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    overwrite: bool = False,
    work: str | Path | None = None,
) -> PartSummary:
    """Tokenise every ``part.count``-th unit of ``inputs`` into the work directory, for :func:`prepare` with ``merge``.

    Parts may run at once, on machines that share the work directory and see the same inputs.

    Args:
        inputs: Files, directories or globs.
        out: The dataset directory that the merge is to make; nothing is written there.
        tokenizer: ``"bytes"`` or a directory with a Hugging Face fast tokenizer.
        part: Which share.
        rules: How records become documents.
        workers: Processes; default: one for each core, one in all for small inputs.
        max_documents: As the merge will be given; saves the work on what it would not take.
        suffixes: Suffixes taken from directories.
        overwrite: The merge may replace an existing dataset.
        work: Work directory; default: ``.{name}.work`` beside ``out``.

    Raises:
        ConfigError: An argument is out of its range, or the work directory was begun with other settings.
        DataError: An input is missing, empty, unreadable or malformed.
    """
    begin = time.monotonic()
    source = Source(inputs, tokenizer, rules, suffixes, workers, max_documents)
    source.check_first_records()
    # Not entered: it only looks, so that a part does not work for hours for a merge that would be refused.
    Staging(Path(out), overwrite=overwrite, inputs=source.files)
    with source.open_work(out, work, part=part) as directory:
        found = source.tokenize(directory.jobs[part.index - 1 :: part.count])
        results = found.taken()
    _warn_of_joined(results)
    return PartSummary(
        work=str(directory.path),
        part=str(part),
        units=len(results),
        units_before=found.before,
        documents=sum(len(result.lengths) for result in results),
        special_token_documents=sum(len(result.marked) for result in results),
        tokens=sum(int(result.lengths.sum()) for result in results),
        bad_records=sum(result.reading.bad for result in results),
        seconds=time.monotonic() - begin,
    )


def _writer_class(format: str) -> type[MdsShardWriter] | type[WdsShardWriter]:
    if format == "mds":
        return MdsShardWriter
    from statex_dist.data.storage.tar import WdsShardWriter

    return WdsShardWriter


def _listed(path: Path) -> list[str]:
    """Return the bad records that a dataset lists."""
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _warn_of_joined(results: Sequence[UnitResult]) -> None:
    """Log how many rows of token ids hold several documents whose borders are not given."""
    if rows := sum(result.reading.joined for result in results):
        log.warning(
            "%d row%s of token ids with EOS before the end: each row is one document, whose state is not reset at EOS; "
            "give position_ids, seq_lengths or a numbered attention_mask to separate its documents",
            *(rows, "s" * (rows != 1)),
        )


def _nothing(files: int, left_out: dict[str, int], rules: DocumentRules, bad: str) -> str:
    reasons = [f"{left_out['short']} shorter than {rules.min_tokens} tokens"]
    if left_out["long"]:
        reasons.append(f"{left_out['long']} longer than {rules.max_tokens} tokens")
    if left_out["filtered"]:
        reasons.append(f"{left_out['filtered']} did not meet --where {' '.join(rules.where)}")
    if left_out["undecodable"]:
        reasons.append(f"{left_out['undecodable']} not UTF-8")
    if left_out["bad"]:
        reasons.append(f"{left_out['bad']} bad records: {bounded_line(bad, 200)}")
    advice = "check --text-field and --rows" if bad else "give files with text in them"
    return f"no documents in {files} input file{'s' * (files != 1)} ({', '.join(reasons)}); {advice}"
