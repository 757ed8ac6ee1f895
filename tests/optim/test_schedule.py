"""The schedules against their formulas, and resumed in the middle."""

import copy
import math

import pytest
import torch
from torch import nn

from statex_dist.errors import ConfigError
from statex_dist.optim.schedule import ScheduleConfig, build_schedule

SCHEDULES = [
    ScheduleConfig(name="cosine", warmup_steps=4, min_ratio=0.1),
    ScheduleConfig(name="wsd", warmup_steps=2, decay_steps=5, min_ratio=0.05),
    ScheduleConfig(name="constant", warmup_steps=3),
]


def start(config: ScheduleConfig, num_steps: int):
    """Return an optimizer with two learning rates, and its schedule."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (1.0, 3.0)]
    optimizer = torch.optim.AdamW(groups)
    return optimizer, build_schedule(optimizer, config, num_steps=num_steps)


def go_on(optimizer, schedule, steps: int) -> list[tuple[float, float]]:
    """Return the learning rates of the next steps."""
    values = []
    for _ in range(steps):
        values.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        schedule.step()
    return values


def rates(config: ScheduleConfig, num_steps: int) -> list[float]:
    return [first for first, _ in go_on(*start(config, num_steps), num_steps)]


def test_cosine_follows_its_formula():
    values = rates(ScheduleConfig(name="cosine", warmup_steps=4, min_ratio=0.1), 20)
    assert values[:4] == pytest.approx([0, 0.25, 0.5, 0.75])
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 16)) for step in range(4, 20)]
    assert values[4:] == pytest.approx(cosine)


def test_wsd_is_flat_and_then_falls():
    values = rates(ScheduleConfig(name="wsd", warmup_steps=2, decay_steps=5), 20)
    assert values[2:15] == pytest.approx([1.0] * 13)
    assert values[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_constant_stays():
    assert rates(ScheduleConfig(name="constant", warmup_steps=2), 6) == pytest.approx([0, 0.5, 1, 1, 1, 1])


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda config: config.name)
@pytest.mark.parametrize("stop", [1, 3, 10, 17])
def test_resumed_in_the_middle_it_goes_on_as_if_nothing_had_been(config, stop):
    whole = go_on(*start(config, 20), 20)
    optimizer, schedule = start(config, 20)
    first = go_on(optimizer, schedule, stop)
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    optimizer, schedule = start(config, 20)
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    assert first + go_on(optimizer, schedule, 20 - stop) == whole


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScheduleConfig(warmup_steps=-1), "schedule.warmup_steps must be 0 or more, not -1"),
        (lambda: ScheduleConfig(name="wsd"), "schedule.decay_steps must be above 0 for the wsd schedule"),
        (lambda: rates(ScheduleConfig(warmup_steps=9), 5), "exceed the schedule's 5 steps"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
