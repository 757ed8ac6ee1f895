"""Train a model: ``deepspeed launch/train.py --config configs/NAME.yaml [--section.key value ...]``.

The same file runs under ``torchrun`` and as plain ``python launch/train.py``. Exit codes: 0 complete, 1 failed, 2 wrong
usage, 75 told to stop by a signal, saved, and to be started again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Launchers start this file by its path, which puts launch/ on the module path but not the repository.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from statex_dist.config import one_line, parse_config
from statex_dist.errors import StateXError
from statex_dist.log import setup_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank")]
    setup_logging()
    try:
        from statex_dist.run import train
        from statex_dist.run_config import RunConfig
        from statex_dist.train.signals import EXIT_PREEMPTED

        config = parse_config(RunConfig, arguments, prog="train.py", description="Train a recurrent language model.")
        return 0 if train(config) else EXIT_PREEMPTED
    except StateXError as error:
        # Every rank speaks: what is wrong may be so on one node only.
        rank = os.environ.get("RANK", "0")
        sys.stderr.write(f"error: {one_line(error)}\n" if rank == "0" else f"[rank {rank}] error: {one_line(error)}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
