"""Resharding ZeRO-3 checkpoints: ours against DeepSpeed's tools and against ``cp`` of the bytes read and written.

Run ``python -m benchmarks.reshard [--size 0.5b 1.3b] [--ranks 8] [--repeats 3] [--dir DIR]``. The checkpoint is
synthetic, in DeepSpeed's own layout (:mod:`benchmarks.synthetic_zero3`): bf16 run, fp32 weights and both Adam moments.
Each tool runs in a process of its own, alternately, from a cold page cache (as root), with a ``sync`` at the end that
counts.

Memory is the peak of the resident sets of all processes of a tool together, sampled every 20 ms: pages of mapped files
count, as they do in a container's limit; pages that two processes share count twice.

``--growth`` measures instead how our peak memory grows with the model and with the ranks.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.expand import drop_cache
from statex_dist.models.registry import config_from_dict, family_of

SIZES = {
    "0.1b": {"hidden_size": 768, "num_hidden_layers": 8},
    "0.5b": {"hidden_size": 1536, "num_hidden_layers": 14},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 24},
}
"""GLA models; the last is the public 1.3 B one."""

_SAMPLE_SECONDS = 0.02
_CONVERT = (
    "import sys; from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict as convert; "
    "convert(sys.argv[1], sys.argv[2], dtype={dtype}, max_shard_size='{shard}', safe_serialization=True)"
)
_LAZY = (
    "import sys; from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as get; "
    "tensors = get(sys.argv[1], lazy_mode=True); [tensors[name].contiguous() for name in list(tensors)]"
)


@dataclass(frozen=True, slots=True)
class Tool:
    """A command, what it is called, and of which of our rows it is a peer."""

    task: str
    name: str
    command: tuple[str, ...]


def shapes_of(size: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model."""
    values = {"model_type": "gla", "vocab_size": 32000, "num_heads": 4, "tie_word_embeddings": False, **SIZES[size]}
    specs = family_of("gla").tensors(config_from_dict(values))
    return {name: spec.shape for name, spec in specs.items()}


def write(tag: Path, shapes: dict[str, tuple[int, ...]], ranks: int) -> None:
    """Write the source; imports torch, and so runs in a process of its own."""
    from benchmarks.synthetic_zero3 import write_random_zero3

    write_random_zero3(tag, shapes, ranks)


def tools(root: Path, source: Path, target: Path, ranks: int, workers: int) -> list[Tool]:
    """Return every command, ours first in each task."""
    python, statex = sys.executable, str(Path(sys.executable).with_name("statex"))
    ours = (statex, "reshard", "--source", str(source), "--target", str(target), "--workers", str(workers))
    ends = (str(source), str(target))

    def convert(dtype: str, shard: str) -> tuple[str, ...]:
        return (python, "-c", _CONVERT.format(dtype=dtype, shard=shard), *ends)

    universal = ("-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder")
    return [
        Tool("HF fp32", "statex reshard", ours),
        Tool("HF fp32", "cp + sync", ("cp", str(root / "weights"), str(target))),
        Tool("HF fp32", "zero_to_fp32", convert("'float32'", "5GB")),
        Tool("HF fp32", "zero_to_fp32, 1 GB shards", convert("'float32'", "1GB")),
        Tool("HF fp32", "zero_to_fp32, lazy, no write", (python, "-c", _LAZY, str(source))),
        Tool("HF bf16", "statex reshard", (*ours, "--dtype", "bf16")),
        Tool(
            "HF bf16",
            "cp + sync",
            # As many bytes read as fp32 has, as many written as bf16 has.
            ("sh", "-c", f"cp {root}/half {target} && cat {root}/other > /dev/null"),
        ),
        Tool("HF bf16", "zero_to_fp32", convert("'bfloat16'", "5GB")),
        Tool(
            f"{ranks} -> {ranks // 2} ranks",
            "statex reshard",
            (*ours, "--to", "zero3", "--world-size", str(ranks // 2)),
        ),
        Tool(f"{ranks} -> {ranks // 2} ranks", "cp + sync", ("cp", "-r", str(source), str(target))),
        Tool(
            f"{ranks} -> {ranks // 2} ranks",
            "ds_to_universal",
            (python, *universal, str(source / "global_step1"), "--output_folder", str(target)),
        ),
    ]


def measure(command: Sequence[str], target: Path) -> tuple[float, float]:
    """Run a command from a cold cache; return wall seconds, with everything on disk, and peak MiB of its processes."""
    remove(target)
    drop_cache()
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        peak = _Peak(process.pid)
        status = process.wait()
        os.sync()
        seconds = time.perf_counter() - start
        if status:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command[:4])} failed with {status}: {errors.read()[-2000:].decode()}")
    return seconds, peak.stop() / 2**20


class _Peak:
    """Samples the resident sets of a process and its descendants."""

    def __init__(self, pid: int):
        self._process, self._bytes, self._stopped = psutil.Process(pid), 0, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            total = 0
            try:
                for process in (self._process, *self._process.children(recursive=True)):
                    try:
                        total += process.memory_info().rss
                    except psutil.Error:
                        continue  # it has just ended
            except psutil.Error:
                return
            self._bytes = max(self._bytes, total)

    def stop(self) -> int:
        """Return the largest sum of bytes."""
        self._stopped.set()
        self._thread.join()
        return self._bytes


def remove(target: Path) -> None:
    """Delete whatever a tool made."""
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)


def prepare(root: Path, size: str, ranks: int) -> tuple[Path, int]:
    """Write the source, and plain files of as many bytes as a conversion reads and writes; return the parameters."""
    shapes = shapes_of(size)
    # In a process of its own: Linux counts what the parent held at the fork to a child's largest resident set.
    with ProcessPoolExecutor(max_workers=1) as pool:
        pool.submit(write, root / "source/global_step1", shapes, ranks).result()
    count = sum(map(math.prod, shapes.values()))
    for name, nbytes in (("weights", 4 * count), ("half", 2 * count), ("other", 2 * count)):
        with (root / name).open("wb") as file, (root / _optim(root, 0)).open("rb") as values:
            left = nbytes
            while left:
                block = values.read(min(left, 16 << 20))
                if not block:
                    values.seek(0)
                    continue
                file.write(block)
                left -= len(block)
    return root / "source", count


def _optim(root: Path, rank: int) -> Path:
    return root / f"source/global_step1/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def compare(root: Path, size: str, ranks: int, repeats: int, workers: int) -> None:
    """Measure every tool on one model and print a table."""
    source, count = prepare(root, size, ranks)
    target = root / "target"
    entries = tools(root, source, target, ranks, workers)
    runs: dict[Tool, list[tuple[float, float]]] = {tool: [] for tool in entries}
    for _ in range(repeats):
        for tool in entries:
            runs[tool].append(measure(tool.command, target))
            print(f"{tool.task}, {tool.name}: {runs[tool][-1][0]:.1f} s", file=sys.stderr, flush=True)
    remove(target)
    shutil.rmtree(source)
    print(f"\nGLA {count / 1e9:.3f} B parameters, {ranks} ranks, {12 * count / 1e9:.1f} GB\n")
    print("| task | tool | wall s (all runs) | peak MiB of its processes | ours / its time | its / our memory |")
    print("|---|---|---|---|---|---|")
    for tool, measured in runs.items():
        mine = next(other for other in entries if other.task == tool.task)
        ours, ours_peak = (statistics.median(column) for column in zip(*runs[mine], strict=True))
        seconds, peak = (statistics.median(column) for column in zip(*measured, strict=True))
        every = ", ".join(f"{run[0]:.1f}" for run in measured)
        print(
            f"| {tool.task} | {tool.name} | {seconds:.1f} ({every}) | {peak:.0f} | {ours / seconds:.2f} | "
            f"{peak / ours_peak:.1f} |"
        )


def growth(root: Path, workers: int) -> None:
    """Print our time and peak memory for models and numbers of ranks."""
    print("\n| parameters | ranks | task | wall s | peak MiB |")
    print("|---|---|---|---|---|")
    for size, ranks in (("0.1b", 8), ("0.5b", 8), ("0.1b", 64), ("0.1b", 256)):
        source, count = prepare(root, size, ranks)
        for tool in tools(root, source, root / "target", ranks, workers):
            if tool.name == "statex reshard" and tool.task != "HF bf16":
                seconds, peak = measure(tool.command, root / "target")
                print(f"| {count / 1e9:.3f} B | {ranks} | {tool.task} | {seconds:.1f} | {peak:.0f} |", flush=True)
        remove(root / "target")
        shutil.rmtree(source)


def start_up(root: Path) -> None:
    """Print what starting costs: the help text, and inspecting a checkpoint of a thousand files."""
    shapes = {f"layer.{i}.weight": (64, 64) for i in range(100)}
    with ProcessPoolExecutor(max_workers=1) as pool:
        pool.submit(write, root / "many/global_step1", shapes, 500).result()
    statex = str(Path(sys.executable).with_name("statex"))
    for name, command in {
        "statex reshard --help": (statex, "reshard", "--help"),
        "statex inspect, 1000 files": (statex, "inspect", str(root / "many"), "--json"),
    }.items():
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
        print(f"{name}: {statistics.median(seconds):.2f} s")
    shutil.rmtree(root / "many")


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="*", choices=list(SIZES), default=["0.5b", "1.3b"])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--growth", action="store_true", help="measure how memory grows instead")
    parser.add_argument("--dir", type=Path, default=None, help="directory for the files (default: a temporary one)")
    args = parser.parse_args()
    cold = "cold page cache" if drop_cache() else "warm page cache (not root)"
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores {platform.processor() or platform.machine()}, "
        f"load {os.getloadavg()[0]:.1f}, python {platform.python_version()}, torch {version('torch')}, "
        f"deepspeed {version('deepspeed')}; {args.workers} workers, {cold}"
    )
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        if args.growth:
            growth(Path(name), args.workers)
        else:
            start_up(Path(name))
            for size in args.size:
                compare(Path(name), size, args.ranks, args.repeats, args.workers)


if __name__ == "__main__":
    main()
