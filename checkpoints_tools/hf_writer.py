"""Writing a Hugging Face model directory, crash-safe and resumable.

Everything goes to a temporary sibling: the shards (:mod:`checkpoints_tools.shard_writer`), then documents and carried
files, the manifest last; then the directory gets its name. Killed at any moment, the old target is untouched, and with
``resume`` the next run redoes unfinished shards only.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools.journal import JOURNAL_NAME, Journal, ShardRecord, fingerprint
from checkpoints_tools.raw_io import FileState
from checkpoints_tools.safetensors_io import INDEX_NAME, SafetensorsSource, ShardLayout, index_of, lay_out
from checkpoints_tools.shard_writer import WriteOptions, write_shards
from checkpoints_tools.tensor_io import TORCH_NAMES, Progress, TensorSource
from checkpoints_tools.transfer import TensorJob
from statex_dist.checkpoint.layout import MANIFEST_NAME
from statex_dist.checkpoint.manifest import (
    FileRecord,
    Manifest,
    finish_target,
    record_file,
    refuse_target,
    remove_set_aside,
    temporary_for,
)
from statex_dist.errors import CheckpointError
from statex_dist.models.config import CONFIG_NAME

logger = logging.getLogger(__name__)

CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tekken.json",
    "*.tiktoken",
    "chat_template*",
    "vocab*",
    "merges*",
    "*.model",
    "*.py",
    "LICENSE*",
)
"""Files of a model directory that go along with its weights."""

Documents = Callable[[dict[str, ShardRecord]], Mapping[str, Any]]
"""Returns JSON documents by name, given the finished shards."""


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a ``config.json`` that names the dtype in which the weights are stored."""
    key = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
    return {**config, key: TORCH_NAMES[dtype]}


def write_hf_directory(
    target: Path,
    source: TensorSource,
    jobs: Sequence[TensorJob],
    options: WriteOptions,
    *,
    documents: Documents,
    info: dict[str, Any],
    progress: Progress | None = None,
) -> bool:
    """Write tensors, JSON documents and carried files to ``target``; nothing half-written is ever there.

    Args:
        target: The directory to make.
        source: Where kept values, tokenizer and generation files come from.
        jobs: Every tensor.
        options: How to write.
        documents: Makes the JSON files (``config.json`` among them) when all shards are written.
        info: Facts for the manifest; with the source's files and ``options`` they tell one run from another.
        progress: Told of the bytes written.

    Returns:
        False where ``options.resume`` found the target complete already, so that nothing was written.

    Raises:
        CheckpointError: The target is not empty or not writable, the disk is full, or the source fails. The target is
            then as it was; finished shards are kept for a later run with ``resume`` if this one had it.
    """
    target = target.resolve()
    run = fingerprint(_identity(source, jobs, options, info, documents({})))
    if options.resume and _is_complete(target, run):
        logger.info("%s is complete already", target)
        remove_set_aside(target)
        return False
    before = _states(source)
    metadata = source.metadata if isinstance(source, SafetensorsSource) else {}
    shards = lay_out([job.info for job in jobs], options.max_shard_size, metadata)
    journal = None
    try:
        refuse_target(target, overwrite=options.overwrite)
        journal = Journal(temporary_for(target), run=run, resume=options.resume)
        refuse_target(target, overwrite=options.overwrite)  # again: another process may just have finished it
        _check_space(journal, shards)
        write_shards(journal, source, jobs, shards, options, progress)
        files = _write_documents(journal, source, shards, documents(journal.finished))
        _check_unchanged(source, before)
        Manifest(kind="hf", files=files, info={**info, "run": run}).write(journal.directory)
        finish_target(journal.directory, target, overwrite=options.overwrite)
        (target / JOURNAL_NAME).unlink()  # last: until the rename it says what a next run need not do again
    except BaseException as error:
        keep = journal is not None and options.resume and journal.finished
        if journal is not None and not keep:
            shutil.rmtree(journal.directory, ignore_errors=True)
        elif keep:
            logger.info("finished files are kept in %s: the same command goes on from them", temporary_for(target))
        if isinstance(error, OSError):
            raise CheckpointError(f"target {target} cannot be written: {error.strerror or error}") from None
        raise
    finally:
        if journal is not None:
            journal.close()
    return True


def _identity(
    source: TensorSource,
    jobs: Sequence[TensorJob],
    options: WriteOptions,
    info: dict[str, Any],
    documents: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what decides the bytes of a target: sources, tensors and their recipes, documents and options."""
    carried = carried_files(source.facts.model_dir)
    tensors = [
        (j.info.name, j.info.dtype, j.info.shape, j.surgery and [j.surgery.seed, j.surgery.recipe.to_list()])
        for j in jobs
    ]
    return {
        "info": info,
        "files": [(str(path), asdict(FileState.of(path.stat()))) for path in (*source.files, *carried)],
        "tensors": tensors,
        "documents": documents,
        "options": (options.max_shard_size, options.allow_nonfinite),
        "numpy": np.__version__,
    }


def _is_complete(target: Path, run: str) -> bool:
    """Return whether an earlier run of the same command finished the target, and it is still whole.

    Raises:
        CheckpointError: It was finished but has been damaged since.
    """
    if not (target / MANIFEST_NAME).is_file():
        return False
    manifest = Manifest.read(target)
    if manifest.info.get("run") != run:
        return False
    manifest.verify(target)
    return True


def _states(source: TensorSource) -> dict[Path, FileState]:
    """Return the state of every file that a target is made of."""
    return {path: FileState.of(path.stat()) for path in (*source.files, *carried_files(source.facts.model_dir))}


def _check_unchanged(source: TensorSource, before: dict[Path, FileState]) -> None:
    """Raise if a file of the source is no longer what it was when the work began."""
    for path, state in _states(source).items():
        if before.get(path) != state:
            raise CheckpointError(f"{path} changed while it was being read; run again when nothing writes to it")


def _check_space(journal: Journal, shards: Sequence[ShardLayout]) -> None:
    """Raise unless the unfinished shards fit on the disk."""
    needed = sum(shard.size for shard in shards if shard.file not in journal.finished)
    free = shutil.disk_usage(journal.directory).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"No space left on device: {needed} bytes are needed, {free} are free")


def _write_documents(
    journal: Journal, source: TensorSource, shards: Sequence[ShardLayout], documents: Mapping[str, Any]
) -> dict[str, FileRecord]:
    """Write JSON documents, the index and carried files; return the record of every file."""
    files = {name: shard.record for name, shard in journal.finished.items()}
    contents = dict(documents)
    if len(shards) > 1:
        contents[INDEX_NAME] = index_of(shards)
    for name, content in contents.items():
        path = journal.directory / name
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        files[name] = record_file(path)
    for path in carried_files(source.facts.model_dir):
        if path.name not in files:
            shutil.copyfile(path, journal.directory / path.name)
            files[path.name] = record_file(journal.directory / path.name)
    return files


def carried_files(directory: Path | None) -> list[Path]:
    """Return the files of a model directory that are carried along, each once."""
    found = {path for pattern in CARRIED for path in directory.glob(pattern)} if directory else set()
    return sorted(path for path in found if path.is_file() and path.name != CONFIG_NAME)
