"""Wait for the files of other hosts, which appear seconds later on a network file system."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PATIENCE_SECONDS = 30.0
"""How long a file of another host may take to appear; NFS clients ask for new entries after 30 s at the latest."""

_PAUSE_SECONDS = 0.2


def wait_until_none(look: Callable[[], T | None]) -> T | None:
    """Call ``look`` until it returns None or :data:`PATIENCE_SECONDS` are over; return its last value."""
    end = time.monotonic() + PATIENCE_SECONDS
    while (found := look()) is not None and time.monotonic() < end:
        time.sleep(_PAUSE_SECONDS)
    return found


def fresh_names(directory: Path) -> set[str]:
    """Return the names in a directory, none if it is missing; listing makes a network file system refresh them."""
    try:
        return {path.name for path in directory.iterdir()}
    except OSError:
        return set()


def unseen_files(directory: Path, sizes: Mapping[str, int]) -> list[str] | None:
    """Return the files that are not in ``directory`` with their size, or None.

    Each folder is listed once, which makes a network file system refresh it, and each file's size asked for once.

    Args:
        directory: Where they were written.
        sizes: Bytes of each file, by its path relative to ``directory``.
    """
    by_folder: dict[str, dict[str, int]] = {}
    for path, size in sizes.items():
        folder, _, name = path.rpartition("/")
        by_folder.setdefault(folder, {})[name] = size
    unseen: list[str] = []
    for folder, expected in by_folder.items():
        try:
            with os.scandir(directory / folder) as entries:
                found = {entry.name: entry.stat().st_size for entry in entries if entry.name in expected}
        except OSError:
            found = {}
        prefix = f"{folder}/" if folder else ""
        unseen += [prefix + name for name, size in expected.items() if found.get(name) != size]
    return unseen or None
