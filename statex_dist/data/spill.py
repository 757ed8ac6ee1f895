"""Tokenised documents on their way from the workers to the shards: one pair of append-only files for each process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class UnitResult:
    """Where the documents of a work unit lie, and what was left out of it.

    Attributes:
        path: The spill file of the tokens; that of the masks is ``path + "m"``.
        tokens_at: First byte of the unit's tokens.
        masks_at: First byte of its masks; ``None`` where no document of the unit has one.
        lengths: ``[documents]`` int64, tokens of each document.
        short: Documents left out because they were too short.
        undecodable: A message for each file left out because it is not UTF-8.
    """

    path: str
    tokens_at: int
    masks_at: int | None
    lengths: np.ndarray
    short: int
    undecodable: list[str]


def append(path: str, arrays: list[np.ndarray]) -> int:
    """Append ``arrays`` to the file at ``path`` and return the byte at which they begin."""
    with Path(path).open("ab") as file:
        at = file.tell()
        file.writelines(array.data for array in arrays)
    return at


class Spill:
    """Random access to the documents of all units, in input order, through memory maps.

    Args:
        results: The units' results, in order.
        dtype: Type of the tokens.
        limit: Documents taken from the front; ``None`` for all.

    Attributes:
        lengths: ``[documents]`` int64, tokens of each document.
        has_masks: Whether some document has a loss mask.
    """

    def __init__(self, results: list[UnitResult], dtype: str, limit: int | None):
        self._dtype = np.dtype(dtype)
        self._results = results
        lengths = [result.lengths for result in results]
        self.lengths = np.concatenate([*lengths, np.zeros(0, np.int64)])[:limit]
        self._unit = np.repeat(np.arange(len(results)), [len(part) for part in lengths])[:limit]
        # First token of each document in its unit, counted in tokens.
        self._begin = np.concatenate([*(np.cumsum(part) - part for part in lengths), np.zeros(0, np.int64)])[:limit]
        self.has_masks = any(results[unit].masks_at is not None for unit in np.unique(self._unit))
        self._maps: dict[str, np.memmap] = {}

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the tokens ``[n]`` and the mask ``[n]`` (or ``None``) of document ``i``."""
        result = self._results[int(self._unit[i])]
        n, begin = int(self.lengths[i]), int(self._begin[i])
        at = result.tokens_at + begin * self._dtype.itemsize
        tokens = np.frombuffer(self._map(result.path), self._dtype, n, at)
        if result.masks_at is None:
            return tokens, None
        return tokens, np.frombuffer(self._map(result.path + "m"), np.uint8, n, result.masks_at + begin)

    def _map(self, path: str) -> np.memmap:
        if path not in self._maps:
            self._maps[path] = np.memmap(path, np.uint8, mode="r")
        return self._maps[path]
