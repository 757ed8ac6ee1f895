"""The gated delta rule: chunked against the recurrence, the recurrence against matrices and other people's code."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from statex_dist.errors import ConfigError
from statex_dist.ops import backends, fla_api
from statex_dist.ops.delta_rule import delta_decode, delta_rule, dispatch
from statex_dist.ops.delta_rule.torch_forms import naive_delta_rule
from tests.ops.scan_cases import assert_close, borders, run_with_gradients
from tests.raising import raises

KEYS, VALUES = 5, 7
DECAYS = ("scalar", "channel")
every_decay = pytest.mark.parametrize("decay", DECAYS)


def delta_inputs(
    *,
    decay: str,
    tokens: int,
    batch: int = 1,
    heads: int = 2,
    value_heads: int = 4,
    keys: int = KEYS,
    values: int = VALUES,
    gate: str = "soft",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """float64 inputs with normalised keys and strengths up to 2; ``gate`` is soft, constant:G or bursty."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    g = draw(batch, tokens, value_heads, keys if decay == "channel" else 1)
    if gate == "soft":
        g = F.logsigmoid(g) / 4
    elif gate == "bursty":
        g = torch.where(torch.rand(g.shape, generator=rng) < 0.125, (-25.0 * g.abs()).clamp(min=-50), -1e-3 * g.abs())
    else:
        g = torch.full_like(g, float(gate.removeprefix("constant:")))
    return {
        "q": F.normalize(draw(batch, tokens, heads, keys), dim=-1),
        "k": F.normalize(draw(batch, tokens, heads, keys), dim=-1),
        "v": draw(batch, tokens, value_heads, values),
        "g": g,
        "beta": 2 * torch.sigmoid(draw(batch, tokens, value_heads)),
    }


def first_state(num_sequences: int, inputs: dict[str, torch.Tensor], partners: int = 1) -> torch.Tensor:
    rng = torch.Generator().manual_seed(5)
    heads, values, keys = *inputs["v"].shape[2:], inputs["q"].shape[3]
    return torch.randn(num_sequences, heads, keys, partners * values, generator=rng, dtype=torch.float64)


def random_mix(heads: int, partners: int) -> torch.Tensor:
    return torch.randn(heads, partners, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def identity_mix(heads: int, partners: int) -> torch.Tensor:
    mix = torch.zeros(heads, partners, dtype=torch.float64)
    mix[:, 0] = 1
    return mix


def compare(inputs, *, tolerance=1e-11, chunk_size=None, **options):
    """Outputs, final states and every gradient of the chunked form are those of the recurrence."""
    fast = run_with_gradients(delta_rule, inputs, backend="chunked", chunk_size=chunk_size, **options)
    slow = run_with_gradients(delta_rule, inputs, backend="naive", **options)
    leaves = {*inputs, *(name for name in ("initial_state", "mix") if options.get(name) is not None)}
    assert slow.keys() == {"out", "final", *(f"d{name}" for name in leaves)}
    assert_close(fast, slow, tolerance)


def by_matrices(q, k, v, g, beta, state=None):
    """The formula of the papers, with the transition written out as a matrix."""
    batch, tokens, heads, size = *v.shape[:3], q.shape[-1]
    eye = torch.eye(size, dtype=torch.float64)
    out = torch.empty_like(v)
    final = v.new_zeros(batch, heads, size, v.shape[-1])
    for row, head in itertools.product(range(batch), range(heads)):
        source = head // (heads // q.shape[2])
        S = final[row, head] if state is None else state[row, head]
        for t in range(tokens):
            key, strength = k[row, t, source], beta[row, t, head]
            decay = torch.diag(g[row, t, head].expand(size).exp())
            transition = (eye - strength * torch.outer(key, key)) @ decay
            S = transition @ S + strength * torch.outer(key, v[row, t, head])
            out[row, t, head] = size**-0.5 * (q[row, t, source] @ S)
        final[row, head] = S
    return out, final


@every_decay
@pytest.mark.parametrize("heads", [(2, 4), (3, 3), (1, 3)])
def test_recurrence_equals_the_papers_formula(decay, heads):
    inputs = delta_inputs(decay=decay, tokens=9, batch=2, heads=heads[0], value_heads=heads[1])
    state = first_state(2, inputs)
    for initial in (None, state):
        out, final = delta_rule(**inputs, initial_state=initial, backend="naive")
        expected, expected_final = by_matrices(**inputs, state=initial)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(final, expected_final, rtol=0, atol=1e-13)


@pytest.mark.parametrize("gate", ["soft", "bursty", "constant:-50"])
@pytest.mark.parametrize("value_heads", [2, 4])
def test_recurrence_equals_flas_gated_delta_rule(gate, value_heads):
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive", reason="fla-core is not installed")
    inputs = delta_inputs(decay="scalar", tokens=40, batch=2, value_heads=value_heads, gate=gate)
    state = first_state(2, inputs)
    out, final = delta_rule(**inputs, initial_state=state, backend="naive")
    # theirs knows no shared key heads: the kernels give value head i the key head i // (HV / H)
    q, k = (inputs[name].repeat_interleave(value_heads // 2, dim=2) for name in "qk")
    theirs, theirs_final = naive.naive_recurrent_gated_delta_rule(
        q, k, inputs["v"], inputs["beta"], inputs["g"].squeeze(-1), initial_state=state, output_final_state=True
    )
    assert out.abs().max() > 0.1, "a comparison of zeros would prove nothing"
    torch.testing.assert_close(out, theirs.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(final, theirs_final.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("gate", ["soft", "bursty", "constant:-50"])
@pytest.mark.parametrize("value_heads", [2, 4])
def test_recurrence_equals_flas_kda(gate, value_heads):
    naive = pytest.importorskip("fla.ops.kda.naive", reason="fla-core is not installed")
    inputs = delta_inputs(decay="channel", tokens=40, batch=2, value_heads=value_heads, gate=gate)
    state = first_state(2, inputs)
    out, final = delta_rule(**inputs, initial_state=state, backend="naive")
    theirs, theirs_final = naive.naive_recurrent_kda(**inputs, initial_state=state.float(), output_final_state=True)
    assert out.abs().max() > 0.1, "a comparison of zeros would prove nothing"
    torch.testing.assert_close(out, theirs.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(final, theirs_final.double(), rtol=0, atol=1e-5)


@every_decay
@pytest.mark.parametrize("tokens", [1, 63, 64, 70, 130])
@pytest.mark.parametrize("partners", [1, 3])
def test_chunked_equals_recurrence_with_every_gradient(decay, tokens, partners):
    inputs = delta_inputs(decay=decay, tokens=tokens, batch=2)
    options = {"mix": random_mix(4, partners)} if partners > 1 else {}
    compare(inputs, initial_state=first_state(2, inputs, partners), **options)
    compare(inputs, **options)


@every_decay
@pytest.mark.parametrize("chunk_size", [8, 16, 64])
@pytest.mark.parametrize("heads", [(2, 4), (1, 3), (2, 2)])
def test_any_chunk_size_and_head_count_gives_the_same_numbers(decay, chunk_size, heads):
    inputs = delta_inputs(decay=decay, tokens=70, heads=heads[0], value_heads=heads[1])
    compare(inputs, chunk_size=chunk_size, initial_state=first_state(1, inputs))


@every_decay
@pytest.mark.parametrize("keys", [1, 2])
def test_small_heads(decay, keys):
    """One key channel: scalar and per-channel decays have the same shape."""
    inputs = delta_inputs(decay=decay, tokens=37, keys=keys, values=1)
    compare(inputs, chunk_size=8, initial_state=first_state(1, inputs))


@every_decay
@pytest.mark.parametrize("gate", ["constant:0", "constant:-50", "bursty"])
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_strong_decays_are_exact_in_float64(decay, gate, chunk_size):
    inputs = delta_inputs(decay=decay, tokens=130, gate=gate)
    compare(inputs, chunk_size=chunk_size, initial_state=first_state(1, inputs))


@every_decay
@pytest.mark.parametrize(("gate", "tolerance"), [("soft", 2e-5), ("bursty", 2e-4), ("constant:-50", 2e-4)])
def test_float32_is_close_and_never_overflows(decay, gate, tolerance):
    inputs = delta_inputs(decay=decay, tokens=130, gate=gate, keys=16, values=16)
    narrow = {name: x.float() for name, x in inputs.items()}
    state = first_state(1, inputs)
    fast = run_with_gradients(delta_rule, narrow, backend="chunked", initial_state=state.float())
    slow = run_with_gradients(delta_rule, inputs, backend="naive", initial_state=state)
    assert_close(fast, slow, tolerance)


@every_decay
def test_the_largest_intermediate_exponent_is_never_positive(monkeypatch, decay):
    seen = []
    plain_exp = torch.Tensor.exp

    def watched(x):
        seen.append(x.max().item())
        return plain_exp(x)

    monkeypatch.setattr(torch.Tensor, "exp", watched)
    delta_rule(**delta_inputs(decay=decay, tokens=200, gate="bursty"), backend="chunked")
    assert len(seen) >= 4
    assert max(seen) <= 1e-9


@every_decay
def test_bfloat16_inputs_give_bfloat16_outputs_and_fp32_states(decay):
    inputs = delta_inputs(decay=decay, tokens=100, keys=16, values=16)
    rounded = {name: x.bfloat16() for name, x in inputs.items()}
    rounded |= {name: inputs[name].float() for name in ("g", "beta")}
    expected, expected_state = delta_rule(**{name: x.double() for name, x in rounded.items()}, backend="naive")
    for backend in ("chunked", "naive"):
        out, state = delta_rule(**rounded, backend=backend)
        assert out.dtype == torch.bfloat16
        assert state.dtype == torch.float32
        assert (out.double() - expected).norm() / expected.norm() < 1e-2
        assert (state.double() - expected_state).norm() / expected_state.norm() < 1e-2


@pytest.mark.parametrize("backend", ["chunked", "naive"])
def test_no_tokens_leave_the_state_as_it_was(backend):
    inputs = delta_inputs(decay="scalar", tokens=0)
    state = first_state(2, inputs)
    out, final = delta_rule(**inputs, initial_state=state, cu_seqlens=borders([0, 0]), backend=backend)
    assert out.shape == (1, 0, 4, VALUES)
    assert torch.equal(final, state)


def test_unknown_backend_is_refused():
    with raises(ConfigError, "fast", "auto", "kernel", "chunked", "naive"):
        delta_rule(**delta_inputs(decay="scalar", tokens=5), backend="fast")


@every_decay
@pytest.mark.parametrize("chunk_size", [0, 2, 48, -4])
def test_bad_chunk_size_is_refused(decay, chunk_size):
    with raises(ConfigError, "chunk_size", f"from 4, not {chunk_size}"):
        delta_rule(**delta_inputs(decay=decay, tokens=5), backend="chunked", chunk_size=chunk_size)


class TestPacking:
    lengths = (5, 0, 1, 64, 70, 1, 0, 63)

    @every_decay
    @pytest.mark.parametrize("partners", [1, 2])
    def test_packed_equals_recurrence_with_every_gradient(self, decay, partners):
        inputs = delta_inputs(decay=decay, tokens=sum(self.lengths))
        options = {"cu_seqlens": borders(list(self.lengths))}
        if partners > 1:
            options["mix"] = random_mix(4, partners)
        compare(inputs, **options)
        compare(inputs, initial_state=first_state(len(self.lengths), inputs, partners), chunk_size=16, **options)

    @every_decay
    def test_packed_equals_documents_run_alone(self, decay):
        inputs = delta_inputs(decay=decay, tokens=sum(self.lengths), seed=2)
        states = first_state(len(self.lengths), inputs)
        cu_seqlens = borders(list(self.lengths))
        out, final = delta_rule(**inputs, initial_state=states, cu_seqlens=cu_seqlens, backend="chunked")
        for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            alone = {name: x[:, start:stop] for name, x in inputs.items()}
            out_i, final_i = delta_rule(**alone, initial_state=states[i : i + 1], backend="naive")
            torch.testing.assert_close(out[:, start:stop], out_i, rtol=0, atol=1e-12)
            torch.testing.assert_close(final[i : i + 1], final_i, rtol=0, atol=1e-12)

    @every_decay
    def test_no_gradient_from_one_document_to_another(self, decay):
        inputs = {name: x.requires_grad_() for name, x in delta_inputs(decay=decay, tokens=200).items()}
        out, final = delta_rule(**inputs, cu_seqlens=borders([70, 1, 129]), backend="chunked")
        (out[:, 70:71].square().sum() + final[1].square().sum()).backward()
        for name, x in inputs.items():
            assert x.grad[:, :70].abs().max() == 0, name
            assert x.grad[:, 71:].abs().max() == 0, name
        assert inputs["v"].grad[:, 70].abs().max() > 0


@every_decay
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("partners", [1, 3])
@pytest.mark.parametrize("backend", ["chunked", "naive"])
def test_step_form_equals_scan_in_every_dtype(decay, dtype, partners, backend):
    inputs = {name: x.to(dtype) for name, x in delta_inputs(decay=decay, batch=2, tokens=9).items()}
    wide = torch.promote_types(dtype, torch.float32)
    inputs |= {name: inputs[name].to(wide) for name in ("g", "beta")}
    mix = random_mix(4, partners).to(dtype) if partners > 1 else None
    expected, expected_state = delta_rule(**inputs, mix=mix, backend=backend)
    state = torch.zeros(2, 4, KEYS, VALUES * partners, dtype=wide)
    for t in range(9):
        out, state = delta_decode(**{name: x[:, t] for name, x in inputs.items()}, state=state, mix=mix)
        tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        assert out.dtype == dtype
        assert (out - expected[:, t]).abs().max() <= tolerance
    assert state.dtype == wide
    assert (state - expected_state).abs().max() <= {torch.bfloat16: 0.1, torch.float32: 1e-5}.get(dtype, 1e-12)


@every_decay
@pytest.mark.parametrize("backend", ["chunked", "naive"])
@pytest.mark.parametrize("partners", [2, 3, 4])
class TestMixing:
    """Head ``i`` writes ``v_{i+s}`` beside its own values; head ``j`` reads them with ``M[j-s, s]``."""

    def test_random_mix_equals_one_recurrence_per_pair_of_heads(self, decay, backend, partners):
        inputs = delta_inputs(decay=decay, tokens=21, batch=2)
        mix = random_mix(4, partners)
        out, state = delta_rule(**inputs, mix=mix, backend=backend, chunk_size=8)
        assert state.shape == (2, 4, KEYS, partners * VALUES)
        expected = torch.zeros_like(out)
        for head, s in itertools.product(range(4), range(partners)):
            source = (head - s) % 4
            pair = {name: inputs[name][:, :, [source // 2]] for name in "qk"}
            pair |= {name: inputs[name][:, :, [source]] for name in ("g", "beta")}
            read, block = by_matrices(**pair, v=inputs["v"][:, :, [head]])
            expected[:, :, head] += mix[source, s] * read[:, :, 0]
            columns = state[:, [source], :, s * VALUES : (s + 1) * VALUES]
            torch.testing.assert_close(columns, block, rtol=0, atol=1e-13)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)

    def test_identity_is_the_original_to_the_last_bit(self, decay, backend, partners):
        inputs = delta_inputs(decay=decay, tokens=130, batch=2)
        out, _ = delta_rule(**inputs, mix=identity_mix(4, partners), backend=backend)
        expected, _ = delta_rule(**inputs, backend=backend)
        assert (out - expected).abs().max() == 0

    def test_identity_has_gradient_off_the_diagonal_at_once(self, decay, backend, partners):
        inputs = delta_inputs(decay=decay, tokens=30)
        grads = run_with_gradients(delta_rule, inputs, mix=identity_mix(4, partners), backend=backend)
        assert grads["dmix"].shape == (4, partners)
        assert (grads["dmix"].abs() > 1e-6).all()


class TestHopperWithAnOldTriton:
    """fla-core refuses the backward pass there; what it checks is set as if this were such a machine."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch):
        chunk_o = pytest.importorskip("fla.ops.common.chunk_o", reason="fla-core is not installed")
        for flag, value in (("IS_NVIDIA_HOPPER", True), ("TRITON_ABOVE_3_4_0", True), ("TRITON_ABOVE_3_7_1", False)):
            monkeypatch.setattr(chunk_o, flag, value)
        fla_api.delta_backward_obstacle.cache_clear()
        backends.warn_once.cache_clear()
        yield chunk_o
        fla_api.delta_backward_obstacle.cache_clear()

    def test_it_is_where_fla_raises(self, machine, monkeypatch):
        x = torch.zeros(1, 4, 1, 4)
        with pytest.raises(RuntimeError, match="Triton"):
            machine.chunk_bwd_dqkwg(x, x, x, x, x, x, g=x[..., 0])
        assert "3.7.1" in fla_api.delta_backward_obstacle()
        monkeypatch.setattr(machine, "TRITON_ABOVE_3_7_1", True)
        fla_api.delta_backward_obstacle.cache_clear()
        assert fla_api.delta_backward_obstacle() is None

    def test_tilelang_makes_up_for_it(self, monkeypatch, tmp_path):
        (tmp_path / "tilelang.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        assert fla_api.delta_backward_obstacle() is None

    def test_training_takes_the_chunked_form_with_one_warning(self, monkeypatch, caplog):
        taken = []
        monkeypatch.setattr(backends, "takes_kernels", lambda x, has_kernels: True)
        monkeypatch.setattr(dispatch, "fla_delta_rule", lambda *a, **k: taken.append(1) or naive_delta_rule(*a, **k))
        inputs = {name: x.requires_grad_() for name, x in delta_inputs(decay="scalar", tokens=9).items()}
        for _ in range(2):
            delta_rule(**inputs)[0].sum().backward()
        assert (taken, len(caplog.records)) == ([], 1)
        with torch.no_grad():
            delta_rule(**inputs)
        delta_rule(**{name: x.detach() for name, x in inputs.items()})
        assert len(taken) == 2

    def test_the_kernel_by_name_is_refused(self):
        inputs = {name: x.requires_grad_() for name, x in delta_inputs(decay="scalar", tokens=9).items()}
        with pytest.raises(ConfigError, match="cannot train"):
            delta_rule(**inputs, backend="kernel")
