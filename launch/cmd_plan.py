"""``statex plan``: what an expansion costs, before anything is done."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from jsonargparse import ArgumentParser

from statex_dist.state.plan import Op

if TYPE_CHECKING:
    from checkpoints_tools.plan_options import PlanOptions


RECIPE_NAMES = "statex-paper-gla, statex-paper-merge, statex-paper-mamba4, statex-paper-merge-copy"


def add_plan_options(parser: ArgumentParser) -> None:
    """Add the options that describe an expansion (``statex plan`` and ``statex expand``)."""
    for name, text in (
        ("layers", "every:K, first:K, last:K, all or a list such as 0,6,12 (default: every:6)"),
        ("factor", "growth of a layer's state, or 'full': all heads (default: full for heads, 4 for grow_state)"),
        ("init", "start of the new state: reinit, inherit or lossless (default: reinit)"),
        ("op", f"{', '.join(get_args(Op))} (default: by family and --init)"),
        ("target-state", "find layers and factor for a total state, such as 1.5x or 18.7M"),
        ("plan", "YAML file with a plan per layer (docs/checkpoints.md)"),
        ("recipe", f"a mode of the StateX authors' scripts: {RECIPE_NAMES}"),
    ):
        parser.add_argument(f"--{name}", type=str | None, default=None, help=text)
    parser.add_argument(
        "--reset-dynamics",
        action="store_true",
        help="start decays, time steps and norms anew, as the authors' scripts do (they are kept otherwise)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the new values")


def plan_options(args: Any) -> PlanOptions:
    """Return the parsed plan options as one value.

    Raises:
        ConfigError: An option is not one of the allowed words, or two of them clash.
    """
    from checkpoints_tools.plan_options import PlanOptions

    names = ("layers", "factor", "init", "op", "target_state", "plan", "recipe", "reset_dynamics", "seed")
    return PlanOptions(**{name: getattr(args, name) for name in names})


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex plan`` to ``parser``."""
    parser.add_argument("model_dir", type=str, metavar="MODEL_DIR", help="directory with the model's config.json")
    add_plan_options(parser)
    parser.add_argument("--world-size", type=int, default=1, help="ranks that share the training states (ZeRO-3)")
    parser.add_argument("--seq-len", type=int, default=65536, help="tokens of a training sequence on one rank")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: Any) -> int:
    """Print the plan's costs.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options are wrong or do not fit the model.
    """
    from checkpoints_tools.plan_options import plan_model
    from checkpoints_tools.plan_report import report_plan
    from statex_dist.models.kinds import read_config

    options = plan_options(args)
    before = read_config(Path(args.model_dir))
    after = plan_model(before, options)
    report = report_plan(before, after, world_size=args.world_size, seq_len=args.seq_len)
    if args.json:
        assert after.statex is not None
        sys.stdout.write(json.dumps({**report.to_dict(), "plan": after.statex.to_dict()}) + "\n")
    else:
        _print(report)
    return 0


def _print(report: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    layers = Table(title=f"State of each layer ({report.model_type}; bytes of one sequence)")
    for name in ("layer", "expansion", "numbers", "after", "bytes", "after"):
        layers.add_column(name, justify="left" if name == "expansion" else "right")
    for row in report.layers:
        layers.add_row(
            str(row.layer),
            row.expansion or "",
            f"{row.numbers_before:,}",
            f"{row.numbers_after:,}",
            size(row.bytes_before),
            size(row.bytes_after),
        )
    console.print(layers)
    before, after = report.before, report.after
    totals = Table(title=f"The model, and training it on {report.world_size} rank(s) at {report.seq_len} tokens a rank")
    for name in ("", "before", "after", "change"):
        totals.add_column(name, justify="right" if name else "left")
    for label, old, new, shown in (
        ("state numbers", before.state_numbers, after.state_numbers, "{:,}".format),
        ("state bytes", before.state_bytes, after.state_bytes, size),
        ("parameters", before.parameters, after.parameters, "{:,}".format),
        ("forward FLOPs per token", before.flops_per_token, after.flops_per_token, "{:,}".format),
        ("memory: training states", before.memory.states, after.memory.states, size),
        ("memory: gathered layer", before.memory.gathered, after.memory.gathered, size),
        ("memory: activations", before.memory.activations, after.memory.activations, size),
        ("memory: logits", before.memory.logits, after.memory.logits, size),
        ("memory per rank, estimate", before.memory.total, after.memory.total, size),
    ):
        totals.add_row(label, shown(old), shown(new), f"{100 * (new / old - 1):+.1f} %" if old else "")
    console.print(totals)
    if report.mixed:
        console.print("parameters, FLOPs and memory leave out the layers of another kind, which are passed through")
    if after.forget_tokens:
        console.print(f"forget threshold: {after.forget_tokens:,} tokens after expansion (a law fitted on Mamba-2)")
    if report.warning:
        console.print(f"warning: {report.warning}", style="yellow")


def size(count: int) -> str:
    """Return bytes in binary units."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"
