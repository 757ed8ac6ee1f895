"""Where a run's figures go: a JSONL file, the log, and Weights & Biases. The only file that imports wandb."""

from __future__ import annotations

import json
import logging
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.manifest import write_durably
from statex_dist.errors import ConfigError

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"


@dataclass(kw_only=True)
class MetricsConfig:
    """What is reported.

    Attributes:
        log_every: Optimizer steps between log lines (every step goes to ``metrics.jsonl``).
        wandb_project: Weights & Biases project; None for none. Without a login it records offline.
        wandb_name: Name of the run there.
    """

    log_every: int = 10
    wandb_project: str | None = None
    wandb_name: str | None = None

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ConfigError(f"metrics.log_every must be 1 or more, not {self.log_every}")


class Metrics:
    """Writes one record per optimizer step; used on rank 0 only.

    ``tokens`` of a record are the positions of all packs, padding included (``best_fit`` pads little).

    Args:
        run_dir: The run's directory.
        config: What is reported.
        start_step: Steps done before; records after it are of a life that was lost and are dropped.
        settings: The run's configuration, for wandb.
    """

    def __init__(self, run_dir: Path, config: MetricsConfig, *, start_step: int, settings: dict[str, Any]):
        self.config = config
        self.path = run_dir / METRICS_NAME
        _drop_after(self.path, start_step)
        self.file = self.path.open("a", encoding="utf-8")
        self.wandb_run = self._start_wandb(run_dir, settings) if config.wandb_project else None

    def _start_wandb(self, run_dir: Path, settings: dict[str, Any]) -> Any:
        import wandb

        logged_in = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        mode = os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")
        logger.info("wandb project %s, %s", self.config.wandb_project, mode)
        return wandb.init(
            project=self.config.wandb_project,
            name=self.config.wandb_name,
            dir=str(run_dir),
            config=settings,
            mode=mode,  # type: ignore[arg-type]
            id=_wandb_id(run_dir),
            resume="allow",
        )

    def write(self, record: dict[str, float | int]) -> None:
        """Write one step's record; ``record['step']`` counts from 1."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.wandb_run is not None:
            self.wandb_run.log(record, step=int(record["step"]))
        if record["step"] == 1 or record["step"] % self.config.log_every == 0:
            logger.info(
                "step %d  loss %.4f  lr %.2e  grad norm %.3f  %d tokens/s",
                record["step"],
                record["loss"],
                record["lr"],
                record["grad_norm"],
                record["tokens_per_s"],
            )

    def close(self) -> None:
        """Flush and close."""
        self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run, oldest first."""
    lines = (run_dir / METRICS_NAME).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _wandb_id(run_dir: Path) -> str:
    """Return the run's wandb id, drawn once: a resumed run goes on under it, another run has another."""
    path = run_dir / "wandb_id"
    if not path.exists():
        write_durably(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8")


def _drop_after(path: Path, step: int) -> None:
    """Remove records after ``step``, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: dropping a line that is no record: %.80s", path, line)
            continue
        if keep:
            kept.append(line)
    write_durably(path, "".join(line + "\n" for line in kept))
