"""Opening a checkpoint of any layout as a model, with every check: what the tools and the loader of models share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.formats.detect import check_records, find_model_dir, has_weights, open_files, recognise
from statex_dist.checkpoint.formats.places import run_dirs_of
from statex_dist.checkpoint.formats.tensor_io import SourceFacts, TensorSource
from statex_dist.checkpoint.json_file import parse_config
from statex_dist.errors import CheckpointError, StateXError
from statex_dist.models.config import CONFIG_NAME, ModelConfig, read_config_dict
from statex_dist.models.layout import Names, Part
from statex_dist.models.model_check import (
    check_not_quantised,
    check_tensors,
    check_whole,
    find_prefix,
)
from statex_dist.models.registry import config_from_dict, family_of, find_family, read_config

logger = logging.getLogger(__name__)

_OF_FILES = ("hf", "torch")
"""Layouts with the names of the hub; the others have those of memory."""

_FOLDERS = ("", "configs", "config")
_MOST_FILES = 256
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenModel:
    """A checkpoint, open and checked.

    Attributes:
        source: Its tensors.
        values: Contents of its ``config.json``; None where it has none.
        config: The same, typed; None where the model is of none of our families.
        names: The family's tensors in its order, then the others in the source's.
    """

    source: TensorSource
    values: dict[str, Any] | None
    config: ModelConfig | None
    names: list[str]


def open_model(
    path: str | Path,
    *,
    digests: bool = True,
    describe: bool = False,
    training: bool = False,
    as_stored: bool = False,
) -> OpenModel:
    """Open a checkpoint; of a model of one of our families every name, shape and dtype is checked, and a tied head.

    Args:
        path: As for :func:`statex_dist.checkpoint.formats.detect.open_files`, like the other arguments.
        digests: See there.
        describe: See there.
        training: See there.
        as_stored: As for :func:`interpret`.

    Raises:
        CheckpointError: See there, and of :func:`interpret`.
    """
    opened = open_files(path, digests=digests, describe=describe, training=training)
    return interpret(opened, describe=describe, training=training, as_stored=as_stored)


def interpret(
    source: TensorSource,
    *,
    describe: bool = False,
    training: bool = False,
    check: bool = True,
    as_stored: bool = False,
) -> OpenModel:
    """Return open files as a model, checked.

    Args:
        source: What :func:`statex_dist.checkpoint.formats.detect.open_files` opened.
        describe: Whether it was opened to be described.
        training: Whether a training checkpoint is wanted: it may lack frozen parameters that were not saved.
        check: Whether the tensors must be those of the model; what compares two checkpoints tells the differences.
        as_stored: Whether tensors of a model directory that are joined, and that the family does not know, stay so:
            experts that the hub has as one tensor.

    Raises:
        CheckpointError: ``config.json`` is wrong, or the tensors are not those of its model.
    """
    in_parts = source.in_parts
    if in_parts and source.facts.model_dir is None:
        source.facts = _with_config_of_run(source)
    if not describe:
        for note in source.facts.notes:
            logger.warning("%s: %s", source.facts.path, note)
    model_dir, found = source.facts.model_dir, source.facts.config
    values = read_config_dict(model_dir) if model_dir is not None else dict(found) if found is not None else None
    config = config_from_dict(values) if values is not None and find_family(values) else None
    if config is not None and in_parts:
        from statex_dist.models.megatron import join_parts  # only where there are parts to join

        source = join_parts(source, config)
    check_records(source)
    if training and source.frozen_excluded:
        return OpenModel(source=source, values=values, config=None, names=source.keys())
    if config is None or values is None:
        check_whole(source)
        _check_gathered(source)
        return OpenModel(source=source, values=values, config=None, names=source.keys())
    check_not_quantised(values, source.facts.path)
    if prefix := find_prefix(source, config):
        logger.warning("%s: every tensor's name begins with '%s', which is taken off", source.facts.path, prefix)
        source.strip(prefix)
    parts = config.file_parts({name: source.info(name).shape for name in source.keys()})  # noqa: SIM118
    if as_stored and source.facts.kind in _OF_FILES:
        of_family = family_of(config.MODEL_TYPE).names
        kept = [name for name, of in parts.items() if len(of) > 1 and not _is_ours(name, of, of_family, config)]
        parts = {name: of for name, of in parts.items() if name not in kept}
    if parts:
        source.divide(parts)
    if not check:
        return OpenModel(source=source, values=values, config=config, names=source.keys())
    names = check_tensors(source, config, values=source.has_values)
    return OpenModel(source=source, values=values, config=config, names=names)


def _is_ours(name: str, parts: Sequence[Part], names: Names, config: ModelConfig) -> bool:
    """Return whether a joined tensor has to be shown in parts: of one of our layers, or one that is renamed."""
    known = family_of(config.MODEL_TYPE).tensors(config)
    renamed = name.startswith("model.") and names.split(name) is None
    return renamed or any(part.name in known for part in parts)


def open_source(path: str | Path, *, check: bool = True, as_stored: bool = False) -> TensorSource:
    """Open a checkpoint as :func:`open_model` does, and return its tensors; arguments of :func:`interpret`."""
    return interpret(open_files(path), check=check, as_stored=as_stored).source


def find_model(path: str | Path) -> Path:
    """Return the directory with ``config.json`` and tokenizer of a checkpoint of any layout; no weight file is opened.

    Raises:
        CheckpointError: There is no checkpoint, or none with a ``config.json``.
    """
    if (Path(path) / CONFIG_NAME).is_file():
        return Path(path)  # also of a model without weights, which can be planned for
    kind, directory = recognise(path)
    found = find_model_dir(kind, directory)
    if found is None:
        raise CheckpointError(f"{directory} holds no {CONFIG_NAME}: what model it is is not known")
    return found


def read_checked_config(path: str | Path) -> ModelConfig:
    """Return the config of a checkpoint of any layout, after checking its weights' headers where it has weights.

    Raises:
        CheckpointError: There is no ``config.json``, or the weights are not those of its model.
    """
    model_dir = find_model(path)
    config = read_config(model_dir)
    if model_dir != Path(path) or has_weights(model_dir):
        open_model(path, digests=False)
    return config


def _check_gathered(source: TensorSource) -> None:
    """Raise if a checkpoint of no known model holds placeholders in place of weights.

    Raises:
        CheckpointError: It does.
    """
    empty = [name for name in source.owned() if source.info(name).numel == 0 and name.endswith(".weight")]
    if empty:
        raise CheckpointError(
            f"{source.facts.path}: tensor '{empty[0]}' is an empty placeholder ({len(empty)} in all): the weights were "
            "not gathered when they were saved under ZeRO-3; give the ZeRO checkpoint (the directory with 'latest')"
        )


def _with_config_of_run(source: TensorSource) -> SourceFacts:
    """Return the facts of a torch distributed checkpoint with the configuration that fits its tensors, if there is one.

    flame's train.sh copies its folder ``configs`` to the directory of a run, and notes nowhere which of the files was
    used. Only the conversion at the end of a run writes ``config.json``.

    Raises:
        CheckpointError: Several fit.
    """
    facts = source.facts
    found: list[tuple[Path, dict[str, Any]]] = []
    for path, values in _candidates(facts.path):
        fitted = _fitted(values, source)
        if fitted is not None and all(fitted != other for _, other in found):
            found.append((path, fitted))
    if not found:
        return facts
    run = found[0][0].parent
    if len(found) > 1:
        names = ", ".join(path.name for path, _ in found[:4])
        raise CheckpointError(
            f"{facts.path} has no {CONFIG_NAME}, and several in {run} fit its tensors: {names}; copy the one that was "
            f"trained to {CONFIG_NAME} beside the checkpoint"
        )
    path, values = found[0]
    sizes = f", with vocab_size {values['vocab_size']}" if values not in [v for _, v in _candidates(facts.path)] else ""
    note = f"no {CONFIG_NAME}: {run.name}/{path.name} is taken, of which the tensors are{sizes}"
    return replace(facts, config=values).with_notes(note)


def _candidates(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield configurations of families of ours in the directories of a run, nearest first."""
    folders = [root / name for root in (directory, *run_dirs_of(directory)) for name in _FOLDERS]
    paths = [path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.json"))]
    for path in paths[:_MOST_FILES]:
        try:
            values = parse_config(path.read_text(encoding="utf-8")) if path.stat().st_size <= _MOST_BYTES else None
        except (OSError, ValueError, RecursionError):
            continue  # some other JSON file
        if isinstance(values, dict) and find_family(values):
            yield path, values


def _fitted(values: dict[str, Any], source: TensorSource) -> dict[str, Any] | None:
    """Return a configuration if a source's tensors are its model's, with the vocabulary that they have."""
    try:
        config = config_from_dict(values)
        names = family_of(config.MODEL_TYPE).names
        shape = source.info(names.embeddings).shape if names.embeddings in source else ()
        if shape and shape[0] != config.vocab_size and "vocab_size" in values:
            values = {**values, "vocab_size": shape[0]}
            config = config_from_dict(values)
    except StateXError:
        return None  # a model that we cannot have, and so not this one
    specs = family_of(config.MODEL_TYPE).tensors(config)
    held = {name for name in source.keys() if not name.endswith(config.DERIVED)}  # noqa: SIM118 - not a mapping
    held -= {names.head} if config.tie_word_embeddings else set()
    fits = held == specs.keys() and all(source.info(name).shape == spec.shape for name, spec in specs.items())
    return values if fits else None
