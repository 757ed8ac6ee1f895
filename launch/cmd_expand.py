"""``statex expand``: grow the state of a checkpoint on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from launch.tool_options import (
    add_output_options,
    add_plan_options,
    missing_text,
    plan_options,
    progress_bar,
    write_options,
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex expand`` to ``parser``."""
    add_output_options(parser, layouts="hf, or zero3 to grow a run in training")
    add_plan_options(parser)
    parser.add_argument("--allow-nonfinite", action="store_true", help="copy NaN and Inf instead of stopping there")
    parser.add_argument("--dry-run", action="store_true", help="check names, shapes, plan and target; write nothing")


def run(args: Any) -> int:
    """Expand and print the account.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options, the source or the target are wrong.
    """
    from checkpoints_tools.expand.expand import check_target, expand, prepare_expansion, target_plan
    from statex_dist.checkpoint.formats.registry import is_of_training

    options = write_options(args, allow_nonfinite=args.allow_nonfinite)
    expansion = prepare_expansion(args.source, plan_options(args), dtype=args.dtype, training=is_of_training(args.to))
    if args.dry_run:
        target_plan(expansion, options, to=args.to, world_size=args.world_size)
        check_target(expansion, Path(args.target), options)
        report, missing = expansion.report(), list[int]()
    else:
        with progress_bar("expand") as progress:
            report, missing = expand(
                *(expansion, args.target, options), to=args.to, world_size=args.world_size, progress=progress
            )
    if args.json:
        parts = {} if args.part is None else {"part": args.part, "missing_parts": missing}
        sys.stdout.write(json.dumps({**report.to_dict(), **parts}) + "\n")
    elif missing:
        sys.stdout.write(f"part {args.part} of {args.target} is written; {missing_text(missing)}\n")
    else:
        _print(report, "dry run" if args.dry_run else args.target)
    return 0


def _print(report: Any, target: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table(title="Expanded layers (tensors by what happened to them; expansion_report.json has each)")
    changes = ("kept", "grown", "reinitialised", "new")
    for name in ("layer", "operation", "state", "after", *changes):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for layer in report.layers:
        expansion = layer.expansion
        reset = " reset" if expansion.reset_dynamics else ""
        table.add_row(
            str(expansion.layer),
            f"{expansion.summary}{reset}",
            f"{layer.state_before:,}",
            f"{layer.state_after:,}",
            *(str(layer.changes.get(change, 0)) for change in changes),
        )
    console.print(table)
    growth = 100 * (report.state_after / report.state_before - 1)
    console.print(
        f"{target}: state {report.state_before:,} -> {report.state_after:,} numbers ({growth:+.1f} %), parameters "
        f"{report.parameters_before:,} -> {report.parameters_after:,}, {report.kept_outside} tensors outside kept"
    )
