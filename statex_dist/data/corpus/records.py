"""One document as an input holds it: text, or ids that are tokenised already. Checked here, named by the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from statex_dist.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """A document as read: ``text``, or ``input_ids`` ``[n]`` int64 with an optional ``loss_mask`` ``[n]`` uint8.

    Ids are checked against the vocabulary where they are read, so that the message can name the place.
    """

    text: str | None = None
    input_ids: np.ndarray | None = None
    loss_mask: np.ndarray | None = None


Parse = Callable[[dict[str, Any]], Record | None]
"""Makes a document of a record's fields, or ``None`` of one to leave out."""


def record_from(record: dict[str, Any], vocab_size: int, text_field: str) -> Record:
    """Make a :class:`Record` of a mapping with a text field or ``input_ids``.

    Raises:
        DataError: It has neither, a value is of the wrong type, or an id is outside the vocabulary.
    """
    if record.get("input_ids") is not None:
        return _tokenized_record(record, vocab_size)
    text = record.get(text_field)
    if text is None:
        raise DataError(f"no field {text_field!r} or 'input_ids' (there are: {', '.join(map(str, record)) or 'none'})")
    if not isinstance(text, str):
        raise DataError(f"field {text_field!r} is {type(text).__name__}, a string is needed")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"field {text_field!r} has a lone surrogate at character {error.start}") from error
    return Record(text=text)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, for use inside ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _tokenized_record(record: dict[str, Any], vocab_size: int) -> Record:
    ids = _integers(record["input_ids"], "input_ids")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise DataError(f"input_ids has {outside[0]}, outside the tokenizer's vocabulary 0..{vocab_size - 1}")
    if record.get("loss_mask") is None:
        return Record(input_ids=ids)
    mask = _integers(record["loss_mask"], "loss_mask")
    if len(mask) != len(ids):
        raise DataError(f"loss_mask has {len(mask)} entries, input_ids {len(ids)}")
    if ((mask != 0) & (mask != 1)).any():
        raise DataError("loss_mask has entries other than 0 and 1")
    return Record(input_ids=ids, loss_mask=mask.astype(np.uint8))


def _integers(values: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(values)
        if isinstance(values, list) and array.ndim == 1 and (array.dtype.kind in "bi" or not len(array)):
            return array.astype(np.int64)
    except (ValueError, OverflowError):
        pass
    raise DataError(f"{name} must be a list of integers")
