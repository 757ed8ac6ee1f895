"""Run fla-core's norms, SwiGLU and cross entropy in Triton's interpreter beside their equations: a test's subprocess.

The predicate that looks for a GPU is replaced by one that takes the kernels for every fp32 and bf16 tensor; there is no
driver to measure with, so the first tuning choice is taken.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from statex_dist.models.core import layers
from statex_dist.ops import loss
from tests.models.core.layer_cases import (
    IGNORED,
    PIECES,
    assert_near,
    kept_bytes,
    loss_inputs,
    narrowed,
    oracle_loss,
    our_loss,
    piece_inputs,
    widened,
    with_gradients,
)
from tests.ops.interpreter import enter_interpreter

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
KERNEL_PIECES = [name for name in PIECES if name != "sigmoid gate, norm"]
SHAPES = [(2, 17, 48), (1, 3, 2, 130), (5, 700), (2, 2048)]
"""Rows in blocks up to 512 channels, one by one above."""

KEPT = {"norm": (2, 4), "norm, silu gate": (4, 4), "norm, sigmoid gate": (4, 4), "silu gate, norm": (4, 4)}
"""Bytes of bf16 that the kernels keep, per channel and per row."""

calls: dict[str, int] = {}


def counting(name, function):
    """The function, its calls counted: a piece that quietly took the PyTorch form would prove nothing."""

    def counted(*args, **options):
        calls[name] = calls.get(name, 0) + 1
        if options.get("gradient"):
            calls["gradients"] = calls.get("gradients", 0) + 1
        return function(*args, **options)

    return counted


def force_kernels() -> None:
    enter_interpreter()
    layers.takes_kernels = loss.takes_kernels = lambda x: x.dtype != torch.float64 and x.numel() > 0
    for module, names in (
        (layers, ("fla_rms_norm", "fla_gated_rms_norm", "fla_swiglu")),
        (loss, ("fla_cross_entropy_",)),
    ):
        for name in names:
            setattr(module, name, counting(name, getattr(module, name)))


def check_pieces() -> None:
    for piece in KERNEL_PIECES:
        ours, equation = PIECES[piece]
        for shape in SHAPES:
            for dtype, tolerance in TOLERANCE.items():
                inputs = narrowed(piece_inputs(piece, *shape), dtype)
                before = sum(calls.values())
                actual = with_gradients(ours, inputs)
                assert sum(calls.values()) == before + 1, "the PyTorch form ran"
                assert actual["out"].dtype == dtype
                assert_near(actual, with_gradients(equation, widened(inputs)), tolerance)
        if piece != "swiglu":  # a weight in fp32 beside activations in bf16
            inputs = narrowed(piece_inputs(piece, 5, 48), torch.bfloat16)
            inputs["weight"] = inputs["weight"].float()
            actual = with_gradients(ours, inputs)
            assert (actual["out"].dtype, actual["d_weight"].dtype) == (torch.bfloat16, torch.float32)
            assert_near(actual, with_gradients(equation, widened(inputs)), TOLERANCE[torch.bfloat16])
        print(f"ok {piece}", flush=True)  # noqa: T201


def check_fallbacks() -> None:
    """Check the cases that PyTorch takes over from the kernels: a row too wide, a gate without a kernel, no rows."""
    before = dict(calls)
    for piece, shape in (("norm", (2, 16385)), ("norm, silu gate", (2, 16385)), ("sigmoid gate, norm", (4, 48))):
        ours, equation = PIECES[piece]
        inputs = narrowed(piece_inputs(piece, *shape), torch.float32)
        assert_near(with_gradients(ours, inputs), with_gradients(equation, widened(inputs)), TOLERANCE[torch.float32])
    assert layers.rms_norm(torch.zeros(0, 8), torch.ones(8), eps=1e-5).shape == (0, 8)
    assert calls == before
    print("ok fallbacks", flush=True)  # noqa: T201


def check_kept_bytes() -> None:
    rows, channels = 6, 48
    for piece, (per_channel, per_row) in KEPT.items():
        inputs = narrowed(piece_inputs(piece, rows, channels), torch.bfloat16)
        assert kept_bytes(PIECES[piece][0], inputs) == rows * (per_channel * channels + per_row), piece
    inputs = narrowed(piece_inputs("swiglu", rows, channels), torch.bfloat16) | {
        "weight": torch.ones(8, channels).bfloat16()
    }
    assert kept_bytes(lambda gate, up, weight: F.linear(layers.swiglu(gate, up), weight), inputs) == rows * 6 * channels
    print("ok kept bytes", flush=True)  # noqa: T201


def check_loss() -> None:
    for sizes, chunk in (((41, 24, 97), 16), ((20, 16, 300), 0), ((3, 8, 50), 1)):
        for dtype, tolerance in TOLERANCE.items():
            inputs = narrowed(loss_inputs(*sizes), dtype)
            before = calls.get("fla_cross_entropy_", 0)
            actual = with_gradients(lambda chunk=chunk, **x: our_loss(**x, chunk_tokens=chunk), inputs)
            assert calls["fla_cross_entropy_"] - before == -(-sizes[0] // (chunk or sizes[0]))
            assert (actual["out"].dtype, actual["d_weight"].dtype) == (torch.float32, dtype)
            assert_near(actual, with_gradients(oracle_loss, widened(inputs)), tolerance)
    inputs = narrowed(loss_inputs(20, 16, 50), torch.float32)
    inputs["targets"][:] = IGNORED
    nothing = with_gradients(lambda **x: our_loss(**x, chunk_tokens=8), inputs)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in nothing.values())
    print("ok loss", flush=True)  # noqa: T201


def check_loss_without_gradient() -> None:
    """Check that evaluation, and a frozen head, compute no gradient that they do not need."""
    inputs, before = narrowed(loss_inputs(20, 16, 50), torch.float32), calls["gradients"]
    with torch.no_grad():
        value = our_loss(
            **{name: x.requires_grad_(x.is_floating_point()) for name, x in inputs.items()}, chunk_tokens=8
        )
    assert not value.requires_grad
    assert calls["gradients"] == before
    assert_near({"out": value}, {"out": oracle_loss(**widened(inputs)).detach()}, 2e-6)
    frozen = inputs | {"weight": inputs["weight"].detach()}
    (ours,) = torch.autograd.grad(our_loss(**frozen, chunk_tokens=8), [frozen["hidden"]])
    (wanted,) = torch.autograd.grad(oracle_loss(**frozen), [frozen["hidden"]])
    assert_near({"d": ours}, {"d": wanted.double()}, 2e-6)
    print("ok loss without gradient", flush=True)  # noqa: T201


CHECKS = [*KERNEL_PIECES, "fallbacks", "kept bytes", "loss", "loss without gradient"]


def main() -> None:
    force_kernels()
    check_pieces()
    check_fallbacks()
    check_kept_bytes()
    check_loss()
    check_loss_without_gradient()


if __name__ == "__main__":
    main()
