"""Who is trained, in which group, at which learning rate."""

import logging

import pytest
import torch

from statex_dist.engine.base import keep_hyperparameters
from statex_dist.errors import ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import config_from_dict, family_of, make_plan, parameter_roles
from statex_dist.optim.groups import OptimizerConfig
from statex_dist.optim.schedule import ScheduleConfig
from tests.runs import GLA, MAMBA2, expanded


def built(config: ModelConfig, settings: OptimizerConfig) -> tuple[torch.optim.AdamW, dict[str, set[str]]]:
    """Return the optimizer of a model and the names of the parameters in each of its groups."""
    model, roles = RecurrentLM(config), parameter_roles(config)
    no_decay = {name for name, spec in family_of(config.MODEL_TYPE).tensors(config).items() if not spec.decay}
    settings.freeze_in(model.named_parameters(), roles=roles)
    optimizer = settings.build(model.named_parameters(), no_decay=no_decay, roles=roles)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return optimizer, {group["name"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}


@pytest.mark.parametrize("values", [GLA, MAMBA2], ids=["gla", "mamba2"])
def test_matrices_decay_and_nothing_else(values):
    config = expanded(values)
    optimizer, members = built(config, OptimizerConfig())
    assert list(members) == ["decay", "no_decay"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 3e-4]
    decayed, plain = members["decay"], members["no_decay"]
    shapes = {name: parameter.ndim for name, parameter in RecurrentLM(config).named_parameters()}
    assert decayed | plain == set(shapes)
    assert all(shapes[name] == 2 for name in decayed)
    assert all(shapes[name] != 2 or name.endswith(("mix", "feature_gain")) for name in plain)
    for suffix in ("A_log", "dt_bias", ".D", "norm.weight", "mix", "feature_gain", "conv1d.weight"):
        assert not any(name.endswith(suffix) for name in decayed)


@pytest.mark.parametrize("values", [GLA, MAMBA2], ids=["gla", "mamba2"])
@pytest.mark.parametrize("train", ["expanded", "new"])
def test_only_what_was_asked_for_is_trained(values, train):
    config = (
        expanded(values)
        if values is MAMBA2
        else make_plan(config_from_dict(values), layers="1", factor=2, init="reinit")
    )
    _, members = built(config, OptimizerConfig(train=train))
    trained, roles = set().union(*members.values()), parameter_roles(config)
    prefixes = tuple(family_of(config.MODEL_TYPE).names.layer(e.layer) for e in config.statex.layers)
    in_layer = {name for name in roles if name.startswith(prefixes)}
    new = {name for name, role in roles.items() if role in ("new", "gain")}
    assert new < in_layer
    assert any(name.endswith("feature_gain") for name in new) == (values is MAMBA2)
    assert trained == (in_layer if train == "expanded" else new)


def test_factors_give_each_role_its_groups():
    settings = OptimizerConfig(lr=0.01, lr_factors={"new": 3, "mix": 10.0, "gain": 100})
    config = expanded(GLA)
    optimizer, members = built(config, settings)
    roles = parameter_roles(config)
    for group in optimizer.param_groups:
        role, decay = group["name"].split(".")
        assert {roles[name] for name in members[group["name"]]} == {role}
        assert group["lr_factor"] == {"new": 3, "mix": 10, "gain": 100}.get(role, 1)
        assert group["lr"] == 0.01 * group["lr_factor"]
        assert group["weight_decay"] == (0.1 if decay == "decay" else 0)
    assert list(members) == [
        *("base.decay", "base.no_decay", "expanded.decay", "expanded.no_decay", "new.decay", "new.no_decay"),
        *("mix.no_decay", "gain.no_decay"),
    ]
    assert sum(len(names) for names in members.values()) == len(roles)


def test_patterns_freeze_by_name():
    _, members = built(expanded(GLA), OptimizerConfig(freeze=["embeddings", r"layers\.[013]\.mlp"]))
    everything = set(parameter_roles(expanded(GLA)))
    left_out = everything - set().union(*members.values())
    assert left_out == {n for n in everything if "embeddings" in n or ("mlp" in n and "layers.2" not in n)}
    assert len(left_out) == 13


def test_a_model_without_a_plan_takes_the_same_settings(caplog):
    """LPT and StateX are one file but for the model."""
    settings = OptimizerConfig(lr_factors={"new": 3.0, "base": 0.5})
    with caplog.at_level(logging.WARNING):
        optimizer, members = built(config_from_dict(GLA), settings)
    assert list(members) == ["base.decay", "base.no_decay"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5 * 3e-4] * 2
    assert caplog.messages == ["optimizer.lr_factors.new has no effect: no trained parameter has this role"]


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (
            config_from_dict(GLA),
            {"train": "expanded"},
            r"train expanded.*plan.*statex exp",
        ),
        (config_from_dict(GLA), {"train": "new"}, "or set optimizer.train to all"),
        (expanded(GLA), {"freeze": ["nothing"]}, "'nothing'.*model.embeddings"),
        (expanded(GLA), {"freeze": ["."]}, r"optimizer.train all .*optimizer.freeze \['\.'\]"),
        (
            make_plan(config_from_dict({**GLA, "num_heads": 4}), layers="1", factor=4, init="inherit", op="mix_heads"),
            {"train": "new", "freeze": ["mix$"]},
            "no parameter.*freeze",
        ),
    ],
)
def test_choices_that_cannot_be_are_refused(config, settings, message):
    with pytest.raises(ConfigError, match=message):
        built(config, OptimizerConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, "optimizer.lr.*not 0"),
        ({"weight_decay": -1}, "optimizer.weight_decay.*not -1"),
        ({"betas": (0.9, 1.0)}, r"optimizer.betas.*\[0, 1\)"),
        ({"freeze": ["("]}, r"optimizer.freeze.*'\('"),
        ({"lr_factors": {"old": 2.0}}, "role 'old'.*base, expanded, new, mix"),
        ({"lr_factors": {"mix": 0.0}}, "optimizer.lr_factors.mix.*not 0.0"),
        ({"lr_factors": {"mix": float("nan")}}, "number.*not nan"),
    ],
)
def test_bad_values_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**settings)


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_factors_hold_through_the_schedule(name):
    optimizer, _ = built(expanded(GLA), OptimizerConfig(lr=0.01, lr_factors={"new": 3.0, "mix": 10.0}))
    schedule = ScheduleConfig(name=name, warmup_steps=2, decay_steps=2).build(optimizer, num_steps=8)
    for _ in range(8):
        base = optimizer.param_groups[0]["lr"]
        assert all(group["lr"] == pytest.approx(base * group["lr_factor"]) for group in optimizer.param_groups)
        optimizer.step()
        schedule.step()


def test_states_of_groups_without_names_are_taken_over():
    """Checkpoints from before the groups had names resume."""
    optimizer, _ = built(expanded(GLA), OptimizerConfig(lr=0.01))
    schedule = ScheduleConfig(name="constant").build(optimizer, num_steps=8)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["name"], group["lr_factor"]
    with keep_hyperparameters(optimizer, schedule):
        optimizer.load_state_dict(saved)
    assert [group["name"] for group in optimizer.param_groups] == ["decay", "no_decay"]
    assert [group["lr_factor"] for group in optimizer.param_groups] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("device", "settings", "fused"),
    [
        ("cuda", {}, True),
        ("cpu", {}, None),
        (None, {}, None),
        ("cuda", {"options": {"fused": False}}, False),
        ("cuda", {"options": {"foreach": True}}, None),
        ("cuda", {"name": "torch.optim:NAdam"}, None),
    ],
)
def test_adamw_is_fused_where_its_states_are_on_a_gpu(device, settings, fused):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = OptimizerConfig(**settings).build(
        [("w", parameter)], no_decay=(), roles={"w": "base"}, device=device and torch.device(device)
    )
    assert optimizer.param_groups[0].get("fused") is fused


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_states_of_a_fused_optimizer_are_those_of_the_other(before, after):
    """A checkpoint of the one continues as the other, with the settings of this start."""
    optimizers = {}
    for fused in (before, after):
        parameter = torch.nn.Parameter(torch.ones(3))
        settings = OptimizerConfig(options={"fused": fused})
        optimizers[fused] = settings.build([("w", parameter)], no_decay=(), roles={"w": "base"})
    first, second = optimizers[before], optimizers[after]
    for optimizer in (first, second):
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([1.0, 2.0, 3.0])
    first.step()
    schedule = ScheduleConfig(name="constant").build(second, num_steps=5)
    with keep_hyperparameters(second, schedule):
        second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["fused"] is after
    (state,) = second.state.values()
    assert state["step"].device == torch.device("cpu")
    second.step()
    assert state["step"] == 2
