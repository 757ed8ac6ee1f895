"""``expansion_report.json``, as it lies beside an expanded model: its name, and its contents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from statex_dist.checkpoint.json_file import read_json
from statex_dist.errors import CheckpointError, reason

REPORT_NAME = "expansion_report.json"


def read_report(directory: Path) -> dict[str, Any] | None:
    """Return the contents of a directory's report, or None where it has none.

    Raises:
        CheckpointError: The report is unreadable.
    """
    path = directory / REPORT_NAME
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("tensors"), dict):
        raise CheckpointError(f"{path} is not an expansion report: it holds no mapping 'tensors'")
    if not all(isinstance(row, dict) for row in content["tensors"].values()):
        raise CheckpointError(f"{path} is not an expansion report: an entry of 'tensors' is not a mapping")
    return content
