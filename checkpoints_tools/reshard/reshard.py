"""One checkpoint into another layout: any of those that we read into any of those that we write."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from checkpoints_tools.formats.registry import TargetRequest, check_options, find_target
from checkpoints_tools.io.target import write_target
from checkpoints_tools.io.target_writer import WriteOptions
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.dtypes import FLOATS, parse_dtype
from statex_dist.checkpoint.formats.tensor_io import Progress, total_bytes
from statex_dist.errors import CheckpointError, shown
from statex_dist.models.config import CONFIG_NAME
from statex_dist.models.model_check import check_apart
from statex_dist.models.source import OpenModel, open_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReshardSummary:
    """What was written.

    Attributes:
        source: Directory of the files that were read (of a run: the tag).
        kind: Layout of the source.
        target: Directory that was made.
        to: Layout of the target.
        tensors: Number of tensors, optimizer states not counted.
        parameters: Elements of the floating-point tensors.
        weight_bytes: Bytes of the values, optimizer states included.
        verified: Whether the source was compared with a manifest.
        states: Names of the optimizer's states that went along.
        batch: How the global batch is kept on the new number of ranks (of ``zero3``, where the settings say).
        notes: What has to be known about the result.
        source_notes: What has to be known about the source; said when it was opened.
    """

    source: str
    kind: str
    target: str
    to: str
    tensors: int
    parameters: int
    weight_bytes: int
    verified: bool
    states: list[str] = field(default_factory=list)
    batch: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    source_notes: list[str] = field(default_factory=list)


def reshard(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "hf",
    dtype: str | None = None,
    world_size: int | None = None,
    tp: int | None = None,
    evaluations: Sequence[str] = (),
    tokenizer: str | None = None,
    options: WriteOptions | None = None,
    progress: Progress | None = None,
) -> ReshardSummary:
    """Write a checkpoint in another layout.

    With a configuration of one of our families every name and shape is checked and a tied head is left out. Other
    checkpoints keep their names, a tied tensor once under each; without a configuration only the tensors are written.

    Args:
        source: Whatever :func:`statex_dist.models.source.open_model` opens.
        target: Directory to make.
        to: ``hf`` (safetensors), ``zero3`` (DeepSpeed, for ``world_size`` ranks), ``tp`` (``tp`` tensor-parallel ranks)
            or ``megatron`` (torch_dist).
        dtype: ``fp32``, ``bf16`` or ``fp16`` for all floating-point tensors; None keeps each tensor's own, which for a
            ZeRO-3 checkpoint is fp32 (the master weights) and, for frozen parameters, the training dtype. With
            ``zero3`` from another layout it is the precision of the run to come.
        world_size: Ranks of a ``zero3`` target; None keeps the source's.
        tp: Ranks of a ``tp`` target.
        evaluations: Directories of ``statex eval`` whose results the model card of an ``hf`` target tells.
        tokenizer: ``bytes`` or a directory, of which an ``hf`` target is given the tokenizer; the source has none then.
        options: How to write.
        progress: Told of the bytes written.

    Raises:
        ConfigError: A wrong option.
        CheckpointError: The source is not usable or the target not writable; the target is then as it was.
    """
    layout = find_target(to)
    check_options(layout, world_size=world_size, tp=tp, evaluation=bool(evaluations), tokenizer=tokenizer is not None)
    wanted = parse_dtype(dtype)
    check_apart(Path(source), Path(target))
    opened = _open(source, training=layout.is_training)
    facts = opened.source.facts
    # A training run that has diverged must still be exportable, to be looked at.
    options = replace(options or WriteOptions(), allow_nonfinite=True)

    def export(jobs: Sequence[TensorJob]) -> tuple[dict[str, Any], list[str]]:
        from checkpoints_tools.reshard.export_documents import make_documents  # only where they are written

        return make_documents(request, jobs, evaluations, tokenizer)

    request = TargetRequest(
        source=opened.source,
        values=opened.values,
        config=opened.config,
        names=opened.names,
        dtype=wanted,
        info={"source": str(facts.path), "source_kind": facts.kind, "step": facts.info.get("step"), "dtype": dtype},
        write=options,
        world_size=world_size,
        tp=tp,
        export=export,
    )
    planned = layout.plan_target(request)
    plan = planned.plan
    write_target(Path(target), opened.source, plan, options, progress=progress)
    infos = [job.info for job in plan.jobs if job.state is None]
    return ReshardSummary(
        source=str(facts.path),
        kind=facts.kind,
        target=str(target),
        to=to,
        tensors=len(infos),
        parameters=sum(info.numel for info in infos if info.dtype in FLOATS and info.name not in request.tied),
        weight_bytes=total_bytes(job.info for job in plan.jobs),
        verified=facts.verified,
        states=sorted({job.state for job in plan.jobs if job.state is not None}),
        batch=planned.batch,
        notes=planned.notes,
        source_notes=list(facts.notes),
    )


def _open(path: str | Path, *, training: bool) -> OpenModel:
    """Open a source; warn about what is not checked."""
    opened = open_model(path, training=training)
    facts, values = opened.source.facts, opened.values
    if values is None:
        logger.warning("%s has no %s: the tensors alone are written", facts.path, CONFIG_NAME)
    elif opened.config is None:
        logger.warning("model_type %s is not one of ours: tensors are not checked", shown(values.get("model_type")))
    if not opened.names:
        raise CheckpointError(f"{facts.path} holds no tensors: there is nothing to write")
    return opened
