"""Compiled kernels against the chunked form in float64, forward and gradients, on a CUDA device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from statex_dist.ops.conv import dispatch as conv_dispatch
from statex_dist.ops.conv.causal_conv1d_api import has_causal_conv1d
from statex_dist.ops.delta_rule import delta_rule
from statex_dist.ops.fla_api import has_fla
from statex_dist.ops.gla import gla
from statex_dist.ops.ssd import mamba_api, ssd
from statex_dist.ops.ssd.mamba_api import has_mamba_ssm
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
@pytest.mark.parametrize("limit", [65535, 1])
@pytest.mark.parametrize("final", [True, False])
def test_ssd_packed(final, limit, monkeypatch):
    """One call, calls cut at every chunk, and sequences as rows of a batch where states are asked for."""
    lengths = [1, 300, 64, 335]
    narrow, wide = on_gpu(ssd_inputs(tokens=700, heads=4, head_dim=64, groups=1, state=128), torch.float32)
    state = torch.randn(4, 4, 64, 128, device="cuda") if final else None
    monkeypatch.setattr(mamba_api, "GRID_PROGRAMS", limit)

    def scan(backend):
        def run(**tensors):
            out, after = ssd(**tensors, cu_seqlens=borders(lengths).cuda(), output_final_state=final, backend=backend)
            return out, after if final else out[:0]

        return run

    expected = run_with_gradients(scan("chunked"), wide, initial_state=None if state is None else state.double())
    actual = run_with_gradients(scan("kernel"), narrow, initial_state=state)
    assert_near(actual, expected, TOLERANCE[torch.float32])


@pytest.mark.skipif(not has_mamba_ssm(), reason="mamba_ssm is not installed")
def test_ssd_beyond_int32():
    """2^31 numbers of chunk states and more: the last tokens and their gradients equal those of a short tail alone."""
    tokens, tail, heads, state_size = 270_000, 2_000, 64, 512  # 1055 chunks of 64 * 64 * 512
    sizes = {"heads": heads, "head_dim": 64, "groups": 1, "state": state_size}
    last = {name: x.cuda() for name, x in ssd_inputs(tokens=tail, **sizes).items()}
    rounded = {name: x.to(torch.float32 if name in ("dt", "A") else torch.bfloat16) for name, x in last.items()}
    # Before the tail: the tail again and again, and one token that forgets everything.
    whole = {
        name: x if name == "A" else x.repeat(1, tokens // tail, *[1] * (x.dim() - 2)) for name, x in rounded.items()
    }
    whole["dt"][:, -tail - 1] = 1000.0 / whole["A"].abs()
    whole["x"][:, -tail - 1] = 0

    def run(inputs):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        out, after = ssd(**leaves, backend="kernel")
        probe = out[:, -tail:].float().square().sum() + after.square().sum()
        names = ("x", "dt", "B", "C")
        grads = torch.autograd.grad(probe, [leaves[name] for name in names])
        result = {"out": out[:, -tail:].detach(), "final": after.detach()}
        return result | {f"d{name}": grad[:, -tail:] for name, grad in zip(names, grads, strict=True)}

    expected = {name: x.double() for name, x in run(rounded).items()}
    assert_near(run(whole), expected, TOLERANCE[torch.bfloat16])


CONVOLUTIONS = [
    pytest.param(
        "causal_conv1d",
        marks=pytest.mark.skipif(not has_causal_conv1d(), reason="causal-conv1d is not installed (optional, compiled)"),
    ),
    pytest.param("fla", marks=pytest.mark.skipif(not has_fla(), reason="fla-core is not installed")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["batch with states", "packed", "packed with states", "slice"])
@pytest.mark.parametrize("kernel", CONVOLUTIONS)
def test_convolution(kernel, case, dtype, monkeypatch):
    monkeypatch.setattr(conv_dispatch, "has_causal_conv1d", lambda: kernel == "causal_conv1d")
    rng, lengths = torch.Generator().manual_seed(0), [5, 0, 1, 64, 200]
    packed = case.startswith("packed")
    shapes = {"x": (1 if packed else 2, 270, 256), "weight": (256, 1, 4), "bias": (256,)}
    if "states" in case:
        shapes["initial_state"] = (len(lengths) if packed else 2, 256, 3)
    inputs = {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}
    narrow, wide = on_gpu(inputs, dtype)

    def convolve(silu):
        def run(**tensors):
            tail = tensors.pop("initial_state", None)
            if case == "slice":
                tensors["x"] = F.pad(tensors["x"], (3, 2))[..., 3:-2]
            borders_here = borders(lengths).cuda() if packed else None
            out, after = conv_dispatch.convolve_sequences(
                **tensors, tail=tail, cu_seqlens=borders_here, output_tail=True, silu=silu
            )
            return out, after

        return run

    for silu in (True, False):
        # float64 always takes our own form.
        assert_near(
            run_with_gradients(convolve(silu), narrow), run_with_gradients(convolve(silu), wide), TOLERANCE[dtype]
        )
