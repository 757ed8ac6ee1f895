"""``statex eval mqar``: associative recall by number of key-value pairs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from launch.eval_options import (
    add_common,
    interval_text,
    parse_numbers,
    parse_range,
    reading_options,
    run_suite,
    title_of,
)
from statex_dist.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

_SOURCES = {"bytes": "bytes that begin no character", "words": "words of the model's tokenizer", "given": "ids given"}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex eval mqar`` to ``parser``."""
    add_common(parser, batch_size=32)
    parser.add_argument("--num-pairs", type=str, default="8,16,32,64", help="numbers of key-value pairs")
    parser.add_argument("--num-samples", type=int, default=256, help="documents for each number of pairs")
    for name, of_bytes in (("key", "128:192"), ("value", "192:256")):
        parser.add_argument(
            f"--{name}-ids",
            type=str | None,
            default=None,
            metavar="FIRST:END",
            help=f"token ids of the {name}s (default: {of_bytes} of bytes, else words of the tokenizer)",
        )


def run(args: Any) -> int:
    """Run the suite."""
    from statex_dist.data.tokenizer import has_tokenizer
    from statex_dist.evaluation.mqar import MqarSettings, mqar_units, write_mqar

    num_pairs = parse_numbers(args.num_pairs, "--num-pairs")
    # Ids that are given need no tokenizer; where there is one, they are checked with it.
    both = args.key_ids is not None and args.value_ids is not None
    has_one = not both or args.tokenizer is not None or has_tokenizer(args.model)
    ids, vocabulary = _choose_ids(args, max(num_pairs, default=1))
    settings = MqarSettings(num_pairs=num_pairs, num_samples=args.num_samples, **ids | reading_options(args))
    return run_suite(
        args,
        "mqar",
        settings,
        units=lambda model, tokenizer: mqar_units(model, settings, tokenizer),
        write=functools.partial(write_mqar, settings=settings, vocabulary=vocabulary),
        table=make_table,
        tokenizer=has_one,
    )


def _choose_ids(args: Any, num_pairs: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the ids of keys and values, and further facts about them for the result file.

    Raises:
        StateXError: An option is wrong, or there is no tokenizer, or one with too few words.
    """
    from launch.model_options import tokenizer_of
    from statex_dist.data.tokenizer import BytesTokenizer, has_tokenizer, load_tokenizer
    from statex_dist.evaluation.mqar_ids import choose_words

    given = {
        name: parse_range(text, f"--{name[:-1]}-ids")
        for name, text in (("keys", args.key_ids), ("values", args.value_ids))
        if text is not None
    }
    if len(given) == 2:
        return {"vocabulary": "given", **given}, {}
    if args.tokenizer is None and not has_tokenizer(args.model):
        return given, {}  # refused when the model was looked at, whose own faults are said first
    tokenizer = load_tokenizer(tokenizer_of(args))
    if tokenizer.hash == BytesTokenizer.hash:
        return given, {}
    if given:
        raise ConfigError("--key-ids and --value-ids go together, but for the bytes tokenizer; give both, or neither")
    keys, values = choose_words(tokenizer, num_pairs)
    texts = {"key_texts": list(keys.values()), "value_texts": list(values.values())}
    return {"vocabulary": "words", "keys": tuple(keys), "values": tuple(values)}, texts


def make_table(summary: dict[str, Any]) -> Table:
    """Return the printed table of ``mqar.json``."""
    from rich.table import Table

    columns = ("pairs", "accuracy", "95 % interval", "guessing", "eliminating", "pairs recalled")
    table = Table(*columns, title=title_of("mqar", summary["model"]))
    for n, row in summary["by_num_pairs"].items():
        levels = (f"{row['guessing']:.3f}", f"{row['eliminating']:.3f}")
        table.add_row(n, f"{row['accuracy']:.3f}", interval_text(row), *levels, f"{row['pairs_recalled']:.1f}")
    table.caption = f"keys and values: {_SOURCES[summary['vocabulary']['source']]}"
    return table
