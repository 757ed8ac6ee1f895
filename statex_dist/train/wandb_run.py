"""Weights & Biases: the run logs its metrics there, and no failure there stops the training. The only wandb importer.

A server that does not answer costs a run at most half a minute at its start and a quarter at its end. Unsent records
lie in the run's directory; ``wandb sync`` sends them later.

**Each step once**: all starts of a run log under one id, and wandb joins their records, so a step that was trained
twice (after a kill, from an older checkpoint) would be there twice. Offline the lost steps are cut off the file of the
start that was killed; online they stay as they were first logged. Steps that a kill kept from wandb are logged from
``metrics.jsonl``: wandb writes a step when the next one begins, and not at once.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from statex_dist.durable.files import write_durably
from statex_dist.redact import holds_remembered, redact
from statex_dist.train.callback import Callback, Ending
from statex_dist.train.wandb_files import is_offline, read_records, segments, synced_marker

logger = logging.getLogger(__name__)

PROBE_SECONDS = 5.0
# Checking the key takes another ten where the server takes requests and does not answer them.
INIT_SECONDS = 12.0
# A run that is told to stop has some 30 seconds in all.
FINISH_SECONDS = 15.0
_MODES = {"run": "online", "dryrun": "offline"}
"""wandb's other names of its modes."""
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class WandbRun:
    """One run's records at Weights & Biases, online if there is a login and a server, else on disk.

    Args:
        run_dir: The run's directory; wandb's files go to ``wandb`` in it.
        project: Project there.
        name: Name of the run there; None lets wandb choose.
        settings: The run's configuration, without secrets.
        start_step: Steps done before.
        earlier: Records of those steps, in order.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        name: str | None,
        settings: dict[str, Any],
        start_step: int = 0,
        earlier: Iterable[Mapping[str, Any]] = (),
    ):
        self._failed = False
        self._held = 0
        self._run: Any = None
        mode = os.environ.get("WANDB_MODE", "")
        if mode == "disabled":
            logger.info("WANDB_MODE=disabled: wandb project %s has no steps of this start yet", project)
            return
        try:
            files = segments(run_dir, _wandb_id(run_dir))
            mode = self._start(run_dir, project, name, settings, _MODES.get(mode, mode))
        except Exception as error:  # not installed, a full disk, a variable that it refuses
            logger.warning("wandb cannot be used (%s); metrics.jsonl has it all", _first_line(error))
            return
        self._guarded(lambda: self._go_on(files, mode, start_step, earlier))

    def _start(self, run_dir: Path, project: str, name: str | None, settings: dict[str, Any], mode: str) -> str:
        """Start wandb and return how it records: ``online`` or ``offline``."""
        # Its own telemetry would hold the process for 20 seconds at its end where the server is gone.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        run_id = _wandb_id(run_dir)

        def start(mode: str) -> Any:
            with _clean_arguments():
                return wandb.init(
                    project=project,
                    name=name,
                    dir=str(run_dir),
                    config=settings,
                    mode=mode,  # type: ignore[arg-type]
                    id=run_id,
                    resume="allow",
                    settings=wandb.Settings(
                        init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, disable_git=_diff_holds_secret()
                    ),
                )

        logged_in = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        mode = mode or ("online" if logged_in else "offline")
        logger.info("wandb project %s, %s", project, mode)
        if mode == "online":
            try:
                _require_answer(wandb.setup().settings.base_url)
                self._run = start(mode)
            except Exception as error:
                # No error of wandb stops the training: no network, a wrong key, a server of another version.
                logger.warning(
                    "wandb cannot be used online (%s); recording in %s instead, to be sent with: wandb sync DIRECTORY",
                    _first_line(error),
                    run_dir / "wandb",
                )
                wandb.teardown()  # its service would not begin a second run with the id of the first
                mode = "offline"
        if mode != "online":
            self._run = start(mode)
        return mode

    def _go_on(self, files: list[Path], mode: str, start_step: int, earlier: Iterable[Mapping[str, Any]]) -> None:
        """Find out which steps wandb has, remove those that are trained again, and log those that it lacks."""
        self._held = start_step  # if this fails, no step is logged twice
        if mode == "offline":
            held = max((_cut(path, start_step) for path in files), default=0)
        else:
            held = max(int(self._run.starting_step) - 1, 0)
            for path in files:
                if is_offline(path):
                    logger.info("%s: its steps are logged again from metrics.jsonl, so wandb sync leaves it out", path)
                    synced_marker(path).touch()
        self._held = held
        if held > start_step:
            logger.warning(
                "wandb has the steps up to %d already: it keeps those after %d as they were first trained; "
                "metrics.jsonl has them as they are trained now",
                *(held, start_step),
            )
        count = 0
        for record in earlier:
            count += record["step"] > held
            self.log(record)
        if count:
            logger.info("wandb lacked %d steps up to %d; they are logged from metrics.jsonl", count, start_step)

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a step's record, unless wandb has that step; nested figures get names such as ``time/data``."""
        if self._run is None or int(record["step"]) <= self._held:
            return
        self._guarded(lambda: self._run.log(flat(record), step=int(record["step"])))

    def finish(self) -> None:
        """Send what is left, within :data:`FINISH_SECONDS`."""
        if self._run is not None:
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


class Wandb(Callback):
    """Sends every record to Weights & Biases.

    Args:
        project: Project there.
        run_name: Name of the run there; None lets wandb choose.
        earlier: Returns the records of the steps before this start.
    """

    order, rank_0_only = 80, True

    def __init__(self, *, project: str, run_name: str | None, earlier: Callable[[], Iterable[Mapping[str, Any]]]):
        self._project, self._run_name, self._earlier = project, run_name, earlier
        self._wandb: WandbRun | None = None

    def on_start(self) -> None:
        """Begin, or continue."""
        self._wandb = WandbRun(
            self.run.run_dir,
            project=self._project,
            name=self._run_name,
            settings=dict(self.run.settings),
            start_step=self.run.start_step,
            earlier=self._earlier(),
        )

    def post_step(self, record: dict[str, Any]) -> None:
        """Send a record."""
        assert self._wandb is not None
        self._wandb.log(record)

    def on_end(self, ending: Ending) -> None:
        """Send what is left."""
        if self._wandb is not None:
            self._wandb.finish()


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
    """Raise unless a server answers, with any status: wandb itself would try for much longer.

    Raises:
        OSError: No server answers.
    """
    try:
        urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # wandb has certificates of its own to try
            raise


@contextmanager
def _clean_arguments() -> Iterator[None]:
    """Hide arguments with secrets from wandb, which records the program's arguments."""
    given = sys.argv
    sys.argv = [redact(argument) for argument in given]
    try:
        yield
    finally:
        sys.argv = given


def _diff_holds_secret() -> bool:
    """Return whether the working tree's changes, which some releases of wandb upload, hold a secret of this run."""
    try:
        done = subprocess.run(
            ["git", "diff", "HEAD"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git; or too many changes to search in time
        return shutil.which("git") is not None
    return holds_remembered(done.stdout)


def _cut(path: Path, step: int) -> int:
    """Remove the records after a step, and a torn end, from an offline file; return the last step that it holds.

    A file that was sent already, or recorded online, is not changed. A file that a kill has left without its beginning
    holds no step, and ``wandb sync`` would fail on it and send none of the others: it is marked as sent.
    """
    from wandb.proto import wandb_internal_pb2

    end, held, may_cut, begun = 0, 0, is_offline(path), False
    for record in read_records(path):
        found = wandb_internal_pb2.Record.FromString(record.payload)  # type: ignore[attr-defined]
        begun = begun or found.WhichOneof("record_type") == "run"
        if found.WhichOneof("record_type") == "history":
            number = found.history.step.num
            if number > step and may_cut:
                end = record.begin
                break
            held = max(held, number)
        end = record.end
    if may_cut and not begun:
        synced_marker(path).touch()
    elif may_cut and end < path.stat().st_size:
        os.truncate(path, end)
    return held


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return redact(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def _wandb_id(run_dir: Path) -> str:
    """Return the run's wandb id, which is drawn once: a resumed run keeps it, another run has another."""
    path = run_dir / "wandb_id"
    found = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else None
    if found is None or _ID.fullmatch(found) is None:
        if found is not None:
            logger.warning("%s holds no id of wandb; this run has a new one there, with all its steps", path)
        found = uuid.uuid4().hex
        write_durably(path, found)
    return found
