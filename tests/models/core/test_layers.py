"""Norms and SwiGLU against their equations, in PyTorch here and on fla-core's kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from statex_dist.models.core import layers
from statex_dist.models.core.layers import GatedRMSNorm, RMSNorm
from statex_dist.ops.fla_api import has_fla
from tests.models.core.interpreted_layers import CHECKS
from tests.models.core.layer_cases import (
    EPS,
    PIECES,
    assert_near,
    kept_bytes,
    narrowed,
    piece_inputs,
    widened,
    with_gradients,
)
from tests.ops.interpreter import assert_script_passes


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("size", [1, 7, 600])
def test_a_piece_is_its_equation(piece, size):
    ours, equation = PIECES[piece]
    inputs = piece_inputs(piece, 2, 5, size)
    assert_near(with_gradients(ours, inputs), with_gradients(equation, inputs), 1e-12)
    if size == 1:  # a norm of one channel has almost no gradient: what is left of it are rounding errors
        return
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)):
        narrow = narrowed(inputs, dtype)
        found = with_gradients(ours, narrow)
        assert {x.dtype for x in found.values()} == {dtype}
        assert_near(found, with_gradients(equation, widened(narrow)), tolerance)


def test_a_norm_with_a_wide_weight_keeps_the_dtype_of_what_it_norms():
    x = torch.randn(3, 8).bfloat16()
    for norm in (RMSNorm(8, eps=EPS), GatedRMSNorm(8, eps=EPS, norm_before_gate=False)):
        assert norm(*([x] if type(norm) is RMSNorm else [x, x])).dtype == torch.bfloat16


def test_modules_have_the_settings_they_were_made_with():
    inputs = narrowed(piece_inputs("norm, silu gate", 4, 8), torch.float64)
    settings = {
        "norm, silu gate": {"norm_before_gate": True},
        "norm, sigmoid gate": {"norm_before_gate": True, "sigmoid": True},
        "silu gate, norm": {"norm_before_gate": False},
    }
    modules = {name: GatedRMSNorm(8, eps=EPS, **options) for name, options in settings.items()}
    for name, module in modules.items():
        with torch.no_grad():
            module.double().weight.copy_(inputs["weight"])
        torch.testing.assert_close(module(inputs["x"], inputs["gate"]), PIECES[name][1](**inputs), rtol=1e-12, atol=0)


def test_float64_and_tensors_on_a_cpu_stay_with_pytorch():
    assert not layers.takes_kernels(torch.zeros(3, 8))
    assert not layers.takes_kernels(torch.zeros(3, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("piece", "per_channel", "per_row"),
    [("norm", 6, 4), ("norm, silu gate", 20, 4), ("norm, sigmoid gate", 16, 4), ("silu gate, norm", 18, 4)],
)
def test_what_pytorch_keeps_is_what_the_module_says(piece, per_channel, per_row):
    inputs = narrowed(piece_inputs(piece, 6, 48), torch.bfloat16)
    assert kept_bytes(PIECES[piece][0], inputs) == 6 * (48 * per_channel + per_row)


def test_what_pytorch_keeps_of_swiglu():
    inputs = narrowed(piece_inputs("swiglu", 6, 48), torch.bfloat16) | {"weight": torch.ones(8, 48).bfloat16()}
    assert kept_bytes(lambda gate, up, weight: F.linear(layers.swiglu(gate, up), weight), inputs) == 6 * 48 * 8


@pytest.mark.skipif(not has_fla(), reason="fla-core or triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/models/core/test_gpu_layers.py runs the compiled kernels")
def test_kernels_in_the_interpreter():
    assert_script_passes("tests.models.core.interpreted_layers", CHECKS)


def test_groups_of_channels_are_normed_each_by_itself():
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(2, 5, 12, dtype=torch.float64, generator=generator) for _ in range(2))
    weight = torch.randn(12, dtype=torch.float64, generator=generator)
    for before in (True, False):
        options = {"eps": 1e-5, "norm_before_gate": before}
        whole = layers.gated_rms_norm(x, gate, weight, **options, num_groups=3)
        parts = [
            layers.gated_rms_norm(*part, **options)
            for part in zip(*(y.split(4, -1) for y in (x, gate, weight)), strict=True)
        ]
        torch.testing.assert_close(whole, torch.cat(parts, dim=-1), rtol=0, atol=1e-14)
        assert not torch.allclose(whole, layers.gated_rms_norm(x, gate, weight, **options))
