"""``statex prepare``: text, JSON lines and parquet to shards."""

from __future__ import annotations

import json
import sys
from typing import Any

from jsonargparse import ArgumentParser

from statex_dist.config import parse_size


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex prepare`` to ``parser``."""
    parser.add_argument("inputs", nargs="+", type=str, metavar="INPUT", help="files, directories or globs")
    parser.add_argument("--out", type=str, required=True, metavar="DIR", help="dataset directory to make")
    parser.add_argument("--format", type=str, default="mds", help="shard format: mds")
    parser.add_argument("--tokenizer", type=str, default="bytes", help="bytes, or a Hugging Face tokenizer's directory")
    parser.add_argument("--workers", type=int | None, default=None, help="processes (default: by cores and input size)")
    parser.add_argument("--text-field", type=str, default="text", help="text field of .jsonl, column of .parquet")
    parser.add_argument("--seed", type=int, default=0, help="seed of the document shuffle")
    parser.add_argument("--shard-size", type=str, default="64MiB", help="size limit of a raw shard, e.g. 512KB, 64MiB")
    parser.add_argument("--compression", type=str, default="none", help="none or zstd")
    parser.add_argument("--min-tokens", type=int, default=2, help="leave out documents shorter than this, EOS included")
    parser.add_argument("--max-documents", type=int | None, default=None, help="stop after this many documents")
    parser.add_argument("--skip-undecodable", action="store_true", help="leave out text files that are not UTF-8")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: Any) -> int:
    """Prepare the dataset and print what was made.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options or the inputs are wrong.
    """
    from statex_dist.data.prepare import prepare

    summary = prepare(
        args.inputs,
        args.out,
        args.tokenizer,
        format=args.format,
        workers=args.workers,
        text_field=args.text_field,
        seed=args.seed,
        shard_bytes=parse_size(args.shard_size, option="--shard-size"),
        compression=args.compression,
        min_tokens=args.min_tokens,
        max_documents=args.max_documents,
        skip_undecodable=args.skip_undecodable,
        overwrite=args.overwrite,
    )
    if args.json:
        sys.stdout.write(json.dumps(summary.as_dict()) + "\n")
        return 0
    short = f", {summary.short_documents} short ones left out" if summary.short_documents else ""
    sys.stdout.write(
        f"{summary.out}: {summary.documents} documents{short}, {summary.tokens} {summary.dtype} tokens in "
        f"{summary.shards} shard{'s' * (summary.shards != 1)}, from {summary.files} file{'s' * (summary.files != 1)} "
        f"in {summary.seconds:.1f} s ({summary.tokens_per_second / 1e6:.2f}M tokens/s)\n"
    )
    return 0
