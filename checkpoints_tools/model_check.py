"""Comparing a checkpoint's tensors with what its configuration promises: none missing, unused or of another shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools.tensor_io import TensorSource
from checkpoints_tools.transfer import TensorJob, TensorStream
from statex_dist.errors import CheckpointError
from statex_dist.models.config import ModelConfig, read_config_dict
from statex_dist.models.kinds import config_from_dict, family_of, find_family


def read_source_config(source: TensorSource) -> tuple[dict[str, Any] | None, ModelConfig | None]:
    """Return a source's ``config.json`` and, where the model is of one of our families, the typed config.

    Raises:
        CheckpointError: The file is unreadable, or describes one of our families wrongly.
    """
    model_dir = source.facts.model_dir
    if model_dir is None:
        return None, None
    values = read_config_dict(model_dir)
    return values, config_from_dict(values) if find_family(values) else None


def check_tensors(source: TensorSource, config: ModelConfig) -> list[str]:
    """Return the names of a model's tensors, after checking that the source holds just these.

    Arguments and errors of :func:`check_names`; besides, a head of a tied model must equal the embeddings.

    Raises:
        CheckpointError: See there, or a tied head has values of its own.
    """
    names = check_names(source, config)
    family = family_of(config.MODEL_TYPE)
    head, embeddings = family.names.head, family.names.embeddings
    tied = config.tie_word_embeddings and head in source
    if tied and not same_values(source, head, source, embeddings):
        raise CheckpointError(
            f"{source.facts.path}: config.json ties {head} to {embeddings} (tie_word_embeddings), but their values "
            "differ"
        )
    return names


def check_names(source: TensorSource, config: ModelConfig) -> list[str]:
    """Return the names of a model's tensors, after checking that the source holds just these, of the right shapes.

    A head of a tied model may be stored beside the embeddings; a name that only points to another tensor is left out.
    Models of mixed kind may hold any further tensors. No value is read.

    Returns:
        The family's tensors in its order, then the others in the source's.

    Raises:
        CheckpointError: Tensors are missing, unused or of another shape.
    """
    family = family_of(config.MODEL_TYPE)
    specs = family.tensors(config)
    # A name that only points to another tensor counts where the family asks for it, and is left out elsewhere.
    held = [name for name in source.keys() if name not in source.aliases or name in specs]  # noqa: SIM118 - not a mapping
    known = set(held)
    where = source.facts.path
    head = family.names.head
    tied = config.tie_word_embeddings and head in source
    if missing := [name for name in specs if name not in known]:
        raise CheckpointError(f"{where} lacks {_listed(missing)} of the {config.MODEL_TYPE} model in its config.json")
    others = sorted(name for name in held if name not in specs)
    if config.is_mixed:
        _check_other_layers(others, config, where)
    allowed = [name for name in others if name.endswith(config.DERIVED) or (tied and name == head)]
    if unused := [name for name in others if name not in allowed and not config.is_mixed]:
        raise CheckpointError(
            f"{where} holds {_listed(sorted(unused))}, unknown to the {config.MODEL_TYPE} model in config.json"
        )
    for name, spec in specs.items():
        if source.info(name).shape != spec.shape:
            raise CheckpointError(
                f"{where}: tensor '{name}' has shape {source.info(name).shape}; config.json asks for {spec.shape}"
            )
    return [*specs, *others]


def _check_other_layers(others: list[str], config: ModelConfig, where: Path) -> None:
    """Raise unless every layer of another kind has tensors, and there are no layers beyond the last."""
    names = family_of(config.MODEL_TYPE).names
    found = {place[0] for name in others if (place := names.split(name))}
    if beyond := sorted(layer for layer in found if layer >= config.num_hidden_layers):
        raise CheckpointError(f"{where} holds tensors of layers {beyond}; config.json has {config.num_hidden_layers}")
    if empty := sorted(set(range(config.num_hidden_layers)) - set(config.recurrent_layers) - found):
        raise CheckpointError(f"{where} holds no tensor of layers {empty}")


def _listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"tensor{'s' * (len(names) > 1)} {', '.join(repr(name) for name in names[:most])}{more}"


def same_values(first: TensorSource, first_name: str, second: TensorSource, second_name: str) -> bool:
    """Return whether two tensors have the same shape, dtype and bytes; tied names do without being read."""
    if first is second and first.aliases.get(first_name, first_name) == second.aliases.get(second_name, second_name):
        return True
    a, b = first.info(first_name), second.info(second_name)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    streams = [TensorStream(source, allow_nonfinite=True) for source in (first, second)]
    try:
        blocks = (s.blocks(TensorJob.copy(info)) for s, info in zip(streams, (a, b), strict=True))
        return all(np.array_equal(one, other) for one, other in zip(*blocks, strict=True))
    finally:
        for stream in streams:
            stream.close()


def check_apart(source: Path, target: Path) -> None:
    """Raise if writing ``target`` would replace or sit inside the source."""
    source, target = source.resolve(), target.resolve()
    if source == target or target in source.parents or source in target.parents:
        raise CheckpointError(f"target {target} overlaps the source {source}; give a directory outside it")
