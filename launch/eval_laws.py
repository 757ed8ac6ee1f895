"""``statex eval laws``: how training length and recall grow with the state, fitted to results of other suites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from launch.eval_options import print_result
from statex_dist.checkpoint.json_file import read_json
from statex_dist.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the suite to ``parser``."""
    parser.add_argument(
        "results", type=str, nargs="+", metavar="DIR", help="results of collapse and capacity, one directory or many"
    )
    parser.add_argument("--out", type=str, required=True, metavar="DIR", help="where the fits go")
    parser.add_argument(
        "--judge", type=str, default="model", help="a collapse is one of the model (its loss) or of heads"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results in a directory that is not empty")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")


def run(args: Any) -> int:
    """Fit the laws, write the files and print the table.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options or the results are wrong.
    """

    from statex_dist.evaluation.health.laws import JUDGES, find_results, fit_laws, write_laws
    from statex_dist.evaluation.report import open_target

    if args.judge not in JUDGES:
        raise ConfigError(f"--judge {args.judge!r} is not one of {', '.join(JUDGES)}")
    summaries = find_results([Path(directory) for directory in args.results])
    laws = fit_laws(summaries, args.judge)
    open_target(Path(args.out), overwrite=args.overwrite)
    files = write_laws(laws, Path(args.out), judge=args.judge)
    summary = read_json(files[0])
    print_result(summary, _table, args.out, as_json=args.json)
    return 0


def _table(summary: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("law", "state (M)", "tokens", "", title=_title(summary))
    for name in ("forget", "recall"):
        for point in summary[f"{name}_points"]:
            tokens = "-" if point["tokens"] is None else f"{point['tokens']:,}"
            note = point["why"] or ("" if point["low"] is None else f"above {point['low']:,}")
            table.add_row(name, f"{point['state_numbers'] / 1e6:.4g}", tokens, note)
        table.add_section()
    table.caption = "\n".join(_line(name, summary) for name in ("forget", "recall"))
    return table


def _title(summary: dict[str, Any]) -> str:
    family = summary["model_type"]
    return "training length and recall by state size" + ("" if family is None else f" of {family} models")


def _line(name: str, summary: dict[str, Any]) -> str:
    """Return a fitted law in one line, with its parameters' 95 % intervals, or why there is none."""
    law = summary[name]
    if law is None:
        return f"{name}: not fitted: {summary[f'{name}_refused']}"
    p = {key: f"{value:.4g}{_error(law['errors'][key])}" for key, value in law["parameters"].items()}
    form = (
        f"T = ({p['slope']}) N + ({p['intercept']})"
        if law["form"] == "linear"
        else f"T = ({p['a']}) (b^N - 1) + ({p['c']}), b = e^({p['rate']})"
    )
    if law["b"] is not None:
        form += f" = {law['b']:.4g}"
    fit = f"R^2 {law['r_squared']:.4f}, " if law["r_squared"] is not None else ""
    return f"{name}: {form} [K tokens, M numbers]; {fit}scatter {law['residual_std']:.3g} K, {len(law['state'])} points"


def _error(half: float | None) -> str:
    return "" if half is None else f" +- {half:.2g}"
