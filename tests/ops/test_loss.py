"""The chunked loss against PyTorch's cross entropy of all logits, and the memory that it uses."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from statex_dist.ops.loss import linear_cross_entropy
from tests.models.core.layer_cases import (
    IGNORED,
    assert_near,
    loss_inputs,
    narrowed,
    oracle_loss,
    our_loss,
    widened,
    with_gradients,
)
from tests.raising import raises

TOKENS, HIDDEN, VOCAB = 90, 8, 257


class Seen(TorchDispatchMode):
    """The most elements of any tensor that is made, and the matrix products that are run."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor))])
        return made


@pytest.mark.parametrize("chunk", [0, 1, 7, 16, 90, 1000])
def test_loss_and_gradients_are_those_of_all_logits(chunk):
    inputs = loss_inputs(TOKENS, HIDDEN, VOCAB)
    inputs["targets"][14:40] = IGNORED  # whole chunks of 7 and of 16 without a target
    wanted = with_gradients(oracle_loss, inputs)
    assert_near(with_gradients(lambda **x: our_loss(**x, chunk_tokens=chunk), inputs), wanted, 1e-12)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        narrow = narrowed(inputs, dtype)
        found = with_gradients(lambda **x: our_loss(**x, chunk_tokens=chunk), narrow)
        assert (found["out"].dtype, found["d_hidden"].dtype, found["d_weight"].dtype) == (torch.float32, dtype, dtype)
        assert_near(found, with_gradients(oracle_loss, widened(narrow)), tolerance)


def test_the_weights_gradient_is_summed_in_fp32():
    """Of many chunks in bf16: no further from the truth than of one."""
    inputs = narrowed(loss_inputs(2048, HIDDEN, 40, ignored=0.0), torch.bfloat16)
    wanted = with_gradients(oracle_loss, widened(inputs))["d_weight"]
    errors = []
    for chunk in (0, 4):
        found = with_gradients(lambda chunk=chunk, **x: our_loss(**x, chunk_tokens=chunk), inputs)["d_weight"]
        errors.append(((found.double() - wanted).norm() / wanted.norm()).item())
    assert errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("chunk", [0, 16])
def test_without_any_target_all_is_zero(chunk):
    inputs = loss_inputs(TOKENS, HIDDEN, VOCAB, ignored=1.1)
    found = with_gradients(lambda **x: our_loss(**x, chunk_tokens=chunk), inputs)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found.values())
    assert our_loss(torch.zeros(0, 4), torch.zeros(5, 4), torch.zeros(0, dtype=torch.int64), chunk).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_has_more_than_a_chunks_logits(dtype):
    inputs = {name: x.requires_grad_(x.is_floating_point()) for name, x in loss_inputs(TOKENS, HIDDEN, VOCAB).items()}
    inputs = narrowed(inputs, dtype)
    for chunk, most in ((16, 16 * VOCAB), (0, TOKENS * VOCAB)):
        with Seen() as seen:
            our_loss(**inputs, chunk_tokens=chunk).backward()
        assert seen.largest == most


def test_only_what_is_asked_for_is_computed():
    inputs = loss_inputs(TOKENS, HIDDEN, VOCAB)
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    chunks = 6

    def products(*tensors) -> int:
        with Seen() as seen:
            our_loss(*tensors, inputs["targets"], 16)
        return seen.products

    assert products(hidden, weight) == 3 * chunks
    assert products(hidden, weight.detach()) == 2 * chunks
    assert products(hidden.detach(), weight) == 2 * chunks
    with torch.no_grad():
        assert products(hidden, weight) == chunks
        loss = our_loss(hidden, weight, inputs["targets"], 16)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, oracle_loss(**inputs).detach(), rtol=1e-12, atol=0)


def test_a_second_backward_pass_has_the_same_gradients():
    inputs = loss_inputs(TOKENS, HIDDEN, VOCAB)
    leaves = [inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()]
    loss = our_loss(*leaves, inputs["targets"], 16) / 70
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True))


def test_under_autocast_the_products_run_in_its_dtype():
    inputs = narrowed(loss_inputs(TOKENS, HIDDEN, VOCAB), torch.float32)
    leaves = [inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = our_loss(*leaves, inputs["targets"], 16)
    gradients = torch.autograd.grad(loss, leaves)
    assert {x.dtype for x in (loss, *gradients)} == {torch.float32}
    wanted = torch.autograd.grad(oracle_loss(**inputs), leaves)
    for found, want in zip(gradients, wanted, strict=True):
        assert_near({"d": found}, {"d": want}, 1e-2)


def test_a_target_beyond_the_vocabulary_is_an_error():
    with raises(IndexError, "Target 5"):
        linear_cross_entropy(torch.zeros(1, 4), torch.zeros(5, 4), torch.tensor([5]), ignore_index=IGNORED)
