"""``statex eval icl``: in-context classification by number of shots."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from launch.eval_options import add_common, interval_text, parse_numbers, reading_options, run_suite, title_of

if TYPE_CHECKING:
    from rich.table import Table


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex eval icl`` to ``parser``."""
    add_common(parser, batch_size=64)
    parser.add_argument(
        "--data",
        type=str | None,
        default=None,
        metavar="FILE",
        help='examples, one {"text": ..., "label": ...} a line (default: made-up words)',
    )
    parser.add_argument("--shots", type=str, default="1,2,4,8,16,32,64", help="numbers of examples before a query")
    parser.add_argument("--num-trials", type=int, default=20, help="draws of examples and queries")
    parser.add_argument("--num-queries", type=int, default=16, help="queries of a trial")
    parser.add_argument("--num-labels", type=int, default=4, help="labels of the made-up task")
    parser.add_argument(
        "--permute-labels",
        action="store_true",
        help="exchange the labels in each trial, so that none keeps its meaning",
    )


def run(args: Any) -> int:
    """Run the suite."""
    from statex_dist.evaluation.icl import icl_units, write_icl
    from statex_dist.evaluation.icl_tasks import MADE_UP_LABELS, IclSettings, read_examples

    settings = IclSettings(
        shots=parse_numbers(args.shots, "--shots"),
        num_trials=args.num_trials,
        num_queries=args.num_queries,
        num_labels=args.num_labels,
        permute_labels=args.permute_labels,
        **reading_options(args),
    )
    examples = None if args.data is None else read_examples(Path(args.data))
    labels = sorted({e.label for e in examples}) if examples is not None else MADE_UP_LABELS[: settings.num_labels]
    return run_suite(
        args,
        "icl",
        settings,
        units=lambda model, tokenizer: icl_units(model, settings, tokenizer, examples),
        write=functools.partial(write_icl, settings=settings, labels=labels, data=args.data),
        table=make_table,
        ragged=True,
        given={"data": args.data, "examples": _digest(examples)},
    )


def _digest(examples: Any) -> str | None:
    import xxhash

    return None if examples is None else xxhash.xxh3_64_hexdigest(repr(examples))


def make_table(summary: dict[str, Any]) -> Table:
    """Return the printed table of ``icl.json``."""
    from rich.table import Table

    table = Table(
        "shots", "accuracy", "95 % interval", "per token", "chance", "queries", title=title_of("icl", summary["model"])
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
