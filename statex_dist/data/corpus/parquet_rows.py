"""Rows of parquet files: row groups in a range, only the columns needed, a batch of rows in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from statex_dist.data.corpus.records import Parse, Record, first_line
from statex_dist.errors import DataError

_BATCH_ROWS = 256


def row_group_sizes(path: str) -> list[int]:
    """Return the raw bytes of every row group of the file at ``path``.

    Raises:
        DataError: It is not a readable parquet file.
    """
    with _open(path) as parquet:
        return [parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)]


def read_rows(
    path: str,
    begin: int,
    end: int,
    text_field: str,
    more_fields: Sequence[str],
    parse: Parse,
    at: Callable[[Callable[[], str]], None],
) -> Iterator[Record]:
    """Yield ``parse(row)`` for every row of the row groups ``begin <= i < end``.

    Args:
        path: The file.
        begin: First row group.
        end: One past the last.
        text_field: Column of the text; read, where they exist, beside ``input_ids`` and ``loss_mask``.
        more_fields: Columns, or dotted paths into nested ones, that ``parse`` wants too.
        parse: Makes a document of a row, or ``None`` of one to leave out.
        at: Told before a record is yielded what returns its file and row.

    Raises:
        DataError: The file cannot be read, has no column of documents, or ``parse`` refuses a row; the message names
            file and row.
    """
    import pyarrow

    with _open(path) as parquet:
        names = parquet.schema_arrow.names
        columns = [name for name in (text_field, "input_ids", "loss_mask") if name in names]
        if text_field not in columns and "input_ids" not in columns:
            raise DataError(
                f"{path}: no column {text_field!r} or 'input_ids' (there are: {', '.join(names) or 'none'})"
            )
        columns += [field for field in more_fields if field in names or field.split(".")[0] in names]
        row = sum(parquet.metadata.row_group(i).num_rows for i in range(begin))
        for group in range(begin, end):
            batches = parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns)
            while True:
                try:
                    batch = next(batches, None)
                    rows = [] if batch is None else batch.to_pylist()
                except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                    raise DataError(f"{path}: row group {group} cannot be read: {first_line(error)}") from error
                if batch is None:
                    break
                for fields in rows:
                    try:
                        record = parse(fields)
                    except DataError as error:
                        raise DataError(f"{path}: row {row}: {error}") from error
                    at(partial(str, f"{path}: row {row}"))
                    row += 1
                    if record is not None:
                        yield record


def _open(path: str) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {first_line(error)}") from error
