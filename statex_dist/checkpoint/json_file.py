"""JSON files from other sources, bounded in size and depth, and ``config.json`` with its infinities and NaN.

JSON has no such numbers. transformers 4, mamba_ssm and Python's ``json`` write the bare words ``Infinity``,
``-Infinity`` and ``NaN``, which strict parsers refuse. transformers 5 writes an object in their place,
``{"__float__": "Infinity"}`` (``PreTrainedConfig._encode_special_floats``), and reads both forms.

Here both become floats, at any depth. A number that was bare is written bare again; any other one as an object.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 100_000_000
_MAX_LEVELS = 100


def read_bytes(path: Path, *, most: int = MAX_JSON_BYTES) -> bytes:
    """Return the contents of a file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger than ``most`` bytes.
    """
    with path.open("rb") as file:
        large = os.fstat(file.fileno()).st_size > most
        # A file may grow, and special files have no size.
        data = b"" if large else file.read(most + 1)
    if large or len(data) > most:
        raise ValueError(f"it has more than {most} bytes")
    return data


def read_text(path: Path, *, most: int = MAX_JSON_BYTES) -> str:
    """Return the contents of a UTF-8 file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger than ``most`` bytes, or not UTF-8.
    """
    return read_bytes(path, most=most).decode("utf-8")


def parse_json(text: str | bytes, *, parse: Callable[[str | bytes], Any] = json.loads) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is not JSON, or nested too deeply.
    """
    try:
        value = parse(text)
    except RecursionError:
        value = None
    else:
        # Python follows deeper ones here, but not in every place that walks through them.
        level = [value] if isinstance(value, dict | list) else []
        for _ in range(_MAX_LEVELS):
            inside = (part.values() if isinstance(part, dict) else part for part in level)
            level = [part for parts in inside for part in parts if isinstance(part, dict | list)]
            if not level:
                return value
    raise ValueError(f"it is nested too deeply: at most {_MAX_LEVELS} levels are read")


def read_json(path: Path, *, most: int = MAX_JSON_BYTES, parse: Callable[[str | bytes], Any] = json.loads) -> Any:
    """Return the value of a JSON file; errors of :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path, most=most), parse=parse)


_TAG = "__float__"
_WORDS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


class BareFloat(float):
    """An infinity or NaN that the file spells as a bare word."""


def parse_config(text: str) -> Any:
    """Return the contents of a ``config.json`` with its special floats as floats.

    Raises:
        ValueError: It is not JSON, or nested too deeply.
    """
    return decode_floats(parse_json(text, parse=partial(json.loads, parse_constant=BareFloat)))


def config_text(values: Mapping[str, Any]) -> str:
    """Return the text of a ``config.json``; special floats get the form that they were read in."""
    return json.dumps(_encoded(values, bare=True), indent=2) + "\n"


def decode_floats(value: Any) -> Any:
    """Return a JSON value with floats in place of the objects that stand for them, at any depth."""
    if isinstance(value, dict):
        word = value.get(_TAG)
        if len(value) == 1 and isinstance(word, str) and word in _WORDS:
            return _WORDS[word]
        return {key: decode_floats(item) for key, item in value.items()}
    return [decode_floats(item) for item in value] if isinstance(value, list) else value


def differing_keys(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the keys, sorted, under which two configs differ.

    The form of a special float makes no difference, NaN equals NaN, and a missing key equals null.
    """
    one, other = (json.loads(json.dumps(_encoded(decode_floats(dict(v)), bare=False))) for v in (first, second))
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _encoded(value: Any, *, bare: bool) -> Any:
    """Return a value with objects in place of special floats; with ``bare``, those that were bare stay floats."""
    if isinstance(value, float) and not math.isfinite(value):
        if bare and isinstance(value, BareFloat):
            return value
        return {_TAG: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        return {key: _encoded(item, bare=bare) for key, item in value.items()}
    return [_encoded(item, bare=bare) for item in value] if isinstance(value, list | tuple) else value
