"""Training runs, one or several side by side, as a part of the report.

The figures use the run's own files only: ``metrics.jsonl``, ``config.yaml``, ``status.json`` and the plan in its newest
checkpoint. The module imports no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from statex_dist.checkpoint.history import Span, read_history
from statex_dist.checkpoint.json_file import parse_json
from statex_dist.checkpoint.layout import (
    CHECKPOINTS_DIR,
    CONFIG_NAME,
    MODEL_DIR,
    SETTINGS_NAME,
    STATUS_NAME,
    complete_tags,
)
from statex_dist.config import flat
from statex_dist.errors import DataError
from statex_dist.evaluation.page.html import (
    Blocks,
    Section,
    details,
    figures,
    heading,
    make_html,
    paragraph,
    preformatted,
    table,
)
from statex_dist.evaluation.page.run_figures import draw_runs
from statex_dist.redact import redact
from statex_dist.state.plan import ExpansionPlan
from statex_dist.train.metrics import read_metrics

_LAST_STEPS = 20
_SHOWN_SPANS = 8

NAMED_SOURCES = 20
"""Sources of a run whose epochs the page names: those that were seen most often."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """Facts from the files of a run.

    Attributes:
        name: Name of the run in the report.
        directory: Directory of the run.
        records: One record per step, oldest first.
        config: Text of its ``config.yaml``; empty where there is none.
        settings: The same by dotted names.
        status: Contents of its ``status.json``; empty where there is none.
        expanded: Its expanded layers, as far as a checkpoint tells.
        history: Settings of the steps of its newest checkpoint; empty if an earlier release wrote the checkpoint.
    """

    name: str
    directory: Path
    records: Sequence[Mapping[str, Any]]
    config: str
    settings: Mapping[str, Any]
    status: Mapping[str, Any]
    expanded: tuple[int, ...]
    history: Sequence[Span] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """A run in figures; None where its records do not say.

    Attributes:
        run: Its directory.
        state: ``running``, ``complete``, ``preempted`` or ``failed``, as it last said.
        steps: Optimizer steps done.
        tokens: Tokens of all steps, padding included.
        hours: Time of all steps.
        final_loss: Mean loss of the last steps whose loss is finite, at most 20: one step's says little.
        validation_loss: Loss of the last validation.
        best_validation_loss: Least loss of a validation.
        median_tokens_per_s: Median throughput of a step.
        median_mfu: Median model FLOPs utilisation, from 0 to 1.
        time_shares: Share of the time by phase of a step.
        peak_memory_bytes: Most memory of rank 0.
        skipped_steps: Steps that updated nothing.
        steps_without_targets: Those of them that had no target.
        epochs: Passes over each source of the data, by name.
    """

    run: str
    state: str | None
    steps: int
    tokens: int | None
    hours: float | None
    final_loss: float | None
    median_tokens_per_s: float | None
    median_mfu: float | None
    time_shares: dict[str, float]
    peak_memory_bytes: int | None
    skipped_steps: int | None
    steps_without_targets: int | None
    epochs: dict[str, float]
    validation_loss: float | None = None
    best_validation_loss: float | None = None

    @property
    def data_wait_share(self) -> float | None:
        """Share of the time in which the run waited for data."""
        return self.time_shares.get("data")

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, JSON-able."""
        return {**asdict(self), "data_wait_share": self.data_wait_share}


def read_runs(directories: Sequence[Path]) -> list[TrainingRun]:
    """Read the runs, and give each a name of its own: the last part of its path, where that tells them apart.

    Raises:
        DataError: A directory is missing or given twice, is not that of a run, or one of its files is damaged.
    """
    resolved = [directory.resolve() for directory in directories]
    if len(set(resolved)) != len(resolved):
        raise DataError(f"a run is given twice: {', '.join(map(str, directories))}")
    return [_read_run(directory, name) for directory, name in zip(directories, distinct_names(resolved), strict=True)]


def distinct_names(paths: Sequence[Path], *, tells_little: Sequence[str] = ()) -> list[str]:
    """Return the last part of each path, or as many parts as tell them apart.

    Args:
        paths: The paths.
        tells_little: Last parts that say nothing, such as ``model``, and are left out.
    """
    if not paths:
        return []
    telling = [path.parent if path.name in tells_little and path.parent.name else path for path in paths]
    for parts in range(1, max(len(path.parts) for path in telling) + 1):
        names = ["/".join(path.parts[-parts:]) for path in telling]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def _read_run(directory: Path, name: str) -> TrainingRun:
    if not directory.is_dir():
        raise DataError(f"run directory not found: {directory}")
    records = read_metrics(directory)
    config, status = redact(_text(directory / SETTINGS_NAME)), read_json(directory / STATUS_NAME)
    checkpoints = directory / CHECKPOINTS_DIR
    tags = complete_tags(checkpoints)
    model = read_json(checkpoints / tags[0] / MODEL_DIR / CONFIG_NAME) if tags else {}
    plan = ExpansionPlan.from_dict(model["statex"]) if model.get("statex") else ExpansionPlan()
    try:
        settings = flat(yaml.safe_load(config) or {})
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{directory / SETTINGS_NAME} is not valid YAML: {' '.join(str(error).split())}") from None
    return TrainingRun(
        name=name,
        directory=directory,
        records=records,
        config=config,
        settings=settings,
        status=status,
        expanded=tuple(expansion.layer for expansion in plan.layers),
        history=read_history(checkpoints / tags[0]) if tags else (),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is no file.

    Raises:
        DataError: It holds none, or cannot be read.
    """
    try:
        values = parse_json(_text(path) or "{}")
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} does not hold a JSON object")
    return values


def summarise(run: TrainingRun) -> RunSummary:
    """Return a run in figures."""

    def values(key: str) -> list[Any]:
        return [record[key] for record in run.records if record.get(key) is not None]

    times = [record for record in run.records if "time" in record]
    seconds = sum(record["seconds"] for record in times)
    phases = dict.fromkeys(phase for record in times for phase in record["time"])
    evaluated = [e["loss"] for e in values("eval") if e.get("loss") is not None]
    losses, rates, shares = values("loss"), values("tokens_per_s"), values("mfu")
    return RunSummary(
        run=str(run.directory),
        state=run.status.get("state"),
        steps=run.records[-1]["step"],
        tokens=int(sum(values("tokens"))) or None,
        hours=sum(values("seconds")) / 3600 or None,
        final_loss=statistics.fmean(losses[-_LAST_STEPS:]) if losses else None,
        median_tokens_per_s=statistics.median(rates) if rates else None,
        median_mfu=statistics.median(shares) if shares else None,
        time_shares={p: sum(r["time"].get(p, 0.0) for r in times) / seconds for p in phases} if seconds else {},
        peak_memory_bytes=int(max(memory)) if (memory := values("memory_bytes")) else None,
        skipped_steps=int(skipped[-1]) if (skipped := values("skipped")) else None,
        steps_without_targets=int(empty[-1]) if (empty := values("without_targets")) else None,
        epochs=dict(run.records[-1].get("epochs") or {}),
        validation_loss=evaluated[-1] if evaluated else None,
        best_validation_loss=min(evaluated, default=None),
    )


def make_page(runs: Sequence[TrainingRun]) -> str:
    """Return the report on ``runs`` as one HTML page."""
    title = "Training run " + runs[0].name if len(runs) == 1 else "Training runs"
    return make_html(title, [runs_section(runs)])


def runs_section(runs: Sequence[TrainingRun], *, title: str = "") -> Section:
    """Return what a page says of ``runs``: their figures, how they ended, where they differ, and their curves."""
    body = table(summary_lines(runs), caption="The runs in figures") + _difference_table(runs) + _messages(runs)
    body += [block for run in runs for block in _change_table(run)]
    return Section(title=title, body=body + figures(draw_runs(runs)) + _configs(runs))


def summary_rows(summary: RunSummary) -> dict[str, str]:
    """Return the figures of a run as people read them, by title; what is not known is left out."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    memory, epochs = summary.peak_memory_bytes, sorted(summary.epochs.items(), key=lambda source: -source[1])
    rows = {
        "state": summary.state or "",
        "steps": f"{summary.steps:,}",
        "tokens": number(summary.tokens, ","),
        "hours": number(summary.hours, ".2f"),
        "final loss (20 steps)": number(summary.final_loss, ".4f"),
        "validation loss, last": number(summary.validation_loss, ".4f"),
        "validation loss, best": number(summary.best_validation_loss, ".4f"),
        "median tokens/s": number(summary.median_tokens_per_s, ",.0f"),
        "median MFU": number(summary.median_mfu, ".1%"),
        **{f"time: {phase}": f"{share:.1%}" for phase, share in summary.time_shares.items()},
        "peak memory, rank 0": "" if memory is None else f"{memory / (1 << 30):.2f} GiB",
        "skipped steps": number(summary.skipped_steps, ","),
        "of these without targets": number(summary.steps_without_targets or None, ","),
        **{f"epochs of {name}": f"{passes:,.2f}" for name, passes in epochs[:NAMED_SOURCES]},
        "sources with fewer epochs": number(len(epochs[NAMED_SOURCES:]) or None, ","),
    }
    return {title: text for title, text in rows.items() if text}


def summary_lines(runs: Sequence[TrainingRun]) -> list[list[str]]:
    """Return the figures of runs side by side: a line of names, then one for each figure."""
    rows = {run.name: summary_rows(summarise(run)) for run in runs}
    titles = dict.fromkeys(title for row in rows.values() for title in row)
    return [["", *rows], *([title, *(row.get(title, "") for row in rows.values())] for title in titles)]


def _difference_table(runs: Sequence[TrainingRun]) -> Blocks:
    """Return the settings in which the runs differ."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    lines = [[key, *(str(run.settings.get(key, "")) for run in runs)] for key in keys]
    lines = [line for line in lines if len(set(line[1:])) > 1]
    if not lines:
        return []
    return heading("Settings that differ") + table([["", *(run.name for run in runs)], *lines])


def _change_table(run: TrainingRun) -> Blocks:
    """Return the settings that changed in the course of a run, with the steps of each value."""
    spans = list(run.history)[-_SHOWN_SPANS:]
    parts = [(f"steps {span.first_step:,} to {span.last_step:,}", flat(span.settings)) for span in spans]
    if spans and run.settings != parts[-1][1]:
        parts.append((f"from step {spans[-1].last_step + 1:,} on", dict(run.settings)))
    keys = dict.fromkeys(key for _, settings in parts for key in settings)
    lines = [[key, *(redact(str(settings.get(key, ""))) for _, settings in parts)] for key in keys]
    lines = [line for line in lines if len(set(line[1:])) > 1]
    if not lines:
        return []
    return heading(f"Settings that changed in {run.name}") + table([["", *(steps for steps, _ in parts)], *lines])


def _messages(runs: Sequence[TrainingRun]) -> Blocks:
    """Return what the runs say of their end."""
    said = [(run.name, run.status["message"]) for run in runs if run.status.get("message")]
    return [block for name, text in said for block in paragraph(str(text), strong=name)]


def _configs(runs: Sequence[TrainingRun]) -> Blocks:
    named = [(run.name, run.config) for run in runs if run.config]
    titles = [(f"Configuration of {name}, of its last start", text) for name, text in named]
    return [block for title, text in titles for block in details(title, preformatted(text))]
