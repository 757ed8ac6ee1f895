"""kill -9 at random moments of a two-rank ZeRO-3 run, again and again, until it is done: nothing is lost or doubled."""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from statex_dist.checkpoint.layout import complete_tags, step_of
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.train.metrics import read_metrics
from tests.runs import GLA, REPOSITORY, environment, make_shards, write_run

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.distributed

KEEP_LAST = 2
WAIT_SECONDS = 600


class Life:
    """One start of the run: two processes without a launcher, so that each of them can be killed by its id."""

    def __init__(self, config: Path, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--config", str(config)]
        self.log = log
        with log.open("w") as file:
            self.ranks = [
                subprocess.Popen(
                    command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=file, stderr=file
                )
                for rank in (0, 1)
            ]

    def running(self) -> bool:
        return all(process.poll() is None for process in self.ranks)

    def wait_for(self, words: str) -> None:
        """Wait until the log holds these words, or a rank has ended."""
        end = time.monotonic() + WAIT_SECONDS
        while self.running() and words not in self.log.read_text() and time.monotonic() < end:
            time.sleep(0.01)

    def end(self, first: int | None = None) -> None:
        """Kill both ranks; or one, and the other when it has noticed, or some seconds later."""
        if first is not None:
            self.ranks[first].kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.ranks[1 - first].wait(timeout=5)
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.wait()

    def finish(self) -> list[int]:
        return [process.wait(timeout=WAIT_SECONDS) for process in self.ranks]


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a nested state."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors(item, f"{name}/{index}")


def trained(run: Path) -> dict[str, torch.Tensor]:
    """Return weights, master weights and optimizer states of the newest checkpoint, by file and name."""
    newest = run / "checkpoints" / complete_tags(run / "checkpoints")[0]
    Manifest.read(newest).verify(newest)
    found = {}
    for path in sorted(newest.glob("*.pt")):
        found |= dict(tensors(torch.load(path, weights_only=False), path.name))
    return {name: tensor for name, tensor in found.items() if "/rng" not in name}


def figures(run: Path) -> list[tuple[Any, ...]]:
    """Return what every record says of the training, and not of its speed."""
    keys = ("step", "loss", "lr", "grad_norm", "grad_norms", "tokens", "skipped")
    return [tuple(record[key] for key in keys) for record in read_metrics(run)]


def check(run: Path) -> None:
    """Raise unless what a kill has left is a run: every saved step has its record, the marker names a checkpoint."""
    tags = complete_tags(run / "checkpoints")
    if not tags:
        return
    saved = step_of(tags[0])
    steps = [record["step"] for record in read_metrics(run)]
    assert steps[:saved] == list(range(1, saved + 1)), f"{tags[0]} is saved, and the records are {steps[-5:]}"
    Manifest.read(run / "checkpoints" / tags[0]).verify(run / "checkpoints" / tags[0])


@pytest.mark.parametrize(
    ("kills", "asynchronous"),
    [
        pytest.param(20, False, id="in the loop", marks=pytest.mark.slow),
        pytest.param(20, True, id="behind the loop", marks=pytest.mark.slow),
    ],
)
def test_kills_at_random_moments_change_nothing(tmp_path: Path, kills: int, asynchronous: bool):
    num_steps = 10 + 4 * kills
    sections: dict[str, Any] = {
        "model": {"config": {**GLA, "num_hidden_layers": 1}},
        "data": {"path": str(make_shards(tmp_path / "data"))},
        "train": {"num_steps": num_steps, "save_every": 1, "keep_last": KEEP_LAST, "save_async": asynchronous},
    }
    undisturbed = Life(write_run(tmp_path / "undisturbed.yaml", **sections), tmp_path / "undisturbed.log")
    assert undisturbed.finish() == [0, 0], undisturbed.log.read_text()
    config, run = write_run(tmp_path / "run.yaml", **sections), tmp_path / "run"
    draw = random.Random(20 + asynchronous)
    for number in range(kills):
        life = Life(config, tmp_path / f"life{number}.log")
        if number % 4 == 3:  # as it starts: the directory is probed, the checkpoint loaded, what is left over removed
            words = draw.choice(["parameters,", "resuming from"])
        else:
            words = "INFO step "
        life.wait_for(words)
        time.sleep(draw.uniform(0, 0.5))
        assert life.running(), life.log.read_text()
        life.end(draw.choice([None, None, 0, 1]))
        check(run)
        logger.info("kill %d after %r: %s", number + 1, words, sorted(p.name for p in run.glob("checkpoints/*")))
    last = Life(config, tmp_path / "last.log")
    assert last.finish() == [0, 0], last.log.read_text()
    assert figures(run) == figures(tmp_path / "undisturbed")
    ours, reference = trained(run), trained(tmp_path / "undisturbed")
    assert ours.keys() == reference.keys()
    assert sum("optim_states" in name and "exp_avg" in name for name in reference) >= 4, "no optimizer states compared"
    assert not [name for name, tensor in reference.items() if not torch.equal(tensor, ours[name])]
    kept = [f"global_step{num_steps - 1}", f"global_step{num_steps}", "latest"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == kept
    assert (run / "checkpoints" / "latest").read_text() == f"global_step{num_steps}"
    names = {path.name for path in run.iterdir()}
    assert names == {path.name for path in (tmp_path / "undisturbed").iterdir()}, "leftovers"
