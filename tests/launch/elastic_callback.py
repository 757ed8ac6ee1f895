"""A callback of a run that hosts leave and join: it keeps which packs a step had, and a step waits for a host."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from statex_dist.train.callback import Callback


class PacksOfSteps(Callback):
    """Writes what the packs of every step hold, and slows the run down.

    Args:
        directory: For a file of each step and rank; that of a repeated step replaces the one before.
        gate: A file that one rank alone waits for.
        step: The step before which it waits.
        seconds: Least time of a step.
    """

    def __init__(self, directory: str, gate: str, step: int, seconds: float):
        self.directory, self.gate, self.step, self.seconds = Path(directory), Path(gate), step, seconds

    def pre_step(self, step, batch) -> None:
        self.directory.mkdir(exist_ok=True)
        packs = [hashlib.sha256(pack.input_ids.numpy().tobytes()).hexdigest() for pack in batch]
        content = {"ranks": self.run.engine.world_size, "packs": packs}
        (self.directory / f"{step}-{self.run.rank}").write_text(json.dumps(content), encoding="utf-8")
        time.sleep(self.seconds)
        while step == self.step and self.run.engine.world_size == 1 and not self.gate.exists():
            time.sleep(0.05)


def packs_of_step(directory: Path, step: int) -> list[str]:
    """Return what the packs of a step held, in the order of ranks, the last time that it was made."""
    ranks = json.loads((directory / f"{step}-0").read_text(encoding="utf-8"))["ranks"]
    files = [json.loads((directory / f"{step}-{rank}").read_text(encoding="utf-8")) for rank in range(ranks)]
    assert all(file["ranks"] == ranks for file in files)
    return [pack for file in files for pack in file["packs"]]
