"""``statex inspect``: what a checkpoint directory holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from jsonargparse import ArgumentParser

from launch.tool_options import add_context_length, sequence_lines, size


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex inspect`` to ``parser``."""
    parser.add_argument("directory", type=str, metavar="DIR", help="checkpoint or run, or a file of states")
    add_context_length(parser)
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: Any) -> int:
    """Print what the directory holds; 1 where something is missing or is not what it should be.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: Not a checkpoint, or a damaged one.
    """
    from pathlib import Path

    from checkpoints_tools.verify.inspect import inspect, read_states_header

    if Path(args.directory).is_file():
        header = read_states_header(Path(args.directory))
        sys.stdout.write(json.dumps(header) + "\n" if args.json else "".join(f"{k}: {v}\n" for k, v in header.items()))
        return 0
    facts = inspect(args.directory, context_length=args.context_length)
    if args.json:
        sys.stdout.write(json.dumps(facts.to_dict()) + "\n")
    else:
        _print(facts)
    return 1 if facts.problem else 0


_DONE = {"plan": "planned for", "expand": "expanded", "train": "trained here", "run": "run here"}


def _able(facts: Any, use: str) -> str:
    """Return whether something can be done with the model, or why not; the problem itself is told once."""
    if facts.able[use]:
        return "yes"
    return "no" if facts.unable[use] == facts.problem else f"no: {facts.unable[use]}"


def _memory(facts: Any) -> Iterator[tuple[str, str]]:
    """Yield the memory of one sequence, a line each."""
    for label, (count,) in sequence_lines(facts.sequence) if facts.sequence is not None else ():
        yield label, "not known" if count is None else size(count)


def _print(facts: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from statex_dist.state.plan import LayerExpansion

    table = Table(show_header=False)
    plan = ", ".join(f"{row['layer']}: {LayerExpansion(**row).summary}" for row in (facts.plan or {}).get("layers", []))
    rows = {
        "directory": facts.path,
        "layout": facts.kind,
        "complete": {True: "yes", False: "NO", None: None}[facts.complete],
        "problem": facts.problem,
        "notes": "\n".join(facts.notes),
        "model type": facts.model_type,
        "plan": plan,
        "state elements": f"{facts.state_numbers:,}" if facts.state_numbers is not None else None,
        **dict(_memory(facts)),
        "step": facts.step,
        "ranks": facts.world_size,
        "tensors": f"{facts.tensors} ({', '.join(f'{n} {d}' for d, n in facts.dtypes.items())})"
        if facts.dtypes
        else None,
        "parameters": f"{facts.parameters:,}" if facts.parameters is not None else None,
        "tied": ", ".join(f"{a} = {b}" for a, b in facts.tied.items()),
        "optimizer states": ", ".join(facts.states),
        "files": f"{facts.files}, {size(facts.bytes)}",
        "largest": "\n".join(f"{name}  {size(count)}" for name, count in [*facts.largest.items()][:4]),
        "manifest": facts.manifest,
        **{f"can be {done}": _able(facts, use) for use, done in _DONE.items()},
        "checked": "\n".join(facts.checks),
        "not checked": "\n".join(facts.unchecked),
    }
    for name, value in rows.items():
        if value not in (None, ""):
            table.add_row(name, str(value))
    Console(highlight=False, soft_wrap=True).print(table)
