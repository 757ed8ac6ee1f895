"""Which checkpoints of a run are kept, and how the others go."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from statex_dist.checkpoint.layout import BEST_NAME, TEMPORARY_PREFIX, complete_tags, step_of
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.durable.files import remove_leftovers, remove_tree
from statex_dist.errors import CheckpointError, refusal

logger = logging.getLogger(__name__)

DOUBTFUL_KEY = "after_bad_steps"
"""Says in a manifest that the step before the save was bad: its weights may be the cause."""

BEST_KEY = "best"
"""Says in a manifest that the checkpoint was the best one so far when it was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavePolicy:
    """How checkpoints are written and which are kept.

    Attributes:
        keep_last: Newest checkpoints that are kept.
        keep_every: Interval, in steps, of checkpoints that are kept permanently; 0 for none.
        asynchronous: Whether training continues while files are written (from a copy in host memory).
        retries: Further attempts of a rank whose write failed.
    """

    keep_last: int = 2
    keep_every: int = 0
    asynchronous: bool = False
    retries: int = 2


def prune(checkpoints: Path, policy: SavePolicy) -> None:
    """Delete complete checkpoints that the policy does not keep, and what killed saves left behind.

    The one that ``best`` leads to is kept, and so is the newest in any case. If the newest is doubtful, so are the
    newest that are not: the run may have to go back.
    """
    remove_leftovers(checkpoints)
    tags = {tag: step_of(tag) or 0 for tag in complete_tags(checkpoints)}
    kept, sound = set[int](), 0
    for tag, step in tags.items():  # newest first
        if step in kept or sound == policy.keep_last:
            continue
        doubtful = _says(checkpoints / tag, DOUBTFUL_KEY)
        if not kept or not doubtful:
            kept.add(step)
        sound += not doubtful
    kept.add(best_step(checkpoints))
    for tag, step in tags.items():
        if step in kept or (policy.keep_every and step % policy.keep_every == 0):
            continue
        remove_tree(withdraw(checkpoints, tag))


def mark_best(checkpoints: Path, tag: str) -> None:
    """Have the link ``best`` lead to a tag; where the file system has no links, that is logged."""
    draft = checkpoints / f"{TEMPORARY_PREFIX}{BEST_NAME}"
    try:
        draft.unlink(missing_ok=True)
        draft.symlink_to(tag)
        draft.replace(checkpoints / BEST_NAME)
    except OSError as error:
        logger.warning("%s cannot be made: %s", checkpoints / BEST_NAME, refusal(error))


def settle_best(checkpoints: Path) -> None:
    """Have ``best`` lead to the newest checkpoint that was written as the best.

    A kill may have come between that save and its link, and the one that the link leads to may be damaged or gone.
    """
    tags = complete_tags(checkpoints)
    linked = best_step(checkpoints)
    gone = linked >= 0 and linked not in map(step_of, tags)
    for tag in tags:
        if (step_of(tag) or 0) <= linked and not gone:
            return
        if _says(checkpoints / tag, BEST_KEY):
            mark_best(checkpoints, tag)
            return
    if gone:
        logger.warning("%s leads to a checkpoint that is gone, and is removed", checkpoints / BEST_NAME)
        (checkpoints / BEST_NAME).unlink(missing_ok=True)


def best_step(checkpoints: Path) -> int:
    """Return the step of the tag that ``best`` leads to; -1 where there is none."""
    try:
        step = step_of(os.readlink(checkpoints / BEST_NAME))  # noqa: PTH115 - a link to a name, not to a path
    except OSError:
        return -1
    return -1 if step is None else step


def _says(checkpoint: Path, key: str) -> bool:
    try:
        return bool(Manifest.read(checkpoint).info.get(key))
    except CheckpointError:
        return False


def withdraw(checkpoints: Path, tag: str) -> Path:
    """Give a checkpoint that is to be deleted a temporary name: killed half-way, it is not taken for a complete one.

    Returns:
        Where it lies now.
    """
    doomed = checkpoints / f"{TEMPORARY_PREFIX}delete-{tag}"
    if doomed.exists():
        shutil.rmtree(doomed)
    return (checkpoints / tag).replace(doomed)
