"""Making a target directory, whatever its layout: crash-safe, resumable, and with a manifest of all that it holds.

Everything goes to a temporary sibling: the weight files (:mod:`checkpoints_tools.io.target_writer`), then documents and
carried files, the manifest after them, markers such as ``latest`` last; then the directory gets its name. Killed at any
moment, the old target is untouched, and with ``resume`` the next run redoes only what had not reached the disk.

Documents are the small files: ``config.json`` with its dtype, ``expansion_report.json``, and others of the layout.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools.io.documents import carried_files, encoded
from checkpoints_tools.io.journal import (
    JOURNAL_NAME,
    PARTIAL_SUFFIX,
    PARTS_FOLDER,
    TargetJournal,
    WrittenTensor,
    fingerprint,
)
from checkpoints_tools.io.parts import PartDirectory, PartResult
from checkpoints_tools.io.target_file import TargetFile
from checkpoints_tools.io.target_writer import (
    Places,
    WriteOptions,
    Written,
    files_of_tensors,
    finish_crcs,
    finish_files,
    make_files,
    write_files,
)
from checkpoints_tools.io.tensor_stream import TensorJob
from checkpoints_tools.io.worker_processes import cut_evenly
from statex_dist.checkpoint.formats.piece_io import SourceCrcs
from statex_dist.checkpoint.formats.raw_io import FileState, share_open_files
from statex_dist.checkpoint.formats.tensor_io import Progress, TensorSource
from statex_dist.checkpoint.layout import MANIFEST_NAME
from statex_dist.checkpoint.manifest import (
    FileRecord,
    Manifest,
    TensorRecord,
    finish_target,
    record_file,
    refuse_target,
    remove_set_aside,
    temporary_for,
)
from statex_dist.durable.files import remove_tree
from statex_dist.errors import CheckpointError, refusal
from statex_dist.work_part import WorkPart

logger = logging.getLogger(__name__)

Documents = Callable[[Mapping[str, WrittenTensor]], Mapping[str, Any]]
"""Returns documents by path, given what has been written: texts and bytes as they are, anything else as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetPlan:
    """Everything about a target that is known before a byte is written.

    Attributes:
        kind: Its layout.
        files: The weight files.
        jobs: Every tensor.
        places: Where each of them goes in the files.
        documents: Makes the small files when the weights are written (first called with nothing, to tell runs apart).
        info: Facts for the manifest; with the source's files and the options they tell one run from another.
        folder: Where the manifest lies, relative to the target.
        model_folder: Where ``config.json`` and carried files lie, relative to the target.
        markers: Texts that are written after the manifest, by path.
    """

    kind: str
    files: Sequence[TargetFile]
    jobs: Sequence[TensorJob]
    places: Places
    documents: Documents
    info: dict[str, Any]
    folder: str = "."
    model_folder: str = "."
    markers: Mapping[str, str] = field(default_factory=dict)


def write_target(
    target: Path,
    source: TensorSource,
    plan: TargetPlan,
    options: WriteOptions,
    *,
    progress: Progress | None = None,
) -> list[int]:
    """Write a target, or a part of it; nothing half-written is ever there.

    Args:
        target: The directory to make.
        source: Where kept values, tokenizer and generation files come from.
        plan: What to write.
        options: How to write.
        progress: Told of the bytes written.

    Returns:
        The parts that are missing where ``options.part`` is one of several; else the target is complete.

    Raises:
        CheckpointError: The target is not empty or not writable, the disk is full, or the source fails. The target is
            then as it was; what is finished is kept for a later run with ``resume`` if this one had it, and of a part.
    """
    target = target.resolve()
    run = fingerprint(_identity(source, plan, options))
    if (options.resume or options.part) and _is_complete(target / plan.folder, run):
        logger.info("%s is complete already", target)
        remove_set_aside(target)
        _remove_journals(target)
        return []
    work = _Work(target=target, run=run, source=source, plan=plan, options=options)
    try:
        refuse_target(target, overwrite=options.overwrite)
        if options.part is not None:
            return _write_part(work, options.part, progress)
        _write_whole(work, progress)
    except OSError as error:
        raise CheckpointError(f"target {target} cannot be written: {refusal(error)}") from None
    return []


class _Work:
    """One target while it is written: what its steps share."""

    def __init__(self, *, target: Path, run: str, source: TensorSource, plan: TargetPlan, options: WriteOptions):
        self.target, self.run, self.source, self.plan, self.options = target, run, source, plan, options
        self.open_files = share_open_files(len(plan.files), threads=options.workers, readers=1)
        self.before = {**source.opened, **_carried_states(source)}
        self.crcs = SourceCrcs(source.archives())
        self.files_of = files_of_tensors(plan.jobs, plan.places)
        self.sizes = {file.name: file.size for file in plan.files}

    def make_folders(self, directory: Path) -> None:
        """Make the folders of the target."""
        (directory / self.plan.folder).mkdir(parents=True, exist_ok=True)
        (directory / self.plan.model_folder).mkdir(parents=True, exist_ok=True)

    def write(
        self,
        journal: TargetJournal,
        progress: Progress | None,
        *,
        share: Sequence[TensorJob] | None = None,
        prepared: Collection[str] = (),
    ) -> Written:
        """Write files, and expect what an earlier run has read of the source (arguments of :func:`write_files`)."""
        plan, source = self.plan, self.source
        for job in plan.jobs:
            if job.key in journal.tensors and job.source is not None:
                self.crcs.expect(source.of_state(job.state).pieces(job.source.name))
        return write_files(
            *(journal, source, plan.files, plan.jobs, plan.places, self.options),
            files_of=self.files_of,
            crcs=self.crcs,
            open_files=self.open_files,
            progress=progress,
            share=share,
            prepared=prepared,
        )

    def complete(self, journal: TargetJournal, processes: int) -> None:
        """Check the source, write documents, manifest and markers, and give the directory its name."""
        plan, directory = self.plan, journal.directory
        checked = finish_crcs(self.crcs, processes)
        files = _write_documents(journal, self.source, plan)
        _check_unchanged(self.source, self.before)
        _write_manifest(journal, plan, files, {"run": self.run, "source_crcs_checked": checked})
        for name, text in plan.markers.items():
            (directory / name).write_text(text, encoding="utf-8")
            record_file(directory / name)
        finish_target(directory, self.target, overwrite=self.options.overwrite)
        _remove_journals(self.target)  # last: until the rename a next run reads there which parts are finished


def _remove_journals(target: Path) -> None:
    (target / JOURNAL_NAME).unlink(missing_ok=True)
    if (target / PARTS_FOLDER).is_dir():
        remove_tree(target / PARTS_FOLDER)


def _write_whole(work: _Work, progress: Progress | None) -> None:
    """Write all of a target."""
    target, options, journal = work.target, work.options, None
    try:
        journal = TargetJournal(temporary_for(target), run=work.run, resume=options.resume)
        refuse_target(target, overwrite=options.overwrite)  # again: another process may just have finished it
        journal.settle(work.sizes, work.files_of)
        _check_space(journal, work.plan.files)
        work.make_folders(journal.directory)
        written = work.write(journal, progress)
        work.complete(journal, written.processes)
    except BaseException:
        keep = journal is not None and options.resume and (journal.files or journal.tensors)
        if journal is not None and not keep:
            shutil.rmtree(journal.directory, ignore_errors=True)
        elif keep:
            logger.info("what is finished is kept in %s: the same command goes on from it", temporary_for(target))
        raise
    finally:
        if journal is not None:
            journal.close()


def _write_part(work: _Work, part: WorkPart, progress: Progress | None) -> list[int]:
    """Write one part of a target, and complete it if all others are there; return the parts that are missing."""
    plan = work.plan
    with PartDirectory(temporary_for(work.target), part, work.run) as directory:
        shares = cut_evenly(plan.jobs, [job.info.nbytes for job in plan.jobs], part.count)
        prepared = _files_of_several(work, shares)
        if not directory.is_done:
            journal = TargetJournal(
                directory.directory, run=work.run, resume=True, name=directory.journal_name, is_locked=True
            )

            def make() -> None:
                _check_space(journal, plan.files)
                work.make_folders(directory.directory)
                shared = [file for file in plan.files if file.name in prepared]
                make_files(journal, shared, work.options, work.open_files)

            directory.prepare(make)
            journal.settle(work.sizes, work.files_of)
            written = work.write(journal, progress, share=shares[part.index - 1], prepared=prepared)
            _check_unchanged(work.source, work.before)
            directory.leave(PartResult(files=written.runs, source=work.crcs.runs()))
        with directory.finishing() as missing:
            if missing == []:
                logger.info("part %s is written, and so are all others: completing %s", part, work.target)
                _finish_parts(work, directory)
            return missing or []


def _files_of_several(work: _Work, shares: Sequence[Sequence[TensorJob]]) -> list[str]:
    """Return the files that have tensors of several parts, or none."""
    owners: dict[str, set[int]] = {}
    for number, share in enumerate(shares):
        for names in {work.files_of[job.key] for job in share}:
            for name in names:
                owners.setdefault(name, set()).add(number)
    return [file.name for file in work.plan.files if len(owners.get(file.name, ())) != 1]


def _finish_parts(work: _Work, directory: PartDirectory) -> None:
    """Complete a target of which all parts are written."""
    plan = work.plan
    journal = TargetJournal(
        directory.directory, run=work.run, resume=True, name=directory.finish_journal_name, is_locked=True
    )
    for name in directory.journals():
        journal.take(name)
    runs = []
    work.crcs.forget()
    for result in directory.results():
        runs.append(result.files)
        work.crcs.add_runs(result.source)
    processes = finish_files(
        *(journal, plan.files, plan.jobs, plan.places, work.options),
        files_of=work.files_of,
        runs=runs,
        open_files=work.open_files,
    )
    work.complete(journal, processes)


def _identity(source: TensorSource, plan: TargetPlan, options: WriteOptions) -> dict[str, Any]:
    """Return what decides the bytes of a target: sources, tensors and their recipes, documents and options."""
    carried = carried_files(source.facts.model_dir)
    tensors = [
        (j.key, j.info.dtype, j.info.shape, j.mapping and [j.mapping.seed, j.mapping.rows.to_list()]) for j in plan.jobs
    ]
    return {
        "kind": plan.kind,
        "info": plan.info,
        "files": [(str(path), asdict(FileState.of(path.stat()))) for path in (*source.files, *carried)],
        "tensors": tensors,
        "targets": [(file.name, file.size) for file in plan.files],
        "documents": {name: encoded(name, content).decode("latin1") for name, content in plan.documents({}).items()},
        "options": (options.max_shard_size, options.allow_nonfinite),
        "numpy": np.__version__,
    }


def _is_complete(directory: Path, run: str) -> bool:
    """Return whether an earlier run of the same command finished the target, and it is still whole.

    Raises:
        CheckpointError: It was finished but has been damaged since.
    """
    if not (directory / MANIFEST_NAME).is_file():
        return False
    manifest = Manifest.read(directory)
    if manifest.info.get("run") != run:
        return False
    manifest.verify(directory)
    return True


def _carried_states(source: TensorSource) -> dict[Path, FileState]:
    return {path: FileState.of(path.stat()) for path in carried_files(source.facts.model_dir)}


def _check_unchanged(source: TensorSource, before: dict[Path, FileState]) -> None:
    """Raise if a file of the source is no longer what it was when the work began."""
    now = {path: FileState.of(path.stat()) for path in source.files} | _carried_states(source)
    for path, state in now.items():
        if before.get(path) != state:
            raise CheckpointError(f"{path} changed while it was being read; run again when nothing writes to it")


def _check_space(journal: TargetJournal, files: Sequence[TargetFile]) -> None:
    """Raise unless the unfinished files fit on the disk."""
    begun = sum(path.stat().st_blocks * 512 for path in journal.directory.rglob("*" + PARTIAL_SUFFIX))
    needed = sum(file.size for file in files if file.name not in journal.files) - begun
    free = shutil.disk_usage(journal.directory).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"No space left on device: {needed} bytes are needed, {free} are free")


def _write_documents(journal: TargetJournal, source: TensorSource, plan: TargetPlan) -> dict[str, FileRecord]:
    """Write documents and carried files; return the record of every file, by its path relative to the target."""
    files = dict(journal.files)
    for name, content in plan.documents(journal.tensors).items():
        path = journal.directory / name
        path.write_bytes(encoded(name, content))
        files[name] = record_file(path)
    for path in carried_files(source.facts.model_dir):
        copy = journal.directory / plan.model_folder / path.name
        name = str(copy.relative_to(journal.directory))
        if name not in files:
            shutil.copyfile(path, copy)
            files[name] = record_file(copy)
    return files


def _write_manifest(
    journal: TargetJournal, plan: TargetPlan, files: Mapping[str, FileRecord], facts: dict[str, Any]
) -> None:
    folder = journal.directory / plan.folder
    records = {str((journal.directory / name).relative_to(folder)): record for name, record in files.items()}
    tensors: dict[str, TensorRecord] = {}
    states: dict[str, dict[str, TensorRecord]] = {}
    for job in plan.jobs:
        digest = journal.tensors[job.key].xxh3_128
        record = TensorRecord(dtype=job.info.dtype, shape=job.info.shape, xxh3_128=digest)
        (tensors if job.state is None else states.setdefault(job.state, {}))[job.info.name] = record
    info = {**plan.info, **facts}
    Manifest(kind=plan.kind, files=records, info=info, tensors=tensors, states=states).write(folder)
