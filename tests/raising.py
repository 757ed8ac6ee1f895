"""Errors of a test by their class and by the values that they name, whatever their wording."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises(error: type[Exception], *named: object) -> Iterator[pytest.ExceptionInfo]:
    """Expect an error of exactly this class, whose message names every given value.

    Args:
        error: The class.
        named: Identifiers, file names, numbers: each must stand in the message as a whole word.
    """
    with pytest.raises(error) as caught:
        yield caught
    assert type(caught.value) is error
    missing = [value for value in named if not re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", str(caught.value))]
    assert not missing, f"{caught.value!s} does not name {missing}"
