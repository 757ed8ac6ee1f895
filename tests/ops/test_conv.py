from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.ops.conv import causal_conv, conv_tail
from tests.ops.scan_cases import borders

CHANNELS = 3


def reference(x, weight, bias=None):
    """torch's own grouped convolution of one document ``[1, T, D]``, padded on the left."""
    padded = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
    return F.conv1d(padded, weight, bias, groups=weight.shape[0]).transpose(1, 2)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_torch_with_gradients(tokens, width, with_bias):
    leaves = [draw(2, tokens, CHANNELS), draw(CHANNELS, 1, width, seed=1)]
    if with_bias:
        leaves.append(draw(CHANNELS, seed=2))
    leaves = [x.requires_grad_() for x in leaves]
    ours, theirs = causal_conv(*leaves), reference(*leaves)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    probe = draw(*ours.shape, seed=3)
    for a, b in zip(
        torch.autograd.grad((ours * probe).sum(), leaves),
        torch.autograd.grad((theirs * probe).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), width=st.integers(2, 4), seed=st.integers(0, 99))
def test_packed_equals_torch_per_document(lengths, width, seed):
    x, weight, bias = draw(1, sum(lengths), CHANNELS, seed=seed), draw(CHANNELS, 1, width), draw(CHANNELS)
    states = draw(len(lengths), CHANNELS, width - 1, seed=seed + 1)
    cu_seqlens = borders(lengths)
    plain = causal_conv(x, weight, bias, cu_seqlens=cu_seqlens)
    continued = causal_conv(x, weight, bias, cu_seqlens=cu_seqlens, initial_state=states)
    tails = conv_tail(x, width, cu_seqlens=cu_seqlens, initial_state=states)
    for i, (document, plain_i, continued_i) in enumerate(
        zip(x.split(lengths, 1), plain.split(lengths, 1), continued.split(lengths, 1), strict=True)
    ):
        whole = torch.cat([states[i : i + 1].transpose(1, 2), document], dim=1)
        if lengths[i]:
            torch.testing.assert_close(plain_i, reference(document, weight, bias), rtol=0, atol=1e-13)
            expected = reference(whole, weight, bias)[:, width - 1 :]
            torch.testing.assert_close(continued_i, expected, rtol=0, atol=1e-13)
        assert torch.equal(tails[i], whole[0, -(width - 1) :].T)


@pytest.mark.parametrize("cuts", [[1] * 12, [5, 7], [1, 2, 9], [3, 3, 3, 3]])
def test_tails_carry_over_segments(cuts):
    x, weight, bias = draw(2, 12, CHANNELS), draw(CHANNELS, 1, 4), draw(CHANNELS)
    tail, outs = None, []
    for segment in x.split(cuts, dim=1):
        outs.append(causal_conv(segment, weight, bias, initial_state=tail))
        tail = conv_tail(segment, 4, initial_state=tail)
    torch.testing.assert_close(torch.cat(outs, dim=1), reference(x, weight, bias), rtol=0, atol=1e-13)
    assert torch.equal(tail, x[:, -3:].transpose(1, 2))


def test_gradient_reaches_the_initial_tail_and_no_other_document():
    x = draw(1, 8, CHANNELS).requires_grad_()
    states = draw(2, CHANNELS, 3).requires_grad_()
    out = causal_conv(x, draw(CHANNELS, 1, 4), cu_seqlens=borders([5, 3]), initial_state=states)
    out[:, 5:].square().sum().backward()
    assert x.grad[:, :5].abs().max() == 0
    assert states.grad[0].abs().max() == 0
    assert (states.grad[1].abs() > 0).all()


def test_the_tail_is_a_copy_of_inputs_and_keeps_bf16():
    x = draw(1, 6, CHANNELS).bfloat16()
    assert conv_tail(x, 4).dtype == torch.bfloat16
    assert causal_conv(x, draw(CHANNELS, 1, 4), initial_state=conv_tail(x, 4)).dtype == torch.bfloat16
