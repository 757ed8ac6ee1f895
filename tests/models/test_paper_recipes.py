"""The StateX authors' four modes, written here as their script's mapping on whole modules, against our recipes.

Values that the authors keep must be equal. Values that they draw must have their shapes and their distribution. No
other value may change. Their released scripts: GLA ``drop_prop=6, drop_mode=gla`` (or ``merge``), Mamba2 ``drop_prop=1,
drop_mode=mamba4`` (or ``merge_copy``).
"""

from __future__ import annotations

import math

import pytest
import torch

from checkpoints_tools.plan.options import PlanOptions, plan_model
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import expand_state_dict
from tests.models.tiny import build, gla_config, mamba2_config

GLA = gla_config(num_hidden_layers=8, use_short_conv=True, hidden_size=64, expand_k=0.5, expand_v=1.0)
MAMBA2 = mamba2_config(n_groups=1, use_bias=True, hidden_size=64, num_heads=16)


def expanded(config, recipe):
    before = build(config, dtype=torch.bfloat16).state_dict()
    after = plan_model(config, PlanOptions(recipe=recipe))
    result = expand_state_dict(before, config, after)
    model = RecurrentLM(after).bfloat16()
    model.load_state_dict(result)
    return before, result


def assert_uniform(values: torch.Tensor, bound: float):
    values = values.float().flatten()
    assert values.abs().max() <= bound * 1.01
    if values.numel() > 200:
        assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.2)


def test_gla_is_a_fresh_layer_of_one_head_and_a_fresh_norm():
    before, after = expanded(GLA, "statex-paper-gla")
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        if layer not in (0, 6) or ".mlp" in name:
            assert torch.equal(old, new), name
        elif name.endswith("attn_norm.weight"):
            assert torch.equal(new, torch.ones_like(old))
        elif "g_norm" in name:
            assert torch.equal(new, torch.ones(GLA.value_dim, dtype=torch.bfloat16))
        elif name.endswith(".bias"):
            assert torch.equal(new, torch.zeros_like(old))
        else:
            assert new.shape == old.shape
            assert not torch.equal(old, new), name
            bound = 0.5 if "conv1d" in name else 2**-2.5 * math.sqrt(6 / sum(old.shape))
            assert_uniform(new, bound)


def test_merge_repeats_the_output_norm_and_renews_the_input_norm():
    before, after = expanded(GLA, "statex-paper-merge")
    for name, old in before.items():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        expected = old
        if layer in (0, 6) and name.endswith("attn_norm.weight"):
            expected = torch.ones_like(old)
        elif layer in (0, 6) and "g_norm" in name:
            expected = old.repeat(GLA.num_heads)
        assert torch.equal(after[name], expected), name


@pytest.mark.parametrize("mode", ["mamba4", "merge-copy"])
def test_mamba2_keeps_z_x_dt_d_and_the_output_and_resets_the_dynamics(mode):
    before, after = expanded(MAMBA2, f"statex-paper-{mode}")
    assert before.keys() == after.keys()
    inner, state, heads = MAMBA2.inner_size, MAMBA2.state_size, MAMBA2.num_heads
    for name, old in before.items():
        new = after[name]
        suffix = name.split(".", 3)[-1] if ".layers." in name else ""
        if suffix == "mixer.dt_bias":
            expected = torch.ones(heads)
        elif suffix == "mixer.A_log":
            expected = torch.arange(1, heads + 1).float().log()
        elif suffix == "mixer.norm.weight":
            expected = torch.ones(inner)
        elif suffix.startswith(("mixer.in_proj", "mixer.conv1d")):
            first = 2 * inner if "in_proj" in suffix else inner
            head = [old[:first], old[first : first + state], old[first + state : first + 2 * state]]
            keep, B, C, dt = *head, old[first + 2 * state :]
            assert new.shape == (first + 8 * state + len(dt), *old.shape[1:])
            assert torch.equal(new[:first], keep)
            assert torch.equal(new[first + 8 * state :], dt)
            middle = new[first : first + 8 * state]
            if mode == "merge-copy":
                assert torch.equal(middle, torch.cat([B] * 4 + [C] * 4))
            else:
                bound = 1 / math.sqrt(MAMBA2.hidden_size if "in_proj" in suffix else MAMBA2.conv_kernel)
                assert_uniform(middle, bound)
                assert not torch.equal(middle[:state], B)
            continue
        else:
            expected = old
        assert torch.equal(new, expected.bfloat16()), name
