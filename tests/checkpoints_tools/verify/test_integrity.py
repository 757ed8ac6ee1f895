"""One checkpoint against its manifest and the checksums in its files: every flipped byte that matters is found."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.synthetic_zero3 import write_zero3
from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.verify import verify_alone
from statex_dist.checkpoint.formats.torch_archive.zip import read_directory
from statex_dist.checkpoint.manifest import Manifest, record_file
from statex_dist.errors import CheckpointError
from statex_dist.models.source import open_source
from tests.checkpoints_tools.builders import GLA, random_tensors, write_model

LAYOUTS = {
    "hf": {},
    "zero3": {"to": "zero3", "world_size": 3},
    "tp": {"to": "tp", "tp": 2},
    "megatron": {"to": "megatron"},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """The same small model in every layout, with our manifests; and as DeepSpeed leaves it, without."""
    root = tmp_path_factory.mktemp("layouts")
    values = {**GLA, "vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    tensors = write_model(root / "source", values)
    write_zero3(root / "foreign/global_step1", tensors, 2, sub_group_size=2000)
    for name, options in LAYOUTS.items():
        reshard(root / "source", root / name, **options)
    return root


def flipped(directory: Path, file: Path, position: int) -> None:
    path = directory / file
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << random.Random(position).randrange(8)
    path.write_bytes(data)


def damage(directory: Path) -> list[str]:
    try:
        return verify_alone(directory).differences
    except CheckpointError as error:
        return [str(error)]


@pytest.mark.parametrize("layout", [*LAYOUTS, "foreign"])
def test_a_sound_checkpoint(checkpoints, layout):
    verdict = verify_alone(checkpoints / layout)
    assert verdict.ok
    assert sum(verdict.tensors.values()) >= 8
    assert bool(verdict.notes) == (layout == "foreign")


@pytest.mark.parametrize("layout", ["hf", "tp", "megatron"])
def test_any_flipped_byte_of_a_model_directory_is_found(checkpoints, tmp_path, layout):
    rng = random.Random(0)
    files = [path.relative_to(checkpoints / layout) for path in (checkpoints / layout).iterdir()]
    for file in files:
        size = (checkpoints / layout / file).stat().st_size
        for position in rng.sample(range(size), min(size, 6)):
            shutil.copytree(checkpoints / layout, tmp_path / "copy")
            flipped(tmp_path / "copy", file, position)
            if file.name != "MANIFEST.json" or manifest_differs(checkpoints / layout, tmp_path / "copy"):
                assert damage(tmp_path / "copy") or (
                    layout == "megatron" and dead(checkpoints / layout / file, position)
                )
            shutil.rmtree(tmp_path / "copy")


def manifest_differs(first: Path, second: Path) -> bool:
    """Whether a flip changed what is compared: a manifest's own facts (source, run) prove nothing."""
    try:
        a, b = Manifest.read(first), Manifest.read(second)
    except CheckpointError:
        return True
    return (a.files, a.tensors, a.states) != (b.files, b.tensors, b.states)


def last_content(path: Path) -> int:
    return max(entry.offset + entry.size for entry in read_directory(path)[1].values()) - 1


def dead(path: Path, position: int) -> bool:
    """Whether a byte of an archive is neither content nor directory: padding, and headers that repeat the directory."""
    if path.suffix not in (".pt", ".distcp"):
        return False
    _, entries = read_directory(path)
    last = max(entry.offset + entry.size for entry in entries.values())
    return position < last and not any(e.offset <= position < e.offset + e.size for e in entries.values())


@pytest.mark.parametrize("layout", ["zero3", "foreign"])
def test_any_flipped_byte_of_a_training_checkpoint_is_found(checkpoints, tmp_path, layout):
    """Also in a checkpoint that DeepSpeed wrote, without a manifest; its own tools take such files as they are."""
    rng, found = random.Random(1), 0
    tag = open_source(checkpoints / layout).facts.path
    for file in sorted(path.relative_to(checkpoints / layout) for path in tag.glob("*.pt")):
        path = checkpoints / layout / file
        for position in rng.sample(range(path.stat().st_size), 40):
            if dead(path, position) or (layout == "foreign" and position > last_content(path)):
                continue  # of the directory itself, dates and the like prove nothing where no manifest has its digest
            shutil.copytree(checkpoints / layout, tmp_path / "copy")
            flipped(tmp_path / "copy", file, position)
            assert damage(tmp_path / "copy"), f"byte {position} of {file}"
            found += 1
            shutil.rmtree(tmp_path / "copy")
    assert found > 50


def test_a_flipped_byte_never_gets_into_a_conversion(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "foreign", tmp_path / "copy")
    place = open_source(tmp_path / "copy").pieces("lm_head.weight")[1]
    flipped(tmp_path / "copy", place.path.relative_to(tmp_path / "copy"), place.offset + 9)
    for options in LAYOUTS.values():
        if options.get("to", "hf") in ("hf", "zero3"):
            with pytest.raises(CheckpointError, match=f"{place.path.name} .*CRC-32 .*'data/"):
                reshard(tmp_path / "copy", tmp_path / "out", **options)
            assert not (tmp_path / "out").exists()


def test_padding_is_checked_with_its_storage(tmp_path):
    write_zero3(tmp_path / "run/global_step1", {"a": torch.arange(3.0)}, 2)
    rank = open_source(tmp_path / "run").ranks[1]
    flat = rank.flat["fp32"][0]
    assert flat.numel == 2, "one value and one of padding"
    flipped(tmp_path / "run", flat.path.relative_to(tmp_path / "run"), flat.offset + 6)
    with pytest.raises(CheckpointError, match=f"{flat.path.name} .*CRC-32"):
        reshard(tmp_path / "run", tmp_path / "out")


def test_files_of_another_sound_checkpoint_are_noticed_with_a_manifest(checkpoints, tmp_path):
    for layout, name in (("hf", "model.safetensors"), ("zero3", "zero_pp_rank_1_mp_rank_00_optim_states.pt")):
        shutil.copytree(checkpoints / layout, tmp_path / layout)
        write_model(tmp_path / "other", json.loads((checkpoints / "source/config.json").read_text()), _others())
        reshard(tmp_path / "other", tmp_path / "exchange", **LAYOUTS[layout], options=None)
        target = next((tmp_path / layout).rglob(name))
        shutil.copy(next((tmp_path / "exchange").rglob(name)), target)
        assert damage(tmp_path / layout)
        shutil.rmtree(tmp_path / "exchange")
        shutil.rmtree(tmp_path / "other")


def _others() -> dict[str, torch.Tensor]:
    values = {**GLA, "vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    return {name: tensor + 1 for name, tensor in random_tensors(values).items()}


def test_edited_documents_are_named(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "hf", tmp_path / "copy")
    (tmp_path / "copy/generation_config.json").write_text("{}")
    (tmp_path / "copy/tokenizer_config.json").unlink()
    differences = damage(tmp_path / "copy")
    assert len(differences) == 2
    assert "generation_config.json has 2 bytes; MANIFEST.json says" in differences[0]
    assert "tokenizer_config.json is missing; MANIFEST.json lists it" in differences[1]
    # They are for people to edit: the weights can be used all the same.
    reshard(tmp_path / "copy", tmp_path / "out")


def test_manifests_of_training_runs(tmp_path):
    """They record whole files and, of archives, the directory; not tensors, which no rank sees as a whole."""
    tag = tmp_path / "run/checkpoints/global_step1"
    write_zero3(tag, random_tensors(GLA), 2)
    files = {path.name: record_file(path) for path in tag.iterdir()}
    assert all(record.xxh3_128 and record.directory_xxh3_128 for record in files.values())
    Manifest(kind="zero3", files=files, info={"step": 1}).write(tag)
    verdict = verify_alone(tmp_path / "run")
    assert verdict.ok
    assert verdict.tensors["files by digest"] == 4
    # Another sound file under the same name and of the same size: noticed before any of it is used.
    write_zero3(tmp_path / "other/global_step1", random_tensors(GLA, torch.float64), 2)
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    write_zero3(tmp_path / "other2/global_step1", {n: t + 1 for n, t in random_tensors(GLA).items()}, 2)
    shutil.copy(tmp_path / "other2/global_step1" / name, tag / name)
    with pytest.raises(CheckpointError, match=f"{name} .*MANIFEST.json"):
        open_source(tmp_path / "run")
