"""Rows of parquet files: row groups in a range, only the columns needed, a bounded batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from statex_dist.data.columns import BESIDE_TEXT, TOKENS, ZEROS_ONLY, advice
from statex_dist.data.corpus.document_rules import DocumentRules
from statex_dist.data.corpus.records import BadRecordError, Parse, ReadReport, Record, first_line
from statex_dist.errors import DataError

_BATCH_ROWS = 256
_BATCH_BYTES = 64 << 20
_BUFFER_BYTES = 1 << 20
_VALUE_BYTES = 8
_MOST_TIMES = 8
# Bytes of a page beside its values: their lengths and levels.
_PAGE_BYTES = 1 << 16
_THRIFT_I32 = 0x15


def row_group_sizes(path: str) -> list[int]:
    """Return the raw bytes of every row group of the file at ``path``.

    Raises:
        DataError: It is not a readable parquet file.
    """
    with _open(path) as parquet:
        return [parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)]


def read_rows(
    path: str, begin: int, end: int, rules: DocumentRules, parse: Parse, report: ReadReport, *, sample: bool = False
) -> Iterator[Record]:
    """Yield the documents of every row of the row groups ``begin <= i < end``.

    Raises:
        DataError: The file cannot be read, has no column of documents, or ``parse`` refuses a row; the message names
            file and row.
    """
    most = rules.max_document_bytes
    with _open(path) as parquet:
        columns = _columns(path, parquet, rules, report)
        row = sum(parquet.metadata.row_group(i).num_rows for i in range(begin))
        for group in range(begin, end):
            rows = parquet.metadata.row_group(group).num_rows
            size, largest = _group_bytes(path, parquet.metadata.row_group(group), columns)
            # Rows that are larger than allowed are read one by one to find the others, within reason.
            if rows and size > (most + _PAGE_BYTES) * rows and not (report.skip and size <= _MOST_TIMES * most):
                reason = f"row group {group} has {rows} rows with {size} bytes, more than {most} each"
                report.leave_out(f"{path}: row {row}", f"{reason}; {BadRecordError.LARGER}", rows)
                row += rows
                continue
            count = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(size // max(rows, 1), largest, 1)))
            for batch in _batches(path, parquet, group, columns, count):
                for fields in _rows(batch, most):
                    found: list[Record] = []
                    try:
                        if isinstance(fields, BadRecordError):
                            raise fields
                        found = parse(fields)
                    except BadRecordError as error:
                        report.leave_out(f"{path}: row {row}", str(error))
                    except DataError as error:
                        raise DataError(f"{path}: row {row}: {error}") from error
                    report.here = partial(str, f"{path}: row {row}")
                    row += 1
                    yield from found
                if sample:
                    return


def _columns(path: str, parquet: Any, rules: DocumentRules, report: ReadReport) -> list[str]:
    """Return the columns to read: the text alone, or the ids and every column that could change the training."""
    names = parquet.schema_arrow.names
    text = rules.text_field
    columns = [text] if rules.rows != "tokens" and _holds(parquet.schema_arrow, text) else []
    if rules.rows != "text" and TOKENS in names:
        columns += [field.name for field in parquet.schema_arrow if _matters(field)]
    elif not columns:
        allowed = {"tokens": repr(TOKENS), "text": repr(text)}.get(rules.rows, f"{text!r} or {TOKENS!r}")
        raise DataError(f"{path}: no column {allowed} (there are: {', '.join(names) or 'none'}){advice(names)}")
    if TOKENS not in columns:
        report.unused += sorted(BESIDE_TEXT.intersection(names))
    else:
        report.unused += sorted(set(names).difference(columns))
    fields = [condition.field for condition in rules.conditions()]
    columns += [field for field in fields if field in names or field.split(".")[0] in names]
    columns = list(dict.fromkeys(columns))
    for name in columns:
        if (count := names.count(name.split(".")[0]) if name not in names else names.count(name)) > 1:
            raise DataError(f"{path} has {count} columns {name!r}; which one is meant is not known: take one out")
    return columns


def _matters(field: Any) -> bool:
    """Return whether a column beside token ids could change the training: by its name, or as a list, not of strings."""
    import pyarrow.types as types

    if field.name in BESIDE_TEXT or field.name == ZEROS_ONLY:
        return True
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    kind = field.type
    while any(is_list(kind) for is_list in lists):
        kind = kind.value_type
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return kind != field.type and not any(is_text(kind) for is_text in texts)


def _holds(schema: Any, name: str) -> bool:
    """Return whether a table has a column, or a nested one by its dotted path."""
    import pyarrow

    if name in schema.names:
        return True
    found: Any = schema
    for part in name.split("."):
        if not isinstance(found, pyarrow.Schema) and not pyarrow.types.is_struct(found):
            return False
        at = found.get_field_index(part)
        if at < 0:
            return False
        found = found.field(at).type
    return True


def _group_bytes(path: str, facts: Any, columns: Sequence[str]) -> tuple[int, int]:
    """Return the bytes of a row group's columns, and of the largest dictionary among them."""
    tops = {name.split(".")[0] for name in columns} | set(columns)
    size = largest = 0
    for chunk in map(facts.column, range(facts.num_columns)):
        if tops & {chunk.path_in_schema, chunk.path_in_schema.split(".")[0]}:
            # Repeated values cost next to nothing in the file.
            size += max(chunk.total_uncompressed_size, _VALUE_BYTES * chunk.num_values)
            largest = max(largest, dictionary_bytes(path, chunk))
    return size, largest


def _batches(path: str, parquet: Any, group: int, columns: list[str], rows: int) -> Iterator[Any]:
    """Yield a row group in batches of ``rows`` rows."""
    import pyarrow

    batches = parquet.iter_batches(rows, row_groups=[group], columns=columns)
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: row group {group} cannot be read: {first_line(error)}") from error
        if batch is None:
            return
        yield batch


def dictionary_bytes(path: str, chunk: Any) -> int:
    """Return the bytes of a column chunk's dictionary, which is as large as the largest value in it, or larger.

    They are in the header of its page, which pyarrow does not show: two i32 fields of Thrift's compact protocol.
    """
    if not chunk.has_dictionary_page:
        return 0
    with Path(path).open("rb") as file:
        file.seek(chunk.dictionary_page_offset)
        header = file.read(12)
    values, value, shift = [], 0, 0
    for byte in header:
        if not shift and byte == _THRIFT_I32:
            continue
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            values.append(value >> 1)  # zigzag, of a positive number
            value = shift = 0
    return values[1] if len(values) > 1 else 0


def _rows(batch: Any, most: int) -> Iterator[dict[str, Any] | BadRecordError]:
    """Yield each row as a mapping, or as the error that describes its fault."""
    import pyarrow

    dictionaries = [i for i, field in enumerate(batch.schema) if pyarrow.types.is_dictionary(field.type)]
    if batch.nbytes <= most and not dictionaries:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            pass  # the fault is in one of its rows
        else:
            yield from rows
            return
    for i in range(batch.num_rows):
        one = batch.slice(i, 1)
        for k in dictionaries:  # their size is that of all values
            one = one.set_column(k, one.schema.names[k], one.column(k).dictionary_decode())
        if one.nbytes > most:
            yield BadRecordError(f"the row has more than {most} bytes; {BadRecordError.LARGER}")
            continue
        try:
            yield one.to_pylist()[0]
        except UnicodeDecodeError as error:
            yield BadRecordError(f"not UTF-8 (byte {error.start} of a string: {error.reason})")


def _open(path: str) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        # Buffered: otherwise a whole column of a row group is read at once.
        return ParquetFile(path, buffer_size=_BUFFER_BYTES)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {first_line(error)}") from error
