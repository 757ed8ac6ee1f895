"""Tensor-parallel ranks, simulated in float64: the shares of a layer's weights compute the layer.

Each rank runs the layer's equations on its slices alone (token by token, ``naive_gla`` and ``naive_ssd``); what ranks
would all-reduce is added up in between: the sums of squares of an output norm, and the outputs. The whole layer is the
oracle. GLA and Mamba2 are written out here; tests/models/test_tensor_parallel_needs.py goes through every family.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from statex_dist.models.core.sequences import Sequences
from statex_dist.models.layout import shard_ranges
from statex_dist.models.registry import family_of
from statex_dist.ops.conv.torch_forms import causal_conv
from statex_dist.ops.gla.torch_forms import naive_gla
from statex_dist.ops.ssd.torch_forms import naive_ssd
from tests.models.tiny import build, expanded, gla_config, mamba2_config

LAYER = 0
EXACT = 1e-11


def whole_layer(config):
    """An input of the layer, its weights and its output."""
    layer = build(config).trunk.layers[LAYER]
    x = torch.randn(2, 9, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return x, dict(layer.state_dict()), layer(x, Sequences())[0]


def share(config, weights, tp, rank):
    """A rank's slices of a layer's weights."""
    specs = family_of(config.MODEL_TYPE).layer_tensors(config, LAYER)
    assert specs.keys() == weights.keys()
    held = {}
    for name, spec in specs.items():
        ranges = shard_ranges(spec, name, tp, rank)
        held[name] = torch.cat([weights[name].narrow(spec.axis, a, b - a) for a, b in ranges], dim=spec.axis)
    return held


def error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def rms(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


# --- GLA ------------------------------------------------------------------------------------------------------------


def gla_heads(config, geometry, w, x, tp, rank):
    """Outputs and gates ``[B, T, h, v]`` of the heads, or of the piece of one head, that a rank holds."""
    heads = max(geometry.num_heads // tp, 1)
    mixes = geometry.values_per_key > 1
    q, k, v = (x @ w[f"attn.{name}_proj.weight"].T for name in "qkv")
    if config.use_short_conv:
        q, k, v = (
            F.silu(causal_conv(y, w[f"attn.{name}_conv1d.weight"])) for name, y in zip("qkv", (q, k, v), strict=True)
        )
    logits = x @ w["attn.gk_proj.0.weight"].T @ w["attn.gk_proj.1.weight"].T + w["attn.gk_proj.1.bias"]
    g = F.logsigmoid(logits) / config.gate_logit_normalizer
    q, k, g = (y.unflatten(-1, (geometry.num_heads if mixes else heads, -1)) for y in (q, k, g))
    v, gate = (y.unflatten(-1, (heads, -1)) for y in (v, x @ w["attn.g_proj.weight"].T))
    scale = config.scale if geometry.num_heads == config.num_heads else geometry.key_dim**-0.5
    if not mixes:
        return naive_gla(q, k, v, g, scale=scale)[0], gate
    # Output head j reads its own values with the keys of heads j, j - 1, ...: no values of other ranks.
    outputs = torch.zeros_like(v)
    for local in range(heads):
        for partner in range(geometry.values_per_key):
            key = (rank * geometry.num_heads // tp + local - partner) % geometry.num_heads
            at_key, at_value = slice(key, key + 1), slice(local, local + 1)
            o, _ = naive_gla(q[:, :, at_key], k[:, :, at_key], v[:, :, at_value], g[:, :, at_key], scale=scale)
            outputs[:, :, at_value] += w["attn.mix"][key, partner] * o
    return outputs, gate


def gla_layer(config, x, weights, tp, *, local_norm=False):
    """The layer's output as ``tp`` ranks compute it."""
    geometry = config.layer_geometry(LAYER)
    shares = [share(config, weights, tp, rank) for rank in range(tp)]
    h = rms(x, weights["attn_norm.weight"], config.norm_eps)
    results = [gla_heads(config, geometry, w, h, tp, rank) for rank, w in enumerate(shares)]
    squares = x.new_zeros(*x.shape[:2], geometry.num_heads)
    places = []
    for rank, (o, _) in enumerate(results):
        first = rank * geometry.num_heads // tp
        places.append(slice(first, first + o.shape[2]))
        squares[..., places[rank]] += o.square().sum(-1)  # all-reduced among the ranks of a head
    mixed = torch.zeros_like(x)
    for w, (o, gate), place in zip(shares, results, places, strict=True):
        mean = o.square().mean(-1) if local_norm else squares[..., place] / geometry.value_dim
        norm = next(value for name, value in w.items() if "g_norm" in name)
        y = o * torch.rsqrt(mean + config.norm_eps).unsqueeze(-1) * norm * F.silu(gate)
        mixed = mixed + y.flatten(-2) @ w["attn.o_proj.weight"].T
    x = x + mixed
    h = rms(x, weights["mlp_norm.weight"], config.norm_eps)
    for w in shares:
        inner = F.silu(h @ w["mlp.gate_proj.weight"].T) * (h @ w["mlp.up_proj.weight"].T)
        x = x + inner @ w["mlp.down_proj.weight"].T
    return x


GLA_CASES = {
    "heads": gla_config(),
    "heads, short convolution": gla_config(use_short_conv=True, fuse_norm=False),
    "two heads": gla_config(num_heads=2),
    "grown": expanded(gla_config(use_short_conv=True), "inherit", factor=3, op="grow_state"),
    "merged to one": expanded(gla_config(), "inherit", factor=4),
    "merged to one, short convolution": expanded(gla_config(use_short_conv=True), "inherit", factor=4),
    "merged to two": expanded(gla_config(), "inherit", factor=2),
    "mixed": expanded(gla_config(), "inherit", factor=3, op="mix_heads"),
    "mixed, short convolution": expanded(gla_config(use_short_conv=True), "inherit", factor=4, op="mix_heads"),
}


@pytest.mark.parametrize("case", GLA_CASES)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_ranks_compute_a_gla_layer(case, tp):
    config = GLA_CASES[case]
    x, weights, wanted = whole_layer(config)
    assert error(gla_layer(config, x, weights, tp), wanted) < EXACT


@pytest.mark.parametrize(("case", "tp"), [("merged to one", 2), ("merged to one", 4), ("merged to two", 4)])
def test_a_norm_over_the_channels_of_one_rank_is_wrong(case, tp):
    """The classic mistake: nothing fails, the model is merely another one."""
    config = GLA_CASES[case]
    x, weights, wanted = whole_layer(config)
    assert error(gla_layer(config, x, weights, tp, local_norm=True), wanted) > 0.01


# --- Mamba2 ---------------------------------------------------------------------------------------------------------


def mamba2_outputs(config, geometry, w, x, tp):
    """Gated outputs ``[B, T, inner / tp]`` of the heads that a rank holds, before the norm."""
    heads, groups = config.num_heads // tp, max(config.n_groups // tp, 1)
    inner, grouped = heads * config.head_dim, groups * geometry.key_dim
    rows = F.linear(x, w["mixer.in_proj.weight"], w.get("mixer.in_proj.bias"))
    z, xbc, dt = rows.split([inner, inner + 2 * grouped, heads], dim=-1)
    xbc = F.silu(causal_conv(xbc, w["mixer.conv1d.weight"], w.get("mixer.conv1d.bias")))
    inputs, B, C = xbc.split([inner, grouped, grouped], dim=-1)
    inputs = inputs.unflatten(-1, (heads, -1))
    B, C = (y.unflatten(-1, (groups, -1)) for y in (B, C))
    dt = F.softplus(dt + w["mixer.dt_bias"])
    y, _ = naive_ssd(inputs, dt, -w["mixer.A_log"].exp(), B, C)
    y = y + inputs * w["mixer.D"].unsqueeze(-1)
    return y.flatten(-2) * F.silu(z)


def mamba2_layer(config, x, weights, shares):
    """The layer's output as the ranks with these shares compute it."""
    h = rms(x, weights["norm.weight"], config.layer_norm_epsilon)
    outputs = [mamba2_outputs(config, config.layer_geometry(LAYER), w, h, len(shares)) for w in shares]
    squares = torch.cat(outputs, dim=-1).square().unflatten(-1, (config.n_groups, -1))
    means = squares.mean(-1, keepdim=True).expand_as(squares).flatten(-2).split(outputs[0].shape[-1], dim=-1)
    for y, mean, w in zip(outputs, means, shares, strict=True):
        y = y * torch.rsqrt(mean + config.layer_norm_epsilon) * w["mixer.norm.weight"]
        x = x + y @ w["mixer.out_proj.weight"].T
    return x + weights.get("mixer.out_proj.bias", 0)  # once, not once per rank


MAMBA2_CASES = {
    "one group": mamba2_config(n_groups=1),
    "two groups": mamba2_config(n_groups=2, use_bias=True),
    "four groups": mamba2_config(n_groups=4, use_conv_bias=False),
    "one group, grown": expanded(mamba2_config(n_groups=1, use_bias=True), "inherit", factor=4),
    "two groups, grown": expanded(mamba2_config(n_groups=2), "inherit", factor=3),
    "four groups, grown": expanded(mamba2_config(n_groups=4), "copy", factor=2),
}


@pytest.mark.parametrize("case", MAMBA2_CASES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_ranks_compute_a_mamba2_layer(case, tp):
    config = MAMBA2_CASES[case]
    x, weights, wanted = whole_layer(config)
    shares = [share(config, weights, tp, rank) for rank in range(tp)]
    assert error(mamba2_layer(config, x, weights, shares), wanted) < EXACT


@pytest.mark.parametrize(("case", "tp"), [("two groups", 2), ("four groups", 4), ("two groups, grown", 2)])
@pytest.mark.parametrize("name", ["mixer.in_proj.weight", "mixer.conv1d.weight"])
def test_rows_cut_without_regard_to_their_parts_are_wrong(case, tp, name):
    """The shapes are the right ones: z of one rank would be read as x of another."""
    config = MAMBA2_CASES[case]
    x, weights, wanted = whole_layer(config)
    shares = [share(config, weights, tp, rank) for rank in range(tp)]
    for piece, w in zip(weights[name].chunk(tp), shares, strict=True):
        assert piece.shape == w[name].shape
        w[name] = piece
    assert error(mamba2_layer(config, x, weights, shares), wanted) > 0.01
