"""``verify``: what it proves, and that it finds every way of spoiling a checkpoint."""

import json

import pytest
import torch
from safetensors.torch import save_file

from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.verify import verify_expansion, verify_same
from statex_dist.errors import CheckpointError
from tests.checkpoints_tools.builders import CONFIGS, GLA, MAMBA2, load_all, run_expand, write_model

OPTIONS = [
    ("gla", {"factor": 2, "init": "reinit"}),
    ("gla", {"factor": 4, "init": "inherit", "reset_dynamics": True}),
    ("gla", {"factor": 3, "init": "lossless"}),
    ("gla", {"factor": 2, "op": "grow_state", "init": "lossless"}),
    ("mamba2", {"factor": 3, "init": "inherit"}),
    ("mamba2", {"factor": 2, "init": "reinit", "reset_dynamics": True}),
    ("mamba2", {"factor": 2, "init": "copy"}),
    ("mamba2", {"op": "grow_features", "rolls": "2,0", "relu": True}),
]


@pytest.mark.parametrize(("family", "options"), OPTIONS)
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_every_expansion_is_proved(tmp_path, family, options, dtype):
    write_model(tmp_path / "in", CONFIGS[family], shards=2)
    report = run_expand(tmp_path / "in", tmp_path / "out", layers="0,2", seed=4, dtype=dtype, **options)
    verdict = verify_expansion(tmp_path / "in", tmp_path / "out")
    assert verdict.differences == []
    note = "floating-point tensors were converted to bfloat16, as config.json says"
    assert verdict.notes == ([note] if dtype else [])
    counts = {}
    for row in report.tensors.values():
        counts[row.change] = counts.get(row.change, 0) + 1
    assert verdict.tensors == counts
    assert verdict.to_dict()["ok"] is True


def test_the_second_of_two_expansions_is_proved_against_the_first_and_both_against_the_base(tmp_path):
    write_model(tmp_path / "in", MAMBA2)
    run_expand(tmp_path / "in", tmp_path / "one", layers="0", factor=2)
    run_expand(tmp_path / "one", tmp_path / "two", layers="1,2", factor=2, seed=9)
    for base, expanded in (("in", "one"), ("one", "two"), ("in", "two")):
        verdict = verify_expansion(tmp_path / base, tmp_path / expanded)
        assert verdict.differences == []
        cumulative = base == "in" and expanded == "two"
        assert len(verdict.notes) == cumulative
    assert verdict.notes == ["expansion_report.json describes the last of several expansions, of layers [1, 2]"]
    assert json.loads((tmp_path / "two/config.json").read_text())["state_size"] == 12
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'one'} .*{tmp_path / 'two'}"):
        verify_expansion(tmp_path / "two", tmp_path / "one")
    with pytest.raises(CheckpointError, match=str(tmp_path / "in")):
        verify_expansion(tmp_path / "in", tmp_path / "in")


def test_a_gain_that_is_not_zero_and_other_features(tmp_path):
    write_model(tmp_path / "in", MAMBA2)
    run_expand(tmp_path / "in", tmp_path / "out", layers="1", op="grow_features", rolls="1,2")
    (tmp_path / "out/MANIFEST.json").unlink()
    tensors = load_all(tmp_path / "out")
    name = "backbone.layers.1.mixer.feature_gain"
    save_file({**tensors, name: tensors[name] + 1e-30}, tmp_path / "out/model.safetensors")
    found = verify_expansion(tmp_path / "in", tmp_path / "out").differences
    assert found == [f"tensor '{name}' (new) differs from row 0 on"]
    save_file(tensors, tmp_path / "out/model.safetensors")
    path = tmp_path / "out/config.json"
    values = json.loads(path.read_text())
    values["statex"]["layers"][0]["features"]["relu"] = True
    path.write_text(json.dumps(values))
    found = verify_expansion(tmp_path / "in", tmp_path / "out").differences
    assert found == ["expansion_report.json: layers is not what was done"]


class TestSpoiled:
    """Each change is made in a directory without a manifest, as another program would leave it."""

    @pytest.fixture
    def pair(self, tmp_path):
        write_model(tmp_path / "in", MAMBA2)
        run_expand(tmp_path / "in", tmp_path / "out", layers="1", factor=2, init="lossless")
        (tmp_path / "out/MANIFEST.json").unlink()
        return tmp_path / "in", tmp_path / "out"

    def spoil(self, pair, change) -> list[str]:
        base, expanded = pair
        tensors = load_all(expanded)
        change(tensors)
        save_file(tensors, expanded / "model.safetensors")
        return verify_expansion(base, expanded).differences

    def add(self, name, *index, value=1.0):
        def change(tensors):
            tensors[name][index] += value

        return change

    def test_nothing(self, pair):
        assert self.spoil(pair, lambda tensors: None) == []

    def test_one_bit_of_a_kept_tensor(self, pair):
        def change(tensors):
            tensors["backbone.norm_f.weight"].view(torch.int32)[3] ^= 1

        found = self.spoil(pair, change)
        assert found == ["tensor 'backbone.norm_f.weight' (kept) differs from row 3 on"]

    def test_a_kept_row_of_a_grown_tensor(self, pair):
        found = self.spoil(pair, self.add("backbone.layers.1.mixer.in_proj.weight", 64, 2))
        assert found == ["tensor 'backbone.layers.1.mixer.in_proj.weight' (grown) differs from row 64 on"]

    def test_a_new_row_that_the_seed_does_not_give(self, pair):
        found = self.spoil(pair, self.add("backbone.layers.1.mixer.in_proj.weight", 71, 0))
        assert found == ["tensor 'backbone.layers.1.mixer.in_proj.weight' (grown) differs from row 71 on"]

    def test_a_new_row_of_zeros_that_is_not(self, pair):
        found = self.spoil(pair, self.add("backbone.layers.1.mixer.in_proj.weight", 83, 0, value=1e-30))
        assert found == ["tensor 'backbone.layers.1.mixer.in_proj.weight' (grown) differs from row 83 on"]

    def test_missing_and_foreign_tensors(self, pair):
        def change(tensors):
            tensors["stranger"] = tensors.pop("backbone.layers.0.mixer.D")

        found = self.spoil(pair, change)
        assert "tensor 'backbone.layers.0.mixer.D' is missing" in found
        assert "tensor 'stranger' should not be there" in found

    def test_another_shape_and_dtype(self, pair):
        def change(tensors):
            tensors["backbone.norm_f.weight"] = torch.ones(17)
            tensors["backbone.layers.0.mixer.D"] = torch.ones(8, dtype=torch.int64)

        found = self.spoil(pair, change)
        assert "tensor 'backbone.norm_f.weight' (kept) has shape (17,), not (16,)" in found
        assert "tensor 'backbone.layers.0.mixer.D' (kept) has dtype int64, not float32" in found

    def test_one_rounded_tensor_is_not_a_conversion(self, pair):
        def change(tensors):
            tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"].bfloat16()

        assert self.spoil(pair, change) == ["tensor 'backbone.norm_f.weight' (kept) has dtype bfloat16, not float32"]

    def test_a_config_that_says_something_else(self, pair):
        path = pair[1] / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "layer_norm_epsilon": 1.0}))
        assert verify_expansion(*pair).differences == ["config.json: layer_norm_epsilon is 1.0, not null"]

    def test_a_plan_with_another_seed(self, pair):
        path = pair[1] / "config.json"
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
        assert "(grown) differs from row 70 on" in verify_expansion(*pair).differences[0]

    def test_a_tokenizer_that_changed_or_is_gone(self, pair):
        (pair[1] / "tokenizer_config.json").write_text("{}")
        (pair[1] / "generation_config.json").unlink()
        (pair[1] / "modeling_other.py").write_text("print('hello')")
        assert verify_expansion(*pair).differences == [
            "generation_config.json of the base is missing",
            "tokenizer_config.json differs from the base's",
            "modeling_other.py is of neither the base nor the expansion",
        ]

    @pytest.mark.parametrize(
        ("keys", "value", "message"),
        [
            (("tensors", "backbone.norm_f.weight", "xxh3_128"), "0" * 32, "the entry of 'backbone.norm_f.weight' is"),
            (("tensors", "backbone.norm_f.weight", "change"), "grown", "the entry of 'backbone.norm_f.weight' is"),
            (("tensors", "stranger"), {"change": "kept"}, "the entry of 'stranger' is not what was found"),
            (("state_after",), 1, "state_after is not what was done"),
            (("layers", 0, "seed"), 9, "layers is not what was done"),
        ],
    )
    def test_a_report_that_says_something_else(self, pair, keys, value, message):
        path = pair[1] / "expansion_report.json"
        report = json.loads(path.read_text())
        place = report
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        path.write_text(json.dumps(report))
        (found,) = verify_expansion(*pair).differences
        assert f"expansion_report.json: {message}" in found

    def test_a_report_that_is_gone_or_broken(self, pair):
        path = pair[1] / "expansion_report.json"
        path.unlink()
        assert verify_expansion(*pair).differences == ["expansion_report.json is missing"]
        path.write_text("{")
        with pytest.raises(CheckpointError, match=r"expansion_report\.json"):
            verify_expansion(*pair)

    def test_a_conversion_that_the_config_does_not_record(self, pair):
        def change(tensors):
            for name in tensors:
                tensors[name] = tensors[name].bfloat16()

        assert all("has dtype bfloat16, not float32" in found for found in self.spoil(pair, change))

    def test_a_base_that_is_not_the_base(self, pair, tmp_path):
        write_model(tmp_path / "other", {**MAMBA2, "initializer_range": 0.2})
        found = verify_expansion(tmp_path / "other", pair[1]).differences
        assert "config.json: initializer_range is null, not 0.2" in found


class TestSameModel:
    def test_another_layout(self, tmp_path):
        from benchmarks.synthetic_zero3 import write_zero3

        tensors = write_model(tmp_path / "hf", GLA, shards=3)
        write_zero3(tmp_path / "zero/global_step1", tensors, 3)
        verdict = verify_same(tmp_path / "hf", tmp_path / "zero")
        assert verdict.ok
        assert verdict.tensors == {"kept": len(tensors)}

    def test_rounded_values_need_a_tolerance(self, tmp_path):
        write_model(tmp_path / "a", GLA)
        reshard(tmp_path / "a", tmp_path / "b", dtype="bf16")
        strict = verify_same(tmp_path / "a", tmp_path / "b")
        assert "has dtype bfloat16, not float32" in strict.differences[0]
        assert verify_same(tmp_path / "a", tmp_path / "b", rtol=2**-8).ok
        assert not verify_same(tmp_path / "a", tmp_path / "b", rtol=2**-12).ok

    def test_tensors_of_one_alone(self, tmp_path):
        tensors = write_model(tmp_path / "a", GLA)
        write_model(tmp_path / "b", GLA, {("x" if n == "lm_head.weight" else n): t for n, t in tensors.items()})
        found = verify_same(tmp_path / "a", tmp_path / "b").differences
        assert found == ["tensor 'lm_head.weight' is in the first alone", "tensor 'x' is in the second alone"]
