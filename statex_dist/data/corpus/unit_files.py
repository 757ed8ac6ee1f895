"""Tokenised documents on their way from the workers to the shards: a few files for each finished work unit.

``NAME.tokens`` holds the tokens of all documents of a unit, ``NAME.masks`` their masks where one document has one, and
``NAME.done`` the lengths and the counts of omitted documents. Each is written under a temporary name, flushed and
renamed, ``.done`` last. If ``.done`` exists, the unit is complete, whatever happened to the process afterwards.
"""

from __future__ import annotations

import array
import json
import logging
import os
import socket
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from statex_dist.checkpoint.formats.raw_io import allow_open_files
from statex_dist.checkpoint.json_file import parse_json
from statex_dist.data.corpus.documents import WorkUnit
from statex_dist.data.corpus.records import ReadReport
from statex_dist.durable.files import rename_durably

log = logging.getLogger(__name__)

DONE_SUFFIX = ".done"
_BUFFER_BYTES = 1 << 20
_MAX_MAPS = 16384


@dataclass(frozen=True, slots=True)
class UnitJob:
    """A unit to tokenise.

    Attributes:
        unit: What to read.
        facts: Size and modification time of each of its files when the run began.
        base: Path of the result's files, without their suffixes.
    """

    unit: WorkUnit
    facts: tuple[tuple[int, int], ...]
    base: str


@dataclass(frozen=True, slots=True)
class UnitResult:
    """The documents of a finished work unit, and the counts of those that it omits.

    Attributes:
        base: Path of the unit's files, without their suffixes.
        lengths: ``[documents]`` int64, tokens of each document.
        has_masks: Whether some document has a loss mask.
        short: Documents left out because they were too short.
        long: Documents left out because they were too long.
        reading: The reader's report.
        marked: ``[n]`` int64, ascending: which documents hold a marker of a special token in their text.
        marker: The first record with such a marker, and the marker; empty if there is none, or the process that made
            the unit had named one before.
    """

    base: str
    lengths: np.ndarray
    has_masks: bool
    short: int
    long: int
    reading: ReadReport
    marked: np.ndarray
    marker: str = ""


class UnitWriter:
    """Writes the files of one unit, a document at a time; memory holds lengths only."""

    def __init__(self, base: str, dtype: str):
        self._base = base
        self._dtype = np.dtype(dtype)
        self._temporary = f".tmp-{socket.gethostname()}-{os.getpid()}"
        self._lengths = array.array("q")
        self._marked = array.array("q")
        self._total = 0
        self._tokens = self._open(".tokens")
        self._masks: BinaryIO | None = None

    def write(
        self,
        tokens: np.ndarray,
        mask: np.ndarray | None,
        end: int | None,
        *,
        begin: int | None = None,
        marked: bool = False,
    ) -> None:
        """Append a document.

        Args:
            tokens: ``[n]`` ids.
            mask: ``[n]`` of 0 and 1, or ``None`` for ones.
            end: One more id behind them, with mask 0 where there is a mask; ``None`` for none.
            begin: The same in front of them.
            marked: Whether the text holds a marker of a special token.
        """
        length = len(tokens) + (begin is not None) + (end is not None)
        if marked:
            self._marked.append(len(self._lengths))
        if mask is not None and self._masks is None:
            self._masks = self._open(".masks")
            self._ones(self._total)
        if begin is not None:
            self._tokens.write(self._dtype.type(begin).tobytes())
        self._tokens.write(np.ascontiguousarray(tokens, self._dtype).data)
        if end is not None:
            self._tokens.write(self._dtype.type(end).tobytes())
        if mask is not None and self._masks is not None:
            if begin is not None:
                self._masks.write(b"\x00")
            self._masks.write(np.ascontiguousarray(mask, np.uint8).data)
            if end is not None:
                self._masks.write(b"\x00")
        elif self._masks is not None:
            self._ones(length)
        self._lengths.append(length)
        self._total += length

    def finish(self, *, short: int, long: int, reading: ReadReport, marker: str = "") -> UnitResult:
        """Make the files durable under their names and return the unit's result."""
        lengths, marked = (np.array(values, np.int64) for values in (self._lengths, self._marked))
        result = UnitResult(self._base, lengths, self._masks is not None, short, long, reading, marked, marker)
        if self._masks is not None:
            self._place(self._masks, ".masks")
        self._place(self._tokens, ".tokens")
        done = self._open(DONE_SUFFIX)
        facts = {"has_masks": result.has_masks, "short": short, "long": long, "reading": reading.as_dict()}
        text = json.dumps({**facts, "marker": marker})
        np.savez(done, lengths=lengths, marked=marked, facts=np.array(text))
        self._place(done, DONE_SUFFIX)
        return result

    def abort(self) -> None:
        """Remove what was written."""
        for file in (self._tokens, self._masks):
            if file is not None:
                file.close()
        for suffix in (".tokens", ".masks"):
            Path(self._base + suffix + self._temporary).unlink(missing_ok=True)

    def _open(self, suffix: str) -> BinaryIO:
        return Path(self._base + suffix + self._temporary).open("wb", buffering=_BUFFER_BYTES)

    def _ones(self, count: int) -> None:
        assert self._masks is not None
        while count > 0:
            size = min(count, _BUFFER_BYTES)
            self._masks.write(b"\x01" * size)
            count -= size

    def _place(self, file: BinaryIO, suffix: str) -> None:
        file.close()
        rename_durably(Path(self._base + suffix + self._temporary), Path(self._base + suffix))


def load_result(base: str, dtype: str) -> UnitResult | None:
    """Return the result of the unit at ``base``; ``None`` where it is not finished, or its files are not whole."""
    try:
        with np.load(base + DONE_SUFFIX, allow_pickle=False) as done:
            lengths, marked, facts = done["lengths"], done["marked"], parse_json(str(done["facts"]))
        total = int(lengths.sum())
        if Path(base + ".tokens").stat().st_size != total * np.dtype(dtype).itemsize:
            return None
        if facts["has_masks"] and Path(base + ".masks").stat().st_size != total:
            return None
        reading = ReadReport(**facts.pop("reading"))
        return UnitResult(base=base, lengths=lengths, reading=reading, marked=marked, **facts)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


class UnitDocuments:
    """Random access to the documents of all units, in input order, through memory maps.

    Attributes:
        lengths: ``[documents]`` int64, tokens of each document.
        has_masks: Whether some document has a loss mask.
        marked: How many documents hold a marker of a special token in their text.
    """

    def __init__(self, results: list[UnitResult], dtype: str, limit: int | None):
        self._dtype = np.dtype(dtype)
        self._results = results
        lengths = [result.lengths for result in results]
        self.lengths = np.concatenate([*lengths, np.zeros(0, np.int64)])[:limit]
        self._unit = np.repeat(np.arange(len(results)), [len(part) for part in lengths])[:limit]
        # First token of each document in its unit, counted in tokens.
        self._begin = np.concatenate([*(np.cumsum(part) - part for part in lengths), np.zeros(0, np.int64)])[:limit]
        self.has_masks = any(results[unit].has_masks for unit in np.unique(self._unit))
        before, self.marked = 0, 0
        for result in results:
            self.marked += int((result.marked + before < len(self.lengths)).sum())
            before += len(result.lengths)
        self._maps: OrderedDict[str, np.memmap] = OrderedDict()
        wanted = min(2 * len(results), _MAX_MAPS)
        self._max_maps = max(1, min(wanted, allow_open_files(2 * wanted) // 2))

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the tokens ``[n]`` and the mask ``[n]`` (or ``None``) of document ``i``."""
        result = self._results[int(self._unit[i])]
        n, begin = int(self.lengths[i]), int(self._begin[i])
        tokens = np.frombuffer(self._map(result.base + ".tokens"), self._dtype, n, begin * self._dtype.itemsize)
        if not result.has_masks:
            return tokens, None
        return tokens, np.frombuffer(self._map(result.base + ".masks"), np.uint8, n, begin)

    def _map(self, path: str) -> np.memmap:
        if path in self._maps:
            self._maps.move_to_end(path)
            return self._maps[path]
        if len(self._maps) >= self._max_maps:
            self._maps.popitem(last=False)
        self._maps[path] = np.memmap(path, np.uint8, mode="r")
        return self._maps[path]
