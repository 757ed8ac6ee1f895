"""One checkpoint into another layout: any of those that we read into any of those that we write."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from checkpoints_tools.formats.targets import TargetRequest, check_options, find_target, plan_target
from checkpoints_tools.io.documents import float_dtypes, main_dtype
from checkpoints_tools.io.target import Documents, write_target
from checkpoints_tools.io.target_writer import WriteOptions
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.dtypes import FLOATS, TORCH_NAMES, parse_dtype
from statex_dist.checkpoint.formats.tensor_io import Progress, total_bytes
from statex_dist.errors import CheckpointError, ConfigError, shown
from statex_dist.models.config import CONFIG_NAME
from statex_dist.models.model_check import check_apart, tied_names
from statex_dist.models.source import OpenModel, open_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReshardSummary:
    """Summary of the written target.

    Attributes:
        source: Directory of the files that were read (of a run: the tag).
        kind: Layout of the source.
        target: Directory that was made.
        to: Layout of the target.
        tensors: Number of tensors, optimizer states not counted.
        parameters: Elements of the floating-point tensors.
        weight_bytes: Bytes of the values, optimizer states included.
        verified: Whether the source was compared with a manifest.
        states: Names of the optimizer's states that were written too.
        batch: How the global batch is kept on the new number of ranks (of ``zero3``, where the settings say).
        notes: Messages about the result.
        source_notes: Messages about the source; they were shown when it was opened.
        part: The share that was written (``I/N``); None for all.
        missing_parts: The parts without which the target is not complete.
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
    part: str | None = None
    missing_parts: list[int] = field(default_factory=list)


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
    row = find_target(to)
    given = {"--evaluation": bool(evaluations), "--tokenizer": tokenizer is not None}
    check_options(row, {"--world-size": world_size, "--tp": tp, **given})
    wanted = parse_dtype(dtype)
    check_apart(Path(source), Path(target))
    opened = _open(source, training=row.is_tag)
    facts = opened.source.facts
    # A training run that has diverged must still be exportable, to be looked at.
    options = replace(options or WriteOptions(), allow_nonfinite=True)

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
        export=lambda jobs: _export(request, jobs, evaluations, tokenizer),
    )
    planned = plan_target(row, request)
    plan = planned.plan
    missing = write_target(Path(target), opened.source, plan, options, progress=progress)
    infos, tied = [job.info for job in plan.jobs if job.state is None], tied_names(opened.config)
    return ReshardSummary(
        source=str(facts.path),
        kind=facts.kind,
        target=str(target),
        to=to,
        tensors=len(infos),
        parameters=sum(info.numel for info in infos if info.dtype in FLOATS and info.name not in tied),
        weight_bytes=total_bytes(job.info for job in plan.jobs),
        verified=facts.verified,
        states=sorted({job.state for job in plan.jobs if job.state is not None}),
        batch=planned.batch,
        notes=planned.notes,
        source_notes=list(facts.notes),
        part=None if options.part is None else str(options.part),
        missing_parts=missing,
    )


def _open(path: str | Path, *, training: bool) -> OpenModel:
    """Open a source; warn about what is not checked."""
    opened = open_model(path, training=training, as_stored=True)
    facts, values = opened.source.facts, opened.values
    if values is None:
        logger.warning("%s has no %s: the tensors alone are written", facts.path, CONFIG_NAME)
    elif opened.config is None:
        logger.warning("model_type %s is not one of ours: tensors are not checked", shown(values.get("model_type")))
    if training:
        from statex_dist.checkpoint.formats.zero3.reader import Zero3Source  # of commands that write a run alone

        if isinstance(opened.source, Zero3Source):
            opened.source.join()  # a run that continues has the names of memory
            opened = replace(opened, names=opened.source.keys())
    if not opened.names:
        raise CheckpointError(f"{facts.path} holds no tensors: there is nothing to write")
    return opened


def _export(
    request: TargetRequest, jobs: Sequence[TensorJob], evaluations: Sequence[str], tokenizer: str | None
) -> tuple[Documents, list[str]]:
    """Return the documents of a directory that transformers opens: config, code, tokenizer and model card; and notes.

    Args:
        request: The model.
        jobs: Its tensors, as they are stored.
        evaluations: Directories of ``statex eval`` whose results the model card tells.
        tokenizer: ``bytes`` or a directory; the model has no tokenizer then.

    Raises:
        ConfigError: The model has a tokenizer already.
        CheckpointError: A file that goes along is damaged, or options need a model of a known family.
    """
    documents = request.documents(main_dtype(job.info for job in jobs))
    if request.config is None:
        if evaluations or tokenizer is not None:
            request.family_config("hf with --evaluation" if evaluations else "hf with --tokenizer")
        return lambda _: documents, []
    # Only where they are written.
    from checkpoints_tools.export.card_evaluation import read_evaluations
    from checkpoints_tools.export.hf_export import export_documents, export_notes
    from checkpoints_tools.export.hf_tokenizer import given_tokenizer, tokenizer_kind
    from checkpoints_tools.export.model_card import CARD_NAME, CardFacts, model_card

    model_dir, new = request.source.facts.model_dir, None
    if tokenizer is not None:
        if tokenizer_kind(model_dir) is not None:
            raise ConfigError(f"--tokenizer {tokenizer}: {model_dir} has a tokenizer already, which goes along")
        new = given_tokenizer(tokenizer, vocab_size=request.config.vocab_size)
    documents |= export_documents(documents[CONFIG_NAME], request.config, model_dir, new)
    assert request.values is not None
    card = CardFacts(
        values=request.values,
        config=request.config,
        source=request.source.facts,
        parameters=sum(job.info.numel for job in jobs if job.info.dtype in FLOATS),
        dtypes=[TORCH_NAMES[dtype] for dtype in float_dtypes(job.info for job in jobs)],
        tokenizer=tokenizer_kind(model_dir, new),
        evaluations=read_evaluations(evaluations, state_numbers=request.config.state_elements),
    )
    documents[CARD_NAME] = model_card(card)
    return lambda _: documents, export_notes(request.config)
