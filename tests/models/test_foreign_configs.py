"""Configurations of other libraries: every key of their classes is read, listed as harmless, or refused by name."""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from checkpoints_tools.export.hf_export import export_notes
from checkpoints_tools.reshard.reshard import reshard
from statex_dist.errors import CheckpointError
from statex_dist.models import config_keys, fla
from statex_dist.models.config import ModelConfig
from statex_dist.models.config_keys import SHARED_KEYS
from statex_dist.models.hf import from_pretrained, save_pretrained
from statex_dist.models.mamba2.config import has_fla_keys
from statex_dist.models.registry import config_from_dict, family_of, make_plan
from statex_dist.models.state_spaces import config as state_spaces
from tests.models.tiny import build, gla_config, hgrn2_config, mamba2_config, minimax_config, retnet_config, tokens

GLA, MAMBA2, MINIMAX = gla_config().to_dict(), mamba2_config().to_dict(), minimax_config().to_dict()
FLA_MAMBA2 = {
    **{"model_type": "mamba2", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8},
    **{"state_size": 6, "norm_eps": 1e-2, "dt_limit": [0.05, 0.4], "initializer_range": 0.3},
}
STATE_SPACES = {
    **{"d_model": 16, "d_intermediate": 0, "n_layer": 2, "vocab_size": 37, "attn_layer_idx": [], "attn_cfg": {}},
    **{"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8},
    **{"tie_embeddings": True, "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 8}},
}


def understood(family: type[ModelConfig]) -> set[str]:
    """Keys of a ``config.json`` of a family that are read, harmless or refused."""
    known = SHARED_KEYS | {*family.FIXED, *family.TRAINING, *family.HARMLESS, *family.ALIASES}
    return known | {field.name for field in fields(family)} - {"extra"}


def arguments_of(package: str, file: str, name: str) -> set[str]:
    """Arguments of a class's ``__init__``, read from its source: an import may need a GPU, or register classes."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / file).is_file():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
            inits = [n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
            if inits:
                return {arg.arg for arg in (*inits[0].args.args, *inits[0].args.kwonlyargs)} - {"self"}
            return {n.target.id for n in found.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    pytest.skip(f"{package} with {file} is not installed")


FLA_CLASSES = {
    "gla": "GLAConfig",
    "hgrn2": "HGRN2Config",
    "retnet": "RetNetConfig",
    "gated_deltanet": "GatedDeltaNetConfig",
    "kda": "KDAConfig",
    "mamba2": "Mamba2Config",
}


class TestEveryKeyOfTheirClasses:
    @pytest.mark.parametrize("family", FLA_CLASSES)
    def test_flash_linear_attention(self, family):
        theirs = arguments_of("fla", f"models/{family}/configuration_{family}.py", FLA_CLASSES[family])
        assert len(theirs) > 20
        assert not theirs - understood(family_of(family).config)

    @pytest.mark.parametrize("family", ["mamba2", "minimax"])
    def test_transformers(self, family):
        theirs = {field.name for field in fields(transformers.CONFIG_MAPPING[family])}
        assert len(theirs) > 20
        assert not theirs - understood(family_of(family).config)

    def test_state_spaces(self):
        assert arguments_of("mamba_ssm", "models/config_mamba.py", "MambaConfig") == state_spaces._TOP_KEYS
        layer = arguments_of("mamba_ssm", "modules/mamba2.py", "Mamba2")
        given_by_the_model = {"d_model", "layer_idx", "device", "dtype"}
        assert layer - given_by_the_model | {"layer"} == state_spaces._SSM_KEYS
        attention = arguments_of("mamba_ssm", "modules/mha.py", "MHA")
        assert attention - (given_by_the_model - {"d_model"}) - {"embed_dim"} == state_spaces._ATTENTION_KEYS.keys()

    def test_attention_of_flash_linear_attention(self):
        theirs = arguments_of("fla", "models/configuration_utils.py", "AttentionSpec")
        assert theirs == {*fla._ATTENTION_KEYS, "layers"}


REFUSED = {
    "fla: attention residuals": (GLA, {"attnres_block_size": 2}, "attnres_block_size=2"),
    "fla: no affine": (GLA, {"elementwise_affine": False}, "elementwise_affine=False"),
    "fla: null affine": (GLA, {"elementwise_affine": None}, "elementwise_affine=None"),
    "fla: power of the MLP": (GLA, {"hidden_act": "powlu"}, "hidden_act='powlu'"),
    "hgrn2: no affine": (hgrn2_config().to_dict(), {"elementwise_affine": False}, "elementwise_affine=False"),
    "retnet: no affine": (retnet_config().to_dict(), {"elementwise_affine": 1}, "elementwise_affine=1"),
    "fla's mamba2: no norm": (FLA_MAMBA2, {"rmsnorm": False}, "rmsnorm=False"),
    "fla's mamba2: null norm": (FLA_MAMBA2, {"rmsnorm": None}, "rmsnorm=None"),
    "fla's mamba2: norm before gate": (FLA_MAMBA2, {"norm_before_gate": True}, "norm_before_gate=True"),
    "fla's mamba2: wide D": (FLA_MAMBA2, {"D_has_hdim": True}, "D_has_hdim=True"),
    "fla's mamba2: two eps": (FLA_MAMBA2, {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-05"),
    "fla's mamba2: two limits": (FLA_MAMBA2, {"time_step_limit": [0.0, math.inf]}, "time_step_limit="),
    "fla's mamba2: eps of transformers alone": (MAMBA2, {"layer_norm_epsilon": 1e-3, "fuse_norm": True}, "norm_eps"),
    "fla's mamba2: text": (FLA_MAMBA2, {"norm_eps": "1e-5"}, "'norm_eps' must be float"),
    "fla's mamba2: bool": (FLA_MAMBA2, {"norm_eps": True}, "'norm_eps' must be float"),
    "fla's mamba2: one limit": (FLA_MAMBA2, {"dt_limit": [0.1]}, "must be two numbers"),
    "fla's mamba2: heads": (FLA_MAMBA2, {"num_heads": 3}, "num_heads=3"),
    "minimax: other names": (
        {k: v for k, v in MINIMAX.items() if k != "layer_types"},
        {"attn_type_list": [0, 0]},
        "attn_type_list",
    ),
    "minimax: two numbers of experts": (MINIMAX, {"num_experts": 2}, "'num_experts'"),
    "tokens: text": (GLA, {"eos_token_id": "2"}, "'eos_token_id'"),
    "tokens: list of text": (GLA, {"eos_token_id": [1, "2"]}, "'eos_token_id'"),
    "tokens: bool": (GLA, {"eos_token_id": True}, "'eos_token_id'"),
    "tokens: list of bools": (GLA, {"eos_token_id": [True]}, "'eos_token_id'"),
    "whole number as a float": (MAMBA2, {"state_size": 6.0}, "'state_size' must be int, not 6.0"),
    "number as text": (MAMBA2, {"state_size": "6"}, "'state_size' must be int, not '6'"),
    "bool as a number": (MAMBA2, {"n_groups": True}, "'n_groups' must be int, not True"),
    "number as a bool": (MAMBA2, {"use_bias": 1}, "'use_bias' must be bool, not 1"),
    "null where transformers has none": (MAMBA2, {"expand": None}, "'expand' must be int, not None"),
    "no model_type": ({k: v for k, v in GLA.items() if k != "model_type"}, {"architectures": ["X"]}, "no model_type"),
}
REFUSED_STATE_SPACES = {
    "d_ssm": (16, "d_ssm=16"),
    "D_has_hdim": (True, "D_has_hdim=True"),
    "rmsnorm": (False, "rmsnorm=False"),
    "norm_before_gate": (True, "norm_before_gate=True"),
    "process_group": ("world", "process_group='world'"),
    "activation": ("gelu", "ssm_cfg.activation"),
    "learnable_init_states": (True, "ssm_cfg.learnable_init_states"),
    "layer_idx": (0, "ssm_cfg.layer_idx"),
    "dt_limit": ([0.1], "ssm_cfg.dt_limit"),
    "dt_min": ("0.1", "ssm_cfg.dt_min"),
    "chunk_size": (64.0, "ssm_cfg.chunk_size"),
    "bias": ("no", "ssm_cfg.bias"),
    "ngroups": (True, "ssm_cfg.ngroups"),
}
REFUSED_AT_THE_TOP = {
    "rms_norm": (False, "rms_norm"),
    "residual_in_fp32": (None, "residual_in_fp32"),
    "tie_embeddings": ("yes", "tie_embeddings"),
    "d_intermediate": (None, "d_intermediate"),
    "norm_epsilon": (1e-6, "norm_epsilon"),
    "initializer_cfg": ({}, "initializer_cfg"),
}


class TestRefused:
    @staticmethod
    def refusal(values: dict) -> str:
        with pytest.raises(CheckpointError) as caught:
            config_from_dict(values)
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) <= 400
        return message

    @pytest.mark.parametrize("case", REFUSED)
    def test_by_name(self, case):
        values, changes, named = REFUSED[case]
        assert named in self.refusal({**values, **changes})

    @pytest.mark.parametrize("key", REFUSED_STATE_SPACES)
    def test_of_ssm_cfg(self, key):
        value, named = REFUSED_STATE_SPACES[key]
        assert named in self.refusal({**STATE_SPACES, "ssm_cfg": {**STATE_SPACES["ssm_cfg"], key: value}})

    @pytest.mark.parametrize("key", REFUSED_AT_THE_TOP)
    def test_of_state_spaces(self, key):
        value, named = REFUSED_AT_THE_TOP[key]
        assert named in self.refusal({**STATE_SPACES, key: value})


ACCEPTED = {
    "end tokens": (GLA, {"eos_token_id": [1, 2]}, "eos_token_id", [1, 2]),
    "no end token": (GLA, {"eos_token_id": None}, "eos_token_id", None),
    "no padding": (GLA, {"pad_token_id": -1}, "pad_token_id", -1),
    "fla: silu": (GLA, {"hidden_act": "silu"}, "hidden_act", "silu"),
    "fla: empty attention": (GLA, {"attn": {}}, "recurrent_layers", (0, 1)),
    "fla: no attention": (GLA, {"attn": None}, "recurrent_layers", (0, 1)),
    "fla: list of no attention": (GLA, {"attn": []}, "recurrent_layers", (0, 1)),
    "mamba2: swish": (MAMBA2, {"hidden_act": "swish"}, "hidden_act", "swish"),
    "mamba2: whole epsilon": (MAMBA2, {"layer_norm_epsilon": 1}, "layer_norm_epsilon", 1),
    "fla's mamba2: epsilon": (FLA_MAMBA2, {}, "final_norm_eps", 1e-2),
    "fla's mamba2: limits": (FLA_MAMBA2, {}, "time_step_limit", (0.05, 0.4)),
    "fla's mamba2: groups": (FLA_MAMBA2, {}, "n_groups", 1),
    "fla's mamba2: heads": (FLA_MAMBA2, {"num_heads": None}, "num_heads", 4),
    "fla's mamba2: both names": (FLA_MAMBA2, {"layer_norm_epsilon": 1e-2}, "final_norm_eps", 1e-2),
    "fla's mamba2: steps": (FLA_MAMBA2, {"dt_max": 0.5}, "time_step_max", 0.5),
    "minimax: alias": (
        {k: v for k, v in MINIMAX.items() if k != "num_local_experts"},
        {"num_experts": 3},
        *("num_local_experts", 3),
    ),
    "minimax: swish": (MINIMAX, {"hidden_act": "swish"}, "hidden_act", "swish"),
    "minimax: rope of transformers 5": (MINIMAX, {"rope_parameters": {"rope_theta": 1e4}}, "obstacle", None),
    "minimax: rope of transformers 4": (MINIMAX, {"rope_theta": 1e4, "rope_scaling": None}, "obstacle", None),
    "state-spaces: limits": (
        STATE_SPACES,
        {"ssm_cfg": {**STATE_SPACES["ssm_cfg"], "dt_limit": [0.05, {"__float__": "Infinity"}]}},
        *("time_step_limit", (0.05, math.inf)),
    ),
    "state-spaces: chunks": (
        STATE_SPACES,
        {"ssm_cfg": {**STATE_SPACES["ssm_cfg"], "chunk_size": 64, "A_init_range": [1, 2], "use_mem_eff_path": False}},
        *("chunk_size", 64),
    ),
    "state-spaces: null lists": (STATE_SPACES, {"attn_layer_idx": None, "attn_cfg": None}, "recurrent_layers", (0, 1)),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_and_written_back(case):
    values, changes, field, expected = ACCEPTED[case]
    config = config_from_dict({**values, **changes})
    assert getattr(config, field) == expected
    again = config_from_dict(config.to_dict())
    assert getattr(again, field) == expected
    assert again == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"my_note": 1}, "my_note"),
        ({"use_l2warp": True}, "use_l2warp"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_other.OtherModel"}}, "modeling_other.OtherModel"),
    ],
)
def test_what_is_not_read_is_reported_once(caplog, changes, words):
    config_keys._report.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            config_from_dict(GLA | changes)
    assert [words in record.getMessage() for record in caplog.records] == [True]


def test_what_fla_and_transformers_share_is_silent(caplog):
    config_keys._report.cache_clear()
    with caplog.at_level(logging.WARNING):
        for values in (GLA, MAMBA2, MINIMAX, FLA_MAMBA2, STATE_SPACES):
            config_from_dict({**values, "architectures": ["X"], "dtype": "float32", "_name_or_path": "a/b"})
    assert not caplog.records


def write_fla_mamba2(directory: Path) -> torch.nn.Module:
    """A directory as fla writes it: its own keys alone."""
    model = build(config_from_dict(FLA_MAMBA2), dtype=torch.float32)
    save_pretrained(model, directory)
    (directory / "config.json").write_text(json.dumps(FLA_MAMBA2))
    return model


class TestExportOfFlaMamba2:
    def test_transformers_computes_the_same(self, tmp_path):
        """Under its names of the same values; fla's rescaling of first values must not reach loaded weights."""
        model = write_fla_mamba2(tmp_path / "in")
        reshard(tmp_path / "in", tmp_path / "out", to="hf")
        values = json.loads((tmp_path / "out/config.json").read_text())
        assert values["layer_norm_epsilon"] == values["norm_eps"] == 1e-2
        assert values["time_step_limit"] == values["dt_limit"] == [0.05, 0.4]
        assert any("rescale_prenorm_residual" in note for note in export_notes(model.config))
        other = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "out")
        ids = tokens(2, 21)
        with torch.no_grad():
            expected = model(ids).logits
            assert (other(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert torch.equal(from_pretrained(tmp_path / "out")(ids).logits, expected)

    def test_a_plan_for_one_layer_brings_code(self, tmp_path):
        write_fla_mamba2(tmp_path / "in")
        config = make_plan(config_from_dict(FLA_MAMBA2), layers="1", factor=2, init="inherit")
        model = build(config, dtype=torch.float32)
        save_pretrained(model, tmp_path / "grown")
        reshard(tmp_path / "grown", tmp_path / "out", to="hf")
        assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "statex_mamba2"
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
        ids = tokens(2, 21)
        with torch.no_grad():
            expected = model(ids).logits
            assert (other(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rescaling_of_first_values_does_not_reach_an_export(tmp_path):
    model = build(mamba2_config(n_groups=1, rescale_prenorm_residual=True), dtype=torch.float32)
    save_pretrained(model, tmp_path / "in")
    reshard(tmp_path / "in", tmp_path / "out", to="hf")
    other = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokens(2, 21)
    with torch.no_grad():
        expected = model(ids).logits
        assert (other(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_step_limits_of_state_spaces_are_those_of_transformers(tmp_path):
    """mamba_ssm clamps steps after the softplus, as transformers does under another key."""
    limits = [0.4, 0.6]
    values = {**STATE_SPACES, "ssm_cfg": {**STATE_SPACES["ssm_cfg"], "dt_limit": limits}}
    config = config_from_dict(values)
    model = build(config, dtype=torch.float32)
    tensors = {name: t.clone() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(values))
    settings = {f.name: getattr(config, f.name) for f in fields(mamba2_config())}
    settings = {key: value for key, value in settings.items() if key not in ("statex", "extra")}
    other = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**settings)).eval()
    other.load_state_dict(
        {name.replace("embedding.", "embeddings."): t for name, t in tensors.items()}
        | {"lm_head.weight": tensors["backbone.embedding.weight"]}
    )
    ids = tokens(2, 21, vocab=37)
    with torch.no_grad():
        expected = other(ids).logits
        ours = from_pretrained(source)(ids).logits
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
        for block in other.backbone.layers:
            block.mixer.time_step_limit = (0.0, math.inf)
        assert (ours - other(ids).logits).abs().max() > 1e-2 * expected.abs().max(), "the limits matter"
    reshard(source, target, to="hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
    with torch.no_grad():
        assert (again(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_fla_keys_are_told_from_those_of_transformers():
    assert has_fla_keys(FLA_MAMBA2)
    assert not has_fla_keys(MAMBA2)
    assert not has_fla_keys(transformers.Mamba2Config().to_dict())
