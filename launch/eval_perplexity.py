"""``statex eval perplexity``: loss on text, by position in the context."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from launch.eval_options import add_common, interval_text, reading_options, run_suite, title_of
from statex_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table

    from statex_dist.data.tokenizer import Tokenizer
    from statex_dist.evaluation.journal import Record, Unit
    from statex_dist.models.lm import RecurrentLM


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex eval perplexity`` to ``parser``."""
    add_common(parser, batch_size=8)
    parser.add_argument("--data", type=str | None, default=None, metavar="PATH", help="shards or text files")
    parser.add_argument(
        "--packed-length",
        type=int | None,
        default=None,
        help="join the documents and cut sequences of so many tokens (default: whole documents)",
    )
    parser.add_argument("--max-tokens", type=int | None, default=None, help="stop after so many tokens")


def run(args: Any) -> int:
    """Run the suite.

    Raises:
        ConfigError: No text is given.
    """
    from statex_dist.evaluation.documents import read_documents
    from statex_dist.evaluation.perplexity import (
        PerplexitySettings,
        perplexity_units,
        summarise_perplexity,
        write_perplexity,
    )

    if not args.data:
        raise ConfigError("perplexity needs text; set --data to a directory of `statex prepare`, or to text files")
    settings = PerplexitySettings(
        packed_length=args.packed_length,
        max_tokens=args.max_tokens,
        **reading_options(args),
    )
    tokenizers: list[Tokenizer] = []

    def units(model: RecurrentLM, tokenizer: Tokenizer) -> Iterable[Unit]:
        tokenizers.append(tokenizer)
        made = perplexity_units(model, read_documents(Path(args.data), tokenizer), settings)
        # The first unit is made at once, so that a wrong path is found before the directory is.
        first = list(itertools.islice(made, 1))
        if not first:
            raise DataError(f"data {args.data} holds no document of two tokens or more")
        return itertools.chain(first, made)

    def write(records: list[Record], directory: Path, *, model: dict[str, Any], timing: dict[str, Any]) -> list[Path]:
        result = summarise_perplexity(records, settings, tokenizer=tokenizers[0])
        timing = {**timing, "tokens_per_second": round(result.tokens / max(timing["seconds"], 1e-9), 1)}
        return write_perplexity(result, directory, records=records, model=model, data=args.data, timing=timing)

    return run_suite(
        args, "perplexity", settings, units=units, write=write, table=make_table, given={"data": args.data}
    )


def make_table(summary: dict[str, Any]) -> Table:
    """Return the printed table of ``perplexity.json``."""
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
