"""Compiled kernels against the chunked form in float64, forward and gradients, on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from statex_dist.ops.dispatch import delta_rule, gla, ssd
from statex_dist.ops.fla_api import has_fla
from statex_dist.ops.mamba_api import has_mamba_ssm
from tests.ops.scan_cases import borders, delta_inputs, gla_inputs, run_with_gradients, ssd_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 2e-2}
"""Relative L2 error; fp32 products run in TF32 inside the kernels."""


def assert_near(actual, expected, tolerance):
    for name, want in expected.items():
        error = ((actual[name].double() - want).norm() / want.norm().clamp(min=1e-12)).item()
        assert error < tolerance, f"{name}: relative error {error:.3g}"


def on_gpu(inputs, dtype, keep=()):
    """The rounded tensors on the device, and the same values in float64."""
    narrow = {name: x.to("cuda", torch.float32 if name in keep else dtype) for name, x in inputs.items()}
    return narrow, {name: x.double() for name, x in narrow.items()}


@pytest.mark.skipif(not has_fla(), reason="fla-core is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 40, "heads": 2, "keys": 32, "values": 64},
        {"tokens": 1000, "heads": 4, "keys": 64, "values": 128},
        {"tokens": 513, "heads": 1, "keys": 512, "values": 256},
        {"batch": 2, "tokens": 200, "heads": 2, "keys": 32, "values": 32},
    ],
)
def test_gla(sizes, dtype):
    narrow, wide = on_gpu(gla_inputs(**sizes), dtype, keep=("g",))
    shape = (sizes.get("batch", 1), sizes["heads"], sizes["keys"], sizes["values"])
    state = torch.randn(shape, device="cuda")
    expected = run_with_gradients(gla, wide, backend="chunked", initial_state=state.double())
    actual = run_with_gradients(gla, narrow, backend="kernel", initial_state=state)
    assert_near(actual, expected, TOLERANCE[dtype])


@pytest.mark.skipif(not has_fla(), reason="fla-core is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 64], ids=["gated delta rule", "kda"])
def test_delta_rule(channels, dtype):
    inputs = delta_inputs(tokens=1000, heads=2, value_heads=4, keys=64, values=64, channels=channels)
    narrow, wide = on_gpu(inputs, dtype, keep=("g",))
    state = torch.randn(1, 4, 64, 64, device="cuda")
    expected = run_with_gradients(delta_rule, wide, backend="chunked", initial_state=state.double())
    actual = run_with_gradients(delta_rule, narrow, backend="kernel", initial_state=state)
    assert_near(actual, expected, TOLERANCE[dtype])


@pytest.mark.skipif(not has_fla(), reason="fla-core is not installed")
@pytest.mark.parametrize("partners", [None, 2])
def test_gla_packed(partners):
    lengths = [1, 300, 64, 135]
    narrow, wide = on_gpu(gla_inputs(tokens=500, heads=4, keys=32, values=32), torch.float32)
    mix = None if partners is None else torch.randn(4, partners, device="cuda")
    state = torch.randn(4, 4, 32, 32 * (partners or 1), device="cuda")
    common = {"cu_seqlens": borders(lengths).cuda()}
    expected = run_with_gradients(
        gla,
        wide,
        backend="chunked",
        initial_state=state.double(),
        mix=None if mix is None else mix.double(),
        **common,
    )
    actual = run_with_gradients(gla, narrow, backend="kernel", initial_state=state, mix=mix, **common)
    assert_near(actual, expected, TOLERANCE[torch.float32])


@pytest.mark.skipif(not has_mamba_ssm(), reason="mamba_ssm is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_size", [128, 512])
def test_ssd(state_size, dtype):
    inputs = ssd_inputs(tokens=600, heads=4, head_dim=64, groups=1, state=state_size)
    narrow, wide = on_gpu(inputs, dtype, keep=("dt", "A"))
    state = torch.randn(1, 4, 64, state_size, device="cuda")
    expected = run_with_gradients(ssd, wide, backend="chunked", initial_state=state.double())
    actual = run_with_gradients(ssd, narrow, backend="kernel", initial_state=state)
    assert_near(actual, expected, TOLERANCE[dtype])


@pytest.mark.skipif(not has_mamba_ssm(), reason="mamba_ssm is not installed")
def test_ssd_packed():
    lengths = [1, 300, 64, 135]
    narrow, wide = on_gpu(ssd_inputs(tokens=500, heads=4, head_dim=64, groups=1, state=128), torch.float32)
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None].int().cuda()
    common = {"cu_seqlens": borders(lengths).cuda(), "seq_idx": seq_idx, "output_final_state": False}

    def outputs(backend, inputs):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        out, _ = ssd(**leaves, backend=backend, **common)
        grads = torch.autograd.grad(out.square().sum(), list(leaves.values()))
        return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))

    assert_near(outputs("kernel", narrow), outputs("chunked", wide), TOLERANCE[torch.float32])
