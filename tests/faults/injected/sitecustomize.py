"""Breaks a training process at a chosen place. Python runs this file by itself where it lies on PYTHONPATH.

``STATEX_FAULTS`` holds a JSON list of ``{"point", "rank", "call"}``. In each start of the job the first fault that has
not happened yet is armed: at the ``call``-th passage of its point by its rank it happens, and leaves a file in
``STATEX_FAULTS_DONE``. ``STATEX_PATIENCE`` is how long a rank waits for files of others, and
``STATEX_RANKS_PER_FOLDER`` how many ranks have their files in one folder of a checkpoint. The library itself knows
nothing of this.
"""

import functools
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path


def _armed():
    done = Path(os.environ["STATEX_FAULTS_DONE"])
    for index, fault in enumerate(json.loads(os.environ["STATEX_FAULTS"])):
        if not (done / str(index)).exists():
            return fault, done / str(index)
    return None, None


def _die(marker):
    marker.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def _hang_here(marker):
    marker.touch()
    while True:
        time.sleep(1)


def _swap(link, to, marker):
    """Have another directory under the name of one, as where a mount goes away."""
    marker.touch()
    Path(f"{link}.new").symlink_to(to)
    Path(f"{link}.new").replace(link)


def _apply():
    import torch

    from statex_dist.checkpoint import layout, visible
    from statex_dist.engine import checkpoints, place, snapshot
    from statex_dist.engine.segment_states import CarriedStates

    layout.RANKS_PER_FOLDER = int(os.environ.get("STATEX_RANKS_PER_FOLDER", layout.RANKS_PER_FOLDER))
    visible.PATIENCE_SECONDS = float(os.environ.get("STATEX_PATIENCE", visible.PATIENCE_SECONDS))
    fault, marker = _armed()
    if fault is None or fault["rank"] != int(os.environ.get("RANK", "0")):
        return
    calls = 0

    def at(function, act, only=lambda *args: True):
        """Wrap ``function``: at the chosen call ``act`` comes first."""

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            nonlocal calls
            if only(*args):
                calls += 1
                if calls == fault["call"]:
                    act(*args)
            return function(*args, **kwargs)

        return wrapped

    def die(*_):
        _die(marker)

    def half_a_file(state, file, **_):
        file.write(b"half of a checkpoint" * 1000)
        file.flush()
        _die(marker)

    point = fault["point"]
    if point == "forward":
        CarriedStates.forward_loss = at(CarriedStates.forward_loss, die)
    elif point == "hang":
        CarriedStates.forward_loss = at(CarriedStates.forward_loss, lambda *_: _hang_here(marker))
    elif point == "optimizer step":
        torch.optim.AdamW.step = at(torch.optim.AdamW.step, die)
    elif point == "save":
        torch.save = at(torch.save, half_a_file)
    elif point == "before the manifest":
        snapshot.FileWriter.wait = at(snapshot.FileWriter.wait, die)
    elif point == "before the rename":
        checkpoints.commit_directory = at(checkpoints.commit_directory, die)
    elif point == "between rename and latest":
        place.CheckpointPlace.name_latest = at(place.CheckpointPlace.name_latest, die)
    elif point == "mount away":
        place.CheckpointPlace.open = at(
            place.CheckpointPlace.open, lambda *_: _swap(fault["link"], fault["to"], marker)
        )
    elif point == "mount away in a save":
        snapshot.FileWriter.run = at(snapshot.FileWriter.run, lambda *_: _swap(fault["link"], fault["to"], marker))
    else:
        raise ValueError(point)


class _After(importlib.abc.MetaPathFinder):
    """Applies the fault as soon as the training program has been imported."""

    def find_spec(self, name, path, target=None):
        if name != "statex_dist.run":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _apply()

        spec.loader.exec_module = exec_module
        return spec


if "STATEX_FAULTS" in os.environ:
    sys.meta_path.insert(0, _After())
