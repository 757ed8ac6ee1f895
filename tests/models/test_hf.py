from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from statex_dist.checkpoint.formats.safetensors import INDEX_NAME
from statex_dist.checkpoint.formats.safetensors import SINGLE_NAME as WEIGHTS_NAME
from statex_dist.errors import CheckpointError, StateXError
from statex_dist.models.hf import from_pretrained, save_pretrained
from statex_dist.models.registry import read_config
from tests.models.tiny import (
    CONFIGS,
    build,
    gla_config,
    mamba2_config,
    skip_where_transformers_norm_is_wrong,
    tokens,
)
from tests.raising import raises


def edit_config(directory, **changes):
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "DROP"}))


def edit_tensors(directory, change):
    tensors = load_file(directory / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, directory / WEIGHTS_NAME)


@pytest.fixture
def saved(tmp_path):
    save_pretrained(build(mamba2_config(), dtype=torch.float32), tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_equal(tmp_path, config, dtype):
    model = build(config, dtype=dtype)
    save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS_NAME)
    assert ("lm_head.weight" in stored) != config.tie_word_embeddings
    again = from_pretrained(tmp_path)
    assert again.config == config
    expected = model.state_dict()
    for name, value in again.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, expected[name]), name
    with torch.no_grad():
        assert torch.equal(again(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
    if config.tie_word_embeddings:
        assert again.lm_head.weight is again.trunk.embeddings.weight


def test_dtype_can_be_chosen(saved):
    model = from_pretrained(saved, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_unknown_config_keys_survive(saved, tmp_path):
    edit_config(saved, transformers_version="5.24.0", my_note={"a": [1]})
    save_pretrained(from_pretrained(saved), tmp_path / "again")
    values = json.loads((tmp_path / "again/config.json").read_text())
    assert values["my_note"] == {"a": [1]}
    assert values["transformers_version"] == "5.24.0"
    assert values == json.loads((saved / "config.json").read_text())


def test_shards_with_an_index(tmp_path):
    model = build(gla_config(), dtype=torch.float32)
    save_pretrained(model, tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    save_torch_state_dict(model.state_dict(), tmp_path, max_shard_size=4000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    again = from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    with raises(CheckpointError, victim.name, "missing", INDEX_NAME):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("changes", [{}, {"n_groups": 1, "tie_word_embeddings": True}], ids=["untied", "tied"])
def test_transformers_loads_a_plain_mamba2_directory(tmp_path, changes):
    model = build(mamba2_config(**changes), dtype=torch.float32)
    save_pretrained(model, tmp_path)
    skip_where_transformers_norm_is_wrong(model.config)
    other, report = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = tokens(2, 21)
    with torch.no_grad():
        assert (model(ids).logits - other(ids).logits).abs().max() < 1e-4


SAVED_BY_TRANSFORMERS = {
    "default": {},
    "one group": {"n_groups": 1},
    "a group per head": {"n_groups": 4},
    "eight groups": {"n_groups": 8, "num_heads": 8, "head_dim": 4},
    "biases": {"use_bias": True},
    "no convolution bias": {"use_conv_bias": False, "conv_kernel": 3},
    "tied": {"tie_word_embeddings": True},
    "limits": {"time_step_limit": (0.02, 0.5)},
    "one limit": {"time_step_limit": (0.05, float("inf"))},
    "no limits": {"time_step_limit": (float("-inf"), float("inf"))},
}


@pytest.mark.parametrize("variant", SAVED_BY_TRANSFORMERS)
def test_we_load_what_transformers_writes(tmp_path, variant):
    """transformers 5 writes infinities as objects, and a tied head not at all."""
    values = mamba2_config().to_dict() | SAVED_BY_TRANSFORMERS[variant]
    other = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**values)).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    other.save_pretrained(tmp_path)
    skip_where_transformers_norm_is_wrong(other.config)
    ids = tokens(2, 21)
    with torch.no_grad():
        expected = other(ids).logits
        assert expected.abs().max() > 0.1, "a comparison of zeros would prove nothing"
        assert (from_pretrained(tmp_path)(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


GROW = {"layer": 0, "op": "grow_state", "factor": 2, "init": "reinit"}


class TestBadInput:
    """Each case asserts the words that tell a user what is wrong."""

    def refused(self, directory, *words):
        with pytest.raises(StateXError) as caught:
            from_pretrained(directory)
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert word in message, message

    def test_no_directory(self, tmp_path):
        self.refused(tmp_path / "nowhere", "model directory or checkpoint not found", "nowhere")

    def test_a_file(self, saved):
        self.refused(saved / WEIGHTS_NAME, "is a file; give the directory that holds the checkpoint")

    def test_no_config(self, saved):
        (saved / "config.json").unlink()
        self.refused(saved, "holds no config.json")

    @pytest.mark.parametrize("text", ["{", "", "\udc80"])
    def test_broken_config(self, saved, text):
        (saved / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        self.refused(saved, "config.json cannot be read")

    def test_config_that_is_no_object(self, saved):
        (saved / "config.json").write_text("[1]")
        self.refused(saved, "does not hold a JSON object")

    @pytest.mark.parametrize("kind", ["llama", None, 3, ["gla"], {}])
    def test_other_architecture(self, saved, kind):
        edit_config(saved, model_type=kind)
        self.refused(saved, f"model_type {kind!r} is not supported; supported: gla, mamba2")

    def test_missing_key(self, saved):
        edit_config(saved, num_heads="DROP", head_dim="DROP")
        self.refused(saved, "config.json of a mamba2 model lacks num_heads, head_dim")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("num_heads", "4"),
            ("num_heads", 4.0),
            ("num_heads", True),
            ("num_heads", None),
            ("use_bias", 1),
            ("layer_norm_epsilon", "1e-5"),
            ("time_step_limit", [0.0, "inf"]),
            ("pad_token_id", "0"),
        ],
    )
    def test_wrong_type(self, saved, key, value):
        edit_config(saved, **{key: value})
        self.refused(saved, f"config.json: '{key}' must be", repr(value))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"vocab_size": 0}, "vocab_size must be 1 or more, not 0"),
            ({"num_hidden_layers": -1}, "num_hidden_layers must be 1 or more, not -1"),
            ({"num_heads": 3}, "num_heads=3 x head_dim=8 must equal expand x hidden_size = 32"),
            ({"n_groups": 3}, "n_groups=3 must divide num_heads=4"),
            ({"n_groups": 0}, "n_groups must be 1 or more, not 0"),
            ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
            ({"num_heads": -4, "head_dim": -8}, "num_heads"),
            ({"state_size": 0}, "state_size"),
            ({"conv_kernel": 0}, "conv_kernel"),
            ({"time_step_limit": [0.1]}, "time_step_limit"),
        ],
    )
    def test_impossible_mamba2(self, saved, changes, words):
        edit_config(saved, **changes)
        self.refused(saved, words)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"num_heads": 3}, "num_heads=3 must divide the key size 16 and the value size 32"),
            ({"num_heads": 0}, "num_heads must be 1 or more, not 0"),
            ({"expand_k": 0.0}, "expand_k must be a number above 0"),
            ({"num_kv_heads": 2}, "num_kv_heads=2 is not supported"),
            ({"feature_map": "relu"}, "feature_map='relu' is not supported"),
            ({"use_output_gate": False}, "use_output_gate=False is not supported"),
            ({"attn": {"layers": [1]}}, "attn has no num_heads"),
            ({"attn": {"layers": [1], "num_heads": 4}}, "layers.1.attn.gk_proj"),
            ({"attn": {"layers": [7]}}, "attn names layer 7, which does not exist"),
            ({"conv_size": 0, "use_short_conv": True}, "conv_size"),
            ({"gate_logit_normalizer": 0}, "gate_logit_normalizer"),
            ({"gate_logit_normalizer": 4, "architectures": ["GLAForCausalLM"]}, "gate_logit_normalizer=4"),
            ({"attnres_block_size": 2}, "attnres_block_size=2"),
        ],
    )
    def test_impossible_gla(self, tmp_path, changes, words):
        save_pretrained(build(gla_config(), dtype=torch.float32), tmp_path)
        edit_config(tmp_path, **changes)
        self.refused(tmp_path, words)

    @pytest.mark.parametrize(
        ("plan", "words"),
        [
            (3, "'statex' must hold a plan with a list 'layers'"),
            ({"version": 9, "layers": []}, "plan version 9; this release reads 1"),
            ({"version": 1, "layers": [{"layer": 0}]}, "bad entry in statex.layers"),
            ({"version": 1, "layers": [3]}, "bad entry in statex.layers"),
            (
                {"version": 1, "layers": [{"layer": 9, "op": "grow_state", "factor": 2, "init": "reinit"}]},
                "layers 0..1",
            ),
            (
                {"version": 1, "layers": [{"layer": 0, "op": "merge_heads", "factor": 2, "init": "reinit"}]},
                "grow_state",
            ),
        ],
    )
    def test_bad_plan(self, saved, plan, words):
        edit_config(saved, statex=plan)
        self.refused(saved, words)

    def test_no_weights(self, saved):
        (saved / WEIGHTS_NAME).unlink()
        self.refused(saved, "is not a checkpoint: looked for", WEIGHTS_NAME)

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated_weights(self, saved, keep):
        path = saved / WEIGHTS_NAME
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(saved, f"{WEIGHTS_NAME} is truncated")

    def test_missing_tensor(self, saved):
        edit_tensors(saved, lambda tensors: tensors.pop("backbone.layers.1.mixer.D"))
        self.refused(saved, "lacks tensor 'backbone.layers.1.mixer.D' of the mamba2 model")

    def test_unknown_tensor(self, saved):
        edit_tensors(saved, lambda tensors: tensors.update({"backbone.extra": torch.ones(1)}))
        self.refused(saved, "holds tensor 'backbone.extra', unknown to the mamba2 model")

    def test_wrong_shape(self, saved):
        edit_tensors(saved, lambda tensors: tensors.update({"backbone.layers.0.mixer.D": torch.ones(5)}))
        self.refused(saved, "'backbone.layers.0.mixer.D' has shape (5,); config.json asks for (4,)")

    @pytest.mark.parametrize(
        "text", ["{", "[]", "{}", "3", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": [1]}}']
    )
    def test_broken_index(self, saved, text):
        (saved / INDEX_NAME).write_text(text)
        self.refused(saved, INDEX_NAME, "weight_map")

    def test_empty_index(self, saved):
        (saved / INDEX_NAME).write_text('{"weight_map": {}}')
        self.refused(saved, INDEX_NAME, "weight_map is empty")

    def test_an_index_cannot_leave_its_directory(self, saved):
        (saved / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "../m/model.safetensors"}}))
        self.refused(saved, "only files of the same directory are allowed", "../m/model.safetensors")


def test_read_config_needs_no_weights(saved):
    (saved / WEIGHTS_NAME).unlink()
    assert re.fullmatch("mamba2", read_config(saved).MODEL_TYPE)
