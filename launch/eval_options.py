"""What all suites of ``statex eval`` share: their common options, loading, and the way from units to files."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from launch.model_options import (
    add_model_options,
    check_ragged,
    load_matching_tokenizer,
    load_model,
    read_mitigation,
)
from statex_dist.checkpoint.json_file import read_json
from statex_dist.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from statex_dist.data.tokenizer import Tokenizer
    from statex_dist.evaluation.journal import Unit
    from statex_dist.models.lm import RecurrentLM

log = logging.getLogger(__name__)

_SUFFIXES = {"k": 1 << 10, "m": 1 << 20}


def add_common(parser: ArgumentParser, *, batch_size: int, segment_length: int = 1024) -> None:
    """Add the options of every suite that runs a model.

    Args:
        parser: The suite's parser.
        batch_size: Default number of sequences per forward pass.
        segment_length: Default number of tokens per forward pass.
    """
    add_model_options(parser, segment_length=segment_length)
    parser.add_argument("--out", type=str, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="sequences per forward pass")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples and the intervals")
    parser.add_argument("--overwrite", action="store_true", help="replace results in a directory that is not empty")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")


def reading_options(args: Any) -> dict[str, int]:
    """Return the fields that every suite's settings take from :func:`add_common`."""
    return {name: getattr(args, name) for name in ("batch_size", "segment_length", "seed")}


def run_suite(
    args: Any,
    suite: str,
    settings: Any,
    *,
    units: Callable[[RecurrentLM, Any], Iterable[Unit]],
    write: Callable[..., list[Path]],
    table: Callable[[dict[str, Any]], Table],
    tokenizer: bool = True,
    ragged: bool = False,
    given: Mapping[str, Any] | None = None,
) -> int:
    """Run a suite on this process's share of its units; on rank 0 write its files and print its table.

    Args:
        args: The parsed options of :func:`add_common`.
        suite: The suite's name, the stem of its files.
        settings: A dataclass of everything that decides the result, but for the model.
        units: Called with the model and its tokenizer: checks the settings against them and returns the units.
        write: Called with ``(records, directory, model=facts, timing=...)`` on rank 0: writes the result files and
            returns them, the summary first.
        table: Makes the printed table of the summary.
        tokenizer: Whether the suite needs one; else ``units`` is given None.
        ragged: Whether its forward passes end wherever a text ends, and not only at multiples of the segment.
        given: Further facts that an interrupted evaluation must share to go on, such as where the data came from.

    Raises:
        StateXError: The options, the model or the data are wrong.
    """
    from statex_dist.evaluation.journal import UnitJournal, work
    from statex_dist.evaluation.ranks import OtherRankError, open_ranks

    try:
        with open_ranks() as ranks:
            with ranks.together():
                mitigation = read_mitigation(args)
                if ragged:
                    check_ragged(mitigation, suite)
                model = load_model(args.model, args.device, threads=args.threads, digests=not args.no_digests)
                model.mitigation = mitigation
                loaded = load_matching_tokenizer(args, model) if tokenizer else None
                facts = model_facts(model, args.model)
                todo = units(model, loaded)
            fingerprint = {
                "settings": dataclasses.asdict(settings),
                "model": {name: value for name, value in facts.items() if name != "directory"},
                "tokenizer": loaded.hash if loaded is not None else None,
                **_end_tokens(loaded),
                **(given or {}),
            }
            with UnitJournal(Path(args.out), suite, fingerprint, ranks=ranks, overwrite=args.overwrite) as journal:
                if journal.found:
                    log.info("%s: %d units were done before; going on", suite, journal.found)
                records = work(todo, journal, title=suite)
                if records is not None:
                    timing = {"seconds": round(journal.seconds, 3), "ranks": ranks.world_size}
                    files = write(records, Path(args.out), model=facts | _tokenizer_facts(loaded), timing=timing)
                    journal.finish()
            if records is not None:
                summary = read_json(files[0])
                print_result(summary, table, args.out, as_json=args.json)
    except OtherRankError as error:  # that rank says what is wrong
        return error.exit_code
    return 0


def _tokenizer_facts(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return what a result file says about the tokenizer whose vocabulary a suite draws its texts and tokens from."""
    if tokenizer is None:
        return {"tokenizer": None}
    facts = {"name": tokenizer.spec, "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
    return {"tokenizer": {**facts, "end_tokens": sorted(tokenizer.end_tokens)}}


def _end_tokens(tokenizer: Tokenizer | None) -> dict[str, list[int]]:
    """Return the end tokens where a model's files name more than its tokenizer does."""
    if tokenizer is None or set(tokenizer.end_tokens) <= {tokenizer.eos_token_id}:
        return {}
    return {"end_tokens": sorted(tokenizer.end_tokens)}


def interval_text(row: Mapping[str, Any], *, low: str = "low", high: str = "high", digits: int = 3) -> str:
    """Return the interval of a summary's figure, or "1 sample", which has none."""
    if row[low] is None or row[high] is None:
        return "1 sample"
    return f"{row[low]:.{digits}f} .. {row[high]:.{digits}f}"


def print_result(summary: dict[str, Any], table: Callable[[dict[str, Any]], Table], out: str, *, as_json: bool) -> None:
    """Print a summary as its table and the place of its files, or as JSON."""
    if as_json:
        sys.stdout.write(json.dumps(summary) + "\n")
        return
    from rich.console import Console

    console = Console()
    console.print(table(summary))
    console.print(f"results: {out}", soft_wrap=True, highlight=False)


def model_facts(model: RecurrentLM, directory: str) -> dict[str, Any]:
    """Return what a result file says about its model."""
    from statex_dist.evaluation.journal import model_fingerprint

    config = model.config
    return {
        "directory": directory,
        "fingerprint": model_fingerprint(Path(directory)),
        "model_type": config.MODEL_TYPE,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_numbers": config.state_numbers,
        "vocab_size": config.vocab_size,
        "statex": config.statex.to_dict() if config.statex else None,
        "mitigation": None if model.mitigation is None else str(model.mitigation),
    }


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Return the numbers of a list such as ``8,16,32`` or ``4K,256K`` (K: 1024, M: 1024 K).

    Raises:
        ConfigError: It is not a list of whole numbers.
    """
    try:
        return tuple(_number(word) for word in words(text))
    except ValueError:
        raise ConfigError(
            f"{option} {text!r} is not understood; allowed: whole numbers with commas, such as 8,16 or 4K,64K"
        ) from None


def _number(word: str) -> int:
    factor = _SUFFIXES.get(word[-1].lower())
    return int(word) if factor is None else int(word[:-1]) * factor


def parse_range(text: str, option: str) -> tuple[int, int]:
    """Return the bounds of a range such as ``128:192`` (192 not included).

    Raises:
        ConfigError: It is not two whole numbers with a colon.
    """
    try:
        first, end = (int(word) for word in text.split(":"))
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not understood; allowed: FIRST:END, such as 128:192") from None
    return first, end


def words(text: str) -> list[str]:
    """Return the words of a list with commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def title_of(suite: str, model: Mapping[str, Any]) -> str:
    """Return a table's title from the facts of :func:`model_facts`."""
    title = (
        f"{suite}: {model['model_type']}, {model['parameters']:,} parameters, {model['state_numbers']:,} state numbers"
    )
    return f"{title}, {model['mitigation']}" if model.get("mitigation") else title
