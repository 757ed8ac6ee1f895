from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.ops.conv import convolve_sequences, dispatch
from statex_dist.ops.conv.causal_conv1d_api import cuda_causal_conv, fits_causal_conv1d
from statex_dist.ops.conv.torch_forms import causal_conv, conv_tail
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


class CausalConv1dStandIn:
    """causal-conv1d's entry: its compiled kernel's demands as assertions, and torch's convolution."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
        self.calls += 1
        batch, channels, tokens = x.shape
        width = weight.shape[1]
        assert channels % 8 == 0
        assert 2 <= width <= 4
        self.check_layout(x)
        assert weight.shape == (channels, width)
        assert bias is None or bias.dtype == weight.dtype
        if seq_idx is not None:
            assert initial_states is None
            assert seq_idx.dtype == torch.int32
            assert seq_idx.shape == (batch, tokens)
            assert seq_idx.is_contiguous()
        before = x.new_zeros(batch, channels, width - 1)
        if initial_states is not None:
            assert initial_states.shape == before.shape
            assert initial_states.dtype == x.dtype
            assert initial_states.stride(1) == 1
            before = initial_states
        lengths = [tokens] if seq_idx is None else seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
        out = torch.cat(
            [
                F.conv1d(torch.cat([before, y], -1), weight[:, None], bias, groups=channels)
                for y in x.split(lengths, -1)
            ],
            dim=-1,
        )
        # The kernel's output has the layout of its input.
        out = (out if activation is None else F.silu(out)).transpose(1, 2).contiguous().transpose(1, 2)
        if out.requires_grad:
            out.register_hook(self.check_layout)
        return out

    @staticmethod
    def check_layout(x):
        """Channels side by side, rows of tokens at multiples of 16 bytes."""
        assert x.stride(1) == 1
        assert x.stride(0) % 8 == 0
        assert x.stride(2) % 8 == 0
        assert x.data_ptr() % 16 == 0


class TestCausalConv1d:
    """The arguments of the compiled kernel, which runs on GPUs alone (tests/ops/test_gpu_kernels.py)."""

    @pytest.fixture
    def kernel(self, monkeypatch):
        stand_in = CausalConv1dStandIn()
        monkeypatch.setitem(sys.modules, "causal_conv1d", SimpleNamespace(causal_conv1d_fn=stand_in))
        return stand_in

    def compare(self, x, weight, bias, *, silu, cu_seqlens=None, seq_idx=None, initial_state=None):
        tensors = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
        leaves = {name: y.detach().float().requires_grad_() for name, y in tensors.items() if y is not None}
        wide = {name: y.detach().double().requires_grad_() for name, y in leaves.items()}
        x_here = F.pad(leaves["x"], (3, 2))[..., 3:-2] if x.shape[1] > 1 else leaves["x"]  # a row of an odd length
        ours = causal_conv(**wide, cu_seqlens=cu_seqlens)
        ours = F.silu(ours) if silu else ours
        theirs = cuda_causal_conv(**leaves | {"x": x_here}, seq_idx=seq_idx, silu=silu)
        torch.testing.assert_close(theirs.double(), ours, rtol=0, atol=1e-5)
        probe = draw(*ours.shape, seed=3)
        for a, b in zip(
            # The gradient comes as a slice of a wider row.
            torch.autograd.grad(
                (torch.cat([theirs[..., :1].detach(), theirs], -1)[..., 1:] * probe).sum(), leaves.values()
            ),
            torch.autograd.grad((ours * probe).sum(), wide.values()),
            strict=True,
        ):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("width", [2, 4])
    @pytest.mark.parametrize("tokens", [1, 2, 9])
    @pytest.mark.parametrize("silu", [True, False])
    def test_batch_with_state(self, kernel, tokens, width, silu):
        state = draw(2, 16, width - 1, seed=4)
        self.compare(draw(2, tokens, 16), draw(16, 1, width), draw(16), silu=silu, initial_state=state)
        self.compare(draw(1, tokens, 16), draw(16, 1, width), None, silu=silu)
        assert kernel.calls == 2

    def test_packed(self, kernel):
        lengths = [5, 1, 3]
        seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).int()[None]
        options = {"cu_seqlens": borders(lengths), "seq_idx": seq_idx}
        self.compare(draw(1, 9, 16), draw(16, 1, 4), draw(16), silu=True, **options)

    def test_one_row_of_a_slice_is_aligned(self, kernel):
        """torch calls it contiguous whatever its strides are, as they lead nowhere."""
        x = draw(1, 1, 30).float()[..., 3:19]
        assert x.is_contiguous()
        cuda_causal_conv(x, draw(16, 1, 4).float(), draw(16).float().requires_grad_())

    @pytest.mark.parametrize(
        ("changes", "fits"),
        [
            ({}, True),
            ({"initial_state": torch.zeros(1, 16, 3)}, True),
            ({"cu_seqlens": borders([4, 5])}, True),
            ({"initial_state": torch.zeros(2, 16, 3), "cu_seqlens": borders([4, 5])}, False),
            ({"weight": torch.zeros(16, 1, 5)}, False),
            ({"weight": torch.zeros(12, 1, 4), "x": torch.zeros(1, 9, 12)}, False),
            ({"x": torch.zeros(1, 9, 16, dtype=torch.float64)}, False),
            ({"x": torch.empty(1, 2**27, 16, device="meta")}, False),
            ({"x": torch.empty(1, 2**27 - 1, 16, device="meta")}, True),
            ({"x": torch.empty(1, 2**26, 32, device="meta")[..., :16]}, False),
        ],
    )
    def test_which_cases_fit(self, changes, fits):
        case = {"x": torch.zeros(1, 9, 16), "weight": torch.zeros(16, 1, 4), "initial_state": None, "cu_seqlens": None}
        assert fits_causal_conv1d(**case | changes) is fits


@pytest.mark.parametrize("silu", [True, False])
def test_a_cpu_takes_our_own_form(monkeypatch, silu):
    """Whatever is installed, and to the bit."""
    for name in ("has_causal_conv1d", "has_fla"):
        monkeypatch.setattr(dispatch, name, lambda: True)
    x, weight, cu_seqlens = draw(1, 9, 16).float(), draw(16, 1, 4).float(), borders([4, 5])
    out, _ = convolve_sequences(x, weight, cu_seqlens=cu_seqlens, silu=silu)
    expected = causal_conv(x, weight, cu_seqlens=cu_seqlens)
    assert torch.equal(out, F.silu(expected) if silu else expected)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_one_token_behind_a_tail_is_the_last_of_the_whole(width, silu):
    x, weight, bias = draw(3, 9, CHANNELS), draw(CHANNELS, 1, width, seed=1), draw(CHANNELS, seed=2)
    options = {"output_tail": True, "silu": silu}
    whole, tail = convolve_sequences(x, weight, bias, tail=draw(3, CHANNELS, width - 1, seed=3), **options)
    _, before = convolve_sequences(x[:, :8], weight, bias, tail=draw(3, CHANNELS, width - 1, seed=3), **options)
    last, after = convolve_sequences(x[:, 8:], weight, bias, tail=before, **options)
    torch.testing.assert_close(last, whole[:, 8:], rtol=0, atol=1e-13)
    assert torch.equal(after, tail)
    torch.testing.assert_close(after, x[:, 9 - (width - 1) :].transpose(1, 2), rtol=0, atol=0)
