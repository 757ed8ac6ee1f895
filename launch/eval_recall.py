"""``statex eval recall``: passkey and RULER's needles, by context length and depth."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from launch.eval_options import add_common, interval_text, parse_numbers, reading_options, run_suite, title_of, words

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_TASKS = "passkey,niah_single_1,niah_single_2,niah_single_3"
ALL_TASKS = f"{DEFAULT_TASKS},niah_multikey_1,niah_multikey_2,niah_multikey_3,niah_multivalue,niah_multiquery"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex eval recall`` to ``parser``."""
    add_common(parser, batch_size=32)
    parser.add_argument("--tasks", type=str, default=DEFAULT_TASKS, help=f"all, or some of {ALL_TASKS}")
    parser.add_argument("--lengths", type=str, default="4K,8K,16K", help="tokens of a prompt, such as 4K,256K")
    parser.add_argument("--depths", type=int, default=5, help="number of depths")
    parser.add_argument("--num-samples", type=int, default=20, help="prompts for each task, length and depth")
    parser.add_argument(
        "--haystack", type=str | None, default=None, metavar="PATH", help="text files or shards (default: made up)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens of an answer, passkey aside")


def run(args: Any) -> int:
    """Run the suite."""
    from statex_dist.evaluation.recall import RecallSettings, recall_units, write_recall

    settings = RecallSettings(
        tasks=tuple(words(ALL_TASKS if args.tasks == "all" else args.tasks)),
        lengths=parse_numbers(args.lengths, "--lengths"),
        depths=args.depths,
        num_samples=args.num_samples,
        haystack=args.haystack,
        max_new_tokens=args.max_new_tokens,
        **reading_options(args),
    )
    return run_suite(
        args,
        "recall",
        settings,
        units=lambda model, tokenizer: recall_units(model, settings, tokenizer),
        write=functools.partial(write_recall, settings=settings),
        table=make_table,
    )


def make_table(summary: dict[str, Any]) -> Table:
    """Return the printed table of ``recall.json``."""
    from rich.table import Table

    table = Table("task", "tokens", "accuracy", "95 % interval", "prompts", title=title_of("recall", summary["model"]))
    for task, result in summary["tasks"].items():
        for length, row in result["by_length"].items():
            table.add_row(task, length, f"{row['accuracy']:.3f}", interval_text(row), str(row["samples"]))
        table.rows[-1].end_section = True
    return table
