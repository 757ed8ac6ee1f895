"""Tensor-parallel shards: round trips, what they hold, and what must not be merged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.verify import verify_alone, verify_same
from statex_dist.checkpoint.formats.tensor_parallel import file_name
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.layout import shard_ranges
from statex_dist.models.registry import config_from_dict, family_of
from statex_dist.models.source import open_source
from tests.checkpoints_tools.builders import GLA, load_all, run_expand, write_model
from tests.raising import raises

MODELS = {
    "gla": {**GLA, "num_heads": 8, "hidden_size": 64, "use_short_conv": True},
    "mamba2": {
        **{"model_type": "mamba2", "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 8},
        **{"head_dim": 4, "state_size": 6, "n_groups": 1, "use_bias": True, "tie_word_embeddings": False},
    },
    "mamba2-groups": {
        **{"model_type": "mamba2", "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 8},
        **{"head_dim": 4, "state_size": 6, "n_groups": 2, "tie_word_embeddings": True},
    },
}
EXPANSIONS = {
    "gla": {"factor": 8, "layers": "0"},
    "mamba2": {"factor": 4, "init": "lossless", "layers": "all"},
    "mamba2-groups": {"op": "grow_features", "factor": 3, "layers": "all"},
}


@pytest.fixture(params=["gla", "mamba2", "gla-expanded", "mamba2-expanded", "mamba2-groups-expanded"])
def model(request, tmp_path) -> Path:
    name = request.param.removesuffix("-expanded")
    if request.param.endswith("-expanded"):
        write_model(tmp_path / "base", MODELS[name])
        run_expand(tmp_path / "base", tmp_path / "hf", **EXPANSIONS[name])
    else:
        write_model(tmp_path / "hf", MODELS[request.param], shards=2)
    return tmp_path / "hf"


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_cut_and_joined_is_the_same_bits(model, tmp_path, tp):
    summary = reshard(model, tmp_path / "tp", to="tp", tp=tp)
    assert (summary.to, summary.tensors) == ("tp", len(load_all(model)))
    reshard(tmp_path / "tp", tmp_path / "back")
    before, after = load_all(model), load_all(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    found, given = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "back", model))
    given.pop("architectures", None)  # an export names the class that opens it
    assert found.pop("model_type") in (given["model_type"], f"statex_{given['model_type']}")  # or no other may
    del given["model_type"]
    assert found.items() >= given.items()
    assert verify_same(model, tmp_path / "tp").ok
    assert verify_alone(tmp_path / "tp").ok


@pytest.mark.parametrize("tp", [2, 4])
def test_a_rank_holds_what_the_layout_says(model, tmp_path, tp):
    reshard(model, tmp_path / "tp", to="tp", tp=tp)
    config = config_from_dict(json.loads((model / "config.json").read_text()))
    whole = load_all(model)
    for rank in range(tp):
        held = load_file(tmp_path / "tp" / file_name(rank, tp))
        for name, spec in family_of(config.MODEL_TYPE).tensors(config).items():
            parts = [whole[name].narrow(spec.axis, a, b - a) for a, b in shard_ranges(spec, name, tp, rank)]
            assert torch.equal(held[name], torch.cat(parts, dim=spec.axis)), name


def test_a_plain_cut_of_in_proj_is_something_else(tmp_path):
    """The classic mistake: z, x, B, C and dt are torn apart."""
    whole = write_model(tmp_path / "hf", MODELS["mamba2"])
    reshard(tmp_path / "hf", tmp_path / "tp", to="tp", tp=2)
    name = "backbone.layers.0.mixer.in_proj.weight"
    for rank, plain in enumerate(whole[name].chunk(2)):
        held = load_file(tmp_path / "tp" / file_name(rank, 2))[name]
        assert held.shape[0] > plain.shape[0], "B and C are on both ranks"
        assert not torch.equal(held[: plain.shape[0]], plain)


@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 2), (8, 1)])
def test_other_numbers_of_ranks(model, tmp_path, old, new):
    reshard(model, tmp_path / "old", to="tp", tp=old)
    reshard(tmp_path / "old", tmp_path / "new", to="tp", tp=new)
    reshard(model, tmp_path / "direct", to="tp", tp=new)
    for rank in range(new):
        name = file_name(rank, new)
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()


def test_from_a_training_checkpoint_and_back_to_one(tmp_path):
    write_model(tmp_path / "hf", MODELS["gla"])
    reshard(tmp_path / "hf", tmp_path / "zero", to="zero3", world_size=3, dtype="fp32")
    reshard(tmp_path / "zero", tmp_path / "tp", to="tp", tp=4, dtype="bf16")
    assert {t.dtype for t in load_file(tmp_path / "tp" / file_name(0, 4)).values()} == {torch.bfloat16}
    reshard(tmp_path / "tp", tmp_path / "again", to="zero3", world_size=2)
    verdict = verify_same(tmp_path / "again", tmp_path / "hf", rtol=1e-2)
    assert verdict.ok, verdict.differences


@pytest.fixture
def shards(tmp_path) -> Path:
    write_model(tmp_path / "hf", MODELS["mamba2"])
    reshard(tmp_path / "hf", tmp_path / "tp", to="tp", tp=2)
    (tmp_path / "tp/MANIFEST.json").unlink()
    return tmp_path / "tp"


def changed(directory: Path, rank: int, change) -> None:
    path = directory / file_name(rank, 2)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_replicas_that_differ_are_not_merged(shards, tmp_path):
    name = "backbone.layers.1.norm.weight"

    def change(tensors):
        tensors[name][3] += 1

    changed(shards, 1, change)
    message = f"tensor '{name}': .*{file_name(1, 2)} "
    with pytest.raises(CheckpointError, match=message):
        reshard(shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert f"'{name}'" in verify_alone(shards).differences[0]
    with pytest.raises(CheckpointError, match=message):
        verify_same(tmp_path / "hf", shards)


def test_replicated_rows_inside_a_cut_tensor_are_compared_too(shards, tmp_path):
    name = "backbone.layers.0.mixer.in_proj.weight"
    parts = family_of("mamba2").tensors(config_from_dict(MODELS["mamba2"]))[name].parts
    start = parts[0][1] // 2 + parts[1][1] // 2  # z and x are cut in two; B follows

    def change(tensors):
        tensors[name][start, 0] += 1

    changed(shards, 1, change)
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        reshard(shards, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("backbone.norm_f.weight"), "'backbone.norm_f.weight' is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "'extra'.* tp_layout.json"),
        (
            lambda t: t.update({"backbone.norm_f.weight": torch.ones(3)}),
            r"has shape \(3,\); tp_layout.json says \(16,\)",
        ),
        (lambda t: t.update({"backbone.norm_f.weight": torch.ones(16).half()}), "or of several dtypes"),
    ],
)
def test_files_that_are_not_those_of_the_layout(shards, change, message):
    changed(shards, 1, change)
    with pytest.raises(CheckpointError, match=message):
        open_source(shards)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(tp=10**30), "files.*10+ ranks"),
        (lambda d: d.update(tp="2"), "files.*2 ranks"),
        (lambda d: d.update(version=9), "version 9; only 1 is known"),
        (lambda d: d.update(tp=3), "files.*3 ranks"),
        (lambda d: d.update(files=["../x", "/etc/passwd"]), "files.*2 ranks"),
        (lambda d: d["tensors"]["backbone.norm_f.weight"].update(axis=2), "ranges.*'backbone.norm_f.weight'"),
        (lambda d: d["tensors"]["backbone.norm_f.weight"].update(ranges=[[[0, 99]]] * 2), "ranges of tensor"),
        (lambda d: d["tensors"]["backbone.norm_f.weight"].update(ranges=[[[0, 16]]]), "ranges of tensor"),
        (lambda d: d.pop("tensors"), "KeyError"),
    ],
)
def test_layout_files_that_say_what_cannot_be(shards, change, message):
    layout = json.loads((shards / "tp_layout.json").read_text())
    change(layout)
    (shards / "tp_layout.json").write_text(json.dumps(layout))
    with pytest.raises(CheckpointError, match=message):
        open_source(shards)


def test_rows_that_nobody_holds(shards):
    name = "backbone.layers.0.mixer.D"
    layout = json.loads((shards / "tp_layout.json").read_text())
    layout["tensors"][name]["ranges"] = [[[0, 4]], [[0, 4]]]
    (shards / "tp_layout.json").write_text(json.dumps(layout))
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        open_source(shards)


def test_a_missing_rank_and_swapped_ranks(shards, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(shards, whole)
    (shards / file_name(1, 2)).unlink()
    with pytest.raises(CheckpointError, match=rf"{file_name(1, 2)} is missing"):
        open_source(shards)
    first, second = (whole / file_name(rank, 2) for rank in (0, 1))
    first.rename(whole / "x")
    second.rename(first)
    (whole / "x").rename(second)
    with pytest.raises(CheckpointError, match="rank 1 of 2"):
        open_source(whole)


def test_more_ranks_than_can_share(tmp_path):
    write_model(tmp_path / "hf", MODELS["gla"])
    with pytest.raises(ConfigError, match=r": 3 .* axis 0 .*: 1, 2, 4$"):
        reshard(tmp_path / "hf", tmp_path / "out", to="tp", tp=3)
    (tmp_path / "hf/config.json").unlink()
    with raises(CheckpointError, "--to tp", "config.json"):
        reshard(tmp_path / "hf", tmp_path / "out", to="tp", tp=2)
