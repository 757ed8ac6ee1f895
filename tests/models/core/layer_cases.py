"""The pieces between the scans beside their equations: inputs, gradients, and the bytes that autograd keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from statex_dist.models.core.layers import gated_rms_norm, rms_norm, swiglu
from statex_dist.ops.loss import linear_cross_entropy

EPS = 1e-3
IGNORED = -100


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


PIECES: dict[str, tuple[Callable, Callable]] = {
    "norm": (lambda x, weight: rms_norm(x, weight, eps=EPS), rms),
    "norm, silu gate": (
        lambda x, gate, weight: gated_rms_norm(x, gate, weight, eps=EPS, norm_before_gate=True),
        lambda x, gate, weight: rms(x, weight) * F.silu(gate),
    ),
    "norm, sigmoid gate": (
        lambda x, gate, weight: gated_rms_norm(x, gate, weight, eps=EPS, norm_before_gate=True, sigmoid=True),
        lambda x, gate, weight: rms(x, weight) * gate.sigmoid(),
    ),
    "silu gate, norm": (
        lambda x, gate, weight: gated_rms_norm(x, gate, weight, eps=EPS, norm_before_gate=False),
        lambda x, gate, weight: rms(x * F.silu(gate), weight),
    ),
    "sigmoid gate, norm": (
        lambda x, gate, weight: gated_rms_norm(x, gate, weight, eps=EPS, norm_before_gate=False, sigmoid=True),
        lambda x, gate, weight: rms(x * gate.sigmoid(), weight),
    ),
    "swiglu": (swiglu, lambda gate, up: F.silu(gate) * up),
}
"""Each piece and its equation, by name."""


def piece_inputs(piece: str, *shape: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """float64 inputs ``[..., D]``; the first row is zero, where only ``eps`` keeps a norm finite."""
    rng = torch.Generator().manual_seed(seed)
    names = ("gate", "up") if piece == "swiglu" else ("x", "gate") if "gate" in piece else ("x",)
    inputs = {name: 2 * torch.randn(shape, generator=rng, dtype=torch.float64) for name in names}
    inputs[names[0]].view(-1, shape[-1])[0] = 0
    if piece != "swiglu":
        inputs["weight"] = 1 + 0.5 * torch.randn(shape[-1], generator=rng, dtype=torch.float64)
    return inputs


def loss_inputs(tokens: int, hidden: int, vocab: int, *, ignored: float = 0.3) -> dict[str, torch.Tensor]:
    """float64 hidden states and weight, and targets of which a share is ignored."""
    rng = torch.Generator().manual_seed(tokens)
    targets = torch.randint(0, vocab, (tokens,), generator=rng)
    targets[torch.rand(tokens, generator=rng) < ignored] = IGNORED
    return {
        "hidden": torch.randn(tokens, hidden, generator=rng, dtype=torch.float64),
        "weight": torch.randn(vocab, hidden, generator=rng, dtype=torch.float64) * 2 * hidden**-0.5,
        "targets": targets,
    }


def our_loss(hidden, weight, targets, chunk_tokens):
    return linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORED, chunk_tokens=chunk_tokens)


def oracle_loss(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight), targets, ignore_index=IGNORED, reduction="sum")


def with_gradients(function: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output and the gradient of every floating input under one fixed random loss."""
    inputs = {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    out = function(**inputs)
    rng = torch.Generator().manual_seed(99)
    factors = torch.rand(out.shape, generator=rng, dtype=torch.float64).to(out.device) + 0.1
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    gradients = torch.autograd.grad((out * factors.to(out.dtype)).sum(), list(leaves.values()))
    return {"out": out.detach()} | {f"d_{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def narrowed(inputs: dict[str, torch.Tensor], dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The inputs in ``dtype``, on ``device``."""
    return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


def widened(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values in float64, for the equation."""
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def assert_near(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compare by relative L2 error; NaN and inf fail."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name].double()
        assert got.shape == want.shape, name
        assert torch.isfinite(got).all(), f"{name} is not finite"
        error = ((got - want).norm() / want.norm().clamp(min=1e-30)).item()
        assert error < tolerance, f"{name}: relative error {error:.3g}"


def kept_bytes(function: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that autograd keeps of a call, without what belongs to a weight (one row, or a matrix that is an input)."""
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    apart = {x.untyped_storage().data_ptr() for name, x in inputs.items() if name == "weight"}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in apart:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(**inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
