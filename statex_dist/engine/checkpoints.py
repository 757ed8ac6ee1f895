"""A run's checkpoints: complete or absent, written in the background or in the loop, found again after any failure.

All ranks write into a temporary directory and sync their files; rank 0 writes the manifest, renames the directory and
moves ``latest``. Whenever the job is killed there is a complete checkpoint or none. DeepSpeed's own save gives none of
this (it names a checkpoint in ``latest`` before other ranks have written theirs), so it is only asked what to write.
"""

from __future__ import annotations

import logging
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.json_file import differing_keys, parse_config
from statex_dist.checkpoint.layout import (
    CONFIG_NAME,
    DAMAGED_PREFIX,
    LATEST_NAME,
    MANIFEST_NAME,
    MODEL_DIR,
    PLAIN_STATE_NAME,
    TEMPORARY_PREFIX,
    TRAIN_LENGTH_KEY,
    complete_tags,
    rank_of,
    ranks_of,
    step_of,
    tag_of,
)
from statex_dist.checkpoint.manifest import Manifest, commit_directory
from statex_dist.distributed.disks import Disks
from statex_dist.durable.files import remove_leftovers, remove_tree, write_durably
from statex_dist.engine.base import TrainEngine
from statex_dist.engine.checkpoint_retention import (
    BEST_KEY,
    DOUBTFUL_KEY,
    SavePolicy,
    mark_best,
    prune,
    settle_best,
    withdraw,
)
from statex_dist.engine.disk_checkpoints import DISK_KEY, DiskCheckpoints, disk_info
from statex_dist.engine.documents import Documents
from statex_dist.engine.leaders import Leaders
from statex_dist.engine.place import CheckpointPlace, Part
from statex_dist.engine.snapshot import FileWriter, HostCopy, random_state, set_random_state
from statex_dist.errors import CheckpointError, reason, refusal

logger = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3
"""Saves in a row that may fail before the run stops."""

_READ_ATTEMPTS = 3
_READ_PAUSE_SECONDS = 1.0


class Checkpoints:
    """Saves and finds the checkpoints of one run. Every method but :meth:`written` is called by all ranks together.

    Args:
        engine: The engine whose state is saved.
        directory: Directory of the checkpoints; it must exist.
        documents: The small text files of each checkpoint.
        policy: How to write, what to keep.
        mark: A file that exists as long as the run's directory is the one that this process began in.
        disks: Which ranks have the same directory, where it lies on the hosts' own disks; None for a shared one.
        neighbor_copy: Whether each disk's files are copied to the next disk.

    Attributes:
        lost_best: Steps whose saves were to be the best and have failed; the loop takes them.
    """

    def __init__(
        self,
        engine: TrainEngine,
        directory: Path,
        documents: Documents,
        policy: SavePolicy,
        *,
        mark: Path | None = None,
        disks: Disks | None = None,
        neighbor_copy: bool = False,
    ):
        self.engine = engine
        self.directory = directory
        self.documents = documents
        self.policy = policy
        self.shared = disks is None
        self.disks = disks or Disks.one(engine.rank, engine.world_size)
        self.place = CheckpointPlace(engine, directory, mark, self.disks)
        self.leaders = Leaders(engine, self.disks, directory)
        self.on_disks = DiskCheckpoints(engine, directory, self.disks, neighbor_copy=neighbor_copy)
        self.failed = 0
        self._copy = HostCopy()
        self._pending: tuple[int, FileWriter, float] | None = None
        self._doubtful = self._best = False
        self.lost_best: set[int] = set()

    def save(
        self,
        step: int,
        client_state: Mapping[str, Any],
        *,
        last: bool = False,
        doubtful: bool = False,
        best: bool = False,
    ) -> None:
        """Save the state after ``step`` optimizer steps; one that is still being written is finished first.

        Args:
            step: Optimizer steps done.
            client_state: Plain values to get back from :meth:`resume`.
            last: Whether the process ends after this, so that it must be on disk when this returns.
            doubtful: Whether the last step was bad: older checkpoints may be better, and are kept beside this one.
            best: Whether it is the best one so far: ``best`` leads to it, and it is kept until another takes its place.

        Raises:
            CheckpointError: The last save failed, or too many in a row.
        """
        if self._pending is not None:
            self.finish(log_only=last)  # with room again, the last save may well succeed
        self._doubtful, self._best = doubtful, best
        began = time.perf_counter()
        temporary = self._temporary(step)
        if problem := self.place.open(temporary):
            self._report_failure(step, problem, last=last)
            return
        carried = self.engine.carried.state_dict()
        state = {"step": step, "rng": random_state(), **client_state, **({"carried": carried} if carried else {})}
        captured = self.engine.capture(temporary, state)
        files = [(self.place.path_of(temporary, path.name), content) for path, content in captured]
        behind = self.policy.asynchronous and not last
        writer = FileWriter(
            self._copy.take(files) if behind else files,
            temporary,
            rank=self.engine.rank,
            retries=self.policy.retries,
        )
        self._pending = (step, writer, began)
        if behind:
            writer.start()
        else:
            writer.run()
            self.finish(last=last)

    def written(self) -> bool:
        """Return whether this rank has written its files of a save that is not finished yet."""
        return self._pending is not None and self._pending[1].done

    @property
    def pending(self) -> bool:
        """Whether a save waits for :meth:`finish`; the same on all ranks."""
        return self._pending is not None

    def finish(self, *, last: bool = False, log_only: bool = False) -> None:
        """Wait until all ranks have written the pending save, and make it a checkpoint.

        Args:
            last: Whether there is to be no other.
            log_only: Whether a failure is only said, however many there were.

        Raises:
            CheckpointError: The last save failed, or too many in a row.
        """
        assert self._pending is not None
        (step, writer, began), self._pending = self._pending, None
        writer.wait()
        reports = self.engine.gather((writer.problem, writer.records, socket.gethostname()))
        parts = [(part, host) for _, part, host in reports]
        problem = next((text for text, _, _ in reports if text), None)
        problem = problem or self.on_disks.copy_to_neighbors(self._temporary(step), parts)
        # On several disks none has its final name before all are written.
        problem = problem or self.leaders.each(lambda: self._prepare(step, parts))
        problem = problem or self.leaders.each(lambda: self._publish(step))
        if problem:
            self._report_failure(step, problem, last=last, log_only=log_only)
            return
        self.failed = 0
        logger.info("saved %s (%.1f s)", self.directory / tag_of(step), time.perf_counter() - began)
        if self.disks.leads:
            prune(self.directory, self.policy)

    def _report_failure(self, step: int, problem: str, *, last: bool, log_only: bool = False) -> None:
        self.failed += 1
        self.lost_best |= {step} if self._best else set()
        self.place.discard(self._temporary(step))
        if not self.disks.is_one and self.disks.leads and (self.directory / tag_of(step)).exists():
            remove_tree(withdraw(self.directory, tag_of(step)))  # another disk has none
        if last or (self.failed >= MAX_FAILED_SAVES and not log_only):
            newest = next(iter(complete_tags(self.directory)), None)
            whence = "the beginning: nothing has been saved" if newest is None else newest
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be saved: {problem}; check the disk (full? unmounted?), start "
                f"again: the run continues from {whence}"
            ).on_all_ranks(self.engine.rank)
        if self.engine.rank == 0:
            logger.error(
                "the checkpoint of step %d is not saved (failure %d in a row; one more than %d ends the run): %s",
                *(step, self.failed, MAX_FAILED_SAVES - 1, problem),
            )

    def _temporary(self, step: int) -> Path:
        return self.directory / f"{TEMPORARY_PREFIX}{tag_of(step)}"

    def _prepare(self, step: int, parts: list[Part]) -> None:
        """Add the files that all ranks share, and the manifest, to the temporary directory."""
        target, temporary = self.directory / tag_of(step), self._temporary(step)
        here = self.on_disks.ranks_here()
        files = self.place.require_seen(temporary, parts, here)
        files |= self.documents.write(temporary, step)
        info = {"step": step, "world_size": self.engine.world_size}
        info |= {key: True for key, holds in ((DOUBTFUL_KEY, self._doubtful), (BEST_KEY, self._best)) if holds}
        info |= {} if self.shared else disk_info(self.disks, here)
        Manifest(kind=self.engine.kind, files=files, info=info).write(temporary)
        if target.exists():
            # Only a directory without a manifest is ever in the way: resuming starts after the newest complete one.
            if (target / MANIFEST_NAME).is_file():
                raise OSError(f"{target} is already complete; a checkpoint is never overwritten")
            shutil.rmtree(target)

    def _publish(self, step: int) -> None:
        """Give the directory its final name: it is a checkpoint then."""
        target = self.directory / tag_of(step)
        commit_directory(self._temporary(step), target)
        try:
            self.place.name_latest(target.name)
        except OSError as error:
            # The checkpoint is there, and a resume finds it without the marker.
            logger.warning("%s cannot be written: %s", self.directory / LATEST_NAME, refusal(error))
        if self._best:
            mark_best(self.directory, target.name)

    def resume(self) -> dict[str, Any] | None:
        """Restore the newest whole checkpoint, of any number of ranks where the engine's allows that.

        Learning rate, betas and weight decay stay those of this start. Every file is compared with the manifest while
        it is read. A damaged checkpoint is left for an older one, set aside and named in the log.

        Returns:
            The client state, or None where the run has not saved anything yet.

        Raises:
            CheckpointError: There is no whole checkpoint although there have been some, or it is of another model or
                engine.
        """
        damaged: dict[str, str] = {}
        while True:
            chosen = self._choose(damaged)
            if chosen is None:
                if self.disks.leads:
                    remove_leftovers(self.directory)
                return None
            tag, manifest = chosen
            states, problem = self._read(tag, manifest)
            if problem is None:
                break
            del states
            damaged[tag] = problem
            if self.engine.rank == 0:
                logger.warning("%s: going back to an older checkpoint", problem)
        problem = self.leaders.each(lambda: self._settle(tag, damaged))
        if problem:
            raise CheckpointError(problem).on_all_ranks(self.engine.rank)
        logger.info("resuming from %s", self.directory / tag)
        client_state = self.engine.load(self.directory / tag, states)
        self.place.found(tag)
        if self.disks.leads:
            prune(self.directory, self.policy)  # a kill may have come between a save and this
        self.engine.carried.load_state_dict(client_state.pop("carried", {}))
        if rng := client_state.pop("rng", None):
            set_random_state(rng)
        return client_state

    def _choose(self, damaged: dict[str, str]) -> tuple[str, Manifest] | None:
        """Return the newest complete tag that is not known to be damaged, and its manifest (of this rank's disk).

        Raises:
            CheckpointError: There are some, and none of them can be used.
        """
        if self.shared:
            chosen: tuple[str, Manifest] | None
            chosen, problem = self.leaders.first(lambda: self._choose_here(damaged))
            if problem:
                raise CheckpointError(problem).on_all_ranks(self.engine.rank)
            return chosen
        while (tag := self.on_disks.choose(damaged)) is not None:
            if (problem := self.on_disks.fetch(tag)) is None:
                return tag, Manifest.read(self.directory / tag)
            damaged[tag] = problem
        return None

    def _choose_here(self, damaged: dict[str, str]) -> tuple[str, Manifest] | None:
        tags = [tag for tag in complete_tags(self.directory) if tag not in damaged]
        for tag in self._preferred(tags):
            try:
                manifest = Manifest.read(self.directory / tag)
            except CheckpointError as error:
                logger.warning("%s: going back to an older checkpoint", error)
                damaged[tag] = str(error)
                continue
            if DISK_KEY in manifest.info and len(manifest.info[DISK_KEY]["ranks"]) < manifest.info["world_size"]:
                raise CheckpointError(
                    f"{self.directory / tag} has the files of one host's ranks alone; give train.shared_run_dir false"
                )
            if manifest.kind != self.engine.kind:
                raise CheckpointError(
                    f"{self.directory / tag} was written with {_setting_of(manifest.kind)}, this run has "
                    f"{_setting_of(self.engine.kind)}; set it as it was, or give another run_dir"
                )
            return tag, manifest
        if damaged:
            raise CheckpointError(f"no checkpoint in {self.directory} is whole: {next(iter(damaged.values()))}")
        if (self.directory / LATEST_NAME).exists():
            raise CheckpointError(
                f"{self.directory / LATEST_NAME} exists but no checkpoint there is complete; "
                "restore one, or start in another run directory"
            )
        return None

    def _preferred(self, tags: list[str]) -> list[str]:
        """Return tags, newest first; of the copies of one step for several numbers of ranks that for ours first."""
        return sorted(tags, key=lambda tag: (-(step_of(tag) or 0), ranks_of(tag) != self.engine.world_size))

    def _read(self, tag: str, manifest: Manifest) -> tuple[Any, str | None]:
        """Return this rank's states, and the fault of the checkpoint, which is the same on all ranks, or None.

        Raises:
            CheckpointError: A rank cannot read its files, whatever they hold.
        """
        for attempt in range(_READ_ATTEMPTS):
            if attempt:  # a network file system may fail to read a file that is whole
                time.sleep(_READ_PAUSE_SECONDS)
            states, *report = self._read_once(self.directory / tag, manifest)
            reports = self.engine.gather(report)
            unreadable = next((text for _, text in reports if text), None)
            if unreadable is None:
                return states, next((text for text, _ in reports if text), None)
            del states
        raise CheckpointError(f"{unreadable}; that says nothing of what it holds: start again").on_all_ranks(
            self.engine.rank
        )

    def _read_once(self, directory: Path, manifest: Manifest) -> tuple[Any, str | None, str | None]:
        """Return this rank's states, what is wrong with the files that it has read, and why it cannot read them."""
        states = problem = unreadable = None
        try:
            states = self.engine.read(directory, manifest)
            if self.disks.leads:
                for name in sorted(manifest.files):
                    if rank_of(name) is None and name != PLAIN_STATE_NAME:
                        manifest.files[name].check(directory / name)
        except CheckpointError as error:
            problem = str(error)
        except OSError as error:
            unreadable = f"{directory} cannot be read: {error}"
        except Exception as error:  # a damaged file may raise any error, and the other ranks wait for this one
            problem = f"{directory} is damaged: {reason(error)}"
        return states, problem, unreadable

    def _settle(self, tag: str, damaged: Mapping[str, str]) -> None:
        """Raise unless a checkpoint is of this model. What is damaged is set aside."""
        directory = self.directory / tag
        saved = parse_config((directory / MODEL_DIR / CONFIG_NAME).read_text(encoding="utf-8"))
        given = parse_config(self.documents.model[CONFIG_NAME])
        if other := [key for key in differing_keys(saved, given) if key != TRAIN_LENGTH_KEY]:
            raise CheckpointError(
                f"{directory} is of another model (config.json differs in {', '.join(other)}); "
                "give the model that this run began with, or another run_dir"
            )
        # Before anything new gets their names.
        for bad in damaged:
            aside = self.directory / f"{DAMAGED_PREFIX}{bad}"
            if not self.disks.is_one and not (self.directory / bad).exists():
                continue  # other disks have it
            if aside.exists():
                shutil.rmtree(aside)
            (self.directory / bad).replace(aside)
            logger.warning("the damaged checkpoint is kept as %s", aside)
        # A kill between rename and marker, or a damaged newest one, leaves a marker that names another.
        settle_best(self.directory)
        latest = self.directory / LATEST_NAME
        if not latest.is_file() or latest.read_text(encoding="utf-8", errors="replace").strip() != tag:
            write_durably(latest, tag)
        self.documents.resume(directory, step_of(tag) or 0)


def _setting_of(kind: str) -> str:
    """Return the setting that makes an engine write checkpoints of a kind."""
    stage = kind.removeprefix("zero")
    return f"engine.stage {stage}" if stage != kind else f"engine.name {kind}"
