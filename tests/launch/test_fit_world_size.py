"""A checkpoint that is resharded for another number of ranks, and the run that resumes from it."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch.fit_world_size import fit_world_size

from statex_dist.checkpoint.layout import complete_tags
from statex_dist.checkpoint.manifest import Manifest, record_file
from statex_dist.errors import CheckpointError
from tests.raising import raises
from tests.runs import GLA, expanded, make_shards, run_training, save_model, write_run

pytestmark = pytest.mark.distributed

NUM_STEPS = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def sections(root: Path) -> dict[str, dict]:
    return {
        "model": {"path": str(save_model(expanded(GLA), root / "model"))},
        "data": {"path": str(make_shards(root / "data")), "packs_per_step": 6},
        "train": {"num_steps": NUM_STEPS, "save_every": 2, "keep_last": 9},
    }


@pytest.fixture(scope="module")
def reference(root: Path, sections: dict[str, dict]) -> Path:
    """Return an uninterrupted run on 2 ranks."""
    result = run_training(2, "--config", str(write_run(root / "reference.yaml", **sections)))
    assert result.returncode == 0, result.stderr
    return root / "reference"


def copy_of(reference: Path, directory: Path) -> Path:
    """Return a directory of checkpoints that holds two steps of the reference."""
    checkpoints = directory / "checkpoints"
    for tag in ("global_step2", "global_step4"):
        shutil.copytree(reference / "checkpoints" / tag, checkpoints / tag)
    return checkpoints


def contents(directory: Path) -> dict[str, bytes]:
    """Return the files by path; of the manifest only what it lists (its facts name the files that were read)."""
    files = {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
    return {**files, "MANIFEST.json": repr(Manifest.read(directory).files).encode()}


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_copy_is_complete_and_the_one_to_resume_from(tmp_path: Path, reference: Path):
    checkpoints = copy_of(reference, tmp_path)
    original = contents(checkpoints / "global_step4")
    assert fit_world_size(checkpoints, "global_step4", 3) == "global_step4-ranks3"
    assert complete_tags(checkpoints) == ["global_step4-ranks3", "global_step4", "global_step2"]
    assert (checkpoints / "latest").read_text() == "global_step4-ranks3"
    assert sorted(p.name for p in checkpoints.iterdir()) == sorted([*complete_tags(checkpoints), "latest"])
    manifest = Manifest.read(checkpoints / "global_step4-ranks3")
    manifest.verify(checkpoints / "global_step4-ranks3")
    assert (manifest.kind, manifest.info["step"], manifest.info["world_size"]) == ("zero3", 4, 3)
    assert contents(checkpoints / "global_step4") == original
    files = Manifest.read(checkpoints / "global_step4").files
    assert {name for name in files if name.startswith("model/")} <= manifest.files.keys()


def test_what_fits_is_not_written_again_and_one_copy_is_kept(tmp_path: Path, reference: Path):
    checkpoints = copy_of(reference, tmp_path)
    assert fit_world_size(checkpoints, "global_step4", 2) == "global_step4"
    assert not list(checkpoints.glob("*-ranks*"))
    fit_world_size(checkpoints, "global_step4", 3)
    written = (checkpoints / "global_step4-ranks3" / "MANIFEST.json").stat().st_mtime_ns
    assert fit_world_size(checkpoints, "global_step4", 3) == "global_step4-ranks3"
    assert (checkpoints / "global_step4-ranks3" / "MANIFEST.json").stat().st_mtime_ns == written
    assert fit_world_size(checkpoints, "global_step4-ranks3", 1) == "global_step4-ranks1"
    assert complete_tags(checkpoints) == ["global_step4-ranks1", "global_step4", "global_step2"]
    assert fit_world_size(checkpoints, "global_step4-ranks1", 2) == "global_step4", "the original fits again"
    assert complete_tags(checkpoints) == ["global_step4", "global_step2"]
    assert (checkpoints / "latest").read_text() == "global_step4"
    fit_world_size(checkpoints, "global_step2", 3)
    assert (checkpoints / "latest").read_text() == "global_step4", "an older step is not what a run resumes from"


def test_a_damaged_or_unfinished_copy_is_made_anew(tmp_path: Path, reference: Path):
    checkpoints = copy_of(reference, tmp_path)
    copy = checkpoints / fit_world_size(checkpoints, "global_step4", 3)
    whole = contents(copy)
    flip_a_bit(next(copy.glob("*_1_mp_rank_00_optim_states.pt")))
    assert checkpoints / fit_world_size(checkpoints, "global_step4", 3) == copy
    assert contents(copy) == whole
    (copy / "MANIFEST.json").unlink()
    assert checkpoints / fit_world_size(checkpoints, "global_step4", 3) == copy
    assert contents(copy) == whole


def test_files_for_all_ranks_go_along(tmp_path: Path, reference: Path):
    checkpoints = copy_of(reference, tmp_path)
    (checkpoints / "global_step4" / "notes.json").write_text("{}")
    manifest = Manifest.read(checkpoints / "global_step4")
    manifest.files["notes.json"] = record_file(checkpoints / "global_step4" / "notes.json")
    manifest.write(checkpoints / "global_step4")
    copy = checkpoints / fit_world_size(checkpoints, "global_step4", 1)
    assert (copy / "notes.json").read_text() == "{}"
    assert "notes.json" in Manifest.read(copy).files


def test_a_damaged_checkpoint_is_refused_and_nothing_is_left(tmp_path: Path, reference: Path):
    checkpoints = copy_of(reference, tmp_path)
    victim = next((checkpoints / "global_step4").glob("*_1_mp_rank_00_optim_states.pt"))
    flip_a_bit(victim)
    with pytest.raises(CheckpointError, match=victim.name):
        fit_world_size(checkpoints, "global_step4", 1)
    assert sorted(p.name for p in checkpoints.iterdir()) == ["global_step2", "global_step4"]


def test_a_checkpoint_of_one_process_is_not_cut(tmp_path: Path):
    directory = tmp_path / "global_step4"
    directory.mkdir()
    Manifest(kind="plain", files={}, info={"step": 4, "world_size": 1}).write(directory)
    assert fit_world_size(tmp_path, "global_step4", 1) == "global_step4"
    with raises(CheckpointError, "plain", "one process"):
        fit_world_size(tmp_path, "global_step4", 2)


def test_killed_at_any_moment_the_next_call_finishes(tmp_path: Path, reference: Path):
    whole = copy_of(reference, tmp_path / "whole")
    expected = contents(whole / fit_world_size(whole, "global_step4", 3))
    program = (
        "import sys; from pathlib import Path; from launch.fit_world_size import fit_world_size\n"
        "print('ready', flush=True)\n"
        "fit_world_size(Path(sys.argv[1]), 'global_step4', 3)"
    )
    checkpoints = copy_of(reference, tmp_path / "killed")

    def start(directory: Path) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-c", program, str(directory)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], env={**os.environ})
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    undisturbed = copy_of(reference, tmp_path / "undisturbed")
    process, begin = start(undisturbed), time.monotonic()
    while not any(p.name.startswith(".tmp-") for p in undisturbed.iterdir()) and process.poll() is None:
        time.sleep(0.001)
    first_file = time.monotonic() - begin
    with process:
        process.wait()
    seconds = time.monotonic() - begin
    killed_inside = 0
    for attempt in range(8):
        process = start(checkpoints)
        time.sleep(first_file + (seconds - first_file) * attempt / 8)
        process.kill()
        process.wait()
        process.stdout.close()
        tags = complete_tags(checkpoints)
        assert tags[-2:] == ["global_step4", "global_step2"]
        if len(tags) == 3:
            assert contents(checkpoints / tags[0]) == expected
            shutil.rmtree(checkpoints / tags[0])
        elif any(p.name.startswith(".tmp-") for p in checkpoints.iterdir()):
            killed_inside += 1
    assert killed_inside >= 2, "no kill fell into the work"
    tag = fit_world_size(checkpoints, "global_step4", 3)
    assert contents(checkpoints / tag) == expected
    assert sorted(p.name for p in checkpoints.iterdir()) == sorted([*complete_tags(checkpoints), "latest"])
