"""The registry's facts of any model: parameters' roles, and FLOPs against a count by hand and torch's counter."""

import subprocess
import sys
from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.flops import forward_flops_per_token, training_flops_per_token
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import (
    FAMILIES,
    UNSUPPORTED,
    Role,
    config_from_dict,
    family_of,
    make_plan,
    parameter_roles,
)
from statex_dist.optim.groups import ROLES
from statex_dist.state.geometry import FeatureMap
from tests.models.tiny import CONFIGS, gla_config, mamba2_config, with_features
from tests.raising import raises


def test_every_row_names_its_family():
    assert [family_of(kind).model_type for kind in FAMILIES] == list(FAMILIES)


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_recurrent_model_that_is_not_supported_says_why(kind):
    assert kind not in FAMILIES
    with raises(CheckpointError, kind, UNSUPPORTED[kind]):
        config_from_dict({"model_type": kind})


def test_a_configuration_imports_its_own_family_alone():
    script = (
        "import sys; from statex_dist.models.registry import find_family; find_family({'model_type': 'hgrn2'});"
        "print(*(name for name in sys.modules if name.startswith('statex_dist.models.') and name.count('.') > 2))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["statex_dist.models.hgrn2.config"]


def named(config, role: str) -> set[str]:
    return {name for name, found in parameter_roles(config).items() if found == role}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_has_one(config):
    roles = parameter_roles(config)
    assert list(roles) == [name for name, _ in RecurrentLM(config).named_parameters()]
    assert (set(roles.values()) == {"base"}) is (config.statex is None)
    assert all((role == "mix") is name.endswith(".mix") for name, role in roles.items())
    assert all((role == "gain") is name.endswith(".feature_gain") for name, role in roles.items())


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


def test_a_gla_model_by_hand():
    config = gla_config(hidden_size=16, num_hidden_layers=2, num_heads=4, intermediate_size=24, vocab_size=40)
    keys, values = 16, 32
    attention = 16 * (2 * keys + 2 * values) + 16 * 16 + 16 * keys + values * 16
    matrices = 2 * (attention + 3 * 16 * 24) + 40 * 16
    scan = 4 * keys * values // 4 + 2 * 64 * (keys + values)
    assert forward_flops_per_token(config) == 2 * matrices + 2 * scan
    assert training_flops_per_token(config) == 3 * forward_flops_per_token(config)


@pytest.mark.parametrize("config", [gla_config(), mamba2_config(tie_word_embeddings=True)], ids=["gla", "mamba2"])
def test_torch_counts_the_same_for_the_matrices(config):
    model, tokens = RecurrentLM(config), 32
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long))
    # Products of activations with weights are mm and addmm; the scan's are bmm.
    counts = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    scan = sum(config.layer_geometry(layer).scan_flops for layer in config.recurrent_layers)
    convolutions = 2 * sum(p.numel() for name, p in model.named_parameters() if name.endswith("conv1d.weight"))
    assert linear == tokens * (forward_flops_per_token(config) - scan - convolutions)


def test_a_bigger_state_costs_more():
    before = gla_config()
    after = make_plan(before, layers="0", factor=4, init="inherit")
    more = after.layer_geometry(0).elements - before.layer_geometry(0).elements
    assert forward_flops_per_token(after) - forward_flops_per_token(before) == 4 * more
    grown = with_features(before)
    more = grown.layer_geometry(0).elements - before.layer_geometry(0).elements
    keys = before.layer_geometry(0).num_heads * 2 * 4
    assert forward_flops_per_token(grown) - forward_flops_per_token(before) == 4 * more + 2 * 64 * keys


def test_features_never_pass_for_a_larger_d_state():
    """Software that knows no plan would open such a ``state_size`` and read other weights."""
    grown = mamba2_config(statex=make_plan(mamba2_config(), layers="1", factor=4, init="reinit").statex)
    for config in (
        with_features(mamba2_config(), layers="all", rolls=(1, 2, 0)),
        with_features(grown, rolls=(1, 2, 0)),
    ):
        assert config.ours_alone
        assert config.plain_keys() == {}
        assert {config.layer_geometry(layer).key_dim for layer in (0, 1)} == {24}
        written = config.to_dict()
        assert written["state_size"] == 6
        assert config_from_dict(written) == config


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (gla_config(), {"factor": 4}, ("factor 4", "2 to 3", "4 key channels")),
        (gla_config(), {"factor": None, "features": FeatureMap(rolls=(1, 2))}, ("layer 0", "roll 2", "0", "to 1")),
        (gla_config(), {"factor": 2, "features": FeatureMap(rolls=(1, 0))}, ("layer 0", "factor 3", "not 2")),
        (gla_config(), {"factor": 3, "init": "reinit"}, ("layer 0", "lossless", "reinit")),
        (gla_config(), {"factor": 2, "op": "grow_state", "features": FeatureMap(rolls=(1,))}, ("grow_state",)),
        (gla_config(attn={"layers": [0, 1], "num_heads": 4}), {"factor": None}, ("gla", "all 2", "softmax")),
    ],
)
def test_features_that_do_not_fit_a_model_are_refused(config, options, words):
    options = {"op": "grow_features", "init": "lossless", "layers": "0", **options}
    with raises(ConfigError, *words):
        make_plan(config, **options)
