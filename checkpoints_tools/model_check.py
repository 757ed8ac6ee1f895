"""Comparing a checkpoint's tensors with what its configuration promises: none missing, unused or of another shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.tensor_io import TensorSource
from statex_dist.errors import CheckpointError
from statex_dist.models.config import ModelConfig, read_config_dict
from statex_dist.models.kinds import FAMILIES, config_from_dict, family_of


def read_source_config(source: TensorSource) -> tuple[dict[str, Any] | None, ModelConfig | None]:
    """Return a source's ``config.json`` and, where the model is of one of our families, the typed config.

    Raises:
        CheckpointError: The file is unreadable, or describes one of our families wrongly.
    """
    model_dir = source.facts.model_dir
    if model_dir is None:
        return None, None
    values = read_config_dict(model_dir)
    model_type = values.get("model_type")
    known = isinstance(model_type, str) and model_type in FAMILIES
    return values, config_from_dict(values) if known else None


def check_tensors(source: TensorSource, config: ModelConfig) -> list[str]:
    """Return the names of a model's tensors in the family's order, after checking that the source holds just these.

    A head of a tied model may be there as long as it equals the embeddings; it is left out.

    Raises:
        CheckpointError: A tensor is missing, unused or of another shape, or a tied head has values of its own.
    """
    family = family_of(config.MODEL_TYPE)
    specs = family.tensors(config)
    held = set(source.keys())
    where = source.facts.path
    if missing := [name for name in specs if name not in held]:
        raise CheckpointError(f"{where} lacks {_listed(missing)} of the {config.MODEL_TYPE} model in its config.json")
    head, embeddings = family.names.head, family.names.embeddings
    if config.tie_word_embeddings and head in held:
        held.discard(head)
        if not _same(source, head, embeddings):
            raise CheckpointError(
                f"{where}: config.json ties {head} to {embeddings} (tie_word_embeddings), but their values differ"
            )
    if unused := sorted(held - set(specs)):
        raise CheckpointError(
            f"{where} holds {_listed(unused)}, unknown to the {config.MODEL_TYPE} model in config.json"
        )
    for name, spec in specs.items():
        if source.info(name).shape != spec.shape:
            raise CheckpointError(
                f"{where}: tensor '{name}' has shape {source.info(name).shape}; config.json asks for {spec.shape}"
            )
    return list(specs)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' * (len(names) > 1)} {', '.join(repr(name) for name in names[:3])}{more}"


def _same(source: TensorSource, first: str, second: str) -> bool:
    """Return whether two tensors hold the same values; tied names do without being read."""
    owners = {name: source.aliases.get(name, name) for name in (first, second)}
    return owners[first] == owners[second] or torch.equal(source.read(first), source.read(second))


def check_apart(source: Path, target: Path) -> None:
    """Raise if writing ``target`` would replace or sit inside the source."""
    source, target = source.resolve(), target.resolve()
    if source == target or target in source.parents or source in target.parents:
        raise CheckpointError(f"target {target} overlaps the source {source}; give a directory outside it")
