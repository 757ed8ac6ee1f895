"""CPU time and open files of the offline tools on checkpoints of many ranks and small tensors.

    python -m benchmarks.scale_tools [--ranks 64,128,256,512] [--tensors 100]

The bytes are few, so that what is measured is the cost of ranks times tensors. Each command runs in one process of its
own (``--processes 1``); its CPU time is user and system time, start-up included.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.synthetic_zero3 import write_random_zero3

RANKS = (64, 128, 256, 512)
TENSORS, SHAPE = 100, (64, 64)


def measure(ranks: Sequence[int] = RANKS, tensors: int = TENSORS) -> list[tuple[str, int, float, str]]:
    """Return ``(name, ranks, value, unit)`` of each tool on a checkpoint of each number of ranks.

    Args:
        ranks: Numbers of ranks of the checkpoints; ``zero3`` targets have one rank fewer.
        tensors: Parameters of the model, each with Adam's two states.
    """
    found: list[tuple[str, int, float, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in ranks:
            source, out = Path(folder, f"source-{count}"), Path(folder, f"out-{count}")
            write_random_zero3(source / "global_step1", {f"layers.{i}.w": SHAPE for i in range(tensors)}, count)
            target = ["--source", source, "--target"]
            commands: dict[str, list[object]] = {
                "verify": ["verify", source],
                "reshard to hf": ["reshard", *target, out / "hf", "--to", "hf"],
                "reshard to zero3": ["reshard", *target, out / "zero3", "--to", "zero3", "--world-size", count - 1],
            }
            for name, command in commands.items():
                seconds, files = _run([*command, "--processes", 1])
                found += [(name, count, seconds, "CPU s"), (name, count, files, "open files at most")]
    return found


def _run(command: Sequence[object]) -> tuple[float, int]:
    """Run a command of statex; return its CPU seconds and the most files that it was seen to have open."""
    arguments = [sys.executable, "-m", "launch.cli", *map(str, command)]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = 0
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        most = max(most, sum(1 for _ in _open_files(process.pid)))
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime, most


def _open_files(pid: int) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError, PermissionError):  # it is ending
        yield from Path(f"/proc/{pid}/fd").iterdir()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=str, default=",".join(map(str, RANKS)))
    parser.add_argument("--tensors", type=int, default=TENSORS)
    options = parser.parse_args()
    for name, ranks, value, unit in measure([*map(int, options.ranks.split(","))], options.tensors):
        sys.stdout.write(f"{name:18} {ranks:5} ranks {value:10.2f} {unit}\n")


if __name__ == "__main__":
    main()
