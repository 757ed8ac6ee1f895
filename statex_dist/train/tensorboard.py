"""TensorBoard: a run's figures as event files. The only importer of ``torch.utils.tensorboard``."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from statex_dist.errors import ConfigError, reason
from statex_dist.train.callback import Callback, Ending
from statex_dist.train.wandb_run import flat

logger = logging.getLogger(__name__)


class TensorBoard(Callback):
    """Writes every figure of a record as a scalar; nested ones are called ``time/data`` and so on.

    Events of steps that are trained again after a kill are hidden by those of the new start (``purge_step``). An error
    of it is logged once and does not end the run.

    Args:
        directory: Where event files go; default ``tensorboard`` in the run's directory.

    Raises:
        ConfigError: The package tensorboard is missing.
    """

    order, rank_0_only = 80, True

    def __init__(self, directory: str | None = None):
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError("callbacks: tensorboard needs the package tensorboard; pip install tensorboard")
        self._directory, self._failed = directory, False
        self._writer: Any = None

    def on_start(self) -> None:
        """Open an event file."""
        self._guarded(self._open)

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = Path(self._directory) if self._directory is not None else self.run.run_dir / "tensorboard"
        self._writer = SummaryWriter(str(directory), purge_step=self.run.start_step + 1)

    def post_step(self, record: dict[str, Any]) -> None:
        """Write a record."""
        self._guarded(lambda: self._write(record))

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._writer is not None:
            for name, value in flat(record).items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, record["step"])

    def on_save(self, step: int) -> None:
        """Write what is buffered, so that a saved step has its events."""
        if self._writer is not None:
            self._guarded(self._writer.flush)

    def on_end(self, ending: Ending) -> None:
        """Close the file."""
        if self._writer is not None:
            self._guarded(self._writer.close)

    def _guarded(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # a figure that is not shown is no reason to lose a training
            if not self._failed:
                logger.warning("tensorboard: %s; further errors of it are not reported", reason(error))
            self._failed = True
