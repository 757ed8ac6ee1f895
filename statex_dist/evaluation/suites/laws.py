"""``statex eval laws``: how training length and recall grow with the state, fitted to results of other suites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statex_dist.errors import ConfigError
from statex_dist.evaluation.suites.base import Figure, Lines, Measured, Result, Suite, option

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Options:
    results: tuple[str, ...] = option(
        metavar="DIR", help="results of collapse and capacity, one directory or many", positional=True
    )
    judge: str = option("model", help="a collapse is one of the model (its loss) or of heads")


class LawsSuite(Suite):
    name = "laws"
    help = "fits of training length and recall to the state size, from results of collapse and capacity"
    title = "State health: laws"
    said = "Laws fitted to several models: the training length that forgetting takes, and the context recalled."
    options = Options
    of_model = False

    def run_alone(self, args: Any) -> list[Path]:
        from statex_dist.evaluation.health.laws import JUDGES, find_results, fit_laws, write_laws
        from statex_dist.evaluation.report import open_target

        if args.judge not in JUDGES:
            raise ConfigError(f"--judge {args.judge!r} is not one of {', '.join(JUDGES)}")
        summaries = find_results([Path(directory) for directory in args.results])
        laws = fit_laws(summaries, args.judge)
        open_target(Path(args.out), overwrite=args.overwrite)
        return write_laws(laws, Path(args.out), judge=args.judge)

    def table(self, summary: dict[str, Any]) -> Table:
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

    def measured(self, summary: Mapping[str, Any]) -> Iterator[Measured]:
        for law in ("forget", "recall"):
            fit = summary[law]
            if fit is None:
                yield Measured(name=f"{law}: fit", value=None, words=summary[f"{law}_refused"] or "not asked for")
                continue
            for name, value in fit["parameters"].items():
                error = fit["errors"][name]
                ends = (None, None) if error is None else (value - error, value + error)
                yield Measured(name=f"{law}: {name}", value=value, low=ends[0], high=ends[1])
            yield Measured(name=f"{law}: R squared", value=fit["r_squared"])

    def figures(self, results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
        from statex_dist.evaluation.page.health_figures import law_figures

        return law_figures(results)

    def details(self, results: Sequence[Result]) -> Iterator[tuple[str, Lines]]:
        for result in results:
            for law in ("forget", "recall"):
                lines = [["state elements", "tokens", "used"]]
                for point in result.summary[f"{law}_points"]:
                    if point["tokens"] is not None:
                        told = Measured(name="", value=point["tokens"], low=point["low"], high=point["high"])
                        used = "yes" if point["used"] else f"no: {point['why']}"
                        lines.append([f"{point['state_numbers']:,}", told.text, used])
                if len(lines) > 1:
                    yield f"Points of the {law} law: {result.path.parent}", lines


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
