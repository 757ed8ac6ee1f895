"""Removing what killed processes left behind."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from statex_dist.checkpoint.layout import TEMPORARY_PREFIX

logger = logging.getLogger(__name__)


def remove_leftovers(directory: Path) -> None:
    """Delete what killed saves, deletions and writes of single files left behind in a directory."""
    for leftover in directory.glob(f"{TEMPORARY_PREFIX}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            remove_tree(leftover)
            continue
        try:
            leftover.unlink()
        except OSError as error:
            logger.warning("%s cannot be removed: %s", leftover, error)


def remove_tree(directory: Path) -> None:
    """Delete a directory under a name that is never taken for a checkpoint; a failure is only said."""
    try:
        shutil.rmtree(directory)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", directory, error)
