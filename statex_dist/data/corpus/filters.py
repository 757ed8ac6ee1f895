"""``--where``: which records of a JSON-lines or parquet input become documents."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from statex_dist.data.corpus.records import BadRecordError
from statex_dist.errors import ConfigError

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_EXPRESSION = re.compile(r"\s*([^=!<>]*?)\s*([=!<>]+)\s*(.*?)\s*", re.DOTALL)
_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison of a record's field with a value: as numbers where the field is one, else as strings.

    Attributes:
        field: The field's name; dots lead into nested fields unless a field has that very name.
        operator: A key of :data:`OPERATORS`.
        value: What it is compared with, as it was given.
    """

    field: str
    operator: str
    value: str

    def __str__(self) -> str:
        return f"{self.field}{self.operator}{self.value}"

    def holds(self, record: dict[str, Any]) -> bool:
        """Return whether ``record`` has the field and the comparison holds.

        Raises:
            BadRecordError: The field is of a type that cannot be compared with the value.
        """
        found = find_field(record, self.field)[1]
        if found is None:
            return False
        if isinstance(found, str):
            return OPERATORS[self.operator](found, self.value)
        if not isinstance(found, (bool, int, float)):
            raise BadRecordError(
                f"field {self.field!r} is {type(found).__name__}; --where compares strings, numbers and true/false "
                "(a dot leads into an object: meta.lang)"
            )
        return OPERATORS[self.operator](found, self._number(found))

    def _number(self, found: bool | int | float) -> bool | int | float:
        if isinstance(found, bool):
            if self.value.lower() in _BOOLEANS:
                return _BOOLEANS[self.value.lower()]
            raise BadRecordError(f"field {self.field!r} is true or false, --where compares it with {self.value!r}")
        for kind in (int, float):
            try:
                return kind(self.value)
            except ValueError:
                continue
        raise BadRecordError(f"field {self.field!r} is a number, --where compares it with {self.value!r}")


def parse_condition(text: str) -> Condition:
    """Return the condition in ``text``, for example ``score>=0.5``.

    Raises:
        ConfigError: It is not ``FIELD OP VALUE``.
    """
    match = _EXPRESSION.fullmatch(text)
    if match is None or not match[1] or match[2] not in OPERATORS or not match[3]:
        raise ConfigError(
            f"--where {text!r} is not FIELD OP VALUE with OP one of {' '.join(OPERATORS)}; "
            "for example 'language=en', 'score>=0.5' or 'meta.lang!=de'"
        )
    return Condition(match[1], match[2], match[3])


def find_field(record: dict[str, Any], name: str) -> tuple[bool, Any]:
    """Return whether ``record`` has a field, and its value; ``None`` where it has not.

    Dots in ``name`` lead into nested fields, unless a field has that very name.
    """
    if name in record or "." not in name:
        return name in record, record.get(name)
    found: Any = record
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            return False, None
        found = found[part]
    return True, found


def all_hold(conditions: Sequence[Condition], record: dict[str, Any]) -> bool:
    """Return whether ``record`` passes every condition."""
    return all(condition.holds(record) for condition in conditions)
