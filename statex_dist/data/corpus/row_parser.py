"""Turn the fields of a row into documents, by one rule for all rows of a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from statex_dist.data.columns import BESIDE_TEXT, HONOURED, TOKENS, advice
from statex_dist.data.corpus.filters import Condition, all_hold, find_field
from statex_dist.data.corpus.records import BadRecordError, ReadReport, Record
from statex_dist.data.corpus.token_rows import token_documents
from statex_dist.errors import DataError

_MOST_UNUSED = 20


class RowParser:
    """Makes the documents of the rows of one file, or of a part of it.

    Args:
        vocab_size: Bound of the ids in rows that are tokenised already.
        text_field: Name of the text's field; dots lead into nested ones unless a field has that very name.
        rows: ``"text"``, ``"tokens"`` or ``"auto"``: the kind that the rows hold; rows with both are refused.
        ignore: Fields beside the ids that are left out whatever they hold.
        conditions: Rows that do not pass all of them are left out.
        report: Takes counts of rows left out, and the kind of rows read.
    """

    def __init__(
        self,
        vocab_size: int,
        text_field: str,
        rows: str,
        ignore: Sequence[str],
        conditions: Sequence[Condition],
        report: ReadReport,
    ):
        self._vocab_size = vocab_size
        self._text_field = text_field
        self._rows = rows
        self._ignore = frozenset(ignore)
        self._conditions = conditions
        self._report = report

    def __call__(self, row: dict[str, Any]) -> list[Record]:
        """Return the documents of ``row``.

        Raises:
            BadRecordError: It is none.
            DataError: It is not of the kind of the rows before, or a column cannot be honoured.
        """
        if self._conditions and not all_hold(self._conditions, row):
            self._report.filtered += 1
            return []
        kind, text = self._kind(row)
        if self._report.kind != kind:
            if self._report.kind:
                raise DataError(f"this row has {mixed(self._report.kind, kind)}")
            self._report.kind = kind
        if kind == "text":
            if not BESIDE_TEXT.isdisjoint(row):
                self._note(self._report.unused, BESIDE_TEXT.intersection(row) - self._ignore)
            return [Record(text=self._text(text))]
        documents = token_documents(row, self._vocab_size, self._ignore)
        names = row.keys() - self._ignore
        self._note(self._report.columns, names.intersection(HONOURED[1:]))
        self._note(self._report.unused, names.difference(HONOURED))
        return documents

    def _kind(self, row: dict[str, Any]) -> tuple[str, Any]:
        """Return the kind of a row, and its text."""
        tokens = row.get(TOKENS) is not None
        if self._rows == "tokens":
            if not tokens:
                raise BadRecordError(_absent(row, TOKENS, TOKENS in row))
            return "tokens", None
        found, text = find_field(row, self._text_field)
        if self._rows == "text":
            if text is None:
                raise BadRecordError(_absent(row, self._text_field, found))
            return "text", text
        if tokens and text is not None:
            raise DataError(
                f"the row has both {TOKENS!r} and {self._text_field!r}; choose one: `statex prepare` with "
                "--rows text or --rows tokens"
            )
        if tokens:
            return "tokens", None
        if text is None:
            if found or TOKENS in row:
                raise BadRecordError(_absent(row, self._text_field if found else TOKENS, True))
            raise BadRecordError(
                f"no field {self._text_field!r} or {TOKENS!r} (there are: {', '.join(map(str, row)) or 'none'})"
                f"{advice(row)}"
            )
        return "text", text

    def _text(self, text: Any) -> str:
        if isinstance(text, bytes):
            try:
                return text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadRecordError(
                    f"field {self._text_field!r} is not UTF-8: byte {error.start} ({error.reason})"
                ) from error
        if not isinstance(text, str):
            raise BadRecordError(f"field {self._text_field!r} is {type(text).__name__}, a string is needed")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise BadRecordError(
                    f"field {self._text_field!r} has a lone surrogate at character {error.start}"
                ) from error
        return text

    @staticmethod
    def _note(names: list[str], found: Any) -> None:
        if found and len(names) < _MOST_UNUSED:
            names += [name for name in sorted(found) if name not in names]


def mixed(before: str, now: str) -> str:
    """Say how a row differs in kind from the rows before it."""
    names = {"text": "text", "tokens": TOKENS}
    return (
        f"{names[now]}, but rows before have {names[before]}; a file must hold one kind: separate them, or "
        "take one kind with --rows text or --rows tokens (and --skip-bad-records)"
    )


def _absent(row: dict[str, Any], name: str, null: bool) -> str:
    if null:
        return f"field {name!r} is null"
    return f"no field {name!r} (there are: {', '.join(map(str, row)) or 'none'}){advice(row)}"
