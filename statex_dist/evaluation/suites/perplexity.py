"""``statex eval perplexity``: loss on text, by position in the context."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statex_dist.errors import ConfigError, DataError
from statex_dist.evaluation.suites.base import (
    Evaluation,
    Figure,
    Measured,
    Result,
    Suite,
    estimate_of,
    interval,
    interval_text,
    number,
    option,
    settings_of,
    title_of,
)

if TYPE_CHECKING:
    from rich.table import Table

    from statex_dist.data.tokenizer import Tokenizer
    from statex_dist.evaluation.journal import EvalUnit, Record
    from statex_dist.models.lm import RecurrentLM


@dataclass
class Options:
    data: str | None = option(None, metavar="PATH", help="shards or text files")
    packed_length: int | None = option(
        None, help="join the documents and cut sequences of N tokens (default: whole documents)"
    )
    max_tokens: int | None = option(None, help="stop after N tokens")


class PerplexitySuite(Suite):
    name = "perplexity"
    help = "loss on text, by position in the context"
    title = "Perplexity"
    said = "Loss of text by its position. A rise past the training length is the sign to look for."
    options = Options

    def prepare(self, args: Any) -> Evaluation:
        from statex_dist.evaluation.documents import read_documents
        from statex_dist.evaluation.perplexity import (
            PerplexitySettings,
            perplexity_units,
            summarise_perplexity,
            write_perplexity,
        )

        if not args.data:
            raise ConfigError("perplexity needs text; set --data to a directory of `statex prepare`, or to text files")
        settings = settings_of(PerplexitySettings, args)
        tokenizers: list[Tokenizer] = []

        def units(model: RecurrentLM, tokenizer: Tokenizer) -> Iterable[EvalUnit]:
            tokenizers.append(tokenizer)
            made = perplexity_units(model, read_documents(Path(args.data), tokenizer), settings)
            # The first unit is made at once, so that a wrong path is found before the directory is.
            first = list(itertools.islice(made, 1))
            if not first:
                raise DataError(f"data {args.data} holds no document of two tokens or more")
            return itertools.chain(first, made)

        def write(
            records: list[Record], directory: Path, *, model: dict[str, Any], timing: dict[str, Any]
        ) -> list[Path]:
            result = summarise_perplexity(records, settings, tokenizer=tokenizers[0])
            timing = {**timing, "tokens_per_second": round(result.tokens / max(timing["seconds"], 1e-9), 1)}
            return write_perplexity(result, directory, records=records, model=model, data=args.data, timing=timing)

        return Evaluation(settings=settings, units=units, write=write, given={"data": args.data})

    def table(self, summary: dict[str, Any]) -> Table:
        from rich.table import Table

        what = "documents" if summary["settings"]["packed_length"] is None else "packed sequences"
        table = Table("figure", "value", title=title_of("perplexity", summary["model"]))
        interval = interval_text(summary, low="loss_low", high="loss_high", digits=4)
        table.add_row("loss (nats/token)", f"{summary['loss']:.4f}  ({interval} over {what})")
        table.add_row("perplexity", "inf" if summary["perplexity"] is None else f"{summary['perplexity']:.4f}")
        if summary["bits_per_byte"] is not None:
            table.add_row("bits per byte", f"{summary['bits_per_byte']:.4f}")
        table.add_row("target tokens", f"{summary['tokens']} in {summary['documents']} {what}")
        table.add_row("speed", f"{summary['timing']['tokens_per_second']:.0f} tokens/s")
        for row in summary["by_position"]:
            text = f"{row['loss']:.4f}  ({interval_text(row, digits=4)}, {row['tokens']} tokens)"
            table.add_row(f"loss at {row['start']}..{row['end'] - 1}", text)
        return table

    def measured(self, summary: Mapping[str, Any]) -> Iterator[Measured]:
        loss, low, high = (summary[key] for key in ("loss", "loss_low", "loss_high"))
        ends = [math.exp(value) if value is not None and value < 700 else None for value in (low, high)]
        documents = summary["documents"]
        yield Measured(
            name="perplexity", value=summary["perplexity"], low=ends[0], high=ends[1], samples=documents, headline=True
        )
        yield Measured(name="loss (nats per token)", value=loss, low=low, high=high, samples=documents)
        if summary["bits_per_byte"] is not None:
            yield Measured(name="bits per byte", value=summary["bits_per_byte"])
        yield Measured(name="target tokens", value=summary["tokens"])
        for bucket in summary["by_position"]:
            yield estimate_of(f"loss at {bucket['start']} .. {bucket['end'] - 1}", bucket, key="loss")

    def figures(self, results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
        from statex_dist.evaluation.page.suite_figures import perplexity_figures

        return perplexity_figures(results, looks)

    def card(self, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield "perplexity", number(summary["perplexity"])
        yield "loss (nats per token)", interval(summary["loss"], summary["loss_low"], summary["loss_high"])
        if summary["bits_per_byte"] is not None:
            yield "bits per byte", number(summary["bits_per_byte"])
        yield "target tokens", number(summary["tokens"])
