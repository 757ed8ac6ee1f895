"""Cutting a run's checkpoint for another number of ranks, in place, so that the run can go on with what is left."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

from checkpoints_tools.reshard.reshard import reshard
from statex_dist.checkpoint.layout import (
    LATEST_NAME,
    MANIFEST_NAME,
    TEMPORARY_PREFIX,
    complete_tags,
    rank_of,
    ranks_of,
    step_of,
    tag_of,
)
from statex_dist.checkpoint.links import check_link
from statex_dist.checkpoint.manifest import Manifest, commit_directory, record_file
from statex_dist.durable.files import write_durably
from statex_dist.engine.checkpoint_retention import withdraw
from statex_dist.errors import CheckpointError

logger = logging.getLogger(__name__)

KIND = "zero3"


def fit_world_size(checkpoints: Path, tag: str, world_size: int) -> str:
    """Make sure that a step has a checkpoint for ``world_size`` ranks, and that it is the one that a run resumes from.

    The original stays. Of its copies for other numbers of ranks at most one is kept, the one that was asked for last:
    each takes as much room as the original. Killed at any moment, only ``.tmp-*`` is left, and the next call begins
    again. Nothing may be training into the run meanwhile.

    Args:
        checkpoints: A run's directory of checkpoints.
        tag: A complete ZeRO-3 checkpoint there.
        world_size: Number of ranks.

    Returns:
        ``tag`` itself if it fits, another tag of the same step that does, or that of a new copy.

    Raises:
        CheckpointError: The checkpoint is incomplete, damaged or of one process, or the disk is full.
    """
    try:
        return _fit(checkpoints, tag, world_size)
    except OSError as error:
        raise CheckpointError(f"{checkpoints / tag} cannot be cut for {world_size} ranks: {error}") from None


def _fit(checkpoints: Path, tag: str, world_size: int) -> str:
    step = step_of(tag)
    assert step is not None, tag
    assert world_size >= 1, world_size
    fitting = _find(checkpoints, step, tag, world_size)
    if fitting is None:
        fitting = _cut(checkpoints, tag, tag_of(step, world_size), world_size)
    tags = complete_tags(checkpoints)
    if step_of(tags[0]) == step:
        write_durably(checkpoints / LATEST_NAME, fitting)
    for other in tags:
        if step_of(other) == step and ranks_of(other) is not None and other != fitting:
            shutil.rmtree(withdraw(checkpoints, other))
    return fitting


def _find(checkpoints: Path, step: int, tag: str, world_size: int) -> str | None:
    """Return a tag of the step that was written by, or cut for, as many ranks.

    Any but ``tag`` is read as a whole: a caller that names another may have found it damaged.
    """
    if _ranks(checkpoints / tag) == world_size:
        return tag
    for other in reversed(complete_tags(checkpoints)):
        if step_of(other) != step or other == tag:
            continue
        try:
            if _ranks(checkpoints / other) != world_size:
                continue
            Manifest.read(checkpoints / other).verify(checkpoints / other)
        except CheckpointError as error:
            logger.warning("%s is passed over: %s", checkpoints / other, error)
        else:
            return other
    return None


def _ranks(directory: Path) -> int:
    """Return the number of ranks that a checkpoint is for.

    Raises:
        CheckpointError: It does not say, or is incomplete.
    """
    ranks = Manifest.read(directory).info.get("world_size")
    if not isinstance(ranks, int):
        raise CheckpointError(f"{directory / MANIFEST_NAME} does not say how many ranks wrote the checkpoint")
    return ranks


def _cut(checkpoints: Path, tag: str, new_tag: str, world_size: int) -> str:
    """Write the copy under a temporary name, give it its facts, and move it to its place."""
    began = time.monotonic()
    source, target = checkpoints / tag, checkpoints / new_tag
    original = Manifest.read(source)
    if original.kind != KIND:
        raise CheckpointError(
            f"{source} was written by engine {original.kind}, which has one process; it cannot be cut for {world_size}"
        )
    temporary = checkpoints / f"{TEMPORARY_PREFIX}{new_tag}"
    for leftover in checkpoints.glob(f"{TEMPORARY_PREFIX}*{new_tag}"):
        shutil.rmtree(leftover)
    if target.exists():  # not complete, or damaged: _find passed it over
        shutil.rmtree(withdraw(checkpoints, new_tag))
    summary = reshard(source, temporary, to=KIND, world_size=world_size)
    for note in summary.notes:
        logger.info("%s: %s", new_tag, note)
    written = temporary / (temporary / LATEST_NAME).read_text(encoding="utf-8").strip()
    new = Manifest.read(written)
    # Neither of a rank nor of the model: what the writer of checkpoints keeps for all ranks goes along as it is.
    shared = {name for name in original.files if rank_of(name) is None} - new.files.keys()
    for name in sorted(shared):
        (written / name).parent.mkdir(parents=True, exist_ok=True)
        check_link(source / name, source)
        shutil.copyfile(source / name, written / name)
    files = {**new.files, **{name: record_file(written / name) for name in shared}}
    # The step is the run's, which counts skipped updates too.
    info = {**original.info, **new.info, "step": original.info.get("step"), "source": tag}
    replace(new, files=files, info=info).write(written)
    commit_directory(written, target)
    shutil.rmtree(temporary)
    seconds, ranks = time.monotonic() - began, original.info.get("world_size")
    logger.info("%s, written by %s ranks, is copied for %d: %s (%.1f s)", source, ranks, world_size, new_tag, seconds)
    return new_tag
