"""``statex inspect``: what a checkpoint directory holds."""

from __future__ import annotations

import json
import sys
from typing import Any

from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex inspect`` to ``parser``."""
    parser.add_argument("directory", type=str, metavar="DIR", help="checkpoint or run")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: Any) -> int:
    """Print what the directory holds; 1 where its tensors are not those of its ``config.json``.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: Not a checkpoint, or a damaged one.
    """
    from checkpoints_tools.inspect import inspect

    facts = inspect(args.directory)
    if args.json:
        sys.stdout.write(json.dumps(facts.to_dict()) + "\n")
    else:
        _print(facts)
    return 1 if facts.problem else 0


def _print(facts: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    plan = ", ".join(
        f"{e['layer']}: {e['op']} x{e['factor']} {e['init']}" for e in (facts.plan or {}).get("layers", [])
    )
    rows = {
        "directory": facts.path,
        "layout": facts.kind,
        "model type": facts.model_type,
        "tensors": f"{facts.tensors} ({', '.join(f'{n} {dtype}' for dtype, n in facts.dtypes.items())})",
        "elements": f"{facts.parameters:,}",
        "tied": ", ".join(f"{a} = {b}" for a, b in facts.tied.items()),
        "state numbers": f"{facts.state_numbers:,}" if facts.state_numbers is not None else None,
        "plan": plan,
        "step": facts.step,
        "ranks": facts.world_size,
        "manifest": facts.manifest,
        "fits config.json": {True: "yes", False: f"no: {facts.problem}", None: None}[facts.complete],
    }
    for name, value in rows.items():
        if value not in (None, ""):
            table.add_row(name, str(value))
    Console(highlight=False, soft_wrap=True).print(table)
