"""Expansion of a run in the middle of its training: the optimizer's states grow with the weights.

Where a row of a parameter is kept, so is what the optimizer remembers of it; of a new row it remembers nothing. Adam
counts its steps per group, not per row, and goes on counting: a new row gets its first updates without the correction
for young averages. The very first is ``(1 - beta1) / sqrt(1 - beta2)`` of the learning rate: 0.45 with betas of 0.9 and
0.95, but 3.2 with 0.9 and 0.999.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from checkpoints_tools.expand.expansion import Expansion
from checkpoints_tools.formats.zero3.optimizer_states import Placeholder, TrainingStates, read_training_states
from checkpoints_tools.formats.zero3.writer import zero3_plan
from checkpoints_tools.io.target import Documents, TargetPlan
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.formats.zero3.reader import Zero3Source
from statex_dist.checkpoint.history import read_history
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.registry import family_of


def expanded_training_plan(
    expansion: Expansion, world_size: int | None, *, documents: Documents, info: dict[str, Any]
) -> TargetPlan:
    """Lay out the expanded run as a ZeRO-3 checkpoint.

    Args:
        expansion: What becomes of the weights; its source must be a ZeRO-3 checkpoint.
        world_size: Ranks of the target; None keeps the source's.
        documents: Makes the small files of the model.
        info: Facts for the manifest.

    Raises:
        ConfigError: The source is no training checkpoint, or weights are to be converted.
        CheckpointError: It is not known where new parameters belong in its optimizer.
    """
    source = expansion.source
    if not isinstance(source, Zero3Source):
        raise ConfigError(f"--to zero3 grows a run in training; {source.facts.path} is of layout {source.facts.kind}")
    if source.prefix:
        raise ConfigError(
            f"--to zero3 keeps a run's names; in {source.facts.path} they begin with '{source.prefix}'; use --to hf"
        )
    if expansion.dtype is not None:
        raise ConfigError("--dtype does not go with a training checkpoint: its master weights are fp32 and stay so")
    training, _ = read_training_states(source, world_size or source.world_size)
    grown = _grown(training, expansion)
    trained = {name for group in grown.groups for name in group}
    known = trained | grown.frozen.keys() | grown.buffers.keys()
    if strange := [job.info.name for job in expansion.jobs if job.info.name not in known]:
        raise CheckpointError(
            f"{source.facts.path}: tensor '{strange[0]}' is neither a parameter nor a buffer of the run"
        )
    jobs = list(expansion.jobs)
    held = {job.info.name for job in jobs}
    jobs += [TensorJob.copy(source.info(name)) for name in grown.buffers if name not in held]
    history = read_history(source.facts.path)
    return zero3_plan(grown, jobs, world_size or source.world_size, documents=documents, info=info, history=history)


def _grown(training: TrainingStates, expansion: Expansion) -> TrainingStates:
    """Return the states of the expanded run."""
    infos = {job.info.name: job.info for job in expansion.jobs}
    new = [job for job in expansion.jobs if job.source is None]
    groups = [{name: infos[name].shape for name in group} for group in training.groups]
    for job in new:
        groups[_group_of(job, groups, expansion)][job.info.name] = job.info.shape
    order = {name: place for place, name in enumerate(family_of(expansion.after.MODEL_TYPE).tensors(expansion.after))}
    for old, group in zip(training.groups, groups, strict=True):
        places = [order.get(name, -1) for name in old]
        if len(group) > len(old) and places != sorted(places):
            raise CheckpointError(
                f"{expansion.source.facts.path}: the optimizer has its parameters in another order than the "
                f"{expansion.after.MODEL_TYPE} model; where new ones belong is not known"
            )
    entries = [training.module.get(name) for group in training.groups for name in group]
    main = Counter(entry for entry in entries if isinstance(entry, Placeholder)).most_common(1)[0][0]
    return replace(
        training,
        groups=[dict(sorted(g.items(), key=lambda item: order.get(item[0], -1))) if new else g for g in groups],
        frozen={name: infos[name] for name in training.frozen},
        module={**training.module, **{job.info.name: main for job in new}},
    )


def _group_of(job: TensorJob, groups: Sequence[dict[str, tuple[int, ...]]], expansion: Expansion) -> int:
    """Return the optimizer group of a new parameter: that of the others with (or without) weight decay.

    Raises:
        CheckpointError: The groups are not by weight decay.
    """
    if len(groups) == 1:
        return 0
    specs = family_of(expansion.after.MODEL_TYPE).tensors(expansion.after)
    decay = specs[job.info.name].decay
    found = [
        index
        for index, group in enumerate(groups)
        if all(name in specs and specs[name].decay is decay for name in group)
    ]
    if len(found) != 1:
        raise CheckpointError(
            f"{expansion.source.facts.path}: its optimizer's groups are not those with and without weight decay; to "
            f"which of them the new parameter '{job.info.name}' belongs is not known"
        )
    return found[0]
