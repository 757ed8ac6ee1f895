"""Train a model: ``deepspeed launch/train.py --config configs/NAME.yaml [--section.key value ...]``.

The same file runs under ``torchrun`` and as plain ``python launch/train.py``. Exit codes: 0 complete, 1 failed, 2 wrong
usage, 75 told to stop by a signal, saved, and to be started again.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Launchers start this file by its path, which puts launch/ on the module path but not the repository.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from statex_dist.config import parse_config
from statex_dist.errors import StateXError, failure_text, one_line
from statex_dist.log import setup_logging, warn_of_arguments

if TYPE_CHECKING:
    from statex_dist.run_config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank")]
    setup_logging()
    config = None
    try:
        from statex_dist.run import train
        from statex_dist.run_config import RunConfig
        from statex_dist.train.status import ATTEMPT_VARIABLE, EXIT_PREEMPTED

        config = parse_config(RunConfig, arguments, prog="train.py", description="Train a recurrent language model.")
        # The supervisor has warned already.
        if os.environ.get("RANK", "0") == "0" and ATTEMPT_VARIABLE not in os.environ:
            warn_of_arguments(arguments)
        return 0 if train(config) else EXIT_PREEMPTED
    except StateXError as error:
        if not error.agreed:
            _say(one_line(error))
        _record_failure(config, error, error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except Exception as error:
        _record_failure(config, error, 1)
        if not isinstance(error, OSError) or error.errno is None:
            raise
        logging.getLogger("launch").debug("the traceback:", exc_info=error)
        _say(failure_text(error, "the output" if config is None else config.run_dir))
        return 1


def _say(text: str) -> None:
    """Print an error, on every rank unless the ranks have agreed on it: a fault may exist on one host only.

    Before the ranks have met, the first one that ends makes the launcher end the others, perhaps before they report.
    """
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(f"error: {text}\n" if rank == "0" else f"[rank {rank[:20]}] error: {text}\n")


def _record_failure(config: RunConfig | None, error: Exception, exit_code: int) -> None:
    """Write the failure into the run's directory, unless there is none or another job trains into it."""
    from statex_dist.train.run_lock import not_held
    from statex_dist.train.status import write_failure

    if config is None or getattr(error, "agreed", False):
        return
    size = os.environ.get("WORLD_SIZE", "1")
    with not_held(Path(config.run_dir)) as free:
        if free:
            write_failure(
                Path(config.run_dir),
                failure_text(error, config.run_dir),
                exit_code=exit_code,
                world_size=int(size) if size.isdecimal() else 0,
            )


if __name__ == "__main__":
    sys.exit(main())
