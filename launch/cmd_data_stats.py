"""``statex data-stats``: how long the documents of a dataset are, and what each packing would cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from statex_dist.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from statex_dist.data.stats import LengthStats, PackingStats

DEFAULT_SEQ_LENS = ("4096,16384,65536",)
_BAR_WIDTH = 16
# A pack's borders are int32.
_MAX_SEQ_LEN = (1 << 31) - 1


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex data-stats`` to ``parser``."""
    parser.add_argument("dataset", type=str, metavar="DATASET", help="directory or URL of a dataset")
    parser.add_argument(
        "--seq-len",
        type=str,
        action="append",
        default=None,
        help=f"tokens of a pack; several with commas, or given again (default: {DEFAULT_SEQ_LENS[0]})",
    )
    parser.add_argument("--windows", type=int, default=1, help="pack this many windows of an epoch (default: 1)")
    parser.add_argument("--window-tokens", type=int, default=1 << 26, help="tokens of a window (default: 2**26)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffles")
    parser.add_argument("--cache-dir", type=str | None, default=None, help="where downloaded and unpacked files go")
    parser.add_argument("--plot", type=str | None, default=None, metavar="FILE", help="draw to a .png or .svg file")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: Any) -> int:
    """Print the dataset's figures and draw the plot.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options are wrong, or the dataset is missing or damaged.
    """
    from statex_dist.data.formats import open_store
    from statex_dist.data.stats import check_plot_path, draw_stats, length_stats, packing_stats

    seq_lens = parse_lengths(args.seq_len or DEFAULT_SEQ_LENS)
    for option, value in (("--windows", args.windows), ("--window-tokens", args.window_tokens)):
        if value < 1:
            raise ConfigError(f"{option} is {value}; it must be at least 1")
    if args.plot is not None:
        check_plot_path(Path(args.plot))
    store = open_store(args.dataset, cache_dir=args.cache_dir)
    lengths = length_stats(store)
    packings = packing_stats(store, seq_lens, windows=args.windows, window_tokens=args.window_tokens, seed=args.seed)
    facts = _facts(store.files.origin, store, lengths)
    if args.plot is not None:
        draw_stats(lengths, packings, Path(args.plot), title=f"{store.files.origin}: {lengths.documents:,} documents")
    if args.json:
        sys.stdout.write(json.dumps({**facts, **_figures(lengths, packings)}) + "\n")
    else:
        _print(facts, lengths, packings, args.plot)
    return 0


def parse_lengths(words: Sequence[str]) -> list[int]:
    """Return the lengths in ``words``, each a list such as ``4096,65536``, in order and without doubles.

    Raises:
        ConfigError: One is not a whole number, or not the length of a pack.
    """
    found = []
    for word in ",".join(words).split(","):
        if not word.strip().isdecimal() or not 1 <= int(word) <= _MAX_SEQ_LEN:
            raise ConfigError(
                f"--seq-len {word!r} is not a length; allowed: whole numbers from 1 to {_MAX_SEQ_LEN} with commas, "
                "such as 4096,65536"
            )
        found.append(int(word))
    return list(dict.fromkeys(found))


def _facts(dataset: str, store: Any, lengths: LengthStats) -> dict[str, Any]:
    manifest = store.manifest
    return {
        "dataset": dataset,
        "format": "mds" if store.entries[0].raw.name.endswith(".mds") else "wds",
        "shards": store.num_shards,
        "documents": lengths.documents,
        "tokens": lengths.tokens,
        "dtype": manifest.dtype if manifest else None,
        "tokenizer": manifest.tokenizer if manifest else None,
        "loss_mask": store.has_loss_mask,
        "left_out": manifest.left_out if manifest else None,
    }


def _figures(lengths: LengthStats, packings: Sequence[PackingStats]) -> dict[str, Any]:
    return {
        "lengths": {**lengths.percentiles, "mean": lengths.mean},
        "histogram": [asdict(bucket) for bucket in lengths.buckets],
        "packings": [packing.to_dict() for packing in packings],
    }


def _print(facts: dict[str, Any], lengths: LengthStats, packings: Sequence[PackingStats], plot: str | None) -> None:
    from rich.console import Console

    table = _table(show_header=False)
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in (facts["left_out"] or {}).items() if count)
    for name, value in {**facts, "loss_mask": "yes" if facts["loss_mask"] else None, "left_out": left_out}.items():
        if value not in (None, ""):
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    # A pipe has no width: 100 columns hold every table.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    for shown in (table, _percentiles(lengths), _histogram(lengths), _packings(packings)):
        console.print(shown)
    if plot:
        console.print(f"plot: {plot}", soft_wrap=True)


def _table(*columns: str, **options: Any) -> Table:
    from rich.table import Table

    table = Table(**options)
    for name in columns:
        table.add_column(name, justify="left" if name in ("", "packing") else "right")
    return table


def _percentiles(lengths: LengthStats) -> Table:
    table = _table(*lengths.percentiles, "mean", title="Tokens of a document")
    table.add_row(*(f"{value:,}" for value in lengths.percentiles.values()), f"{lengths.mean:,.1f}")
    return table


def _histogram(lengths: LengthStats) -> Table:
    from rich.bar import Bar

    table = _table("tokens", "documents", "", "their tokens", "", title="Histogram of lengths")
    documents = [bucket.documents / lengths.documents for bucket in lengths.buckets]
    tokens = [bucket.tokens / max(lengths.tokens, 1) for bucket in lengths.buckets]
    for bucket, of_documents, of_tokens in zip(lengths.buckets, documents, tokens, strict=True):
        table.add_row(
            f"{bucket.start:,}..{bucket.stop - 1:,}" if bucket.stop - bucket.start > 1 else str(bucket.start),
            f"{of_documents:.1%}",
            Bar(max(documents), 0, of_documents, width=_BAR_WIDTH),
            f"{of_tokens:.1%}",
            Bar(max(tokens) or 1, 0, of_tokens, width=_BAR_WIDTH),
        )
    return table


def _packings(packings: Sequence[PackingStats]) -> Table:
    report = packings[0].report
    table = _table(
        *("seq_len", "packing", "padding", "cut", "longer", "per pack", "packs"),
        title=f"Packing the first {report.tokens:,} tokens ({report.windows} window{'s' * (report.windows != 1)})",
        caption="cut: documents that are cut; longer: than a pack, so any packing cuts them",
    )
    for before, packing in zip([None, *packings], packings, strict=False):
        report = packing.report
        if before is not None and before.report.seq_len != report.seq_len:
            table.add_section()
        table.add_row(
            f"{report.seq_len:,}",
            packing.mode.title,
            f"{report.waste:.2%}",
            f"{packing.cut_share:.2%}",
            f"{packing.long_share:.2%}",
            f"{report.documents_per_pack:,.2f}",
            f"{report.packs:,}",
        )
    return table
