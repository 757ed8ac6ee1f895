"""``statex report``: training runs, evaluations and expansions, as a page to look at and as figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from statex_dist.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from statex_dist.evaluation.page.inputs import Inputs


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex report`` to ``parser``."""
    parser.add_argument(
        "dirs",
        type=str,
        nargs="+",
        metavar="DIR",
        help="training run, results of `statex eval`, expanded model, or a directory that holds some of them",
    )
    parser.add_argument("--out", type=str | None, default=None, metavar="FILE", help="write the page to an .html file")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: Any) -> int:
    """Print the figures of the directories' contents, and write the page.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: A directory holds nothing to report, a file is damaged, or the page cannot be written where it is
            to go.
    """
    from statex_dist.durable.files import write_durably
    from statex_dist.evaluation.page.inputs import read_inputs
    from statex_dist.evaluation.page.whole import make_report, to_dict

    out = Path(args.out) if args.out is not None else None
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out} must end in .html")
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out {out}: directory {out.parent} does not exist; make it first")
    inputs = read_inputs([Path(directory) for directory in args.dirs])
    if out is not None:
        write_durably(out, make_report(inputs))
    if args.json:
        sys.stdout.write(json.dumps(to_dict(inputs)) + "\n")
        return 0
    _print(inputs, out)
    return 0


def _print(inputs: Inputs, out: Path | None) -> None:
    from rich.console import Console

    from statex_dist.evaluation.page.expansions import total_lines
    from statex_dist.evaluation.page.runs import summary_lines
    from statex_dist.evaluation.page.whole import headline_lines

    # A pipe has no width: 100 columns hold a few runs.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    if inputs.runs:
        console.print(_table(summary_lines(inputs.runs)))
    if lines := headline_lines(inputs.results):
        console.print(_table(lines))
    for expansion in inputs.expansions:
        console.print(_table(total_lines(expansion), title=f"expansion: {expansion.name}"))
    for note in inputs.notes:
        console.print(f"left out: {note}", soft_wrap=True)
    if out is not None:
        console.print(f"page: {out}", soft_wrap=True)


def _table(lines: Sequence[Sequence[str]], *, title: str | None = None) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for name in lines[0]:
        table.add_column(name, justify="right" if name else "left")
    for line in lines[1:]:
        table.add_row(*line)
    return table
