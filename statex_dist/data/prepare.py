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
from typing import Any

from statex_dist.checkpoint.json_file import read_bytes
from statex_dist.data.corpus.document_rules import DocumentRules
from statex_dist.data.corpus.source import Source, WorkOptions
from statex_dist.data.corpus.staging import Staging
from statex_dist.data.corpus.unit_files import UnitDocuments
from statex_dist.data.corpus.unit_results import UnitResults
from statex_dist.data.corpus.work import WorkPart
from statex_dist.data.manifest import LENGTHS_NAME, MANIFEST_NAME, DatasetManifest, pack_lengths, parse_manifest
from statex_dist.data.storage.mds import MdsShardWriter
from statex_dist.data.storage.tar import WdsShardWriter
from statex_dist.data.window import permutation
from statex_dist.durable.progress import ProgressLine
from statex_dist.errors import ConfigError, DataError, bounded_line, writing

log = logging.getLogger(__name__)

_WRITERS: dict[str, type[MdsShardWriter] | type[WdsShardWriter]] = {"mds": MdsShardWriter, "wds": WdsShardWriter}
COMPRESSIONS = ("none", "zstd", "gz")
BAD_RECORDS_NAME = "bad_records.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOptions:
    """How documents are stored.

    Attributes:
        format: ``"mds"`` or ``"wds"``.
        seed: Seed of the document shuffle.
        shard_bytes: Size limit of a raw shard.
        compression: ``"none"``, ``"zstd"`` or ``"gz"``.
    """

    format: str = "mds"
    seed: int = 0
    shard_bytes: int = 64 << 20
    compression: str = "none"

    def __post_init__(self) -> None:
        if self.format not in _WRITERS:
            raise ConfigError(f"format is {self.format!r}; allowed: {', '.join(_WRITERS)}")
        if self.compression not in COMPRESSIONS:
            raise ConfigError(f"compression is {self.compression!r}; allowed: {', '.join(COMPRESSIONS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSummary:
    """Result of :func:`prepare`: documents and tokens written, and counts of the omitted ones, by reason.

    ``finished_before``: a killed run had made the dataset, and this one only removed the files left behind.
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

    @classmethod
    def of(
        cls, out: Path, source: Source, manifest: DatasetManifest, seconds: float, *, finished_before: bool = False
    ) -> PrepareSummary:
        """Return the summary of the dataset in ``out``, as its manifest counts it."""
        listed = Path(out) / BAD_RECORDS_NAME
        return cls(
            out=str(out),
            files=len(source.files),
            documents=manifest.documents,
            short_documents=manifest.left_out["short"],
            long_documents=manifest.left_out["long"],
            filtered_documents=manifest.left_out["filtered"],
            undecodable_files=manifest.left_out["undecodable"],
            bad_records=manifest.left_out.get("bad", 0),
            bad_records_listed=listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else [],
            special_token_documents=manifest.special_token_documents or 0,
            tokens=manifest.tokens,
            shards=len(manifest.shard_tokens),
            dtype=manifest.dtype,
            seconds=seconds,
            finished_before=finished_before,
        )

    @property
    def tokens_per_second(self) -> float:
        """Tokens written per second of wall time."""
        return self.tokens / max(self.seconds, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for ``--json``."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSummary:
    """What :func:`prepare_part` did; ``units_before`` of the ``units`` had been done by an earlier run."""

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
    rules: DocumentRules | None = None,
    shards: ShardOptions | None = None,
    options: WorkOptions | None = None,
    merge: bool = False,
) -> PrepareSummary:
    """Tokenise ``inputs`` into shards under ``out``.

    A text file is one document; a line of ``.jsonl`` and a row of ``.parquet`` are one document each, from their
    text field or, tokenised already, from ``input_ids`` with an optional ``loss_mask``. A run that was cut off is gone
    on with by the same call. With ``merge`` nothing is tokenised, but what :func:`prepare_part` left is taken.

    Raises:
        ConfigError: ``out`` exists and is not to be replaced, or an argument does not fit the others.
        DataError: An input is missing, empty, unreadable or malformed, or a part has not done its units.
    """
    begin = time.monotonic()
    shards = shards or ShardOptions()
    source = Source(inputs, tokenizer, rules or DocumentRules(), options or WorkOptions())
    directory = source.open_work(out, merge=merge)
    limit = source.options.max_documents
    facts = [*directory.identity(), shards.format, shards.seed, shards.shard_bytes, shards.compression, limit]
    command = blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
    staging = Staging(Path(out), overwrite=source.options.overwrite, inputs=source.files, command=command)
    if staging.finished:
        directory.finish()
        manifest = parse_manifest(read_bytes(staging.out / MANIFEST_NAME), str(staging.out / MANIFEST_NAME))
        staging.clean()
        return PrepareSummary.of(Path(out), source, manifest, time.monotonic() - begin, finished_before=True)
    if not merge:
        source.check_first_records()
    with staging, directory:
        found = source.merge(directory) if merge else source.tokenize(directory.jobs)
        found.warn_of_joined()
        documents = UnitDocuments(found.taken(), source.dtype, limit)
        if not len(documents.lengths):
            directory.remove()
            raise DataError(_nothing(source, found))
        order = permutation(len(documents.lengths), shards.seed, "prepare")
        shard_documents = _write_shards(staging.directory, documents, order, source.dtype, shards)
        lengths = documents.lengths[order]
        with writing(staging.directory):
            if listed := found.bad_records():
                text = "".join(f"{line}\n" for line in listed)
                (staging.directory / BAD_RECORDS_NAME).write_text(text, encoding="utf-8", errors="backslashreplace")
            (staging.directory / LENGTHS_NAME).write_bytes(pack_lengths(lengths))
        manifest = source.manifest(documents, found, lengths, shard_documents, format=shards.format, seed=shards.seed)
        staging.commit(manifest)
        directory.remove()
        staging.clean()
    return PrepareSummary.of(Path(out), source, manifest, time.monotonic() - begin)


def _write_shards(directory: Path, documents: UnitDocuments, order: Any, dtype: str, shards: ShardOptions) -> list[int]:
    """Write documents in ``order`` (``[documents]`` int64); return the number of documents of each shard."""
    writer = _WRITERS[shards.format](
        directory,
        dtype=dtype,
        loss_mask=documents.has_masks,
        compression=shards.compression,
        shard_bytes=shards.shard_bytes,
    )
    try:
        with writing(directory):
            with ProgressLine("write", len(order), "documents") as progress:
                for i in order.tolist():
                    tokens, mask = documents.read(i)
                    writer.write(tokens, mask)
                    progress.advance(1, len(tokens))
            writer.finish()
    except BaseException:
        writer.abort()
        raise
    return writer.shard_documents


def prepare_part(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path,
    part: WorkPart,
    *,
    rules: DocumentRules | None = None,
    options: WorkOptions | None = None,
) -> PartSummary:
    """Tokenise every ``part.count``-th unit of ``inputs`` into the work directory, for :func:`prepare` with ``merge``.

    Parts may run at once, on machines that share the work directory and see the same inputs. Nothing is written to
    ``out``, which the merge is to make; the other arguments are those of :func:`prepare`.

    Raises:
        ConfigError: An argument is out of its range, or the work directory was begun with other settings.
        DataError: An input is missing, empty, unreadable or malformed.
    """
    begin = time.monotonic()
    source = Source(inputs, tokenizer, rules or DocumentRules(), options or WorkOptions())
    source.check_first_records()
    # Not entered: it only looks, so that a part does not work for hours for a merge that would be refused.
    Staging(Path(out), overwrite=source.options.overwrite, inputs=source.files)
    with source.open_work(out, part=part) as directory:
        found = source.tokenize(directory.jobs[part.index - 1 :: part.count])
    found.warn_of_joined()
    results = found.taken()
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


def _nothing(source: Source, found: UnitResults) -> str:
    left_out, rules = found.left_out(), source.rules
    bad = next(iter(found.bad_records()), "")
    reasons = [f"{left_out['short']} shorter than {rules.min_tokens} tokens"]
    for key, text in (
        ("long", f"longer than {rules.max_tokens} tokens"),
        ("filtered", f"did not meet --where {' '.join(rules.where)}"),
        ("undecodable", "not UTF-8"),
        ("bad", f"bad records: {bounded_line(bad, 200)}"),
    ):
        if left_out[key]:
            reasons.append(f"{left_out[key]} {text}")
    advice = "check --text-field and --rows" if bad else "give files with text in them"
    files = len(source.files)
    return f"no documents in {files} input file{'s' * (files != 1)} ({', '.join(reasons)}); {advice}"
