"""``statex eval capacity``: the longest context with near-perfect passkey recall."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from launch.eval_options import add_common, interval_text, parse_numbers, reading_options, run_suite, title_of

if TYPE_CHECKING:
    from rich.table import Table


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the suite to ``parser``."""
    add_common(parser, batch_size=32)
    for name, kind, default, text in (
        ("lengths", str, "256,512,1K,2K,4K,8K,16K", "tokens of a prompt: the ladder"),
        ("depths", int, 5, "depths of the passkey at each length"),
        ("num-samples", int, 20, "prompts for each length and depth"),
        ("threshold", float, 0.95, "share of right answers at which a length passes"),
        ("haystack", str | None, None, "a text file (default: made-up sentences)"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)


def run(args: Any) -> int:
    """Run the suite.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options, the model or the data are wrong.
    """
    from statex_dist.evaluation.health.capacity import CapacitySettings, capacity_units, write_capacity

    settings = CapacitySettings(
        lengths=parse_numbers(args.lengths, "--lengths"),
        depths=args.depths,
        num_samples=args.num_samples,
        threshold=args.threshold,
        haystack=args.haystack,
        **reading_options(args),
    )
    return run_suite(
        args,
        "capacity",
        settings,
        units=lambda model, tokenizer: capacity_units(model, settings, tokenizer),
        write=lambda records, directory, **facts: write_capacity(records, directory, settings, **facts),
        table=_table,
    )


def _table(summary: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("length", "recall", "95 % interval", "exact", "samples", title=title_of("capacity", summary["model"]))
    for rung in summary["ladder"]:
        table.add_row(
            f"{rung['length']:,}",
            f"{rung['accuracy']:.3f}{'' if rung['passes'] else '  fails'}",
            interval_text(rung),
            f"{rung['exact_low']:.3f} .. {rung['exact_high']:.3f}",
            str(rung["samples"]),
        )
    table.caption = describe(summary["capacity"], summary["ladder"], summary["settings"]["threshold"])
    return table


def describe(capacity: dict[str, Any], ladder: list[dict[str, Any]], threshold: float) -> str:
    """Return what a ladder says of the capacity in one line."""
    share = f"{100 * threshold:g} % recall"
    if capacity["tokens"] is None:
        return f"capacity: below {ladder[0]['length']:,} tokens, the shortest length asked: none reaches {share}"
    if capacity["at_least"]:
        line = f"capacity: {capacity['tokens']:,} tokens or more ({share} at the longest length asked)"
    else:
        line = f"capacity: {capacity['tokens']:,} tokens ({share}; {capacity['next_failing']:,} fails)"
    if not capacity["monotone"]:
        line += "; a shorter length fails: see the ladder"
    proved = "no length" if capacity["low"] is None else f"{capacity['low']:,}"
    return f"{line}; at 95 % confidence the samples prove {proved}"
