"""Options of a plan: plans in YAML, total sizes, the authors' recipes."""

import json

import pytest

from checkpoints_tools.plan.options import RECIPES, PlanOptions, plan_model
from statex_dist.errors import ConfigError
from statex_dist.models.registry import config_from_dict
from statex_dist.state.geometry import FeatureMap
from tests.checkpoints_tools.builders import GLA, MAMBA2
from tests.raising import raises

GLA_1B3 = {
    **{"model_type": "gla", "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4},
    **{"expand_k": 0.5, "expand_v": 1.0},
}
MAMBA2_1B3 = {
    **{"model_type": "mamba2", "vocab_size": 50288, "hidden_size": 2048, "num_hidden_layers": 48},
    **{"num_heads": 64, "head_dim": 64, "state_size": 128, "n_groups": 1},
}


def planned(values, **options):
    return plan_model(config_from_dict(values), PlanOptions(**options)).statex.layers


class TestPlanFile:
    def write(self, tmp_path, text: str):
        path = tmp_path / "plan.yaml"
        path.write_text(text)
        return path

    def test_rows_by_rule_by_list_and_by_layer(self, tmp_path):
        text = """
        - layers: every:2
          op: merge_heads
          factor: full
          init: inherit
        - {layer: 1, op: grow_state, factor: 3, init: lossless, seed: 9}
        """
        rows = planned(GLA, plan=self.write(tmp_path, text), seed=4)
        assert [(e.layer, e.op, e.factor, e.init, e.seed) for e in rows] == [
            (0, "merge_heads", 4, "inherit", 4),
            (1, "grow_state", 3, "lossless", 9),
            (2, "merge_heads", 4, "inherit", 4),
        ]
        rows = planned(GLA, plan=self.write(tmp_path, "- layers: [0, 2]\n- layers: '1'\n  init: lossless"))
        assert [(e.layer, e.op) for e in rows] == [(0, "merge_heads"), (1, "mix_heads"), (2, "merge_heads")]

    def test_features_of_a_row(self, tmp_path):
        text = "- {layer: 0, op: grow_features, rolls: [2, 0], relu: true}\n- {layers: [1, 2], op: grow_features}"
        first, *others = planned(MAMBA2, plan=self.write(tmp_path, text))
        assert (first.factor, first.init, first.features) == (3, "lossless", FeatureMap(rolls=[2, 0], relu=True))
        assert [(e.factor, e.features) for e in others] == [(4, FeatureMap(rolls=[1, 2, 0]))] * 2

    def test_the_form_of_config_json_is_a_plan_file(self, tmp_path):
        config = plan_model(config_from_dict(MAMBA2), PlanOptions(layers="0,2", factor=3, seed=2, init="inherit"))
        config = plan_model(config, PlanOptions(layers="1", op="grow_features", rolls=[1], match_norm=True))
        path = self.write(tmp_path, json.dumps(config.statex.to_dict()))
        assert planned(MAMBA2, plan=path) == config.statex.layers

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "list of rows"),
            ("layers: 3", "list of rows"),
            ("[", "is not YAML"),
            ("- 3", "row 1: .*'layer' and 'layers', not 3"),
            ("- op: mix_heads", "row 1: .*'layer' and 'layers'"),
            ("- {layer: 0, layers: all}", "row 1: needs one of"),
            ("- {layer: 0}\n- {layer: 1, heads: 2}", r"row 2: .*\['heads'\].*layer, layers, op"),
            ("- {layer: 0, init: zero}", "--init 'zero'"),
            ("- {layer: 0}\n- {layer: 0}", r"layers \[0\] are already expanded"),
            ("- {layer: 7}", "layer 7.*range"),
            ("- {layer: 0, factor: most}", "--factor 'most' is neither"),
            ("- {layer: -1}", "--layers '-1'"),
            ("- {layer: 0, rolls: 0}", "--rolls is for --op grow_features, not merge_heads"),
            (
                "- {layer: 0, op: grow_state, features: {rolls: [1]}}",
                "features is for --op grow_features, not grow_state",
            ),
            ("- {layer: 0, op: grow_features, relu: true, features: {rolls: [1]}}", "relu both in 'features'"),
            ("- {layer: 0, op: grow_features, features: {roll: [1]}}", "'features'.*rolls, relu, match_norm"),
            ("- {layer: 0, op: grow_features, factor: 2, relu: 1}", "features.relu must be true or false, not 1"),
        ],
    )
    def test_bad_files(self, tmp_path, text, message):
        with pytest.raises(ConfigError, match=message):
            planned(GLA, plan=self.write(tmp_path, text))

    def test_no_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"--plan .*nowhere\.yaml"):
            planned(GLA, plan=tmp_path / "nowhere.yaml")


class TestTargetState:
    def test_the_papers_size_gives_the_papers_plan(self):
        rows = planned(GLA_1B3, target_state="1.5x")
        assert [(e.layer, e.op, e.factor) for e in rows] == [(i, "merge_heads", 4) for i in (0, 6, 12, 18)]
        rows = planned(GLA_1B3, target_state="18.9M")
        assert [e.layer for e in rows] == [0, 6, 12, 18]

    def test_free_factor_and_layers(self):
        config = config_from_dict(GLA_1B3)
        for target, options in (("2x", {}), ("1.25x", {"init": "lossless"}), ("3x", {"op": "grow_state"})):
            after = plan_model(config, PlanOptions(target_state=target, **options))
            assert after.state_elements == pytest.approx(float(target[:-1]) * config.state_elements, rel=0.05)

    def test_features_of_a_size(self):
        rows = planned(GLA_1B3, target_state="1.5x", op="grow_features", layers="every:6", relu=True)
        assert {(e.factor, e.features) for e in rows} == {(4, FeatureMap(rolls=[1, 2, 3], relu=True))}
        rows = planned(MAMBA2_1B3, target_state="2x", op="grow_features", rolls="2,4,0")
        assert {e.features for e in rows} == {FeatureMap(rolls=[2, 4, 0])}
        assert len(rows) == 16
        rows = planned(MAMBA2_1B3, target_state="13x", op="grow_features", layers="all")
        assert {e.factor for e in rows} == {13}

    def test_what_is_given_stays(self):
        rows = planned(MAMBA2_1B3, target_state="2x", factor=4)
        assert {e.factor for e in rows} == {4}
        assert len(rows) == 16
        rows = planned(MAMBA2_1B3, target_state="2x", layers="every:3")
        assert {e.factor for e in rows} == {4}
        assert [e.layer for e in rows] == list(range(0, 48, 3))

    def test_on_top_of_an_earlier_plan(self):
        config = plan_model(config_from_dict(GLA_1B3), PlanOptions(layers="0", factor=2))
        after = plan_model(config, PlanOptions(target_state="1.4x", op="mix_heads"))
        assert after.state_elements == pytest.approx(1.4 * config.state_elements, rel=0.05)
        assert after.statex.get(0) == config.statex.get(0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target_state": "much"}, "--target-state 'much'"),
            ({"target_state": "1x"}, "12,582,912"),
            (
                {"target_state": "9x"},
                r"merge_heads .* 4 .*\(4\.00x\)",
            ),
            ({"target_state": "2x", "layers": "0"}, r"4 times.*\[0\] \(1\.12x\)"),
            ({"target_state": "1.5x", "factor": 3}, "4 heads.*groups of 3"),
        ],
    )
    def test_out_of_reach(self, options, message):
        with pytest.raises(ConfigError, match=message):
            planned(GLA_1B3, **options)

    def test_nothing_left_to_expand(self):
        config = plan_model(config_from_dict(GLA), PlanOptions(layers="all", factor=2))
        with raises(ConfigError, "expanded already"):
            plan_model(config, PlanOptions(target_state="4x"))


class TestRecipes:
    def test_each_is_the_authors_plan(self):
        assert [(e.layer, e.op, e.factor, e.init) for e in planned(GLA_1B3, recipe="statex-paper-gla")] == [
            (i, "merge_heads", 4, "reinit") for i in (0, 6, 12, 18)
        ]
        assert {e.init for e in planned(GLA_1B3, recipe="statex-paper-merge")} == {"inherit"}
        mamba4 = planned(MAMBA2_1B3, recipe="statex-paper-mamba4")
        assert [(e.layer, e.factor, e.init) for e in mamba4] == [(i, 4, "reinit") for i in range(48)]
        assert {e.init for e in planned(MAMBA2_1B3, recipe="statex-paper-merge-copy", layers="0,5")} == {"copy"}
        for name in RECIPES:
            values = MAMBA2_1B3 if "grow" in RECIPES[name]["op"] else GLA_1B3
            assert all(e.reset_dynamics for e in planned(values, recipe=name))

    def test_a_recipe_of_the_other_family(self):
        with pytest.raises(ConfigError, match=r"--recipe statex-paper-gla .* gla; .* mamba2 "):
            planned(MAMBA2_1B3, recipe="statex-paper-gla")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "mine"}, "--recipe 'mine'.*statex-paper-gla.*statex-paper-merge"),
        (
            {"recipe": "statex-paper-gla", "factor": 2, "init": "inherit"},
            "--recipe .* --factor, --init ",
        ),
        ({"plan": "x.yaml", "layers": "all"}, "--plan .* --layers "),
        ({"plan": "x.yaml", "reset_dynamics": True}, "--plan .* --reset-dynamics "),
        ({"op": "merge"}, "--op 'merge'.*merge_heads.*mix_heads.*grow_state"),
        ({"recipe": "statex-paper-gla", "rolls": "1"}, "--recipe .* --rolls "),
        ({"plan": "x.yaml", "relu": True, "match_norm": True}, "--plan .* --relu, --match-norm "),
        ({"rolls": "1"}, "--rolls is for --op grow_features; give"),
        ({"op": "mix_heads", "match_norm": True}, "--match-norm is for --op grow_features, not mix_heads"),
        ({"op": "grow_features", "rolls": "1,two"}, "--rolls '1,two' .*such as 1,2,3"),
    ],
)
def test_options_that_clash(options, message):
    with pytest.raises(ConfigError, match=message):
        PlanOptions(**options)


@pytest.mark.parametrize(
    ("values", "options", "named"),
    [
        (MAMBA2, {"factor": 5}, ("factor 5", "2 to 4")),
        (MAMBA2, {"factor": 0, "target_state": "2x"}, ("factor 0", "2 to 4")),
        (MAMBA2, {"factor": 3, "rolls": "1,2,0"}, ("--factor 3", "--rolls 1,2,0", "4")),
        (MAMBA2, {"factor": "full"}, ("--factor full", "grow_features")),
        (MAMBA2, {"rolls": "3"}, ("roll 3", "0 (the squares) to 2")),
        (MAMBA2, {"rolls": "1,1"}, ("features.rolls", "once", "[1, 1]")),
        (MAMBA2, {"init": "inherit"}, ("lossless", "inherit")),
        (MAMBA2, {"reset_dynamics": True}, ("reset_dynamics",)),
    ],
)
def test_features_that_cannot_be(values, options, named):
    with raises(ConfigError, *named):
        planned(values, op="grow_features", **options)


@pytest.mark.parametrize("options", [{}, {"target_state": "2x"}])
def test_features_of_a_family_that_has_none(options, monkeypatch):
    monkeypatch.setattr(type(config_from_dict(MAMBA2)), "OPS", ("grow_state",))
    with raises(ConfigError, "mamba2", "grow_state"):
        planned(MAMBA2, op="grow_features", **options)
