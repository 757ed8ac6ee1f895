"""``statex verify``: is a checkpoint whole, are two the same model, is one the other's expansion and nothing else?"""

from __future__ import annotations

import json
import sys
from typing import Any

from jsonargparse import ArgumentParser

from launch.tool_options import add_processes, progress_bar, work_part


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex verify`` to ``parser``."""
    parser.add_argument("first", type=str, metavar="A", help="checkpoint (with --as-expansion: the base)")
    parser.add_argument(
        "second",
        type=str | None,
        nargs="?",
        default=None,
        metavar="B",
        help="checkpoint (with --as-expansion: the expanded one); without it A is held to its manifest and checksums",
    )
    parser.add_argument(
        "--as-expansion",
        action="store_true",
        help="prove that B is A with the plan in B's config.json, and that nothing else changed",
    )
    parser.add_argument(
        "--rtol",
        type=float | None,
        default=None,
        help="largest relative difference of a value, dtypes aside (default: same dtype and same bytes)",
    )
    add_processes(parser)
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")


def run(args: Any) -> int:
    """Print what agrees and what differs; 1 where anything does.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: A checkpoint is damaged, or there is nothing to verify.
    """
    from checkpoints_tools.verify.verify import verify_alone, verify_expansion, verify_same
    from statex_dist.errors import ConfigError

    if args.as_expansion and args.rtol is not None:
        raise ConfigError("--rtol is for comparing two models; an expansion is verified to the last bit")
    if args.rtol is not None and not args.rtol >= 0:
        raise ConfigError(f"--rtol must be 0 or more, not {args.rtol}")
    if args.workers < 1:
        raise ConfigError(f"--workers must be a whole number from 1, not {args.workers}")
    if args.processes is not None and args.processes < 1:
        raise ConfigError(f"--processes must be a whole number from 1, not {args.processes}")
    if args.as_expansion and args.part is not None:
        raise ConfigError("--part does not go with --as-expansion, whose report is of all tensors; give --processes")
    if args.second is None and (args.as_expansion or args.rtol is not None):
        raise ConfigError("--as-expansion and --rtol compare two checkpoints; give B too")
    common = {"workers": args.workers, "processes": args.processes}
    if not args.as_expansion:
        common["part"] = work_part(args)
    with progress_bar("verify") as progress:
        if args.second is None:
            verdict = verify_alone(args.first, progress=progress, **common)
        elif args.as_expansion:
            verdict = verify_expansion(args.first, args.second, progress=progress, **common)
        else:
            verdict = verify_same(args.first, args.second, rtol=args.rtol, progress=progress, **common)
    if args.json:
        sys.stdout.write(json.dumps(verdict.to_dict()) + "\n")
        return 0 if verdict.ok else 1
    for difference in verdict.differences:
        sys.stdout.write(f"differs: {difference}\n")
    for note in verdict.notes:
        sys.stdout.write(f"note: {note}\n")
    for row in verdict.plan:
        sys.stdout.write("plan: " + ", ".join(f"{key} {value}" for key, value in row.items()) + "\n")
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(verdict.tensors.items()))
    if verdict.second is None:
        word = "whole" if verdict.ok else "DAMAGED"
        share = f"part {verdict.part} of " if verdict.part else ""
        sys.stdout.write(f"{share}{verdict.first} is {word} (checked: {counts or 'nothing'})\n")
        return 0 if verdict.ok else 1
    relation = "an expansion of" if args.as_expansion else "the same model as"
    word = "is" if verdict.ok else "is NOT"
    share = f"part {verdict.part} of " if verdict.part else ""
    sys.stdout.write(
        f"{share}{verdict.second} {word} {relation} {verdict.first} (tensors that agree: {counts or 'none'})\n"
    )
    return 0 if verdict.ok else 1
