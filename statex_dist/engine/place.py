"""Check at every save that all ranks see the same directory of checkpoints."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.layout import LATEST_NAME, placed_name, rank_folders
from statex_dist.checkpoint.manifest import FileRecord
from statex_dist.checkpoint.visible import fresh_names, unseen_files, wait_until_none
from statex_dist.distributed.disks import Disks
from statex_dist.durable.files import remove_tree, sync, write_durably
from statex_dist.engine.base import TrainEngine
from statex_dist.errors import shown

_NAMED = 3

Part = tuple[dict[str, dict[str, Any]], str]
"""Records of the files of a rank by name, and its host."""


class CheckpointPlace:
    """The directory in which checkpoints are written; a mount that goes away must not replace it.

    Args:
        engine: The ranks.
        directory: The checkpoints' directory, which exists.
        mark: A file that exists as long as the run's directory is the one in which this process began; or None.
        disks: Which ranks share the directory; the first rank of each disk manages it there.
    """

    def __init__(self, engine: TrainEngine, directory: Path, mark: Path | None, disks: Disks):
        self.engine, self.directory, self.mark, self.disks = engine, directory, mark, disks
        self._latest: str | None = None
        # DeepSpeed's own loader, which stages 0 to 2 use, does not look into folders.
        self._folders = rank_folders(engine.world_size) if engine.in_folders else []

    def path_of(self, temporary: Path, name: str) -> Path:
        """Return where a file of a save goes that the engine names."""
        return temporary / (placed_name(name, self.engine.world_size) if self._folders else name)

    def found(self, tag: str) -> None:
        """Remember the tag that ``latest`` names."""
        self._latest = tag

    def name_latest(self, tag: str) -> None:
        """Write a tag into ``latest``."""
        write_durably(self.directory / LATEST_NAME, tag)
        self._latest = tag

    def open(self, temporary: Path) -> str | None:
        """Make the directory of a save; return the error, the same on all ranks, if one of them does not see it.

        Nothing is made above it: what is not there is a mount that is gone, and under its name lies another disk.
        """
        problem = None
        if self.disks.leads:
            try:
                problem = self._gone()
                if problem is None:
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir()
                    for folder in self._folders:
                        (temporary / folder).mkdir()
            except OSError as error:
                problem = f"{temporary} cannot be made: {error}"
        if self.disks.is_one:
            problem = self.engine.broadcast(problem)
        else:
            problem = next((text for text in self.engine.gather(problem) if text), None)
        if problem:
            return problem
        host = socket.gethostname()
        blind = wait_until_none(lambda: None if temporary.name in fresh_names(self.directory) else host)
        hosts = [f"rank {rank} on {name}" for rank, name in enumerate(self.engine.gather(blind)) if name]
        if not hosts:
            return None
        more = f" and {len(hosts) - _NAMED} more" if len(hosts) > _NAMED else ""
        maker = self.disks.mine[0]
        return f"{', '.join(hosts[:_NAMED])}{more} cannot see {temporary}, which rank {maker} has made: a mount is gone"

    def _gone(self) -> str | None:
        """Return why this is not the directory in which this process began and saved, or None."""
        if self.mark is not None and not self.mark.exists():
            return f"{self.mark.parent} is not the directory in which this run began: a mount is gone"
        latest = self.directory / LATEST_NAME
        named = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.exists() else None
        if named == self._latest:
            return None
        return (
            f"{latest} {'is not there' if named is None else f'names {shown(named)}'}; this run left "
            f"{self._latest or 'none'}: a mount is gone, or another program changed it"
        )

    def require_seen(self, temporary: Path, parts: Sequence[Part], ranks: Sequence[int]) -> dict[str, FileRecord]:
        """Return the records of the files that ``ranks`` have written, once this rank sees them with their sizes.

        Raises:
            OSError: It does not see them all: they lie on another disk.
        """
        writers = {name: rank for rank in ranks for name in parts[rank][0]}
        files = {name: FileRecord(**parts[rank][0][name]) for name, rank in writers.items()}
        sizes = {name: record.size for name, record in files.items()}
        if unseen := wait_until_none(lambda: unseen_files(temporary, sizes)):
            names = [f"{name} (of rank {writers[name]} on {parts[writers[name]][1]})" for name in unseen[:2]]
            raise OSError(
                f"rank {self.engine.rank} on {parts[self.engine.rank][1]} does not see {len(unseen)} of {len(files)} "
                f"files in {temporary}: {', '.join(names)}{' ...' if len(unseen) > 2 else ''}"
            )
        for folder in self._folders:
            sync(temporary / folder)
        return files

    def discard(self, temporary: Path) -> None:
        """Remove the files of a failed save, on all ranks together."""
        if self.disks.leads and temporary.exists():
            remove_tree(temporary)
        self.engine.barrier()
        # Where another directory has taken the place of the run's, this rank's files are still there.
        shutil.rmtree(temporary, ignore_errors=True)
