"""The compiled kernels of expanded layers at full size, against the chunked form in fp32, on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from statex_dist.ops.features import Features
from statex_dist.ops.gla import gla
from statex_dist.state.geometry import MAX_STATE_BYTES, FeatureMap
from tests.ops.scan_cases import borders, gla_inputs, run_with_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Relative L2 error. bf16 rounding of inputs' products alone is 3e-3 (docs/kernels.md)."""
ORACLE_TOKENS = 4096


def oracle(q, k, v, g, initial_state, *, scale, mix=None):
    """The chunked form piece by piece, each computed again in its backward pass: at full length it would not fit."""
    outputs, state = [], initial_state
    for piece in zip(*(x.split(ORACLE_TOKENS, dim=1) for x in (q, k, v, g)), strict=True):

        def scan(q, k, v, g, state):
            return gla(q, k, v, g, scale=scale, mix=mix, initial_state=state, backend="chunked")

        out, state = checkpoint(scan, *piece, state, use_reentrant=False)
        outputs.append(out)
    return torch.cat(outputs, dim=1), state


def errors(actual, expected):
    return {
        name: ((actual[name].double() - want).norm() / want.double().norm().clamp(min=1e-12)).item()
        for name, want in expected.items()
    }


@pytest.mark.parametrize("tokens", [65536, 131072])
def test_merged_head_at_full_size(tokens):
    rng = torch.Generator("cuda").manual_seed(0)
    sizes = {"q": 1024, "k": 1024, "v": 2048}
    inputs = {
        name: torch.randn(1, tokens, 1, size, device="cuda", generator=rng).bfloat16() for name, size in sizes.items()
    }
    gates = torch.randn(1, tokens, 1, 1024, device="cuda", generator=rng)
    inputs["g"] = torch.nn.functional.logsigmoid(gates) / 16
    state = torch.randn(1, 1, 1024, 2048, device="cuda", generator=rng)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    actual = run_with_gradients(gla, inputs, backend="auto", scale=1024**-0.5, initial_state=state)
    peak = torch.cuda.max_memory_allocated() - held
    # run_with_gradients holds float64 probes of the outputs: 16 bytes per value channel beside our own
    assert peak < tokens * 80 * 1024 + 2 * MAX_STATE_BYTES, f"{peak / 2**30:.2f} GiB"
    actual = {name: x.cpu() for name, x in actual.items()}
    wide = {name: x.float() for name, x in inputs.items()}
    expected = run_with_gradients(oracle, wide, scale=1024**-0.5, initial_state=state)
    expected = {name: x.cpu() for name, x in expected.items()}
    found = errors(actual, expected)
    assert max(found.values()) < TOLERANCE[torch.bfloat16], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", ["soft", "bursty", "constant:-50"])
@pytest.mark.parametrize("partners", [None, 4])
def test_odd_sizes_packed(partners, gate, dtype):
    lengths = [700, 1, 0, 256, 43]
    inputs = gla_inputs(tokens=sum(lengths), heads=4, keys=200, values=300, gate=gate)
    inputs = {name: x.to("cuda", torch.float32 if name == "g" else dtype) for name, x in inputs.items()}
    mix = None if partners is None else torch.randn(4, partners, device="cuda")
    state = torch.randn(len(lengths), 4, 200, 300 * (partners or 1), device="cuda")
    options = {"scale": 0.1, "cu_seqlens": borders(lengths).cuda()}
    wide = {name: x.double() for name, x in inputs.items()}
    expected = run_with_gradients(
        gla,
        wide,
        backend="chunked",
        mix=None if mix is None else mix.double(),
        initial_state=state.double(),
        **options,
    )
    actual = run_with_gradients(
        gla, inputs, backend="triton", mix=mix, initial_state=state, max_state_bytes=2**24, **options
    )
    found = errors(actual, expected)
    if gate == "constant:-50":  # its true value is next to nothing: an absolute bound is what means something
        assert (actual["dg"].double() - expected["dg"]).abs().max() < TOLERANCE[dtype]
        del found["dg"]
    assert max(found.values()) < TOLERANCE[dtype] * (5 if gate == "bursty" else 1), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", [FeatureMap(rolls=[3, 1]), FeatureMap(rolls=[0], relu=True, match_norm=True)])
def test_features_packed(products, dtype):
    lengths = [700, 1, 0, 256, 43]
    inputs = gla_inputs(tokens=sum(lengths), heads=4, keys=200, values=300)
    inputs = {name: x.to("cuda", torch.float32 if name == "g" else dtype) for name, x in inputs.items()}
    inputs["gain"] = torch.randn(4, 200 * (products.factor - 1), device="cuda")
    state = torch.randn(len(lengths), 4, 200 * products.factor, 300, device="cuda")
    options = {"scale": 0.1, "cu_seqlens": borders(lengths).cuda()}

    def scan(gain, **rest):
        return gla(**rest, features=Features(products, gain))

    wide = {name: x.double() for name, x in inputs.items()}
    expected = run_with_gradients(scan, wide, backend="chunked", initial_state=state.double(), **options)
    actual = run_with_gradients(scan, inputs, backend="triton", initial_state=state, max_state_bytes=2**24, **options)
    found = errors(actual, expected)
    assert max(found.values()) < TOLERANCE[dtype], found


def test_two_runs_agree_to_the_bit():
    inputs = gla_inputs(tokens=1000, heads=1, keys=512, values=512)
    inputs = {name: x.to("cuda", torch.float32 if name == "g" else torch.bfloat16) for name, x in inputs.items()}
    first, second = (run_with_gradients(gla, inputs, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
