"""Finding the directory that holds a checkpoint's files from the one that was given, and saying why there is none.

Runs of other trainers, and where their ``config.json`` lies::

    flame, torchtitan     RUN/checkpoint/step-N/.metadata; flame writes config.json and the tokenizer to RUN
    Megatron-LM           RUN/latest_checkpointed_iteration.txt, RUN/iter_0000010/.metadata or RUN/release/.metadata
    Trainer with ZeRO     OUT/checkpoint-N/{config.json, tokenizer.json, latest, global_stepN/}
    Trainer with FSDP     OUT/checkpoint-N/pytorch_model_fsdp_0/.metadata
    accelerate            OUT/checkpoint_N/{latest, pytorch_model/}

A file that goes along with a model (tokenizer, code, generation settings) is copied by its contents. If it is a link to
somewhere else, the copy would publish a private file. So links may lead to files of the same directory alone, or, in a
snapshot of the Hugging Face hub's cache, to the blobs of the same repository::

    models--owner--name/
      blobs/4f7b...              the contents
      snapshots/REVISION/        tokenizer.json -> ../../blobs/4f7b...
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from statex_dist.checkpoint.layout import CHECKPOINTS_DIR, CONFIG_NAME, LATEST_NAME, MODEL_DIR, tag_files
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
    for entry in tag_files(directory):
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


_HUB_PREFIXES = ("models--", "datasets--", "spaces--")


def check_link(path: Path, directory: Path) -> None:
    """Raise if a file of a directory is a link that leads out of it.

    Args:
        path: The file; its name may hold folders below ``directory``.
        directory: The directory.

    Raises:
        CheckpointError: It leads elsewhere, or in a circle.
    """
    try:
        real, root = path.resolve(strict=True), directory.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be followed: {getattr(error, 'strerror', None) or error}") from None
    allowed = [root]
    for folder in (root, *root.parents):
        if folder.name == "snapshots" and folder.parent.name.startswith(_HUB_PREFIXES):
            allowed.append(folder.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path} is a link to {real}, outside its directory; replace it by a copy of the file, or remove it"
        )


TRACKER_NAME = "latest_checkpointed_iteration.txt"
"""Megatron-LM's file with the number of its last checkpoint."""

_DCP_METADATA = ".metadata"
_FSDP_DIR = "pytorch_model_fsdp_0"
_NUMBERED = re.compile(r"(?:step|iter|checkpoint)[-_]?(\d{1,18})", flags=re.ASCII)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_MARKERS = (_DCP_METADATA, f"{_FSDP_DIR}/{_DCP_METADATA}", LATEST_NAME, *_WEIGHTS)
_LISTED = 6


def checkpoint_inside(path: Path) -> Path | None:
    """Return the checkpoint that is read where a run of another trainer is given, or None for any other directory.

    Megatron's tracker file names it; elsewhere it is the complete one of the highest number.

    Raises:
        CheckpointError: The tracker file names no checkpoint, none is complete, or the format is one that is not read.
    """
    _refuse_old_megatron(path)
    if (tracked := tracked_iteration(path)) is not None:
        return tracked
    if (path / _FSDP_DIR / _DCP_METADATA).is_file():
        return path / _FSDP_DIR
    for folder in (path, path / "checkpoint", path / CHECKPOINTS_DIR):
        numbered = _numbered(folder)
        if complete := [found for found in numbered if any((found / marker).is_file() for marker in _MARKERS)]:
            return complete[-1]
        if numbered:
            for found in numbered:
                _refuse_old_megatron(found)
            names = ", ".join(found.name for found in numbered[-_LISTED:])
            raise CheckpointError(
                f"{folder} holds {names}, none of which is a complete checkpoint: looked in each for {_DCP_METADATA}, "
                f"{LATEST_NAME}, {_WEIGHTS[0]} and {_WEIGHTS[2]}"
            )
    return None


def _numbered(folder: Path) -> list[Path]:
    """Return the folders of checkpoints, by their number."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), p) for p in folder.iterdir() if (match := _NUMBERED.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def tracked_iteration(path: Path) -> Path | None:
    """Return the folder that Megatron's tracker file in a directory names, or None where there is no such file.

    Raises:
        CheckpointError: It names none, or one that is not complete or of another format.
    """
    tracker = path / TRACKER_NAME
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise CheckpointError(f"{tracker} says {text[:40]!r}; an iteration's number, or release, is expected")
    found = tracker.parent / (text if text == "release" else f"iter_{int(text):07d}")
    if not found.is_dir():
        others = ", ".join(p.name for p in _numbered(tracker.parent)[-_LISTED:])
        hint = f"; give one of those that are there: {others}" if others else ""
        raise CheckpointError(f"{tracker} names {text}, but {found} does not exist{hint}")
    _refuse_old_megatron(found)
    if not (found / _DCP_METADATA).is_file():
        raise CheckpointError(f"{found}, which {tracker.name} names, holds no {_DCP_METADATA}: it is not complete")
    return found


def _refuse_old_megatron(directory: Path) -> None:
    """Raise if a directory holds Megatron's checkpoint of a format other than torch_dist.

    Raises:
        CheckpointError: It does.
    """
    if (directory / _DCP_METADATA).is_file() or not directory.is_dir():
        return
    if any(directory.glob("mp_rank_*/model_optim_rng.pt")) or any(directory.glob("mp_rank_*/model_rng.pt")):
        raise CheckpointError(
            f"{directory} is of Megatron-LM's format 'torch' (mp_rank_*/model_optim_rng.pt), which is not read; write "
            "it with Megatron's --ckpt-convert-format torch_dist"
        )


def model_dir_of(directory: Path) -> Path | None:
    """Return the directory with the ``config.json`` and the tokenizer of a training checkpoint, or None.

    Args:
        directory: That of the weight files: a tag of DeepSpeed's or a torch distributed checkpoint.
    """
    candidates = [directory / MODEL_DIR, directory, directory.parent, *run_dirs_of(directory)]
    return next((found for found in candidates if (found / CONFIG_NAME).is_file()), None)


def step_of_directory(directory: Path) -> int | None:
    """Return the step that the name of another trainer's checkpoint, or of the directory around it, says."""
    names = (directory.name, directory.parent.name)
    return next((int(match[1]) for name in names if (match := _NUMBERED.fullmatch(name))), None)


def run_dirs_of(directory: Path) -> list[Path]:
    """Return the directories that may be that of the run to which a checkpoint belongs; none of other checkpoints."""
    numbered = _NUMBERED.fullmatch(directory.name) or _NUMBERED.fullmatch(directory.parent.name)
    return [directory.parent, directory.parent.parent] if numbered else []


def trainer_states(directory: Path) -> list[str]:
    """Return names of the files beside a checkpoint in which Trainer or accelerate keeps a training's state."""
    names = ("optimizer", "scheduler", "scaler")
    patterns = [f"{name}*.{ending}" for name in names for ending in ("pt", "bin")]
    patterns += ["trainer_state.json", "rng_state*.pth", "random_states_*.pkl"]
    return sorted(path.name for pattern in patterns for path in directory.glob(pattern))


def trainer_files(directory: Path) -> set[str]:
    """Return names of files that a trainer writes beside a model and that are no part of it.

    DeepSpeed leaves scripts beside ``latest``; flame copies its own repository into the directory of a run.
    """
    names = {"zero_to_fp32.py", "zero_to_torch.py"} if (directory / LATEST_NAME).is_file() else set()
    return names | ({"setup.py", "LICENSE"} if _numbered(directory / "checkpoint") else set())
