"""``statex eval collapse``: states and loss far past the training length."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from statex_dist.checkpoint.layout import TRAIN_LENGTH_KEY
from statex_dist.errors import ConfigError
from statex_dist.evaluation.suites.base import (
    Evaluation,
    Figure,
    Lines,
    Measured,
    Result,
    Suite,
    estimate_of,
    number,
    one_number,
    option,
    settings_of,
    side_by_side,
    title_of,
    words,
)

if TYPE_CHECKING:
    from rich.table import Table


_SHOWN = 5


@dataclass
class Options:
    train_length: str | None = option(None, help="longest document trained on, such as 2048 or 64K tokens")
    length: str | None = option(None, help="tokens of a prompt (default: 8 training lengths)")
    prompts: str | None = option(
        None, help="of newlines,text,data (default: newlines,text; with --data: newlines,data)"
    )
    data: str | None = option(None, help="a prepared dataset or text files, documents joined end to end")
    sequences: int = option(4, help="sequences of text or data; of newlines there is one")
    points: int = option(128, help="positions at which states are looked at, about")
    variance_factor: float = option(4.0, help="a head collapses above this multiple of its variance in training")
    loss_rise: float = option(0.5, help="nats per token above its best at which a model counts as collapsed")
    sustained: float = option(0.9, help="share of the remaining positions at which that must be so")


class CollapseSuite(Suite):
    name = "collapse"
    help = "states and loss far past the training length: which head collapses, and where"
    title = "State health: collapse"
    said = "Loss and states past the training length. A head collapses where its state's variance explodes."
    options = Options

    def prepare(self, args: Any) -> Evaluation:
        from statex_dist.evaluation.health.collapse import CollapseSettings, collapse_units
        from statex_dist.evaluation.health.collapse_results import write_collapse
        from statex_dist.models.mitigation import StateNorm, parse_mitigation

        mitigation = None if args.mitigation is None else parse_mitigation(args.mitigation)
        prompts = args.prompts or ("newlines,text" if args.data is None else "newlines,data")
        train_length, said_by = training_length(args)
        settings = settings_of(
            CollapseSettings,
            args,
            train_length=train_length,
            length=None if args.length is None else one_number(args.length, "--length"),
            prompts=tuple(words(prompts)),
            every=mitigation.every if isinstance(mitigation, StateNorm) else 1,
        )
        return Evaluation(
            settings=settings,
            units=lambda model, tokenizer: collapse_units(model, settings, tokenizer),
            write=functools.partial(write_collapse, settings=settings, train_length_from=said_by),
        )

    def table(self, summary: dict[str, Any]) -> Table:
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
            f"read to {summary['settings']['length']:,} tokens; the model by its loss (x: past the training length "
            "over within it), heads by their states' variance, the worst first; kept: share of a state that is left "
            "after the training length"
        )
        warning = "" if summary["doubt"] is None else f"WARNING: {summary['doubt']}\n"
        table.caption = Text.assemble((f"{notes}\n\n", "dim italic"), f"{warning}{summary['says']}")
        table.caption_justify = "left"
        return table

    def measured(self, summary: Mapping[str, Any]) -> Iterator[Measured]:
        verdict = summary["verdict"]
        yield _position("collapse", verdict["collapsed"], verdict["position"], f" ({verdict['prompt']})", headline=True)
        heads = f"{verdict['heads_collapsed']} of {verdict['heads']}"
        yield Measured(name="heads that collapse", value=verdict["heads_collapsed"], words=heads, headline=True)
        for prompt, told in summary["prompts"].items():
            own, ratio = told["verdict"], told["loss"]["ratio"]
            why = f" ({own['why']})" if own["why"] else ""
            yield _position(f"{prompt}: collapse", own["collapsed"], own["position"], why)
            yield Measured(
                name=f"{prompt}: heads that collapse",
                value=told["heads"]["collapsed"],
                words=f"{told['heads']['collapsed']} of {told['heads']['total']}",
            )
            yield Measured(name=f"{prompt}: loss past the training length, ratio", value=ratio)

    def figures(self, results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
        from statex_dist.evaluation.page.health_figures import collapse_figures

        return collapse_figures(results, looks)

    def details(self, results: Sequence[Result]) -> Iterator[tuple[str, Lines]]:
        for prompt in dict.fromkeys(prompt for result in results for prompt in result.summary["prompts"]):
            columns = []
            for result in (r for r in results if prompt in r.summary["prompts"]):
                told = result.summary["prompts"][prompt]
                buckets = [{**bucket, "samples": told["sequences"]} for bucket in told["loss"]["by_position"]]
                losses = [estimate_of(f"{b['start']} .. {b['end']}", b, key="loss") for b in buckets]
                columns.append((result.model, losses))
            yield f"Loss on {prompt} by position", side_by_side(columns)
        for result in results:
            lines = [["prompt", "layer", "head", "collapse", "why", "variance ratio", "retention"]]
            for prompt, told in result.summary["prompts"].items():
                for head in told["worst_heads"]:
                    at = _position("", head["collapsed"], head["position"], "").text
                    ratios = ("" if head[key] is None else number(head[key]) for key in ("sc_ratio", "retention"))
                    lines.append([prompt, str(head["layer"]), str(head["head"]), at, head["why"] or "", *ratios])
            yield f"Heads nearest to collapse: {result.model}", lines

    def card(self, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        verdict = summary["verdict"]
        position = verdict["position"]
        seen = "at an unknown position" if position is None else f"at {position:,} tokens"
        yield "state collapse", seen if verdict["collapsed"] else "none seen"
        yield "heads that collapse", f"{verdict['heads_collapsed']} of {verdict['heads']}"


def _position(name: str, collapsed: bool, position: int | None, more: str, *, headline: bool = False) -> Measured:
    """Return where a collapse was seen, with ``more`` to say of one."""
    words = (
        "none seen" if not collapsed else "at an unknown position" if position is None else f"at {position:,} tokens"
    )
    return Measured(name=name, value=position, words=words + (more if collapsed else ""), headline=headline)


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


def _place(position: int | None) -> str:
    return "" if position is None else f"{position:,}"
