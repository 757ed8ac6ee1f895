"""Weights & Biases: figures go there, and nothing that goes wrong there reaches the training. The only wandb importer.

A server that does not answer costs a run at most half a minute at its start and a quarter at its end; what could not be
sent lies in the run's directory and is sent by ``wandb sync`` later.
"""

from __future__ import annotations

import logging
import os
import ssl
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.manifest import write_durably

logger = logging.getLogger(__name__)

PROBE_SECONDS = 5.0
# Checking the key takes another ten where the server takes requests and does not answer them.
INIT_SECONDS = 12.0
# A run that is told to stop has some 30 seconds in all.
FINISH_SECONDS = 15.0


class WandbRun:
    """One run's records at Weights & Biases, online if there is a login and a server, else on disk.

    Args:
        run_dir: The run's directory; wandb's files go to ``wandb`` in it.
        project: Project there.
        name: Name of the run there; None lets wandb choose.
        settings: The run's configuration.
    """

    def __init__(self, run_dir: Path, *, project: str, name: str | None, settings: dict[str, Any]):
        # Its own telemetry would hold the process for 20 seconds at its end where the server is gone.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        def start(mode: str) -> Any:
            return wandb.init(
                project=project,
                name=name,
                dir=str(run_dir),
                config=settings,
                mode=mode,  # type: ignore[arg-type]
                id=_wandb_id(run_dir),
                resume="allow",
                settings=wandb.Settings(init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS),
            )

        self._failed = False
        logged_in = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        mode = os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")
        logger.info("wandb project %s, %s", project, mode)
        if mode == "online":
            try:
                _require_answer(wandb.setup().settings.base_url)
                self._run = start(mode)
                return
            except Exception as error:
                # Whatever it is (no network, a wrong key, a server of another age), the training can do without.
                logger.warning(
                    "wandb cannot be used online (%s); recording in %s instead, to be sent with: wandb sync DIRECTORY",
                    _first_line(error),
                    run_dir / "wandb",
                )
                wandb.teardown()  # its service would not begin a second run with the id of the first
                mode = "offline"
        self._run = start(mode)

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a step's record; nested figures get names such as ``time/data``."""
        self._guarded(lambda: self._run.log(flat(record), step=int(record["step"])))

    def finish(self) -> None:
        """Send what is left, within :data:`FINISH_SECONDS`."""
        self._guarded(self._run.finish)

    def _guarded(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # a figure that is not shown is no reason to lose a training
            if not self._failed:
                logger.warning(
                    "wandb: %s; further errors of it are not reported, metrics.jsonl has it all", _first_line(error)
                )
            self._failed = True


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, float | int]:
    """Return the numbers of a record, nested ones under names joined by ``/``; what is None is left out."""
    result: dict[str, float | int] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}/")
        elif value is not None:
            result[prefix + key] = value
    return result


def _require_answer(url: str) -> None:
    """Raise unless a server answers, whatever it says: wandb itself would try for much longer.

    Raises:
        OSError: Nobody answers.
    """
    try:
        urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # wandb has certificates of its own to try
            raise


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _wandb_id(run_dir: Path) -> str:
    """Return the run's wandb id, drawn once: a resumed run goes on under it, another run has another."""
    path = run_dir / "wandb_id"
    if not path.exists():
        write_durably(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8")
