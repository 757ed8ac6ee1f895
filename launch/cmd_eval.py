"""``statex eval``: one nested subcommand for each suite of the registry, made of the suite's options."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import typing
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
from statex_dist.evaluation.suites.base import Suite
from statex_dist.evaluation.suites.registry import find_suite, suite_names

if TYPE_CHECKING:
    from statex_dist.data.tokenizer import Tokenizer
    from statex_dist.models.lm import RecurrentLM

log = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """Add a subcommand for each suite to ``parser``."""
    suites = parser.add_subcommands(dest="suite", metavar="SUITE")
    for name in suite_names():
        # Like the command itself, a suite imports torch only when it runs.
        suite = find_suite(name)
        text = suite.help
        subparser = ArgumentParser(
            description=text[0].upper() + text[1:] + ".", exit_on_error=False, allow_abbrev=False
        )
        add_suite_options(subparser, suite)
        suites.add_subcommand(name, subparser, help=text)


def add_suite_options(parser: ArgumentParser, suite: Suite) -> None:
    """Add the options that all suites have, and those of one."""
    if suite.of_model:
        add_model_options(parser)
        parser.add_argument("--out", type=str, required=True, metavar="DIR", help="where the results go")
        parser.add_argument("--batch-size", type=int, default=suite.batch_size, help="sequences per forward pass")
        parser.add_argument("--seed", type=int, default=0, help="seed of the samples and the intervals")
    else:
        parser.add_argument("--out", type=str, required=True, metavar="DIR", help="where the fits go")
    parser.add_argument("--overwrite", action="store_true", help="replace results in a directory that is not empty")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    types = typing.get_type_hints(suite.options)
    for field in dataclasses.fields(suite.options):
        shown = {key: field.metadata[key] for key in ("help", "metavar") if key in field.metadata}
        flag = f"--{field.name.replace('_', '-')}"
        if field.metadata.get("positional"):
            parser.add_argument(field.name, type=str, nargs="+", **shown)
        elif types[field.name] is bool:
            parser.add_argument(flag, action="store_true", **shown)
        elif field.default is dataclasses.MISSING:
            parser.add_argument(flag, type=types[field.name], required=True, **shown)
        else:
            parser.add_argument(flag, type=types[field.name], default=field.default, **shown)


def run(args: Any) -> int:
    """Run a suite.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options, the model or the data are wrong.
    """
    return run_suite(find_suite(args.suite), args[args.suite])


def run_suite(suite: Suite, args: Any) -> int:
    """Run a suite on this process's share of its units; on rank 0 write its files and print its table.

    Args:
        suite: The suite.
        args: The parsed options of :func:`add_suite_options`.

    Raises:
        StateXError: The options, the model or the data are wrong.
    """
    if not suite.of_model:
        _print(suite, read_json(suite.run_alone(args)[0]), args)
        return 0
    from statex_dist.evaluation.journal import UnitJournal, work
    from statex_dist.evaluation.ranks import OtherRankError, open_ranks

    evaluation = suite.prepare(args)
    try:
        with open_ranks() as ranks:
            with ranks.together():
                mitigation = read_mitigation(args)
                if suite.ragged:
                    check_ragged(mitigation, suite.name)
                model = load_model(args.model, args.device, threads=args.threads, digests=not args.no_digests)
                model.mitigation = mitigation
                tokenizer = load_matching_tokenizer(args, model) if evaluation.tokenizer else None
                facts = model_facts(model, args.model)
                todo = evaluation.units(model, tokenizer)
            fingerprint = {
                "settings": dataclasses.asdict(evaluation.settings),
                "model": {name: value for name, value in facts.items() if name != "directory"},
                "tokenizer": tokenizer.hash if tokenizer is not None else None,
                **_end_tokens(tokenizer),
                **evaluation.given,
            }
            out = Path(args.out)
            with UnitJournal(out, suite.name, fingerprint, ranks=ranks, overwrite=args.overwrite) as journal:
                if journal.found:
                    log.info("%s: %d units were done before; going on", suite.name, journal.found)
                records = work(todo, journal, title=suite.name)
                if records is not None:
                    timing = {"seconds": round(journal.seconds, 3), "ranks": ranks.world_size}
                    files = evaluation.write(records, out, model=facts | _tokenizer_facts(tokenizer), timing=timing)
                    journal.finish()
            if records is not None:
                _print(suite, read_json(files[0]), args)
    except OtherRankError as error:  # that rank reports the error
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


def _print(suite: Suite, summary: dict[str, Any], args: Any) -> None:
    """Print a summary as its table and the place of its files, or as JSON."""
    if args.json:
        sys.stdout.write(json.dumps(summary) + "\n")
        return
    from rich.console import Console

    console = Console()
    console.print(suite.table(summary))
    console.print(f"results: {args.out}", soft_wrap=True, highlight=False)


def model_facts(model: RecurrentLM, directory: str) -> dict[str, Any]:
    """Return what a result file says about its model."""
    from statex_dist.evaluation.journal import model_fingerprint

    config = model.config
    return {
        "directory": directory,
        "fingerprint": model_fingerprint(Path(directory)),
        "model_type": config.MODEL_TYPE,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_numbers": config.state_elements,
        "vocab_size": config.vocab_size,
        "statex": config.statex.to_dict() if config.statex else None,
        "mitigation": None if model.mitigation is None else str(model.mitigation),
    }
