"""How a family names its tensors: the vocabulary in which ``models/<family>/layout.py`` is written.

The same table says how tensor-parallel ranks share a layer. Values are cut, keys are not: state columns are independent
of each other, so a rank that holds some value channels needs the keys of their head and nothing of other ranks. As long
as there are heads for every rank, each gets whole ones; a merged head is cut along its values, and its keys are on all
of its ranks. What the ranks still have to add up are the sums of squares of a norm whose channels they share, and the
outputs of matrices that are cut along their inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from statex_dist.errors import ConfigError
from statex_dist.state.geometry import StateGeometry


@dataclass(frozen=True, slots=True)
class Units:
    """What stays together when tensor-parallel ranks share an axis, or one part of it.

    Where the ranks divide the units, each gets as many whole ones, in order. Where the units divide the ranks, each
    unit belongs to as many ranks in a row; they hold all of it, or cut it if it is ``divisible``.

    Attributes:
        count: Number of units (heads, groups, channels), all of one size; one that is not divisible is on every rank.
        divisible: Whether the ranks of one unit cut it (the values of a head) and do not all hold it (its keys).
        shared: Whether the axis is that of a single unit, which all units have in common (the norm weight of a head).
        optional: Whether every rank holds everything where the ranks do not divide the units (the vocabulary).
    """

    count: int
    divisible: bool = False
    shared: bool = False
    optional: bool = False

    def held(self, size: int, tp: int, rank: int) -> tuple[int, int] | None:
        """Return the range of ``size`` elements that a rank holds, or None where ``tp`` ranks cannot share them."""
        if self.count % tp == 0:
            return (0, size) if self.shared else (rank * size // tp, (rank + 1) * size // tp)
        if self.optional:
            return 0, size
        ranks, rest = divmod(tp, self.count)
        pieces = ranks if self.divisible else 1
        unit = size if self.shared else size // self.count
        if rest or unit % pieces:
            return None
        start = 0 if self.shared else rank // ranks * unit
        piece = unit // pieces
        start += rank % pieces * piece
        return start, start + piece


class LayerUnits(NamedTuple):
    """How the ranks share what belongs to the heads of a layer.

    Attributes:
        keys: Queries, keys and what decays them, where there is one for each group of heads.
        heads: The same where each (value) head has its own: steps, strengths, decays.
        values: Values, output gates, outputs.
        norm: The weight of an output norm over a head, which all heads share.
    """

    keys: Units
    heads: Units
    values: Units
    norm: Units


def layer_units(geometry: StateGeometry) -> LayerUnits:
    """Return how the ranks share a layer with this state.

    Where a layer mixes heads, an output head reads its own values with the keys of other heads: keys are on every rank.
    """
    mixes = geometry.values_per_key > 1
    return LayerUnits(
        keys=Units(1 if mixes else geometry.num_key_groups),
        heads=Units(1 if mixes else geometry.num_heads),
        values=Units(geometry.num_heads, divisible=True),
        norm=Units(geometry.num_heads, divisible=True, shared=True),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Shape of one tensor, the parts that its rows are a concatenation of, and how tensor-parallel ranks share it.

    Attributes:
        shape: Full shape.
        parts: ``(name, rows)`` of each part along axis 0, in order; empty for a tensor of one piece.
        blocks: How many times the parts come, one after the other.
        decay: Whether AdamW's weight decay applies (matrices yes; norms, biases, convolutions and dynamics no).
        trunk: Whether the matrix multiplies every token (embedding tables do not), for FLOP counts.
        axis: The axis that ranks share: 0 for outputs, 1 for a matrix whose inputs they share and outputs they add up.
        units: What stays together, for each part (all its blocks read as one), or for the one piece; empty for a
            tensor that every rank holds.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...] = ()
    blocks: int = 1
    decay: bool = True
    trunk: bool = True
    axis: int = 0
    units: tuple[Units, ...] = ()

    def __post_init__(self) -> None:
        assert not self.parts or self.blocks * sum(rows for _, rows in self.parts) == self.shape[0], self
        assert self.axis == 0 or (self.units and not self.parts), self
        assert len(self.units) in (0, len(self.parts) or 1), self
        for size, units in zip(self._part_sizes, self.units, strict=False):
            assert units.shared or size % units.count == 0, self

    @property
    def _part_sizes(self) -> list[int]:
        """Elements of each part along the axis, those of all blocks together."""
        return [self.blocks * rows for _, rows in self.parts] or [self.shape[self.axis]]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def held_parts(self, tp: int, rank: int) -> list[tuple[int, int]] | None:
        """Return the range of each part (its blocks read as one) that a rank holds, or None if they cannot share."""
        ranges = []
        for size, units in zip(self._part_sizes, self.units or [Units(1)] * len(self._part_sizes), strict=True):
            held = units.held(size, tp, rank)
            # Inputs that two ranks hold would be counted twice when the outputs are added up.
            twice = self.axis == 1 and not units.divisible and units.count % tp
            if held is None or twice:
                return None
            ranges.append(held)
        return ranges


def shard_ranges(spec: TensorSpec, name: str, tp: int, rank: int) -> tuple[tuple[int, int], ...]:
    """Return the ranges ``(start, stop)`` along ``spec.axis`` that a rank holds, in order, neighbours joined.

    Args:
        spec: The tensor.
        name: Its name, for the error.
        tp: Number of tensor-parallel ranks.
        rank: One of them, from 0.

    Raises:
        ConfigError: So many ranks cannot share the tensor.
    """
    assert 0 <= rank < tp, (rank, tp)
    held = spec.held_parts(tp, rank)
    if held is None:
        counts = " + ".join(str(units.count) for units in spec.units)
        possible = [n for n in range(1, min(2 * tp, 64) + 1) if spec.held_parts(n, 0) is not None]
        raise ConfigError(
            f"{name}: {tp} tensor-parallel ranks cannot share axis {spec.axis} of {list(spec.shape)}, which consists "
            f"of {counts} heads, groups or channels; possible numbers of ranks: {', '.join(map(str, possible))}"
        )
    sizes = [rows for _, rows in spec.parts] or [spec.shape[spec.axis]]
    return _rows_of_blocks(held, sizes, spec.blocks)


def _rows_of_blocks(held: Sequence[tuple[int, int]], sizes: Sequence[int], blocks: int) -> tuple[tuple[int, int], ...]:
    """Return where ranges of parts lie in a tensor of ``blocks`` rounds of the parts, each of ``sizes`` elements."""
    ranges: list[tuple[int, int]] = []
    offset = 0
    for block in range(blocks):
        for size, (first, last) in zip(sizes, held, strict=True):
            start = offset + max(first - block * size, 0)
            stop = offset + min(last - block * size, size)
            if ranges and start < stop and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            elif start < stop:
                ranges.append((start, stop))
            offset += size
    return tuple(ranges)


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """Where a family keeps what every language model has.

    Attributes:
        trunk: Attribute that holds embeddings, layers and final norm (``model`` or ``backbone``).
        final_norm: Name of the final norm inside the trunk.
        embedding: Name of the embedding table inside the trunk.
    """

    trunk: str
    final_norm: str
    embedding: str = "embeddings"

    @property
    def embeddings(self) -> str:
        """Full name of the embedding table's tensor."""
        return f"{self.trunk}.{self.embedding}.weight"

    @property
    def head(self) -> str:
        """Name of the output head's matrix."""
        return "lm_head.weight"

    def layer(self, index: int) -> str:
        """Return the prefix of a layer's tensors."""
        return f"{self.trunk}.layers.{index}."

    @property
    def behind_layers(self) -> tuple[str, str]:
        """Names of the tensors that a model has behind its layers, in order."""
        return f"{self.trunk}.{self.final_norm}.weight", self.head

    def split(self, name: str) -> tuple[int, str] | None:
        """Return ``(layer, suffix)`` of a layer's tensor, or None for a tensor outside the layers."""
        match = re.match(rf"{self.trunk}\.layers\.(\d+)\.(.+)$", name)
        return (int(match[1]), match[2]) if match else None

    def outside_layers(self, *, vocab_size: int, hidden_size: int, tied: bool) -> dict[str, TensorSpec]:
        """Return the specs of embeddings, final norm and (unless tied) head.

        Tensor-parallel ranks share the vocabulary where they divide it; else each holds it whole.
        """
        norm, head = self.behind_layers
        vocabulary = (Units(vocab_size, optional=True),)
        specs = {
            self.embeddings: TensorSpec(shape=(vocab_size, hidden_size), trunk=tied, units=vocabulary),
            norm: TensorSpec(shape=(hidden_size,), decay=False),
        }
        if not tied:
            specs[head] = TensorSpec(shape=(vocab_size, hidden_size), units=vocabulary)
        return specs
