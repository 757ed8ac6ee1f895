"""The schedules against their documented formula at every step, written again here; warnings of a resume."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from statex_dist.config import parse_config
from statex_dist.errors import ConfigError
from statex_dist.optim.schedule import (
    ScheduleConfig,
    log_schedule,
    warn_of_changed_rates,
)
from statex_dist.run import train
from statex_dist.run_config import RunConfig
from statex_dist.train.metrics import read_metrics
from tests.runs import GLA, make_shards, write_run

LENGTHS = (12, None, 9, 20)
GRID = [
    ScheduleConfig(name=name, num_steps=length, warmup_steps=warmup, decay_steps=decay, min_ratio=ratio)
    for name, length, warmup, ratio in itertools.product(
        ("cosine", "wsd", "constant"), LENGTHS, (0, 1, 4, 8), (0.0, 0.1, 1.0)
    )
    for decay in ((1, 4) if name == "wsd" else (0,))
    if warmup + decay <= (length or 12)
]
STEPS = 12


def formula(config: ScheduleConfig, step: int, train_steps: int) -> float:
    """The documentation's formula (docs/training.md): learning rate over its peak in ``step``, counted from 1."""
    t, n = float(step - 1), float(config.num_steps or train_steps)
    w, d, m = float(config.warmup_steps), float(config.decay_steps), config.min_ratio
    if t < w:
        return t / w
    if config.name == "constant":
        return 1.0
    if t >= n:
        return m
    if config.name == "cosine":
        return m + (1.0 - m) * 0.5 * (1.0 + math.cos(math.pi * (t - w) / (n - w)))
    return 1.0 if t < n - d else m + (1.0 - m) * (n - t) / d


def start(config: ScheduleConfig, num_steps: int):
    """Return an optimizer with two learning rates, and its schedule."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (1.0, 3.0)]
    optimizer = torch.optim.AdamW(groups)
    return optimizer, config.build(optimizer, num_steps=num_steps)


def go_on(optimizer, schedule, steps: int) -> list[tuple[float, float]]:
    """Return the learning rates of the next steps."""
    values = []
    for _ in range(steps):
        values.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        schedule.step()
    return values


@pytest.mark.parametrize(
    "config", GRID, ids=lambda c: f"{c.name}-{c.num_steps}-{c.warmup_steps}-{c.decay_steps}-{c.min_ratio}"
)
def test_every_step_has_the_documented_rate_resumed_anywhere(config: ScheduleConfig):
    expected = [(formula(config, step, STEPS), 3 * formula(config, step, STEPS)) for step in range(1, STEPS + 1)]
    whole = go_on(*start(config, STEPS), STEPS)
    for rates, wanted in zip(whole, expected, strict=True):
        assert rates == pytest.approx(wanted, rel=1e-13, abs=1e-15)
    for stop in (1, 3, 7, 11):
        optimizer, schedule = start(config, STEPS)
        first = go_on(optimizer, schedule, stop)
        saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
        optimizer, schedule = start(config, STEPS)
        optimizer.load_state_dict(saved[0])
        schedule.load_state_dict(saved[1])
        assert first + go_on(optimizer, schedule, STEPS - stop) == whole


def test_a_resume_brings_back_no_older_settings():
    """What torch saves of a schedule holds its place, not its shape."""
    optimizer, schedule = start(ScheduleConfig(name="cosine", warmup_steps=4), STEPS)
    go_on(optimizer, schedule, 6)
    saved = copy.deepcopy(schedule.state_dict())
    saved["lr_lambdas"] = [{"keywords": {"num_training_steps": 5}}, {}]  # as transformers' partial functions were saved
    config = ScheduleConfig(name="wsd", num_steps=10, decay_steps=6, min_ratio=0.2)
    optimizer, schedule = start(config, STEPS)
    schedule.load_state_dict(saved)
    optimizer.step()
    schedule.step()
    rates = [first for first, _ in go_on(optimizer, schedule, 5)]
    assert rates == pytest.approx([formula(config, step, STEPS) for step in range(8, 13)], rel=1e-13)


def test_the_ends_of_schedules():
    wsd = ScheduleConfig(name="wsd", warmup_steps=4, decay_steps=4, min_ratio=0.5)
    assert [wsd.factor(t, length=12) for t in range(13)] == [
        *(0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625, 0.5)
    ]
    cosine = ScheduleConfig(name="cosine", min_ratio=0.1)
    assert [cosine.factor(t, length=4) for t in (4, 5, 8, 400)] == [0.1] * 4, "it does not rise again behind its end"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": -1}, "schedule.warmup_steps.*not -1"),
        ({"name": "wsd"}, "schedule.decay_steps.*wsd"),
        ({"num_steps": 0}, "schedule.num_steps.*not 0"),
        ({"min_ratio": 1.5}, r"schedule.min_ratio.*\[0, 1\], not 1.5"),
        ({"warmup_steps": 9}, "warmup_steps=9.*5 steps"),
        ({"name": "wsd", "warmup_steps": 2, "decay_steps": 4}, r"warmup_steps=2 \+ decay_steps=4 exceed"),
        ({"num_steps": 3, "warmup_steps": 4}, "schedule's 3"),
    ],
)
def test_bad_values_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        go_on(*start(ScheduleConfig(**settings), 5), 5)


@pytest.mark.parametrize(
    ("settings", "level", "said"),
    [
        (
            {"name": "constant", "min_ratio": 0.5},
            "WARNING",
            "schedule.min_ratio=0.5 has no effect on a constant schedule",
        ),
        ({"name": "cosine", "decay_steps": 3}, "WARNING", "schedule.decay_steps=3 has no effect on a cosine schedule"),
        ({"num_steps": 6}, "WARNING", "from step 7 to 10 the learning rate is 0"),
        ({"num_steps": 6, "min_ratio": 0.25}, "INFO", "from step 7 to 10 the learning rate stays at 0.25 of its peak"),
        ({"num_steps": 20}, "INFO", "longer than the run: step 10 has 0.578 of the peak"),
        ({"num_steps": 10}, None, None),
        ({"name": "constant"}, None, None),
    ],
)
def test_what_a_schedule_leaves_out_is_said(caplog, settings, level, said):
    with caplog.at_level("INFO"):
        log_schedule(ScheduleConfig(**settings), num_steps=10)
    assert [(r.levelname, said in r.message) for r in caplog.records] == ([(level, True)] if said else [])


def resumed(config: ScheduleConfig, *, before: ScheduleConfig, lr: float = 1.0, steps: tuple[int, int] = (10, 10)):
    """Resume a run of ``before`` with ``config`` after six steps."""
    old, new = steps
    group = {"lr": lr * config.factor(6, length=config.length(new)), "name": "decay"}
    warn_of_changed_rates(
        [group],
        [before.factor(6, length=before.length(old))],
        saved_facts={"optimizer.lr": 1.0, **before.facts(num_steps=old)},
        facts={"optimizer.lr": lr, **config.facts(num_steps=new)},
    )


COSINE = ScheduleConfig(name="cosine", warmup_steps=2)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"config": COSINE, "steps": (10, 20)}, "schedule.num_steps was 10, now 20"),
        ({"config": COSINE, "lr": 0.5}, "optimizer.lr was 1.0, now 0.5"),
        ({"config": ScheduleConfig(name="constant", warmup_steps=2)}, "schedule.name was cosine, now constant"),
        ({"config": ScheduleConfig(name="cosine", warmup_steps=5)}, "schedule.warmup_steps was 2, now 5"),
        (
            {"config": ScheduleConfig(name="cosine", warmup_steps=2, min_ratio=0.3)},
            "schedule.min_ratio was 0.0, now 0.3",
        ),
    ],
)
def test_another_next_learning_rate_is_said_with_its_cause(caplog, change, cause):
    resumed(**change, before=COSINE)
    (record,) = caplog.records
    assert cause in record.message
    assert "would have had 0.5 before" in record.message


def test_a_change_of_at_most_a_hundredth_is_not_worth_a_line(caplog):
    resumed(COSINE, before=COSINE, lr=1.0099)
    resumed(ScheduleConfig(name="cosine", warmup_steps=2, num_steps=10), before=COSINE, steps=(10, 99))
    assert not caplog.records
    resumed(COSINE, before=COSINE, lr=1.011)
    assert len(caplog.records) == 1


def test_a_run_resumed_with_more_steps_warns_and_schedule_num_steps_keeps_the_rate(tmp_path, caplog):
    shards = make_shards(tmp_path / "data", num_documents=20)

    def go(*arguments: str, name: str = "run") -> list[float]:
        file = write_run(
            tmp_path / f"{name}.yaml", model={"config": GLA}, data={"path": str(shards)}, engine={"name": "plain"}
        )
        config = parse_config(RunConfig, ["--config", str(file), *arguments], prog="train.py")
        assert train(config)
        return [record["lr"] for record in read_metrics(tmp_path / name)]

    def warned() -> list[str]:
        found = [r.message for r in caplog.records if "would have had" in r.message]
        caplog.clear()
        return found

    config = ScheduleConfig(name="cosine", warmup_steps=2)
    assert go("--train.num_steps", "4") == pytest.approx([0.01 * formula(config, s, 4) for s in range(1, 5)])
    assert not warned()
    longer = go("--train.num_steps", "6")
    assert longer[4:] == pytest.approx([0.01 * formula(config, s, 6) for s in (5, 6)])
    (said,) = warned()
    assert "learning rate 0.005" in said
    assert "had 0 before" in said
    assert "schedule.num_steps was 4, now 6" in said
    for steps in ("3", "6"):
        kept = go("--schedule.num_steps", "6", "--train.num_steps", steps, name="kept")
    assert kept == pytest.approx([0.01 * formula(config, s, 6) for s in range(1, 7)])
    assert not warned()
    for steps, factor in (("2", 1.0), ("4", 2.0)):
        go(
            "--train.num_steps",
            steps,
            "--schedule.num_steps",
            "4",
            "--optimizer.lr_factors",
            f"{{base: {factor}}}",
            name="factors",
        )
    assert "optimizer.lr_factors differ" in warned()[0]


def test_a_checkpoint_without_the_settings_is_compared_by_its_rates(caplog):
    warn_of_changed_rates([{"lr": 0.5, "name": "decay"}], [0.4], saved_facts=None, facts={"optimizer.lr": 0.5})
    assert "own schedule" in caplog.records[0].message
