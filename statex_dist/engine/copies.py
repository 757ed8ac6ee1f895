"""Files of a checkpoint that go from one host's disk to another's, through the ranks' own connections.

The first rank of a disk sends, the first of the other receives, in blocks of bounded size, so that no file is ever in
memory as a whole. What arrives is compared with the digest that was taken when the file was written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from statex_dist.checkpoint.manifest import FileRecord
from statex_dist.checkpoint.recorded import RecordedWriter
from statex_dist.distributed.disks import Disks
from statex_dist.errors import CheckpointError, refusal

BLOCK_BYTES = 16 << 20
"""Bytes that are sent at once."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Files that one rank has and another one is to have; the same on both.

    Attributes:
        source: Rank that sends.
        target: Rank that receives.
        files: Records by the files' paths, which are relative to the checkpoint on both.
    """

    source: int
    target: int
    files: dict[str, FileRecord]


def ring(disks: Disks) -> list[tuple[int, int]]:
    """Return ``(from, to)`` of the disks whose files are copied to the next one's, disjoint pairs side by side."""
    count = len(disks.members)
    pairs = [(index, (index + 1) % count) for index in range(count)] if count > 1 else []
    return pairs[::2] + pairs[1::2]


def run_copies(copies: Sequence[Copy], directory: Path, rank: int, device: torch.device) -> str | None:
    """Send and receive what concerns this rank.

    Every rank calls it with the same copies in the same order, one after the other, so that no two wait for each other.
    One that cannot read or write continues with the exchange, since the other side waits for it.

    Args:
        copies: What goes where.
        directory: The checkpoint's directory on this rank's disk.
        rank: This rank.
        device: Where the connections between ranks take tensors from.

    Returns:
        Why a file could not be sent or received, or None.
    """
    problems = []
    for copy in copies:
        for name, record in sorted(copy.files.items()):
            if copy.source == rank:
                problems.append(_send(directory / name, record, copy.target, device))
            elif copy.target == rank:
                problems.append(_receive(directory / name, record, copy.source, device))
    return next((problem for problem in problems if problem), None)


def _blocks(record: FileRecord) -> Iterator[int]:
    for start in range(0, record.size, BLOCK_BYTES):
        yield min(BLOCK_BYTES, record.size - start)


def _send(path: Path, record: FileRecord, target: int, device: torch.device) -> str | None:
    """Send a file; in place of what cannot be read, zeros, which its receiver refuses by their digest."""
    problem = None
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
        except OSError as error:
            file, problem = None, f"{path} cannot be read: {refusal(error)}"
        for size in _blocks(record):
            data = bytearray(size)
            try:
                if file is not None and file.readinto(data) != size:
                    problem = f"{path} ends early"
            except OSError as error:
                problem = f"{path} cannot be read: {refusal(error)}"
            dist.send(torch.frombuffer(data, dtype=torch.uint8).to(device), target)
    return problem


def _receive(path: Path, record: FileRecord, source: int, device: torch.device) -> str | None:
    """Receive a file, and compare it with its record."""
    problem = None
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(RecordedWriter(path))
        except OSError as error:
            file, problem = None, f"{path} cannot be written: {refusal(error)}"
        for size in _blocks(record):
            block = torch.empty(size, dtype=torch.uint8, device=device)
            dist.recv(block, source)
            try:
                if file is not None and problem is None:
                    file.write(block.cpu().numpy().data)
            except OSError as error:
                problem = f"{path} cannot be written: {refusal(error)}"
        try:
            if file is not None and problem is None:
                found = file.finish()
                if record.xxh3_128 is None:
                    record.check(path)
                elif found.xxh3_128 != record.xxh3_128:
                    problem = f"{path}: what rank {source} sent is not what was written"
        except CheckpointError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{path} cannot be written: {refusal(error)}"
    return problem
