"""Configurations of hosts: defaults, older keys, and values that are refused."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING

from statex_dist.errors import CheckpointError
from statex_dist.models.registry import config_from_dict, family_of
from tests.models.hybrid.hosts import HOSTS, MAMBA2_HOSTS
from tests.raising import raises


@pytest.mark.parametrize("model_type", MAMBA2_HOSTS)
def test_defaults_and_keys_are_transformers(model_type):
    theirs, family = CONFIG_MAPPING[model_type](), family_of(model_type).config
    bare = family.from_dict({"model_type": model_type})
    assert {key for key, _ in family.HOST.keys.values()} <= set(theirs.to_dict())
    for key, default in family.HOST.keys.values():
        assert getattr(theirs, key) == default, key
    for key in (
        *("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range", "tie_word_embeddings"),
        *("pad_token_id", "bos_token_id", "eos_token_id"),
    ):
        assert getattr(bare, key) == getattr(theirs, key), key
    assert ["linear_attention" if kind == "recurrent" else "hybrid" for kind in bare.layer_kinds] == [
        "linear_attention" if kind == "linear_attention" else "hybrid" for kind in theirs.layer_types
    ]


@pytest.mark.parametrize(
    ("model_type", "old", "new"),
    [
        (
            "nemotron_h",
            {"hybrid_override_pattern": "M*EM-"},
            {"layers_block_type": ["mamba", "attention", "moe", "mamba", "mlp"]},
        ),
        (
            "nemotron_h",
            {"mamba_n_groups": 4, "mamba_d_conv": 3, "mamba_dt_min": 0.2},
            {"n_groups": 4, "conv_kernel": 3, "time_step_min": 0.2},
        ),
        (
            "granitemoehybrid",
            {"layers_block_type": ["mamba", "attention"], "num_hidden_layers": 2},
            {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
        ),
        (
            "zamba2",
            {"layers_block_type": ["mamba", "hybrid"], "num_hidden_layers": 2},
            {"layers_block_type": ["linear_attention", "hybrid"], "num_hidden_layers": 2},
        ),
    ],
)
def test_older_keys_mean_the_same(model_type, old, new):
    config = family_of(model_type).config
    first, second = (config.from_dict({"model_type": model_type, **keys}) for keys in (old, new))
    assert first.layer_kinds == second.layer_kinds
    assert first.mixer_config() == second.mixer_config()
    assert first.to_dict() == {"model_type": model_type, **old}


REFUSED = [
    ("bamba", {"hidden_act": "gelu"}, ("hidden_act", "silu")),
    ("bamba", {"attn_layer_indices": [3]}, ("attn_layer_indices", 3)),
    ("bamba", {"attn_layer_indices": [-1]}, ("attn_layer_indices", "0..2")),
    ("bamba", {"mamba_n_groups": 3}, ("bamba config", "mamba_n_groups", "mamba_n_heads")),
    ("bamba", {"mamba_d_head": 7}, (8, 7, 64)),
    ("bamba", {"mamba_d_head": "half"}, ("half",)),
    ("bamba", {"mamba_n_heads": 0}, (0,)),
    ("bamba", {"time_step_limit": [0.1]}, ("bamba config", "time_step_limit")),
    ("bamba", {"time_step_limit": None}, ("time_step_limit", None)),
    ("bamba", {"mamba_conv_bias": 1}, ("mamba_conv_bias", "bool")),
    ("granitemoehybrid", {"layer_types": ["linear_attention"]}, ("num_hidden_layers", 1, 3)),
    ("granitemoehybrid", {"layer_types": ["linear_attention", "moe", "mamba"]}, ("layer_types", "moe")),
    ("granitemoehybrid", {"layers_block_type": ["mamba"] * 3}, ("layer_types", "layers_block_type")),
    ("granitemoehybrid", {"logits_scaling": 0}, ("logits_scaling", 0)),
    ("granitemoehybrid", {"hidden_act": "relu"}, ("hidden_act", "relu")),
    ("nemotron_h", {"hybrid_override_pattern": "M*XM-"}, ("hybrid_override_pattern", "X")),
    ("nemotron_h", {"layers_block_type": ["mamba"] * 5}, ("hybrid_override_pattern",)),
    ("nemotron_h", {"mamba_hidden_act": "gelu"}, ("mamba_hidden_act", "gelu")),
    ("nemotron_h", {"tie_word_embeddings": True}, ("tie_word_embeddings", False)),
    ("nemotron_h", {"sliding_window": 128}, ("sliding_window", 128)),
    ("nemotron_h", {"mamba_n_groups": "2"}, ("n_groups", "int")),
    ("falcon_h1", {"ssm_multipliers": [1.0] * 4}, ("ssm_multipliers",)),
    ("falcon_h1", {"mamba_d_ssm": 60}, (8, 60)),
    ("zamba2", {"layers_block_type": ["mamba", "attention"] + ["mamba"] * 3}, ("layers_block_type", "hybrid")),
    ("zamba2", {"layer_types": ["mamba"] * 5}, ("layer_types",)),
    ("zamba2", {"n_mamba_heads": 7}, (7, 64)),
]


@pytest.mark.parametrize(("model_type", "changes", "named"), REFUSED)
def test_what_our_layers_do_not_compute_is_refused(model_type, changes, named):
    sizes = {"vocab_size": 40, "hidden_size": 32}
    with raises(CheckpointError, *named):
        config_from_dict({"model_type": model_type, **sizes, **HOSTS[model_type], **changes})
