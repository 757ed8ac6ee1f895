"""Options, progress and sizes that the commands of the offline tools share."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, get_args

from jsonargparse import ArgumentParser

from statex_dist.state.plan import Op

if TYPE_CHECKING:
    from checkpoints_tools.io.target_writer import WriteOptions
    from checkpoints_tools.plan.options import PlanOptions
    from statex_dist.models.sequence_memory import SequenceMemory
    from statex_dist.work_part import WorkPart

logger = logging.getLogger(__name__)

_LINE_SECONDS = 10.0
RECIPE_NAMES = "statex-paper-gla, statex-paper-merge, statex-paper-mamba4, statex-paper-merge-copy"


def add_plan_options(parser: ArgumentParser) -> None:
    """Add the options that describe an expansion (``statex plan`` and ``statex expand``)."""
    for name, text in (
        ("layers", "every:K, first:K, last:K, all or a list such as 0,6,12 (default: every:6)"),
        ("factor", "growth of a layer's state, or 'full': all heads (default: full for heads, else 4)"),
        ("init", "start of the new state: reinit, inherit or lossless (default: reinit; lossless for grow_features)"),
        ("op", f"{', '.join(get_args(Op))} (default: by family and --init)"),
        ("rolls", "grow_features: distances of the channels that are multiplied, such as 1,2,3; 0: squares"),
        ("target-state", "find layers and factor for a total state, such as 1.5x or 18.7M"),
        ("plan", "YAML file with a plan per layer (docs/checkpoints.md)"),
        ("recipe", f"a mode of the StateX authors' scripts: {RECIPE_NAMES}"),
    ):
        parser.add_argument(f"--{name}", type=str | None, default=None, help=text)
    parser.add_argument(
        "--reset-dynamics",
        action="store_true",
        help="start decays, time steps and norms again, as the authors' scripts do (they are kept otherwise)",
    )
    for name, text in (
        ("relu", "grow_features: multiply the channels after a ReLU"),
        ("match-norm", "grow_features: scale the products of a head to the norm of its channels"),
    ):
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of the new values")


def add_context_length(parser: ArgumentParser) -> None:
    """Add the length of the sequence whose memory is told (``statex plan`` and ``statex inspect``)."""
    parser.add_argument(
        "--context-length",
        type=int | None,
        default=None,
        help="tokens of a sequence whose keys and values are counted (default: max_position_embeddings, else 65536)",
    )


def sequence_lines(*models: SequenceMemory) -> Iterator[tuple[str, list[int | None]]]:
    """Yield what is told of the memory of one sequence: a label, and the bytes of each model."""
    first = models[0]
    yield f"state, one sequence ({first.dtype})", [model.state_bytes for model in models]
    if first.kv_bytes_per_token != 0:
        yield "keys and values, each token", [model.kv_bytes_per_token for model in models]
        yield f"keys and values, {first.tokens:,} tokens", [model.kv_bytes for model in models]


def plan_options(args: Any) -> PlanOptions:
    """Return the parsed plan options as one value.

    Raises:
        ConfigError: An option is not one of the allowed words, or two of them clash.
    """
    from checkpoints_tools.plan.options import PlanOptions

    of_features = ("rolls", "relu", "match_norm")
    names = ("layers", "factor", "init", "op", *of_features, "target_state", "plan", "recipe", "reset_dynamics", "seed")
    return PlanOptions(**{name: getattr(args, name) for name in names})


def add_output_options(parser: ArgumentParser, *, layouts: str) -> None:
    """Add the options of a tool that writes a model directory (``statex expand`` and ``statex reshard``).

    Args:
        parser: Receives them.
        layouts: What ``--to`` may name.
    """
    parser.add_argument("--source", type=str, required=True, metavar="DIR", help="checkpoint to read, or a run")
    parser.add_argument("--target", type=str, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--dtype", type=str | None, default=None, help="fp32, bf16 or fp16 (default: as in the source)")
    parser.add_argument("--max-shard-size", type=str, default="5GB", help="size limit of a safetensors file")
    add_processes(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a target that is not empty")
    parser.add_argument("--resume", action="store_true", help="continue from the finished parts of a killed run")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--to", type=str, default="hf", help=f"layout of the target: {layouts}")
    parser.add_argument(
        "--world-size", type=int | None, default=None, help="ranks of a zero3 target (default: as many as the source)"
    )


def add_processes(parser: ArgumentParser) -> None:
    """Add the options that share the work of a tool out (``expand``, ``reshard`` and ``verify``)."""
    parser.add_argument("--workers", type=int, default=4, help="tensors read at a time by each process")
    parser.add_argument(
        "--processes",
        type=int | None,
        default=None,
        help="worker processes on this machine (default: by cores and size of the job)",
    )
    parser.add_argument(
        "--part",
        type=str | None,
        default=None,
        metavar="I/N",
        help="do this share, as 3/8; other machines do the others on the same file system",
    )


def missing_text(parts: Sequence[int]) -> str:
    """Return which parts of a job are not done yet, in words."""
    named = ", ".join(map(str, parts[:8])) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")
    return f"not done yet: part{'s' * (len(parts) > 1)} {named}"


def work_part(args: Any) -> WorkPart | None:
    """Return the parsed ``--part``, or None.

    Raises:
        ConfigError: It is not ``I/N``.
    """
    from statex_dist.work_part import parse_part

    return None if args.part is None else parse_part(args.part)


def write_options(args: Any, *, allow_nonfinite: bool = False) -> WriteOptions:
    """Return the parsed options of :func:`add_output_options` that say how to write.

    Raises:
        ConfigError: A size or a number of workers that cannot be.
    """
    from checkpoints_tools.io.target_writer import WriteOptions
    from statex_dist.config import parse_size

    size = parse_size(args.max_shard_size, option="--max-shard-size")
    given = {"overwrite": args.overwrite, "workers": args.workers, "processes": args.processes, "resume": args.resume}
    given["part"] = work_part(args)
    return WriteOptions(max_shard_size=size, allow_nonfinite=allow_nonfinite, **given)


def _plain_lines(label: str) -> Callable[[int, int], None]:
    """Return a callback that logs a line every few seconds: for log files, where a bar would be noise."""
    start = last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LINE_SECONDS:
            return
        last = now
        left = (now - start) * (total - done) / max(done, 1)
        logger.info("%s: %.2f of %.2f GB, %.0f s left", label, done / 1e9, total / 1e9, left)

    return advance


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Give a callback that draws bytes done on a terminal, and logs plain lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(label)
        return
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def size(count: int) -> str:
    """Return bytes in binary units."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"
