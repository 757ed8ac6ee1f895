"""Parameter groups by name, and the schedules against their formulas."""

import math

import pytest
import torch
from torch import nn

from statex_dist.errors import ConfigError
from statex_dist.models.kinds import family_of
from statex_dist.models.lm import RecurrentLM
from statex_dist.optim.groups import OptimizerConfig, build_optimizer
from statex_dist.optim.schedule import ScheduleConfig, build_schedule
from tests.runs import GLA, MAMBA2, expanded


@pytest.mark.parametrize("values", [GLA, MAMBA2], ids=["gla", "mamba2"])
def test_matrices_decay_and_nothing_else(values):
    config = expanded(values)
    model = RecurrentLM(config)
    specs = family_of(config.MODEL_TYPE).tensors(config)
    no_decay = {name for name, spec in specs.items() if not spec.decay}
    optimizer = build_optimizer(model.named_parameters(), no_decay=no_decay, config=OptimizerConfig())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert decayed | plain == set(names.values())
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    assert all(shapes[name] == 2 for name in decayed)
    assert all(shapes[name] != 2 or name.endswith("mix") for name in plain)
    for suffix in ("A_log", "dt_bias", ".D", "norm.weight", "mix", "conv1d.weight"):
        assert not any(name.endswith(suffix) for name in decayed)


def test_frozen_parameters_are_left_out():
    weight, frozen = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2), requires_grad=False)
    optimizer = build_optimizer([("a", weight), ("b", frozen)], no_decay=set(), config=OptimizerConfig())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def rates(config: ScheduleConfig, num_steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = build_schedule(optimizer, config, num_steps=num_steps)
    values = []
    for _ in range(num_steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(lr=0), "optimizer.lr must be above 0, not 0"),
        (lambda: OptimizerConfig(weight_decay=-1), "optimizer.weight_decay must be 0 or more, not -1"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), r"optimizer.betas must lie in \[0, 1\)"),
        (lambda: ScheduleConfig(warmup_steps=-1), "schedule.warmup_steps must be 0 or more, not -1"),
        (lambda: ScheduleConfig(name="wsd"), "schedule.decay_steps must be above 0 for the wsd schedule"),
        (lambda: rates(ScheduleConfig(warmup_steps=9), 5), "exceed the run's 5 steps"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
