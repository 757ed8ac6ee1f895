"""The facts of a model card from a checkpoint and its run: the settings of its steps, and its figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from statex_dist.checkpoint.history import Span, read_history
from statex_dist.checkpoint.json_file import parse_json
from statex_dist.checkpoint.layout import CHECKPOINTS_DIR, SETTINGS_NAME
from statex_dist.errors import CheckpointError

_METRICS_NAME = "metrics.jsonl"

_SETTINGS = {
    "data.seq_len": "tokens of a packed sequence",
    "data.curriculum": "curriculum",
    "data.packs_per_step": "packed sequences per step",
    "data.packing": "packing",
    "data.long_documents": "documents longer than a sequence",
    "optimizer.lr": "peak learning rate (AdamW)",
    "optimizer.weight_decay": "weight decay",
    "optimizer.train": "trained parameters",
    "schedule.name": "learning rate schedule",
    "schedule.warmup_steps": "warm-up steps",
    "engine.name": "engine",
    "engine.precision": "precision",
    "parallel.context": "ranks that share a sequence (context parallel)",
    "train.state_passing": "probability that a text starts from another's state",
    "seed": "seed",
}
"""Settings that a model card shows, with their names in the card."""


def run_of(checkpoint: Path) -> Path | None:
    """Return the run that a checkpoint's directory belongs to, or None of any other directory."""
    checkpoints = checkpoint.resolve().parent
    inside = checkpoints.name == CHECKPOINTS_DIR and (checkpoints.parent / SETTINGS_NAME).is_file()
    return checkpoints.parent if inside else None


def read_settings(run: Path) -> dict[str, Any]:
    """Return a run's resolved configuration.

    Raises:
        CheckpointError: It is damaged.
    """
    path = run / SETTINGS_NAME
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read, and the model card tells of it: {reason}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a run's configuration")
    return values


def spans_of(checkpoint: Path, run: Path | None, step: int | None) -> list[Span]:
    """Return the settings of a checkpoint's steps: its own history, or if it has none those of the run's last start.

    Raises:
        CheckpointError: A file is damaged.
    """
    if own := read_history(checkpoint):
        return own
    return [] if run is None else [Span(first_step=1, last_step=max(step or 1, 1), settings=read_settings(run))]


def training_facts(checkpoint: Path, run: Path | None, step: int | None) -> Iterator[tuple[str, str]]:
    """Yield names and values of the known facts of a training.

    Args:
        checkpoint: Directory of the checkpoint.
        run: The run's directory; None of a checkpoint that was copied out of it.
        step: Optimizer step of the checkpoint; None where it is not known.

    Raises:
        CheckpointError: A file of the run or of the checkpoint is damaged.
    """
    spans = spans_of(checkpoint, run, step)
    records = [] if run is None else [r for r in _records(run / _METRICS_NAME) if step is None or r["step"] <= step]
    tokens = [record["tokens"] for record in records if isinstance(record.get("tokens"), int)]
    if tokens and len(tokens) == (step or len(tokens)):
        yield "tokens, padding included", f"{sum(tokens):,}"
    last = next((record for record in reversed(records) if record["step"] == step), None)
    if last is not None and isinstance(last.get("loss"), int | float):
        yield "training loss of the last step (nats per token)", f"{last['loss']:.4f}"
    for key, name in _SETTINGS.items():
        if told := _over_spans(spans, key):
            yield name, told
    if spans and not read_history(checkpoint):
        yield "these settings", "of the run's last start: the checkpoint has no history of its own"
    elif spans and spans[0].first_step > 1:
        yield "settings are known", f"from step {spans[0].first_step:,} on"


def _over_spans(spans: Sequence[Span], key: str) -> str:
    """Return a setting's value, or its values with the steps of each; empty where it is in no span."""
    parts: list[tuple[str, int, int]] = []
    for span in spans:
        told = _told(span.settings, key)
        if parts and parts[-1][0] == told:
            parts[-1] = (told, parts[-1][1], span.last_step)
        else:
            parts.append((told, span.first_step, span.last_step))
    if len(parts) == 1:
        return parts[0][0]
    return ", ".join(f"{told or 'not set'} (steps {first:,} to {last:,})" for told, first, last in parts)


def setting(settings: Any, key: str) -> Any:
    """Return a setting by its dotted name, or None."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _told(settings: dict[str, Any], key: str) -> str:
    value = setting(settings, key)
    if value is None or value == []:
        return ""
    if key == "data.curriculum" and isinstance(value, list):
        return "; ".join(_stage(stage) for stage in value)
    counts = isinstance(value, int) and not isinstance(value, bool) and key != "seed"
    return f"{value:,}" if counts else str(value)


def _stage(stage: Any) -> str:
    """Return a stage of a curriculum in words: the step after which it begins, and its settings."""
    if not isinstance(stage, dict):
        return str(stage)
    changes = [f"{key} {value}" for key, value in stage.items() if key != "from_step" and value is not None]
    return f"after step {stage.get('from_step')}: {', '.join(changes)}"


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of ``metrics.jsonl``; a last line that was cut short is left out."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except ValueError:
            if number == len(lines):
                return
            raise CheckpointError(f"{path}, line {number} is damaged") from None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record
