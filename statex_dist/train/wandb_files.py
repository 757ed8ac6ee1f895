"""Read wandb's own files of a run: which steps they hold, and at which bytes.

A ``.wandb`` file is a log of records in LevelDB's format with a header of its own (wandb's ``core/pkg/leveldb``):
blocks of 32 KiB, in them chunks of a CRC-32, a length and a type; a record is one chunk or several. After a kill its
end may be torn, or the file may be empty.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HEADER = b":W&B"
_HEADER_BYTES = 7
_BLOCK = 1 << 15
_CHUNK_HEADER = 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(frozen=True, slots=True)
class LoggedRecord:
    """One record of a ``.wandb`` file.

    Attributes:
        begin: Its first byte in the file.
        end: The byte behind it.
        payload: A serialised ``Record`` of wandb's.
    """

    begin: int
    end: int
    payload: bytes


def read_records(path: Path) -> Iterator[LoggedRecord]:
    """Yield the whole records of a ``.wandb`` file, up to its end or the first byte that is torn or damaged.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        if not file.read(_HEADER_BYTES).startswith(_HEADER):
            return
        position, begin, parts = _HEADER_BYTES, _HEADER_BYTES, list[bytes]()
        while True:
            left = _BLOCK - position % _BLOCK
            if left < _CHUNK_HEADER:  # too short for another chunk: filled with zeros
                position += left
                file.seek(position)
            header = file.read(_CHUNK_HEADER)
            length, kind = int.from_bytes(header[4:6], "little"), header[6] if len(header) == _CHUNK_HEADER else 0
            data = file.read(length)
            whole = len(data) == length and zlib.crc32(header[6:7] + data) == int.from_bytes(header[:4], "little")
            if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or not whole:
                return
            if kind in (_FULL, _FIRST):
                begin, parts = position, []
            elif not parts:
                return
            parts.append(data)
            position += _CHUNK_HEADER + length
            if kind in (_FULL, _LAST):
                yield LoggedRecord(begin, position, b"".join(parts))
                parts = []


def segments(run_dir: Path, run_id: str) -> list[Path]:
    """Return the ``.wandb`` files of a run, one for every start, oldest first."""
    found = (run_dir / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb")
    return sorted(found, key=lambda path: path.parent.name.partition("run-")[2])


def is_offline(path: Path) -> bool:
    """Return whether a file was recorded offline and has not been sent since."""
    return path.parent.name.startswith("offline-") and not synced_marker(path).exists()


def synced_marker(path: Path) -> Path:
    """Return the file beside a ``.wandb`` file that ``wandb sync`` writes after it has sent it."""
    return path.with_name(f"{path.name}.synced")
