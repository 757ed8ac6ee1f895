"""Which checkpoints of a run are kept, and how the others go."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from statex_dist.checkpoint.layout import TEMPORARY_PREFIX, complete_tags, step_of
from statex_dist.checkpoint.leftovers import remove_leftovers, remove_tree
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.errors import CheckpointError

DOUBTFUL_KEY = "after_bad_steps"
"""Says in a manifest that the step before the save was bad: its weights may be the cause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavePolicy:
    """How checkpoints are written and which are kept.

    Attributes:
        keep_last: Newest checkpoints that are kept.
        keep_every: Checkpoints of every so many steps are kept for ever; 0 for none.
        asynchronous: Whether training goes on while files are written (from a copy in host memory).
        retries: Further attempts of a rank whose write failed.
    """

    keep_last: int = 2
    keep_every: int = 0
    asynchronous: bool = False
    retries: int = 2


def prune(checkpoints: Path, policy: SavePolicy) -> None:
    """Delete complete checkpoints that the policy does not keep, and what killed saves left behind.

    The newest is kept in any case. If it is doubtful, so are the newest that are not: the run may have to go back.
    """
    remove_leftovers(checkpoints)
    tags = {tag: step_of(tag) or 0 for tag in complete_tags(checkpoints)}
    kept, sound = set[int](), 0
    for tag, step in tags.items():  # newest first
        if step in kept or sound == policy.keep_last:
            continue
        doubtful = _is_doubtful(checkpoints / tag)
        if not kept or not doubtful:
            kept.add(step)
        sound += not doubtful
    for tag, step in tags.items():
        if step in kept or (policy.keep_every and step % policy.keep_every == 0):
            continue
        remove_tree(withdraw(checkpoints, tag))


def _is_doubtful(checkpoint: Path) -> bool:
    try:
        return bool(Manifest.read(checkpoint).info.get(DOUBTFUL_KEY))
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
