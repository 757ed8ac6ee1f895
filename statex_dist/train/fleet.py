"""Step phases of all ranks: the least, median and greatest seconds with the slowest host, and ranks that lag behind.

Ranks meet in collectives, so a slow rank makes the *others* wait there: under ZeRO-3 ``forward``, ``backward`` and
``step`` take about the same time on all ranks, whichever of them is slow. What a rank spends by itself is told apart:

    data        waiting for its next batch
    callbacks   in the hooks of users' callbacks, without collectives that they use
    wait        waiting for other ranks in the engine's sums between the phases: the slow rank waits *least*
    busy        the rest of a step, without ``wait``, ``save`` and ``eval``
    probe       products of a fixed size on its own device, timed alone at each log line: a throttled GPU shows there

``data``, ``callbacks``, ``probe`` and ``busy`` are watched for stragglers. ``busy`` includes what a rank waits for
inside forward and backward, which only makes a fast rank look slower: a rank that is named has spent that time itself.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from statex_dist.train.callback import Callback

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PHASES = ("forward", "backward", "step", "data", "save", "eval", "callbacks", "wait", "busy", "probe")
"""Columns of what ranks exchange; the seconds of a whole step come after them."""

WATCHED = ("data", "callbacks", "probe", "busy")
"""Phases that a rank spends by itself, the most precise ones first."""

INTERVALS = 3
"""Successive intervals of the log in which a rank must lag behind to be named."""

LEAST_SHARE = 0.1
"""Share of a step by which a rank must be above the median: shorter phases do not make others wait for long."""

PROBE_SIZES = {"cuda": 2048, "cpu": 256}
"""Rows of the square matrices of a probe: a fraction of a millisecond of work."""

PROBE_RUNS = 5

MAX_FACTOR = 1000.0
"""Greatest factor that is reported: the median of a phase may be nearly zero."""

MAX_NAMED = 8
"""Most stragglers that a record and a warning name."""


class FleetPhases(Callback):
    """Adds ``ranks`` and ``stragglers`` to the record of every ``log_every``-th step, and warns of stragglers.

    Seconds are means over the steps since the one before. One all-gather of eleven numbers from each rank is made,
    right after the ranks have agreed on the step: a GPU has nothing queued then.

    Args:
        log_every: Steps between summaries.
        straggler_factor: A rank is slow above this multiple of the median; 0 warns of none.
        probes: Whether every rank times a probe of its device at each log line; None does so on GPUs.
    """

    order = 65

    def __init__(self, *, log_every: int, straggler_factor: float, probes: bool | None = None):
        self._probes = probes
        self._log_every = log_every
        self._sums, self._count = [0.0] * (len(PHASES) + 1), 0
        self._hosts: list[str] = []
        self._stragglers = Stragglers(straggler_factor)

    def on_start(self) -> None:
        """Exchange the names of hosts."""
        if self.run.engine.world_size > 1:
            self._hosts = self.run.engine.gather(socket.gethostname())
        if self._probes is None:
            self._probes = self.run.engine.device.type == "cuda"

    def post_step(self, record: dict[str, Any]) -> None:
        """Add this step's seconds; where it is due, exchange and summarise them."""
        if not self._hosts:
            return
        step, due = record["step"], record["step"] % self._log_every == 0
        row = self._row(record)
        # Kernels are compiled and memory is allocated in a start's first step.
        if step > self.run.start_step + 1 or due:
            self._sums = [total + value for total, value in zip(self._sums, row, strict=True)]
            self._count += 1
        if not due:
            return
        means = [total / self._count for total in self._sums]
        if self._probes:
            means[PHASES.index("probe")] = probe(self.run.engine.device)
        table = self.run.engine.gather_row(means)
        self._sums, self._count = [0.0] * len(row), 0
        if self.run.rank == 0:
            record["ranks"] = summarise(table, self._hosts)
            if found := self._stragglers.update(table, self._hosts):
                record["stragglers"] = found

    def _row(self, record: Mapping[str, Any]) -> list[float]:
        wait, callbacks = self.run.engine.take_waited(), self.run.callbacks.take_seconds()
        times = {**record["time"], "callbacks": callbacks, "wait": wait}
        seconds = record["seconds"]
        apart = sum(times.get(phase, 0.0) for phase in ("wait", "save", "eval"))
        times["busy"] = max(0.0, seconds - apart)
        return [*(times.get(phase, 0.0) for phase in PHASES), seconds]


def probe(device: torch.device) -> float:
    """Return the least seconds of some products of a fixed size on a device that has nothing else to do.

    Args:
        device: This rank's.
    """
    import torch  # `statex status` reads this module's names without it

    size = PROBE_SIZES.get(device.type, 256)
    matrix = torch.ones(size, size, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
    seconds = []
    for _ in range(PROBE_RUNS):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class Stragglers:
    """Finds ranks that lag behind for some intervals; warns of each once, and says when it has caught up.

    Args:
        factor: A rank is slow above this multiple of the median; 0 finds none.
    """

    def __init__(self, factor: float):
        self._factor = factor
        self._counts: dict[tuple[int, str], int] = {}

    def update(self, table: torch.Tensor, hosts: Sequence[str]) -> list[dict[str, Any]]:
        """Take the seconds of one interval and return the ranks that have been slow for long, the slowest first.

        Args:
            table: Seconds ``[ranks, phases + 1]``, on the CPU.
            hosts: Name of each rank's host.

        Returns:
            ``rank``, ``host``, ``phase`` and ``factor`` (multiple of the median) of each, and since how many
            ``intervals``.
        """
        if not self._factor:
            return []
        slow = self._slow(table)
        before, self._counts = self._counts, {key: self._counts.get(key, 0) + 1 for key in slow}
        named = sorted((key for key, count in self._counts.items() if count >= INTERVALS), key=lambda key: -slow[key])
        found = [
            {"rank": rank, "host": hosts[rank], "phase": phase, "factor": slow[rank, phase]}
            | {"intervals": self._counts[rank, phase]}
            for rank, phase in named[:MAX_NAMED]
        ]
        if new := [row for row in found if row["intervals"] == INTERVALS]:
            logger.warning(
                "stragglers: %s, in each of the last %d intervals of the log; all ranks wait for them",
                "; ".join(f"rank {r['rank']} on {r['host']}: {r['phase']} {r['factor']:.1f} x the median" for r in new),
                INTERVALS,
            )
        for (rank, phase), count in before.items():
            if count >= INTERVALS and (rank, phase) not in slow:
                logger.info("rank %d on %s: %s is as usual again, after %d intervals", rank, hosts[rank], phase, count)
        return found

    def _slow(self, table: torch.Tensor) -> dict[tuple[int, str], float]:
        """Return the factor of each slow rank in the phase that tells most."""
        medians = table.median(0).values
        least = LEAST_SHARE * float(medians[-1])
        slow: dict[tuple[int, str], float] = {}
        for phase in WATCHED:
            values, median = table[:, PHASES.index(phase)], float(medians[PHASES.index(phase)])
            # A probe is short on every rank; a slow device makes the whole step longer.
            above = (values > self._factor * median) & (values - median > (0.0 if phase == "probe" else least))
            for rank in above.nonzero()[:, 0].tolist():
                if not any((rank, other) in slow for other in WATCHED):
                    value = float(values[rank])
                    slow[rank, phase] = value / max(median, value / MAX_FACTOR)
        return slow


def summarise(table: torch.Tensor, hosts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return ``min``, ``median`` and ``max`` of the seconds of each phase, and ``rank`` and ``host`` of the slowest.

    Of two ranks in the middle the faster one is the median. The slowest in ``wait`` is the rank that waits least.

    Args:
        table: Seconds ``[ranks, phases + 1]``, on the CPU.
        hosts: Name of each rank's host.
    """
    least, median, most = table.min(0), table.median(0).values, table.max(0)
    summary: dict[str, dict[str, Any]] = {}
    for column, phase in enumerate(PHASES):
        rank = int((least if phase == "wait" else most).indices[column])
        values = {"min": least.values[column], "median": median[column], "max": most.values[column]}
        if float(most.values[column]) > 0:
            summary[phase] = {**{k: float(v) for k, v in values.items()}, "rank": rank, "host": hosts[rank]}
    return summary
