"""One checkpoint into another layout: any of those that we read into any of those that we write."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from checkpoints_tools.export.card_evaluation import read_evaluations
from checkpoints_tools.export.hf_export import export_documents, export_notes
from checkpoints_tools.export.hf_tokenizer import GivenTokenizer, given_tokenizer, tokenizer_kind
from checkpoints_tools.export.model_card import CARD_NAME, CardFacts, model_card
from checkpoints_tools.formats.megatron import megatron_plan
from checkpoints_tools.formats.safetensors import hf_plan
from checkpoints_tools.formats.tensor_parallel import check_tp, tp_plan
from checkpoints_tools.formats.zero3.optimizer_states import batch_proposal, fresh_training_states, read_training_states
from checkpoints_tools.formats.zero3.writer import check_world_size, zero3_plan
from checkpoints_tools.io.config_dtype import float_dtypes, main_dtype, with_dtype
from checkpoints_tools.io.target import TargetPlan, write_target
from checkpoints_tools.io.target_writer import WriteOptions
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.dtypes import FLOATS, TORCH_NAMES, parse_dtype, stored_dtype
from statex_dist.checkpoint.formats.tensor_io import Progress, TensorSource, natural_dtype, total_bytes
from statex_dist.checkpoint.formats.zero3.gathered_weights import tag_named_in
from statex_dist.checkpoint.formats.zero3.layout import is_stage_1_or_2
from statex_dist.checkpoint.formats.zero3.reader import Zero3Source
from statex_dist.checkpoint.history import read_history
from statex_dist.checkpoint.trainer_dirs import trainer_states
from statex_dist.errors import CheckpointError, ConfigError, shown
from statex_dist.models.config import CONFIG_NAME, ModelConfig
from statex_dist.models.kinds import family_of
from statex_dist.models.megatron_names import megatron_notes
from statex_dist.models.model_check import check_apart, tied_names
from statex_dist.models.source import open_model

logger = logging.getLogger(__name__)

TARGETS = ("hf", "zero3", "tp", "megatron")

_ADAMW = {
    **{"lr": 3e-4, "initial_lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "amsgrad": False, "maximize": False},
    **{"foreach": None, "capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True},
}
"""Settings of a group that has not been trained; a run's own configuration replaces them."""


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
        verified: Whether the source was held to a manifest.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Input:
    """A source with what is known of its model: contents of ``config.json``, typed config, and names to be written."""

    source: TensorSource
    values: dict[str, Any] | None
    config: ModelConfig | None
    names: list[str]

    @property
    def tied(self) -> frozenset[str]:
        """Names that are stored but are no parameters of their own: the head of a tied model."""
        return tied_names(self.config)

    def documents(self, dtype: str | None) -> dict[str, Any]:
        """Return the documents of the model, with the dtype of its weights."""
        if self.values is None:
            return {}
        # Earlier releases left an expanded model the names of its base.
        values = self.values if self.config is None else self.config.with_plan(self.values)
        return {CONFIG_NAME: values if dtype is None else with_dtype(values, dtype)}

    def jobs(self, wanted: str | None) -> list[TensorJob]:
        """Return a copy of each tensor, in the wanted dtype."""
        infos = [(self.source.info(name), natural_dtype(self.source, name)) for name in self.names]
        return [TensorJob.copy(info, dtype=stored_dtype(natural, wanted)) for info, natural in infos]

    def family_config(self, to: str) -> ModelConfig:
        """Return the config where a layout needs one.

        Raises:
            CheckpointError: The model is not of one of our families.
        """
        if self.config is None:
            given = "no config.json" if self.values is None else f"model_type {shown(self.values.get('model_type'))}"
            raise CheckpointError(
                f"{self.source.facts.path}: --to {to} from {self.source.facts.kind} needs a model of a known family; "
                f"it has {given}"
            )
        return self.config


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
    if to not in TARGETS:
        raise ConfigError(f"--to {to!r} is not available; allowed: {', '.join(TARGETS)}")
    check_world_size(world_size, to)
    if tp is not None and to != "tp":
        raise ConfigError(f"--tp {tp} is for --to tp, not {to}")
    if evaluations and to != "hf":
        raise ConfigError(f"--evaluation is for the model card of --to hf, not {to}")
    if tokenizer is not None and to != "hf":
        raise ConfigError(f"--tokenizer is for --to hf, not {to}")
    wanted = parse_dtype(dtype)
    check_apart(Path(source), Path(target))
    given = _read(source, training=to == "zero3")
    facts = given.source.facts
    # A training run that has diverged must still be exportable, to be looked at.
    options = replace(options or WriteOptions(), allow_nonfinite=True)
    info = {"source": str(facts.path), "source_kind": facts.kind, "step": facts.info.get("step"), "dtype": dtype}
    notes: list[str] = []
    batch = None
    if to == "zero3":
        plan, notes, batch = _training_plan(given, wanted, world_size, info)
    elif to == "hf":
        plan, notes = _export_plan(given, wanted, evaluations, tokenizer, options, info)
    else:
        plan = _weights_plan(given, wanted, to, tp, options, info)
        notes = megatron_notes(given.config) if to == "megatron" else []
    write_target(Path(target), given.source, plan, options, progress=progress)
    infos = [job.info for job in plan.jobs if job.state is None]
    return ReshardSummary(
        source=str(facts.path),
        kind=facts.kind,
        target=str(target),
        to=to,
        tensors=len(infos),
        parameters=sum(info.numel for info in infos if info.dtype in FLOATS and info.name not in given.tied),
        weight_bytes=total_bytes(job.info for job in plan.jobs),
        verified=facts.verified,
        states=sorted({job.state for job in plan.jobs if job.state is not None}),
        batch=batch,
        notes=notes,
        source_notes=list(facts.notes),
    )


def _read(path: str | Path, *, training: bool) -> _Input:
    """Open a source and choose what is written of it."""
    opened = open_model(path, training=training)
    source, values, config, names = opened.source, opened.values, opened.config, opened.names
    if values is None:
        logger.warning("%s has no %s: the tensors alone are written", source.facts.path, CONFIG_NAME)
    elif config is None:
        logger.warning("model_type %s is not one of ours: tensors are not checked", shown(values.get("model_type")))
    if not names:
        raise CheckpointError(f"{source.facts.path} holds no tensors: there is nothing to write")
    return _Input(source=source, values=values, config=config, names=names)


def _export_plan(
    given: _Input,
    wanted: str | None,
    evaluations: Sequence[str],
    tokenizer: str | None,
    options: WriteOptions,
    info: dict[str, Any],
) -> tuple[TargetPlan, list[str]]:
    """Lay out a directory that transformers opens, where that is possible; return with it what has to be said."""
    jobs = given.jobs(wanted)
    dtype = main_dtype([job.info for job in jobs])
    documents, notes = given.documents(dtype), []
    if given.config is not None:
        model_dir = given.source.facts.model_dir
        new = None if tokenizer is None else _new_tokenizer(tokenizer, given.config, model_dir)
        documents |= export_documents(documents[CONFIG_NAME], given.config, model_dir, new)
        notes = export_notes(given.config)
        assert given.values is not None
        card = CardFacts(
            values=given.values,
            config=given.config,
            source=given.source.facts,
            parameters=sum(job.info.numel for job in jobs if job.info.dtype in FLOATS),
            dtypes=[TORCH_NAMES[dtype] for dtype in float_dtypes(job.info for job in jobs)],
            tokenizer=tokenizer_kind(model_dir, new),
            evaluations=read_evaluations(evaluations, state_numbers=given.config.state_numbers),
        )
        documents[CARD_NAME] = model_card(card)
    elif evaluations or tokenizer is not None:
        given.family_config("hf with --evaluation" if evaluations else "hf with --tokenizer")
    size = options.max_shard_size
    return hf_plan(given.source, jobs, max_shard_size=size, documents=lambda _: documents, info=info), notes


def _new_tokenizer(spec: str, config: ModelConfig, model_dir: Path | None) -> GivenTokenizer:
    """Return the tokenizer for a model that has none, or raise where it has one."""
    if tokenizer_kind(model_dir) is not None:
        raise ConfigError(f"--tokenizer {spec}: {model_dir} has a tokenizer already, which goes along")
    return given_tokenizer(spec, vocab_size=config.vocab_size)


def _weights_plan(
    given: _Input, wanted: str | None, to: str, tp: int | None, options: WriteOptions, info: dict[str, Any]
) -> TargetPlan:
    """Lay out a target of tensor-parallel shards or for Megatron."""
    jobs = given.jobs(wanted)
    documents = given.documents(main_dtype([job.info for job in jobs]))
    if to == "tp":
        return tp_plan(jobs, given.family_config("tp"), check_tp(tp), documents=lambda _: documents, info=info)
    return megatron_plan(
        given.source,
        jobs,
        config=given.config,
        max_shard_size=options.max_shard_size,
        documents=lambda _: documents,
        info=info,
    )


def _training_plan(
    given: _Input, wanted: str | None, world_size: int | None, info: dict[str, Any]
) -> tuple[TargetPlan, list[str], dict[str, Any] | None]:
    """Lay out a ZeRO-3 checkpoint; return with it what has to be said, and how the batch is kept."""
    source = given.source
    if isinstance(source, Zero3Source):
        if source.prefix:
            raise ConfigError(
                f"--to zero3 keeps a run's names; in {source.facts.path} they begin with '{source.prefix}'; use --to hf"
            )
        if wanted is not None:
            raise ConfigError("--dtype does not go with a training checkpoint: its master weights are fp32 and stay so")
        ranks = world_size or source.world_size
        training, notes = read_training_states(source, ranks)
        if behind := trainer_states(source.facts.path.parent):
            notes.append(
                f"the trainer's own {', '.join(behind[:4])} are not copied: copy them beside latest to resume with it"
            )
        jobs = [TensorJob.copy(source.info(name)) for name in source.owned()]
        settings = source.model.get("ds_config") or {}
        batch = batch_proposal(settings, source.world_size, ranks) if isinstance(settings, dict) else None
        documents = given.documents(None)
        info = {**info, "batch": batch, "source_world_size": source.world_size}
        history = read_history(source.facts.path)
        plan = zero3_plan(training, jobs, ranks, documents=lambda _: documents, info=info, history=history)
        return plan, notes, batch
    tag = tag_named_in(source.facts.path)
    if tag is not None and is_stage_1_or_2(tag):
        raise CheckpointError(
            f"{tag} is of ZeRO stage 1 or 2, which is not read: --to zero3 would leave out its optimizer states. To "
            "start without them, give a directory with the weights alone"
        )
    if world_size is None:
        raise ConfigError(f"--to zero3 from {source.facts.kind} needs --world-size, the number of ranks")
    notes = ["no optimizer states: training starts anew from here"]
    if behind := trainer_states(source.facts.path):
        notes.append(f"{', '.join(behind[:4])} beside the weights are left out")
    return _fresh_plan(given, wanted, world_size, info), notes, None


def _fresh_plan(given: _Input, wanted: str | None, world_size: int, info: dict[str, Any]) -> TargetPlan:
    """Lay out a training checkpoint of a model that comes without optimizer states."""
    # Flat groups know no names: without the order of the model's parameters they could not be filled.
    source, config = given.source, given.family_config("zero3")
    family = family_of(config.MODEL_TYPE)
    if config.is_mixed:
        raise CheckpointError(f"{source.facts.path}: --to zero3 is not possible for mixed models: we do not train them")
    specs = family.tensors(config)
    precision = wanted or main_dtype([source.info(name) for name in specs])
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
    documents = given.documents(None)
    return zero3_plan(training, jobs, world_size, documents=lambda _: documents, info=info)
