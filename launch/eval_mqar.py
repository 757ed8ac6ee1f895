"""``statex eval mqar``: associative recall by number of key-value pairs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from launch.eval_options import (
    add_common,
    interval_text,
    parse_numbers,
    parse_range,
    reading_options,
    run_suite,
    title_of,
)

if TYPE_CHECKING:
    from rich.table import Table


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex eval mqar`` to ``parser``."""
    add_common(parser, batch_size=32)
    parser.add_argument("--num-pairs", type=str, default="8,16,32,64", help="numbers of key-value pairs")
    parser.add_argument("--num-samples", type=int, default=256, help="documents for each number of pairs")
    parser.add_argument("--key-ids", type=str, default="128:192", metavar="FIRST:END", help="token ids of the keys")
    parser.add_argument("--value-ids", type=str, default="192:256", metavar="FIRST:END", help="token ids of the values")


def run(args: Any) -> int:
    """Run the suite."""
    from statex_dist.evaluation.mqar import MqarSettings, mqar_units, write_mqar

    settings = MqarSettings(
        num_pairs=parse_numbers(args.num_pairs, "--num-pairs"),
        num_samples=args.num_samples,
        keys=parse_range(args.key_ids, "--key-ids"),
        values=parse_range(args.value_ids, "--value-ids"),
        **reading_options(args),
    )
    return run_suite(
        args,
        "mqar",
        settings,
        units=lambda model, tokenizer: mqar_units(model, settings),
        write=functools.partial(write_mqar, settings=settings),
        table=make_table,
        tokenizer=False,
    )


def make_table(summary: dict[str, Any]) -> Table:
    """Return the printed table of ``mqar.json``."""
    from rich.table import Table

    columns = ("pairs", "accuracy", "95 % interval", "guessing", "eliminating", "pairs recalled")
    table = Table(*columns, title=title_of("mqar", summary["model"]))
    for n, row in summary["by_num_pairs"].items():
        levels = (f"{row['guessing']:.3f}", f"{row['eliminating']:.3f}")
        table.add_row(n, f"{row['accuracy']:.3f}", interval_text(row), *levels, f"{row['pairs_recalled']:.1f}")
    return table
