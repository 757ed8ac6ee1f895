"""``statex eval collapse``: states and loss far past the training length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from launch.eval_options import add_common, parse_numbers, reading_options, run_suite, title_of, words
from statex_dist.checkpoint.layout import TRAIN_LENGTH_KEY
from statex_dist.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 5


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the suite to ``parser``."""
    add_common(parser, batch_size=8)
    for name, kind, default, text in (
        ("train-length", str | None, None, "longest document trained on, such as 2048 or 64K tokens"),
        ("length", str | None, None, "tokens of a prompt (default: 8 training lengths)"),
        ("prompts", str | None, None, "of newlines,text,data (default: newlines,text; with --data: newlines,data)"),
        ("data", str | None, None, "a prepared dataset or text files, documents joined end to end"),
        ("sequences", int, 4, "sequences of text or data; of newlines there is one"),
        ("points", int, 128, "positions at which states are looked at, about"),
        ("variance-factor", float, 4.0, "a head collapses above this multiple of its variance in training"),
        ("loss-rise", float, 0.5, "the model collapses so many nats a token above its best in training"),
        ("sustained", float, 0.9, "share of the remaining positions at which that must be so"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)


def run(args: Any) -> int:
    """Run the suite.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options, the model or the data are wrong.
    """
    from statex_dist.evaluation.health.collapse import CollapseSettings, collapse_units
    from statex_dist.evaluation.health.collapse_results import write_collapse
    from statex_dist.models.mitigation import StateNorm, parse_mitigation

    mitigation = None if args.mitigation is None else parse_mitigation(args.mitigation)
    prompts = args.prompts or ("newlines,text" if args.data is None else "newlines,data")
    train_length, said_by = training_length(args)
    settings = CollapseSettings(
        train_length=train_length,
        length=None if args.length is None else one_number(args.length, "--length"),
        prompts=tuple(words(prompts)),
        data=args.data,
        sequences=args.sequences,
        points=args.points,
        every=mitigation.every if isinstance(mitigation, StateNorm) else 1,
        variance_factor=args.variance_factor,
        loss_rise=args.loss_rise,
        sustained=args.sustained,
        **reading_options(args),
    )
    return run_suite(
        args,
        "collapse",
        settings,
        units=lambda model, tokenizer: collapse_units(model, settings, tokenizer),
        write=lambda records, directory, **facts: write_collapse(
            records, directory, settings, train_length_from=said_by, **facts
        ),
        table=_table,
    )


def training_length(args: Any) -> tuple[int, str]:
    """Return ``--train-length``, or what the model's ``config.json`` says, and which of the two it was.

    Raises:
        ConfigError: Neither says it.
    """
    from statex_dist.models.registry import read_config
    from statex_dist.models.source import find_model

    if args.train_length is not None:
        return one_number(args.train_length, "--train-length"), "--train-length"
    known = read_config(find_model(args.model)).extra.get(TRAIN_LENGTH_KEY)
    if isinstance(known, int) and not isinstance(known, bool):
        return known, "config.json"
    raise ConfigError(
        f"the length that {args.model} was trained on is not known: its config.json has no {TRAIN_LENGTH_KEY!r}; give "
        "--train-length (tokens of the longest document, or piece of one, that it was trained on: data.seq_len of the "
        "run, or less where all documents are shorter: `statex data-stats SHARDS` shows the longest document)"
    )


def one_number(text: str, option: str) -> int:
    """Return a number such as ``2048`` or ``64K``.

    Raises:
        ConfigError: It is something else.
    """
    numbers = parse_numbers(text, option)
    if len(numbers) != 1:
        raise ConfigError(f"{option} {text!r}: give one number")
    return numbers[0]


def _table(summary: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    said_by = {"--train-length": "given by --train-length", "config.json": "from its config.json"}
    title = (
        f"{title_of('collapse', summary['model'])}, trained at {summary['settings']['train_length']:,} tokens "
        f"({said_by[summary['train_length_from']]})"
    )
    table = Table("prompt", "layer", "head", "verdict", "at", "variance", "kept", title=title)
    for prompt, found in summary["prompts"].items():
        verdict, heads = found["verdict"], found["heads"]
        ratio = found["loss"]["ratio"]
        loss = "" if ratio is None else f", x {ratio:.2f}"
        place = _place(verdict["position"])
        if verdict["low"] is not None:
            place += f"  ({_place(verdict['low'])} .. {_place(verdict['high'])})"
        word = "healthy"
        if verdict["collapsed"]:
            word = "NOT FINITE" if verdict["why"] == "not finite" else "COLLAPSED"
        table.add_section()
        table.add_row(prompt, "model", "", f"loss {word}{loss}", place, "", "")
        first = _place(heads["position"])
        table.add_row("", "heads", "", f"{heads['collapsed']} of {heads['total']} heads collapsed", first, "", "")
        for head in found["worst_heads"][:_SHOWN]:
            table.add_row(
                "",
                str(head["layer"]),
                str(head["head"]),
                f"collapsed ({head['why']})" if head["collapsed"] else "healthy",
                _place(head["position"]),
                "-" if head["sc_ratio"] is None else f"x {head['sc_ratio']:.3g}",
                "-" if head["retention"] is None else f"{head['retention']:.3g}",
            )
    notes = (
        f"read to {summary['settings']['length']:,} tokens; the model by its loss (x: past the training length over "
        "within it), heads by their states' variance, the worst first; kept: share of a state that is left after the "
        "training length"
    )
    warning = "" if summary["doubt"] is None else f"WARNING: {summary['doubt']}\n"
    table.caption = Text.assemble((f"{notes}\n\n", "dim italic"), f"{warning}{summary['says']}")
    table.caption_justify = "left"
    return table


def _place(position: int | None) -> str:
    return "" if position is None else f"{position:,}"
