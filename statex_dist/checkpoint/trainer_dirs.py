"""Directories of other trainers: which checkpoint in them is read, and where its ``config.json`` lies.

flame, torchtitan     RUN/checkpoint/step-N/.metadata; flame writes config.json and the tokenizer to RUN
Megatron-LM           RUN/latest_checkpointed_iteration.txt, RUN/iter_0000010/.metadata or RUN/release/.metadata
Trainer with ZeRO     OUT/checkpoint-N/{config.json, tokenizer.json, latest, global_stepN/}
Trainer with FSDP     OUT/checkpoint-N/pytorch_model_fsdp_0/.metadata
accelerate            OUT/checkpoint_N/{latest, pytorch_model/}
"""

from __future__ import annotations

import re
from pathlib import Path

from statex_dist.checkpoint.layout import CHECKPOINTS_DIR, CONFIG_NAME, LATEST_NAME, MODEL_DIR
from statex_dist.errors import CheckpointError

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
