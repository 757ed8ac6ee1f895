"""The mixing matrix against formulas written out from docs/method.md, section 4, with loops over heads."""

from __future__ import annotations

import pytest
import torch

from statex_dist.ops.gla import gla
from statex_dist.ops.head_mixing import mix_outputs, spread_values
from tests.ops.scan_cases import assert_close, borders, gla_inputs, run_with_gradients

HEADS = 4


def block_outputs(q, k, v, g, scale):
    """``[H, H, B, T, V]``: what query head i reads from the state of keys i and values j, by direct sums over time."""
    batch, tokens, heads, _ = q.shape
    out = torch.zeros(heads, heads, batch, tokens, v.shape[-1], dtype=q.dtype)
    b = g.cumsum(1)
    for i in range(heads):
        for t in range(tokens):
            weights = (q[:, t : t + 1, i] * k[:, : t + 1, i] * (b[:, t : t + 1, i] - b[:, : t + 1, i]).exp()).sum(-1)
            for j in range(heads):
                out[i, j, :, t] = scale * torch.einsum("bu,buv->bv", weights, v[:, : t + 1, j])
    return out


def direct(q, k, v, g, mix, scale):
    """``o_j = sum_s M[j-s, s] (query j-s on the state of keys j-s and values j)``."""
    heads, partners = mix.shape
    blocks = block_outputs(q, k, v, g, scale)
    outs = []
    for j in range(heads):
        total = torch.zeros_like(blocks[0, 0])
        for s in range(partners):
            i = (j - s) % heads
            total = total + mix[i, s] * blocks[i, j]
        outs.append(total)
    return torch.stack(outs, dim=2)


@pytest.mark.parametrize("backend", ["chunked", "naive"])
@pytest.mark.parametrize("partners", [2, 3, HEADS])
def test_random_mix_equals_the_direct_formula(backend, partners):
    inputs = gla_inputs(batch=2, tokens=21, heads=HEADS, keys=3, values=5)
    mix = torch.randn(HEADS, partners, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out, state = gla(**inputs, mix=mix, backend=backend, chunk_size=8)
    assert state.shape == (2, HEADS, 3, partners * 5)
    torch.testing.assert_close(out, direct(**inputs, mix=mix, scale=3**-0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["chunked", "naive"])
@pytest.mark.parametrize("partners", [2, HEADS])
def test_identity_mix_is_the_original_layer_to_the_last_bit(backend, partners):
    inputs = gla_inputs(batch=2, tokens=70, heads=HEADS)
    mix = torch.zeros(HEADS, partners, dtype=torch.float64)
    mix[:, 0] = 1
    out, _ = gla(**inputs, mix=mix, backend=backend)
    expected, _ = gla(**inputs, backend=backend)
    assert (out - expected).abs().max() == 0


def test_identity_mix_has_gradient_off_the_diagonal_at_once():
    inputs = gla_inputs(tokens=30, heads=HEADS)
    mix = torch.zeros(HEADS, HEADS, dtype=torch.float64)
    mix[:, 0] = 1
    grads = run_with_gradients(gla, inputs, mix=mix, backend="chunked")
    assert (grads["dmix"].abs() > 1e-6).all()


def test_ones_are_statex_head_merge():
    """All heads as one head: keys and values concatenated, one scale, nothing else."""
    inputs = gla_inputs(batch=2, tokens=40, heads=HEADS, keys=3, values=5)
    merged = {name: x.flatten(2, 3).unsqueeze(2) for name, x in inputs.items()}
    expected, _ = gla(**merged, backend="chunked", chunk_size=16)
    mix = torch.full((HEADS, HEADS), HEADS**-0.5, dtype=torch.float64)
    out, _ = gla(**inputs, mix=mix, backend="chunked", chunk_size=16)
    torch.testing.assert_close(out.flatten(2).unsqueeze(2), expected, rtol=0, atol=1e-12)


def test_a_merged_head_is_h_times_h_virtual_heads():
    inputs = gla_inputs(tokens=40, heads=HEADS, keys=3, values=5)
    merged = {name: x.flatten(2, 3).unsqueeze(2) for name, x in inputs.items()}
    out, state = gla(**merged, backend="chunked", chunk_size=16)
    blocks = block_outputs(**inputs, scale=(HEADS * 3) ** -0.5).sum(0)
    expected = blocks.permute(1, 2, 0, 3).flatten(2).unsqueeze(2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for i in range(HEADS):
        for j in range(HEADS):
            virtual = {name: inputs[name][:, :, [i]] for name in ("q", "k", "g")} | {"v": inputs["v"][:, :, [j]]}
            _, block = gla(**virtual, backend="naive")
            part = state[:, :, 3 * i : 3 * i + 3, 5 * j : 5 * j + 5]
            torch.testing.assert_close(part, block, rtol=0, atol=1e-12)


def test_packed_mix_with_states_and_every_gradient():
    lengths = [1, 0, 33, 70]
    inputs = gla_inputs(tokens=sum(lengths), heads=HEADS, keys=3, values=4)
    rng = torch.Generator().manual_seed(0)
    options = {
        "mix": torch.randn(HEADS, 3, dtype=torch.float64, generator=rng),
        "initial_state": torch.randn(len(lengths), HEADS, 3, 12, dtype=torch.float64, generator=rng),
        "cu_seqlens": borders(lengths),
    }
    fast = run_with_gradients(gla, inputs, backend="chunked", **options)
    slow = run_with_gradients(gla, inputs, backend="naive", **options)
    assert "dmix" in fast
    assert "dinitial_state" in fast
    assert_close(fast, slow, 1e-11)


def test_spread_and_mix_name_the_same_partner():
    v = torch.arange(HEADS, dtype=torch.float64)[:, None]
    spread = spread_values(v, 3)
    assert spread.tolist() == [[i, (i + 1) % 4, (i + 2) % 4] for i in range(HEADS)]
    for s in range(3):
        mix = torch.zeros(HEADS, 3, dtype=torch.float64)
        mix[:, s] = 1
        assert mix_outputs(spread, mix).flatten().tolist() == list(range(HEADS))
