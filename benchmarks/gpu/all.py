"""Run all tests and benchmarks of a GPU session: ``python -m benchmarks.gpu.all --out DIR [--only tests scan]``.

The parts run in this order, the most important first, so that a session of 15 minutes measures those. Each is a process
of its own with a time limit: a part that fails or hangs costs at most its limit.

1. ``tests``: ``pytest -m gpu``: a fast path that is wrong needs no figures;
2. ``scan``: the goals' length first, then the others;
3. ``model``: the 1.3B shapes, expanded and not;
4. ``decode``: the 1.3B shapes by batch size;
5. ``sweep``: our path over chunk lengths, to tune it;
6. ``small``: training steps of the 340M shapes.

``DIR`` gets a JSON file for each part, written row by row, ``tests.txt``, ``log.txt`` of all other parts, and
``results.md`` with all tables, for benchmarks/RESULTS.md. ``results.md`` is written again after every part, and has the
rows that a stopped part had measured. The time limits are guesses until a GPU has been available.
``--device cpu`` runs all parts at small sizes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import decode, model, scan
from benchmarks.measure import run_limited


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One process of a session.

    Attributes:
        title: Its heading in ``results.md``.
        command: What Python is to run, on a GPU.
        tiny: Options that are added on a CPU.
        limit: Seconds.
        render: Makes its table from its JSON file; None where it has none.
    """

    title: str
    command: tuple[str, ...]
    limit: float
    tiny: tuple[str, ...] = ()
    render: Callable[[dict[str, Any]], str] | None = None


def _names(ending: str) -> tuple[str, ...]:
    return tuple(name for name in model.MODELS if name.endswith(ending))


PARTS = {
    # One test file that cannot be imported, for want of a package, does not keep the others from running.
    "tests": Part(
        title="Tests on the GPU",
        command=("-m", "pytest", "-m", "gpu", "-q", "-p", "no:xdist", "--continue-on-collection-errors", "tests"),
        limit=150,
    ),
    "scan": Part(title="Scans", command=("-m", "benchmarks.gpu.scan"), limit=240, render=scan.render),
    "model": Part(
        title="Training steps",
        command=("-m", "benchmarks.gpu.model", "--only", *_names("1.3B")),
        tiny=("--tiny", "--steps", "1", "--only", *model.TINY_MODELS),
        limit=270,
        render=model.render,
    ),
    "decode": Part(
        title="Decoding",
        command=("-m", "benchmarks.gpu.decode"),
        tiny=("--tiny",),
        limit=90,
        render=decode.render,
    ),
    "sweep": Part(
        title="Chunk lengths", command=("-m", "benchmarks.gpu.scan", "--sweep"), limit=90, render=scan.render
    ),
    "small": Part(
        title="Training steps of small models",
        command=("-m", "benchmarks.gpu.model", "--only", *_names("340M"), *_names("370M")),
        tiny=("--tiny", "--steps", "1", "--only", *model.TINY_MODELS),
        limit=200,
        render=model.render,
    ),
}


def command_of(name: str, device: str, out: Path) -> list[str]:
    """Return the command line of a part."""
    part = PARTS[name]
    command = [sys.executable, *part.command]
    if part.render is None:
        return command
    return [*command, *(part.tiny if device == "cpu" else ()), "--device", device, "--out", str(out / f"{name}.json")]


def log_of(name: str, out: Path) -> Path:
    """Return the file that a part's output goes to."""
    return out / ("tests.txt" if PARTS[name].render is None else "log.txt")


def results(out: Path, outcomes: dict[str, str]) -> str:
    """Return ``results.md``: the command, the outcome and the table of measurements of every part."""
    sections = []
    for name, outcome in outcomes.items():
        part, path = PARTS[name], out / f"{name}.json"
        lines = [f"## {part.title}: `python {shlex.join(part.command)}`", outcome]
        if part.render is None and log_of(name, out).exists():
            lines += log_of(name, out).read_text(encoding="utf-8").splitlines()[-1:]
        elif part.render is not None and path.exists():
            lines.append(part.render(json.loads(path.read_text(encoding="utf-8"))))
        sections.append("\n\n".join(lines))
    return "\n\n".join(sections) + "\n"


def run_parts(names: Sequence[str], device: str, out: Path, seconds: float) -> dict[str, str]:
    """Run parts in order until ``seconds`` are used up; return how each ended."""
    end = time.monotonic() + seconds
    outcomes: dict[str, str] = {}
    for name in names:
        left = end - time.monotonic()
        if left < 1:
            outcomes[name] = "not run: the time was used up"
            (out / "results.md").write_text(results(out, outcomes), encoding="utf-8")
            continue
        print(f"{name}: at most {min(left, PARTS[name].limit):.0f} s", flush=True)
        start = time.monotonic()
        failed = run_limited(command_of(name, device, out), min(left, PARTS[name].limit), log=log_of(name, out))
        outcomes[name] = f"{failed or 'complete'}, {time.monotonic() - start:.0f} s"
        print(f"{name}: {outcomes[name]}", flush=True)
        (out / "results.md").write_text(results(out, outcomes), encoding="utf-8")
    return outcomes


def main(argv: list[str]) -> int:
    """Run the parts and print their tables; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts, in this order")
    parser.add_argument("--minutes", type=float, default=14.0, help="time for everything")
    args = parser.parse_args(argv)
    if args.out.is_dir() and any(args.out.iterdir()):
        parser.error(f"--out {args.out} holds results already; give a new directory")
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes = run_parts(args.only, args.device, args.out, 60 * args.minutes)
    print((args.out / "results.md").read_text(encoding="utf-8"))
    return 0 if all(outcome.startswith("complete") for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
