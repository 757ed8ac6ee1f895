"""``statex eval recall``: passkey and RULER's needles, by context length and depth."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from statex_dist.evaluation.suites.base import (
    Evaluation,
    Figure,
    Lines,
    Measured,
    Result,
    Suite,
    accuracy,
    estimate_of,
    interval_text,
    option,
    parse_numbers,
    settings_of,
    short_number,
    title_of,
    words,
)

if TYPE_CHECKING:
    from rich.table import Table


DEFAULT_TASKS = "passkey,niah_single_1,niah_single_2,niah_single_3"
ALL_TASKS = f"{DEFAULT_TASKS},niah_multikey_1,niah_multikey_2,niah_multikey_3,niah_multivalue,niah_multiquery"


@dataclass
class Options:
    tasks: str = option(DEFAULT_TASKS, help=f"all, or some of {ALL_TASKS}")
    lengths: str = option("4K,8K,16K", help="tokens of a prompt, such as 4K,256K")
    depths: int = option(5, help="number of depths")
    num_samples: int = option(20, help="prompts for each task, length and depth")
    haystack: str | None = option(None, metavar="PATH", help="text files or shards (default: made up)")
    max_new_tokens: int = option(128, help="tokens of an answer, passkey aside")


class RecallSuite(Suite):
    name = "recall"
    help = "passkey and RULER's needles in a haystack, by context length and depth"
    title = "Recall: needles in a haystack"
    said = "Share of needles that the model says, by the length of the context and the depth of the needle."
    options = Options
    batch_size = 32

    def prepare(self, args: Any) -> Evaluation:
        from statex_dist.evaluation.recall import RecallSettings, recall_units, write_recall

        tasks = tuple(words(ALL_TASKS if args.tasks == "all" else args.tasks))
        settings = settings_of(RecallSettings, args, tasks=tasks, lengths=parse_numbers(args.lengths, "--lengths"))
        return Evaluation(
            settings=settings,
            units=lambda model, tokenizer: recall_units(model, settings, tokenizer),
            write=functools.partial(write_recall, settings=settings),
        )

    def table(self, summary: dict[str, Any]) -> Table:
        from rich.table import Table

        title = title_of("recall", summary["model"])
        table = Table("task", "tokens", "accuracy", "95 % interval", "prompts", title=title)
        for task, result in summary["tasks"].items():
            for length, row in result["by_length"].items():
                table.add_row(task, length, f"{row['accuracy']:.3f}", interval_text(row), str(row["samples"]))
            table.rows[-1].end_section = True
        return table

    def measured(self, summary: Mapping[str, Any]) -> Iterator[Measured]:
        for task, found in summary["tasks"].items():
            yield estimate_of(f"{task}, all lengths", found["overall"], headline=True)
            for length, estimate in found["by_length"].items():
                yield estimate_of(f"{task}, {short_number(int(length))} tokens", estimate)

    def figures(self, results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
        from statex_dist.evaluation.page.suite_figures import recall_figures

        return recall_figures(results, looks)

    def details(self, results: Sequence[Result]) -> Iterator[tuple[str, Lines]]:
        for result in results:
            for task, found in result.summary["tasks"].items():
                cells = {(cell["length"], cell["depth"]): estimate_of("", cell).text for cell in found["cells"]}
                lengths, depths = sorted({n for n, _ in cells}), sorted({d for _, d in cells})
                lines = [["depth", *(f"{short_number(length)} tokens" for length in lengths)]]
                lines += [[f"{100 * d:.0f} %", *(cells.get((n, d), "") for n in lengths)] for d in depths]
                yield f"{task} by depth and length: {result.model}", lines

    def card(self, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        for task, found in summary["tasks"].items():
            yield f"{task}: accuracy, all lengths", accuracy(found["overall"])
            for length, entry in found["by_length"].items():
                yield f"{task}: accuracy, {int(length):,} tokens", accuracy(entry)
