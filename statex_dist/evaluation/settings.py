"""Checks of the settings that several suites have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from statex_dist.errors import ConfigError


def check_reading(settings: Any, *counts: str) -> None:
    """Raise unless the settings that all suites have make sense: ``batch_size``, ``segment_length`` and ``seed``.

    Args:
        settings: A suite's settings.
        counts: Further fields that must be 1 or more.

    Raises:
        ConfigError: One does not.
    """
    for name in (*counts, "batch_size"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} must be 1 or more, not {getattr(settings, name)}")
    if settings.segment_length < 1:
        raise ConfigError(f"segment length must be 1 or more, not {settings.segment_length}")
    if settings.seed < 0:
        raise ConfigError(f"seed must be 0 or more, not {settings.seed}")


def check_different(name: str, numbers: Sequence[int], *, least: int = 1) -> None:
    """Raise unless ``numbers``, called ``name``, are one or more different numbers of ``least`` or more.

    Raises:
        ConfigError: They are not.
    """
    if not numbers or min(numbers) < least or len(set(numbers)) != len(numbers):
        raise ConfigError(f"{name} must be different numbers of {least} or more, not {list(numbers)}")
