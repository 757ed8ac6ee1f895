"""Which units are done and whether they are enough, what was left out of them, and the names of their bad records."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from itertools import islice
from typing import Any

from statex_dist.data.corpus.documents import WorkUnit
from statex_dist.data.corpus.records import LISTED, BadRecordError, ReadReport
from statex_dist.data.corpus.rows import mixed
from statex_dist.data.corpus.unit_files import UnitJob, UnitResult, load_result
from statex_dist.errors import DataError

log = logging.getLogger(__name__)


class BadRecordNames:
    """Names the bad records of units, which are given in input order, by file and line or row."""

    def __init__(self) -> None:
        self._file, self._end, self._lines = "", 0, 0

    def of(self, unit: WorkUnit, reading: ReadReport) -> list[str]:
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

    def __init__(self, units: Sequence[WorkUnit], limit: int | None):
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

    def _take_kind(self, unit: WorkUnit, reading: ReadReport) -> None:
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

    def left_out(self) -> dict[str, int]:
        """Return how many documents of the units taken were left out, by reason."""
        results = self.taken()
        return {
            "short": sum(result.short for result in results),
            "long": sum(result.long for result in results),
            "filtered": sum(result.reading.filtered for result in results),
            "undecodable": sum(len(result.reading.undecodable) for result in results),
            "bad": sum(result.reading.bad for result in results),
        }

    def warn_of_joined(self) -> None:
        """Log how many rows of token ids hold several documents whose borders are not given."""
        if rows := sum(result.reading.joined for result in self.taken()):
            log.warning(
                "%d row%s of token ids with EOS before the end: each row is one document, whose state is not reset at "
                "EOS; give position_ids, seq_lengths or a numbered attention_mask to separate its documents",
                *(rows, "s" * (rows != 1)),
            )


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


class BadRecordLog:
    """Logs the bad records of units in input order, up to a bound.

    Args:
        units: All units.
        new: Those that are done now; the others' bad records were logged before.
    """

    def __init__(self, units: Sequence[WorkUnit], new: Collection[int]):
        self._units = units
        self._new = new
        self._names = BadRecordNames()
        self._next = self._logged = 0

    def follow(self, results: UnitResults) -> None:
        """Log those of the units taken, as far as they are not logged yet."""
        for result in results.taken(self._next):
            for name in self._names.of(self._units[self._next], result.reading):
                if self._next in self._new and self._logged < LISTED:
                    self._logged += 1
                    log.warning("left out: %s", name)
            self._next += 1
