"""Find and end the processes of one attempt.

Launchers put ranks into sessions of their own, and the ranks of a killed launcher become children of init. Neither the
process group nor the tree of parents finds them all. The name of the attempt in their environment does.

``python -m launch.supervisor.processes TERM|KILL NAME`` does the same on another host.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Collection, Iterator

import psutil

from statex_dist.errors import StateXError
from statex_dist.train.status import ATTEMPT_VARIABLE

_KILL_SECONDS = 30.0


def find(name: str) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """Yield this user's processes of the attempts whose names begin with ``name``, and their environments."""
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if process.pid != os.getpid() and environment.get(ATTEMPT_VARIABLE, "").startswith(name):
                yield process, environment
        except psutil.Error:  # it has ended, or is another user's
            continue


def ask_ranks_to_stop(name: str, asked: Collection[int] = ()) -> set[int]:
    """Send SIGTERM to the ranks whose pid is not in ``asked``, and return the pids of those that got it.

    Their launcher gets none, because it would kill them 30 s later. Their own children (data workers) get none either.
    """
    ranks = {process.pid: process for process, environment in find(name) if "RANK" in environment}
    told: set[int] = set()
    for pid, process in ranks.items():
        try:
            if pid not in asked and process.ppid() not in ranks:
                process.terminate()
                told.add(pid)
        except psutil.Error:  # it has ended
            continue
    return told


def kill(name: str, *, seconds: float = _KILL_SECONDS) -> int:
    """Kill the processes with SIGKILL until none is left, and return how many there were.

    Raises:
        StateXError: One does not die: it hangs in the kernel (a lost file system, a GPU that does not answer).
    """
    killed: set[int] = set()
    deadline = time.monotonic() + seconds
    while left := [process for process, _ in find(name)]:
        for process in left:
            try:
                process.kill()
                killed.add(process.pid)
            except psutil.Error:
                continue
        time.sleep(0.05)
        if time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in left)
            raise StateXError(f"processes {pids} do not end on SIGKILL; a new start beside them would not be safe")
    return len(killed)


def main(arguments: list[str]) -> int:
    """Do for a supervisor on another host what its own functions do here."""
    what, name = arguments
    if what == signal.SIGTERM.name.removeprefix("SIG"):
        ask_ranks_to_stop(name)
    else:
        kill(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
