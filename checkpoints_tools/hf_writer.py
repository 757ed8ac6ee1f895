"""Writing a Hugging Face model directory, crash-safe: a temporary sibling, synced, manifest last, then renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.safetensors_io import SafetensorsSink
from checkpoints_tools.tensor_io import Progress, TensorInfo, dtype_name, total_bytes
from statex_dist.checkpoint.manifest import Manifest, finish_target, prepare_target, record_file
from statex_dist.errors import CheckpointError
from statex_dist.models.config import CONFIG_NAME

CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "vocab*",
    "merges*",
    "*.model",
)
"""Files of a model directory that go along with its weights."""


def with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a ``config.json`` that names the dtype in which the weights are stored."""
    key = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
    return {**config, key: dtype_name(dtype)}


def write_hf_directory(
    target: Path,
    *,
    infos: Sequence[TensorInfo],
    read: Callable[[str], torch.Tensor],
    max_shard_size: int,
    overwrite: bool,
    documents: Callable[[], Mapping[str, Any]],
    carry_from: Path | None,
    info: dict[str, Any],
    progress: Progress | None = None,
) -> None:
    """Write tensors, JSON documents and carried files to ``target``; nothing half-written is ever there.

    Args:
        target: The directory to make.
        infos: Every tensor, as it is to be stored.
        read: Returns a tensor by name, in the stored dtype and shape.
        max_shard_size: Bytes of values per safetensors file.
        overwrite: Whether a target that is not empty is replaced.
        documents: Returns JSON files by name (``config.json`` among them); called after the last tensor.
        carry_from: Directory whose tokenizer and generation files are copied, if any.
        info: Facts for the manifest.
        progress: Told of every tensor written.

    Raises:
        CheckpointError: The target is not empty, the disk is full, or ``read`` fails.
    """
    target = target.resolve()
    try:
        temporary = prepare_target(target, overwrite=overwrite)
    except OSError as error:
        raise CheckpointError(f"target {target} cannot be made: {error.strerror}") from None
    try:
        files = _write_weights(temporary, infos, read, max_shard_size, progress)
        for name, content in documents().items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            files.append(temporary / name)
        for path in _carried(carry_from):
            shutil.copyfile(path, temporary / path.name)
            files.append(temporary / path.name)
        records = {path.name: record_file(path) for path in files}
        Manifest(kind="hf", files=records, info=info).write(temporary)
        finish_target(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"target {target} cannot be written: {error}") from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_weights(
    directory: Path,
    infos: Sequence[TensorInfo],
    read: Callable[[str], torch.Tensor],
    max_shard_size: int,
    progress: Progress | None,
) -> list[Path]:
    done, total = 0, total_bytes(infos)
    sink = SafetensorsSink(directory, infos, max_shard_size=max_shard_size)
    try:
        for info in infos:
            sink.write(info.name, read(info.name))
            done += info.nbytes
            if progress:
                progress(done, total)
        return sink.finish()
    finally:
        sink.close()


def _carried(directory: Path | None) -> list[Path]:
    """Return the files of a model directory that are carried along, each once."""
    found = {path for pattern in CARRIED for path in directory.glob(pattern)} if directory else set()
    return sorted(path for path in found if path.is_file() and path.name != CONFIG_NAME)
