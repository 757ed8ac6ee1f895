"""``statex report``: how training runs went, as a page to look at and as figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from statex_dist.errors import ConfigError


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex report`` to ``parser``."""
    parser.add_argument(
        "run_dirs", type=str, nargs="+", metavar="RUN_DIR", help="directory of a training run; several are compared"
    )
    parser.add_argument("--out", type=str | None, default=None, metavar="FILE", help="write the page to an .html file")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: Any) -> int:
    """Print the runs' figures and write the page.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: A directory is not that of a run, or the page cannot be written where it is to go.
    """
    from statex_dist.checkpoint.manifest import write_durably
    from statex_dist.evaluation.run_report import make_page, read_runs, summarise

    out = Path(args.out) if args.out is not None else None
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out} must end in .html")
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out {out}: directory {out.parent} does not exist; make it first")
    runs = read_runs([Path(directory) for directory in args.run_dirs])
    if out is not None:
        write_durably(out, make_page(runs))
    if args.json:
        sys.stdout.write(json.dumps({"runs": [summarise(run).to_dict() for run in runs]}) + "\n")
        return 0
    _print(runs, out)
    return 0


def _print(runs: Any, out: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from statex_dist.evaluation.run_report import summary_lines

    head, *lines = summary_lines(runs)
    table = Table()
    for name in head:
        table.add_column(name, justify="right" if name else "left")
    for line in lines:
        table.add_row(*line)
    # A pipe has no width: 100 columns hold a few runs.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    console.print(table)
    if out is not None:
        console.print(f"page: {out}", soft_wrap=True)
