"""``statex eval``: one nested subcommand for each suite, in ``launch/eval_SUITE.py``."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from jsonargparse import ArgumentParser

SUITES = {
    "recall": "passkey and RULER's needles in a haystack, by context length and depth",
    "mqar": "associative recall by number of key-value pairs: the state's capacity",
    "icl": "in-context classification by number of shots",
    "perplexity": "loss on text, by position in the context",
    "collapse": "states and loss far past the training length: which head collapses, and where",
    "capacity": "the longest context with near-perfect passkey recall",
    "laws": "fits of training length and recall to the state size, from results of collapse and capacity",
    "lm-eval": "tasks of lm-evaluation-harness, read with a recurrent state",
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add a subcommand for each suite to ``parser``."""
    suites = parser.add_subcommands(dest="suite", metavar="SUITE")
    for name, text in SUITES.items():
        # Like the command itself, a suite imports torch only when it runs.
        subparser = ArgumentParser(
            description=text[0].upper() + text[1:] + ".", exit_on_error=False, allow_abbrev=False
        )
        _module(name).add_arguments(subparser)
        suites.add_subcommand(name, subparser, help=text)


def run(args: Any) -> int:
    """Run a suite.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options, the model or the data are wrong.
    """
    return _module(args.suite).run(args[args.suite])


def _module(suite: str) -> ModuleType:
    return importlib.import_module(f"launch.eval_{suite.replace('-', '_')}")
