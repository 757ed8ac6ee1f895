"""Entries of a Hugging Face directory besides its tensors: file metadata, dtype, and the names of a plan."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from checkpoints_tools.io.documents import with_dtype
from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.verify import verify_expansion, verify_same
from launch.cli import main
from statex_dist.errors import CheckpointError
from statex_dist.models.config import read_config_dict
from statex_dist.models.config_keys import AUTO_MAP, NO_ACTIVATION, without_plan
from statex_dist.models.hf import from_pretrained
from statex_dist.models.registry import config_from_dict
from tests.checkpoints_tools.builders import CONFIGS, GLA, MAMBA2, run_expand, write_model
from tests.models.tiny import tokens
from tests.raising import raises

EXPAND = {"layers": "0", "factor": 2, "op": "mix_heads", "init": "inherit"}


def metadata(directory) -> list[dict[str, str]]:
    found = []
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.append(file.metadata())
    return found


def edit(directory, *dropped, **changes):
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in dropped}))


@pytest.mark.parametrize("given", ["np", "tf", "flax", "mlx", "numpy", None])
def test_the_format_is_that_of_torch_whatever_the_source_says(tmp_path, given):
    tensors = write_model(tmp_path / "in", MAMBA2)
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    more = None if given is None else {"format": given, "note": "kept"}
    safetensors.numpy.save_file(arrays, tmp_path / "in/model.safetensors", metadata=more)
    run_expand(tmp_path / "in", tmp_path / "x", layers="all", factor=2)
    reshard(tmp_path / "in", tmp_path / "hf", dtype="bf16")
    reshard(tmp_path / "in", tmp_path / "tp", to="tp", tp=2)
    wanted = {"format": "pt"} if given is None else {"format": "pt", "note": "kept"}
    for name in ("x", "hf"):
        assert metadata(tmp_path / name) == [wanted]
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
    assert {entries["format"] for entries in metadata(tmp_path / "tp")} == {"pt"}
    assert verify_expansion(tmp_path / "in", tmp_path / "x").ok


def test_an_entry_on_which_shards_differ_is_left_out_with_a_message(tmp_path, caplog):
    write_model(tmp_path / "in", GLA, shards=2)
    for number, path in enumerate(sorted((tmp_path / "in").glob("*.safetensors"))):
        tensors = safetensors.torch.load_file(path)
        save_file(tensors, path, metadata={"format": ("pt", "np")[number], "part": str(number), "note": "kept"})
    run_expand(tmp_path / "in", tmp_path / "x", **EXPAND)
    assert metadata(tmp_path / "x") == [{"format": "pt", "note": "kept"}]
    assert "metadata part" in caplog.text
    assert verify_expansion(tmp_path / "in", tmp_path / "x").ok


def test_one_key_names_the_dtype(tmp_path):
    for given, wanted in (
        ({}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": None}, {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": "float16", "dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "bfloat16", "dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ):
        assert with_dtype({"a": 1, **given}, "BF16") == {"a": 1, **wanted}
        write_model(tmp_path / "in", {**MAMBA2, **given})
        reshard(tmp_path / "in", tmp_path / "out", dtype="bf16")
        values = json.loads((tmp_path / "out/config.json").read_text())
        assert {key: value for key, value in values.items() if "dtype" in key} == wanted
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.dtype == torch.bfloat16
        for name in ("in", "out"):
            for path in (tmp_path / name).iterdir():
                path.unlink()


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_an_expansion_corrects_two_dtypes_that_differ(tmp_path, dtype):
    write_model(tmp_path / "in", {**GLA, "torch_dtype": "float16", "dtype": "bfloat16"})
    run_expand(tmp_path / "in", tmp_path / "x", **EXPAND, dtype=dtype)
    values = json.loads((tmp_path / "x/config.json").read_text())
    assert {k: v for k, v in values.items() if "dtype" in k} == {"dtype": "float32" if dtype is None else "bfloat16"}
    assert verify_expansion(tmp_path / "in", tmp_path / "x").ok


@pytest.mark.parametrize("family", CONFIGS)
def test_what_a_plan_changes_is_restored(tmp_path, family):
    values = {**CONFIGS[family], "architectures": ["Own"], "hidden_act": {"gla": "swish", "mamba2": "silu"}[family]}
    write_model(tmp_path / "in", values)
    run_expand(tmp_path / "in", tmp_path / "x", layers="0", factor=2, init="inherit")
    written = json.loads((tmp_path / "x/config.json").read_text())
    assert (written["model_type"], written["hidden_act"]) == (f"statex_{family}", NO_ACTIVATION)
    assert without_plan(written) == values
    config = config_from_dict(written)
    assert (config.hidden_act, config.extra["architectures"]) == (values["hidden_act"], ["Own"])
    assert config_from_dict(config.to_dict()) == config


def test_code_of_others_for_the_base_does_not_open_the_expanded_model(tmp_path):
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": "own.Tokenizer"}
    write_model(tmp_path / "in", {**GLA, "auto_map": auto_map})
    (tmp_path / "in/own.py").write_text(
        "from transformers import PretrainedConfig\nclass Config(PretrainedConfig):\n    model_type = 'gla'\n"
    )
    run_expand(tmp_path / "in", tmp_path / "x", **EXPAND)
    values = json.loads((tmp_path / "x/config.json").read_text())
    assert values["auto_map"] == {"AutoTokenizer": "own.Tokenizer"}
    assert without_plan(values)["auto_map"] == auto_map
    with pytest.raises(ValueError, match="statex_gla"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "x", trust_remote_code=True)
    assert verify_expansion(tmp_path / "in", tmp_path / "x").ok
    reshard(tmp_path / "x", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["auto_map"] == AUTO_MAP


def test_directories_of_earlier_releases_are_read_and_written_anew(tmp_path):
    write_model(tmp_path / "in", GLA)
    run_expand(tmp_path / "in", tmp_path / "x", **EXPAND)
    ids = tokens(1, 9, vocab=37)
    expected = from_pretrained(tmp_path / "x")(ids).logits
    plan = json.loads((tmp_path / "x/config.json").read_text())["statex"]
    (tmp_path / "x/MANIFEST.json").unlink()
    edit(tmp_path / "x", "hidden_act", model_type="gla", architectures=GLA["architectures"])
    edit(tmp_path / "x", statex={key: value for key, value in plan.items() if key != "base"})
    verdict = verify_expansion(tmp_path / "in", tmp_path / "x")
    assert verdict.ok
    assert any("config.json has the names of the base" in note for note in verdict.notes)
    assert torch.equal(from_pretrained(tmp_path / "x")(ids).logits, expected)
    for options in ({}, {"to": "zero3", "world_size": 2}, {"to": "tp", "tp": 2}, {"to": "megatron"}):
        target = tmp_path / options.get("to", "hf")
        reshard(tmp_path / "x", target, **options)
        (path,) = target.rglob("config.json")
        assert json.loads(path.read_text())["model_type"] == "statex_gla"
        assert verify_same(tmp_path / "x", target).ok


def test_our_name_without_a_plan_is_refused(tmp_path, capsys):
    write_model(tmp_path / "in", GLA)
    run_expand(tmp_path / "in", tmp_path / "x", **EXPAND)
    (tmp_path / "x/MANIFEST.json").unlink()
    edit(tmp_path / "x", "statex", hidden_act="swish")
    with raises(CheckpointError, "model_type", "statex_gla", "no plan"):
        config_from_dict(read_config_dict(tmp_path / "x"))
    capsys.readouterr()
    assert main(["reshard", "--source", str(tmp_path / "x"), "--target", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
