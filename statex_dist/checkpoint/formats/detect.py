"""Recognising what a directory holds, and opening its files: what every command that reads a model begins with."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from statex_dist.checkpoint.formats.places import (
    check_links,
    checkpoint_inside,
    model_dir_of,
    nothing_text,
    resolve,
)
from statex_dist.checkpoint.formats.registry import check_ways, find_layout, layouts, ways_to_read
from statex_dist.checkpoint.formats.tensor_io import SourceFacts, TensorSource
from statex_dist.checkpoint.layout import (
    CHECKPOINTS_DIR,
    CONFIG_NAME,
    DAMAGED_PREFIX,
    FIRST_RANK_FOLDER,
    LATEST_NAME,
    MANIFEST_NAME,
    TEMPORARY_PREFIX,
    complete_tags,
    is_tag_name,
)
from statex_dist.checkpoint.manifest import FileRecord, Manifest, TensorRecord, digest_file
from statex_dist.errors import CheckpointError

logger = logging.getLogger(__name__)


def open_files(
    path: str | Path, *, digests: bool = True, describe: bool = False, training: bool = False
) -> TensorSource:
    """Open a checkpoint of any layout that we read, whatever model it is.

    Args:
        path: A Hugging Face directory, a run, its ``checkpoints`` directory, a DeepSpeed checkpoint directory (with
            ``latest``) or one tag of it. Of several tags the newest complete one is taken, else what ``latest`` names.
        digests: Whether contents are compared with the manifest's digests and archives' checksums; sizes always are.
        describe: Whether to open no more than tells what the checkpoint is: its tensors cannot be read then.
        training: Whether a training checkpoint is wanted where a directory holds gathered weights beside it.

    Raises:
        CheckpointError: Not a checkpoint, incomplete, damaged, or of a layout that we do not read.
    """
    kind, directory = recognise(path, training=training)
    check_links(directory)
    row = find_layout(kind)
    in_tag = row.is_tag
    manifest = Manifest.read(directory) if (directory / MANIFEST_NAME).is_file() else None
    if manifest is None and in_tag and not describe:
        logger.warning("%s holds no %s: values are compared with the files' own checksums", directory, MANIFEST_NAME)
    if manifest is not None:
        check_files(directory, manifest, only_weights=not in_tag, digests=digests and not describe)
    facts = _facts(kind, directory, find_model_dir(kind, directory), manifest, digests=digests and not describe)
    source: TensorSource = row.load().read(directory, facts, describe=describe)
    if row.is_hub:
        check_ways(source, directory)
    return source


def find_model_dir(kind: str, directory: Path) -> Path | None:
    """Return the directory with ``config.json`` and tokenizer of what :func:`recognise` found, or None.

    Of a training checkpoint it lies in the tag, or, as other trainers have it, beside ``latest``.
    """
    if find_layout(kind).of_run:
        return model_dir_of(directory)
    return directory if (directory / CONFIG_NAME).is_file() else None


def _facts(
    kind: str, directory: Path, model_dir: Path | None, manifest: Manifest | None, *, digests: bool
) -> SourceFacts:
    """Return what is known of a checkpoint; ``digests`` holds what is read to those of the manifest."""
    known = SourceFacts(
        kind=kind,
        path=directory,
        model_dir=model_dir,
        verified=manifest is not None and digests,
        info=manifest.info if manifest is not None else {},
    )
    if manifest is None or not digests:
        return known
    return replace(
        known,
        digests=_digests(manifest.tensors),
        state_digests={state: _digests(records) for state, records in manifest.states.items()},
    )


def _digests(records: dict[str, TensorRecord]) -> dict[str, str]:
    return {name: record.xxh3_128 for name, record in records.items()}


def recognise(path: str | Path, *, training: bool = False) -> tuple[str, Path]:
    """Return what layout a directory has, and where its weight files lie (of a run: the tag).

    Args:
        path: The directory.
        training: Whether a training checkpoint is wanted where gathered weights lie beside it.

    Raises:
        CheckpointError: Not a checkpoint, none that is complete, or two at once.
    """
    path = resolve(path)
    weights = _weights_kind(path)
    inside = None if weights or _is_tag(path) or _has_tags(path) else checkpoint_inside(path)
    if inside is not None:
        logger.info("%s: reading %s", path, inside)
        return recognise(inside, training=training)
    tag = path if _is_tag(path) else _tag_beside(path) if weights else _choose_tag(path)
    of_tag, read = _precedence(tag) if weights and tag is not None else ("", None)
    if weights and read == "weights":
        return weights, path
    if tag is not None and tag != path and read == "tag":
        return of_tag, tag  # weights gathered beside a tag hold less than the tag; open_files compares them
    if weights and tag is not None and not training:
        choice = f"give {tag} for the training checkpoint, or " if tag != path else ""
        raise CheckpointError(
            f"{path} holds gathered weights ({next(iter(ways_to_read(path)), weights)}) and also a training checkpoint "
            f"({tag.name}): which of them is meant is not known; {choice}move one of them away"
        )
    if weights and tag is None:
        _refuse_unnamed_tag(path, weights)
        return weights, path
    assert tag is not None
    kind = _tag_kind(tag)
    if kind is None:
        raise CheckpointError(f"{tag} holds neither {' nor '.join(row.marks[0] for row in layouts() if row.is_tag)}")
    return kind, tag


def _refuse_unnamed_tag(path: Path, weights: str) -> None:
    """Raise if a training checkpoint lies beside weights and no ``latest`` names it.

    Its fp32 weights, optimizer states and step would be dropped without a word.

    Raises:
        CheckpointError: It does.
    """
    patterns = [f"*/{FIRST_RANK_FOLDER}", *(f"*/{row.unnamed}" for row in layouts() if row.unnamed)]
    tags = sorted({file.parent for pattern in patterns for file in path.glob(pattern)})
    tags = [tag for tag in tags if not tag.name.startswith((TEMPORARY_PREFIX, DAMAGED_PREFIX))]
    if tags:
        raise CheckpointError(
            f"{path} holds {next(iter(ways_to_read(path)), weights)} and also the training checkpoint {tags[-1].name}, "
            f"which no {LATEST_NAME} names: which of them is meant is not known; give {tags[-1]} for the training "
            "checkpoint, or move one of them away"
        )


def has_weights(path: Path) -> bool:
    """Return whether a directory with a ``config.json`` holds weights too, of whatever layout."""
    return _weights_kind(path) is not None or _is_tag(path) or (path / LATEST_NAME).is_file()


def _weights_kind(path: Path) -> str | None:
    """Return the layout of the model that lies in a directory itself, or None."""
    ways = ways_to_read(path)
    others = [layout for layout in layouts() if not (layout.is_tag or layout.is_hub) and layout.detect(path)]
    if not ways:
        return others[0].name if others else None
    if others:
        raise CheckpointError(
            f"{path} holds both {next(iter(ways))} and {others[0].marks[0]}: keep the one that is the model"
        )
    return next(iter(ways.values()))[0]


def _tag_kind(directory: Path) -> str | None:
    """Return the layout of a training checkpoint, or None of another directory."""
    return next((layout.name for layout in layouts() if layout.is_tag and layout.detect(directory)), None)


def _is_tag(directory: Path) -> bool:
    return _tag_kind(directory) is not None


def _precedence(tag: Path) -> tuple[str, str | None]:
    """Return the layout of a tag and which is read where weights lie beside it (:meth:`Layout.precedence`)."""
    for row in layouts():
        if row.is_tag and row.is_marked(tag) and (choice := row.load().precedence(tag)):
            return row.name, choice
    return "", None


def _tag_beside(path: Path) -> Path | None:
    """Return the training checkpoint in a directory that also holds weights, or None."""
    names = complete_tags(path)
    if (latest := path / LATEST_NAME).is_file():
        names.append(latest.read_text(encoding="utf-8", errors="replace").strip())
    found = [path / name for name in names if is_tag_name(name) and (path / name).is_dir() and _is_tag(path / name)]
    return found[0] if found else None


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
    if not latest.is_file() and checkpoints != path:
        raise CheckpointError(f"{path} is a training run without a complete checkpoint: {checkpoints} holds none yet")
    if not latest.is_file():
        on_hub = ", ".join(layout.marks[0] for layout in layouts() if layout.is_hub)
        others = ", ".join(layout.marks[0] for layout in layouts() if not (layout.is_tag or layout.is_hub))
        tags_of = ", ".join(row.marks[0] for row in layouts() if row.unnamed)
        looked = f"{on_hub} (or their index), {others}, {CHECKPOINTS_DIR}/, {LATEST_NAME}, global_step*/, {tags_of}"
        raise CheckpointError(nothing_text(path, looked))
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not is_tag_name(tag):
        raise CheckpointError(f"{latest} names {tag[:80]!r}, which is not a tag of this directory")
    if not (checkpoints / tag).is_dir():
        raise CheckpointError(f"{latest} names the tag {tag}, but {checkpoints / tag} does not exist")
    return checkpoints / tag


def check_records(source: TensorSource) -> None:
    """Raise unless weight files and tensors are those of the manifest, if there is one, as far as it lists them.

    Raises:
        CheckpointError: A weight file is not listed, or a tensor is missing or of another shape or dtype.
    """
    directory = source.facts.path
    has_records = find_layout(source.facts.kind).load().has_records
    if not has_records or not (directory / MANIFEST_NAME).is_file():
        return
    manifest = Manifest.read(directory)
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


def check_files(directory: Path, manifest: Manifest, *, only_weights: bool, digests: bool = True) -> None:
    """Hold a directory's files to its manifest, as far as that is not done while they are read.

    Sizes and archive directories are compared at once; contents while they are read, by the digests of tensors and the
    CRCs of archives. Only a file that neither of them covers is read beforehand.

    Args:
        directory: The directory.
        manifest: Its manifest.
        only_weights: What people edit by hand in a Hugging Face directory (config, tokenizer) may differ, with a
            message.
        digests: Whether contents count; else sizes alone.

    Raises:
        CheckpointError: A file is missing or another one.
    """
    endings = tuple(ending for layout in layouts() for ending in layout.weights)
    files = {n: r for n, r in manifest.files.items() if not only_weights or n.endswith(endings)}
    Manifest(kind=manifest.kind, files=files).verify_sizes(directory)
    for name, record in files.items() if digests else ():
        covered = record.directory_xxh3_128 is not None if name.endswith(".pt") else bool(manifest.tensors)
        if not covered or not name.endswith((".pt", ".safetensors", ".distcp")):
            record.check(directory / name)
    others = {name: record for name, record in manifest.files.items() if name not in files}
    if changed := [name for name, record in others.items() if _differs(directory / name, record, digests=digests)]:
        logger.warning("%s: %s changed since %s was written", directory, ", ".join(changed[:5]), MANIFEST_NAME)


def _differs(path: Path, record: FileRecord, *, digests: bool) -> bool:
    try:
        if not path.is_file() or path.stat().st_size != record.size:
            return True
        return digests and record.xxh3_128 is not None and digest_file(path) != record.xxh3_128
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
