"""A user's own parts of a run, as a module beside the project would have them."""

from __future__ import annotations

import sys
import time

import torch

from statex_dist.train.callback import Callback


class HookLog(Callback):
    """Writes down its hooks, adds a figure to the records, and counts steps over resumes.

    Args:
        weight: What the figure is multiplied by.
    """

    last: HookLog | None = None

    def __init__(self, weight: float = 1.0):
        self.weight, self.steps = weight, 0
        self.calls: list[tuple] = []
        HookLog.last = self

    def on_start(self) -> None:
        self.calls.append(("on_start", self.run.start_step, self.run.num_steps))

    def pre_step(self, step, batch) -> None:
        self.calls.append(("pre_step", step))

    def post_step(self, record) -> None:
        self.steps += 1
        assert "tokens_per_s" in record, "ours that add figures come before"
        record["doubled"] = self.weight * record["loss"]
        self.calls.append(("post_step", record["step"]))

    def on_evaluate(self, step, results) -> None:
        self.calls.append(("on_evaluate", step, sorted(results)))

    def on_save(self, step) -> None:
        self.calls.append(("on_save", step))

    def on_end(self, ending) -> None:
        self.calls.append(("on_end", ending.state, ending.step))

    def state_dict(self):
        return {"steps": self.steps, "tensor": torch.ones(2)}

    def load_state_dict(self, state) -> None:
        self.steps = state["steps"]


class Failing(Callback):
    """Fails in one hook, on one rank.

    Args:
        hook: In which.
        rank: On which.
    """

    def __init__(self, hook: str = "post_step", rank: int = 0):
        self.hook, self.rank = hook, rank

    def fail(self) -> None:
        if self.run.rank == self.rank:
            raise ZeroDivisionError("on purpose")

    def on_start(self) -> None:
        if self.hook == "on_start":
            self.fail()

    def post_step(self, record) -> None:
        if self.hook == "post_step" and record["step"] == 3:
            self.fail()
        if self.hook == "record":
            record["figure"] = object()
        if self.hook == "exit":
            sys.exit(3)
        if self.hook == "no figure":
            del record["loss"]
        if self.hook == "own figure":
            record["eval"] = 1.0

    def on_save(self, step) -> None:
        if self.hook == "on_save":
            self.fail()

    def on_end(self, ending) -> None:
        if self.hook == "on_end":
            self.fail()

    def state_dict(self):
        if self.hook == "list":
            return [1]
        return {"value": object()} if self.hook == "state_dict" else {}


class NoCallback:
    """Not derived from Callback."""


class Momentum(torch.optim.SGD):
    """An optimizer with one option."""

    def __init__(self, params, lr: float, speed: float = 0.9):
        super().__init__(params, lr=lr, momentum=speed)


class NoRate(torch.optim.SGD):
    """An optimizer whose groups have no learning rate."""

    def __init__(self, params, lr: float):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            del group["lr"]


def staircase(config, done: int, length: int, *, height: int = 2) -> float:
    """A schedule with one option: halve every ``height`` steps."""
    return 0.5 ** (done // height)


class Slow(Callback):
    """Sleeps before each step on one rank.

    Args:
        rank: On which.
        seconds: For how long.
    """

    def __init__(self, rank: int, seconds: float):
        self.rank, self.seconds = rank, seconds

    def pre_step(self, step, batch) -> None:
        if self.run.rank == self.rank:
            time.sleep(self.seconds)
