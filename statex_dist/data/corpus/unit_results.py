"""Which units are done, and whether they are enough."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from statex_dist.data.corpus.documents import Unit
from statex_dist.data.corpus.records import LISTED, BadRecordError, ReadReport
from statex_dist.data.corpus.row_parser import mixed
from statex_dist.data.corpus.tokenize_unit import UnitJob
from statex_dist.data.corpus.unit_files import UnitResult, load_result
from statex_dist.errors import DataError


class BadRecordNames:
    """Names the bad records of units, which are given in input order, by file and line or row."""

    def __init__(self) -> None:
        self._file, self._end, self._lines = "", 0, 0

    def of(self, unit: Unit, reading: ReadReport) -> list[str]:
        """Return a line for each bad record that ``reading`` lists.

        A unit of lines that does not follow the one before, as in a part, has its lines counted from where it begins.
        """
        follows = not unit.begin or (unit.paths[0] == self._file and unit.begin == self._end)
        before = self._lines if follows and unit.begin else 0
        behind = "" if follows else f" behind byte {unit.begin}"
        # A break in the row stays one up to the file's end.
        self._file, self._end = (unit.paths[0] if follows else ""), unit.end
        self._lines = before + reading.lines
        return [
            str(BadRecordError(f"{place}{f':{before + line}{behind}' * (line > 0)}: {reason}"))
            for place, line, reason in reading.listed
        ]


class UnitResults:
    """Results of units that finish in any order; knows when the first ones hold enough documents.

    Args:
        units: What they read.
        limit: Documents that are enough; ``None`` for those of all units.

    Attributes:
        before: Units taken that an earlier run had done.
        rows: For ``"text"`` and ``"tokens"``: the number of files, the names of the first, the columns that were read.
    """

    def __init__(self, units: Sequence[Unit], limit: int | None):
        self.before = 0
        self.rows: dict[str, Any] = {}
        self._last = ("", "")
        self._found: list[UnitResult | None] = [None] * len(units)
        self._units = units
        self._limit = limit
        self._next = self._documents = 0

    def add(self, i: int, result: UnitResult) -> None:
        """Take the result of unit ``i``.

        Raises:
            DataError: A file has rows of both kinds.
        """
        self._found[i] = result
        while not self.enough and (following := self._found[self._next]) is not None:
            self._documents += len(following.lengths)
            if following.reading.kind:
                self._take_kind(self._units[self._next], following.reading)
            self._next += 1

    def _take_kind(self, unit: Unit, reading: ReadReport) -> None:
        """Record the kind of a unit's rows; units of one file follow each other."""
        file, kind = unit.paths[0], reading.kind
        if file == self._last[0] and kind != self._last[1]:
            raise DataError(f"{file}: rows have {mixed(self._last[1], kind)}")
        found = self.rows.setdefault(kind, {"files": 0, "names": [], "columns": []})
        if file != self._last[0]:
            found["files"] += len(unit.paths)
            found["names"] += unit.paths[: max(0, LISTED - len(found["names"]))]
        found["columns"] = sorted({*found["columns"], *reading.columns})
        self._last = file, kind

    @property
    def enough(self) -> bool:
        """Whether the first units are there that hold enough documents."""
        return self._next == len(self._found) or (self._limit is not None and self._documents >= self._limit)

    @property
    def missing(self) -> int:
        """How many units are not there, and may be needed."""
        return 0 if self.enough else self._found[self._next :].count(None)

    def bad_records(self) -> list[str]:
        """Return the first :data:`LISTED` bad records of the units taken, named."""
        names = BadRecordNames()
        found = (
            name
            for unit, result in zip(self._units, self.taken(), strict=False)
            for name in names.of(unit, result.reading)
        )
        return list(islice(found, LISTED))

    def taken(self, begin: int = 0) -> list[UnitResult]:
        """Return the results of the first units, up to enough documents, from unit ``begin`` on."""
        return [result for result in self._found[begin : self._next] if result is not None]


def finished_units(jobs: Sequence[UnitJob], dtype: str, limit: int | None) -> tuple[UnitResults, list[int]]:
    """Return the results that lie in the work directory, and which units have none."""
    results = UnitResults([job.unit for job in jobs], limit)
    missing = []
    for i, job in enumerate(jobs):
        result = load_result(job.base, dtype)
        if result is None:
            missing.append(i)
        else:
            results.add(i, result)
            results.before += 1
    return results, missing
