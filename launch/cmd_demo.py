"""``statex demo``: the whole road on a tiny model."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex demo`` to ``parser``."""
    parser.add_argument("--out", type=str, default="demo", metavar="DIR", help="output folder")
    parser.add_argument("--family", type=str, default="gla", help="gla or mamba2")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with so many seeds and report mean and spread")
    parser.add_argument("--ranks", type=int, default=2, help="processes of the ZeRO-3 runs")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the training steps (for a quick look)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that is not empty")
    parser.add_argument("--json", action="store_true", help="print demo.json to standard output")


def run(args: Any) -> int:
    """Run the demo."""
    from launch.demo import Demo

    demo = Demo(
        args.out,
        family=args.family,
        seeds=args.seeds,
        ranks=args.ranks,
        scale=args.scale,
        overwrite=args.overwrite,
    )
    demo.run(as_json=args.json)
    return 0
