"""Loader speed: our packed loader against mosaicml-streaming's own iteration over the same shards.

Run as ``python -m benchmarks.loader``. One process, warm page cache. streaming only hands out documents; our loader
also packs them, makes labels and segments, and converts to int64: what a training step takes. Streaming is timed with
its default ``predownload`` and with a generous one, because the default is bound by a polling interval.
"""

from __future__ import annotations

import argparse
import logging
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from statex_dist.data.formats import open_store
from statex_dist.data.loader import PackedLoader
from statex_dist.data.mds import MdsShardWriter, load_streaming

EOS = 50000


def write_corpus(directory: Path, tokens: int) -> int:
    """Write documents of log-normal length (median about 950 tokens, a long tail) and return their number."""
    rng = np.random.default_rng(0)
    writer = MdsShardWriter(directory, dtype="uint16", loss_mask=False, compression="none", shard_bytes=16 << 20)
    written = documents = 0
    while written < tokens:
        n = int(min(rng.lognormal(6.85, 1.3), 200_000)) + 2
        writer.write(np.append(rng.integers(0, EOS, n - 1), EOS).astype(np.uint16))
        written += n
        documents += 1
    writer.finish()
    return documents


def timed(items: Iterator[int], seconds: float) -> float:
    """Return tokens per second over ``items`` (tokens of each), for at most ``seconds``."""
    begin = time.perf_counter()
    tokens = 0
    for n in items:
        tokens += n
        if time.perf_counter() - begin > seconds:
            break
    return tokens / (time.perf_counter() - begin)


def ours(path: Path, seq_len: int) -> Iterator[int]:
    """Tokens of each packed batch of one epoch."""
    loader = PackedLoader(
        open_store(path), seq_len=seq_len, global_packs=max(1, (1 << 18) // seq_len), pad_id=0, epochs=1
    )
    for batches in loader:
        for batch in batches:
            yield batch.num_tokens


def theirs(path: Path, predownload: int | None) -> Iterator[int]:
    """Tokens of each document of one epoch of streaming's dataset."""
    dataset = load_streaming().StreamingDataset(
        local=str(path), shuffle=True, batch_size=1, predownload=predownload, num_canonical_nodes=1
    )
    for sample in dataset:
        yield len(sample["tokens"])


def main() -> None:
    """Write the corpus, time the readers and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=24 << 20, help="tokens of the synthetic corpus")
    parser.add_argument("--seconds", type=float, default=8.0, help="time limit of each measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each reader; the best counts")
    args = parser.parse_args()
    logging.getLogger("streaming").setLevel(logging.ERROR)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shards"
        path.mkdir()
        documents = write_corpus(path, args.tokens)
        readers = {
            "streaming, default predownload (documents)": lambda: theirs(path, None),
            "streaming, predownload=4096 (documents)": lambda: theirs(path, 4096),
            "ours, packs of 4,096": lambda: ours(path, 4096),
            "ours, packs of 65,536": lambda: ours(path, 65536),
        }
        speeds = {
            name: max(timed(reader(), args.seconds) for _ in range(args.repeats)) for name, reader in readers.items()
        }

    versions = ", ".join(f"{p} {version(p)}" for p in ("mosaicml-streaming", "torch", "numpy"))
    table = Table(
        title=f"{args.tokens / 1e6:.0f}M uint16 tokens, {documents} documents; best of {args.repeats}",
        caption=f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, Python {platform.python_version()}, {versions}",
    )
    table.add_column("reader")
    for column in ("M tokens/s", "x default", "x predownload=4096"):
        table.add_column(column, justify="right")
    default, tuned, *_ = speeds.values()
    for name, speed in speeds.items():
        table.add_row(name, f"{speed / 1e6:.1f}", f"{speed / default:.1f}", f"{speed / tuned:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
