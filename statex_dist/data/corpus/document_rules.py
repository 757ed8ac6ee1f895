"""By which rules ``statex prepare`` makes documents of records, and ``--where``: which records it takes."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from statex_dist.data.columns import TOKENS
from statex_dist.data.corpus.records import BadRecordError
from statex_dist.data.special_tokens import SPECIAL_TOKENS_RULES
from statex_dist.errors import ConfigError

MAX_DOCUMENT_BYTES = 128 << 20
MOST_DOCUMENT_BYTES = 1 << 30
ROW_KINDS = ("auto", "text", "tokens")
EOS_RULES = ("append", "none")
BOS_RULES = ("none", "prepend")


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRules:
    """Rules for the making of documents.

    Attributes:
        text_field: Field or column of the text.
        where: Conditions of the form ``FIELD OP VALUE``; a record that fails one is left out.
        eos: ``"append"``: a document ends with EOS; ``"none"``: documents are taken as they are.
        bos: ``"prepend"``: a document begins with BOS; ``"none"``: no BOS is added.
        special_tokens: How markers of special tokens in text are encoded: ``"split"`` into plain pieces, ``"keep"`` as
            control tokens, or ``"refuse"``.
        min_tokens: Shorter documents (BOS and EOS included) are left out; one below 2 tokens has no target.
        max_tokens: Longer documents are left out; ``None`` for no bound.
        skip_undecodable: Leave out text files that are not UTF-8 instead of stopping.
        skip_bad_records: Leave out, count and list bad records instead of stopping.
        rows: ``"text"`` or ``"tokens"``: the kind that is read; ``"auto"``: the kind that the rows hold.
        ignore_fields: Fields beside ``input_ids`` that are left out whatever they hold.
        max_document_bytes: Bytes that a line, a text file (unpacked) or a row may have.

    Raises:
        ConfigError: A rule is not one of those allowed.
    """

    text_field: str = "text"
    where: tuple[str, ...] = ()
    eos: str = "append"
    bos: str = "none"
    special_tokens: str = "split"
    min_tokens: int = 2
    max_tokens: int | None = None
    skip_undecodable: bool = False
    skip_bad_records: bool = False
    rows: str = "auto"
    ignore_fields: tuple[str, ...] = ()
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    def __post_init__(self) -> None:
        for name, allowed in (("eos", EOS_RULES), ("bos", BOS_RULES), ("special_tokens", SPECIAL_TOKENS_RULES)):
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        if self.min_tokens < 1:
            raise ConfigError(f"min_tokens is {self.min_tokens}; it must be at least 1")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ConfigError(f"max_tokens is {self.max_tokens}; it must be at least min_tokens ({self.min_tokens})")
        if self.rows not in ROW_KINDS:
            raise ConfigError(f"rows is {self.rows!r}; allowed: {', '.join(ROW_KINDS)}")
        if self.text_field == TOKENS:
            raise ConfigError(f"text_field is {TOKENS!r}, which holds token ids; allowed: a field of text")
        if TOKENS in self.ignore_fields:
            raise ConfigError(f"ignore_fields has {TOKENS!r}; take the text instead with --rows text")
        if not 0 < self.max_document_bytes <= MOST_DOCUMENT_BYTES:
            raise ConfigError(
                f"max_document_bytes is {self.max_document_bytes}; it must be 1 to {MOST_DOCUMENT_BYTES} (1 GiB)"
            )
        self.conditions()

    def conditions(self) -> tuple[Condition, ...]:
        """Return :attr:`where`, parsed."""
        return tuple(parse_condition(text) for text in self.where)

    def as_dict(self) -> dict[str, Any]:
        """Return the rules in the types of JSON."""
        return {**asdict(self), "where": list(self.where), "ignore_fields": list(self.ignore_fields)}


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
