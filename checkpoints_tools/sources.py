"""Recognising what a ``--source`` directory is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from checkpoints_tools.gathered_weights import has_weights, settle, tag_named_in, weights_beside
from checkpoints_tools.megatron_io import SIDE_FILES, MegatronSource, looks_like_megatron
from checkpoints_tools.run_configs import with_config_of_run
from checkpoints_tools.safetensors_io import INDEX_NAME, SINGLE_NAME, SafetensorsSource
from checkpoints_tools.tensor_io import SourceFacts, TensorSource
from checkpoints_tools.torch_reader import StateDictSource
from checkpoints_tools.tp_io import LAYOUT_NAME, TensorParallelSource
from checkpoints_tools.zero3_layout import is_stage_1_or_2, looks_like_stage_3, looks_like_zero
from checkpoints_tools.zero3_reader import Zero3Source
from statex_dist.checkpoint.layout import (
    CHECKPOINTS_DIR,
    LATEST_NAME,
    MANIFEST_NAME,
    PLAIN_STATE_NAME,
    complete_tags,
    is_tag_name,
)
from statex_dist.checkpoint.manifest import Manifest, TensorRecord
from statex_dist.checkpoint.trainer_dirs import checkpoint_inside, model_dir_of, step_of_directory
from statex_dist.errors import CheckpointError
from statex_dist.models.config import CONFIG_NAME

logger = logging.getLogger(__name__)

BIN_NAME = "pytorch_model.bin"

_WEIGHT_FILES = (".safetensors", ".distcp", INDEX_NAME, LAYOUT_NAME, *SIDE_FILES)
"""Endings of the files of a model directory without which its tensors cannot be read."""


def open_source(path: str | Path, *, verify: bool = True, describe: bool = False) -> TensorSource:
    """Open a checkpoint of any layout that we read.

    Args:
        path: A Hugging Face directory, a run, its ``checkpoints`` directory, a DeepSpeed checkpoint directory (with
            ``latest``) or one tag of it. Of several tags the newest complete one is taken, else what ``latest`` names.
        verify: Whether the weight files are held to the manifest, where there is one.
        describe: Whether to open no more than tells what the checkpoint is: its tensors cannot be read then.

    Raises:
        CheckpointError: Not a checkpoint, incomplete, damaged, or of a layout that we do not read.
    """
    kind, directory = recognise(path)
    in_tag = kind in ("zero3", "plain")
    manifest = Manifest.read(directory) if kind != "torch" and (directory / MANIFEST_NAME).is_file() else None
    if manifest is None and in_tag and not describe:
        logger.warning("%s holds no %s: what is read is held to the files' own checksums", directory, MANIFEST_NAME)
    if manifest is not None and verify:
        _check_files(directory, manifest, only_weights=not in_tag)
    facts = _facts(kind, directory, _model_dir(kind, directory), manifest, verify=verify)
    source = _open(kind, directory, facts, describe=describe)
    if manifest is not None and kind != "plain":
        _check_records(source, manifest)
    if kind == "megatron" and source.facts.model_dir is None:
        source.facts = with_config_of_run(source)
    if kind in ("hf", "torch"):
        source.facts = source.facts.with_notes(_unread_tag(directory))
    if not describe:
        for note in source.facts.notes:
            logger.warning("%s: %s", directory, note)
    return source


def _model_dir(kind: str, directory: Path) -> Path:
    """Return the directory that may hold the model's ``config.json`` and tokenizer."""
    if kind not in ("zero3", "plain", "megatron"):
        return directory
    return model_dir_of(directory) or directory


def _open(kind: str, directory: Path, facts: SourceFacts, *, describe: bool) -> TensorSource:
    """Open a directory whose layout is known."""
    if kind == "torch":
        return StateDictSource(directory / BIN_NAME, key=None, facts=facts)
    if kind == "plain":
        return StateDictSource(directory / PLAIN_STATE_NAME, key="module", facts=facts)
    if kind == "zero3":
        return _open_zero3(directory, facts, describe=describe)
    readers: dict[str, Callable[[Path, SourceFacts], TensorSource]] = {
        "hf": SafetensorsSource,
        "tp": TensorParallelSource,
        "megatron": MegatronSource,
    }
    return readers[kind](directory, facts)


def _unread_tag(directory: Path) -> str | None:
    """Return what has to be said of a tag beside weights that is not read itself."""
    tag = tag_named_in(directory)
    if tag is None or not is_stage_1_or_2(tag):
        return None
    return (
        f"the weights beside {tag.name} are read: it is of ZeRO stage 1 or 2, and its fp32 weights and optimizer "
        "states are left out (zero_to_fp32.py makes fp32 safetensors of it)"
    )


def _open_zero3(directory: Path, facts: SourceFacts, *, describe: bool) -> Zero3Source:
    """Open a tag, with the weights that lie beside it."""
    beside = None if facts.verified else weights_beside(directory)
    source = Zero3Source(directory, facts, only_first=describe, beside=beside)
    if beside is not None:
        note = f"further weights lie beside {directory.name}; they have not been compared with it"
        source.facts = source.facts.with_notes(note if describe else settle(source, beside))
    if source.filled:
        source.facts = source.facts.with_notes(
            f"saved with exclude_frozen_parameters: {len(source.owned()) - len(source.filled)} of "
            f"{len(source.owned())} tensors are in {directory.name}, the others are read from the weights beside it"
        )
    if source.frozen_excluded:
        source.facts = source.facts.with_notes(
            f"saved with exclude_frozen_parameters: the {len(source.owned())} tensors that are there are not the whole "
            "model if any of its parameters were frozen"
        )
    return source


def _facts(kind: str, directory: Path, model_dir: Path, manifest: Manifest | None, *, verify: bool) -> SourceFacts:
    """Return what is known of a checkpoint; ``verify`` holds what is read to the manifest's digests."""
    step = step_of_directory(directory) if kind == "megatron" else None
    known = SourceFacts(
        kind=kind,
        path=directory,
        model_dir=model_dir if (model_dir / CONFIG_NAME).is_file() else None,
        verified=manifest is not None and verify,
        info=manifest.info if manifest is not None else {"step": step} if step is not None else {},
    )
    if manifest is None or not verify:
        return known
    return replace(
        known,
        digests=_digests(manifest.tensors),
        state_digests={state: _digests(records) for state, records in manifest.states.items()},
    )


def _digests(records: dict[str, TensorRecord]) -> dict[str, str]:
    return {name: record.xxh3_128 for name, record in records.items()}


def recognise(path: str | Path) -> tuple[str, Path]:
    """Return what layout a directory has, and where its weight files lie (of a run: the tag).

    Raises:
        CheckpointError: Not a checkpoint, or none that is complete.
    """
    path = Path(path)
    if "\0" in str(path) or not path.exists():
        raise CheckpointError(f"source not found: {str(path)!r}")
    if not path.is_dir():
        raise CheckpointError(f"source {path} is a file; give the directory that holds the checkpoint")
    if has_weights(path) and (named := tag_named_in(path)) is not None and looks_like_stage_3(named):
        return "zero3", named  # what a trainer gathered beside its tag is less than the tag
    if (path / SINGLE_NAME).exists() or (path / INDEX_NAME).exists():
        return "hf", path
    if (path / LAYOUT_NAME).is_file():
        return "tp", path
    if looks_like_megatron(path):
        return "megatron", path
    if (path / BIN_NAME).is_file():
        return "torch", path
    if not _is_tag(path) and not _has_tags(path) and (inside := checkpoint_inside(path)) is not None:
        logger.info("%s: reading %s", path, inside)
        return recognise(inside)
    tag = path if _is_tag(path) else _choose_tag(path)
    if not _is_tag(tag):
        raise CheckpointError(f"{tag} holds neither {PLAIN_STATE_NAME} nor zero_pp_rank_*_states.pt")
    return "plain" if (tag / PLAIN_STATE_NAME).is_file() else "zero3", tag


def _is_tag(directory: Path) -> bool:
    return (directory / PLAIN_STATE_NAME).is_file() or looks_like_zero(directory)


def _has_tags(path: Path) -> bool:
    """Return whether a directory, or its ``checkpoints``, holds complete tags of ours or names one in ``latest``."""
    folders = (path, path / CHECKPOINTS_DIR)
    return any((folder / LATEST_NAME).is_file() or complete_tags(folder) for folder in folders)


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
    if not is_tag_name(tag):
        raise CheckpointError(f"{latest} names {tag[:80]!r}, which is not a tag of this directory")
    if not (checkpoints / tag).is_dir():
        raise CheckpointError(f"{latest} names the tag {tag}, but {checkpoints / tag} does not exist")
    return checkpoints / tag


def _check_records(source: TensorSource, manifest: Manifest) -> None:
    """Raise unless the weight files and the tensors are those of the manifest, as far as it lists them.

    Raises:
        CheckpointError: A weight file is not listed, or a tensor is missing or of another shape or dtype.
    """
    for path in source.files:
        if str(path.relative_to(source.facts.path)) not in manifest.files:
            raise CheckpointError(f"{path} is not one of the files that {MANIFEST_NAME} lists")
    held: list[tuple[str | None, TensorSource | None, dict[str, TensorRecord]]] = [(None, source, manifest.tensors)]
    held += [(state, source.states().get(state), records) for state, records in manifest.states.items()]
    for state, of_state, records in held:
        for name, record in records.items():
            info = of_state.info(name) if of_state is not None and name in of_state else None
            if info is None or (info.dtype, info.shape) != (record.dtype, record.shape):
                found = "is missing" if info is None else f"has dtype {info.dtype} and shape {info.shape}"
                what = "tensor" if state is None else state
                raise CheckpointError(
                    f"{source.facts.path}: {what} '{name}' {found}; {MANIFEST_NAME} says {record.dtype} {record.shape}"
                )


def _check_files(directory: Path, manifest: Manifest, *, only_weights: bool) -> None:
    """Hold a directory's files to its manifest, as far as that is not done while they are read.

    Sizes and archive directories are compared at once; contents while they are read, by the digests of tensors and the
    CRCs of archives. Only a file that neither of them covers is read beforehand.

    Args:
        directory: The directory.
        manifest: Its manifest.
        only_weights: Leaves out what people edit by hand in a Hugging Face directory (config, tokenizer).

    Raises:
        CheckpointError: A file is missing or another one.
    """
    files = {n: r for n, r in manifest.files.items() if not only_weights or n.endswith(_WEIGHT_FILES)}
    Manifest(kind=manifest.kind, files=files).verify_sizes(directory)
    for name, record in files.items():
        covered = record.directory_xxh3_128 is not None if name.endswith(".pt") else bool(manifest.tensors)
        if not covered or not name.endswith((".pt", ".safetensors", ".distcp")):
            record.check(directory / name)
