"""What grows with ranks, nodes or tensors: every figure with its growth exponent, simulated and on 1-4 real ranks.

The parts are modules of their own: the start (real ranks), checkpoints (real classes on simulated ranks), lost nodes
(simulated hosts), the offline tools (real files of simulated ranks) and the view of the fleet (simulated ranks). The
growth exponent is the slope of the logarithm of a value over that of the ranks: 0 does not grow, 1 grows in proportion.
Run as ``python -m benchmarks.scale [--parts start checkpoints ...]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from benchmarks import scale_checkpoints, scale_fleet, scale_nodes, scale_start, scale_tools
from benchmarks.growth import Row, growth_table
from benchmarks.measure import Record, heading, machine

NODES = (16, 64, 128, 512)

PARTS: dict[str, Callable[[], list[Row]]] = {
    "start": scale_start.measure,
    "checkpoints": scale_checkpoints.measure,
    "nodes": lambda: [
        *scale_nodes.lost_node_rows(NODES),
        *((f"{row[0]}, context 8", *row[1:]) for row in scale_nodes.lost_node_rows(NODES, context=8)),
    ],
    "tools": scale_tools.measure,
    "fleet": scale_fleet.measure,
}


def main() -> None:
    """Print a table for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    print(heading(Record(machine(packages=("torch", "deepspeed"))).document()))
    for part in options.parts:
        print(f"\n{part}\n\n{growth_table(PARTS[part]())}", flush=True)


if __name__ == "__main__":
    main()
