"""Measure the cost of the training loop over the bare engine, of saving, and of context over data parallelism.

Run as ``python -m benchmarks.training``, or in part with ``--only loop,saving,context``. Each part is one launch of two
gloo ranks on this machine. The compared variants alternate within a part, on the same model and the same batches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PARTS = ("loop", "saving", "context")
RANKS = 2


def main() -> None:
    """Launch every part and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8, help="steps of one block")
    parser.add_argument("--repeats", type=int, default=5, help="blocks of each kind")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        from benchmarks import training_parts

        training_parts.run(args.worker, args)
        return
    console = Console(width=120)
    load = os.getloadavg()[0]
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, torch {version('torch')}, "
        f"deepspeed {version('deepspeed')}, {time.strftime('%Y-%m-%d')}; {RANKS} gloo ranks, 1 thread each"
    )
    for part in args.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            console.print(_table(part, _launch(part, args, Path(folder)), args))


def _launch(part: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one part on all ranks and return what rank 0 measured."""
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in _SIZES]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    command = [*launcher, "-m", "benchmarks.training", "--worker", part, "--folder", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


_SIZES = ("seq_len", "hidden", "layers", "steps", "repeats")


def _table(part: str, found: dict[str, Any], args: argparse.Namespace) -> Table:
    """Return a table of the median step of each kind and of the first, from blocks that alternated."""
    titles = {
        "loop": "The loop beside the bare engine",
        "saving": f"Saving every {args.steps} steps beside not saving",
        "context": "One pack per rank (data parallel) beside each pack over both ranks (context parallel)",
    }
    table = Table(
        title=f"{titles[part]}: {found['parameters'] / 1e6:.1f} M parameters, {args.seq_len} tokens a pack",
        title_justify="left",
    )
    for name in ("", "s per step", "over the first", "of it waiting for data", "blocked per save, s"):
        table.add_column(name, justify="right" if name else "left")
    kinds = found["kinds"]
    first = next(iter(kinds))
    for kind, blocks in kinds.items():
        pairs = zip(blocks, kinds[first], strict=True)
        ratio = statistics.median(mine["step"] / base["step"] for mine, base in pairs)
        seconds = statistics.median(block["step"] for block in blocks)
        data = [block["data"] / block["step"] for block in blocks if "data" in block]
        blocked = [block["blocked"] for block in blocks if "blocked" in block]
        table.add_row(
            kind,
            f"{seconds:.4f}",
            "" if kind == first else f"{100 * (ratio - 1):+.2f} %",
            f"{100 * statistics.median(data):.2f} %" if data else "",
            f"{statistics.median(blocked):.3f}" if blocked else "",
        )
    return table


if __name__ == "__main__":
    main()
