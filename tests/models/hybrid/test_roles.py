"""Roles and weight decay of a hybrid's parameters, by which an optimizer forms its groups."""

from __future__ import annotations

import pytest
import torch

from statex_dist.models.build import build_lm
from statex_dist.models.registry import make_plan, read_config
from statex_dist.optim.groups import OptimizerConfig
from tests.models.hybrid.hosts import HOSTS, save_host


@pytest.mark.parametrize("model_type", HOSTS)
def test_only_the_expanded_layer_is_trained(tmp_path, model_type):
    save_host(model_type, tmp_path)
    config = read_config(tmp_path)
    grown = config.recurrent_layers[-1]
    model = build_lm(make_plan(config, layers=str(grown), factor=2, init="lossless"))
    model.finish_build(torch.float32)
    roles, no_decay = model.roles(), model.no_decay()
    parameters = dict(model.named_parameters())
    assert parameters.keys() <= roles.keys()
    inside = {name for name in parameters if f"layers.{grown}." in name}
    if model_type == "zamba2":  # its attention blocks also stand in layers that are not expanded
        inside = {name for name in inside if "shared_transformer" not in name}
    assert {name for name in parameters if roles[name] != "base"} == inside
    added = "mix" if "mix" in {roles[name] for name in inside} else "new"
    assert added in {roles[name] for name in inside}
    for name, parameter in parameters.items():
        if name.endswith(("A_log", "dt_bias", ".D")) or parameter.dim() == 1:
            assert name in no_decay, name
        elif "embed" in name or "experts" in name or "proj.weight" in name:
            assert name not in no_decay, name
    optimizer = OptimizerConfig(train="expanded", lr_factors={added: 3.0})
    optimizer.freeze_in(parameters.items(), roles=roles)
    groups = optimizer.build(parameters.items(), no_decay=no_decay, roles=roles).param_groups
    trained = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in trained} == {id(parameters[name]) for name in inside}
    assert len(trained) == len(inside)
    assert {g["lr"] for g in groups if g["name"].startswith(added)} == {3 * optimizer.lr}
