"""Keep a training run alive: ``python launch/supervise.py --nproc 8 -- --config configs/NAME.yaml [...]``.

The arguments after ``--`` are those of ``launch/train.py``. Exit codes: 0 complete, 1 given up, 2 wrong usage or a
failure that a restart would not fix, 75 stopped on request, to be started again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    # Started by its path, like launch/train.py.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from statex_dist.config import parse_config
from statex_dist.errors import ConfigError, StateXError, one_line
from statex_dist.log import setup_logging, warn_of_arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"supervise.py: {message}; see --help")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of what stands before ``--``."""
    parser = _Parser(
        prog="supervise.py",
        usage="%(prog)s [options] -- --config FILE.yaml [--section.key value ...]",
        description="Start launch/train.py, and start it again from its newest checkpoint when it fails.",
        epilog="What stands after -- is given to launch/train.py. Each start uses all ranks that are available and "
        "can have a pack of a step; a checkpoint may be of another number of ranks. A SIGTERM or "
        "Ctrl-C is passed on to the ranks, which save. Exit codes: 0 complete, 1 given up, 2 wrong usage or a failure "
        "that a restart would not mend, 75 told to stop (start the same command again to go on).",
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--nproc", type=int, metavar="N", help="ranks on this machine (default: one a GPU, or 1)")
    where.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="hosts instead, a line 'name slots=N' each; those that answer over ssh are used, with deepspeed and pdsh",
    )
    parser.add_argument(
        "--min-ranks", type=int, default=1, metavar="M", help="do not start with fewer ranks (default: 1)"
    )
    parser.add_argument(
        "--spares",
        type=int,
        default=0,
        metavar="N",
        help="hosts of the hostfile that are held back, and take the place of others that do not answer (default: 0)",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="give up when after N restarts in a row there is no newer checkpoint (default: 3)",
    )
    parser.add_argument(
        "--backoff",
        type=float,
        default=5.0,
        metavar="S",
        help="seconds before a restart, doubled with every one in a row that brought no newer checkpoint, up to 10 "
        "minutes; a quarter more or less at random (default: 5)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=300.0,
        metavar="S",
        help="seconds that the ranks have to save in when they are told to stop, before they are killed (default: 300)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    own, train = arguments, list[str]()
    if "--" in arguments:
        own, train = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    setup_logging()
    try:
        options = build_parser().parse_args(own)
        if not train:
            raise ConfigError("supervise.py: give the arguments of launch/train.py after --: -- --config FILE.yaml")
        from launch.supervisor.hosts import read_hostfile
        from launch.supervisor.loop import Policy, Supervisor
        from statex_dist.run_config import RunConfig

        config = parse_config(RunConfig, train, prog="train.py", description="Train a recurrent language model.")
        warn_of_arguments(train)
        hosts = read_hostfile(options.hostfile) if options.hostfile is not None else []
        policy = Policy(
            min_ranks=options.min_ranks,
            max_restarts=options.max_restarts,
            backoff=options.backoff,
            grace=options.grace,
            spares=options.spares,
        )
        if options.nproc is not None and options.nproc < 1:
            raise ConfigError(f"--nproc must be 1 or more, not {options.nproc}")
        if options.spares and not hosts:
            raise ConfigError("--spares holds back hosts of a --hostfile; give one")
        ranks = options.nproc or _default_ranks()
        return Supervisor(config, train, ranks=ranks, hosts=hosts, policy=policy).run()
    except StateXError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _default_ranks() -> int:
    import torch

    return max(torch.cuda.device_count(), 1)


if __name__ == "__main__":
    sys.exit(main())
