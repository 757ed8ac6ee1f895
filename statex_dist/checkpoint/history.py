"""The settings with which the steps of a checkpoint were trained: :data:`HISTORY_NAME` in its directory.

A run may be resumed with other settings. Each checkpoint lists the settings of all its steps, so that a
card can describe it without the run's directory, and whatever settings later starts have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.json_file import read_json
from statex_dist.checkpoint.layout import HISTORY_NAME
from statex_dist.errors import CheckpointError, reason, shown

_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Steps that were trained with the same settings.

    Attributes:
        first_step: First optimizer step, from 1.
        last_step: Last one.
        settings: The resolved configuration.
    """

    first_step: int
    last_step: int
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        numbers = (self.first_step, self.last_step)
        if any(type(n) is not int for n in numbers) or not 1 <= self.first_step <= self.last_step:
            raise ValueError(f"steps from {shown(self.first_step)} to {shown(self.last_step)}")
        if not isinstance(self.settings, dict):
            raise ValueError("settings are not a mapping")


def extended(history: Sequence[Span], settings: Mapping[str, Any], *, after: int, step: int) -> list[Span]:
    """Return a history with the steps of this start added; equal settings extend the last span.

    Args:
        history: Of the steps before.
        settings: With which the steps above ``after`` were trained.
        after: Steps that were done before this start.
        step: Steps that are done now.
    """
    if step <= after:
        return list(history)
    if history and history[-1].settings == settings and history[-1].last_step == after:
        return [*history[:-1], Span(first_step=history[-1].first_step, last_step=step, settings=dict(settings))]
    return [*history, Span(first_step=after + 1, last_step=step, settings=dict(settings))]


def history_text(history: Sequence[Span]) -> str:
    """Return the contents of the file."""
    return json.dumps({"version": _VERSION, "spans": [asdict(span) for span in history]}, indent=1) + "\n"


def read_history(directory: Path) -> list[Span]:
    """Return the spans of a checkpoint, oldest first; empty where it has none, as those of earlier releases.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = directory / HISTORY_NAME
    try:
        content = read_json(path)
        if content["version"] != _VERSION:
            raise ValueError(f"version {shown(content['version'])}; only {_VERSION} is known")
        spans = [Span(**values) for values in content["spans"]]
        if any(later.first_step <= earlier.last_step for earlier, later in pairwise(spans)):
            raise ValueError("the spans overlap")
        return spans
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
