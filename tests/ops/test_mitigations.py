"""The mitigations of state collapse, each against its equation, token by token in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.ops.delta_rule import delta_rule
from statex_dist.ops.delta_rule.torch_forms import delta_step
from statex_dist.ops.gla import gla, gla_decode
from statex_dist.ops.gla.torch_forms import gla_step, naive_gla
from statex_dist.ops.mitigations import (
    forget_more_delta,
    forget_more_gla,
    forget_more_ssd,
    limit_norm,
    limit_or_learn_norm,
    scan_in_pieces,
    window_sums,
    windowed_gla,
    windowed_ssd,
)
from statex_dist.ops.ssd import ssd, ssd_decode
from statex_dist.ops.ssd.torch_forms import naive_ssd, ssd_step
from tests.ops.scan_cases import delta_inputs, gla_inputs, ssd_inputs

GATES = ("soft", "constant:-50", "constant:0", "bursty")
FEW = settings(max_examples=12, deadline=None)

lengths = st.integers(1, 40)
widths = st.integers(1, 50)
cuts = st.lists(st.integers(1, 39), max_size=4)


def segments(tensors, points):
    """The tokens of every tensor between the points, which may lie anywhere."""
    ends = sorted({0, tensors[0].shape[1], *(p for p in points if p < tensors[0].shape[1])})
    return [tuple(y[:, start:stop] for y in tensors) for start, stop in itertools.pairwise(ends)]


def gla_scan(mix=None, scale=0.7):
    """The scan as a layer calls it: one token with a state is a decoding step."""

    def scan(inputs, state):
        if inputs[0].shape[1] == 1 and state is not None:
            o, state = gla_decode(*(y.squeeze(1) for y in inputs), state, scale=scale, mix=mix)
            return o.unsqueeze(1), state
        return gla(*inputs, initial_state=state, scale=scale, mix=mix)

    return scan


def ssd_scan(A):
    def scan(inputs, state):
        x, dt, B, C = inputs
        if x.shape[1] == 1 and state is not None:
            y, state = ssd_decode(x.squeeze(1), dt.squeeze(1), A, B.squeeze(1), C.squeeze(1), state)
            return y.unsqueeze(1), state
        return ssd(x, dt, A, B, C, initial_state=state)

    return scan


def in_segments(run, tensors, points):
    """Outputs and last state of ``run(inputs, state, memory)`` over the segments."""
    outputs, state, memory = [], None, ()
    for inputs in segments(tensors, points):
        o, state, memory = run(inputs, state, memory)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


def assert_equal(got, want, tolerance=1e-9):
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= tolerance * max(1.0, want.abs().max().item())


# --- sliding window -------------------------------------------------------------------------------------------------


@FEW
@given(length=lengths, width=widths, seed=st.integers(0, 99))
def test_sums_over_windows(length, width, seed):
    x = torch.randn(2, length + width - 1, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert_equal(window_sums(x, width), torch.stack([x[:, t : t + width].sum(1) for t in range(length)], dim=1))


def test_sums_over_windows_lose_nothing_to_what_lies_outside():
    x = torch.full((1, 64, 1), -1e-3)
    x[:, 5] = -1e8
    x[:, 20] = -torch.inf
    sums = window_sums(x, 4)[0, :, 0]
    assert (sums[21:] == torch.tensor(-1e-3) * 4).all()
    assert torch.allclose(sums[6:17], torch.tensor(-4e-3), rtol=1e-6)
    assert (sums[17:21] == -torch.inf).all()


@FEW
@given(
    length=lengths,
    width=widths,
    points=cuts,
    gate=st.sampled_from(GATES),
    partners=st.sampled_from([None, 1, 2]),
    seed=st.integers(0, 99),
)
def test_window_of_gla_equals_the_last_tokens_alone(length, width, points, gate, partners, seed):
    leaves = gla_inputs(batch=2, tokens=length, keys=3, values=4, seed=seed, gate=gate)
    inputs = tuple(leaves.values())
    mix = None if partners is None else torch.randn(2, partners, generator=torch.Generator().manual_seed(seed)).double()
    scan = gla_scan(mix)
    o, state = in_segments(lambda x, s, m: windowed_gla(scan, x, s, m, width=width), inputs, points)
    for t in range(length):
        alone, last = gla(*(y[:, max(0, t + 1 - width) : t + 1] for y in inputs), scale=0.7, mix=mix, backend="naive")
        assert_equal(o[:, t], alone[:, -1])
    assert_equal(state, last)


@FEW
@given(length=lengths, width=widths, points=cuts, strength=st.sampled_from([1.0, 50.0, 1e-6]), seed=st.integers(0, 99))
def test_window_of_mamba2_equals_the_last_tokens_alone(length, width, points, strength, seed):
    leaves = ssd_inputs(batch=2, tokens=length, seed=seed)
    A = leaves.pop("A") * strength
    inputs = tuple(leaves.values())
    scan = ssd_scan(A)
    y, state = in_segments(lambda x, s, m: windowed_ssd(scan, x, A, s, m, width=width), inputs, points)
    for t in range(length):
        x, dt, B, C = (z[:, max(0, t + 1 - width) : t + 1] for z in inputs)
        alone, last = naive_ssd(x, dt, A, B, C)
        assert_equal(y[:, t], alone[:, -1])
    assert_equal(state, last)


def test_a_window_stays_accurate_over_a_long_text_that_is_never_forgotten():
    """Without decay the plain state of these tokens grows to 30,000; the window's holds 64 of them in fp32."""
    leaves = gla_inputs(tokens=30_000, heads=1, keys=2, values=2, gate="constant:0")
    leaves["k"], leaves["v"] = leaves["k"] + 1, leaves["v"] + 1
    inputs = tuple(y.float() for y in leaves.values())
    scan = gla_scan()
    _, state = in_segments(lambda x, s, m: windowed_gla(scan, x, s, m, width=64), inputs, range(0, 30_000, 1000))
    _, alone = naive_gla(*(y[:, -64:] for y in leaves.values()), scale=1.0)
    assert_equal(state.double(), alone, 1e-4)


def test_memory_of_zeros_is_no_memory():
    inputs = tuple(gla_inputs(batch=2, tokens=9).values())
    scan = gla_scan()
    fresh, state, memory = windowed_gla(scan, inputs, None, (), width=4)
    again, _, _ = windowed_gla(
        scan, inputs, torch.zeros_like(state), tuple(torch.zeros_like(y) for y in memory), width=4
    )
    assert_equal(again, fresh, 1e-14)


# --- forget more, remember less -------------------------------------------------------------------------------------


def test_forget_more_of_gla():
    leaves = gla_inputs(batch=2, tokens=23)
    q, k, v, g = leaves.values()
    k_less, g_less = forget_more_gla(k, g, decay=0.03, insert=0.75)
    o, state = gla(q, k_less, v, g_less, scale=1.0)
    h = q.new_zeros(2, 2, 6, 10)
    for t in range(23):
        h = (g[:, t] - 0.03).exp().unsqueeze(-1) * h + 0.75 * torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        assert_equal(o[:, t], torch.einsum("bhk,bhkv->bhv", q[:, t], h), 1e-12)
    assert_equal(state, h, 1e-12)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_forget_more_of_mamba2_changes_decay_and_input_apart(one_by_one):
    x, dt, A, B, C = ssd_inputs(batch=2, tokens=23).values()
    dt[:, 3] = 0
    A[0] = -1e-7
    new = dict(zip(("x", "dt", "A"), forget_more_ssd(x, dt, A, decay=0.03, insert=0.75), strict=True))
    scan = ssd_scan(new["A"])
    inputs = (new["x"], new["dt"], B, C)
    y, state = in_segments(lambda z, s, m: (*scan(z, s), ()), inputs, range(1, 23) if one_by_one else ())
    h = x.new_zeros(2, 4, 3, 5)
    B, C = (z.repeat_interleave(2, dim=2) for z in (B, C))
    for t in range(23):
        inserted = 0.75 * torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        h = (dt[:, t] * A - 0.03).exp()[..., None, None] * h + inserted
        assert_equal(y[:, t], torch.einsum("bhpn,bhn->bhp", h, C[:, t]), 1e-9)
    assert_equal(state, h, 1e-9)


def test_forget_more_of_mamba2_keeps_a_rate_and_a_step_of_zero_finite():
    x, dt, A, B, C = (y.float() for y in ssd_inputs(tokens=5).values())
    dt[:, 1], A[1] = 0, 0
    x, dt, A = forget_more_ssd(x, dt, A, decay=0.0, insert=1.0)
    assert all(torch.isfinite(y).all() for y in ssd(x, dt, A, B, C))
    x, dt, A = forget_more_ssd(x, dt, A, decay=1e-4, insert=0.75)
    assert all(torch.isfinite(y).all() for y in ssd(x, dt, A, B, C))


def test_forget_more_of_the_delta_rule_erases_as_before():
    q, k, v, g, beta = delta_inputs(tokens=17, channels=16).values()
    v_less, g_less = forget_more_delta(v, g, decay=0.03, insert=0.75)
    _, state = delta_rule(q, k, v_less, g_less, beta)
    h = q.new_zeros(1, 2, 16, 16)
    for t in range(17):
        b, key = beta[:, t, :, None, None], k[:, t].unsqueeze(-1)
        h = (g[:, t] - 0.03).exp().unsqueeze(-1) * h
        h = h - b * key @ (key.transpose(-1, -2) @ h) + 0.75 * b * key * v[:, t].unsqueeze(-2)
    assert_equal(state, h, 1e-12)


# --- state normalisation --------------------------------------------------------------------------------------------


def bounded(state, limit):
    """The equation, head by head."""
    state = state.clone()
    for head in itertools.product(*map(range, state.shape[:2])):
        norm = float(state[head].square().sum()) ** 0.5
        state[head] *= min(1.0, limit / norm) if norm else 1.0
    return state


@FEW
@given(
    length=lengths, every=st.integers(1, 12), limit=st.floats(0.1, 30), blocks=st.lists(st.integers(1, 9), max_size=3)
)
def test_state_norm_of_gla(length, every, limit, blocks):
    inputs = tuple(gla_inputs(batch=2, tokens=length, keys=3, values=4).values())
    points = [every * n for n in itertools.accumulate(blocks)]

    def run(x, state, memory):
        return (
            *scan_in_pieces(gla_scan(), x, state, every=every, after_piece=lambda h, n: limit_norm(h, limit)),
            (),
        )

    o, state = in_segments(run, inputs, points)
    h = inputs[0].new_zeros(2, 2, 3, 4)
    for t in range(length):
        out, h = gla_step(*(y[:, t] for y in inputs), h, scale=0.7)
        assert_equal(o[:, t], out, 1e-10)
        if (t + 1) % every == 0 or t + 1 == length:
            h = bounded(h, limit)
    assert_equal(state, h, 1e-10)


def test_state_norm_of_mamba2_and_of_the_delta_rule_after_every_token():
    x, dt, A, B, C = ssd_inputs(tokens=19).values()
    y, state = scan_in_pieces(ssd_scan(A), (x, dt, B, C), None, every=1, after_piece=lambda h, n: limit_norm(h, 1.5))
    h = x.new_zeros(1, 4, 3, 5)
    for t in range(19):
        out, h = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], h)
        h = bounded(h, 1.5)
        assert_equal(y[:, t], out, 1e-12)
    assert_equal(state, h, 1e-12)

    inputs = tuple(delta_inputs(tokens=19).values())
    o, state = scan_in_pieces(
        lambda z, s: delta_rule(*z, initial_state=s), inputs, None, every=1, after_piece=lambda h, n: limit_norm(h, 0.8)
    )
    h = x.new_zeros(1, 2, 16, 16)
    for t in range(19):
        out, h = delta_step(*(y[:, t] for y in inputs), h, scale=0.25)
        h = bounded(h, 0.8)
        assert_equal(o[:, t], out, 1e-12)
    assert_equal(state, h, 1e-12)


def test_a_zero_state_stays_zero():
    assert (limit_norm(torch.zeros(1, 2, 3, 4), 5.0) == 0).all()
    state, limit = limit_or_learn_norm(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2), torch.tensor([9]), learn_tokens=4)
    assert (state == 0).all()
    assert torch.isfinite(limit).all()


def test_learned_limit_is_the_largest_norm_within_the_first_tokens_of_each_sequence():
    rng = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 3, 4, 5, generator=rng, dtype=torch.float64) * 2**n for n in range(6)]
    limit, starts = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 2])
    for step, given_state in enumerate(states, start=1):
        got, limit = limit_or_learn_norm(given_state, limit, starts + step, learn_tokens=4)
        for row, head in itertools.product(range(2), range(3)):
            seen = [s[row, head].norm() for s in states[:step][: 4 - int(starts[row])]]
            factor = min(1.0, max(seen) / given_state[row, head].norm())
            assert_equal(got[row, head], given_state[row, head] * factor, 1e-12)
