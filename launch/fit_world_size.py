"""Reshard a run's checkpoint inside the run directory, so that the run can continue on another number of ranks."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

from checkpoints_tools.reshard.reshard import reshard
from statex_dist.checkpoint.formats.places import check_link
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
from statex_dist.checkpoint.manifest import Manifest, commit_directory, record_file
from statex_dist.durable.files import write_durably
from statex_dist.engine.checkpoint_retention import withdraw
from statex_dist.errors import CheckpointError

logger = logging.getLogger(__name__)

KIND = "zero3"


def fit_world_size(checkpoints: Path, tag: str, world_size: int) -> str:
    """Ensure that a step has a checkpoint for ``world_size`` ranks, and that the run resumes from it.

    The original stays. At most one copy for another number of ranks is kept, the one that was requested last, because
    each copy is as large as the original. If the process is killed, only ``.tmp-*`` is left, and the next call starts
    from the beginning. No process may train in the run directory during the call.

    Args:
        checkpoints: A run's directory of checkpoints.
        tag: A complete ZeRO-3 checkpoint there.
        world_size: Number of ranks.

    Returns:
        ``tag`` if it fits, else another tag of the same step that fits, else the tag of a new copy.

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
    """Return a tag of the step whose checkpoint is for ``world_size`` ranks, or None.

    Every tag other than ``tag`` is verified completely, because the caller may have found it damaged.
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
        CheckpointError: The manifest has no such number, or the checkpoint is incomplete.
    """
    ranks = Manifest.read(directory).info.get("world_size")
    if not isinstance(ranks, int):
        raise CheckpointError(f"{directory / MANIFEST_NAME} does not say how many ranks wrote the checkpoint")
    return ranks


def _cut(checkpoints: Path, tag: str, new_tag: str, world_size: int) -> str:
    """Write the copy under a temporary name, complete its files and manifest, and rename it."""
    began = time.monotonic()
    source, target = checkpoints / tag, checkpoints / new_tag
    original = Manifest.read(source)
    if original.kind != KIND:
        raise CheckpointError(
            f"{source} is of layout {original.kind}: it is of one process, or one that the engine itself cuts for "
            f"{world_size} ranks; only {KIND} is cut here"
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
    # Files that belong neither to a rank nor to the model are shared by all ranks; they are copied unchanged.
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
