"""Recognising what a ``--source`` directory is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from checkpoints_tools.safetensors_io import INDEX_NAME, SINGLE_NAME, SafetensorsSource
from checkpoints_tools.tensor_io import SourceFacts, TensorSource
from checkpoints_tools.zero3_layout import looks_like_zero
from statex_dist.checkpoint.layout import (
    CHECKPOINTS_DIR,
    LATEST_NAME,
    MANIFEST_NAME,
    MODEL_DIR,
    PLAIN_STATE_NAME,
    complete_tags,
)
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.errors import CheckpointError
from statex_dist.models.config import CONFIG_NAME

logger = logging.getLogger(__name__)

BIN_NAME = "pytorch_model.bin"


def open_source(path: str | Path, *, verify: bool = True) -> TensorSource:
    """Open a checkpoint of any layout that we read.

    Args:
        path: A Hugging Face directory, a run, its ``checkpoints`` directory, a DeepSpeed checkpoint directory (with
            ``latest``) or one tag of it. Of several tags the newest complete one is taken, else what ``latest`` names.
        verify: Whether to compare the weight files with the manifest, where there is one.

    Raises:
        CheckpointError: Not a checkpoint, incomplete, damaged, or of a layout that we do not read.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"source not found: {path}")
    if not path.is_dir():
        raise CheckpointError(f"source {path} is a file; give the directory that holds the checkpoint")
    if (path / SINGLE_NAME).exists() or (path / INDEX_NAME).exists():
        verified, info = _check_manifest(path, verify=verify, only_weights=True)
        return SafetensorsSource(path, verified=verified, info=info)
    if (path / BIN_NAME).is_file():
        return _open_state_dict(path / BIN_NAME, kind="torch", key=None, model_dir=_model_dir(path))
    return _open_tag(path if _is_tag(path) else _choose_tag(path), verify=verify)


def _is_tag(directory: Path) -> bool:
    return (directory / PLAIN_STATE_NAME).is_file() or looks_like_zero(directory)


def _choose_tag(path: Path) -> Path:
    """Return the tag to read from a run or a directory of tags."""
    checkpoints = path / CHECKPOINTS_DIR if (path / CHECKPOINTS_DIR).is_dir() else path
    if tags := complete_tags(checkpoints):
        return checkpoints / tags[0]
    latest = checkpoints / LATEST_NAME
    if not latest.is_file():
        raise CheckpointError(
            f"{path} is not a checkpoint: looked for {SINGLE_NAME}, {INDEX_NAME}, {BIN_NAME}, {CHECKPOINTS_DIR}/, "
            f"{LATEST_NAME}, a complete global_step*/ and zero_pp_rank_*_states.pt"
        )
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not tag or Path(tag).name != tag or tag in (".", ".."):
        raise CheckpointError(f"{latest} names {tag[:80]!r}, which is not a tag of this directory")
    if not (checkpoints / tag).is_dir():
        raise CheckpointError(f"{latest} names the tag {tag}, but {checkpoints / tag} does not exist")
    return checkpoints / tag


def _open_tag(tag: Path, *, verify: bool) -> TensorSource:
    if not _is_tag(tag):
        raise CheckpointError(f"{tag} holds neither {PLAIN_STATE_NAME} nor zero_pp_rank_*_states.pt")
    verified, info = _check_manifest(tag, verify=verify, only_weights=False)
    if not (tag / MANIFEST_NAME).is_file():
        logger.warning("%s holds no %s: sizes are checked, contents cannot be", tag, MANIFEST_NAME)
    model_dir = _model_dir(tag / MODEL_DIR)
    if (tag / PLAIN_STATE_NAME).is_file():
        return _open_state_dict(
            tag / PLAIN_STATE_NAME, kind="plain", key="module", model_dir=model_dir, verified=verified, info=info
        )
    # torch is needed for pickles alone, and its import costs more than many a job.
    from checkpoints_tools.zero3_reader import Zero3Source

    return Zero3Source(tag, model_dir=model_dir, verified=verified, info=info)


def _model_dir(directory: Path) -> Path | None:
    return directory if (directory / CONFIG_NAME).is_file() else None


def _open_state_dict(
    path: Path,
    *,
    kind: str,
    key: str | None,
    model_dir: Path | None,
    verified: bool = False,
    info: dict[str, Any] | None = None,
) -> TensorSource:
    from checkpoints_tools.torch_reader import StateDictSource

    facts = SourceFacts(kind=kind, path=path.parent, model_dir=model_dir, verified=verified, info=info or {})
    return StateDictSource(path, key=key, facts=facts)


def _check_manifest(directory: Path, *, verify: bool, only_weights: bool) -> tuple[bool, dict[str, Any]]:
    """Return whether the files were verified, and the writer's facts; a directory without manifest is not verified.

    ``only_weights`` leaves out what people edit by hand in a Hugging Face directory (config, tokenizer).
    """
    if not (directory / MANIFEST_NAME).is_file():
        return False, {}
    manifest = Manifest.read(directory)
    if not verify:
        return False, manifest.info
    files = {n: r for n, r in manifest.files.items() if not only_weights or n.endswith((".safetensors", INDEX_NAME))}
    Manifest(kind=manifest.kind, files=files, info=manifest.info).verify(directory)
    return True, manifest.info
