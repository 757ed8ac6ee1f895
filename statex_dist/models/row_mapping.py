"""The effect of an expansion on each tensor of a layer: the types with which families describe it, and shared rules.

A row mapping is a list of blocks of rows (axis 0): rows *kept* from the original tensor, or *fresh* rows from a
distribution. It is data, not code, so that one description serves every user: the offline tool copies kept rows as byte
ranges from file to file, the in-memory path concatenates tensors, the report writes the blocks down, and ``statex
verify`` holds a checkpoint to them.

New values come from distributions, plain data too, which numpy draws. Each block of new values has a generator of its
own, fixed by the plan's seed and the tensor's name: shards, workers and the size of the write buffer do not matter.
Values are drawn in fp32, so that every dtype rounds the same numbers.

Two expansions are the same in most families. *merge_heads* is StateX's (arXiv 2509.22630): groups of heads are read as
one head. No projection changes its shape, because a head is only a way to read rows. *mix_heads* is ours
(docs/method.md, section 4): every key head also stores other heads' values, and a matrix M, which starts as the
identity, learns to read them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from statex_dist.models.layout import TensorSpec
from statex_dist.state.plan import LayerExpansion

Change = Literal["kept", "grown", "reinitialised", "new"]


def generator_for(seed: int, name: str) -> np.random.Generator:
    """Return a generator whose stream is fixed by ``seed`` and ``name``."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


def _each(values: Iterable[float], function: Callable[[float], float]) -> np.ndarray:
    """Return a function of each value, computed in double precision and rounded to fp32.

    numpy's own logarithms and exponentials take other instructions on other processors and may differ in the last bit;
    these tensors have a number per head, so a loop costs nothing.
    """
    return np.array([function(float(value)) for value in values], dtype=np.float64).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Constant:
    """The same value everywhere."""

    value: float

    def draw(self, rng: np.random.Generator, start: int, count: int) -> np.ndarray:
        """Return ``[count]`` fp32 values from element ``start`` on; every distribution has this method."""
        return np.full(count, self.value, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Normal:
    """N(0, std^2)."""

    std: float

    def draw(self, rng: np.random.Generator, start: int, count: int) -> np.ndarray:
        """Return the next ``[count]`` values."""
        values = rng.standard_normal(count, dtype=np.float32)
        values *= np.float32(self.std)
        return values


@dataclass(frozen=True, slots=True)
class Uniform:
    """Uniform in ``[-bound, bound)``."""

    bound: float

    def draw(self, rng: np.random.Generator, start: int, count: int) -> np.ndarray:
        """Return the next ``[count]`` values."""
        values = rng.random(count, dtype=np.float32)
        values *= np.float32(2 * self.bound)
        values -= np.float32(self.bound)
        return values


@dataclass(frozen=True, slots=True)
class LogUniform:
    """The logarithm of values uniform in ``[low, high)``: decay rates ``A_log`` of Gated DeltaNet and KDA."""

    low: float
    high: float

    def draw(self, rng: np.random.Generator, start: int, count: int) -> np.ndarray:
        """Return the next ``[count]`` values."""
        values = self.low + rng.random(count, dtype=np.float32).astype(np.float64) * (self.high - self.low)
        return _each(values, lambda value: math.log(max(value, 1e-6)))


@dataclass(frozen=True, slots=True)
class LogCount:
    """``log(1), log(2), ..., log(n)``: Mamba2's decay rates ``A_log``, one per head."""

    def draw(self, rng: np.random.Generator, start: int, count: int) -> np.ndarray:
        """Return ``[count]`` values from the ``start``-th on."""
        return _each(range(start + 1, start + count + 1), math.log)


@dataclass(frozen=True, slots=True)
class TimeStep:
    """The inverse softplus of steps that are log-uniform in ``[low, high]`` and at least ``floor`` (``dt_bias``)."""

    low: float
    high: float
    floor: float

    def draw(self, rng: np.random.Generator, start: int, count: int) -> np.ndarray:
        """Return the next ``[count]`` values."""
        low, high = math.log(self.low), math.log(self.high)

        def bias(share: float) -> float:
            step = max(math.exp(low + share * (high - low)), self.floor)
            return step + math.log(-math.expm1(-step))

        return _each(rng.random(count, dtype=np.float32), bias)


@dataclass(frozen=True, slots=True)
class FirstColumn:
    """1 in the first of ``columns`` columns, else 0: a mixing matrix that reads a head's own values alone."""

    columns: int

    def draw(self, rng: np.random.Generator, start: int, count: int) -> np.ndarray:
        """Return ``[count]`` values from element ``start`` on."""
        return (np.arange(start, start + count) % self.columns == 0).astype(np.float32)


Distribution = Constant | Normal | Uniform | LogUniform | LogCount | TimeStep | FirstColumn


def describe(distribution: Distribution) -> dict[str, Any]:
    """Return a distribution as plain JSON values."""
    return {"distribution": type(distribution).__name__, **asdict(distribution)}


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
class RowMapping:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMapping:
    """The effect of an expansion on one tensor of a model.

    Attributes:
        name: Full name.
        layer: The expanded layer.
        rows: Its rows.
        seed: Seed of its new rows.
    """

    name: str
    layer: int
    rows: RowMapping
    seed: int

    def draw(self, block: int, *, size: int) -> Iterator[np.ndarray]:
        """Yield the values of a block of new rows, flattened, in fp32 pieces of at most ``size`` elements.

        The values do not depend on ``size``: the generator belongs to the block.
        """
        fresh = self.rows.blocks[block]
        assert isinstance(fresh, Fresh)
        rng = generator_for(self.seed, f"{self.name}#{block}")
        total = fresh.rows * self.rows.row_numel
        for start in range(0, total, size):
            yield fresh.distribution.draw(rng, start, min(size, total - start))


def redrawn(shape: Sequence[int], distribution: Distribution, *, source_rows: int) -> RowMapping:
    """Return the mapping of a tensor of which no value is kept."""
    return RowMapping(shape=tuple(shape), blocks=(Fresh(shape[0], distribution),), source_rows=source_rows)


def added(shape: Sequence[int], distribution: Distribution) -> RowMapping:
    """Return the mapping of a tensor that the original layer has not."""
    return RowMapping(shape=tuple(shape), blocks=(Fresh(shape[0], distribution),), source_rows=None)


def repeated(shape: Sequence[int], times: int) -> RowMapping:
    """Return the mapping of a tensor whose rows are repeated as a whole."""
    return RowMapping(shape=(shape[0] * times, *shape[1:]), blocks=(Keep(0, shape[0]),) * times, source_rows=shape[0])


def from_blocks(shape: Sequence[int], blocks: Iterable[Block]) -> RowMapping:
    """Return the mapping of ``blocks`` over an original of ``shape``; neighbouring blocks of one kind are joined."""
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
    return RowMapping(shape=(rows, *shape[1:]), blocks=tuple(joined), source_rows=shape[0])


def grown_groups(start: int, *, groups: int, rows: int, factor: int, new: Distribution | None) -> list[Block]:
    """Return blocks that put new rows behind the old ones of each group.

    Args:
        start: First row of the first group in the original tensor.
        groups: Number of groups, one behind the other.
        rows: Rows of a group in the original.
        factor: Growth factor of a group's rows.
        new: Distribution of the new rows; None makes them copies of the old ones.
    """
    blocks: list[Block] = []
    for group in range(groups):
        old = Keep(start + group * rows, start + (group + 1) * rows)
        blocks.append(old)
        blocks += [old] * (factor - 1) if new is None else [Fresh(rows * (factor - 1), new)]
    return blocks


def head_mappings(
    expansion: LayerExpansion,
    before: Mapping[str, TensorSpec],
    after: Mapping[str, TensorSpec],
    first_value: Callable[[str, tuple[int, ...]], Distribution],
    *,
    num_heads: int,
    mix: str,
    redrawn_names: Collection[str],
    norms: tuple[str, str],
    dynamics: Collection[str] = (),
) -> dict[str, RowMapping]:
    """Return what every family with heads does, by tensors' names without the layer's prefix.

    *mix_heads* adds a matrix ``M [num_heads, factor]``. Column 0 reads a head's own values, column ``s`` those of the
    head ``s`` places on (cyclically). ``lossless`` starts at the identity, other modes at ``1/sqrt(factor)``, StateX's
    merge expressed in M. Where the plan resets the dynamics, norms become 1: as in the authors' script the norm before
    the token mixing always, the output norm with the layer (``reinit``).

    Args:
        expansion: What is done to the layer.
        before: The original layer's tensors.
        after: The expanded layer's tensors.
        first_value: Returns a tensor's distribution in a fresh model.
        num_heads: Heads of the original layer.
        mix: Name of the mixing matrix.
        redrawn_names: Tensors that ``reinit`` draws again.
        norms: Names of the norm before the token mixing and of the output norm.
        dynamics: Further tensors that are drawn again where the plan resets the dynamics.
    """
    result = {}
    if expansion.op == "mix_heads":
        factor = expansion.factor
        start: Distribution = FirstColumn(factor) if expansion.init == "lossless" else Constant(factor**-0.5)
        result[mix] = added((num_heads, factor), start)
    names = dict.fromkeys(redrawn_names, first_value) if expansion.init == "reinit" else {}
    if expansion.reset_dynamics:
        names |= dict.fromkeys(dynamics, first_value)
        names |= dict.fromkeys(norms if expansion.init == "reinit" else norms[:1], _one)
    for name, first in names.items():
        shape = after[name].shape
        result[name] = redrawn(shape, first(name, shape), source_rows=before[name].shape[0])
    return result


def _one(name: str, shape: tuple[int, ...]) -> Distribution:
    return Constant(1.0)
