"""``statex status``: how a training run is doing, from the files in its directory."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

if TYPE_CHECKING:
    from statex_dist.train.run_view import RunView


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex status`` to ``parser``."""
    parser.add_argument("run_dir", type=str, metavar="RUN", help="directory of a training run")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.add_argument(
        "--lines", type=int, default=5, metavar="N", help="last warnings and errors to print (default: 5)"
    )


def run(args: Any) -> int:
    """Print how the run is doing.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Returns:
        0 for a run that starts, runs, was stopped or is complete; 1 for one that failed, is dead or silent.

    Raises:
        StateXError: It is not the directory of a run (exit code 2).
    """
    from pathlib import Path

    from statex_dist.errors import ConfigError
    from statex_dist.train.run_view import view_run

    if args.lines < 0:
        raise ConfigError(f"--lines must be 0 or more, not {args.lines}")
    view = view_run(Path(args.run_dir), num_log_lines=args.lines)
    if args.json:
        sys.stdout.write(json.dumps(view.to_dict()) + "\n")
    else:
        sys.stdout.write("".join(f"{line}\n" for line in lines(view)))
    return 0 if view.sound else 1


def lines(view: RunView) -> Iterator[str]:
    """Yield the lines that show a run."""
    yield f"{view.run_dir}: {_state(view)}"
    if view.step is not None:
        yield f"  {_progress(view)}"
    if view.checkpoint is not None:
        best = f"; best: {view.best}" if view.best else ""
        yield f"  checkpoint {view.checkpoint}, {_age(view.checkpoint_seconds)} old{best}"
    else:
        yield "  no checkpoint yet"
    if view.starts is not None and view.starts > 1:
        yield f"  started {view.starts} times"
    if view.phases:
        yield f"  seconds a step of all ranks, up to step {view.phases_step}:"
        yield f"    {'phase':<10} {'min':>9} {'median':>9} {'max':>9}  slowest"
        for name, row in view.phases.items():
            values = " ".join(_seconds(row.get(key)) for key in ("min", "median", "max"))
            yield f"    {name:<10} {values}  {row.get('host', '?')} (rank {row.get('rank', '?')})"
    for row in view.stragglers:
        yield (
            f"  STRAGGLER rank {row.get('rank')} on {row.get('host')}: {row.get('phase')} takes "
            f"{row.get('factor', 0.0):.1f} x the median"
        )
    if view.stacks:
        more = f" and {len(view.stacks) - 3} more" if len(view.stacks) > 3 else ""
        yield f"  a job hung: {', '.join(view.stacks[:3])}{more}"
    for row in view.last_log:
        yield f"  {row['time']} rank {row['rank']} {row['level']} {row['text']}"
    for note in view.notes:
        yield f"  note: {note}"


def _state(view: RunView) -> str:
    text = view.state
    if view.ranks is not None:
        text += f" on {view.ranks} ranks"
    if view.state == "dead":
        text += f": no process is left, nothing was written for {_age(view.silent_seconds)}; the same command resumes"
    elif view.state == "silent":
        text += f": nothing was written for {_age(view.silent_seconds)}, and a step takes {_age(view.step_seconds)}"
    elif view.message:
        text += f": {view.message}"
    return text


def _progress(view: RunView) -> str:
    parts = [f"step {view.step}{'' if view.num_steps is None else f'/{view.num_steps}'}"]
    if view.loss is not None:
        parts.append(f"loss {view.loss:.4f}")
    if view.eval_loss is not None:
        parts.append(f"eval loss {view.eval_loss:.4f}")
    if view.tokens_per_s is not None:
        parts.append(f"{view.tokens_per_s:,.0f} tokens/s")
    if view.mfu is not None:
        parts.append(f"MFU {100 * view.mfu:.1f} %")
    if view.eta_seconds is not None:
        parts.append(f"ETA {_age(view.eta_seconds)}")
    return "  ".join(parts)


def _age(seconds: float | None) -> str:
    from statex_dist.train.metrics import duration

    if seconds is None:
        return "an unknown time"
    return duration(seconds) if seconds >= 10 else f"{seconds:.3g} s"


def _seconds(value: Any) -> str:
    return f"{value:9.4f}" if isinstance(value, int | float) else f"{'?':>9}"
