"""Expansion: what it keeps, what it changes, and that what is new can learn."""

from __future__ import annotations

import random

import pytest
import torch

from statex_dist.errors import ConfigError
from statex_dist.models.core.mixer import mixer_of
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import expand_state_dict, family_of, make_plan
from tests.models.tiny import (
    build,
    expanded,
    gated_deltanet_config,
    gla_config,
    hgrn2_config,
    kda_config,
    mamba2_config,
    minimax_config,
    retnet_config,
    tokens,
    with_features,
)
from tests.ops.scan_cases import borders
from tests.raising import raises

GLA = gla_config(use_short_conv=True)
MAMBA2 = mamba2_config(n_groups=2, use_bias=True)

CASES = {
    "merge reinit": (GLA, "merge_heads", "reinit", 4),
    "merge inherit": (GLA, "merge_heads", "inherit", 2),
    "mix reinit": (GLA, "mix_heads", "reinit", 3),
    "mix inherit": (GLA, "mix_heads", "inherit", 2),
    "mix lossless": (GLA, "mix_heads", "lossless", 4),
    "grow keys reinit": (GLA, "grow_state", "reinit", 2),
    "grow keys inherit": (GLA, "grow_state", "inherit", 3),
    "grow keys lossless": (GLA, "grow_state", "lossless", 2),
    "features": (GLA, "grow_features", "lossless", 3),
    "features of Mamba2": (MAMBA2, "grow_features", "lossless", 4),
    "grow copy": (MAMBA2, "grow_state", "copy", 4),
    "grow reinit": (MAMBA2, "grow_state", "reinit", 4),
    "grow inherit": (MAMBA2, "grow_state", "inherit", 2),
    "grow lossless": (MAMBA2, "grow_state", "lossless", 3),
}
FAMILIES = [
    GLA,
    MAMBA2,
    hgrn2_config(),
    retnet_config(),
    minimax_config(),
    gated_deltanet_config(),
    kda_config(num_heads=2, num_v_heads=4),
]
every_case = pytest.mark.parametrize(("config", "op", "init", "factor"), CASES.values(), ids=CASES)


def loaded(config, tensors, dtype=torch.float64) -> RecurrentLM:
    model = RecurrentLM(config).to(dtype)
    model.load_state_dict(tensors)
    return model


def expand(config, op, init, factor, *, layers="1", model=None):
    source = model or build(config)
    target = make_plan(config, layers=layers, factor=factor, init=init, op=op, seed=3)
    before = {name: x.clone() for name, x in source.state_dict().items()}
    after = expand_state_dict(before, config, target)
    assert all(torch.equal(x, source.state_dict()[name]) for name, x in before.items()), "inputs were changed"
    return source, target, before, after


def parts_of(name, tensor, target):
    family = family_of(target.MODEL_TYPE)
    spec = family.tensors(target)[name]
    return dict(zip([p for p, _ in spec.parts], tensor.split([rows for _, rows in spec.parts]), strict=True))


@every_case
def test_result_is_a_model_of_the_target_config(config, op, init, factor):
    _, target, _, after = expand(config, op, init, factor)
    specs = family_of(config.MODEL_TYPE).tensors(target)
    assert {name: tuple(x.shape) for name, x in after.items()} == {name: spec.shape for name, spec in specs.items()}
    assert {x.dtype for x in after.values()} == {torch.float64}
    model = loaded(target, after)
    out = model(tokens(1, 20), labels=tokens(1, 20, seed=1))
    out.loss_sum.backward()
    assert torch.isfinite(out.loss_sum)
    assert target.layer_geometry(1).elements == factor * config.layer_geometry(1).elements
    assert target.layer_geometry(0) == config.layer_geometry(0)


@every_case
def test_what_is_kept_is_bit_equal(config, op, init, factor):
    _, _, before, after = expand(config, op, init, factor)
    mixing = ("q_", "k_", "v_", "g_proj", "o_proj", "gk_proj", "in_proj", "conv1d", "out_proj")
    changed = set()
    for name, old in before.items():
        new = after[name]
        if new.shape != old.shape or not torch.equal(new, old):
            changed.add(name.removeprefix("backbone.").removeprefix("model."))
    assert all(name.startswith("layers.1.") for name in changed)
    suffixes = {name.removeprefix("layers.1.") for name in changed}
    keys = {f"{name}.weight" for name in ("q_proj", "k_proj", "q_conv1d", "k_conv1d", "gk_proj.1")} | {"gk_proj.1.bias"}
    if op == "grow_features":
        assert not suffixes
        assert {name.rpartition(".")[2] for name in set(after) - set(before)} == {"feature_gain"}
    elif config is MAMBA2:
        # B and C in in_proj and the convolution; z, x, dt and the output projection are kept in every mode
        assert suffixes == {"mixer.in_proj.weight", "mixer.in_proj.bias", "mixer.conv1d.weight", "mixer.conv1d.bias"}
    elif init == "reinit":
        assert all(any(part in suffix for part in mixing) or "g_norm" in suffix for suffix in suffixes)
        layer = {name.split("layers.1.")[1] for name in before if "layers.1." in name}
        drawn = {suffix for suffix in layer if any(part in suffix for part in mixing) and "norm" not in suffix}
        assert drawn <= suffixes
    elif op == "merge_heads":
        assert suffixes == {"attn.g_norm_swish_gate.weight"}
    elif op == "mix_heads":
        assert not suffixes
        assert set(after) - set(before) == {"model.layers.1.attn.mix"}
    else:
        assert suffixes == {f"attn.{name}" for name in keys}


@pytest.mark.parametrize("init", ["reinit", "inherit", "lossless"])
def test_mamba2_dynamics_and_norms_are_kept_in_every_mode(init):
    _, _, before, after = expand(MAMBA2, "grow_state", init, 4)
    for suffix in ("mixer.dt_bias", "mixer.A_log", "mixer.D", "mixer.norm.weight", "norm.weight"):
        name = f"backbone.layers.1.{suffix}"
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("init", ["reinit", "inherit", "lossless", "copy"])
def test_mamba2_keeps_z_x_dt_and_the_output_projection_in_every_mode(init):
    _, target, before, after = expand(MAMBA2, "grow_state", init, 4)
    for suffix in ("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias"):
        name = f"backbone.layers.1.mixer.{suffix}"
        old, new = parts_of(name, before[name], MAMBA2), parts_of(name, after[name], target)
        for part in old.keys() - {"B", "C"}:
            assert torch.equal(old[part], new[part]), part
        for part in "BC":
            kept = new[part].unflatten(0, (2, -1))[:, : MAMBA2.state_size]
            assert torch.equal(kept, old[part].unflatten(0, (2, -1))) == (init != "reinit")
    for suffix in ("out_proj.weight", "out_proj.bias"):
        assert torch.equal(after[f"backbone.layers.1.mixer.{suffix}"], before[f"backbone.layers.1.mixer.{suffix}"])


def test_copied_rows_are_the_old_rows_of_their_group():
    _, target, before, after = expand(MAMBA2, "grow_state", "copy", 3)
    for suffix in ("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias"):
        name = f"backbone.layers.1.mixer.{suffix}"
        old, new = parts_of(name, before[name], MAMBA2), parts_of(name, after[name], target)
        for part in "BC":
            expected = old[part].unflatten(0, (2, -1)).repeat(1, 3, *[1] * (old[part].dim() - 1)).flatten(0, 1)
            assert torch.equal(new[part], expected)


def test_gla_reinit_keeps_norms_and_mlp_and_repeats_the_output_norm():
    _, _, before, after = expand(GLA, "merge_heads", "reinit", 4)
    prefix = "model.layers.1."
    for suffix in ("attn_norm", "mlp_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        assert torch.equal(after[f"{prefix}{suffix}.weight"], before[f"{prefix}{suffix}.weight"])
    name = prefix + "attn.g_norm_swish_gate.weight"
    assert torch.equal(after[name].view(4, -1), before[name].expand(4, -1))


def test_gla_lossless_is_exact():
    source, target, _, after = expand(GLA, None, "lossless", 4, layers="all")
    assert {e.op for e in target.statex.layers} == {"mix_heads"}
    ids = tokens(2, 50)
    assert (loaded(target, after)(ids).logits - source(ids).logits).abs().max() == 0.0


@pytest.mark.parametrize("config", [GLA, gla_config()], ids=["convolution", "plain"])
@pytest.mark.parametrize("factor", [2, 3])
def test_gla_lossless_growth_of_keys_is_exact(config, factor):
    source, target, _, after = expand(config, "grow_state", "lossless", factor, layers="all")
    assert target.layer_geometry(0).key_dim == factor * config.layer_geometry(0).key_dim
    ids = tokens(2, 50)
    assert (loaded(target, after)(ids).logits - source(ids).logits).abs().max() < 1e-12


@pytest.mark.parametrize(("config", "op"), [(GLA, "mix_heads"), (MAMBA2, "grow_state")])
def test_lossless_in_bf16_keeps_every_argmax(config, op):
    _, target, before, after = expand(config, op, "lossless", 4, layers="all")
    model = loaded(config, {n: x.bfloat16() for n, x in before.items()}, torch.bfloat16)
    grown = loaded(target, {n: x.bfloat16() for n, x in after.items()}, torch.bfloat16)
    ids = tokens(4, 60)
    assert torch.equal(model(ids).logits.argmax(-1), grown(ids).logits.argmax(-1))


def test_new_key_channels_of_gla_learn():
    """Queries at once; keys and gates from the second step on."""
    _, target, _, after = expand(GLA, "grow_state", "lossless", 2)
    model, size = loaded(target, after), GLA.key_dim // GLA.num_heads

    def new_rows(values, suffix):
        return values[f"model.layers.1.attn.{suffix}"].unflatten(0, (GLA.num_heads, -1))[:, size:]

    first = gradients(model)
    assert (new_rows(first, "q_proj.weight").abs().amax(-1) > 0).all()
    assert new_rows(first, "k_proj.weight").abs().max() == 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 1e-2 * first[name]
    second = gradients(model)
    for suffix in ("k_proj.weight", "gk_proj.1.weight"):
        assert (new_rows(second, suffix).abs().amax(-1) > 0).all()


def test_growing_keys_and_merging_by_formula():
    """Grown keys: the old scale, one more block of keys per head, written out with fla's conventions."""
    config = gla_config(num_hidden_layers=1)
    _, target, _, after = expand(config, "grow_state", "inherit", 2, layers="0")
    attention = loaded(target, after).trunk.layers[0].attn
    assert attention.scale == (config.key_dim // config.num_heads) ** -0.5
    merged = make_plan(config, layers="0", factor=4, init="inherit", op="merge_heads")
    assert RecurrentLM(merged).trunk.layers[0].attn.scale == config.key_dim**-0.5


@pytest.mark.parametrize("config", [MAMBA2, mamba2_config(n_groups=1), mamba2_config(use_conv_bias=False, n_groups=4)])
@pytest.mark.parametrize("factor", [2, 4])
def test_mamba2_lossless_is_exact(config, factor):
    source, target, _, after = expand(config, None, "lossless", factor, layers="all")
    ids = tokens(2, 50)
    assert (loaded(target, after)(ids).logits - source(ids).logits).abs().max() < 1e-12


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.MODEL_TYPE)
@torch.no_grad()
def test_features_are_lossless_to_the_last_bit(config):
    """In fp32, whole, packed, and in segments and steps."""
    source = build(config, dtype=torch.float32)
    before = source.state_dict()
    for options in ({}, {"relu": True, "match_norm": True}):
        target = with_features(config, layers="all", **options)
        model = loaded(target, expand_state_dict(before, config, target), torch.float32)
        ids = tokens(1, 50)
        for lengths in (None, borders([20, 1, 29])):
            assert torch.equal(model(ids, cu_seqlens=lengths).logits, source(ids, cu_seqlens=lengths).logits)
        states = [None, None]
        for segment in ids.split([37] + [1] * 13, dim=1):
            outputs = [m(segment, states=s, output_states=True) for m, s in zip((source, model), states, strict=True)]
            states = [output.states for output in outputs]
            assert torch.equal(outputs[0].logits, outputs[1].logits)


def wide(x, rolls):
    """``[..., (1 + n) K]``: the channels of ``x [..., K]``, then ``x_c x_(c - r)`` of each roll ``r``."""
    channels = range(x.shape[-1])
    blocks = [torch.stack([x[..., c] * x[..., (c - r) % len(channels)] for c in channels], -1) for r in rolls]
    return torch.cat([x, *blocks], dim=-1)


def wide_inputs(inputs, gain, rolls):
    """Inputs of a recurrence without features that computes what one with features has to."""
    if len(inputs) == 5 and inputs[2].ndim == 1:
        x, dt, A, B, C = inputs
        return x, dt, A, wide(B, rolls), with_gain(wide(C, rolls), gain)
    q, k, v, g, *beta = inputs
    q, k, g = wide(q, rolls), wide(k, rolls), g if g.shape[-1] == 1 else g.repeat(1, 1, 1, 1 + len(rolls))
    if not beta:
        return with_gain(q, gain), k, v, g
    added = with_gain(k, gain)
    norm = (1 + added[..., -gain.shape[-1] :].square().sum(-1, keepdim=True)).sqrt()
    return q, added / norm, v, g, *beta


def with_gain(x, gain):
    old = x.shape[-1] - gain.shape[-1]
    return torch.cat([x[..., :old], x[..., old:] * gain], dim=-1)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.MODEL_TYPE)
@torch.no_grad()
def test_features_are_products_of_the_final_keys_and_queries(config, monkeypatch):
    """The oracle has no features: its mixers get the products as inputs, written out here, and the scale of before."""
    model, plain = build(with_features(config, layers="all", rolls=(1, 0))), RecurrentLM(config).double()
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if "feature_gain" not in name})
    for layer, other in zip(model.trunk.layers, plain.trunk.layers, strict=True):
        mixer, gain = mixer_of(other), mixer_of(layer).feature_gain
        final = mixer.scan_inputs
        monkeypatch.setattr(mixer, "scan_inputs", lambda x, f=final, gain=gain: wide_inputs(f(x), gain, (1, 0)))
    ids = tokens(1, 30)
    found, wanted = (m(ids, output_states=True) for m in (model, plain))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-9)
    for state, expected in zip(found.states, wanted.states, strict=True):
        torch.testing.assert_close(state[0], expected[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.MODEL_TYPE)
def test_gains_of_features_learn_at_once(config):
    target = with_features(config, layers="1")
    model = loaded(target, expand_state_dict(build(config).state_dict(), config, target))
    (gradient,) = (grad for name, grad in gradients(model).items() if name.endswith("feature_gain"))
    assert (gradient.abs() > 1e-9).all()


def test_merge_inherit_is_the_original_read_as_one_head():
    """The merged layer reads the rows of its projections in their old order."""
    config = gla_config(num_hidden_layers=1)
    _, target, _, after = expand(config, "merge_heads", "inherit", 4, layers="0")
    mixed = expanded(config, "inherit", factor=4, op="mix_heads")
    other = expand_state_dict(build(config).state_dict(), config, mixed)
    seen = []
    ids = tokens(1, 20)
    for model in (loaded(target, after), loaded(mixed, other)):
        norm = model.trunk.layers[0].attn.get_submodule("g_norm_swish_gate")
        norm.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
        model(ids)
    merged, blocks = seen
    torch.testing.assert_close(merged.flatten(2), blocks.flatten(2), rtol=0, atol=1e-12)


def gradients(model, seed=1):
    model.zero_grad()
    model(tokens(1, 30), labels=tokens(1, 30, seed=seed)).loss_sum.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gla_mix_learns_off_the_diagonal_at_once():
    _, target, _, after = expand(GLA, "mix_heads", "lossless", 4)
    grad = gradients(loaded(target, after))["model.layers.1.attn.mix"]
    assert grad.shape == (4, 4)
    assert (grad.abs() > 1e-9).all()


@pytest.mark.parametrize("config", [MAMBA2, mamba2_config(n_groups=1, use_conv_bias=False)])
def test_mamba2_new_rows_learn(config):
    """C_new at once; B_new from the second SGD step on, when C_new is no longer zero."""
    _, target, _, after = expand(config, "grow_state", "lossless", 3)
    model = loaded(target, after)
    name, old = "backbone.layers.1.mixer.in_proj.weight", config.state_size

    def new_rows(values):
        parts = parts_of(name, values, target)
        return {p: parts[p].unflatten(0, (config.n_groups, -1))[:, old:] for p in "BC"}

    first = gradients(model)
    assert new_rows(first[name])["B"].abs().max() == 0
    assert (new_rows(first[name])["C"].abs().amax(-1) > 0).all()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter -= 1e-2 * first[parameter_name]
    second = gradients(model)
    assert (new_rows(second[name])["B"].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("init", ["inherit", "lossless"])
@pytest.mark.parametrize("suffix", ["in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias"])
def test_grown_rows_sit_behind_the_old_ones_of_their_group(init, suffix):
    _, target, before, after = expand(MAMBA2, "grow_state", init, 3)
    name, size = f"backbone.layers.1.mixer.{suffix}", MAMBA2.state_size
    old, new = parts_of(name, before[name], MAMBA2), parts_of(name, after[name], target)
    for part in old:
        if part not in "BC":
            assert torch.equal(old[part], new[part]), part
            continue
        old_groups, new_groups = (x[part].unflatten(0, (2, -1)) for x in (old, new))
        assert new_groups.shape[1] == 3 * size
        assert torch.equal(new_groups[:, :size], old_groups)
        fresh = new_groups[:, size:]
        if suffix.endswith("bias") or (init == "lossless" and (part, suffix) == ("C", "in_proj.weight")):
            assert fresh.abs().max() == 0
        else:
            assert (fresh.flatten(2).abs().amax(-1) > 0).all()
            assert not torch.equal(fresh[0], fresh[1])


@every_case
def test_random_values_do_not_depend_on_order_or_dtype(config, op, init, factor):
    _, target, before, after = expand(config, op, init, factor)
    names = list(before)
    random.Random(0).shuffle(names)
    torch.manual_seed(123)
    again = expand_state_dict({name: before[name] for name in names}, config, target)
    assert again.keys() == after.keys()
    assert all(torch.equal(again[name], after[name]) for name in after)
    half = expand_state_dict({name: x.bfloat16() for name, x in before.items()}, config, target)
    assert all(torch.equal(half[name], after[name].bfloat16()) for name in after)


@pytest.mark.parametrize(("config", "op"), [(GLA, "merge_heads"), (MAMBA2, "grow_state")])
def test_seed_and_name_decide_the_random_values(config, op):
    before = build(config).state_dict()

    def drawn(seed):
        target = make_plan(config, layers="all", factor=2, init="reinit", op=op, seed=seed)
        after = expand_state_dict(before, config, target)
        prefix, part = ("model", "attn.q_proj") if op == "merge_heads" else ("backbone", "mixer.in_proj")
        return [after[f"{prefix}.layers.{i}.{part}.weight"] for i in (0, 1)]

    assert not torch.equal(*drawn(0))
    assert not torch.equal(drawn(0)[0], drawn(1)[0])


def test_layers_expanded_in_two_goes_equal_one_go():
    model = build(MAMBA2)
    once = make_plan(MAMBA2, layers="all", factor=2, init="reinit", seed=3)
    first = make_plan(MAMBA2, layers="0", factor=2, init="reinit", seed=3)
    second = make_plan(first, layers="1", factor=2, init="reinit", seed=3)
    assert second.statex == once.statex
    before = model.state_dict()
    expected = expand_state_dict(before, MAMBA2, once)
    got = expand_state_dict(expand_state_dict(before, MAMBA2, first), first, second)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


class TestRefusals:
    def test_an_expanded_layer(self):
        target = make_plan(MAMBA2, layers="0", factor=2, init="reinit")
        with raises(ConfigError, "layers [0]", "already expanded"):
            make_plan(target, layers="all", factor=2, init="reinit")

    @pytest.mark.parametrize(
        ("config", "options", "words"),
        [
            (
                gla_config(num_heads=5, hidden_size=20),
                {"layers": "0", "factor": 2, "init": "reinit"},
                "plan, layer 0: 5 heads do not divide into groups of 2; the factor must divide num_heads=5",
            ),
            (GLA, {"layers": "7", "factor": 2, "init": "reinit"}, "layer 7 is out of range; the model has layers 0..1"),
            (GLA, {"layers": "0", "factor": 8, "init": "lossless"}, "factor 8 is larger than num_heads=4"),
            (GLA, {"layers": "0", "factor": 1, "init": "reinit"}, "factor must be 2 or more, not 1"),
            (
                GLA,
                {"layers": "0", "factor": 2, "init": "lossless", "op": "merge_heads"},
                "merging heads cannot be lossless; use op mix_heads, or init inherit",
            ),
            (GLA, {"layers": "0", "factor": 2, "init": "copy"}, "init copy is for mamba2"),
            (GLA, {"layers": "0", "factor": 2, "init": "copy", "op": "mix_heads"}, "init copy is for op grow_state"),
            (
                MAMBA2,
                {"layers": "0", "factor": 2, "init": "lossless", "reset_dynamics": True},
                "reset_dynamics changes the function, so the start cannot be lossless",
            ),
            (MAMBA2, {"layers": "0", "factor": 2, "init": "reinit", "op": "mix_heads"}, "does not apply to mamba2"),
            (
                MAMBA2,
                {"layers": "0", "factor": None, "init": "reinit"},
                "--factor full is for models with heads",
            ),
            (
                gla_config(num_heads=1),
                {"layers": "0", "factor": None, "init": "reinit"},
                "factor must be 2 or more, not 1",
            ),
            (GLA, {"layers": "0", "factor": 2, "init": "zero"}, "'zero' is not one of reinit, inherit, lossless, copy"),
        ],
    )
    def test_plans_that_do_not_fit(self, config, options, words):
        with pytest.raises(ConfigError) as caught:
            make_plan(config, **options)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_full_factor_is_the_number_of_heads(self):
        target = make_plan(GLA, layers="every:2", factor=None, init="reinit")
        assert [(e.layer, e.factor, e.op) for e in target.statex.layers] == [(0, 4, "merge_heads")]
        assert target.layer_geometry(0).num_heads == 1
        assert GLA.statex is None, "the source's config was changed"
