"""How one tensor of an expanded layer is made: the vocabulary in which ``models/<family>/expand.py`` is written.

A recipe is a list of blocks of rows (axis 0): rows *kept* from the original tensor, or *fresh* rows from a
distribution. It is data, not code, so that one description serves every user: the offline tool copies kept rows as byte
ranges from file to file, the in-memory path concatenates tensors, the report writes the blocks down, and ``statex
verify`` holds a checkpoint to them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from statex_dist.models.distributions import Distribution, describe

Change = Literal["kept", "grown", "reinitialised", "new"]


@dataclass(frozen=True, slots=True)
class Keep:
    """Rows ``start .. stop`` of the original tensor."""

    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Fresh:
    """New rows."""

    rows: int
    distribution: Distribution


Block = Keep | Fresh


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One tensor of an expanded layer.

    Attributes:
        shape: Of the new tensor.
        blocks: Its rows, in order.
        source_rows: Rows of the original tensor; None for a tensor that the original layer has not.
    """

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    source_rows: int | None

    def __post_init__(self) -> None:
        rows = sum(block.rows for block in self.blocks)
        assert rows == self.shape[0], f"blocks of {rows} rows for shape {self.shape}"
        for block in self.blocks:
            if isinstance(block, Keep):
                assert self.source_rows is not None
                assert 0 <= block.start <= block.stop <= self.source_rows, self

    @property
    def row_numel(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])

    @property
    def change(self) -> Change:
        """What happens to the tensor, in a word."""
        if self.source_rows is None:
            return "new"
        if self.blocks == (Keep(0, self.source_rows),):
            return "kept"
        return "grown" if any(isinstance(block, Keep) for block in self.blocks) else "reinitialised"

    def to_list(self) -> list[dict[str, Any]]:
        """Return the blocks as plain JSON values: ``{"rows", "from"}`` or ``{"rows", "distribution", ...}``."""
        return [
            {"rows": b.rows, "from": [b.start, b.stop]}
            if isinstance(b, Keep)
            else {"rows": b.rows, **describe(b.distribution)}
            for b in self.blocks
        ]


def redrawn(shape: Sequence[int], distribution: Distribution, *, source_rows: int) -> Recipe:
    """Return the recipe of a tensor of which no value is kept."""
    return Recipe(shape=tuple(shape), blocks=(Fresh(shape[0], distribution),), source_rows=source_rows)


def added(shape: Sequence[int], distribution: Distribution) -> Recipe:
    """Return the recipe of a tensor that the original layer has not."""
    return Recipe(shape=tuple(shape), blocks=(Fresh(shape[0], distribution),), source_rows=None)


def repeated(shape: Sequence[int], times: int) -> Recipe:
    """Return the recipe of a tensor whose rows are repeated as a whole."""
    return Recipe(shape=(shape[0] * times, *shape[1:]), blocks=(Keep(0, shape[0]),) * times, source_rows=shape[0])


def from_blocks(shape: Sequence[int], blocks: Iterable[Block]) -> Recipe:
    """Return the recipe of ``blocks`` over an original of ``shape``; neighbouring blocks of one kind are joined."""
    joined: list[Block] = []
    for block in blocks:
        last = joined[-1] if joined else None
        if not block.rows:
            continue
        if isinstance(block, Keep) and isinstance(last, Keep) and last.stop == block.start:
            joined[-1] = Keep(last.start, block.stop)
        elif isinstance(block, Fresh) and isinstance(last, Fresh) and last.distribution == block.distribution:
            joined[-1] = Fresh(last.rows + block.rows, block.distribution)
        else:
            joined.append(block)
    rows = sum(block.rows for block in joined)
    return Recipe(shape=(rows, *shape[1:]), blocks=tuple(joined), source_rows=shape[0])


def grown_groups(start: int, *, groups: int, rows: int, factor: int, new: Distribution | None) -> list[Block]:
    """Return blocks that put new rows behind the old ones of each group.

    Args:
        start: First row of the first group in the original tensor.
        groups: Number of groups, one behind the other.
        rows: Rows of a group in the original.
        factor: How many times as many a group gets.
        new: Distribution of the new rows; None makes them copies of the old ones.
    """
    blocks: list[Block] = []
    for group in range(groups):
        old = Keep(start + group * rows, start + (group + 1) * rows)
        blocks.append(old)
        blocks += [old] * (factor - 1) if new is None else [Fresh(rows * (factor - 1), new)]
    return blocks
