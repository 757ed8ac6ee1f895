"""Finding the directory that holds a checkpoint's files from the one that was given, and saying why there is none."""

from __future__ import annotations

import logging
from pathlib import Path

from statex_dist.checkpoint.layout import CONFIG_NAME
from statex_dist.checkpoint.trainer_dirs import tracked_iteration
from statex_dist.errors import CheckpointError

logger = logging.getLogger(__name__)

SNAPSHOTS_DIR, REFS_DIR = "snapshots", "refs"
INCOMPLETE = ".incomplete"
"""Ending of the files that an interrupted download of the Hub leaves."""

_MODEL_FILES = (".safetensors", ".bin", ".pt", ".distcp", ".json", ".metadata")
_DOWNLOADS = ("", "blobs", ".cache/huggingface/download")
_LFS = b"version https://git-lfs"
_MOST_BYTES = 4096


def resolve(path: str | Path) -> Path:
    """Return the directory with the files of a checkpoint.

    A cache directory of the Hub (``models--owner--name``) stands for the snapshot of its main branch, a directory of
    Megatron's iterations for the last one.

    Raises:
        CheckpointError: There is no such directory, or a file of the model is a link to nothing or no regular file.
    """
    path = Path(path)
    if "\0" in str(path) or not _exists(path):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to {path.readlink()}, which does not exist")
        # A name such as owner/model may be meant as one of the Hub's.
        on_hub = len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists()
        hint = f" (nothing is downloaded: hf download {path} --local-dir DIR)" if on_hub else ""
        raise CheckpointError(f"model directory or checkpoint not found: {str(path)[:200]}{hint}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the directory that holds the checkpoint, with its {CONFIG_NAME}")
    for step in (_snapshot, tracked_iteration):
        if (inner := step(path)) is not None:
            logger.info("%s: reading %s", path, inner.relative_to(path))
            path = inner
    check_links(path)
    return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise CheckpointError(f"{str(path)[:80]} cannot be read: {error.strerror}") from None


def _snapshot(path: Path) -> Path | None:
    """Return the snapshot inside a cache directory of the Hub, or None for another directory."""
    snapshots = path / SNAPSHOTS_DIR
    if not snapshots.is_dir() or not ((path / REFS_DIR).is_dir() or (path / "blobs").is_dir()):
        return None
    found = sorted(entry.name for entry in snapshots.iterdir() if entry.is_dir())
    main = path / REFS_DIR / "main"
    name = _read_line(main) if main.is_file() else found[0] if len(found) == 1 else None
    if name in found:
        return snapshots / str(name)
    shown = ", ".join(str(Path(SNAPSHOTS_DIR, entry)) for entry in found[:3]) or "no snapshot"
    raise CheckpointError(
        f"{path} is a cache directory of the Hub, whose main branch has no snapshot here; it holds {shown}"
        + (": give one of them" if found else f"{_unfinished_text(path)}; download the model again")
    )


def _read_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode("utf-8", "replace").strip()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def check_links(directory: Path) -> None:
    """Raise if a file of a model is a link to nothing, or a pipe or device.

    Raises:
        CheckpointError: It is.
    """
    for entry in sorted(directory.iterdir()):
        if not entry.name.endswith(_MODEL_FILES) or entry.is_file() or entry.is_dir():
            continue
        if entry.exists():
            # Opening a pipe waits for its writer, which may never come.
            raise CheckpointError(f"{entry} is not a regular file; replace it by one, or remove it")
        if entry.is_symlink():
            raise CheckpointError(
                f"{entry} is a link to {str(entry.readlink())[:120]}, which does not exist (a cache of the Hub, copied "
                "without its blobs?); copy with cp -rL, or download again"
            )


def unfinished(directory: Path) -> Path | None:
    """Return a file that an interrupted download has left in or below a directory, or None."""
    for folder in _DOWNLOADS:
        if found := sorted((directory / folder).glob(f"*{INCOMPLETE}")):
            return found[0]
    return None


def _unfinished_text(directory: Path) -> str:
    found = unfinished(directory)
    return "" if found is None else f"; its download is not complete ({found.relative_to(directory)})"


def missing_text(path: Path, lister: str) -> str:
    """Return the message about a weight file that an index lists and that is not there."""
    return f"{path} is missing; {lister} lists it{_unfinished_text(path.parent)}"


def nothing_text(directory: Path, names: str) -> str:
    """Return the message about a directory that holds no checkpoint."""
    return f"{directory} is not a checkpoint: looked for {names}{_unfinished_text(directory)}"


def pointer_text(path: Path) -> str | None:
    """Return what a file is that was not downloaded but only named by Git LFS, or None for another file."""
    with path.open("rb") as file:
        is_pointer = file.read(len(_LFS)) == _LFS
    return f"{path} is a pointer of Git LFS, not the file itself; fetch it with git lfs pull" if is_pointer else None
