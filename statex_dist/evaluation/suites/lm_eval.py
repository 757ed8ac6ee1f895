"""``statex eval lm-eval``: tasks of lm-evaluation-harness on a model of ours."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from statex_dist.evaluation.suites.base import (
    Evaluation,
    Figure,
    Measured,
    Result,
    Suite,
    interval,
    number,
    option,
    settings_of,
    title_of,
    words,
)

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Options:
    tasks: str = option(metavar="NAMES", help="tasks, groups, tags, patterns or .yaml files")
    include_path: str | None = option(None, metavar="DIR", help="a directory with more task files")
    num_fewshot: int | None = option(None, help="examples before a question (default: each task's own)")
    limit: float | None = option(None, help="documents of each task, or below 1 their share (default: all)")
    max_length: int | None = option(None, help="tokens of context that the model may see (default: all)")
    bootstrap_iters: int = option(100_000, help="resamples of lm-eval's own standard errors; 0 for none")
    fewshot_seed: int | None = option(None, help="seed of the choice of examples (default: lm-eval's)")


class LmEvalSuite(Suite):
    name = "lm-eval"
    help = "tasks of lm-evaluation-harness, read with a recurrent state"
    title = "lm-evaluation-harness"
    said = "The harness's own figures; intervals are ours."
    options = Options
    ragged = True

    def prepare(self, args: Any) -> Evaluation:
        from statex_dist.evaluation import lm_eval_suite as suite

        settings = settings_of(suite.LmEvalSettings, args, tasks=tuple(words(args.tasks)))
        harness = settings.harness()
        return Evaluation(
            settings=settings,
            units=lambda model, tokenizer: suite.units_of(harness, settings, model, tokenizer),
            write=functools.partial(suite.write_lm_eval, harness=harness, settings=settings),
            given={"lm_eval": harness.version, "requests": harness.digest()},
        )

    def table(self, summary: dict[str, Any]) -> Table:
        from rich.table import Column, Table

        table = Table(
            Column("task", overflow="fold"),
            Column("metric", overflow="fold"),
            "value ± standard error",
            "95 % interval",
            "samples",
            title=title_of("lm-eval", summary["model"]),
        )
        for figure in summary["figures"]:
            value, error, low, high = (figure[name] for name in ("value", "stderr", "low", "high"))
            table.add_row(
                figure["task"],
                figure["metric"] + ("" if figure["filter"] == "none" else f" ({figure['filter']})"),
                ("not finite" if value is None else f"{value:.4g}") + ("" if error is None else f" ± {error:.2g}"),
                "" if low is None else f"{low:.4g} .. {high:.4g}",
                "" if figure["samples"] is None else str(figure["samples"]),
            )
        return table

    def measured(self, summary: Mapping[str, Any]) -> Iterator[Measured]:
        for f in summary["figures"]:
            name = f"{f['task']} {f['metric']}" + ("" if f["filter"] == "none" else f" ({f['filter']})")
            words = None
            if f["value"] is not None and f["low"] is None and f["stderr"] is not None:
                words = f"{number(f['value'])} ± {number(f['stderr'])}"
            yield Measured(name=name, value=f["value"], low=f["low"], high=f["high"], samples=f["samples"], words=words)

    def figures(self, results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
        from statex_dist.evaluation.page.suite_figures import lm_eval_figures

        return lm_eval_figures(results, looks)

    def card(self, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        for figure in summary["figures"]:
            filtered = "" if figure["filter"] == "none" else f" ({figure['filter']})"
            yield (
                f"{figure['task']}: {figure['metric']}{filtered}",
                interval(figure["value"], figure["low"], figure["high"]),
            )
