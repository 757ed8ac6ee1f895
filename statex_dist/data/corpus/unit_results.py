"""Which units are done, and whether they are enough."""

from __future__ import annotations

from collections.abc import Sequence

from statex_dist.data.corpus.spill import UnitResult, load_result
from statex_dist.data.corpus.tokenize_unit import UnitJob


class UnitResults:
    """Results of units that finish in any order; knows when the first ones hold enough documents.

    Args:
        units: How many there are.
        limit: Documents that are enough; ``None`` for those of all units.

    Attributes:
        before: Units taken that an earlier run had done.
    """

    def __init__(self, units: int, limit: int | None):
        self.before = 0
        self._found: list[UnitResult | None] = [None] * units
        self._limit = limit
        self._next = self._documents = 0

    def add(self, i: int, result: UnitResult) -> None:
        """Take the result of unit ``i``."""
        self._found[i] = result
        while not self.enough and (following := self._found[self._next]) is not None:
            self._documents += len(following.lengths)
            self._next += 1

    @property
    def enough(self) -> bool:
        """Whether the first units are there that hold enough documents."""
        return self._next == len(self._found) or (self._limit is not None and self._documents >= self._limit)

    @property
    def missing(self) -> int:
        """How many units are not there, and may be needed."""
        return 0 if self.enough else self._found[self._next :].count(None)

    def taken(self) -> list[UnitResult]:
        """Return the results of the first units, up to enough documents."""
        return [result for result in self._found[: self._next] if result is not None]


def finished_units(jobs: Sequence[UnitJob], dtype: str, limit: int | None) -> tuple[UnitResults, list[int]]:
    """Return the results that lie in the work directory, and which units have none."""
    results = UnitResults(len(jobs), limit)
    missing = []
    for i, job in enumerate(jobs):
        result = load_result(job.base, dtype)
        if result is None:
            missing.append(i)
        else:
            results.add(i, result)
            results.before += 1
    return results, missing
