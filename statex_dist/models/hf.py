"""Loading a model from a checkpoint of any layout, and saving it in Hugging Face's form.

For checkpoints that do not fit in memory there are the streaming tools in ``checkpoints_tools``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict

from statex_dist.checkpoint.dtypes import TORCH_NAMES
from statex_dist.checkpoint.formats.piece_io import WholeReader
from statex_dist.checkpoint.formats.tensor_io import TensorSource
from statex_dist.checkpoint.manifest import finish_target, prepare_target
from statex_dist.durable.files import sync
from statex_dist.errors import CheckpointError
from statex_dist.models.build import build_lm
from statex_dist.models.config import CONFIG_NAME, ModelConfig
from statex_dist.models.layout import Part
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import read_config
from statex_dist.models.source import find_model, open_model

logger = logging.getLogger(__name__)


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


def from_pretrained(
    directory: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", digests: bool = True
) -> RecurrentLM:
    """Load a model from a checkpoint of any layout, a tensor at a time.

    Args:
        directory: Whatever :func:`statex_dist.models.source.open_model` opens, with a ``config.json``.
        dtype: Of the parameters; None takes that of the stored embedding table.
        device: Where the model goes.
        digests: Whether what is read is compared with the digests of the manifest and the checksums of archives.

    Raises:
        CheckpointError: The directory is incomplete, damaged or of another architecture.
        ConfigError: The model has layers that only other software runs.
    """
    opened = open_runnable(directory, digests=digests)
    config, source = opened.config, opened.source
    with torch.device("meta"):
        model = build_lm(config)
    stored = torch_dtype(source.info(model.family.names.embeddings).dtype)
    model = model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embedding_table.weight
    model.finish_build(dtype or stored)
    tensors = model.stored_tensors()
    with torch.no_grad(), WholeReader(source, crcs=digests) as reader:
        for name, parts in model.file_parts().items():
            read_parts(reader, source, name, parts, tensors.pop(name))
    assert not tensors, f"{list(tensors)} were not filled"
    return model


def read_parts(
    reader: WholeReader, source: TensorSource, name: str, parts: Sequence[Part], target: torch.Tensor
) -> None:
    """Read a tensor of memory from its parts in the files, or from one of its own name.

    Raises:
        CheckpointError: A part is missing or of another shape, or the files are damaged.
    """
    found = parts_in(source, name, parts, tuple(target.shape))
    if len(found) == 1:
        read_into(reader, source, found[0].name, target)
        return
    flat, position = target.detach().view(-1), 0
    for part in found:
        size = math.prod(part.shape)
        read_into(reader, source, part.name, flat[position : position + size])
        position += size


def parts_in(source: TensorSource, name: str, parts: Sequence[Part], shape: tuple[int, ...]) -> list[Part]:
    """Return the stored tensors that a tensor of memory is made of, in order, each with its shape.

    Args:
        source: The checkpoint.
        name: Name in memory.
        parts: What the model's files have in its place.
        shape: Of the tensor in memory.

    Raises:
        CheckpointError: A part is missing or of another shape.
    """
    if name in source or len(parts) == 1:
        parts = [Part(parts[0].name if len(parts) == 1 and parts[0].name in source else name, shape)]
    for part in parts:
        _check_part(source, part)
    return list(parts)


def _check_part(source: TensorSource, part: Part) -> None:
    if part.name not in source:
        raise CheckpointError(f"{source.facts.path} lacks tensor '{part.name}' of the model in its config.json")
    shape = source.info(part.name).shape
    if [size for size in shape if size != 1] != [size for size in part.shape if size != 1]:
        raise CheckpointError(
            f"{source.facts.path}: tensor '{part.name}' has shape {shape}; config.json asks for {part.shape}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnableModel:
    """A checkpoint of a model that can be run here: its tensors and its config."""

    source: TensorSource
    config: ModelConfig


def open_runnable(directory: Path, *, digests: bool) -> RunnableModel:
    """Open a checkpoint whose model is to be run; arguments and errors of :func:`from_pretrained`."""
    config = read_config(find_model(directory))
    config.require_runnable()
    opened = open_model(directory, digests=digests)
    if opened.config is None:
        raise CheckpointError(f"{opened.source.facts.path} has no {CONFIG_NAME}: what model it is is not known")
    if not digests:
        logger.warning("%s: contents are not compared with digests and checksums (switched off)", directory)
    return RunnableModel(source=opened.source, config=opened.config)


def torch_dtype(dtype: str) -> torch.dtype:
    """Return torch's dtype of a name in safetensors."""
    found: torch.dtype = getattr(torch, TORCH_NAMES[dtype])
    return found


def read_into(reader: WholeReader, source: TensorSource, name: str, target: torch.Tensor) -> None:
    """Read a tensor into another one of its shape, and of any dtype and device.

    Raises:
        CheckpointError: The files cannot be read, or are damaged.
    """
    stored = torch_dtype(source.info(name).dtype)
    flat = target.detach().view(-1) if target.is_contiguous() else torch.empty(target.shape, dtype=stored).view(-1)
    if flat.device.type == "cpu" and flat.dtype == stored:
        for _ in reader.blocks(name, flat.view(torch.uint8).numpy()):
            pass  # the block is in its place
    else:
        for first, block in reader.blocks(name):
            values = torch.from_numpy(block).view(stored)
            flat[first : first + len(values)].copy_(values)
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))


def read_tensor(reader: WholeReader, source: TensorSource, name: str) -> torch.Tensor:
    """Return a whole tensor in its stored dtype; errors of :func:`read_into`."""
    info = source.info(name)
    tensor = torch.from_numpy(np.empty(info.nbytes, dtype=np.uint8)).view(torch_dtype(info.dtype)).view(info.shape)
    read_into(reader, source, name, tensor)
    return tensor
