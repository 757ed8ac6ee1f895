"""The ``statex`` command: one subcommand per job, errors as one line.

Exit codes: 0 done, 1 failed, 2 wrong usage or wrong input.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jsonargparse

from statex_dist import __version__
from statex_dist.errors import ConfigError, StateXError, bounded_line, one_line, os_error_text, writing
from statex_dist.log import setup_logging

COMMANDS = {
    "prepare": "turn text, jsonl or parquet into shards of tokens",
    "data-stats": "say how long a dataset's documents are, and what each packing would cost",
    "plan": "show what an expansion would do, before anything is done",
    "expand": "expand the recurrent state of a checkpoint",
    "reshard": "turn a checkpoint into another layout: safetensors, ZeRO-3, tensor-parallel shards, Megatron",
    "verify": "compare two checkpoints, or prove that one is the other's expansion",
    "inspect": "describe a checkpoint: what can be done with it, and whether names, shapes and sizes agree",
    "generate": "continue prompts, one recurrent step a token",
    "serve": "answer requests over HTTP, as OpenAI's completions API does",
    "eval": "measure what a model recalls, learns in context and predicts",
    "status": "say how a training run is doing: progress, slowest host, stragglers, last warnings",
    "report": "draw training runs, evaluations and expansions on one page",
    "demo": "the whole road on a tiny model: pre-train, expand, post-train, compare",
}


def build_parser(arguments: Sequence[str] | None = None) -> jsonargparse.ArgumentParser:
    """Return the parser of the command and its subcommands.

    Args:
        arguments: What is to be parsed: of the other subcommands only the names are known then, because a command must
            not cost the import of all; None for every option of all.
    """
    wanted = COMMANDS if arguments is None else [word for word in arguments if word in COMMANDS][:1]
    parser = jsonargparse.ArgumentParser(
        prog="statex",
        description="A bigger memory for pre-trained recurrent language models.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    subcommands = parser.add_subcommands(dest="command")
    for name, text in COMMANDS.items():
        subparser = jsonargparse.ArgumentParser(
            description=text[0].upper() + text[1:] + ".", exit_on_error=False, allow_abbrev=False
        )
        # In this order: a command may have subcommands of its own.
        subcommands.add_subcommand(name, subparser, help=text)
        if name in wanted:
            _module(name).add_arguments(subparser)
    return parser


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"launch.cmd_{command.replace('-', '_')}")


def _output_of(options: Any) -> str | None:
    """Return the path that a command writes to, as the user gave it; None where it only prints."""
    for name in ("out", "target", "save_state"):
        if options.get(name) is not None:
            return str(options[name])
    nested = (value for value in vars(options).values() if isinstance(value, jsonargparse.Namespace))
    return next((found for inner in nested if (found := _output_of(inner))), None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    # The deepspeed launcher adds --local_rank, whatever it starts; the rank is in the environment too.
    given = sys.argv[1:] if argv is None else argv
    arguments = [word for word in given if not re.fullmatch(r"--local_rank=\d+", word)]
    if not arguments:
        arguments = ["--help"]
    setup_logging()
    try:
        options = build_parser(arguments).parse_args(arguments)
        command = options[options.command]
        command.command_line = arguments  # for one that starts itself again, on several ranks
        output = _output_of(command)
        if output is not None and re.match(r"[A-Za-z][\w+.-]*://", output):
            raise ConfigError(f"{output} is a URL; results go to a path of this machine")
        with writing(output or "standard output"):
            return _module(options.command).run(command)
    except argparse.ArgumentError as error:
        # The parser calls an option of a subcommand "command.option"; the user typed no such thing.
        text = one_line(error)
        for command in arguments[:2]:
            if command.replace("-", "_").isidentifier():
                text = text.replace(f"{command}.", "")
        sys.stderr.write(f"error: {text}\n")
        return 2
    except StateXError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return error.exit_code
    except BrokenPipeError:
        return 1
    except OSError as error:
        sys.stderr.write(f"error: {bounded_line(os_error_text(error))}\n")
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write("interrupted\n")
        return 130


if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A rank that ends while its peers end is sometimes aborted by torch's communication threads, and its exit code
        # is lost. All that there was to do is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
