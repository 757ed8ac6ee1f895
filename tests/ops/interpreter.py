"""Kernels on a machine without a GPU: scripts of checks that run in a process of their own, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


def enter_interpreter() -> None:
    """Interpret what is compiled otherwise, for the rest of this process; to be called before triton is imported.

    No driver means no timing: the first tuning choice is taken.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda *_, **__: [0.0, 0.0, 0.0]


def assert_script_passes(module: str, checks: Iterable[str], *arguments: str) -> None:
    """Run a script that prints ``ok`` and the name of each of its checks, and nothing else."""
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split("\n")[:-1] == [f"ok {check}" for check in checks]
