"""Measure the summary of step phases at many ranks, on one CPU: ``python -m benchmarks.scale_fleet``.

The array of all ranks is made here, so that the figures are those of rank 0's work after the all-gather, not of the
network. A rank gives ten numbers of 8 bytes; all ranks receive ``ranks x 80`` bytes.
"""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.growth import Row, growth_table
from statex_dist.train.fleet import PHASES, Stragglers, summarise

RANKS = (64, 512, 1024, 4096)
REPETITIONS = 50


def measure() -> list[Row]:
    """Return name, ranks, value and unit of each figure; on one thread, as one of several ranks of a host has it."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for ranks in RANKS:
        table = torch.rand(ranks, len(PHASES) + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        hosts = [f"node{rank // 8}" for rank in range(ranks)]
        stragglers, seconds = Stragglers(3.0), []
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            summarise(table, hosts)
            stragglers.update(table, hosts)
            seconds.append(time.perf_counter() - start)
        rows.append(("summary on rank 0", ranks, 1000 * statistics.median(seconds), "ms"))
        rows.append(("received by each rank", ranks, table.nbytes / 1024, "KiB"))
    return rows


def main() -> None:
    """Print the figures."""
    print(growth_table(measure()))


if __name__ == "__main__":
    main()
