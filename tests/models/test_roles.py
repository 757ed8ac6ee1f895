"""The part that each parameter plays in an expansion."""

from typing import get_args

import pytest

from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import Role, make_plan, parameter_roles
from statex_dist.optim.groups import ROLES
from tests.models.tiny import CONFIGS, gla_config, mamba2_config


def named(config, role: str) -> set[str]:
    return {name for name, found in parameter_roles(config).items() if found == role}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_has_one(config):
    roles = parameter_roles(config)
    assert list(roles) == [name for name, _ in RecurrentLM(config).named_parameters()]
    assert (set(roles.values()) == {"base"}) is (config.statex is None)
    assert all((role == "mix") is name.endswith(".mix") for name, role in roles.items())


def test_the_paper_draws_the_token_mixing_of_gla_anew():
    config = make_plan(gla_config(), layers="1", factor=4, init="reinit")
    assert named(config, "expanded") == {
        f"model.layers.1.{name}"
        for name in (
            "attn_norm.weight",
            "mlp_norm.weight",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
        )
    }
    assert "model.layers.1.attn.q_proj.weight" in named(config, "new")
    assert not named(config, "mix")


def test_a_grown_mamba2_layer_keeps_its_dynamics():
    config = make_plan(mamba2_config(), layers="0", factor=2, init="lossless")
    prefix = "backbone.layers.0.mixer."
    assert named(config, "new") == {f"{prefix}{name}" for name in ("in_proj.weight", "conv1d.weight", "conv1d.bias")}
    assert f"{prefix}A_log" in named(config, "expanded")
    assert "backbone.layers.1.mixer.in_proj.weight" in named(config, "base")


def test_optimizer_and_models_mean_the_same_roles():
    """The two packages do not know each other."""
    assert get_args(Role) == ROLES
