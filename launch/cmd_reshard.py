"""``statex reshard``: one checkpoint into another layout."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from jsonargparse import ArgumentParser

logger = logging.getLogger(__name__)


def add_output_options(parser: ArgumentParser) -> None:
    """Add the options of a tool that writes a model directory (``statex expand`` and ``statex reshard``)."""
    parser.add_argument("--source", type=str, required=True, metavar="DIR", help="checkpoint to read, or a run")
    parser.add_argument("--target", type=str, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--dtype", type=str | None, default=None, help="fp32, bf16 or fp16 (default: as in the source)")
    parser.add_argument("--max-shard-size", type=str, default="5GB", help="size limit of a safetensors file")
    parser.add_argument("--workers", type=int, default=4, help="tensors read and written at a time")
    parser.add_argument("--overwrite", action="store_true", help="replace a target that is not empty")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex reshard`` to ``parser``."""
    add_output_options(parser)
    parser.add_argument("--to", type=str, default="hf", help="layout of the target: hf")


_LINE_SECONDS = 10.0


def _plain_lines(label: str) -> Callable[[int, int], None]:
    """Return a callback that logs a line every few seconds: for log files, where a bar would be noise."""
    start = last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LINE_SECONDS:
            return
        last = now
        left = (now - start) * (total - done) / max(done, 1)
        logger.info("%s: %.2f of %.2f GB, %.0f s left", label, done / 1e9, total / 1e9, left)

    return advance


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Give a callback that draws bytes done on a terminal, and logs plain lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(label)
        return
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def run(args: Any) -> int:
    """Reshard and print what was written.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options, the source or the target are wrong.
    """
    from checkpoints_tools.reshard import reshard
    from launch.cmd_plan import size

    with progress_bar("reshard") as progress:
        summary = reshard(
            args.source,
            args.target,
            to=args.to,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
            workers=args.workers,
            progress=progress,
        )
    if args.json:
        sys.stdout.write(json.dumps(asdict(summary)) + "\n")
        return 0
    checked = "verified against its manifest" if summary.verified else "no manifest to verify it against"
    sys.stdout.write(
        f"{summary.target}: {summary.tensors} tensors, {summary.parameters:,} parameters, "
        f"{size(summary.weight_bytes)}, from {summary.kind} checkpoint {summary.source} ({checked})\n"
    )
    return 0
