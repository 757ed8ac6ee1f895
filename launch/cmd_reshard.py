"""``statex reshard``: one checkpoint into another layout."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from jsonargparse import ArgumentParser

from launch.tool_options import add_output_options, missing_text, progress_bar, size, write_options


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex reshard`` to ``parser``."""
    add_output_options(parser, layouts="hf, zero3, tp or megatron")
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


def run(args: Any) -> int:
    """Reshard and print what was written.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options, the source or the target are wrong.
    """
    from checkpoints_tools.reshard.reshard import reshard

    options = write_options(args)
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
    if summary.missing_parts:
        sys.stdout.write(f"part {summary.part} of {summary.target} is written; {missing_text(summary.missing_parts)}\n")
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
