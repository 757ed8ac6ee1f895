"""The manifest that proves a directory whole, and the durable writes that it is built on.

A directory is written under a temporary name, every file synced, the manifest written last, and the directory renamed:
after a crash there is either the old state or the new one. DeepSpeed's own save does none of this.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from statex_dist.checkpoint.formats.crc import check_crcs, directory_digest
from statex_dist.checkpoint.json_file import read_json
from statex_dist.checkpoint.layout import MANIFEST_NAME
from statex_dist.durable.files import TEMPORARY_PREFIX, rename_durably, sync, write_durably
from statex_dist.errors import CheckpointError, reason, shown

logger = logging.getLogger(__name__)

MANIFEST_VERSION = 1
_BUFFER_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """Size and digests of one file when it was written; at least one digest (hexadecimal) is known.

    Attributes:
        size: Bytes.
        xxh3_128: Digest of the whole file.
        directory_xxh3_128: Digest of an archive's directory, which holds the CRCs of its entries (``torch.save``).
    """

    size: int
    xxh3_128: str | None = None
    directory_xxh3_128: str | None = None

    def __post_init__(self) -> None:
        if self.xxh3_128 is None and self.directory_xxh3_128 is None:
            raise ValueError("a file record without a digest")

    def check_size(self, path: Path) -> None:
        """Raise unless the file is there and of this size.

        Raises:
            CheckpointError: It is not.
        """
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        if size is None:
            raise CheckpointError(f"{path} is missing; {MANIFEST_NAME} lists it")
        if size != self.size:
            raise CheckpointError(f"{path} has {size} bytes; {MANIFEST_NAME} says {self.size}")

    def check_directory(self, path: Path) -> None:
        """Raise unless an archive's directory is the recorded one, if one is: the file is then this file, or damaged.

        Raises:
            CheckpointError: It is not.
        """
        if self.directory_xxh3_128 is not None and directory_digest(path) != self.directory_xxh3_128:
            raise CheckpointError(f"{path} is damaged or another file: its zip directory differs from {MANIFEST_NAME}")

    def check(self, path: Path) -> None:
        """Raise unless the file is there, with these contents: it is read as a whole.

        Raises:
            CheckpointError: It is not.
        """
        self.check_size(path)
        if self.xxh3_128 is None:
            self.check_directory(path)
            check_crcs(path)
        elif digest_file(path) != self.xxh3_128:
            raise CheckpointError(f"{path} is damaged: its digest differs from {MANIFEST_NAME}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRecord:
    """One logical tensor, whatever files it lies in: dtype (a name of the safetensors format), shape, xxh3-128."""

    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Contents of a complete directory.

    Attributes:
        kind: Its layout: ``zero3``, ``plain``, ``hf``, ``tp`` or ``megatron``.
        files: Every file by its path relative to the directory, but for the manifest itself.
        info: Facts of the writer (step, world size, seeds, source).
        tensors: Every logical tensor by name, without padding, in its stored dtype. Empty where the writer did not see
            whole tensors (a training run).
        states: The same of the optimizer's states, by the state's name (``exp_avg``) and the parameter's.
    """

    kind: str
    files: dict[str, FileRecord]
    info: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    states: dict[str, dict[str, TensorRecord]] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write the manifest durably into ``directory``."""
        files = {
            name: {key: value for key, value in asdict(record).items() if value is not None}
            for name, record in sorted(self.files.items())
        }
        content = {"version": MANIFEST_VERSION, "kind": self.kind, "info": self.info, "files": files}
        if self.tensors:
            content["tensors"] = {name: asdict(record) for name, record in self.tensors.items()}
        if self.states:
            content["states"] = {
                state: {name: asdict(record) for name, record in records.items()}
                for state, records in self.states.items()
            }
        write_durably(directory / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of ``directory``.

        Raises:
            CheckpointError: It is missing (the directory is incomplete) or unreadable.
        """
        path = directory / MANIFEST_NAME
        try:
            content = read_json(path)
            files = {name: FileRecord(**record) for name, record in content["files"].items()}
            if content["version"] != MANIFEST_VERSION or not isinstance(content["kind"], str):
                raise ValueError(
                    f"version {shown(content['version'])}, kind {shown(content['kind'])}; only "
                    f"{MANIFEST_VERSION} is known"
                )
            if not isinstance(content["info"], dict):
                raise ValueError("info is not a mapping")
            tensors = _records(content.get("tensors", {}))
            states = {str(state): _records(records) for state, records in content.get("states", {}).items()}
            for name in files:
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise CheckpointError(f"{path} names a file outside the directory: {name}")
            return cls(kind=content["kind"], files=files, info=content["info"], tensors=tensors, states=states)
        except FileNotFoundError:
            raise CheckpointError(f"{directory} holds no {MANIFEST_NAME}: the checkpoint is incomplete") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None

    def verify(self, directory: Path) -> None:
        """Compare every file with its record.

        Raises:
            CheckpointError: A file is missing, has another size or other contents.
        """
        for name, record in self.files.items():
            record.check(directory / name)

    def verify_sizes(self, directory: Path) -> None:
        """Compare every file's size, and of archives the directory, with its record: what takes no time.

        Raises:
            CheckpointError: A file is missing or another one.
        """
        for name, record in self.files.items():
            record.check_size(directory / name)
            record.check_directory(directory / name)


def _records(values: dict[str, Any]) -> dict[str, TensorRecord]:
    return {
        name: TensorRecord(dtype=str(r["dtype"]), shape=tuple(r["shape"]), xxh3_128=str(r["xxh3_128"]))
        for name, r in values.items()
    }


def digest_file(path: Path) -> str:
    """Return the xxh3-128 digest of a file, read in bounded pieces."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BUFFER_BYTES):
            digest.update(block)
    return digest.hexdigest()


def record_file(path: Path) -> FileRecord:
    """Flush a file to disk and return its record."""
    sync(path)
    directory = directory_digest(path) if path.suffix == ".pt" else None
    return FileRecord(size=path.stat().st_size, xxh3_128=digest_file(path), directory_xxh3_128=directory)


def commit_directory(temporary: Path, target: Path) -> None:
    """Rename a finished directory to its final name, durably.

    Raises:
        CheckpointError: The target exists; a complete result is never overwritten.
    """
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target} exists; a complete directory is not replaced")
    rename_durably(temporary, target)


def temporary_for(target: Path) -> Path:
    """Return the sibling in which ``target`` is made."""
    return target.with_name(f"{TEMPORARY_PREFIX}{target.name}")


def refuse_target(target: Path, *, overwrite: bool) -> None:
    """Raise if ``target`` may not be written; put an old one back where a killed process had set it aside.

    Args:
        target: Final directory.
        overwrite: Whether a target that is not empty may be replaced (see :func:`finish_target`).

    Raises:
        CheckpointError: The target is a file, or is not empty and ``overwrite`` is false.
    """
    old = _set_aside(target)
    if old.exists() and not target.exists():
        logger.warning("%s was being replaced when the process was killed: putting the old one back", target)
        old.replace(target)
    if target.is_file():
        raise CheckpointError(f"target {target} is a file; give a directory")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(f"target {target} exists and is not empty; pass --overwrite to replace it")


def prepare_target(target: Path, *, overwrite: bool) -> Path:
    """Return an empty temporary sibling to write ``target`` into; arguments and errors of :func:`refuse_target`."""
    refuse_target(target, overwrite=overwrite)
    temporary = temporary_for(target)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    return temporary


def finish_target(temporary: Path, target: Path, *, overwrite: bool) -> None:
    """Put a finished temporary directory in ``target``'s place, keeping the old one until the new one is there.

    Raises:
        CheckpointError: The target holds files that it did not hold before, and ``overwrite`` is false.
    """
    refuse_target(target, overwrite=overwrite)
    old = _set_aside(target)
    if old.exists():
        shutil.rmtree(old)
    if target.exists():
        target.replace(old)
    try:
        commit_directory(temporary, target)
    except OSError:
        if old.exists() and not target.exists():
            old.replace(target)
        raise
    if old.exists():
        shutil.rmtree(old)


def remove_set_aside(target: Path) -> None:
    """Remove the old directory that a process left which was killed right after it had put the new one in place."""
    if (old := _set_aside(target)).exists() and target.exists():
        shutil.rmtree(old)


def _set_aside(target: Path) -> Path:
    """Return where an old target waits until the new one is in its place."""
    return target.with_name(f"{TEMPORARY_PREFIX}old-{target.name}")
