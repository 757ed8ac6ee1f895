from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.errors import ConfigError
from statex_dist.ops.gla import gla, gla_decode
from tests.ops.scan_cases import assert_close, borders, gla_inputs, run_with_gradients
from tests.raising import raises


def compare(inputs, *, tolerance=1e-11, chunk_size=64, **options):
    fast = run_with_gradients(gla, inputs, backend="chunked", chunk_size=chunk_size, **options)
    slow = run_with_gradients(gla, inputs, backend="naive", **options)
    assert_close(fast, slow, tolerance)


def first_state(num_sequences, inputs, partners=1, seed=5):
    heads, keys, values = inputs["q"].shape[2], inputs["q"].shape[3], inputs["v"].shape[3]
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(num_sequences, heads, keys, partners * values, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("tokens", [1, 3, 63, 64, 65])
def test_chunked_equals_recurrence_with_every_gradient(tokens):
    inputs = gla_inputs(batch=2, tokens=tokens)
    compare(inputs, initial_state=first_state(2, inputs))
    compare(inputs)


def test_chunked_equals_recurrence_over_many_chunks():
    inputs = gla_inputs(tokens=1000, heads=1, keys=4, values=3)
    compare(inputs, initial_state=first_state(1, inputs), tolerance=1e-10)


@pytest.mark.parametrize("chunk_size", [4, 8, 128])
def test_any_chunk_size_gives_the_same_numbers(chunk_size):
    inputs = gla_inputs(tokens=70)
    compare(inputs, chunk_size=chunk_size, initial_state=first_state(1, inputs))


@pytest.mark.parametrize("chunk_size", [0, 2, 48, -4])
def test_bad_chunk_size_is_refused(chunk_size):
    with raises(ConfigError, "chunk_size", f"from 4, not {chunk_size}"):
        gla(**gla_inputs(tokens=5), backend="chunked", chunk_size=chunk_size)


def test_unknown_backend_is_refused():
    with raises(ConfigError, "fast", "auto", "kernel", "triton", "chunked", "naive"):
        gla(**gla_inputs(tokens=5), backend="fast")


@pytest.mark.parametrize("gate", ["constant:-50", "constant:-200", "constant:0", "bursty"])
@pytest.mark.parametrize("tokens", [65, 130])
def test_strong_gates_are_exact_in_float64(gate, tokens):
    inputs = gla_inputs(tokens=tokens, gate=gate)
    compare(inputs, initial_state=first_state(1, inputs))


@pytest.mark.parametrize(
    ("gate", "tolerance"), [("soft", 2e-5), ("bursty", 2e-4), ("constant:-50", 2e-4), ("constant:-200", 1e-3)]
)
def test_float32_is_close_and_never_overflows(gate, tolerance):
    inputs = gla_inputs(tokens=130, gate=gate, keys=16, values=16)
    narrow = {name: x.float() for name, x in inputs.items()}
    state = first_state(1, inputs)
    fast = run_with_gradients(gla, narrow, backend="chunked", initial_state=state.float())
    slow = run_with_gradients(gla, inputs, backend="naive", initial_state=state)
    assert_close(fast, slow, tolerance)


def test_the_largest_intermediate_exponent_is_never_positive(monkeypatch):
    """The claim of docs/method.md section 3, observed at every exponential that the scan takes."""
    seen = []
    plain_exp = torch.Tensor.exp

    def watched(x):
        seen.append(x.max().item())
        return plain_exp(x)

    monkeypatch.setattr(torch.Tensor, "exp", watched)
    gla(**gla_inputs(tokens=200, gate="bursty"), backend="chunked")
    assert len(seen) >= 5
    assert max(seen) <= 1e-9


def test_bfloat16_inputs_give_bfloat16_outputs_and_fp32_states():
    inputs = gla_inputs(tokens=100, keys=16, values=16)
    rounded = {name: x.bfloat16() for name, x in inputs.items()}
    rounded["g"] = inputs["g"].float()
    expected, expected_state = gla(**{name: x.double() for name, x in rounded.items()}, backend="naive")
    for backend in ("chunked", "naive"):
        out, state = gla(**rounded, backend=backend)
        assert out.dtype == torch.bfloat16
        assert state.dtype == torch.float32
        assert (out.double() - expected).norm() / expected.norm() < 1e-2
        assert (state.double() - expected_state).norm() / expected_state.norm() < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("partners", [1, 2])
def test_step_form_equals_scan_in_every_dtype(dtype, partners):
    inputs = {name: x.to(dtype) for name, x in gla_inputs(batch=2, tokens=9).items()}
    wide = torch.promote_types(dtype, torch.float32)
    inputs["g"] = inputs["g"].to(wide)
    mix = torch.randn(2, partners, generator=torch.Generator().manual_seed(3)).to(dtype) if partners > 1 else None
    expected, expected_state = gla(**inputs, mix=mix, backend="chunked")
    state = torch.zeros(2, 2, 6, 10 * partners, dtype=wide)
    for t in range(9):
        out, state = gla_decode(**{name: x[:, t] for name, x in inputs.items()}, state=state, mix=mix)
        tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        assert out.dtype == dtype
        assert (out - expected[:, t]).abs().max() <= tolerance
    assert state.dtype == wide
    assert (state - expected_state).abs().max() <= {torch.bfloat16: 0.1}.get(dtype, 1e-5)


@pytest.mark.parametrize("backend", ["chunked", "naive"])
def test_no_tokens_leave_the_state_as_it_was(backend):
    inputs = gla_inputs(tokens=0)
    state = first_state(2, inputs)
    out, final = gla(**inputs, initial_state=state, cu_seqlens=borders([0, 0]), backend=backend)
    assert out.shape == (1, 0, 2, 10)
    assert torch.equal(final, state)


class TestPacking:
    lengths = (5, 0, 1, 64, 130, 1, 0, 63)

    def test_packed_equals_recurrence_with_every_gradient(self):
        inputs = gla_inputs(tokens=sum(self.lengths))
        options = {"cu_seqlens": borders(list(self.lengths))}
        compare(inputs, **options)
        compare(inputs, initial_state=first_state(len(self.lengths), inputs), **options)

    def test_packed_equals_documents_run_alone(self):
        inputs = gla_inputs(tokens=sum(self.lengths), seed=2)
        states = first_state(len(self.lengths), inputs)
        cu_seqlens = borders(list(self.lengths))
        out, final = gla(**inputs, initial_state=states, cu_seqlens=cu_seqlens, backend="chunked")
        for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            alone = {name: x[:, start:stop] for name, x in inputs.items()}
            out_i, final_i = gla(**alone, initial_state=states[i : i + 1], backend="naive")
            torch.testing.assert_close(out[:, start:stop], out_i, rtol=0, atol=1e-12)
            torch.testing.assert_close(final[i : i + 1], final_i, rtol=0, atol=1e-12)

    def test_no_gradient_from_one_document_to_another(self):
        inputs = {name: x.requires_grad_() for name, x in gla_inputs(tokens=200).items()}
        out, final = gla(**inputs, cu_seqlens=borders([70, 1, 129]), backend="chunked")
        (out[:, 70:71].square().sum() + final[1].square().sum()).backward()
        for name, x in inputs.items():
            assert x.grad[:, :70].abs().max() == 0, name
            assert x.grad[:, 71:].abs().max() == 0, name
        assert inputs["v"].grad[:, 70].abs().max() > 0

    @settings(max_examples=25, deadline=None)
    @given(
        lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
        chunk_size=st.sampled_from([4, 16, 32]),
        with_state=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def test_any_lengths(self, lengths, chunk_size, with_state, seed):
        inputs = gla_inputs(tokens=sum(lengths), heads=1, keys=3, values=2, seed=seed)
        state = first_state(len(lengths), inputs, seed=seed) if with_state else None
        compare(inputs, chunk_size=chunk_size, cu_seqlens=borders(lengths), initial_state=state)

    @pytest.mark.parametrize("marks", [[0, 5], [1, 10], [0, 6, 4, 10]])
    def test_wrong_borders_are_refused(self, marks):
        with raises(ValueError, "cu_seqlens", "from 0", "tokens 10"):
            gla(**gla_inputs(tokens=10), cu_seqlens=torch.tensor(marks), backend="chunked")

    def test_a_batch_of_packed_rows_is_refused(self):
        with raises(ValueError, "batch of 1", "not 2"):
            gla(**gla_inputs(batch=2, tokens=10), cu_seqlens=torch.tensor([0, 10]), backend="chunked")


@pytest.mark.parametrize("keys", [12, 32])
def test_a_merged_wide_head(keys):
    """StateX's merged head is a plain scan with H = 1; the scale follows the merged key size."""
    inputs = gla_inputs(tokens=100, heads=1, keys=keys, values=40)
    compare(inputs, initial_state=first_state(1, inputs))
    by_default, _ = gla(**inputs, backend="chunked")
    explicit, _ = gla(**inputs, scale=keys**-0.5, backend="chunked")
    assert torch.equal(by_default, explicit)
