"""Files that describe a run: ``config.yaml``, with those of earlier starts beside it, ``status.json``, the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from statex_dist.checkpoint.layout import SETTINGS_NAME
from statex_dist.config import flat
from statex_dist.data.forecast import warn_of_repeats
from statex_dist.data.loader import PackedLoader
from statex_dist.durable.files import write_durably
from statex_dist.errors import StateXError, bounded_line, failure_text, shown
from statex_dist.optim.schedule import ScheduleConfig, log_schedule, warn_of_changed_rates
from statex_dist.train.callback import Callback, Ending
from statex_dist.train.loop import Trainer
from statex_dist.train.status import EXIT_PREEMPTED, RunStatus, State, read_status, write_failure, write_status

logger = logging.getLogger(__name__)

_SHOWN_CHANGES = 8


class RunFiles(Callback):
    """Writes ``config.yaml``, and ``status.json`` at the begin and the end."""

    order = 60

    _starts = 0

    def on_start(self) -> None:
        """Write the settings, and the state ``running``."""
        if self.run.rank == 0:
            write_settings(self.run.run_dir, self.run.settings, self.run.start_step)
            self._starts = _starts_before(self.run.run_dir) + 1
            self._write("running", self.run.start_step, self.run.epochs)

    def on_end(self, ending: Ending) -> None:
        """Write how the run ended; of an error that all ranks have, rank 0 alone."""
        error = ending.error
        if ending.state != "failed":
            if self.run.rank == 0:
                self._write(ending.state, ending.step, ending.epochs)
        elif error is not None and not getattr(error, "agreed", False):
            write_failure(
                self.run.run_dir,
                failure_text(error, self.run.run_dir),
                exit_code=error.exit_code if isinstance(error, StateXError) else 1,
                world_size=self.run.engine.world_size,
                step=ending.step,
                epochs=ending.epochs,
                restart=getattr(error, "restart", True),
            )

    def _write(self, state: State, step: int, epochs: Mapping[str, float]) -> None:
        exit_code = {"complete": 0, "preempted": EXIT_PREEMPTED}.get(state)
        ranks = self.run.engine.world_size
        status = RunStatus(
            state=state, step=step, world_size=ranks, exit_code=exit_code, epochs=dict(epochs), starts=self._starts
        )
        try:
            write_status(self.run.run_dir, status)
        except OSError as error:
            logger.warning("the status of %s is not written: %s", self.run.run_dir, error)


def _starts_before(run_dir: Path) -> int:
    try:
        earlier = read_status(run_dir)
    except StateXError as error:
        logger.warning("%s", error)
        return 0
    return 0 if earlier is None else earlier.starts


def report_start(
    trainer: Trainer,
    loader: PackedLoader,
    state: Mapping[str, Any] | None,
    *,
    schedule: ScheduleConfig,
    warn_epochs: float,
    names: Mapping[str, str],
) -> None:
    """Log what a start is to know of lengths, learning rate and data; for rank 0.

    Args:
        trainer: The run, restored.
        loader: Its data.
        state: What its checkpoint holds, or None.
        schedule: The learning rate's section.
        warn_epochs: Passes over a source above which it is named.
        names: What to call each source.
    """
    num_steps, start_step = trainer.config.num_steps, trainer.step
    trainer.checkpoints.documents.tell_length(num_steps)
    if start_step < num_steps:
        log_schedule(schedule, num_steps=num_steps)
        warn_of_repeats(loader.forecast(num_steps, above=warn_epochs), num_steps=num_steps, limit=warn_epochs)
        # A checkpoint of step 0 was made from weights alone: it has no learning rate to compare with.
        if state is not None and start_step > 0:
            engine = trainer.engine
            warn_of_changed_rates(
                engine.optimizer.param_groups,
                engine.saved_rates,
                saved_facts=state.get("schedule"),
                facts=trainer.facts,
            )
    for name, report in loader.report(max_windows=1).items() if start_step == 0 else ():
        logger.info(
            "%s: %.2f %% padding, %.1f %% of the documents cut, %.1f documents in a sequence of %d (first window)",
            names[name],
            100 * report.waste,
            100 * report.cut_documents / max(report.documents, 1),
            report.documents_per_pack,
            report.seq_len,
        )


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
