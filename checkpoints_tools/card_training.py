"""The facts of a model card that lie in a training run's directory: its settings, and what its figures say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from statex_dist.checkpoint.json_file import parse_json
from statex_dist.checkpoint.layout import CHECKPOINTS_DIR, SETTINGS_NAME
from statex_dist.errors import CheckpointError

_METRICS_NAME = "metrics.jsonl"

_SETTINGS = {
    "data.seq_len": "tokens of a packed sequence",
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
"""Settings that a card tells, and what they are called there."""


def run_of(checkpoint: Path) -> Path | None:
    """Return the run that a checkpoint's directory belongs to, or None of any other directory."""
    run = checkpoint.resolve().parent.parent
    inside = checkpoint.resolve().parent.name == CHECKPOINTS_DIR
    return run if inside and (run / SETTINGS_NAME).is_file() else None


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


def training_facts(run: Path, step: int | None) -> Iterator[tuple[str, str]]:
    """Yield names and values of what is known of a training.

    Args:
        run: The run's directory.
        step: Optimizer step of the checkpoint; None where it is not known.

    Raises:
        CheckpointError: A file of the run is damaged.
    """
    settings = read_settings(run)
    records = [r for r in _records(run / _METRICS_NAME) if step is None or r.get("step", 0) <= step]
    tokens = [record["tokens"] for record in records if isinstance(record.get("tokens"), int)]
    if tokens and len(tokens) == (step or len(tokens)):
        yield "tokens, padding included", f"{sum(tokens):,}"
    last = next((record for record in reversed(records) if record.get("step") == step), None)
    if last is not None and isinstance(last.get("loss"), int | float):
        yield "training loss of the last step (nats per token)", f"{last['loss']:.4f}"
    for key, name in _SETTINGS.items():
        value: Any = settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            counts = isinstance(value, int) and not isinstance(value, bool) and key != "seed"
            yield name, f"{value:,}" if counts else str(value)


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
        if isinstance(record, dict):
            yield record
