"""Expansion of a checkpoint on disk, streamed: memory is bounded by buffers, whatever the model."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_tools.expand.report import ExpansionReport, make_report, read_digests
from checkpoints_tools.formats.targets import TargetRequest, check_options, find_target, plan_target
from checkpoints_tools.io.documents import REPORT_NAME, with_dtype, with_one_dtype
from checkpoints_tools.io.journal import WrittenTensor
from checkpoints_tools.io.target import TargetPlan, write_target
from checkpoints_tools.io.target_writer import WriteOptions
from checkpoints_tools.io.tensor_stream import TensorJob
from checkpoints_tools.plan.options import PlanOptions, plan_model
from statex_dist.checkpoint.dtypes import CONVERTIBLE, FLOATS, parse_dtype, stored_dtype
from statex_dist.checkpoint.formats.tensor_io import Progress, TensorInfo, TensorSource, total_bytes
from statex_dist.checkpoint.manifest import refuse_target
from statex_dist.errors import CheckpointError
from statex_dist.models.config import CONFIG_NAME, ModelConfig
from statex_dist.models.model_check import check_apart, check_names
from statex_dist.models.registry import config_from_dict, family_of, tensor_mappings
from statex_dist.models.row_mapping import TensorMapping
from statex_dist.models.source import open_model

logger = logging.getLogger(__name__)


def expand(
    expansion: Expansion,
    target: str | Path,
    options: WriteOptions | None = None,
    *,
    to: str = "hf",
    world_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[ExpansionReport, list[int]]:
    """Write an expanded copy of a checkpoint, or a part of it.

    Args:
        expansion: What to write (:func:`checkpoints_tools.expand.expand.prepare_expansion`).
        target: Directory to make.
        options: How to write it.
        to: ``hf``, or ``zero3`` for a run in training: the optimizer's states grow with the weights.
        world_size: Ranks of a ``zero3`` target; None keeps the source's.
        progress: Told of the bytes written.

    Returns:
        The account, which is also written to ``expansion_report.json``; and the parts without which the target is not
        complete, where ``options.part`` is one of several.

    Raises:
        ConfigError: A wrong option.
        CheckpointError: The source is damaged, changes or holds NaN or Inf, or the target is not writable. The target
            is then as it was.
    """
    options = options or WriteOptions()
    plan = target_plan(expansion, options, to=to, world_size=world_size)
    check_target(expansion, Path(target), options)
    if find_target(to, grown=True).is_hub and expansion.after.ours_alone and not expansion_code(expansion):
        logger.warning(
            "other software does not know the plan in config.json of %s and refuses the model; with code for "
            "transformers, where the family has any: statex reshard --source %s --target DIR --to hf",
            *(target, target),
        )
    missing = write_target(Path(target), expansion.source, plan, options, progress=progress)
    written = {} if missing else read_digests(Path(target) / plan.model_folder)
    return expansion.report(written), missing


def target_plan(
    expansion: Expansion, options: WriteOptions, *, to: str = "hf", world_size: int | None = None
) -> TargetPlan:
    """Lay out what :func:`expand` writes; the same arguments."""
    row = find_target(to, grown=True)
    check_options(row, {"--world-size": world_size})
    config, facts = expansion.config_values(), expansion.source.facts
    code = expansion_code(expansion)

    def documents(written: Mapping[str, WrittenTensor]) -> dict[str, Any]:
        return {CONFIG_NAME: config, REPORT_NAME: expansion.report(written).to_dict(), **code}

    assert expansion.after.statex is not None
    info = {
        "source": str(facts.path.resolve()),
        "source_kind": facts.kind,
        "step": facts.info.get("step"),
        "plan": expansion.after.statex.to_dict(),
        "weight_bytes": total_bytes(job.info for job in expansion.jobs),
    }
    request = TargetRequest(
        source=expansion.source,
        values=expansion.values,
        config=expansion.after,
        names=[job.info.name for job in expansion.jobs],
        dtype=expansion.dtype,
        info=info,
        write=options,
        world_size=world_size,
        export=lambda jobs: (documents, []),
        grown=expansion.jobs,
    )
    return plan_target(row, request).plan


def expansion_code(expansion: Expansion) -> dict[str, str]:
    """Return the code that goes along in place of the base's, by name; nothing where the base brings none."""
    model_dir = expansion.source.facts.model_dir
    if not expansion.after.ours_alone or "auto_map" not in expansion.values:
        return {}
    from checkpoints_tools.export.hf_export import CODE_NAME, brings_code, code_of_expansion  # only of an export

    if not brings_code(expansion.values, model_dir):
        return {}
    assert model_dir is not None
    return {CODE_NAME: code_of_expansion(model_dir, expansion.after)}


def check_target(expansion: Expansion, target: Path, options: WriteOptions) -> None:
    """Raise if ``target`` may not be written: it overlaps the source, or holds something and is not to be replaced.

    Raises:
        CheckpointError: Why not.
    """
    facts = expansion.source.facts
    for directory in {facts.path, facts.model_dir or facts.path}:
        check_apart(directory, target)
    if not options.resume:
        refuse_target(target.resolve(), overwrite=options.overwrite)


@dataclass(frozen=True, kw_only=True, slots=True)
class Expansion:
    """A checked expansion: everything that is known before a byte is written.

    Attributes:
        source: The original checkpoint.
        values: Contents of its ``config.json``.
        before: Its config.
        after: The config of the target.
        jobs: Every tensor of the target.
        dtype: In which floating-point tensors are stored; None keeps each tensor's own.
    """

    source: TensorSource
    values: dict[str, Any]
    before: ModelConfig
    after: ModelConfig
    jobs: list[TensorJob]
    dtype: str | None = None

    def config_values(self) -> dict[str, Any]:
        """Return the contents of the target's ``config.json``: the source's, with the plan."""
        values = with_one_dtype(self.after.with_plan(self.values), self.source)
        return values if self.dtype is None else with_dtype(values, self.dtype)

    def report(self, written: Mapping[str, WrittenTensor] | None = None) -> ExpansionReport:
        """Return the report, with the digests of written tensors."""
        infos = [self.source.info(name) for name in self.source.owned()]
        return make_report(self.source.facts.path, self.before, self.after, self.jobs, infos, written or {})


def read_model(source: str | Path, *, training: bool = False) -> tuple[TensorSource, dict[str, Any], ModelConfig]:
    """Open a checkpoint of one of our families and return it with the contents of its ``config.json``, raw and typed.

    Args:
        source: Whatever :func:`statex_dist.models.source.open_model` opens.
        training: Whether a training checkpoint is wanted, as there.

    Raises:
        CheckpointError: It is damaged, has no ``config.json``, or is of another architecture.
    """
    opened = open_model(source, training=training, as_stored=True)
    if opened.values is None:
        raise CheckpointError(f"{opened.source.facts.path} has no {CONFIG_NAME}: what to expand is not known")
    return opened.source, opened.values, opened.config or config_from_dict(opened.values)


def prepare_expansion(
    source: str | Path, plan: PlanOptions | None = None, *, dtype: str | None = None, training: bool = False
) -> Expansion:
    """Open a checkpoint and pair its tensors with the plan's operations on them; write nothing.

    Args:
        source: Any checkpoint with a ``config.json`` that :func:`statex_dist.models.source.open_model` opens.
        plan: Options of the plan; None for the family's defaults.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None keeps each tensor's own. New rows of a tensor are made in its dtype
            and then converted, as its old ones are.
        training: Whether to open a training checkpoint if gathered weights lie beside it.

    Raises:
        ConfigError: A wrong option, or a plan that does not fit the model.
        CheckpointError: The source is damaged, incomplete or of another architecture.
    """
    wanted = parse_dtype(dtype)
    opened, values, before = read_model(source, training=training)
    return plan_expansion(opened, values, before, plan_model(before, plan), dtype=wanted)


def plan_expansion(
    source: TensorSource, values: dict[str, Any], before: ModelConfig, after: ModelConfig, *, dtype: str | None = None
) -> Expansion:
    """Pair the tensors of a source with what becomes of them.

    Args:
        source: The original checkpoint.
        values: Contents of its ``config.json``.
        before: Its config.
        after: The same with a plan.
        dtype: In which floating-point tensors are stored; None keeps each tensor's own.

    Raises:
        CheckpointError: Tensors are missing, unknown or of another shape, or new rows cannot be drawn in their dtype.
    """
    names = check_names(source, before)
    changed = tensor_mappings(before, after)
    _check_unknown_tensors(names, changed, before, source)
    embeddings = family_of(before.MODEL_TYPE).names.embeddings
    own = source.info(embeddings if embeddings in names else names[0]).dtype
    jobs = [_job(source.info(name), source.natural_dtype(name), changed.get(name), dtype) for name in names]
    for name, mapping in changed.items():
        if mapping.rows.source_rows is None:
            _check_drawable(name, own)
            info = TensorInfo(name=name, shape=mapping.rows.shape, dtype=stored_dtype(own, dtype))
            jobs.append(TensorJob(info=info, source=None, mapping=mapping))
    return Expansion(source=source, values=values, before=before, after=after, jobs=jobs, dtype=dtype)


def _check_unknown_tensors(
    names: list[str], changed: dict[str, TensorMapping], config: ModelConfig, source: TensorSource
) -> None:
    """Raise if a module that is to be expanded holds tensors that the family does not know: they would not fit."""
    family = family_of(config.MODEL_TYPE)
    known = family.tensors(config)
    modules = {_module_of(name, family.names.layer(mapping.layer), known) for name, mapping in changed.items()}
    unknown = [
        name
        for name in names
        if name not in known and name.startswith(tuple(modules)) and not name.endswith(config.DERIVED)
    ]
    if unknown:
        listed = ", ".join(repr(name) for name in unknown[:4])
        raise CheckpointError(
            f"{source.facts.path}: {listed} in a layer that is to be expanded are unknown to {config.MODEL_TYPE}: how "
            "they should grow is not known"
        )


def _module_of(name: str, layer: str, known: Collection[str]) -> str:
    """Return the prefix of the module of ours that a tensor is in: the longest of all our tensors there.

    A module of the host may hold ours, and tensors of its own beside it.
    """
    outer = layer + name.removeprefix(layer).partition(".")[0] + "."
    paths = [other.split(".")[:-1] for other in (*known, name) if other.startswith(outer)]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared) + "."


def _job(info: TensorInfo, natural: str, mapping: TensorMapping | None, dtype: str | None) -> TensorJob:
    """Return the job of one tensor of the source; ``natural`` is its dtype where none is asked for."""
    if mapping is None:
        return TensorJob.copy(info, dtype=stored_dtype(natural, dtype))
    _check_drawable(info.name, info.dtype)
    stored = TensorInfo(name=info.name, shape=mapping.rows.shape, dtype=stored_dtype(info.dtype, dtype))
    return TensorJob(info=stored, source=info, mapping=mapping)


def _check_drawable(name: str, dtype: str) -> None:
    if dtype not in CONVERTIBLE:
        reason = "float8 has no room for new values" if dtype in FLOATS else "it is not a floating-point dtype"
        raise CheckpointError(
            f"tensor '{name}' is to get new rows but has dtype {dtype} ({reason}); convert the checkpoint to one of "
            f"{', '.join(CONVERTIBLE)} first"
        )
