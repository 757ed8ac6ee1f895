"""Expansion of a checkpoint on disk, streamed: memory is bounded by buffers, whatever the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_tools.expand.expansion import Expansion
from checkpoints_tools.expand.report import Checksums, ExpansionReport
from checkpoints_tools.export.hf_export import CODE_NAME, brings_code, code_of_expansion
from checkpoints_tools.formats.registry import check_options, find_target
from checkpoints_tools.formats.safetensors import hf_plan
from checkpoints_tools.io.expansion_report import REPORT_NAME
from checkpoints_tools.io.journal import WrittenTensor
from checkpoints_tools.io.target import TargetPlan, write_target
from checkpoints_tools.io.target_writer import WriteOptions
from statex_dist.checkpoint.formats.tensor_io import Progress, total_bytes
from statex_dist.checkpoint.manifest import refuse_target
from statex_dist.models.config import CONFIG_NAME
from statex_dist.models.model_check import check_apart

logger = logging.getLogger(__name__)

TARGETS = ("hf", "zero3")
"""Layouts that an expansion can be written in."""


def expand(
    expansion: Expansion,
    target: str | Path,
    options: WriteOptions | None = None,
    *,
    to: str = "hf",
    world_size: int | None = None,
    progress: Progress | None = None,
) -> ExpansionReport:
    """Write an expanded copy of a checkpoint.

    Args:
        expansion: What to write (:func:`checkpoints_tools.expand.expansion.prepare_expansion`).
        target: Directory to make.
        options: How to write it.
        to: ``hf``, or ``zero3`` for a run in training: the optimizer's states grow with the weights.
        world_size: Ranks of a ``zero3`` target; None keeps the source's.
        progress: Told of the bytes written.

    Returns:
        The account, which is also written to ``expansion_report.json``.

    Raises:
        ConfigError: A wrong option.
        CheckpointError: The source is damaged, changes or holds NaN or Inf, or the target is not writable. The target
            is then as it was.
    """
    options = options or WriteOptions()
    plan = target_plan(expansion, options, to=to, world_size=world_size)
    check_target(expansion, Path(target), options)
    if (
        to == "hf"
        and expansion.after.ours_alone
        and not brings_code(expansion.values, expansion.source.facts.model_dir)
    ):
        logger.warning(
            "other software does not know the plan in config.json of %s and refuses the model; with code for "
            "transformers, where the family has any: statex reshard --source %s --target DIR --to hf",
            *(target, target),
        )
    write_target(Path(target), expansion.source, plan, options, progress=progress)
    return expansion.report(Checksums.read(Path(target) / plan.model_folder))


def target_plan(
    expansion: Expansion, options: WriteOptions, *, to: str = "hf", world_size: int | None = None
) -> TargetPlan:
    """Lay out what :func:`expand` writes; the same arguments."""
    check_options(find_target(to, TARGETS), world_size=world_size)
    config, facts = expansion.config_values(), expansion.source.facts
    code = expansion_code(expansion)

    def documents(written: Mapping[str, WrittenTensor]) -> dict[str, Any]:
        return {CONFIG_NAME: config, REPORT_NAME: expansion.report(Checksums.of(written)).to_dict(), **code}

    assert expansion.after.statex is not None
    info = {
        "source": str(facts.path.resolve()),
        "source_kind": facts.kind,
        "step": facts.info.get("step"),
        "plan": expansion.after.statex.to_dict(),
        "weight_bytes": total_bytes(job.info for job in expansion.jobs),
    }
    if to == "zero3":
        from checkpoints_tools.expand.training_state import expanded_training_plan  # only for a run in training

        return expanded_training_plan(expansion, world_size, documents=documents, info=info)
    size = options.max_shard_size
    return hf_plan(expansion.source, expansion.jobs, max_shard_size=size, documents=documents, info=info)


def expansion_code(expansion: Expansion) -> dict[str, str]:
    """Return the code that goes along in place of the base's, by name; nothing where the base brings none."""
    model_dir = expansion.source.facts.model_dir
    if not expansion.after.ours_alone or not brings_code(expansion.values, model_dir):
        return {}
    assert model_dir is not None
    return {CODE_NAME: code_of_expansion(model_dir)}


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
