"""``config.yaml`` of a run: the settings of its last start, with those of earlier starts beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from statex_dist.checkpoint.layout import SETTINGS_NAME
from statex_dist.config import flat
from statex_dist.durable.files import write_durably
from statex_dist.errors import bounded_line, shown

logger = logging.getLogger(__name__)

_SHOWN_CHANGES = 8


def write_settings(run_dir: Path, settings: Mapping[str, Any], start_step: int) -> None:
    """Write the settings of this start; keep and log those of the steps before, where they differ.

    Args:
        run_dir: The run's directory.
        settings: The resolved configuration.
        start_step: Steps done before.
    """
    path = run_dir / SETTINGS_NAME
    text = yaml.safe_dump(dict(settings), sort_keys=False)
    if path.is_file() and start_step:
        earlier = path.read_text(encoding="utf-8", errors="replace")
        kept = path.with_name(f"{path.stem}-until-step{start_step}{path.suffix}")
        # A start that saved nothing trained none of these steps: their settings are kept already.
        if earlier != text and not kept.exists():
            write_durably(kept, earlier)
        if earlier != text:
            changes = _changes(earlier, settings)
            more = f" and {len(changes) - _SHOWN_CHANGES} more" if len(changes) > _SHOWN_CHANGES else ""
            logger.info(
                "settings differ from the last start's: %s%s (%s has those of the steps before)",
                bounded_line(", ".join(changes[:_SHOWN_CHANGES])),
                more,
                kept.name,
            )
    write_durably(path, text)


def _changes(earlier: str, settings: Mapping[str, Any]) -> list[str]:
    try:
        before = flat(yaml.safe_load(earlier))
    except (ValueError, RecursionError, yaml.YAMLError):
        return ["the earlier file cannot be read"]
    now = flat(dict(settings))
    return [
        f"{key} {shown(before.get(key), 40)} -> {shown(now.get(key), 40)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
