"""How a family names its tensors: the vocabulary in which families describe their layers.

The same table says how tensor-parallel ranks share a layer. Values are cut, keys are not: state columns are independent
of each other, so a rank that holds some value channels needs the keys of their head and nothing of other ranks. As long
as there are heads for every rank, each gets whole ones; a merged head is cut along its values, and its keys are on all
of its ranks. What the ranks still have to add up are the sums of squares of a norm whose channels they share, and the
outputs of matrices that are cut along their inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from statex_dist.errors import ConfigError
from statex_dist.state.geometry import StateGeometry

GAIN_NAME = "feature_gain"
"""The gains of a ``grow_features`` layer, below its mixer's name (ours; public checkpoints have none)."""


@dataclass(frozen=True, slots=True)
class Units:
    """The units that stay whole when tensor-parallel ranks share an axis, or one part of it.

    Where the number of ranks divides that of units, each rank gets the same number of whole units, in order. Where the
    number of units divides that of ranks, each unit belongs to the same number of consecutive ranks. They hold all of
    it, or cut it if it is ``divisible``.

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


class Part(NamedTuple):
    """A tensor of a model's files that is a tensor of memory, or a stretch of one: its elements are in order there."""

    name: str
    shape: tuple[int, ...]


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
class HeldHeads:
    """The heads of a layer that are in this process: all of them, or what one tensor-parallel rank holds.

    Attributes:
        total: Value heads of the layer, on all ranks together.
        keys: Heads (or groups of heads) with queries and keys here.
        decays: Value heads whose decays, steps and strengths are here.
        values: Value heads here.
        first: The first of those, counted from 0 among all.
        key_dim: Key channels of a head that projections make.
        value_dim: Value channels of a head that are here: all, or a piece.
        ranks_per_head: Ranks in a row that cut one head along its values; 1 where heads are whole.
        partners: Value heads that each head's state stores (the ``r`` of a mixed layer, else 1).
        key_range: The key channels here, ``(start, stop)`` among those of the layer.
    """

    total: int
    keys: int
    decays: int
    values: int
    first: int
    key_dim: int
    value_dim: int
    ranks_per_head: int
    partners: int
    key_range: tuple[int, int]

    @classmethod
    def of(cls, geometry: StateGeometry, *, tp: int = 1, rank: int = 0) -> HeldHeads:
        """Return what one of ``tp`` ranks holds of a layer with this state; they must be able to share it."""
        units = layer_units(geometry)

        def held(units: Units, count: int, size: int) -> tuple[int, int]:
            found = units.held(count * size, tp, rank)
            assert found is not None, (geometry, tp)
            return found

        keys = held(units.keys, geometry.num_key_groups, geometry.projected_key_dim)
        decays = held(units.heads, geometry.num_heads, 1)
        start, stop = held(units.values, geometry.num_heads, geometry.value_dim)
        values = max((stop - start) // geometry.value_dim, 1)
        return cls(
            total=geometry.num_heads,
            keys=(keys[1] - keys[0]) // geometry.projected_key_dim,
            decays=decays[1] - decays[0],
            values=values,
            first=start // geometry.value_dim,
            key_dim=geometry.projected_key_dim,
            value_dim=(stop - start) // values,
            ranks_per_head=max(tp // geometry.num_heads, 1),
            partners=geometry.values_per_key,
            key_range=keys,
        )

    @property
    def key_channels(self) -> slice:
        """The key channels here, among those of the layer."""
        return slice(*self.key_range)

    @property
    def all_here(self) -> bool:
        """Whether this process has all of the layer."""
        return self.values == self.total and self.ranks_per_head == 1

    @property
    def whole_states(self) -> bool:
        """Whether the state of every head is in one process, with all of its value columns."""
        return self.all_here or (self.ranks_per_head == 1 and self.partners == 1)


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
        role: What an optimizer may treat apart: ``mix``, a mixing matrix, or ``gain``, gains of features.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...] = ()
    blocks: int = 1
    decay: bool = True
    trunk: bool = True
    axis: int = 0
    units: tuple[Units, ...] = ()
    role: Literal["mix", "gain"] | None = None

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


def expansion_tensors(geometry: StateGeometry, mixer: str) -> dict[str, TensorSpec]:
    """Return what an expansion adds to a mixer's own parameters: mixing matrix or gains of features, or nothing.

    Args:
        geometry: The layer's state under the plan.
        mixer: Name of the mixer in its layer.
    """
    if geometry.values_per_key > 1:
        shape = (geometry.num_heads, geometry.values_per_key)
        return {f"{mixer}.mix": TensorSpec(shape=shape, decay=False, role="mix")}
    if geometry.features is not None:
        shape = (geometry.num_key_groups, geometry.key_dim - geometry.projected_key_dim)
        units = (layer_units(geometry).keys,)
        return {f"{mixer}.{GAIN_NAME}": TensorSpec(shape=shape, decay=False, units=units, role="gain")}
    return {}


def shard_ranges(spec: TensorSpec, name: str, tp: int, rank: int) -> tuple[tuple[int, int], ...]:
    """Return the ranges ``(start, stop)`` along ``spec.axis`` that a rank holds, in order, neighbours joined.

    Args:
        spec: The tensor.
        name: Its name, for the error.
        tp: Number of tensor-parallel ranks.
        rank: One of them, from 0.

    Raises:
        ConfigError: This number of ranks cannot share the tensor.
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
    ranges: list[tuple[int, int]] = []
    for _, start, stop in _pieces(spec, held):
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return tuple(ranges)


def rows_by_part(spec: TensorSpec, tp: int, rank: int) -> list[int]:
    """Return the rows of a rank's share of a tensor in blocks, in another order: all of the first part first."""
    held = spec.held_parts(tp, rank)
    assert held is not None, (spec, tp)
    by_part: list[list[int]] = [[] for _ in spec.parts]
    position = 0
    for part, start, stop in _pieces(spec, held):
        by_part[part] += range(position, position + stop - start)
        position += stop - start
    return [row for rows in by_part for row in rows]


def _pieces(spec: TensorSpec, held: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yield ``(part, start, stop)`` along the axis for each block of each part that a rank holds something of."""
    sizes = [rows for _, rows in spec.parts] or [spec.shape[spec.axis]]
    offset = 0
    for block in range(spec.blocks):
        for part, (size, (first, last)) in enumerate(zip(sizes, held, strict=True)):
            start = offset + max(first - block * size, 0)
            stop = offset + min(last - block * size, size)
            if start < stop:
                yield part, start, stop
            offset += size


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
