"""The cost model against the papers' figures and against states that a scan really returns."""

from __future__ import annotations

import pytest
import torch

from statex_dist.models.gla.config import GLAConfig
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.registry import make_plan
from statex_dist.ops.gla import gla
from statex_dist.ops.ssd import ssd
from statex_dist.state.geometry import StateGeometry

GLA_1B3 = GLAConfig(vocab_size=32000, hidden_size=2048, num_hidden_layers=24, num_heads=4)
MAMBA2_1B3 = Mamba2Config(
    vocab_size=50288, hidden_size=2048, num_hidden_layers=48, num_heads=64, head_dim=64, state_size=128, n_groups=1
)


def total(config):
    return sum(config.layer_geometry(layer).elements for layer in range(config.num_hidden_layers))


def test_gla_1b3_grows_by_half_as_in_the_paper():
    """arXiv 2509.22630: one layer in six, four heads merged into one."""
    target = make_plan(GLA_1B3, layers="every:6", factor=None, init="reinit")
    assert [e.layer for e in target.statex.layers] == [0, 6, 12, 18]
    assert total(GLA_1B3) == 12_582_912
    assert total(target) == 18_874_368
    merged = target.layer_geometry(0)
    assert (merged.num_heads, merged.key_dim, merged.value_dim) == (1, 1024, 2048)
    assert target.layer_geometry(1) == GLA_1B3.layer_geometry(1)


def test_gla_scan_flops():
    target = make_plan(GLA_1B3, layers="0", factor=None, init="reinit")
    assert GLA_1B3.layer_geometry(0).scan_flops == pytest.approx(2.49e6, rel=2e-3)
    assert target.layer_geometry(0).scan_flops == pytest.approx(8.78e6, rel=2e-3)


def test_a_mixed_layer_has_the_state_of_a_merged_one():
    merged = make_plan(GLA_1B3, layers="0", factor=4, init="reinit").layer_geometry(0)
    mixed = make_plan(GLA_1B3, layers="0", factor=4, init="lossless").layer_geometry(0)
    assert mixed.elements == merged.elements == 1024 * 2048
    assert mixed.values_per_key == 4
    half = make_plan(GLA_1B3, layers="0", factor=2, init="lossless").layer_geometry(0)
    assert half.elements == 2 * GLA_1B3.layer_geometry(0).elements


def test_mamba2_1b3_with_four_times_the_state():
    target = make_plan(MAMBA2_1B3, layers="all", factor=4, init="lossless")
    geometry = target.layer_geometry(0)
    assert geometry.key_dim == 512
    assert geometry.elements == 1024 * 2048
    assert total(target) == 4 * total(MAMBA2_1B3) == 100_663_296
    assert MAMBA2_1B3.layer_geometry(0).scan_flops == pytest.approx(4.3e6, rel=0.02)
    assert geometry.scan_flops == pytest.approx(10.7e6, rel=0.02)


def test_bytes_count_the_convolution_tails():
    plain = StateGeometry(num_heads=2, key_dim=3, value_dim=5, num_key_groups=2)
    assert plain.state_bytes == 4 * 30
    tailed = StateGeometry(num_heads=2, key_dim=3, value_dim=5, num_key_groups=2, conv_channels=7, conv_kernel=4)
    assert tailed.state_bytes == 4 * (30 + 7 * 3)
    assert tailed.elements == 30
    # x, B and C of one group: 4096 + 2 * 128 channels
    assert MAMBA2_1B3.layer_geometry(0).state_bytes == 4 * (64 * 64 * 128 + 3 * (4096 + 256))


def test_elements_are_those_of_real_states():
    one = torch.ones(1, 1, 1, 1)
    mix = torch.ones(2, 3)
    _, state = gla(*(one.expand(1, 4, 2, size) for size in (5, 5, 7)), -one.expand(1, 4, 2, 5), mix=mix[:, :2])
    geometry = StateGeometry(num_heads=2, key_dim=5, value_dim=7, num_key_groups=2, values_per_key=2)
    assert state.numel() == geometry.elements
    x, B = one.expand(1, 4, 6, 7), one.expand(1, 4, 3, 5)
    _, state = ssd(x, x[..., 0], -torch.ones(6), B, B)
    assert state.numel() == StateGeometry(num_heads=6, key_dim=5, value_dim=7, num_key_groups=3).elements
