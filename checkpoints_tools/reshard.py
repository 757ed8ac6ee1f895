"""One checkpoint into another layout: for now training checkpoints (or safetensors) into safetensors."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_tools.hf_writer import with_dtype, write_hf_directory
from checkpoints_tools.model_check import check_apart, check_tensors, read_source_config
from checkpoints_tools.shard_writer import DEFAULT_WORKERS, WriteOptions
from checkpoints_tools.sources import open_source
from checkpoints_tools.tensor_io import (
    FLOATS,
    TORCH_NAMES,
    Progress,
    TensorInfo,
    parse_dtype,
    stored_dtype,
    total_bytes,
)
from checkpoints_tools.transfer import TensorJob
from statex_dist.config import parse_size
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.config import CONFIG_NAME

logger = logging.getLogger(__name__)

TARGETS = ("hf",)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReshardSummary:
    """What was written.

    Attributes:
        source: Directory of the files that were read (of a run: the tag).
        kind: Layout of the source.
        target: Directory that was made.
        tensors: Number of tensors.
        parameters: Elements of the floating-point tensors.
        weight_bytes: Bytes of the values.
        verified: Whether the source agreed with a manifest.
    """

    source: str
    kind: str
    target: str
    tensors: int
    parameters: int
    weight_bytes: int
    verified: bool


def reshard(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "hf",
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    workers: int = DEFAULT_WORKERS,
    progress: Progress | None = None,
) -> ReshardSummary:
    """Write a checkpoint as a Hugging Face directory: safetensors, ``config.json``, tokenizer files, manifest.

    With a configuration of one of our families every name and shape is checked and a tied head is left out. Other
    checkpoints keep their names, a tied tensor once under each; without a configuration only the tensors are written.

    Args:
        source: Whatever :func:`checkpoints_tools.sources.open_source` opens.
        target: Directory to make.
        to: Layout of the target; ``hf``.
        dtype: ``fp32``, ``bf16`` or ``fp16`` for all floating-point tensors; None keeps each tensor's own, which for a
            ZeRO-3 checkpoint is fp32 (the master weights) and, for frozen parameters, the training dtype.
        max_shard_size: Size of a safetensors file, at most.
        overwrite: Whether a target that is not empty is replaced.
        workers: Tensors read and written at a time.
        progress: Told of the bytes written.

    Raises:
        ConfigError: A wrong option.
        CheckpointError: The source is not usable or the target not writable; the target is then as it was.
    """
    if to not in TARGETS:
        raise ConfigError(f"--to {to!r} is not available; allowed now: {', '.join(TARGETS)}")
    wanted, shard_bytes = parse_dtype(dtype), parse_size(max_shard_size, option="--max-shard-size")
    check_apart(Path(source), Path(target))
    opened = open_source(source)
    values, config = read_source_config(opened)
    names = check_tensors(opened, config) if config is not None else opened.keys()
    if values is None:
        logger.warning("%s has no %s: the tensors alone are written", opened.facts.path, CONFIG_NAME)
    elif config is None:
        logger.warning("model_type %r is not one of ours: tensors are not checked", values.get("model_type"))
    if not names:
        raise CheckpointError(f"{opened.facts.path} holds no tensors: there is nothing to write")
    jobs = [TensorJob(info=_stored(opened.info(name), wanted), source=opened.info(name)) for name in names]
    infos = [job.info for job in jobs]
    documents: dict[str, Any] = {}
    if values is not None:
        main = _main_dtype(infos)
        documents[CONFIG_NAME] = values if main is None else with_dtype(values, main)
    facts = opened.facts
    write_hf_directory(
        Path(target),
        opened,
        jobs,
        # A training run that has diverged must still be exportable, to be looked at.
        WriteOptions(max_shard_size=shard_bytes, overwrite=overwrite, workers=workers, allow_nonfinite=True),
        documents=lambda finished: documents,
        info={"source": str(facts.path), "source_kind": facts.kind, "step": facts.info.get("step"), "dtype": dtype},
        progress=progress,
    )
    return ReshardSummary(
        source=str(facts.path),
        kind=facts.kind,
        target=str(target),
        tensors=len(infos),
        parameters=sum(info.numel for info in infos if info.dtype in FLOATS),
        weight_bytes=total_bytes(infos),
        verified=facts.verified,
    )


def _stored(info: TensorInfo, wanted: str | None) -> TensorInfo:
    return TensorInfo(name=info.name, shape=info.shape, dtype=stored_dtype(info.dtype, wanted))


def _main_dtype(infos: list[TensorInfo]) -> str | None:
    """Return the floating-point dtype of most bytes, or None of a checkpoint without any."""
    sizes: dict[str, int] = {}
    for info in infos:
        if info.dtype in FLOATS:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: (sizes[dtype], TORCH_NAMES[dtype]), default=None)
