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
    parser.add_argument("--resume", action="store_true", help="go on with what a killed run of this command left")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex reshard`` to ``parser``."""
    add_output_options(parser)
    parser.add_argument("--to", type=str, default="hf", help="layout of the target: hf, zero3, tp or megatron")
    parser.add_argument(
        "--world-size", type=int | None, default=None, help="ranks of a zero3 target (default: as many as the source)"
    )
    parser.add_argument("--tp", type=int | None, default=None, help="tensor-parallel ranks of a tp target")
    parser.add_argument(
        "--evaluation",
        type=str,
        action="append",
        metavar="DIR",
        help="results of `statex eval` for the model card of an hf target; may be repeated",
    )
    parser.add_argument(
        "--tokenizer",
        type=str | None,
        default=None,
        help="bytes or a directory: for an hf target whose source has none",
    )


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
    from checkpoints_tools.io.target_writer import WriteOptions
    from checkpoints_tools.reshard.reshard import reshard
    from launch.cmd_plan import size
    from statex_dist.config import parse_size

    options = WriteOptions(
        max_shard_size=parse_size(args.max_shard_size, option="--max-shard-size"),
        overwrite=args.overwrite,
        workers=args.workers,
        resume=args.resume,
    )
    with progress_bar("reshard") as progress:
        summary = reshard(
            args.source,
            args.target,
            to=args.to,
            dtype=args.dtype,
            world_size=args.world_size,
            tp=args.tp,
            evaluations=args.evaluation or (),
            tokenizer=args.tokenizer,
            options=options,
            progress=progress,
        )
    if args.json:
        sys.stdout.write(json.dumps(asdict(summary)) + "\n")
        return 0
    checked = "held to its manifest" if summary.verified else "no manifest to hold it to"
    sys.stdout.write(
        f"{summary.target} ({summary.to}): {summary.tensors} tensors, {summary.parameters:,} parameters, "
        f"{size(summary.weight_bytes)}, from {summary.kind} checkpoint {summary.source} ({checked})\n"
    )
    if summary.states:
        sys.stdout.write(f"optimizer states: {', '.join(summary.states)}\n")
    if summary.batch is not None:
        kept = "keeps" if summary.batch["kept"] else "comes nearest to, but does not keep,"
        sys.stdout.write(
            f"train_micro_batch_size_per_gpu {summary.batch['micro_batch_size_per_gpu']} with "
            f"gradient_accumulation_steps {summary.batch['gradient_accumulation_steps']} {kept} the global batch of "
            f"{summary.batch['global']}\n"
        )
    for note in summary.notes:
        sys.stdout.write(f"note: {note}\n")
    return 0
