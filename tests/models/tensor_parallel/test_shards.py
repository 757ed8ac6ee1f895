"""Input that a rank refuses: no shards, shards of another number of ranks, damaged ones, those of another model."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools.reshard.reshard import reshard
from statex_dist.checkpoint.formats.tensor_parallel import LAYOUT_NAME, file_name
from statex_dist.checkpoint.layout import MANIFEST_NAME
from statex_dist.errors import CheckpointError
from statex_dist.models.config import CONFIG_NAME
from statex_dist.models.hf import save_pretrained
from statex_dist.models.registry import read_config
from statex_dist.models.tensor_parallel.model import load_tensor_parallel
from statex_dist.models.tensor_parallel.shards import check_replicas, read_layout, read_part, read_shard
from statex_dist.models.tensor_parallel.share import TensorShare
from tests.models.tiny import CONFIGS, build, gla_config
from tests.raising import raises

SHARE = TensorShare(rank=1, size=2)
OWN = file_name(1, 2)


def make(directory: Path, *, seed: int = 0) -> Path:
    save_pretrained(build(CONFIGS["gla-merged"], seed=seed, dtype=torch.float32), directory / "hf")
    reshard(directory / "hf", directory / "tp2", to="tp", tp=2)
    return directory / "tp2"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    make(directory / "one")
    make(directory / "other", seed=3)
    return directory


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "one" / "tp2", tmp_path / "shards")
    return tmp_path / "shards"


def read(directory: Path, share: TensorShare = SHARE) -> dict[str, torch.Tensor]:
    layout = read_layout(directory, share)
    assert layout is not None
    return read_shard(directory, read_config(directory), layout, share, dtype=None, device="cpu")


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_whole_directory_is_read(shards):
    assert read(shards).keys() == load_file(shards / OWN).keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_takes_its_part_of_any_other_checkpoint(tmp_path, name):
    """The tools' shard for a rank equals its part of whole tensors, or of shards for other ranks."""
    save_pretrained(build(CONFIGS[name], dtype=torch.float32), tmp_path / "hf")
    for ranks in (2, 1):
        reshard(tmp_path / "hf", tmp_path / f"tp{ranks}", to="tp", tp=ranks)
    for rank in range(2):
        share = TensorShare(rank=rank, size=2)
        own = read(tmp_path / "tp2", share)
        for other in ("hf", "tp1"):
            assert read_layout(tmp_path / other, share) is None
            part = read_part(tmp_path / other, share, dtype=None, device="cpu")
            assert part.keys() == own.keys()
            assert all(torch.equal(part[tensor], own[tensor]) for tensor in own)


def test_one_process_reads_shards_of_several_ranks(made, shards):
    whole = load_tensor_parallel(shards, TensorShare()).state_dict()
    expected = load_file(made / "one" / "hf" / "model.safetensors")
    assert all(torch.equal(whole[name], tensor) for name, tensor in expected.items())


def test_a_missing_file_is_named(shards):
    (shards / OWN).unlink()
    with raises(CheckpointError, OWN, "missing", LAYOUT_NAME):
        read(shards)


def test_a_truncated_file_is_noticed_with_and_without_a_manifest(shards):
    content = (shards / OWN).read_bytes()
    (shards / OWN).write_bytes(content[:-100])
    with raises(CheckpointError, OWN, len(content) - 100, "MANIFEST.json"):
        read(shards)
    (shards / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match=rf"{OWN} is truncated"):
        read(shards)


def test_a_file_of_another_model_of_the_same_shape_is_refused(made, shards):
    shutil.copy(made / "other" / "tp2" / OWN, shards)
    with raises(CheckpointError, OWN, "digest differs"):
        read(shards)


@pytest.mark.parametrize("name", [CONFIG_NAME, LAYOUT_NAME])
def test_a_changed_description_of_the_model_is_refused(shards, name):
    # Both can still be read, and their shapes fit.
    content = (shards / name).read_text()
    changed = content.replace('"norm_eps": 1e-06', '"norm_eps": 9e-01') if name == CONFIG_NAME else content + " "
    assert changed != content
    (shards / name).write_text(changed)
    with pytest.raises(CheckpointError, match=rf"{name} (is damaged|has \d+ bytes)"):
        read(shards)
    (shards / MANIFEST_NAME).unlink()
    read(shards)


def test_ranks_with_different_configs_are_refused(shards, monkeypatch):
    (shards / MANIFEST_NAME).unlink()
    config = read_config(shards)
    tensors, layout = read(shards, TensorShare(rank=0, size=2)), read_layout(shards, SHARE)
    other = config.replace(norm_eps=0.5)

    def gather(self, value):
        return [value, (other.to_dict(), value[1])]

    monkeypatch.setattr(TensorShare, "gather_objects", gather)
    wanted = r"config.json of rank 1 .*rank 0: .*norm_eps"
    with pytest.raises(CheckpointError, match=wanted):
        check_replicas(shards, config, tensors, layout, TensorShare(rank=0, size=2))


def test_a_file_of_another_rank_is_refused_without_a_manifest(shards, caplog, monkeypatch):
    (shards / MANIFEST_NAME).unlink()
    shutil.copy(shards / file_name(0, 2), shards / OWN)
    with raises(CheckpointError, OWN, "rank 0 of 2"):
        read(shards)
    caplog.set_level(logging.WARNING, logger="statex_dist")
    monkeypatch.setattr(logging.getLogger("statex_dist"), "propagate", True)
    read(shards, TensorShare(rank=0, size=2))
    assert "holds no MANIFEST.json" in caplog.text


def test_files_that_the_manifest_does_not_know_are_refused(shards):
    edit(shards / MANIFEST_NAME, lambda content: content["files"].pop(OWN))
    with raises(CheckpointError, OWN, "not one", "MANIFEST.json"):
        read(shards)


def test_a_config_of_another_plan_does_not_fit_the_shards(shards):
    (shards / MANIFEST_NAME).unlink()
    edit(
        shards / CONFIG_NAME,
        lambda content: (content.update(model_type="gla", hidden_act="swish"), content.pop("statex")),
    )
    wanted = (
        rf"{LAYOUT_NAME}: rank 1 .* model.layers.0.attn.\w+.weight \[.*; config.json .*"
        r"statex reshard --to tp --tp 2"
    )
    with pytest.raises(CheckpointError, match=wanted):
        read(shards)


def test_a_config_of_another_model_names_what_the_shards_lack(shards):
    (shards / MANIFEST_NAME).unlink()
    edit(shards / CONFIG_NAME, lambda content: content.update(num_hidden_layers=3))
    with raises(CheckpointError, LAYOUT_NAME, "lacks", "config.json", r"model.layers"):
        read(shards)
    edit(shards / CONFIG_NAME, lambda content: content.update(num_hidden_layers=1))
    with raises(CheckpointError, LAYOUT_NAME, "unknown", "config.json"):
        read(shards)


def test_a_tensor_that_does_not_fit_the_layout_is_named(shards):
    (shards / MANIFEST_NAME).unlink()
    tensors = load_file(shards / OWN)
    name = "model.layers.0.attn.v_proj.weight"
    save_file(tensors | {name: tensors[name][1:]}, shards / OWN)
    with raises(CheckpointError, OWN, name, "shape", LAYOUT_NAME):
        read(shards)
    tensors.pop(name)
    save_file(tensors, shards / OWN)
    with raises(CheckpointError, OWN, "lacks", name):
        read(shards)


def test_shards_of_another_kind_of_layer_are_refused(tmp_path):
    directory = tmp_path / "mixed"
    save_pretrained(build(gla_config(), dtype=torch.float32), tmp_path / "hf")
    reshard(tmp_path / "hf", directory, to="tp", tp=1)
    (directory / MANIFEST_NAME).unlink()
    edit(directory / CONFIG_NAME, lambda content: content.update(attn={"layers": [1], "num_heads": 4}))
    with raises(CheckpointError, LAYOUT_NAME, "model.layers.1.attn.g_norm_swish_gate.weight"):
        load_tensor_parallel(directory, TensorShare())
