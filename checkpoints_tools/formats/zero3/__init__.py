"""Write DeepSpeed ZeRO stage 3 checkpoints: for another number of ranks, of a grown model, or to start from weights.

If a run is expanded in the middle of its training, the optimizer's states grow with the weights. A parameter's row that
is kept also keeps its optimizer states; the optimizer states of a new row are zero. Adam counts its steps per group,
not per row, and the count continues. So a new row gets its first updates without the correction for young averages. The
first update is ``(1 - beta1) / sqrt(1 - beta2)`` of the learning rate: 0.45 with betas of 0.9 and 0.95, but 3.2 with
0.9 and 0.999.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from checkpoints_tools.formats.targets import PlannedTarget, TargetRequest
from checkpoints_tools.formats.zero3.optimizer_states import (
    Placeholder,
    TrainingStates,
    batch_proposal,
    fresh_training_states,
    read_training_states,
)
from checkpoints_tools.formats.zero3.writer import zero3_plan
from checkpoints_tools.io.documents import main_dtype
from checkpoints_tools.io.target import TargetPlan
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.dtypes import TORCH_NAMES
from statex_dist.checkpoint.formats.places import trainer_states
from statex_dist.checkpoint.formats.zero3.opening import Zero3
from statex_dist.checkpoint.formats.zero3.reader import Zero3Source
from statex_dist.checkpoint.formats.zero_whole.reader import WholeZeroSource
from statex_dist.checkpoint.history import read_history
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.hybrid.host_tensors import memory_tensors
from statex_dist.models.layout import TensorSpec
from statex_dist.models.registry import family_of

_ADAMW = {
    **{"lr": 3e-4, "initial_lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "amsgrad": False, "maximize": False},
    **{"foreach": None, "capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True},
}
"""Settings of a group that has not been trained; a run's own configuration replaces them."""


class Zero3Target(Zero3):
    """The layout of DeepSpeed ZeRO stage 3, written."""

    @staticmethod
    def plan_target(request: TargetRequest) -> PlannedTarget:
        """Lay a checkpoint out: optimizer states and settings go along from a training checkpoint."""
        source = request.source
        if isinstance(source, Zero3Source):
            return _continued(request, source)
        if request.grown is not None:
            raise ConfigError(
                f"--to zero3 grows a run in training; {source.facts.path} is of layout {source.facts.kind}"
            )
        return _begun(request)


def _continued(request: TargetRequest, source: Zero3Source) -> PlannedTarget:
    """Lay out a run that continues, on the same or another number of ranks, perhaps with a grown model."""
    if source.prefix:
        raise ConfigError(
            f"--to zero3 keeps a run's names; in {source.facts.path} they begin with '{source.prefix}'; use --to hf"
        )
    if request.dtype is not None:
        raise ConfigError("--dtype does not go with a training checkpoint: its master weights are fp32 and stay so")
    ranks = request.world_size or source.world_size
    training, notes = read_training_states(source, ranks)
    history = read_history(source.facts.path)
    if request.grown is not None:
        if source.is_divided:
            raise ConfigError(
                f"--to zero3 cannot grow a run of {request.family_config('zero3').MODEL_TYPE}: transformers "
                "has its tensors under other names, or joined. Reshard it --to hf, expand that and begin a run with it "
                "(without the optimizer's states)"
            )
        training, jobs = _grown(training, request, request.grown)
        made, _ = request.export(jobs)
        plan = zero3_plan(training, jobs, ranks, documents=made, info=request.info, history=history)
        return PlannedTarget(plan=plan)
    if behind := trainer_states(source.facts.path.parent):
        notes.append(
            f"the trainer's own {', '.join(behind[:4])} are not copied: copy them beside latest to resume with it"
        )
    jobs = [TensorJob.copy(source.info(name)) for name in source.owned()]
    settings = source.model.get("ds_config") or {}
    batch = batch_proposal(settings, source.world_size, ranks) if isinstance(settings, dict) else None
    documents = request.documents(None)
    info = {**request.info, "batch": batch, "source_world_size": source.world_size}
    plan = zero3_plan(training, jobs, ranks, documents=lambda _: documents, info=info, history=history)
    return PlannedTarget(plan=plan, notes=notes, batch=batch)


def _begun(request: TargetRequest) -> PlannedTarget:
    """Lay out a run that begins from weights."""
    source = request.source
    if isinstance(source, WholeZeroSource):
        raise CheckpointError(
            f"{source.facts.path} is of ZeRO stage {source.stage}, whose optimizer states --to zero3 would leave out. "
            "To start without them, reshard it --to hf and begin a run with that (model.path)"
        )
    if request.world_size is None:
        raise ConfigError(f"--to zero3 from {source.facts.kind} needs --world-size, the number of ranks")
    notes = ["no optimizer states: training begins at step 0"]
    if behind := trainer_states(source.facts.path):
        notes.append(f"{', '.join(behind[:4])} beside the weights are left out")
    return PlannedTarget(plan=_fresh_plan(request, request.world_size), notes=notes)


def _fresh_plan(request: TargetRequest, world_size: int) -> TargetPlan:
    """Lay out a training checkpoint of a model that comes without optimizer states."""
    # Flat groups know no names: without the order of the model's parameters they could not be filled.
    source, config = request.source, request.family_config("zero3")
    family = family_of(config.MODEL_TYPE)
    if config.is_mixed:
        raise CheckpointError(
            f"{source.facts.path}: --to zero3 of weights is not written for {config.MODEL_TYPE}, whose layers are not "
            "all ours; a run begins from the directory itself (model.path)"
        )
    specs = family.tensors(config)
    precision = request.dtype or main_dtype([source.info(name) for name in specs])
    if precision not in ("F32", "BF16"):
        raise ConfigError(
            f"--to zero3: a run in {TORCH_NAMES[precision or 'F16']} is not possible; give --dtype bf16 or fp32"
        )
    groups = [{n: s.shape for n, s in specs.items() if s.decay is decay} for decay in (True, False)]
    settings = [{**_ADAMW, "weight_decay": decay} for decay in (0.1, 0.0)]
    tied = {family.names.head: family.names.embeddings} if config.tie_word_embeddings else {}
    training = fresh_training_states(
        [group for group in groups if group],
        [setting for setting, group in zip(settings, groups, strict=True) if group],
        module=[*specs, *tied],
        shared=tied,
        bf16=precision == "BF16",
    )
    jobs = [TensorJob.copy(source.info(name), dtype="F32") for name in specs]
    documents = request.documents(None)
    return zero3_plan(training, jobs, world_size, documents=lambda _: documents, info=request.info)


def _grown(
    training: TrainingStates, request: TargetRequest, grown: Sequence[TensorJob]
) -> tuple[TrainingStates, list[TensorJob]]:
    """Return the states of the expanded run, and its tensors.

    Raises:
        CheckpointError: It is not known where new parameters belong in the optimizer.
    """
    where, config = request.source.facts.path, request.family_config("zero3")
    infos = {job.info.name: job.info for job in grown}
    new = [job for job in grown if job.source is None]
    groups = [{name: infos[name].shape for name in group} for group in training.groups]
    specs = family_of(config.MODEL_TYPE).tensors(config)
    for job in new:
        groups[_group_of(job.info.name, groups, specs, where)][job.info.name] = job.info.shape
    hosted = memory_tensors(config) if config.is_mixed else None
    order = {name: place for place, name in enumerate(hosted or specs)}
    for old, group in zip(training.groups, groups, strict=True):
        places = [order.get(name, -1) for name in old]
        if len(group) > len(old) and places != sorted(places):
            raise CheckpointError(
                f"{where}: the optimizer has its parameters in another order than the {config.MODEL_TYPE} model; where "
                "new ones belong is not known"
            )
    entries = [training.module.get(name) for group in training.groups for name in group]
    main = Counter(entry for entry in entries if isinstance(entry, Placeholder)).most_common(1)[0][0]
    training = replace(
        training,
        groups=[dict(sorted(g.items(), key=lambda item: order.get(item[0], -1))) if new else g for g in groups],
        frozen={name: infos[name] for name in training.frozen},
        module={**training.module, **{job.info.name: main for job in new}},
    )
    known = {name for group in training.groups for name in group} | training.frozen.keys() | training.buffers.keys()
    if strange := [name for name in infos if name not in known]:
        raise CheckpointError(f"{where}: tensor '{strange[0]}' is neither a parameter nor a buffer of the run")
    buffers = [TensorJob.copy(request.source.info(name)) for name in training.buffers if name not in infos]
    return training, [*grown, *buffers]


def _group_of(
    name: str, groups: Sequence[dict[str, tuple[int, ...]]], specs: Mapping[str, TensorSpec], where: Path
) -> int:
    """Return the optimizer group of a new parameter: that of the others with (or without) weight decay.

    Raises:
        CheckpointError: The groups are not by weight decay.
    """
    if len(groups) == 1:
        return 0
    decay = specs[name].decay

    def decays(other: str, shape: tuple[int, ...]) -> bool:
        return specs[other].decay if other in specs else len(shape) > 1  # of a host's own the matrices

    found = [index for index, group in enumerate(groups) if all(decays(*item) is decay for item in group.items())]
    if len(found) != 1:
        raise CheckpointError(
            f"{where}: its optimizer's groups are not those with and without weight decay; to which of them the new "
            f"parameter '{name}' belongs is not known"
        )
    return found[0]
