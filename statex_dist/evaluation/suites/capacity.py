"""``statex eval capacity``: the longest context with near-perfect passkey recall."""

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
    estimate_of,
    interval_text,
    option,
    parse_numbers,
    settings_of,
    short_number,
    title_of,
)

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Options:
    lengths: str = option("256,512,1K,2K,4K,8K,16K", help="tokens of a prompt: the ladder")
    depths: int = option(5, help="depths of the passkey at each length")
    num_samples: int = option(20, help="prompts for each length and depth")
    threshold: float = option(0.95, help="share of right answers at which a length passes")
    haystack: str | None = option(None, help="a text file (default: made-up sentences)")


class CapacitySuite(Suite):
    name = "capacity"
    help = "the longest context with near-perfect passkey recall"
    title = "State health: capacity"
    said = "The longest context at which a passkey is still recalled."
    options = Options
    batch_size = 32

    def prepare(self, args: Any) -> Evaluation:
        from statex_dist.evaluation.health.capacity import CapacitySettings, capacity_units, write_capacity

        settings = settings_of(CapacitySettings, args, lengths=parse_numbers(args.lengths, "--lengths"))
        return Evaluation(
            settings=settings,
            units=lambda model, tokenizer: capacity_units(model, settings, tokenizer),
            write=functools.partial(write_capacity, settings=settings),
        )

    def table(self, summary: dict[str, Any]) -> Table:
        from rich.table import Table

        table = Table(
            "length", "recall", "95 % interval", "exact", "samples", title=title_of("capacity", summary["model"])
        )
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

    def measured(self, summary: Mapping[str, Any]) -> Iterator[Measured]:
        found = summary["capacity"]
        tokens, low, high = found["tokens"], found["low"], found["high"]
        if tokens is None:
            words = "below the shortest tried"
        else:
            words = f"{'at least ' if found['at_least'] else ''}{tokens:,}"
            words += "" if low is None or high is None else f" ({low:,} .. {high:,})"
        name = f"tokens with {summary['settings']['threshold']:.0%} recall"
        yield Measured(name=name, value=tokens, low=low, high=high, words=words, headline=True)
        for step in summary["ladder"]:
            # The interval that is drawn, and that decides what is kept.
            exact = {**step, "low": step["exact_low"], "high": step["exact_high"]}
            yield estimate_of(f"accuracy, {short_number(step['length'])} tokens", exact)

    def figures(self, results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
        from statex_dist.evaluation.page.health_figures import capacity_figures

        return capacity_figures(results, looks)

    def card(self, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        found = summary["capacity"]
        tokens = found["tokens"]
        told = "below the shortest tried" if tokens is None else f"{'at least ' * found['at_least']}{tokens:,}"
        yield f"tokens with {summary['settings']['threshold']:.0%} recall of a passkey", told


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
