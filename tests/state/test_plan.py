from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statex_dist.errors import ConfigError
from statex_dist.state.geometry import FeatureMap
from statex_dist.state.plan import ExpansionPlan, LayerExpansion, extend_plan, select_layers
from tests.raising import raises


def expansion(layer=0, **changes):
    return LayerExpansion(**{"layer": layer, "op": "merge_heads", "factor": 2, "init": "reinit"} | changes)


@pytest.mark.parametrize(
    ("rule", "num_layers", "expected"),
    [
        ("all", 3, (0, 1, 2)),
        ("every:6", 24, (0, 6, 12, 18)),
        ("every:1", 3, (0, 1, 2)),
        ("every:3", 3, (0,)),
        ("every:6", 2, (0,)),
        ("first:2", 5, (0, 1)),
        ("last:2", 5, (3, 4)),
        ("last:5", 5, (0, 1, 2, 3, 4)),
        ("6,0,12", 13, (0, 6, 12)),
        ("4", 5, (4,)),
        ("1,1", 2, (1,)),
    ],
)
def test_rules(rule, num_layers, expected):
    assert select_layers(rule, num_layers) == expected


@pytest.mark.parametrize("rule", ["every:0", "first:0", "last:0", "first:25", "last:99"])
def test_a_count_outside_the_model_is_refused(rule):
    with pytest.raises(ConfigError) as caught:
        select_layers(rule, 24)
    assert f"--layers {rule}: K must" in str(caught.value)


@pytest.mark.parametrize(
    "rule", ["", "none", "every", "every:", "every:-1", "every:2.5", "1,,2", "-1", "1;2", "1, 2", "0-3"]
)
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(ConfigError) as caught:
        select_layers(rule, 24)
    assert f"--layers {rule!r}" in str(caught.value)


def test_a_layer_out_of_range_is_named():
    with raises(ConfigError, "24", "0..23"):
        select_layers("0,24", 24)


@given(st.integers(1, 60), st.integers(1, 60))
def test_every_k_starts_at_zero_and_stays_inside(num_layers, step):
    layers = select_layers(f"every:{step}", num_layers)
    assert layers[0] == 0
    assert len(layers) == -(-num_layers // step)
    assert all(layer % step == 0 and layer < num_layers for layer in layers)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factor": 1}, "plan, layer 3: factor must be 2 or more, not 1"),
        ({"factor": 0}, "factor must be 2 or more, not 0"),
        ({"factor": 2.0}, "factor must be a whole number, not 2.0"),
        ({"factor": True}, "factor must be a whole number, not True"),
        ({"layer": "3"}, "layer must be a whole number, not '3'"),
        ({"op": "split"}, "op 'split' is not one of merge_heads, mix_heads, grow_state"),
        ({"init": "zero"}, "init 'zero' is not one of reinit, inherit, lossless"),
        ({"init": "lossless"}, "merging heads cannot be lossless; use op mix_heads, or init inherit"),
    ],
)
def test_bad_expansions(changes, words):
    with pytest.raises(ConfigError) as caught:
        expansion(**{"layer": 3} | changes)
    assert words in str(caught.value)


def features(rolls=(1, 2, 0), **changes):
    return expansion(
        3, **{"op": "grow_features", "factor": 4, "init": "lossless", "features": {"rolls": rolls}} | changes
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": None}, ("features", "[1, 2, 3]", "None")),
        ({"features": [1]}, ("features", "[1]")),
        ({"features": {}}, ("'features'", "rolls")),
        ({"features": {"rolls": [1, 2, 3], "shift": 1}}, ("'features'", "shift")),
        ({"features": {"rolls": 3}}, ("features.rolls", "3")),
        ({"features": {"rolls": []}}, ("features.rolls", "[]")),
        ({"features": {"rolls": [1, 2, -1]}}, ("features.rolls", "-1")),
        ({"features": {"rolls": [1, 2, True]}}, ("features.rolls", "True")),
        ({"features": {"rolls": [1, 2.0, 3]}}, ("features.rolls", "2.0")),
        ({"features": {"rolls": [1, 2, 1]}}, ("features.rolls", "[1, 2, 1]")),
        ({"features": {"rolls": [1, 2, 3], "relu": 1}}, ("features.relu", "1", "true or false")),
        ({"features": {"rolls": [1, 2, 3], "match_norm": "no"}}, ("features.match_norm", "'no'")),
        ({"factor": 3}, ("[1, 2, 0]", "factor 4", "not 3")),
        ({"init": "inherit"}, ("lossless", "inherit")),
        ({"op": "grow_state"}, ("grow_features", "grow_state")),
    ],
)
def test_bad_features(changes, words):
    with raises(ConfigError, "plan, layer 3", *words):
        features(**changes)


def test_features_name_themselves_and_come_back_from_json():
    plain, changed = features(), features(features={"rolls": [1, 2, 0], "relu": True, "match_norm": True})
    assert plain.summary == "grow_features x4 lossless (rolls 1-2,0)"
    assert changed.summary == "grow_features x4 lossless (rolls 1-2,0 relu match_norm)"
    for found in (plain, changed):
        plan = ExpansionPlan(layers=(found, expansion(7)))
        assert ExpansionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        assert "features" not in plan.to_dict()["layers"][1]


@pytest.mark.parametrize(
    ("factor", "keys", "rolls"),
    [(4, 64, (1, 2, 3)), (3, 6, (1, 2)), (4, 6, (1, 2, 0)), (2, 1, (0,)), (2, 2, (0,)), (33, 64, (*range(1, 32), 0))],
)
def test_a_factor_takes_the_first_rolls_and_the_squares_last(factor, keys, rolls):
    assert FeatureMap.of_factor(factor, keys).rolls == rolls
    products = {frozenset((c, (c - r) % keys)) for r in rolls for c in range(keys)}
    assert len(products) == keys * len(rolls), "two channels are the same product"


@pytest.mark.parametrize(("factor", "keys", "allowed"), [(1, 64, "2 to 33"), (34, 64, "2 to 33"), (5, 6, "2 to 4")])
def test_a_factor_has_as_many_products(factor, keys, allowed):
    with raises(ConfigError, "grow_features", factor, allowed):
        FeatureMap.of_factor(factor, keys)


def test_a_plan_is_sorted_and_finds_its_layers():
    plan = ExpansionPlan(layers=(expansion(5), expansion(1)))
    assert [e.layer for e in plan.layers] == [1, 5]
    assert plan.get(5) == expansion(5)
    assert plan.get(2) is None


def test_one_expansion_a_layer():
    with raises(ConfigError, "[1]"):
        ExpansionPlan(layers=(expansion(1), expansion(1), expansion(2)))


@pytest.mark.parametrize("seed", ["1", 1.5, None, True])
def test_a_seed_is_a_whole_number(seed):
    with raises(ConfigError, "seed", "whole number"):
        expansion(seed=seed)


def test_round_trip_through_json():
    plan = ExpansionPlan(
        layers=(expansion(0, op="mix_heads", init="lossless"), expansion(7, op="grow_state", factor=4, seed=11))
    )
    assert ExpansionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (None, "'statex' must hold a plan with a list 'layers', not None"),
        ({"version": 1}, "must hold a plan with a list 'layers'"),
        ({"version": 1, "layers": {}}, "must hold a plan with a list 'layers'"),
        ({"layers": []}, "plan version None; this release reads 1"),
        ({"version": 2, "layers": []}, "plan version 2; this release reads 1"),
        ({"version": 1, "layers": [{"layer": 1}]}, "bad entry in statex.layers"),
        ({"version": 1, "layers": ["x"]}, "bad entry in statex.layers"),
        (
            {"version": 1, "layers": [{"layer": 1, "op": "mix_heads", "factor": 2, "init": "reinit", "rank": 3}]},
            "unexpected keyword argument 'rank'",
        ),
    ],
)
def test_bad_stored_plans(values, words):
    with pytest.raises(ConfigError) as caught:
        ExpansionPlan.from_dict(values)
    assert words in str(caught.value)


def test_extending():
    first = extend_plan(None, [expansion(2, seed=1)])
    assert first == ExpansionPlan(layers=(expansion(2, seed=1),))
    second = extend_plan(first, [expansion(0, seed=4)])
    assert [e.layer for e in second.layers] == [0, 2]
    assert [e.seed for e in second.layers] == [4, 1]
    with raises(ConfigError, "[2]"):
        extend_plan(first, [expansion(1), expansion(2)])
