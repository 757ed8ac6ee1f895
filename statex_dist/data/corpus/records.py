"""One document as an input holds it (text, or ids that are tokenised already), and the report of a reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from statex_dist.errors import DataError, bounded_line

LISTED = 100
"""Number of bad records that are named; the others are counted only."""


class BadRecordError(DataError):
    """One record is not a document; the records before and after it may be."""

    LARGER: ClassVar[str] = "allow more with --max-document-bytes"
    """Advice for a record that is too large."""


@dataclass(frozen=True, slots=True)
class Record:
    """A document as read: ``text``, or ``input_ids`` ``[n]`` int64 with an optional ``loss_mask`` ``[n]`` uint8.

    Ids are checked against the vocabulary where they are read, so that the message can name the place.
    """

    text: str | None = None
    input_ids: np.ndarray | None = None
    loss_mask: np.ndarray | None = None


Parse = Callable[[dict[str, Any]], list[Record]]
"""Makes documents from a record's fields: none if it is left out, several if it is packed."""


@dataclass(slots=True)
class ReadReport:
    """The findings of a unit's reader beside the documents, in types that JSON has.

    Attributes:
        skip: Whether bad records are left out; otherwise the first one raises.
        filtered: Records left out because they did not meet a condition.
        undecodable: A message for each text file left out because it is not UTF-8.
        bad: Bad records left out.
        listed: The first :data:`LISTED` of them: place, line counted from the first one read here (0 where the place
            says all), reason. To count the lines before it, a unit would read its file from the begin.
        lines: Lines read.
        kind: ``"text"`` or ``"tokens"``, what the unit's rows hold; empty where it has none.
        columns: Columns of token rows that were honoured.
        unused: Columns that were not, and do not change what is learned.
        joined: Rows of token ids with EOS before their end, each of which is one document all the same.
        here: Returns file and place of the record that was yielded last; of use while a unit is read.
    """

    skip: bool = False
    filtered: int = 0
    undecodable: list[str] = field(default_factory=list)
    bad: int = 0
    listed: list[tuple[str, int, str]] = field(default_factory=list)
    lines: int = 0
    kind: str = ""
    columns: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    joined: int = 0
    here: Callable[[], str] = field(default=str, compare=False)

    def leave_out(self, place: str, reason: str, count: int = 1, *, line: int = 0) -> None:
        """Count a bad record, or several with one reason, or raise it.

        Args:
            place: File, or file and row.
            reason: What is wrong.
            count: How many records.
            line: Which of the lines read here; 0 where ``place`` says all.

        Raises:
            BadRecordError: Bad records are not to be skipped.
        """
        if not self.skip:
            where = self.here() if line else place
            raise BadRecordError(f"{where}: {reason}; --skip-bad-records leaves out bad records")
        self.bad += count
        if len(self.listed) < LISTED:
            self.listed.append((place, line, bounded_line(reason)))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {name: value for name, value in asdict(replace(self, here=str)).items() if name != "here"}


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, for use inside ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
