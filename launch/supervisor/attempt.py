"""One start of the training job: a fresh launcher with a fresh rendezvous, and after it no process left."""

from __future__ import annotations

import logging
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from launch.supervisor import processes
from launch.supervisor.hosts import Host, hostfile_text, run_on_all
from statex_dist.train.status import ATTEMPT_VARIABLE

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = REPOSITORY / "launch" / "train.py"

_SET_BY_LAUNCHERS = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
_PORTS = range(20000, 32768)
"""Below those that Linux gives to outgoing connections."""
_REMOTE_SECONDS = 60.0
_TELL_SECONDS = 30.0


class Attempt:
    """A launcher and its ranks. Leaving its context kills whatever of them is left.

    Args:
        name: Given to every process of the attempt, in its environment.
        arguments: Of the training script.
        ranks: How many, on this machine.
        hosts: Where to run instead, with as many ranks as they have slots.
    """

    def __init__(self, name: str, arguments: Sequence[str], *, ranks: int, hosts: Sequence[Host] = ()) -> None:
        self.name, self.arguments, self.ranks, self.hosts = name, list(arguments), ranks, hosts
        self._asked: set[int] = set()
        self._told = -_TELL_SECONDS
        self._launcher: subprocess.Popen[bytes] | None = None
        self._files = tempfile.TemporaryDirectory(prefix="statex-supervise-")

    def __enter__(self) -> Self:
        environment = {k: v for k, v in os.environ.items() if k not in _SET_BY_LAUNCHERS}
        environment[ATTEMPT_VARIABLE] = self.name
        if self.hosts:
            environment["DS_ENV_FILE"] = str(self._environment_file())
        # A session of its own: Ctrl-C reaches the supervisor alone, which passes it on once.
        self._launcher = subprocess.Popen(
            self._command(), env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.kill()
        finally:
            self._files.cleanup()

    def poll(self) -> int | None:
        """Return the launcher's exit code, negative for a signal, or None while it runs."""
        assert self._launcher is not None
        return self._launcher.poll()

    def ask_to_stop(self) -> None:
        """Have every rank save and end. To be repeated now and then: the launcher may just be starting some."""
        if not self.hosts:
            self._asked |= processes.ask_ranks_to_stop(self.name, self._asked)
        elif time.monotonic() - self._told > _TELL_SECONDS:
            self._told = time.monotonic()
            self._on_hosts("TERM")

    def kill(self) -> None:
        """Kill what is left, here and on every host that answers.

        Raises:
            StateXError: A process here does not die.
        """
        assert self._launcher is not None
        self._launcher.kill()
        self._launcher.wait()
        if self.hosts:
            self._on_hosts("KILL")
        if count := processes.kill(self.name):
            logger.info("%d processes were left of the attempt, and killed", count)

    def _on_hosts(self, what: str) -> None:
        module = shlex.join([sys.executable, "-m", "launch.supervisor.processes", what, self.name])
        reached = run_on_all(self.hosts, f"cd {shlex.quote(str(REPOSITORY))} && {module}", seconds=_REMOTE_SECONDS)
        for host in self.hosts:
            if host not in reached:
                logger.warning(
                    "%s: its ranks could not be told to end; they do so when their peers are gone", host.name
                )

    def _command(self) -> list[str]:
        if not self.hosts:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "0"]
            return [sys.executable, *launcher, "--nproc_per_node", str(self.ranks), str(TRAIN), *self.arguments]
        hostfile = Path(self._files.name) / "hostfile"
        hostfile.write_text(hostfile_text(self.hosts), encoding="utf-8")
        # --force_multi: a single host that is left need not be this one.
        launcher = ["-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--force_multi"]
        port = ["--master_port", str(random.choice(_PORTS))]
        return [sys.executable, *launcher, *port, str(TRAIN), *self.arguments]

    def _environment_file(self) -> Path:
        """Write the variables that deepspeed takes to other hosts: those that it would take anyway, and our own."""
        given = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        found = {path.resolve(): None for path in (Path.home() / given, Path(given)) if path.is_file()}
        lines = [line for path in found for line in path.read_text(encoding="utf-8-sig").splitlines() if "=" in line]
        file = Path(self._files.name) / "environment"
        file.write_text("\n".join([*lines, f"{ATTEMPT_VARIABLE}={self.name}"]) + "\n", encoding="utf-8")
        return file
