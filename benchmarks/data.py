"""Measure the data pipeline: reading, packing, resuming, memory and planning.

Run as ``python -m benchmarks.data``, or in part with ``--only reading,packing``. Every measurement runs in a process of
its own, one after the other, on a warm page cache. The times include opening and hashing the shards.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import platform
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from benchmarks import data_probes, data_readers
from benchmarks.measure import cpu_name
from statex_dist.data.corpus.document_rules import DocumentRules
from statex_dist.data.formats import open_store
from statex_dist.data.prepare import prepare
from statex_dist.data.stats import length_stats, packing_modes, packing_stats

Result = TypeVar("Result")
BASELINES = {
    "default": "x default",
    "tuned": "x predownload",
    "tuned-sequences": "x predownload, 64K",
    "indexed-sequences": "x by index, 64K",
}


def alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """Return ``function(*arguments)`` of a fresh process, which leaves no shared memory behind."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def reading(folder: Path, args: argparse.Namespace) -> list[Table]:
    """Tokens per second of every reader over the same documents."""
    documents = _corpus(folder, args)
    table = _table(
        f"Reading {args.tokens / 1e6:.0f}M uint16 tokens in {documents:,} documents; best of {args.repeats}",
        ("reader", "gives", "M tokens/s", *BASELINES.values()),
        left=2,
    )
    found = data_readers.readers()
    speeds = {}
    for name in found:
        speeds[name] = alone(data_readers.tokens_per_second, name, folder, args.seconds, args.repeats)
    for name, reader in found.items():
        ratios = [f"{speeds[name] / speeds[base]:.2f}" for base in BASELINES]
        table.add_row(reader.title, reader.gives, f"{speeds[name] / 1e6:.1f}", *ratios)
    return [table]


def packing(folder: Path, args: argparse.Namespace) -> list[Table]:
    """Padding and cuts of every packing at 64K on text with a long tail."""
    logging.getLogger("statex_dist").setLevel(logging.ERROR)
    inputs = _text(args.corpus)
    table = _table(
        f"Packing {args.corpus or 'the standard library (*.py)'} as bytes, packs of 65,536 tokens",
        ("documents", "packing", "padding", "cut", "unavoidable", "cuts / concat's"),
        left=2,
    )
    for title, min_tokens in (("all", 2), ("of 4,096 tokens and more", 4096)):
        out = folder / f"text-{min_tokens}"
        prepare(inputs, out, rules=DocumentRules(min_tokens=min_tokens, skip_undecodable=True))
        store = open_store(out)
        figures = packing_stats(store, [1 << 16])
        (concat,) = (figure.report.cut_documents for figure in figures if figure.mode.packing == "concat")
        lengths = length_stats(store)
        table.add_section()
        for figure in figures:
            table.add_row(
                f"{title}: {lengths.documents:,}, {lengths.tokens / 1e6:.1f}M tokens",
                figure.mode.title,
                f"{figure.report.waste:.3%}",
                f"{figure.cut_share:.2%}",
                f"{figure.long_share:.2%}",
                f"{figure.report.cut_documents / max(concat, 1):.2f}",
            )
    return [table]


def resuming(folder: Path, args: argparse.Namespace) -> list[Table]:
    """Time from a saved state to the first batch, early and late in the data."""
    path = folder / "short"
    data_probes.write_short_documents(path, args.short_documents)
    positions = (1000, min(1_000_000, args.short_documents * 2 // 3))
    table = _table(
        f"Resuming in {args.short_documents:,} documents of 24 tokens, seconds, best of 5",
        ("loader", *(f"after {n:,} documents" for n in positions), "ratio", "opening"),
        left=1,
    )
    rows: dict[str, dict[int, tuple[float, float]]] = {
        f"ours, window of {tokens >> 20}M tokens": alone(data_probes.resume, path, positions, tokens, 5)
        for tokens in (1 << 26, 1 << 22)
    }
    rows["streaming, predownload=4096"] = alone(data_probes.streaming_resume, path, positions, 5)
    for name, times in rows.items():
        early, late = (times[n][1] for n in positions)
        opening = min(opened for opened, _ in times.values())
        table.add_row(name, f"{early:.3f}", f"{late:.3f}", f"{late / early:.2f}", f"{opening:.3f}")
    return [table]


def memory(folder: Path, args: argparse.Namespace) -> list[Table]:
    """Resident memory along an epoch."""
    _corpus(folder, args)
    tables = []
    for seq_len in (4096, 1 << 16):
        found = alone(data_probes.memory, folder / "mds", seq_len)
        table = _table(
            f"Resident MiB along an epoch of {args.tokens / 1e6:.0f}M tokens, packs of {seq_len:,}",
            ("", *found),
            left=1,
        )
        for row, name in enumerate(("its own", "mapped files, which the system may drop")):
            table.add_row(name, *(f"{values[row] / 2**20:.0f}" for values in found.values()))
        tables.append(table)
    return tables


def planning(folder: Path, args: argparse.Namespace) -> list[Table]:
    """Time to plan a window of many documents."""
    lengths = (4096, 1 << 16)
    table = _table(
        f"Planning one window of {args.planned_documents:,} documents, seconds, best of {args.repeats}",
        ("packing", *(f"packs of {n:,}" for n in lengths)),
        left=1,
    )
    for mode in packing_modes():
        times = [alone(data_probes.planning, args.planned_documents, n, mode, args.repeats) for n in lengths]
        table.add_row(mode.title, *(f"{seconds:.2f}" for seconds in times))
    return [table]


PARTS = {"reading": reading, "packing": packing, "resuming": resuming, "memory": memory, "planning": planning}


def _corpus(folder: Path, args: argparse.Namespace) -> int:
    """Write the log-normal corpus, once for all parts, and return its number of documents."""
    if not (folder / "mds").exists():
        data_readers.write_corpus(folder, args.tokens)
    store = open_store(folder / "mds", cache_dir=folder / "cache")
    return sum(len(store.lengths(shard)) for shard in range(store.num_shards))


def _text(corpus: str | None) -> list[Path]:
    """The files or the directory to pack."""
    if corpus is not None:
        return [Path(corpus)]
    library = Path(sysconfig.get_paths()["stdlib"])
    foreign = {"site-packages", "dist-packages"}
    return [path for path in sorted(library.rglob("*.py")) if not foreign & set(path.parts)]


def _table(title: str, columns: tuple[str, ...], left: int) -> Table:
    table = Table(title=title, caption=_machine())
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k < left else "right")
    return table


def _machine() -> str:
    versions = ", ".join(f"{p} {version(p)}" for p in ("mosaicml-streaming", "webdataset", "torch", "numpy"))
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores {cpu_name()}, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, {versions}"
    )


def main() -> None:
    """Run the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"which parts, with commas (default: {','.join(PARTS)})"
    )
    parser.add_argument("--tokens", type=int, default=48 << 20, help="tokens of the synthetic corpus")
    parser.add_argument("--seconds", type=float, default=8.0, help="time limit of one reading")
    parser.add_argument("--repeats", type=int, default=3, help="readings and plannings of each kind; the best counts")
    parser.add_argument("--corpus", default=None, help="text to pack (default: Python's standard library)")
    parser.add_argument("--short-documents", type=int, default=1_600_000, help="documents to resume in")
    parser.add_argument("--planned-documents", type=int, default=1_000_000, help="documents of a planned window")
    parser.add_argument("--dir", default=None, help="where the corpora are written meanwhile")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := sorted(set(names) - set(PARTS)):
        parser.error(f"--only {unknown[0]!r} is no part; parts: {', '.join(PARTS)}")
    console = Console(width=130, highlight=False)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for name in names:
            for table in PARTS[name](Path(folder), args):
                console.print(table)


if __name__ == "__main__":
    main()
