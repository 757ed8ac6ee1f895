"""Comparing a checkpoint's tensors with what its configuration promises: none missing, unused or of another shape."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.dtypes import FLOATS, TORCH_NAMES
from statex_dist.checkpoint.formats.piece_io import same_values
from statex_dist.checkpoint.formats.tensor_io import TensorInfo, TensorSource
from statex_dist.errors import CheckpointError
from statex_dist.models.config import ModelConfig
from statex_dist.models.hybrid.host_tensors import host_tensors
from statex_dist.models.registry import family_of

logger = logging.getLogger(__name__)


def check_tensors(source: TensorSource, config: ModelConfig, *, values: bool = True) -> list[str]:
    """Return the names of a model's tensors, after checking that the source holds just these.

    A head of a tied model must equal the embeddings.

    Args:
        source: The checkpoint.
        config: The model's config.
        values: Whether values can be read; else the head is not compared.

    Raises:
        CheckpointError: See there, or a tied head has values of its own.
    """
    names = check_names(source, config)
    family = family_of(config.MODEL_TYPE)
    head, embeddings = family.names.head, family.names.embeddings
    tied = config.tie_word_embeddings and head in source and values
    if tied and not same_values(source, head, source, embeddings):
        raise CheckpointError(
            f"{source.facts.path}: config.json ties {head} to {embeddings} (tie_word_embeddings), but their values "
            "differ"
        )
    return names


def check_names(source: TensorSource, config: ModelConfig) -> list[str]:
    """Return the names of a model's tensors, after checking that the source holds just these, of the right shapes.

    A head of a tied model may be stored beside the embeddings; a name that only points to another tensor is left out.
    Models of mixed kind may hold any further tensors outside the layers, and in them where the host's are not known
    (:func:`statex_dist.models.hybrid.host_tensors.host_tensors`). No value is read.

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
        share = f" (it holds {len(specs) - len(missing)} of {len(specs)}: saved with exclude_frozen_parameters)"
        why = share if source.frozen_excluded else ""
        raise CheckpointError(
            f"{where} lacks {_listed(missing)} of the {config.MODEL_TYPE} model in its config.json{why}"
        )
    others = sorted(name for name in held if name not in specs)
    if config.is_mixed:
        _check_other_layers(others, config, where)
        _check_host(source, specs, others, config)
    extra = [name for name in others if is_extra(source.info(name), config)]
    allowed = {*extra, head} if tied else set(extra)
    if unused := [name for name in others if name not in allowed and not config.is_mixed]:
        raise CheckpointError(
            f"{where} holds {_listed(sorted(unused))}, unknown to the {config.MODEL_TYPE} model in config.json"
        )
    for name, spec in specs.items():
        check_tensor(source.info(name), spec.shape, where)
    if extra and not config.is_mixed:
        logger.info("%s: %s follow from the configuration or are empty: not used", where, _listed(extra, 3))
    return [*specs, *others]


def check_whole(source: TensorSource) -> None:
    """Raise if a source without a configuration of ours may lack parameters.

    Raises:
        CheckpointError: It was saved without its frozen parameters, and nothing says which those are.
    """
    if source.frozen_excluded:
        raise CheckpointError(
            f"{source.facts.path} was saved with exclude_frozen_parameters: it holds {len(source.owned())} tensors, "
            "and nothing says which are missing. Put the model's safetensors beside latest, or save it without that "
            "option"
        )


def tied_names(config: ModelConfig | None) -> frozenset[str]:
    """Return names that a checkpoint may store although they are no parameters of their own: the head, if tied."""
    tied = config is not None and config.tie_word_embeddings
    return frozenset({family_of(config.MODEL_TYPE).names.head} if config is not None and tied else ())


def is_extra(info: TensorInfo, config: ModelConfig) -> bool:
    """Return whether a tensor that the family does not list is one that no model needs: derived, or without values."""
    return info.name.endswith(config.DERIVED) or info.numel == 0


def check_tensor(info: TensorInfo, shape: tuple[int, ...], where: Path, said_by: str = "config.json") -> None:
    """Raise unless a tensor has the shape that the model needs, and floating-point values.

    Raises:
        CheckpointError: It has not.
    """
    if info.numel == 0 and info.shape != shape:
        raise CheckpointError(
            f"{where}: tensor '{info.name}' is an empty placeholder of shape {list(info.shape)}: the weights were not "
            "gathered when they were saved under ZeRO-3; give the ZeRO checkpoint (the directory with 'latest'), or "
            "gather them with its zero_to_fp32.py"
        )
    if info.shape != shape:
        raise CheckpointError(f"{where}: tensor '{info.name}' has shape {info.shape}; {said_by} asks for {shape}")
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"{where}: tensor '{info.name}' has dtype {TORCH_NAMES[info.dtype]}: integer or quantised weights are not "
            "read; save the model with floating-point weights (dequantised) first"
        )


def check_not_quantised(values: dict[str, Any], where: Path) -> None:
    """Raise if a ``config.json`` says that the weights are quantised.

    Raises:
        CheckpointError: It does.
    """
    for key in ("quantization_config", "compression_config"):
        if found := values.get(key):
            method = found.get("quant_method") if isinstance(found, dict) else None
            raise CheckpointError(
                f"{where}: config.json has {key} ({str(method or found)[:40]}): quantised weights are not read; save "
                "the model dequantised, without that key"
            )


def find_prefix(source: TensorSource, config: ModelConfig) -> str:
    """Return the one prefix after which every name fits the model, or nothing where names fit as they are, or never."""
    names, specs = source.keys(), family_of(config.MODEL_TYPE).tensors(config)
    of_family = family_of(config.MODEL_TYPE).names
    if any(name in specs for name in names):
        return ""
    # Before the names of files, or those that a host has in memory.
    for embeddings in dict.fromkeys((of_family.embeddings, f"model.{of_family.embedding}.weight")):
        for prefix in (name.removesuffix(embeddings) for name in names if name.endswith(f".{embeddings}")):
            shapes = {name.removeprefix(prefix): source.info(name).shape for name in names}
            shown = {*shapes, *(part.name for parts in config.file_parts(shapes).values() for part in parts)}
            if all(name.startswith(prefix) for name in names) and specs.keys() <= shown:
                return prefix
    return ""


def _check_other_layers(others: list[str], config: ModelConfig, where: Path) -> None:
    """Raise unless every layer of another kind has tensors, and there are no layers beyond the last."""
    names = family_of(config.MODEL_TYPE).names
    found = {place[0] for name in others if (place := names.split(name))}
    if beyond := sorted(layer for layer in found if layer >= config.num_hidden_layers):
        raise CheckpointError(f"{where} holds tensors of layers {beyond}; config.json has {config.num_hidden_layers}")
    if empty := sorted(set(range(config.num_hidden_layers)) - set(config.recurrent_layers) - found):
        raise CheckpointError(f"{where} holds no tensor of layers {empty}")


def _check_host(source: TensorSource, specs: Collection[str], others: list[str], config: ModelConfig) -> None:
    """Raise if tensors of a host's own are missing, unknown or of another shape, as far as the host's are known."""
    wanted = host_tensors(config)
    where = source.facts.path
    if wanted is None:
        return
    held = {name: source.info(name) for name in (*specs, *others)}
    for name, parts in config.file_parts({name: info.shape for name, info in held.items()}).items():
        whole = held.pop(name)  # experts in one tensor
        held |= {part.name: replace(whole, name=part.name, shape=part.shape) for part in parts}
    if missing := [name for name in wanted if name not in held]:
        raise CheckpointError(f"{where} lacks {_listed(missing)} of the {config.MODEL_TYPE} model in its config.json")
    inside = [name for name in held if name not in wanted and family_of(config.MODEL_TYPE).names.split(name)]
    if unknown := [name for name in inside if name not in specs and not is_extra(held[name], config)]:
        raise CheckpointError(
            f"{where} holds {_listed(unknown)}, unknown to the {config.MODEL_TYPE} model in config.json"
        )
    for name in wanted:
        if name not in specs:
            _check_like(held[name], wanted[name], where)


def _check_like(info: TensorInfo, shape: tuple[int, ...], where: Path) -> None:
    """Check a tensor of a host; axes of one element are not told apart, as in reading."""
    alike = [size for size in info.shape if size != 1] == [size for size in shape if size != 1]
    check_tensor(info, info.shape if alike else shape, where)


def unchecked_tensors(names: Collection[str], config: ModelConfig) -> tuple[int, int]:
    """Return how many tensors are not of the model that is run, and how many of its own are not checked.

    Args:
        names: The tensors of a checkpoint that :func:`check_names` has checked.
        config: The model's config.
    """
    wanted = host_tensors(config) if config.is_mixed else None
    own = family_of(config.MODEL_TYPE).tensors(config)
    rest = [name for name in names if name not in own and not name.endswith(config.DERIVED)]
    if wanted is None:
        return 0, len(rest) if config.is_mixed else 0
    return sum(name not in wanted for name in rest), 0


def _listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"tensor{'s' * (len(names) > 1)} {', '.join(repr(name) for name in names[:most])}{more}"


def check_apart(source: Path, target: Path) -> None:
    """Raise if writing ``target`` would replace or sit inside the source."""
    source, target = source.resolve(), target.resolve()
    if source == target or target in source.parents or source in target.parents:
        raise CheckpointError(f"target {target} overlaps the source {source}; give a directory outside it")
