"""``statex prepare``: text, JSON lines and parquet to shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from jsonargparse import ArgumentParser

from statex_dist.config import parse_size
from statex_dist.errors import ConfigError

if TYPE_CHECKING:
    from statex_dist.data.prepare import PartSummary, PrepareSummary

T = TypeVar("T")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex prepare`` to ``parser``."""
    parser.add_argument("inputs", nargs="+", type=str, metavar="INPUT", help="files, directories or globs")
    parser.add_argument("--out", type=str, required=True, metavar="DIR", help="dataset directory to make")
    parser.add_argument("--format", type=str, default="mds", help="shard format: mds or wds")
    parser.add_argument("--tokenizer", type=str, default="bytes", help="bytes, or a Hugging Face tokenizer's directory")
    parser.add_argument("--workers", type=int | None, default=None, help="processes (default: by cores and input size)")
    parser.add_argument("--text-field", type=str, default="text", help="text field of .jsonl, column of .parquet")
    parser.add_argument(
        "--where",
        action="append",
        type=str,
        default=[],
        metavar="EXPR",
        help="take records with FIELD OP VALUE only, e.g. 'score>=0.5', 'meta.lang=en'; may be repeated",
    )
    parser.add_argument("--eos", type=str, default="append", help="append, or none: documents as they are")
    parser.add_argument("--bos", type=str, default="none", help="none, or prepend: documents begin with BOS")
    parser.add_argument(
        "--special-tokens",
        type=str,
        default="split",
        help="how <|endoftext|> and the like in text are encoded: split (plain text), keep (control tokens) or refuse",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the document shuffle")
    parser.add_argument("--shard-size", type=str, default="64MiB", help="size limit of a raw shard, e.g. 512KB, 64MiB")
    parser.add_argument("--compression", type=str, default="none", help="none, zstd or gz")
    parser.add_argument("--min-tokens", type=int, default=2, help="leave out documents shorter than this, EOS included")
    parser.add_argument("--max-tokens", type=int | None, default=None, help="leave out documents longer than this")
    parser.add_argument("--max-documents", type=int | None, default=None, help="stop after this many documents")
    parser.add_argument("--skip-undecodable", action="store_true", help="leave out text files that are not UTF-8")
    parser.add_argument("--skip-bad-records", action="store_true", help="leave out, count and list bad records")
    parser.add_argument("--rows", type=str, default="auto", help="kind of the rows: auto, text or tokens")
    parser.add_argument(
        "--ignore-field",
        action="append",
        type=str,
        default=[],
        metavar="NAME",
        help="ignore this field beside input_ids; may be repeated",
    )
    parser.add_argument(
        "--max-document-bytes", type=str, default="128MiB", help="size limit of a line, text file or row, up to 1GiB"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument("--work", type=str | None, default=None, metavar="DIR", help="directory of the finished units")
    parser.add_argument("--part", type=str | None, default=None, metavar="I/N", help="tokenise only this share, as 3/8")
    parser.add_argument("--merge", action="store_true", help="write the shards from what all parts have tokenised")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: Any) -> int:
    """Prepare the dataset, or a part of it, and print what was made.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options or the inputs are wrong.
    """
    if args.part is not None and args.merge:
        raise ConfigError("--part and --merge are given; run the parts first, then --merge")
    from statex_dist.data.corpus.document_rules import DocumentRules
    from statex_dist.data.corpus.source import WorkOptions
    from statex_dist.data.corpus.work import parse_part
    from statex_dist.data.prepare import ShardOptions, prepare, prepare_part

    given = {
        **vars(args),
        "where": tuple(args.where),
        "ignore_fields": tuple(args.ignore_field),
        "max_document_bytes": parse_size(args.max_document_bytes, option="--max-document-bytes"),
    }
    data = (args.inputs, args.out, args.tokenizer)
    if args.part is None:
        given["shard_bytes"] = parse_size(args.shard_size, option="--shard-size")
        shards = _taken(ShardOptions, given)
        rules, options = _taken(DocumentRules, given), _taken(WorkOptions, given)
        summary: Any = prepare(*data, rules=rules, shards=shards, options=options, merge=args.merge)
        text = _describe(summary)
    else:
        rules = _taken(DocumentRules, given)
        summary = prepare_part(*data, parse_part(args.part), rules=rules, options=_taken(WorkOptions, given))
        text = _describe_part(summary)
    sys.stdout.write((json.dumps(summary.as_dict()) if args.json else text) + "\n")
    return 0


def _taken(cls: type[T], given: Mapping[str, Any]) -> T:
    """Return a value object of the options that have the names of its fields."""
    return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})  # type: ignore[arg-type]


def _describe(summary: PrepareSummary) -> str:
    counts = {
        "short": summary.short_documents,
        "long": summary.long_documents,
        "filtered": summary.filtered_documents,
        "undecodable": summary.undecodable_files,
        "bad": summary.bad_records,
    }
    reasons = [f"{count} {reason}" for reason, count in counts.items() if count]
    left_out = f", {' and '.join(reasons)} ones left out" if reasons else ""
    marked = summary.special_token_documents
    left_out += f", {marked} with markers of special tokens in their text" if marked else ""
    documents = f"{summary.documents} document{'s' * (summary.documents != 1)}"
    if summary.finished_before:
        return (
            f"{summary.out}: complete: {documents}{left_out}, {summary.tokens} {summary.dtype} "
            "tokens; a run of this command was killed after it had made this; its leftovers were removed"
        )
    return (
        f"{summary.out}: {documents}{left_out}, {summary.tokens} {summary.dtype} tokens in "
        f"{summary.shards} shard{'s' * (summary.shards != 1)}, from {summary.files} file{'s' * (summary.files != 1)} "
        f"in {summary.seconds:.1f} s ({summary.tokens_per_second / 1e6:.2f}M tokens/s)"
    )


def _describe_part(summary: PartSummary) -> str:
    bad = f", {summary.bad_records} bad records left out" if summary.bad_records else ""
    marked = summary.special_token_documents
    markers = f" ({marked} with markers of special tokens in their text)" if marked else ""
    documents = f"{summary.documents} document{'s' * (summary.documents != 1)}"
    return (
        f"part {summary.part}: {summary.units} unit{'s' * (summary.units != 1)} ({summary.units_before} done before) "
        f"with {documents}{markers}, {summary.tokens} tokens{bad}, in {summary.work} "
        f"({summary.seconds:.1f} s)"
    )
