from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.ops.ssd import ssd, ssd_decode
from tests.ops.scan_cases import assert_close, borders, run_with_gradients, ssd_inputs


def compare(inputs, *, tolerance=1e-11, chunk_size=64, **options):
    fast = run_with_gradients(ssd, inputs, backend="chunked", chunk_size=chunk_size, **options)
    slow = run_with_gradients(ssd, inputs, backend="naive", **options)
    assert_close(fast, slow, tolerance)


def first_state(num_sequences, inputs, seed=5):
    heads, head_dim = inputs["x"].shape[2:]
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(num_sequences, heads, head_dim, inputs["B"].shape[3], generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 3, 63, 64, 65])
def test_chunked_equals_recurrence_with_every_gradient(tokens, groups):
    inputs = ssd_inputs(batch=2, tokens=tokens, groups=groups)
    compare(inputs, initial_state=first_state(2, inputs))
    compare(inputs, D=torch.linspace(-1, 1, 4, dtype=torch.float64))


def test_chunked_equals_recurrence_over_many_chunks():
    inputs = ssd_inputs(tokens=1000, heads=2, groups=1)
    compare(inputs, initial_state=first_state(1, inputs))


def test_groups_are_shared_by_neighbouring_heads():
    """Head h reads group h // (H / G), as in in_proj's row order."""
    inputs = ssd_inputs(tokens=20)
    whole, _ = ssd(**inputs, backend="chunked")
    for h in range(4):
        alone = {
            "x": inputs["x"][:, :, [h]],
            "dt": inputs["dt"][:, :, [h]],
            "A": inputs["A"][[h]],
            "B": inputs["B"][:, :, [h // 2]],
            "C": inputs["C"][:, :, [h // 2]],
        }
        out, _ = ssd(**alone, backend="naive")
        torch.testing.assert_close(whole[:, :, [h]], out, rtol=0, atol=1e-12)


def test_output_is_the_explicit_sum():
    """``y_t = sum_{u <= t} exp(A sum_{u < w <= t} dt_w) dt_u (C_t B_u) x_u + D x_t``, written out."""
    inputs = ssd_inputs(tokens=17, heads=1, groups=1)
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    expected = torch.zeros_like(x)
    for t in range(17):
        for u in range(t + 1):
            decay = (A * dt[:, u + 1 : t + 1].sum(1)).exp()
            expected[:, t] += (decay * dt[:, u] * (C[:, t, 0] * B[:, u, 0]).sum(-1, keepdim=True)).unsqueeze(-1) * x[
                :, u
            ]
        expected[:, t] += 0.5 * x[:, t]
    out, _ = ssd(**inputs, D=torch.tensor([0.5]), backend="chunked", chunk_size=8)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strength", [50.0, 500.0])
def test_strong_decay_is_exact(strength):
    inputs = ssd_inputs(tokens=130)
    inputs["A"] = inputs["A"] * 0 - strength
    compare(inputs, initial_state=first_state(1, inputs), tolerance=1e-10)


def test_float32_is_close():
    inputs = ssd_inputs(tokens=200, head_dim=8, state=16)
    fast = run_with_gradients(ssd, {name: x.float() for name, x in inputs.items()}, backend="chunked")
    assert_close(fast, run_with_gradients(ssd, inputs, backend="naive"), 2e-5)


def test_bfloat16_inputs_give_bfloat16_outputs_and_fp32_states():
    inputs = ssd_inputs(tokens=100, head_dim=8, state=16)
    rounded = {name: x.float() if name in ("dt", "A") else x.bfloat16() for name, x in inputs.items()}
    expected, expected_state = ssd(**{name: x.double() for name, x in rounded.items()}, backend="naive")
    for backend in ("chunked", "naive"):
        out, state = ssd(**rounded, backend=backend)
        assert out.dtype == torch.bfloat16
        assert state.dtype == torch.float32
        assert (out.double() - expected).norm() / expected.norm() < 1e-2
        assert (state.double() - expected_state).norm() / expected_state.norm() < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_step_form_equals_scan_in_every_dtype(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {name: x.to(wide if name in ("dt", "A") else dtype) for name, x in ssd_inputs(batch=2, tokens=9).items()}
    D = torch.linspace(-1, 1, 4).to(dtype)
    expected, expected_state = ssd(**inputs, D=D, backend="chunked")
    state = torch.zeros(2, 4, 3, 5, dtype=wide)
    tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for t in range(9):
        step = {name: x if name == "A" else x[:, t] for name, x in inputs.items()}
        out, state = ssd_decode(**step, state=state, D=D)
        assert out.dtype == dtype
        assert (out - expected[:, t]).abs().max() <= tolerance
    assert state.dtype == wide
    assert (state - expected_state).abs().max() <= tolerance


@pytest.mark.parametrize("factor", [2, 4])
def test_unread_state_rows_change_nothing(factor):
    """d_state growth: new B rows are written, but zero C rows do not read them; old rows keep their state."""
    inputs = ssd_inputs(tokens=90)
    added = ssd_inputs(tokens=90, state=5 * (factor - 1), seed=9)
    grown = dict(inputs)
    grown["B"] = torch.cat([inputs["B"], added["B"]], dim=-1)
    grown["C"] = torch.cat([inputs["C"], torch.zeros_like(added["C"])], dim=-1)
    out, state = ssd(**inputs, backend="chunked")
    out_grown, state_grown = ssd(**grown, backend="chunked")
    torch.testing.assert_close(out_grown, out, rtol=0, atol=1e-13)
    torch.testing.assert_close(state_grown[..., :5], state, rtol=0, atol=1e-13)
    compare(grown, initial_state=first_state(1, grown))


class TestPacking:
    lengths = (5, 0, 1, 64, 130, 1, 0, 63)

    def test_packed_equals_recurrence_with_every_gradient(self):
        inputs = ssd_inputs(tokens=sum(self.lengths))
        options = {"cu_seqlens": borders(list(self.lengths))}
        compare(inputs, **options)
        compare(inputs, initial_state=first_state(len(self.lengths), inputs), **options)

    def test_no_gradient_from_one_document_to_another(self):
        inputs = {name: x.requires_grad_() for name, x in ssd_inputs(tokens=200).items()}
        out, final = ssd(**inputs, cu_seqlens=borders([70, 1, 129]), backend="chunked")
        (out[:, 70:71].square().sum() + final[1].square().sum()).backward()
        for name in ("x", "dt", "B", "C"):
            grad = inputs[name].grad
            assert grad[:, :70].abs().max() == 0, name
            assert grad[:, 71:].abs().max() == 0, name
        assert inputs["x"].grad[:, 70].abs().max() > 0

    @settings(max_examples=25, deadline=None)
    @given(
        lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
        chunk_size=st.sampled_from([4, 16, 32]),
        with_state=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def test_any_lengths(self, lengths, chunk_size, with_state, seed):
        inputs = ssd_inputs(tokens=sum(lengths), heads=2, groups=1, head_dim=2, state=3, seed=seed)
        state = first_state(len(lengths), inputs, seed=seed) if with_state else None
        compare(inputs, chunk_size=chunk_size, cu_seqlens=borders(lengths), initial_state=state)


def test_auto_on_a_cpu_takes_the_chunked_form():
    """Also where mamba_ssm is installed."""
    inputs = {name: x.float() for name, x in ssd_inputs(tokens=10).items()} | {"cu_seqlens": borders([4, 6])}
    out, state = ssd(**inputs, output_final_state=False)
    assert state is None
    assert torch.equal(out, ssd(**inputs, backend="chunked")[0])
