"""Compiled norms, SwiGLU and loss at training sizes against the equations in float64, on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from statex_dist.models.core import layers
from statex_dist.ops.fla_api import has_fla
from tests.models.core.layer_cases import (
    IGNORED,
    PIECES,
    assert_near,
    loss_inputs,
    narrowed,
    oracle_loss,
    our_loss,
    piece_inputs,
    widened,
    with_gradients,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not has_fla(), reason="fla-core is not installed"),
]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
"""Relative L2 error: sums of thousands of terms in fp32, and one rounding to bf16 (of a product's gradient, two)."""
TOKENS, HIDDEN, VOCAB = 4100, 2048, 32000


@pytest.fixture(autouse=True)
def full_fp32_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, TOKENS, 4, 512), (1, TOKENS, 2048), (1, TOKENS, 5632)], ids=str)
@pytest.mark.parametrize("piece", [name for name in PIECES if name != "sigmoid gate, norm"])
def test_piece(piece, shape, dtype):
    ours, equation = PIECES[piece]
    inputs = narrowed(piece_inputs(piece, *shape), dtype, "cuda")
    assert layers.takes_kernels(next(iter(inputs.values())))
    actual = with_gradients(ours, inputs)
    assert actual["out"].dtype == dtype
    assert_near(actual, with_gradients(equation, widened(inputs)), TOLERANCE[dtype])


@pytest.mark.parametrize("piece", ["norm, silu gate", "silu gate, norm", "swiglu"])
def test_a_gate_that_is_a_slice_of_wider_rows(piece):
    inputs = narrowed(piece_inputs(piece, 1, 300, 768), torch.bfloat16, "cuda")
    wide = {name: torch.cat([x, x], -1) for name, x in inputs.items() if x.dim() > 1}
    sliced = inputs | {name: x[..., 768:] for name, x in wide.items()}
    ours = PIECES[piece][0]
    assert torch.equal(ours(**sliced), ours(**inputs))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("vocab", [VOCAB, 50257, 131072 + 3])
def test_loss(vocab, dtype):
    inputs = narrowed(loss_inputs(TOKENS, 512, vocab), dtype, "cuda")
    actual = with_gradients(lambda **x: our_loss(**x, chunk_tokens=1024), inputs)
    assert (actual["out"].dtype, actual["d_weight"].dtype) == (torch.float32, dtype)
    expected = with_gradients(oracle_loss, widened(inputs))
    assert_near(actual, expected, {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}[dtype])


def test_without_any_target_all_is_zero():
    inputs = narrowed(loss_inputs(TOKENS, HIDDEN, VOCAB, ignored=1.1), torch.bfloat16, "cuda")
    found = with_gradients(lambda **x: our_loss(**x, chunk_tokens=1024), inputs)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found.values())


def test_the_losss_memory_does_not_grow_with_the_vocabulary_times_the_length():
    """The most bytes above the inputs: a chunk's logits and the gradients; all logits would be more."""
    tokens, chunk = 32768, 2048
    rng = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, device="cuda", generator=rng).bfloat16().requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, device="cuda", generator=rng).bfloat16().mul_(HIDDEN**-0.5).requires_grad_()
    targets = torch.randint(0, VOCAB, (tokens,), device="cuda", generator=rng)
    targets[::7] = IGNORED
    our_loss(hidden[:chunk], weight, targets[:chunk], chunk).backward()  # compiles, and cuBLAS takes its workspace
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    our_loss(hidden, weight, targets, chunk).backward()
    peak = torch.cuda.max_memory_allocated() - before
    logits, head = 2 * chunk * VOCAB, VOCAB * HIDDEN
    # Forward: logits, the gradient of hidden, that of the weight in fp32 and its next summand. Backward: both
    # gradients, and both scaled.
    forward = logits + 2 * tokens * HIDDEN + 8 * head
    backward = 4 * tokens * HIDDEN + 6 * head
    assert peak < max(forward, backward) + (16 << 20)
    assert peak < tokens * VOCAB * 2


@torch.no_grad()
def test_evaluation_holds_a_chunks_logits_alone():
    tokens, chunk = 16384, 1024
    hidden = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    weight = torch.randn(VOCAB, HIDDEN, device="cuda").bfloat16().requires_grad_()
    targets = torch.randint(0, VOCAB, (tokens,), device="cuda")
    our_loss(hidden[:chunk], weight, targets[:chunk], chunk)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    our_loss(hidden, weight, targets, chunk)
    assert torch.cuda.max_memory_allocated() - before < 2 * chunk * VOCAB + (16 << 20)
