"""The configuration of a run that keeps those of many models: the one whose tensors are those of the checkpoint.

flame's train.sh copies its folder ``configs`` to the directory of a run, and notes nowhere which of the files was used.
Only the conversion at the end of a run writes ``config.json``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.formats.places import run_dirs_of
from statex_dist.checkpoint.formats.tensor_io import SourceFacts, TensorSource
from statex_dist.checkpoint.json_file import parse_config
from statex_dist.checkpoint.layout import CONFIG_NAME
from statex_dist.errors import CheckpointError, StateXError
from statex_dist.models.registry import config_from_dict, family_of, find_family

_FOLDERS = ("", "configs", "config")
_MOST_FILES = 256
_MOST_BYTES = 1 << 20


def with_config_of_run(source: TensorSource) -> SourceFacts:
    """Return the facts of a torch distributed checkpoint with the configuration that fits its tensors, if there is one.

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
