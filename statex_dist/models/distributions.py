"""Where new values come from: distributions as plain data, drawn with numpy.

An expansion *describes* its new values (:mod:`statex_dist.models.row_mapping`), so that a report can name them, a
verifier can draw them again and nothing heavier than numpy is imported to write them. Each block of new values has a
generator of its own, fixed by the plan's seed and the tensor's name: shards, workers and the size of the write buffer
do not matter. Values are drawn in fp32, so that every dtype rounds the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


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
