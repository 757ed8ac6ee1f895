from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statex_dist.errors import ConfigError
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
