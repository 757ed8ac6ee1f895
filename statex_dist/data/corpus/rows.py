"""Turn the fields of a row into documents, by one rule for all rows of a file.

A row holds text, or token ids with columns beside them:

1. Tokens with ``attention_mask`` 0 are removed, at either end or between documents. Values above 1 number the documents
   of a packed row.
2. ``position_ids`` and ``seq_lengths`` give borders too. Where several columns give borders, they must be the same.
3. A token is learned where ``labels`` (not shifted, -100: not learned) and every mask of 0 and 1 allow it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from statex_dist.data.columns import BESIDE_TEXT, HARMLESS, HONOURED, MASKS, TOKENS, ZEROS_ONLY, advice, meaning
from statex_dist.data.corpus.document_rules import DocumentRules, find_field
from statex_dist.data.corpus.records import BadRecordError, ReadReport, Record
from statex_dist.errors import DataError, shown

_MOST_UNUSED = 20


class RowParser:
    """Makes the documents of the rows of one file, or of a part of it."""

    def __init__(self, vocab_size: int, rules: DocumentRules, report: ReadReport):
        self._vocab_size = vocab_size
        self._text_field = rules.text_field
        self._rows = rules.rows
        self._ignore = frozenset(rules.ignore_fields)
        self._conditions = rules.conditions()
        self._report = report

    def __call__(self, row: dict[str, Any]) -> list[Record]:
        """Return the documents of ``row``.

        Raises:
            BadRecordError: It is none.
            DataError: It is not of the kind of the rows before, or a column cannot be honoured.
        """
        if not all(condition.holds(row) for condition in self._conditions):
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


IGNORED_LABEL = -100


def token_documents(row: Mapping[str, Any], vocab_size: int, ignore: Collection[str] = ()) -> list[Record]:
    """Return the documents of a row with ``input_ids``: several if it is packed.

    Raises:
        BadRecordError: A value is of the wrong type, or two columns contradict each other.
        DataError: A column could change what is learned and cannot be honoured.
    """
    ids = _integers(row[TOKENS], TOKENS)
    _check_others(row, len(ids), ignore)
    given = {name: _per_token(row, name, len(ids)) for name in HONOURED[1:-1] if name in row and name not in ignore}
    kept, numbered = np.ones(len(ids), bool), None
    if (attention := given.get("attention_mask")) is not None:
        kept, numbered = _attended(attention)
    positions = given.get("position_ids")
    if positions is not None and attention is None:
        kept = _without_padding(positions, given)
    borders = {}
    if numbered is not None:
        borders["attention_mask"] = numbered
    if positions is not None:
        borders["position_ids"] = _resets(positions[kept])
    if "seq_lengths" in row and "seq_lengths" not in ignore:
        borders["seq_lengths"] = _begins(_integers(row["seq_lengths"], "seq_lengths"), kept)
    if not kept.all():
        ids, given = ids[kept], {name: values[kept] for name, values in given.items()}
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise BadRecordError(f"input_ids has {outside[0]}, outside the tokenizer's vocabulary 0..{vocab_size - 1}")
    mask = _learned(ids, given)
    begins = _agreed(borders)
    if begins is None or len(begins) < 2:
        return [Record(input_ids=ids, loss_mask=mask)]
    # Copies: a view would keep the whole row in memory as long as one of its documents.
    parts = np.split(ids, begins[1:])
    masks = [None] * len(parts) if mask is None else [part.copy() for part in np.split(mask, begins[1:])]
    return [Record(input_ids=part.copy(), loss_mask=m) for part, m in zip(parts, masks, strict=True)]


def _check_others(row: Mapping[str, Any], length: int, ignore: Collection[str]) -> None:
    """Refuse the columns that could change what is learned: known ones by name, others where they hold a number for
    each token."""
    for name, value in row.items():
        if name in HONOURED or name in ignore or value is None:
            continue
        what = meaning(name)
        if what is None and name == ZEROS_ONLY:
            if not _integers(value, name).any():
                continue
            what = "numbers other than 0"
        if what is None and name not in HARMLESS and isinstance(value, list) and len(value) == length > 1:
            first = next((each for each in value if each is not None), "")
            what = None if isinstance(first, str) else "a value for each token"
        if what is not None:
            raise DataError(
                f"column {name!r} holds {what}, which is not read beside input_ids but could change what is learned; "
                f"leave it out with --ignore-field {name}, or give loss_mask, labels or position_ids"
            )


def _attended(attention: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return which tokens are kept, and where documents begin among them if the mask numbers documents."""
    kept = attention != 0
    numbers = attention[kept]
    if not len(numbers):
        return kept, None
    first = np.flatnonzero(np.diff(numbers, prepend=0))
    if (numbers[first] != np.arange(1, len(first) + 1)).any():
        raise BadRecordError(
            f"attention_mask has the values {shown(numbers[first].tolist())} in this order; allowed: 0 and 1, or the "
            "documents of a packed row numbered 1, 2, 3 and so on"
        )
    # If a run of kept tokens ends inside a document, tokens were removed from its middle.
    places = np.flatnonzero(kept)
    holes = np.flatnonzero((np.diff(places) > 1) & (np.diff(numbers) == 0))
    if len(holes):
        raise BadRecordError(
            f"attention_mask has 0 inside a document (at token {places[holes[0]] + 1}); allowed: padding at the start "
            "or the end, and between documents that are numbered 1, 2, 3"
        )
    return kept, first if len(first) > 1 else None


def _without_padding(positions: np.ndarray, given: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return which tokens are kept of a row whose position ids may end in zeros for padding."""
    others = np.flatnonzero(positions)
    end = int(others[-1]) + 1 if len(others) else 0
    kept = np.ones(len(positions), bool)
    masks = [given["labels"] != IGNORED_LABEL] if "labels" in given else []
    masks += [given[name] != 0 for name in MASKS if name in given]
    if not masks or np.logical_and.reduce(masks)[end:].any():
        if len(positions) - end < 2:
            return kept  # at most a document of one token
        raise BadRecordError(
            f"position_ids ends in {len(positions) - end} zeros, which may be padding; mark padding by 0 in "
            "attention_mask, or by -100 in labels"
        )
    kept[end:] = False
    return kept


def _resets(positions: np.ndarray) -> np.ndarray:
    """Return where documents begin by position ids, which count from 0 in each document."""
    begins = np.flatnonzero(positions == 0)
    if len(positions):
        last = np.zeros(len(positions), np.int64)
        last[begins] = begins
        wrong = positions != np.arange(len(positions)) - np.maximum.accumulate(last)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise BadRecordError(
                f"position_ids has {positions[at]} at token {at} (padding not counted); allowed: 0, 1, 2 and so on, "
                "from 0 again where a document begins"
            )
    return begins


def _begins(lengths: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return where documents begin among the kept tokens, by the documents' lengths in the whole row."""
    if (lengths <= 0).any() or lengths.sum() != len(kept):
        raise BadRecordError(
            f"seq_lengths adds up to {lengths.sum()} with entries from {lengths.min(initial=0)}; "
            f"allowed: positive, adding up to the {len(kept)} input_ids"
        )
    ends = np.cumsum(lengths)
    before = np.concatenate([[0], np.cumsum(kept)])
    begins = before[ends - lengths]
    return begins[before[ends] > begins]  # a document of padding alone has no token


def _agreed(borders: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return the first tokens of the documents, on which all columns with borders must agree."""
    found = list(borders.items())
    for name, begins in found[1:]:
        if not np.array_equal(begins, found[0][1]):
            raise BadRecordError(
                f"{found[0][0]} and {name} contradict each other: {len(found[0][1])} and {len(begins)} documents, or "
                "other borders"
            )
    return found[0][1] if found else None


def _learned(ids: np.ndarray, given: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return ``[n]`` uint8, 1 where labels and all masks say that a token is learned; ``None`` without any."""
    masks = []
    if (labels := given.get("labels")) is not None:
        learned = labels != IGNORED_LABEL
        if (wrong := np.flatnonzero(learned & (labels != ids))).size:
            raise BadRecordError(_wrong_label(ids, labels, int(wrong[0])))
        masks.append(learned)
    for name in MASKS:
        if (mask := given.get(name)) is not None:
            if ((mask != 0) & (mask != 1)).any():
                raise BadRecordError(f"{name} has entries other than 0 and 1")
            masks.append(mask == 1)
    return np.logical_and.reduce(masks).astype(np.uint8) if masks else None


def _wrong_label(ids: np.ndarray, labels: np.ndarray, at: int) -> str:
    text = f"labels has {labels[at]} at token {at} (padding not counted), where input_ids has {ids[at]}"
    learned = labels[:-1] != IGNORED_LABEL
    if learned.any() and (labels[:-1][learned] == ids[1:][learned]).all():
        return (
            f"{text}: the labels are shifted by one; give labels at the place of their own token, as Hugging Face does"
        )
    return f"{text}; allowed: {IGNORED_LABEL} (not learned) or the id of the same place"


def _per_token(row: Mapping[str, Any], name: str, length: int) -> np.ndarray:
    if row[name] is None:
        raise BadRecordError(f"field {name!r} is null; give a list, or leave the field out of all rows")
    values = _integers(row[name], name)
    if len(values) != length:
        raise BadRecordError(f"{name} has {len(values)} entries, input_ids {length}")
    return values


def _integers(values: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(values)
        if isinstance(values, list) and array.ndim == 1 and (array.dtype.kind in "bi" or not len(array)):
            array = array.astype(np.int64)
            # Among integers numpy turns true into 1.
            small = np.flatnonzero(array >> 1 == 0).tolist() if name in (TOKENS, "labels") else []
            if not any(isinstance(values[i], bool) for i in small):
                return array
    except (ValueError, OverflowError):
        pass
    raise BadRecordError(f"{name} must be a list of integers")
