"""Our readers and those of other libraries, and the corpora that they read; used by ``benchmarks.data``.

Readers return different values, and each is compared with a reader that returns the same. streaming and webdataset
return documents. A training step needs sequences of a fixed length, so the documents of both are also copied, end to
end, into int64 sequences: the least code that their users would have to write. Our reader also returns labels,
positions and the documents' borders.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from statex_dist.data.config import ONLY_SOURCE
from statex_dist.data.formats import open_store
from statex_dist.data.loader import LoaderOptions, PackedLoader, StepShare
from statex_dist.data.mixture import Stage
from statex_dist.data.storage.mds import MdsShardWriter, load_streaming
from statex_dist.data.storage.tar import WdsShardWriter, load_webdataset

EOS = 50000
SHARD_BYTES = 16 << 20
STEP_TOKENS = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """A way to read a corpus.

    Attributes:
        title: What to call it.
        gives: What one item is.
        folder: Which copy of the corpus it reads.
        read: Called with the copy's path and ``options``; yields the tokens of each item.
        options: The rest of its arguments.
    """

    title: str
    gives: str
    folder: str
    read: Callable[..., Iterator[int]]
    options: dict[str, Any] = field(default_factory=dict)


def log_normal_lengths(rng: np.random.Generator, documents: int) -> np.ndarray:
    """Return ``[documents]`` lengths with a median of about 950 tokens and a long tail, as web text has."""
    return np.minimum(rng.lognormal(6.85, 1.3, documents), 200_000).astype(np.int64) + 2


def write_corpus(folder: Path, tokens: int) -> int:
    """Write the same documents as MDS, as our tar shards and as a webdataset of one ``.npy`` a document.

    Args:
        folder: Existing directory; gets ``mds``, ``tar`` and ``npy``.
        tokens: Least number of tokens.

    Returns:
        The number of documents.
    """
    rng = np.random.default_rng(0)
    for name in ("mds", "tar", "npy"):
        (folder / name).mkdir()
    settings: dict[str, Any] = {
        "dtype": "uint16",
        "loss_mask": False,
        "compression": "none",
        "shard_bytes": SHARD_BYTES,
    }
    writers: list[MdsShardWriter | WdsShardWriter] = [
        MdsShardWriter(folder / "mds", **settings),
        WdsShardWriter(folder / "tar", **settings),
    ]
    pattern = str(folder / "npy" / "shard-%05d.tar")
    written = documents = 0
    with load_webdataset().ShardWriter(pattern, maxsize=SHARD_BYTES, verbose=0) as plain:
        while written < tokens:
            n = int(log_normal_lengths(rng, 1)[0])
            document = np.append(rng.integers(0, EOS, n - 1), EOS).astype(np.uint16)
            for writer in writers:
                writer.write(document)
            plain.write({"__key__": f"{documents:08d}", "npy": document})
            written += n
            documents += 1
    for writer in writers:
        writer.finish()
    return documents


def ours(path: Path, seq_len: int, num_workers: int = 0) -> Iterator[int]:
    """Tokens, padding not counted, of each packed batch of one epoch."""
    store = open_store(path, cache_dir=path.parent / "cache")
    loader = PackedLoader(
        {ONLY_SOURCE: store},
        [Stage(seq_len=seq_len)],
        StepShare(global_packs=max(1, STEP_TOKENS // seq_len)),
        LoaderOptions(pad_id=0, epochs=1, num_workers=num_workers),
    )
    # Counting the padding of each batch would cost more than some of the readers do.
    (report,) = loader.report().values()
    for batches in loader:
        for batch in batches:
            yield round(batch.num_tokens * (1 - report.waste))


def streaming_iterated(path: Path, predownload: int | None) -> Iterator[np.ndarray]:
    """Documents of one epoch of streaming's dataset, shuffled."""
    dataset = load_streaming().StreamingDataset(
        local=str(path), shuffle=True, batch_size=1, predownload=predownload, num_canonical_nodes=1
    )
    for sample in dataset:
        yield sample["tokens"]


def streaming_indexed(path: Path) -> Iterator[np.ndarray]:
    """Documents of streaming's dataset by random access, in a shuffled order: without its resuming and its ranks."""
    dataset = load_streaming().StreamingDataset(local=str(path), batch_size=1)
    for i in np.random.default_rng(0).permutation(len(dataset)).tolist():
        yield dataset[i]["tokens"]


def webdataset_documents(path: Path) -> Iterator[np.ndarray]:
    """Documents of a webdataset with one ``.npy`` a document, in stored order."""
    tars = sorted(str(tar) for tar in path.glob("*.tar"))
    for sample in load_webdataset().WebDataset(tars, shardshuffle=False).decode():
        yield sample["npy"]


def webdataset_chunks(path: Path) -> Iterator[np.ndarray]:
    """Documents of our tar shards as webdataset reads them, in stored order."""
    tars = sorted(str(tar) for tar in path.glob("*.tar"))
    for sample in load_webdataset().WebDataset(tars, shardshuffle=False).decode():
        yield from np.split(sample["tokens.npy"], np.cumsum(sample["lengths.npy"].astype(np.int64))[:-1])


def documents(path: Path, source: Callable[..., Iterable[np.ndarray]], **options: Any) -> Iterator[int]:
    """Tokens of each document of ``source``."""
    for document in source(path, **options):
        yield len(document)


def sequences(path: Path, source: Callable[..., Iterable[np.ndarray]], seq_len: int, **options: Any) -> Iterator[int]:
    """Tokens of each full int64 sequence that the documents of ``source`` make, end to end."""
    sequence, filled = torch.empty(1, seq_len, dtype=torch.int64), 0
    row = sequence.numpy()[0]
    for document in source(path, **options):
        at = 0
        while at < len(document):
            step = min(seq_len - filled, len(document) - at)
            row[filled : filled + step] = document[at : at + step]
            at += step
            filled += step
            if filled == seq_len:
                yield sequence.shape[1]
                sequence, filled = torch.empty(1, seq_len, dtype=torch.int64), 0
                row = sequence.numpy()[0]


def readers(seq_len: int = 1 << 16) -> dict[str, Reader]:
    """Return every reader by a short name; sequences are of ``seq_len`` tokens."""
    default = {"source": streaming_iterated, "predownload": None}
    tuned = {"source": streaming_iterated, "predownload": 4096}
    indexed = {"source": streaming_indexed}
    plain, chunks = {"source": webdataset_documents}, {"source": webdataset_chunks}
    found: dict[str, Reader] = {}
    for name, title, folder, options in (
        ("default", "streaming, default", "mds", default),
        ("tuned", "streaming, predownload=4096", "mds", tuned),
        ("indexed", "streaming, by index", "mds", indexed),
        ("webdataset", "webdataset, .npy each", "npy", plain),
        ("chunks", "webdataset, our tars", "tar", chunks),
    ):
        found[name] = Reader(title=title, gives="documents", folder=folder, read=documents, options=options)
        gives = f"{seq_len:,} tokens"
        longer = {**options, "seq_len": seq_len}
        found[f"{name}-sequences"] = Reader(title=title, gives=gives, folder=folder, read=sequences, options=longer)
    del found["default-sequences"]  # bound by its waiting, as the documents are
    for folder in ("mds", "tar"):
        for length, num_workers in ((4096, 0), (4096, 2), (seq_len, 0), (seq_len, 2)):
            title = f"ours, {folder}" + f", {num_workers} workers" * bool(num_workers)
            found[f"ours-{folder}-{length}-{num_workers}"] = Reader(
                title=title,
                gives=f"packs of {length:,}",
                folder=folder,
                read=ours,
                options={"seq_len": length, "num_workers": num_workers},
            )
    return found


def tokens_per_second(name: str, folder: Path, seconds: float, repeats: int) -> float:
    """Return the best speed of ``repeats`` fresh readers, opening included, each for an epoch or ``seconds``."""
    logging.getLogger("streaming").setLevel(logging.ERROR)
    reader = readers()[name]
    # Imports, and the shards into the page cache.
    next(reader.read(folder / reader.folder, **reader.options))
    best = 0.0
    for _ in range(repeats):
        tokens = 0
        begin = time.perf_counter()
        items = reader.read(folder / reader.folder, **reader.options)
        for n in items:
            tokens += n
            if time.perf_counter() - begin > seconds:
                break
        best = max(best, tokens / (time.perf_counter() - begin))
        del items
    return best
