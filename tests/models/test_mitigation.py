"""Models under a mitigation of state collapse: every family and expansion, every way to feed a text, every refusal."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import numpy as np
import pytest
import torch

from statex_dist.data.store import DocumentSlice
from statex_dist.errors import ConfigError
from statex_dist.evaluation.perplexity import PerplexitySettings, run_perplexity
from statex_dist.evaluation.scoring import decode_greedily
from statex_dist.models import mitigation
from statex_dist.models.core.mitigation import Scanned
from statex_dist.models.core.mixer import DeltaRule, LinearAttention, StateSpace
from statex_dist.models.core.sequences import Sequences
from statex_dist.models.mitigation import ForgetMore, SlidingWindow, StateNorm, parse_mitigation
from statex_dist.ops.gla import gla
from tests.models.tiny import CONFIGS, build, tokens
from tests.ops.scan_cases import borders, gla_inputs
from tests.raising import raises

DIAGONAL = {
    "gla-merged": 0,
    "gla-mixed": 1,
    "gla-grown": 0,
    "mamba2-features": 1,
    "mamba2-grown": 1,
    "hgrn2-conv-merged": 1,
    "retnet-grown": 0,
    "minimax-mixed": 1,
}
"""Models, and the layer that is looked at; that of HGRN2 has features."""
IN_SEGMENTS = ("gla-mixed", "mamba2-features", "hgrn2-conv-merged", "retnet-grown", "minimax-mixed")
EXACT = (
    "forget-more:decay=0.05",
    "state-norm:limit=0.7,every=1",
    "state-norm:learn=5,every=1",
    "sliding-window:tokens=4",
)
"""Mitigations whose result does not depend on where a text is cut."""


def model_under(name, text=None):
    model = build(CONFIGS[name]).eval()
    model.mitigation = parse_mitigation(text) if text else None
    return model


def mixer_of(model, layer):
    block = model.trunk.layers[layer]
    return next(getattr(block, name) for name in ("attn", "self_attn", "mixer") if hasattr(block, name))


def whole(model, ids):
    with torch.no_grad():
        return model(ids, output_states=True)


def in_segments(model, ids, sizes):
    logits, states = [], None
    with torch.no_grad():
        for segment in ids.split(sizes, dim=1):
            output = model(segment, states=states, output_states=True)
            states = output.states
            logits.append(output.logits)
    return torch.cat(logits, dim=1), states


def assert_close(got, want, tolerance=1e-9):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * max(1.0, want.abs().max().item())


# --- the text form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "canonical"),
    [
        ("forget-more", ForgetMore(), "forget-more:decay=0.0001,insert=0.75"),
        (
            " forget_more:insert=0.5, decay=1e-3",
            ForgetMore(decay=1e-3, insert=0.5),
            "forget-more:decay=0.001,insert=0.5",
        ),
        ("state-norm:limit=8", StateNorm(limit=8.0), "state-norm:limit=8.0,every=64"),
        ("state-norm:learn=2048,every=16", StateNorm(learn=2048, every=16), "state-norm:learn=2048,every=16"),
        ("sliding-window:tokens=512", SlidingWindow(tokens=512), "sliding-window:tokens=512"),
    ],
)
def test_text_form(text, value, canonical):
    assert parse_mitigation(text) == value
    assert str(value) == canonical
    assert parse_mitigation(canonical) == value


@pytest.mark.parametrize("kind", mitigation.MITIGATIONS.values())
def test_examples_in_messages_are_valid(kind):
    assert isinstance(parse_mitigation(kind.EXAMPLE), kind)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forget", "mitigation 'forget'.*forget-more, state-norm, sliding-window"),
        ("", "mitigation ''"),
        ("forget-more:delta=1", "forget-more: 'delta=1'.*forget-more:decay=1e-4,insert=0.75"),
        ("forget-more:decay", "forget-more: 'decay'"),
        ("forget-more:decay=1,decay=2", "forget-more: 'decay' twice"),
        ("forget-more:decay=much", "decay.*'much'"),
        ("forget-more:decay=-1", "decay.*not -1.0"),
        ("forget-more:decay=nan", "decay.*not nan"),
        ("forget-more:insert=0", "insert.*not 0.0"),
        ("state-norm", "state-norm.*limit .*learn"),
        ("state-norm:limit=1,learn=64", "state-norm.*limit .*learn"),
        ("state-norm:limit=inf", "limit.*not inf"),
        ("state-norm:limit=1,every=0", "every.*not 0"),
        ("state-norm:learn=32", "learn=32.*every=64"),
        ("sliding-window", "sliding-window:tokens=2048"),
        ("sliding-window:tokens=0", "tokens.*not 0"),
        ("sliding-window:tokens=1.5", "tokens.*'1.5'"),
    ],
)
def test_text_form_refuses(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_mitigation(text)


# --- what layers compute --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIAGONAL)
def test_window_of_a_layer_equals_the_layer_on_the_last_tokens_alone(name):
    """Convolutions read the real tokens before the window, so each recomputation starts from their tails."""
    mixer = mixer_of(build(CONFIGS[name]), DIAGONAL[name])
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(2, 11, 16, generator=rng, dtype=torch.float64)
    window = Sequences(output_states=True, mitigation=SlidingWindow(tokens=4))
    plain = Sequences(output_states=True)
    with torch.no_grad():
        state, parts = None, []
        for segment in x.split([5, 1, 1, 4], dim=1):
            out, state = mixer(segment, window, state)
            parts.append(out)
        got = torch.cat(parts, dim=1)
        for t in (2, 4, 5, 6, 10):
            first = max(0, t - 3)
            before = None
            if first:
                _, (matrix, *rest) = mixer(x[:, :first], plain, None)
                before = (torch.zeros_like(matrix), *rest)
            alone, after = mixer(x[:, first : t + 1], plain, before)
            assert_close(got[:, t], alone[:, -1])
    assert_close(state[0], after[0])


@pytest.mark.parametrize(("name", "text"), itertools.product(IN_SEGMENTS, EXACT))
def test_a_text_in_segments_and_steps_equals_the_whole(name, text):
    model, ids = model_under(name, text), tokens(2, 12)
    logits, states = in_segments(model, ids, [6, 1, 1, 4])
    expected = whole(model, ids)
    assert_close(logits, expected.logits)
    for state, other in zip(states, expected.states, strict=True):
        for got, want in zip(state, other, strict=True):
            assert_close(got, want)
    model.mitigation = None
    assert (expected.logits - whole(model, ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "text"), itertools.product(["gated_deltanet-mixed", "kda"], EXACT[:3]))
def test_a_delta_rule_in_segments_and_steps_equals_the_whole(name, text):
    model, ids = model_under(name, text), tokens(2, 12)
    logits, _ = in_segments(model, ids, [6, 1, 1, 4])
    assert_close(logits, whole(model, ids).logits)


@pytest.mark.parametrize("name", ["gla-mixed", "mamba2-grown", "retnet"])
def test_mitigations_that_change_nothing_change_nothing(name):
    model, ids = model_under(name), tokens(2, 12)
    expected = whole(model, ids).logits
    for text in ("forget-more:decay=0,insert=1", "state-norm:limit=1e9,every=4", "sliding-window:tokens=12"):
        model.mitigation = parse_mitigation(text)
        assert_close(whole(model, ids).logits, expected, 1e-12)


@pytest.mark.parametrize("name", ["gla", "mamba2", "kda"])
def test_without_a_mitigation_nothing_of_it_runs(name, monkeypatch):
    model, ids = model_under(name), tokens(2, 12)
    before = whole(model, ids)
    model.mitigation = ForgetMore()
    changed = whole(model, ids).logits
    model.mitigation = None

    def fail(*args, **kwargs):
        raise AssertionError("called")

    for recurrence in (LinearAttention, StateSpace, DeltaRule):
        monkeypatch.setattr(recurrence, "mitigated", fail)
    after = whole(model, ids)
    assert torch.equal(after.logits, before.logits)
    assert not torch.equal(changed, before.logits)
    assert [len(state) for state in after.states] == [len(state) for state in before.states]


@pytest.mark.parametrize("name", ["gla-merged", "mamba2", "gated_deltanet"])
def test_state_norm_keeps_every_head_to_the_limit_and_does_not_see_segments(name):
    model, ids = model_under(name, "state-norm:limit=0.1,every=4"), tokens(2, 19)
    expected = whole(model, ids)
    for state in expected.states:
        norms = state[0].flatten(2).norm(dim=-1)
        assert norms.max() <= 0.1 + 1e-12
        assert (norms > 0.1 - 1e-12).any()
    assert_close(in_segments(model, ids, [8, 4, 7])[0], expected.logits)
    assert (in_segments(model, ids, [6, 6, 7])[0] - expected.logits).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["gla", "mamba2"])
def test_learned_limits_hold_past_the_tokens_that_they_were_learned_from(name):
    model, ids = model_under(name, "state-norm:learn=8,every=4"), tokens(2, 20)
    model.mitigation = None
    seen = [whole(model, ids[:, :n]).states for n in (4, 8)]
    model.mitigation = parse_mitigation("state-norm:learn=8,every=4")
    after = whole(model, ids).states
    _, cut = in_segments(model, ids, [4, 12, 4])
    for early, late, state, same in zip(*seen, after, cut, strict=True):
        limits = torch.maximum(*(s[0].flatten(2).norm(dim=-1) for s in (early, late)))
        assert_close(state[-2], limits)
        assert (state[0].flatten(2).norm(dim=-1) <= limits + 1e-12).all()
        assert state[-1].tolist() == [20, 20]
        assert_close(same[0], state[0])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gla-conv", EXACT[3]),
        ("retnet", EXACT[3]),
        ("mamba2", EXACT[3]),
        ("mamba2", EXACT[2]),
        ("minimax-mixed", EXACT[2]),
    ],
)
def test_rows_with_texts_of_their_own(name, text):
    """The perplexity suite selects and zeroes rows of all states: a zero row starts a new text."""
    model = model_under(name, text)
    rng = np.random.default_rng(0)
    pieces = [DocumentSlice(tokens=rng.integers(0, 40, size=n).astype(np.uint16)) for n in (14, 3, 9, 6)]
    one, three = (
        run_perplexity(model, iter(pieces), PerplexitySettings(segment_length=4, batch_size=n)) for n in (1, 3)
    )
    losses = [[loss for _, loss in result.documents] for result in (one, three)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    with torch.no_grad():
        ids = torch.from_numpy(pieces[2].tokens.astype(np.int64))[None]
        alone = model(ids[:, :-1], labels=ids[:, 1:]).loss_sum.item()
    assert losses[0][2] == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize(("name", "text"), itertools.product(["gla-mixed", "mamba2"], EXACT))
def test_greedy_decoding_continues_with_the_most_likely_token_of_a_whole_forward(name, text):
    model, ids = model_under(name, text), tokens(2, 9)
    produced = decode_greedily(model, ids, 4, segment_length=4)
    logits = whole(model, torch.cat([ids, produced], dim=1)).logits
    assert torch.equal(produced, logits[:, 8:-1].argmax(-1))


# --- training, packing, refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gla-grown", "mamba2-features", "gated_deltanet-mixed"])
def test_forget_more_trains_and_packs(name):
    model = model_under(name, "forget-more:decay=0.05").train()
    ids = tokens(1, 11)
    packed = model(ids, cu_seqlens=borders([4, 7])).logits
    assert_close(packed, torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1))
    packed.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("text", ["state-norm:limit=1", "sliding-window:tokens=4"])
def test_mitigations_for_evaluation_refuse_training_and_packing(text):
    model, ids = model_under("gla", text), tokens(1, 8)
    with raises(ConfigError, "packed sequences", "forget-more"):
        model(ids, cu_seqlens=borders([4, 4]))
    with raises(ConfigError, "training mode", "eval()"):
        model.train()(ids)


@pytest.mark.parametrize("name", ["gated_deltanet", "kda"])
def test_a_delta_rule_has_no_sliding_window(name):
    model = model_under(name, "forget-more")
    with raises(ConfigError, "sliding-window", name):
        model.mitigation = SlidingWindow(tokens=8)
    assert model.mitigation == ForgetMore()


def test_states_of_a_model_without_the_mitigation_are_refused():
    model, ids = model_under("gla"), tokens(1, 8)
    states = whole(model, ids).states
    model.mitigation = SlidingWindow(tokens=4)
    with raises(ConfigError, "sliding-window:tokens=4"):
        model(ids, states=states)


def test_outputs_of_a_window_are_differences_of_wide_numbers():
    """bf16 inputs that are never forgotten: the scan's outputs grow to 2000, the window's stay at 16."""
    q, k, v, g = (y.bfloat16() for y in gla_inputs(tokens=2000, heads=1, keys=2, values=2, gate="constant:0").values())
    inputs = ((q + 3).bfloat16(), (k + 3).bfloat16(), (v + 3).bfloat16(), g.float())

    def scan(inputs, state):
        return gla(*inputs, initial_state=state, scale=1.0)

    o, _, _ = SlidingWindow(tokens=16).gla(scan, inputs, None, ())
    alone, _ = gla(*(y[:, -16:] for y in inputs), scale=1.0)
    assert o.dtype == torch.bfloat16
    assert_close(o[:, -1].double(), alone[:, -1].double(), 2**-7)


def test_a_mitigation_is_added_by_one_class_and_one_call():
    @dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
    class HalfValues(mitigation.Mitigation):
        NAME: ClassVar[str] = "half-values"
        EXAMPLE: ClassVar[str] = "half-values:factor=0.5"
        TRAINS: ClassVar[bool] = True

        factor: float = 0.5

        def gla(self, scan, inputs, state, memory):
            q, k, v, g = inputs
            return Scanned(*scan((q, k, v * self.factor, g), state), ())

    mitigation.register(HalfValues)
    try:
        model, ids = model_under("gla", "half-values"), tokens(2, 12)
        assert str(model.mitigation) == "half-values:factor=0.5"
        halved = whole(model, ids)
        model.mitigation = None
        plain = whole(model, ids)
        assert_close(halved.states[0][0], plain.states[0][0] / 2)
        with pytest.raises(ConfigError, match="half-values"):
            model_under("gla", "no-such")
    finally:
        del mitigation.MITIGATIONS["half-values"]
