"""Random states, copies of a training state in host memory, and the writing of them: in this thread or in another."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from statex_dist.checkpoint.formats.crc import WRITE_ERRORS
from statex_dist.checkpoint.recorded import RecordedWriter
from statex_dist.errors import failure_text, reason

logger = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0
_NICENESS = 10
_PROBE_BYTES = 1 << 20


def random_state() -> dict[str, Any]:
    """Return the states of torch's (and this GPU's), numpy's and Python's generators as plain values."""
    name, keys, *rest = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: Mapping[str, Any]) -> None:
    """Restore :func:`random_state`."""
    torch.set_rng_state(states["torch"].cpu())
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


class HostCopy:
    """Copies nested states to host memory, into the same buffers every time: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def take(self, state: Any) -> Any:
        """Return ``state`` with every tensor copied; what an earlier call returned is overwritten."""
        old, self._buffers = self._buffers[::-1], []
        copied = self._copy(state, old)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any, old: list[torch.Tensor]) -> Any:
        if isinstance(value, torch.Tensor):
            buffer = old.pop() if old else None
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers.append(buffer)
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return type(value)({key: self._copy(item, old) for key, item in value.items()})
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._copy(item, old) for item in value))
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, old) for item in value)
        return value


class FileWriter:
    """Writes one rank's files of a checkpoint, with retries.

    Args:
        files: Paths and their contents.
        directory: The checkpoint's temporary directory.
        rank: This rank.
        retries: Further attempts after one that failed.
    """

    def __init__(self, files: Sequence[tuple[Path, Any]], directory: Path, *, rank: int, retries: int):
        self._files, self._directory, self._rank, self._retries = files, directory, rank, retries
        self._thread: threading.Thread | None = None
        self.records: dict[str, dict[str, Any]] = {}
        self.problem: str | None = None

    def start(self) -> None:
        """Write in a thread of low priority."""
        self._thread = threading.Thread(target=self._run_behind, name="checkpoint writer", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether nothing is being written any more."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the thread; an error of it that is no failed write is raised here."""
        if self._thread is not None:
            self._thread.join()

    def _run_behind(self) -> None:
        # On Linux niceness belongs to the thread: the loop's threads go first.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        self.run()

    def run(self) -> None:
        """Write, and record every file, or say in ``problem`` why it failed."""
        for attempt in range(self._retries + 1):
            try:
                self.records = self._write()
                self.problem = None
                break
            except WRITE_ERRORS as error:
                text = failure_text(error, self._directory)
                self.problem = f"checkpoint file of rank {self._rank} cannot be written: {text}"
                if attempt < self._retries:
                    logger.warning("%s; trying again (%d of %d)", self.problem, attempt + 1, self._retries)
                    time.sleep(min(_FIRST_PAUSE_SECONDS * 2**attempt, _LONGEST_PAUSE_SECONDS))
            except Exception as error:
                # Anything else is a fault of the program; it must reach the loop, not die with the thread.
                self.problem = f"checkpoint writer of rank {self._rank} failed: {reason(error)}"
                break
        self._files = ()

    def _write(self) -> dict[str, dict[str, Any]]:
        records = {}
        for path, state in self._files:
            try:
                with RecordedWriter(path) as file:
                    torch.save(state, cast("BinaryIO", file))
                    records[path.relative_to(self._directory).as_posix()] = asdict(file.finish())
            except WRITE_ERRORS as error:
                refused = _refused(path, error)
                path.unlink(missing_ok=True)  # a part of a file only takes up the disk that is full
                raise refused from None
        return records


def _refused(path: Path, error: Exception) -> Exception:
    """Return the system's own refusal of a file, with its path, where torch does not tell it (a full disk)."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, os.strerror(error.errno), str(path))
    try:
        with path.open("ab") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as refusal:
        return OSError(refusal.errno, os.strerror(refusal.errno or 0), str(path))
    return RuntimeError(f"{path}: {reason(error)}")
