"""Remove the leftovers of killed processes."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from statex_dist.checkpoint.layout import TEMPORARY_PREFIX

logger = logging.getLogger(__name__)


def remove_leftovers(directory: Path) -> None:
    """Delete the leftovers of killed saves, deletions and writes of single files in a directory."""
    for leftover in directory.glob(f"{TEMPORARY_PREFIX}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            remove_tree(leftover)
            continue
        try:
            leftover.unlink()
        except OSError as error:
            logger.warning("%s cannot be removed: %s", leftover, error)


def remove_tree(directory: Path) -> None:
    """Rename a directory so that it is no checkpoint, then delete it; a failure is only logged."""
    try:
        shutil.rmtree(directory)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", directory, error)
