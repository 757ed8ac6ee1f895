"""CRC-32 of archives: those that a ``torch.save`` file carries, and one of a stretch of bytes from those of its parts.

A zip archive, and so every ``torch.save`` file, has a CRC-32 of each of its entries in its directory; torch writes it
and never looks at it again. The directory alone (a few kilobytes) stands for a file of any size, and a damaged byte is
found without having kept anything beside the file. Several threads that read (or write) an entry in pieces can still
check (or fill in) that number, because the CRC of ``a`` followed by ``n`` bytes ``b`` is ``crc(a) * x^(8 n) + crc(b)``
in the field of polynomials over GF(2) (Mark Adler's crc32_combine; zlib 1.2.12 does it the same way).
"""

from __future__ import annotations

import struct
import threading
import zipfile
import zlib
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path

import xxhash

from statex_dist.errors import CheckpointError, one_line, shown

_POLYNOMIAL = 0xEDB88320  # bits reflected: x^0 is the highest


def _multiply(a: int, b: int) -> int:
    """Return a * b modulo the CRC polynomial."""
    product = 0
    bit = 1 << 31
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=64)
def _square(power: int) -> int:
    """Return x^(2^power)."""
    if power == 0:
        return 1 << 30
    half = _square(power - 1)
    return _multiply(half, half)


@lru_cache(maxsize=4096)
def _shift(length: int) -> int:
    """Return x^(8 length), by which the CRC of what stands before ``length`` bytes is multiplied."""
    result, power = 1 << 31, 3
    while length:
        if length & 1:
            result = _multiply(_square(power), result)
        length >>= 1
        power += 1
    return result


def combine(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of ``a + b`` from those of ``a`` and ``b``, and the length of ``b`` in bytes."""
    return _multiply(_shift(length), first) ^ second


def crc_of_zeros(count: int) -> int:
    """Return the CRC-32 of ``count`` zero bytes."""
    crc = 0
    while count:
        step = min(count, 1 << 20)
        crc, count = zlib.crc32(bytes(step), crc), count - step
    return crc


_SMALL_BYTES = 1 << 15


class CrcLedger:
    """The CRC-32 of one stretch of bytes, noted in pieces by several threads; neighbours are joined at once.

    A piece that overlaps bytes noted before is left out, so a caller may read bytes twice.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._runs: list[tuple[int, int]] = []  # (stop, crc) of the run that starts there
        self._lock = threading.Lock()

    def note(self, start: int, data: memoryview | bytes) -> None:
        """Note bytes that lie at ``start``."""
        length = len(data)
        if length >= _SMALL_BYTES:
            self.note_crc(start, length, zlib.crc32(data))
            return
        with self._lock:
            # Few bytes behind a run: its CRC is continued, because to combine two costs more than to compute one.
            place = bisect_left(self._starts, start) - 1
            follows = place >= 0 and self._runs[place][0] == start
            crc = zlib.crc32(data, self._runs[place][1] if follows else 0)
            if follows and (place + 1 == len(self._starts) or self._starts[place + 1] > start + length):
                self._runs[place] = (start + length, crc)
                return
        if length:
            self.note_crc(start, length, zlib.crc32(data))

    def note_crc(self, start: int, length: int, crc: int) -> None:
        """Note the CRC of ``length`` bytes that lie at ``start``."""
        with self._lock:
            place, stop = bisect_left(self._starts, start), start + length
            before = self._runs[place - 1][0] if place else 0
            after = self._starts[place] if place < len(self._starts) else stop
            if before > start or after < stop:
                return
            if place < len(self._starts) and self._starts[place] == stop:
                after_stop, after_crc = self._runs.pop(place)
                del self._starts[place]
                crc, stop = combine(crc, after_crc, after_stop - stop), after_stop
            if place and self._runs[place - 1][0] == start:
                crc = combine(self._runs[place - 1][1], crc, stop - start)
                self._runs[place - 1] = (stop, crc)
                return
            self._starts.insert(place, start)
            self._runs.insert(place, (stop, crc))

    def runs(self) -> list[tuple[int, int, int]]:
        """Return ``(start, length, crc)`` of each run that has been noted, for another process to note."""
        with self._lock:
            return [(start, stop - start, crc) for start, (stop, crc) in zip(self._starts, self._runs, strict=True)]

    def gaps(self, length: int) -> list[tuple[int, int]]:
        """Return the ``(start, stop)`` of each part of ``length`` bytes that has not been noted."""
        found, position = [], 0
        for start, (stop, _) in zip(self._starts, self._runs, strict=True):
            if start > position:
                found.append((position, start))
            position = max(position, stop)
        if position < length:
            found.append((position, length))
        return found

    def total(self) -> int:
        """Return the CRC of the whole; there must be no gaps."""
        if not self._runs:
            return 0
        assert len(self._runs) == 1, f"{len(self._runs)} runs are not one"
        assert self._starts[0] == 0
        return self._runs[0][1]


_BUFFER_BYTES = 4 << 20

DAMAGE = (
    *(OSError, zipfile.BadZipFile, ValueError, NotImplementedError),
    *(RuntimeError, EOFError, OverflowError, struct.error),
)
"""Errors that reading a damaged archive may raise."""

WRITE_ERRORS = (OSError, RuntimeError)
"""Errors of a write to a full or broken disk; torch reports them as RuntimeError."""


def directory_digest(path: Path) -> str | None:
    """Return the xxh3-128 of an archive's directory, or None for a file that is not an archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            start = archive.start_dir
        with path.open("rb") as file:
            file.seek(start)
            return xxhash.xxh3_128(file.read()).hexdigest()
    except DAMAGE:
        return None


def check_crcs(path: Path) -> None:
    """Read an archive and compare every entry with its CRC-32.

    Raises:
        CheckpointError: An entry is not what was written, or the file is not an archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:  # a few bytes of such could stand for any number
                    raise zipfile.BadZipFile(f"entry {shown(info.filename)} is compressed; torch.save compresses none")
                with archive.open(info) as entry:
                    while entry.read(_BUFFER_BYTES):
                        pass  # the check is made when the end is read
    except DAMAGE as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None
