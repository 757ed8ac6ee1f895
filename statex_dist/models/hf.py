"""Model directories in Hugging Face's form: ``config.json`` and safetensors, in memory.

For checkpoints that do not fit in memory there are the streaming tools in ``checkpoints_tools``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from statex_dist.checkpoint.json_file import read_json
from statex_dist.checkpoint.manifest import finish_target, prepare_target, sync
from statex_dist.errors import CheckpointError, reason
from statex_dist.models.config import CONFIG_NAME, ModelConfig
from statex_dist.models.kinds import family_of, read_config
from statex_dist.models.lm import RecurrentLM

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def save_pretrained(model: RecurrentLM, directory: Path, *, overwrite: bool = False) -> None:
    """Write a model's config and weights into a new directory, complete or not at all.

    Weights are sharded at 5 GB as transformers does; a tied head is left out.

    Args:
        model: The model.
        directory: Where it goes.
        overwrite: Whether a directory that is not empty is replaced, with all that is in it.

    Raises:
        CheckpointError: The directory is not empty and not to be replaced.
    """
    temporary = prepare_target(directory, overwrite=overwrite)
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop(model.family.names.head)
    save_torch_state_dict(state, temporary)
    write_config(model.config, temporary)
    for path in temporary.iterdir():
        sync(path)
    finish_target(temporary, directory, overwrite=overwrite)


def write_config(config: ModelConfig, directory: Path) -> None:
    """Write ``config.json`` with the plan inside."""
    (directory / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")


def load_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a model directory.

    Raises:
        CheckpointError: Weights are missing, truncated or not safetensors.
    """
    index = directory / INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            bad = [name for name in names if Path(name).name != name]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {reason(error)}") from None
        if bad:
            raise CheckpointError(f"{index} names files outside its directory: {bad}")
    elif (directory / WEIGHTS_NAME).is_file():
        names = [WEIGHTS_NAME]
    else:
        raise CheckpointError(f"{directory} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}")
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            tensors.update(load_file(directory / name))
        except FileNotFoundError:
            raise CheckpointError(f"{index} lists {name}, which is missing") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{directory / name} is not a whole safetensors file: {error}") from None
    return tensors


def check_tensors(tensors: Mapping[str, torch.Tensor], config: ModelConfig, *, source: str) -> None:
    """Raise unless ``tensors`` are exactly those of a model with ``config``.

    Raises:
        CheckpointError: A tensor is missing, unknown or of another shape (the first ones are named).
    """
    family = family_of(config.MODEL_TYPE)
    specs = family.tensors(config)
    names = set(tensors)
    if config.tie_word_embeddings:
        names.discard(family.names.head)
    for problem, found in (("lacks", specs.keys() - names), ("has unknown", names - specs.keys())):
        if found:
            shown = ", ".join(sorted(found)[:3])
            raise CheckpointError(f"{source} {problem} tensors: {shown} ({len(found)} in all)")
    for name, spec in specs.items():
        if tuple(tensors[name].shape) != spec.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)}; config and plan say {spec.shape}"
            )


def from_pretrained(
    directory: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> RecurrentLM:
    """Load a model directory.

    Args:
        directory: Holds ``config.json`` and safetensors.
        dtype: Of the parameters; None takes that of the stored embedding table.
        device: Where the model goes.

    Raises:
        CheckpointError: The directory is incomplete, damaged or of another architecture.
    """
    config = read_config(directory)
    config.require_runnable()
    tensors = {n: t for n, t in load_tensors(directory).items() if not n.endswith(config.DERIVED)}
    check_tensors(tensors, config, source=str(directory))
    with torch.device("meta"):
        model = RecurrentLM(config)
    stored = tensors[family_of(config.MODEL_TYPE).names.embeddings].dtype
    model = model.to_empty(device=device).to(dtype or stored)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.trunk.embedding_table.weight
        tensors.setdefault(model.family.names.head, tensors[model.family.names.embeddings])
    model.load_state_dict(tensors)
    return model
