"""The figures of a model card's evaluation, read from the result files of ``statex eval``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from statex_dist.checkpoint.json_file import read_json
from statex_dist.errors import DataError, reason, shown
from statex_dist.evaluation.suites.registry import find_suite, suite_names

RESULT_VERSION = 2
"""Version of the result files that this release reads (``statex_dist.evaluation.report`` writes it)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """Results of one suite.

    Attributes:
        suite: Name of the suite.
        data: Data of the measurement, as far as the file names it.
        figures: Names and values, in a form for readers.
    """

    suite: str
    data: str | None
    figures: Sequence[tuple[str, str]]


def read_evaluations(directories: Sequence[str | Path], *, state_numbers: int) -> list[Evaluated]:
    """Read the results of ``statex eval``.

    Args:
        directories: Each holds the result files of one or more suites.
        state_numbers: State elements of the model that the card is of.

    Raises:
        DataError: A directory is missing or has no results, a file is damaged or of another release, or the model that
            was evaluated has a state of another size.
    """
    return [found for directory in directories for found in _read_directory(Path(directory), state_numbers)]


def _read_directory(directory: Path, state_numbers: int) -> list[Evaluated]:
    if not directory.is_dir():
        raise DataError(f"--evaluation {directory}: no such directory; give one that `statex eval` wrote (its --out)")
    paths = [directory / f"{suite}.json" for suite in suite_names() if find_suite(suite).of_model]
    found = [_read(path, state_numbers) for path in paths if path.is_file()]
    if not found:
        names = ", ".join(path.name for path in paths)
        raise DataError(f"--evaluation {directory} holds no results of `statex eval`; looked for {names}")
    return found


def _read(path: Path, state_numbers: int) -> Evaluated:
    try:
        summary = read_json(path)
        if summary["version"] != RESULT_VERSION:
            raise DataError(
                f"{path} has version {shown(summary['version'])}, this release reads {RESULT_VERSION}; evaluate again"
            )
        if (evaluated := summary["model"]["state_numbers"]) != state_numbers:
            raise DataError(
                f"{path} is of another model: its state has {evaluated:,} numbers, this model's has {state_numbers:,}"
            )
        data = summary.get("data")
        return Evaluated(
            suite=path.stem,
            data=Path(data).name if isinstance(data, str) else None,
            figures=list(find_suite(path.stem).card(summary)),
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is not what `statex eval` of this release writes ({reason(error)}); evaluate again or leave it out"
        ) from None
