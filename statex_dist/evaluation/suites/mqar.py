"""``statex eval mqar``: associative recall by number of key-value pairs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from statex_dist.errors import ConfigError
from statex_dist.evaluation.suites.base import (
    Evaluation,
    Figure,
    Lines,
    Measured,
    Result,
    Suite,
    accuracy,
    estimate_of,
    interval_text,
    number,
    option,
    parse_numbers,
    title_of,
)

if TYPE_CHECKING:
    from rich.table import Table


_SOURCES = {"bytes": "bytes that begin no character", "words": "words of the model's tokenizer", "given": "ids given"}


def _ids(name: str, of_bytes: str) -> Any:
    text = f"token ids of the {name}s (default: {of_bytes} of bytes, else words of the tokenizer)"
    return option(None, metavar="FIRST:END", help=text)


@dataclass
class Options:
    num_pairs: str = option("8,16,32,64", help="numbers of key-value pairs")
    num_samples: int = option(256, help="documents for each number of pairs")
    key_ids: str | None = _ids("key", "128:192")
    value_ids: str | None = _ids("value", "192:256")


class MqarSuite(Suite):
    name = "mqar"
    help = "associative recall by number of key-value pairs: the state's capacity"
    title = "Recall: key-value pairs"
    said = "Share of values that the model gives to their keys. Dotted: what is right without knowing whose each is."
    options = Options
    batch_size = 32

    def prepare(self, args: Any) -> Evaluation:
        from statex_dist.data.tokenizer import has_tokenizer
        from statex_dist.evaluation.mqar import MqarSettings, mqar_units, write_mqar

        num_pairs = parse_numbers(args.num_pairs, "--num-pairs")
        # Ids that are given need no tokenizer; where there is one, they are checked with it.
        both = args.key_ids is not None and args.value_ids is not None
        has_one = not both or args.tokenizer is not None or has_tokenizer(args.model)
        ids, vocabulary = _choose_ids(args, max(num_pairs, default=1))
        reading = {name: getattr(args, name) for name in ("batch_size", "segment_length", "seed")}
        settings = MqarSettings(num_pairs=num_pairs, num_samples=args.num_samples, **ids | reading)
        return Evaluation(
            settings=settings,
            units=lambda model, tokenizer: mqar_units(model, settings, tokenizer),
            write=functools.partial(write_mqar, settings=settings, vocabulary=vocabulary),
            tokenizer=has_one,
        )

    def table(self, summary: dict[str, Any]) -> Table:
        from rich.table import Table

        columns = ("pairs", "accuracy", "95 % interval", "guessing", "eliminating", "pairs recalled")
        table = Table(*columns, title=title_of("mqar", summary["model"]))
        for n, row in summary["by_num_pairs"].items():
            levels = (f"{row['guessing']:.3f}", f"{row['eliminating']:.3f}")
            table.add_row(n, f"{row['accuracy']:.3f}", interval_text(row), *levels, f"{row['pairs_recalled']:.1f}")
        table.caption = f"keys and values: {_SOURCES[summary['vocabulary']['source']]}"
        return table

    def measured(self, summary: Mapping[str, Any]) -> Iterator[Measured]:
        last = max(summary["by_num_pairs"], key=int)
        for pairs, e in summary["by_num_pairs"].items():
            yield estimate_of(f"accuracy, {pairs} pairs", e, headline=pairs == last)
        best = max(summary["by_num_pairs"].values(), key=lambda e: e["pairs_recalled"])
        yield Measured(
            name="pairs recalled rather than named at random, at most",
            value=best["pairs_recalled"],
            low=best["pairs_recalled_low"],
            high=best["pairs_recalled_high"],
            samples=best.get("samples"),
            headline=True,
        )
        capacity = summary["capacity"]
        most = capacity["num_pairs"]
        name = f"most pairs with {capacity['threshold']:.0%} right"
        yield Measured(name=name, value=most, words="none" if most is None else str(most))

    def figures(self, results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
        from statex_dist.evaluation.page.suite_figures import mqar_figures

        return mqar_figures(results, looks)

    def details(self, results: Sequence[Result]) -> Iterator[tuple[str, Lines]]:
        from statex_dist.evaluation.page.suite_figures import LEVELS

        for result in results:
            asked = result.summary["by_num_pairs"]
            known = {key: name for key, name in LEVELS.items() if all(key in e for e in asked.values())}
            lines = [["pairs", *known.values()]] + [[n, *(number(e[key]) for key in known)] for n, e in asked.items()]
            yield f"Right without recall: {result.model}", lines

    def card(self, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        for pairs, entry in summary["by_num_pairs"].items():
            yield f"accuracy, {pairs} pairs", accuracy(entry)


def _choose_ids(args: Any, num_pairs: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the ids of keys and values, and further facts about them for the result file.

    Raises:
        StateXError: An option is wrong, or there is no tokenizer, or one with too few words.
    """
    from statex_dist.data.tokenizer import BytesTokenizer, has_tokenizer, load_tokenizer
    from statex_dist.evaluation.mqar_ids import choose_words
    from statex_dist.inference.vocabulary import tokenizer_of

    given = {
        name: _parse_range(text, f"--{name[:-1]}-ids")
        for name, text in (("keys", args.key_ids), ("values", args.value_ids))
        if text is not None
    }
    if len(given) == 2:
        return {"vocabulary": "given", **given}, {}
    if args.tokenizer is None and not has_tokenizer(args.model):
        return given, {}  # refused when the model was looked at, whose own faults are said first
    tokenizer = load_tokenizer(tokenizer_of(args.model, args.tokenizer))
    if tokenizer.hash == BytesTokenizer.hash:
        return given, {}
    if given:
        raise ConfigError("--key-ids and --value-ids go together, but for the bytes tokenizer; give both, or neither")
    keys, values = choose_words(tokenizer, num_pairs)
    texts = {"key_texts": list(keys.values()), "value_texts": list(values.values())}
    return {"vocabulary": "words", "keys": tuple(keys), "values": tuple(values)}, texts


def _parse_range(text: str, option: str) -> tuple[int, int]:
    """Return the bounds of a range such as ``128:192`` (192 not included).

    Raises:
        ConfigError: It is not two whole numbers with a colon.
    """
    try:
        first, end = (int(word) for word in text.split(":"))
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not understood; allowed: FIRST:END, such as 128:192") from None
    return first, end
