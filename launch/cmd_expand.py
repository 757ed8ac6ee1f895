"""``statex expand``: grow the state of a checkpoint on disk."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from jsonargparse import ArgumentParser

from launch.cmd_plan import add_plan_options, check_plan_options
from launch.cmd_reshard import add_output_options, progress_bar


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex expand`` to ``parser``."""
    add_output_options(parser)
    add_plan_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the new values")


def run(args: Any) -> int:
    """Expand and print the account.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options, the source or the target are wrong.
    """
    from checkpoints_tools.expand import expand

    check_plan_options(args)
    with progress_bar("expand") as progress:
        account = expand(
            args.source,
            args.target,
            layers=args.layers,
            factor=args.factor,
            init=args.init,
            op=args.op,
            seed=args.seed,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
            progress=progress,
        )
    if args.json:
        sys.stdout.write(json.dumps(account.to_dict()) + "\n")
    else:
        _print(account, args.target)
    return 0


def _print(account: Any, target: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table(title="Expanded layers (tensors by what happened to them; expansion.json names each)")
    changes = ("kept", "grown", "reinitialised", "new")
    for name in ("layer", "operation", "state", "after", *changes):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for layer in account.layers:
        counts = Counter(row.change for row in layer.tensors)
        table.add_row(
            str(layer.layer),
            f"{layer.op} x{layer.factor} {layer.init}",
            f"{layer.state_before:,}",
            f"{layer.state_after:,}",
            *(str(counts[change]) for change in changes),
        )
    console.print(table)
    growth = 100 * (account.state_after / account.state_before - 1)
    console.print(
        f"{target}: state {account.state_before:,} -> {account.state_after:,} numbers ({growth:+.1f} %), parameters "
        f"{account.parameters_before:,} -> {account.parameters_after:,}, {account.kept_outside} tensors outside kept"
    )
