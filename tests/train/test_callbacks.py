"""Callbacks, optimizers and schedules of a user: registered or by ``module:Name``, and what goes wrong with them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from statex_dist.checkpoint.layout import complete_tags
from statex_dist.config import parse_config
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.optim.groups import OPTIMIZERS, OptimizerConfig
from statex_dist.optim.schedule import SCHEDULES, ScheduleConfig, Shape
from statex_dist.run import train
from statex_dist.run_config import RunConfig
from statex_dist.train.callback import CALLBACKS, CallbackError, build_callbacks
from statex_dist.train.metrics import read_metrics
from statex_dist.train.status import read_status
from tests.raising import raises
from tests.runs import GLA, REPOSITORY, make_shards, run_training, write_run
from tests.train import toy

ONE_LAYER = {**GLA, "num_hidden_layers": 1}
TOY = "tests.train.toy"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


def write(directory: Path, shards: Path, **sections) -> Path:
    sections = {"engine": {"name": "plain"}, "model": {"config": ONE_LAYER}, **sections}
    return write_run(directory / "run.yaml", data={"path": str(shards)}, **sections)


def load(directory: Path, shards: Path, **sections) -> RunConfig:
    return parse_config(RunConfig, ["--config", str(write(directory, shards, **sections))], prog="train.py")


def test_a_users_callback_is_called_adds_figures_and_is_resumed(tmp_path: Path, shards: Path):
    entry = {f"{TOY}:HookLog": {"weight": 2.0}}
    assert train(load(tmp_path, shards, callbacks=[entry], train={"num_steps": 3, "save_every": 2}))
    assert toy.HookLog.last is not None
    assert toy.HookLog.last.calls == [
        ("on_start", 0, 3),
        *[("pre_step", 1), ("post_step", 1)],
        *[("pre_step", 2), ("post_step", 2), ("on_save", 2)],
        *[("pre_step", 3), ("post_step", 3), ("on_save", 3)],
        ("on_end", "complete", 3),
    ]
    run_dir = tmp_path / "run"
    assert [record["doubled"] == 2 * record["loss"] for record in read_metrics(run_dir)] == [True] * 3
    settings = {"num_steps": 4, "save_every": 2}
    held = {"held_out": 0.3, "every": 4, "tokens": 256}
    with pytest.raises(ConfigError, match="data was"):  # the held-out documents cannot change
        train(load(tmp_path, shards, callbacks=[entry], train=settings, eval=held))
    assert train(load(tmp_path, shards, callbacks=[entry], train=settings))
    assert (toy.HookLog.last.steps, toy.HookLog.last.calls[0]) == (4, ("on_start", 3, 4))


def test_the_example_of_the_documentation_runs(tmp_path: Path, shards: Path, monkeypatch):
    text = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8").partition("## Callbacks")[2]
    code = re.search(r"```python\n(.+?)```", text, flags=re.DOTALL)
    assert code is not None
    (tmp_path / "documented_example.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    entry = {"documented_example:StopTooLarge": {"limit": 100.0}}
    assert train(load(tmp_path, shards, callbacks=[entry], train={"num_steps": 2}))
    assert all(0 < record["weight_norm"] < 100 for record in read_metrics(tmp_path / "run"))


def test_a_registered_callback_has_a_name(tmp_path: Path, shards: Path):
    CALLBACKS.register("log", toy.HookLog)
    try:
        data = make_shards(tmp_path / "held", num_documents=9)
        section = {"data": str(data), "every": 2, "tokens": 256}
        assert train(load(tmp_path, shards, callbacks=["log"], train={"num_steps": 2}, eval=section))
        assert ("on_evaluate", 2, ["loss", "targets"]) in toy.HookLog.last.calls
        with pytest.raises(ConfigError, match="is taken"):
            CALLBACKS.register("log", toy.HookLog)
    finally:
        CALLBACKS.unregister("log")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["nowhere"], "'nowhere'.*tensorboard, or module:Name"),
        (["no_such_package.at_all:X"], "cannot be imported: ModuleNotFoundError"),
        ([f"{TOY}:Missing"], "cannot be imported: AttributeError"),
        ([f"{TOY}:NoCallback"], "is not a callback"),
        ([f"{TOY}:staircase"], "is not a callback"),
        ([{f"{TOY}:HookLog": {"height": 1}}], "options: TypeError"),
        ([{f"{TOY}:HookLog": 3}], "are a mapping"),
        ([f"{TOY}:HookLog", f"{TOY}:HookLog"], "listed twice"),
        ([{"a:B": {}, "c:D": {}}], "one name"),
        ([{5: {}}], "a name is"),
    ],
)
def test_entries_that_are_no_callbacks_are_refused(entries, words):
    with pytest.raises(ConfigError, match=words):
        build_callbacks(entries)


@pytest.mark.parametrize(
    "hook",
    ["on_start", "post_step", "record", "exit", "no figure", "own figure", "on_save", "state_dict", "list", "on_end"],
)
def test_a_callback_that_fails_ends_the_run_and_is_named(tmp_path: Path, shards: Path, hook: str):
    entry = {f"{TOY}:Failing": {"hook": hook}}
    settings = {"num_steps": 4, "save_every": 2}
    with pytest.raises(CallbackError) as caught:
        train(load(tmp_path, shards, callbacks=[entry], train=settings))
    named = {"list": "state_dict"}.get(hook, hook if hook.startswith("on_") or "_" in hook else "post_step")
    assert str(caught.value).startswith(f"callback {TOY}:Failing failed in {named}: ")
    status = read_status(tmp_path / "run")
    assert (status.state, status.exit_code, status.message) == ("failed", 1, str(caught.value))
    # The earlier checkpoint is whole, and the run continues from it without the callback.
    tags = {"post_step": ["global_step2"], "on_end": ["global_step4", "global_step2"]}.get(hook, [])
    assert complete_tags(tmp_path / "run" / "checkpoints") == tags
    assert train(load(tmp_path, shards, train=settings))
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_callback_that_fails_on_one_rank_ends_all_of_them(tmp_path: Path, shards: Path):
    entry = {f"{TOY}:Failing": {"rank": 1}}
    file = write(tmp_path, shards, engine={"name": "zero3"}, callbacks=[entry], train={"save_every": 2})
    done = run_training(2, "--config", str(file))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "error: callback" in line]
    assert len(said) == 1, done.stderr
    assert said[0].startswith(f"error: callback {TOY}:Failing failed in post_step: ZeroDivisionError: on purpose")
    assert complete_tags(tmp_path / "run" / "checkpoints") == ["global_step2"]
    assert read_status(tmp_path / "run").message == said[0].removeprefix("error: ")


@pytest.mark.parametrize("registered", [False, True])
def test_an_optimizer_and_a_schedule_of_a_user(tmp_path: Path, shards: Path, registered: bool):
    optimizer, schedule = f"{TOY}:Momentum", f"{TOY}:staircase"
    if registered:
        OPTIMIZERS.register("momentum", optimizer)
        SCHEDULES.register("staircase", Shape(factor=toy.staircase, unused=("min_ratio",)))
        optimizer, schedule = "momentum", "staircase"
    try:
        sections = {
            "optimizer": {"name": optimizer, "options": {"speed": 0.5}},
            "schedule": {"name": schedule, "options": {"height": 1}, "warmup_steps": 1},
        }
        assert train(load(tmp_path, shards, train={"num_steps": 3}, **sections))
        assert [record["lr"] for record in read_metrics(tmp_path / "run")] == [0.0, 0.005, 0.0025]
        state = torch.load(tmp_path / "run/checkpoints/global_step3/plain_state.pt", weights_only=True)
        assert [group["momentum"] for group in state["optimizer"]["param_groups"]] == [0.5, 0.5]
        assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.1, 0.0]
        with raises(CheckpointError, "optimizer.name", optimizer):
            train(load(tmp_path, shards, train={"num_steps": 4}))
        assert train(load(tmp_path, shards, train={"num_steps": 4}, **sections))
    finally:
        if registered:
            OPTIMIZERS.unregister("momentum")
            SCHEDULES.unregister("staircase")


def test_optimizers_and_schedules_that_cannot_be_made_are_refused():
    parameters = [("w", torch.nn.Parameter(torch.ones(2)))]
    for settings, words in (
        ({"name": "adagrad"}, "allowed: adamw"),
        ({"name": f"{TOY}:Momentum", "betas": (0.9, 0.99)}, "those of adamw"),
        ({"options": {"lr": 1.0}}, "optimizer.options.lr"),
    ):
        with pytest.raises(ConfigError, match=words):
            OptimizerConfig(**settings)
    for name, options, words in (
        (f"{TOY}:Momentum", {"no": 1}, "its options"),
        (f"{TOY}:NoCallback", {}, "be made|torch.optim.Optimizer"),
        (f"{TOY}:Gone", {}, "cannot be imported"),
        (f"{TOY}:NoRate", {}, "without lr"),
    ):
        with pytest.raises(ConfigError, match=words):
            OptimizerConfig(name=name, options=options).build(parameters, no_decay=(), roles={"w": "base"})
    optimizer = torch.optim.SGD([parameters[0][1]], lr=1.0)
    with raises(ConfigError, "linear", "cosine", "wsd", "constant"):
        ScheduleConfig(name="linear")
    for name, options in ((f"{TOY}:staircase", {"no": 1}), (f"{TOY}:ONE", {}), ("cosine", {"no": 1})):
        with pytest.raises(ConfigError, match=r"schedule\.name"):
            ScheduleConfig(name=name, options=options).build(optimizer, num_steps=4)


@pytest.mark.parametrize("factor", [float("nan"), -1.0, "high", KeyError("x")])
def test_a_schedule_that_gives_no_learning_rate_ends_the_run(factor):
    def after_two(config, done, length):
        if done > 1 and isinstance(factor, Exception):
            raise factor
        return factor if done > 1 else 1.0

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    SCHEDULES.register("after two", after_two)
    try:
        scheduler = ScheduleConfig(name="after two").build(optimizer, num_steps=4)
        shorter = ScheduleConfig(name="after two").build(optimizer, num_steps=2)
    finally:
        SCHEDULES.unregister("after two")
    optimizer.step()
    scheduler.step()
    with pytest.raises(ConfigError, match="for step 3"):
        scheduler.step()
    shorter.step()
    shorter.step()  # there is no third step, whose rate torch asks for
    assert shorter.get_last_lr() == [0.0]


# ---- TensorBoard


def test_tensorboard_needs_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        build_callbacks(["tensorboard"])


def test_tensorboard_has_every_figure(tmp_path: Path, shards: Path, monkeypatch):
    written: dict[tuple[str, int], float] = {}
    calls: list = []

    class Writer:
        def __init__(self, directory: str, purge_step: int):
            calls.append((directory, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written[name, step] = value
            if name == "time/step" and step == 2:
                raise OSError("disk full")

        def flush(self) -> None:
            calls.append("flush")

        def close(self) -> None:
            calls.append("close")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    held = {"held_out": 0.3, "every": 2, "tokens": 256}
    assert train(load(tmp_path, shards, callbacks=["tensorboard"], train={"num_steps": 2}, eval=held))
    assert calls == [(str(tmp_path / "run" / "tensorboard"), 1), "flush", "close"]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [written["loss", step] for step in (1, 2)] == [record["loss"] for record in records]
    assert ("time/forward", 1) in written
