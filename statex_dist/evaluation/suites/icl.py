"""``statex eval icl``: in-context classification by number of shots."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statex_dist.evaluation.suites.base import (
    Evaluation,
    Figure,
    Measured,
    Result,
    Suite,
    accuracy,
    estimate_of,
    interval_text,
    number,
    option,
    parse_numbers,
    settings_of,
    title_of,
)

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Options:
    data: str | None = option(
        None, metavar="FILE", help='examples, one {"text": ..., "label": ...} a line (default: made-up words)'
    )
    shots: str = option("1,2,4,8,16,32,64", help="numbers of examples before a query")
    num_trials: int = option(20, help="draws of examples and queries")
    num_queries: int = option(16, help="queries of a trial")
    num_labels: int = option(4, help="labels of the made-up task")
    permute_labels: bool = option(False, help="exchange the labels in each trial, so that none keeps its meaning")


class IclSuite(Suite):
    name = "icl"
    help = "in-context classification by number of shots"
    title = "In-context learning"
    said = "Share of queries whose label is the most likely one, by the number of labelled examples before them."
    options = Options
    batch_size = 64
    ragged = True

    def prepare(self, args: Any) -> Evaluation:
        from statex_dist.evaluation.icl import icl_units, write_icl
        from statex_dist.evaluation.icl_tasks import MADE_UP_LABELS, IclSettings, read_examples

        settings = settings_of(IclSettings, args, shots=parse_numbers(args.shots, "--shots"))
        examples = None if args.data is None else read_examples(Path(args.data))
        labels = sorted({e.label for e in examples}) if examples is not None else MADE_UP_LABELS[: settings.num_labels]
        return Evaluation(
            settings=settings,
            units=lambda model, tokenizer: icl_units(model, settings, tokenizer, examples),
            write=functools.partial(write_icl, settings=settings, labels=labels, data=args.data),
            given={"data": args.data, "examples": _digest(examples)},
        )

    def table(self, summary: dict[str, Any]) -> Table:
        from rich.table import Table

        table = Table(
            "shots",
            "accuracy",
            "95 % interval",
            "per token",
            "chance",
            "queries",
            title=title_of("icl", summary["model"]),
        )
        for shots, row in summary["by_shots"].items():
            figures = (
                f"{row['accuracy']:.3f}",
                interval_text(row),
                f"{row['accuracy_norm']:.3f}",
                f"{summary['chance']:.3f}",
            )
            table.add_row(shots, *figures, str(row["queries"]))
        return table

    def measured(self, summary: Mapping[str, Any]) -> Iterator[Measured]:
        last = max(summary["by_shots"], key=int)
        for shots, e in summary["by_shots"].items():
            yield estimate_of(f"accuracy, {shots} shots", e, headline=shots == last)
        yield Measured(name="chance", value=summary["chance"])

    def figures(self, results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
        from statex_dist.evaluation.page.suite_figures import icl_figures

        return icl_figures(results, looks)

    def card(self, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        for shots, entry in summary["by_shots"].items():
            yield f"accuracy, {shots} shots", accuracy(entry)
        yield "accuracy by chance", number(summary["chance"])


def _digest(examples: Any) -> str | None:
    import xxhash

    return None if examples is None else xxhash.xxh3_64_hexdigest(repr(examples))
