"""Measurements of our own loader: resuming, memory and planning; used by ``benchmarks.data``."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_readers import STEP_TOKENS, log_normal_lengths
from statex_dist.data.config import ONLY_SOURCE
from statex_dist.data.formats import open_store
from statex_dist.data.loader import LoaderOptions, PackedLoader, StepShare
from statex_dist.data.manifest import DatasetManifest
from statex_dist.data.mixture import Stage
from statex_dist.data.plan import PackPlan, PackPlanOptions
from statex_dist.data.stats import PackingMode
from statex_dist.data.storage.mds import MdsShardWriter, load_streaming
from statex_dist.data.store import DocumentSlice

_DOCUMENT = 24
_SEQ_LEN = 4096
_SHARE = StepShare(global_packs=8)


def write_short_documents(path: Path, count: int) -> None:
    """Write ``count`` documents of 24 tokens as several MDS shards."""
    path.mkdir()
    writer = MdsShardWriter(path, dtype="uint16", loss_mask=False, compression="none", shard_bytes=8 << 20)
    document = np.arange(1, _DOCUMENT + 1, dtype=np.uint16)
    for _ in range(count):
        writer.write(document)
    writer.finish()


def resume(path: Path, positions: Sequence[int], window_tokens: int, repeats: int) -> dict[int, tuple[float, float]]:
    """Return, by documents read before, the best seconds to open the data and from loading a state to a batch."""
    found = {}
    for position in positions:
        state = _state_after(_loader(path, window_tokens), position)
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            loader = _loader(path, window_tokens)
            opened = time.perf_counter()
            loader.load_state_dict(state)
            next(iter(loader))
            times.append((opened - begin, time.perf_counter() - opened))
        found[position] = (min(t[0] for t in times), min(t[1] for t in times))
    return found


def streaming_resume(path: Path, positions: Sequence[int], repeats: int) -> dict[int, tuple[float, float]]:
    """Return the same for streaming's dataset, to its first document."""
    logging.getLogger("streaming").setLevel(logging.ERROR)
    found = {}
    for position in positions:
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            dataset = load_streaming().StreamingDataset(
                local=str(path), shuffle=True, batch_size=1, predownload=4096, num_canonical_nodes=1
            )
            opened = time.perf_counter()
            dataset.load_state_dict(dataset.state_dict(position, from_beginning=True))
            next(iter(dataset))
            times.append((opened - begin, time.perf_counter() - opened))
            del dataset
        found[position] = (min(t[0] for t in times), min(t[1] for t in times))
    return found


def memory(path: Path, seq_len: int) -> dict[str, tuple[int, int]]:
    """Return anonymous and file-backed resident bytes along an epoch that is one window, by place."""
    global_packs = max(1, STEP_TOKENS // seq_len)
    store = open_store(path, cache_dir=path.parent / "cache")
    loader = PackedLoader(
        {ONLY_SOURCE: store},
        [Stage(seq_len=seq_len)],
        StepShare(global_packs=global_packs),
        LoaderOptions(pad_id=0, epochs=1),
    )
    (report,) = loader.report().values()
    steps = -(-report.packs // global_packs)
    places = {1: "first step", steps // 4: "a quarter", steps // 2: "the middle", steps: "the end"}
    found = {"opened": _resident()}
    for step, _ in enumerate(loader, 1):
        if step in places:
            found[places[step]] = _resident()
    return found


def planning(documents: int, seq_len: int, mode: PackingMode, repeats: int) -> float:
    """Return the best seconds to plan one window of ``documents`` log-normal lengths."""
    store = LengthStore(log_normal_lengths(np.random.default_rng(0), documents))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        options = PackPlanOptions(window_tokens=store.num_tokens(0), packing=mode.packing, tail=mode.tail)
        PackPlan(store, options).window(0, 0, seq_len)
        times.append(time.perf_counter() - begin)
    return min(times)


class LengthStore:
    """One shard of documents of which only the lengths are known; see :class:`~statex_dist.data.store.ShardStore`.

    Args:
        lengths: ``[documents]`` int64.
    """

    num_shards = 1
    fingerprint = "lengths"
    has_loss_mask = False
    manifest: DatasetManifest | None = None

    def __init__(self, lengths: np.ndarray):
        self._lengths = lengths

    def name(self, shard: int) -> str:
        """Return what to call ``shard``."""
        return f"shard {shard}"

    def lengths(self, shard: int) -> np.ndarray:
        """Return all lengths."""
        return self._lengths

    def num_tokens(self, shard: int) -> int:
        """Return their sum."""
        return int(self._lengths.sum())

    def read(self, shard: int, i: int, start: int, stop: int) -> DocumentSlice:
        """There is nothing to read."""
        raise NotImplementedError

    def prefetch(self, shards: Sequence[int], share: float = 1.0) -> None:
        """There is nothing to fetch."""


def _loader(path: Path, window_tokens: int) -> PackedLoader:
    return PackedLoader(
        {ONLY_SOURCE: open_store(path, cache_dir=path.parent / "cache")},
        [Stage(seq_len=_SEQ_LEN)],
        _SHARE,
        LoaderOptions(pad_id=0),
        PackPlanOptions(window_tokens=window_tokens),
    )


def _state_after(loader: PackedLoader, documents: int) -> dict[str, Any]:
    """The state of a loader that has handed out ``documents`` documents; plans only, reads nothing."""
    place = loader.mixture.begin()
    seen = 0
    while seen < documents:
        packs, place = loader.mixture.take(place, _SHARE.global_packs)
        seen += sum(len(planned.window.pieces(planned.pack)) for planned in packs)
    return loader.mixture.state(place)


def _resident() -> tuple[int, int]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    sizes = {name: rest.split() for name, rest in (line.split(":", 1) for line in lines)}
    return int(sizes["RssAnon"][0]) << 10, int(sizes["RssFile"][0]) << 10
