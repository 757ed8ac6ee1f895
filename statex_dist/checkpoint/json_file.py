"""Read JSON files from other sources: bounded in size and depth; any damage is a ValueError."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
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
