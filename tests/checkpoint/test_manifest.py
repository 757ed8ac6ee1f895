"""Durable directories: complete or absent, whatever interrupts."""

import json
from pathlib import Path

import pytest

from statex_dist.checkpoint.layout import complete_tags, rank_of, step_of, tag_of
from statex_dist.checkpoint.manifest import Manifest, finish_target, prepare_target, record_file
from statex_dist.durable.files import write_durably
from statex_dist.errors import CheckpointError
from tests.raising import raises


def make(directory: Path, content: str) -> Path:
    directory.mkdir(parents=True)
    (directory / "weights").write_text(content)
    Manifest(kind="hf", files={"weights": record_file(directory / "weights")}, info={"step": 3}).write(directory)
    return directory


def test_round_trip_and_verification(tmp_path: Path):
    directory = make(tmp_path / "a", "abc")
    manifest = Manifest.read(directory)
    manifest.verify(directory)
    assert (manifest.kind, manifest.info, manifest.files["weights"].size) == ("hf", {"step": 3}, 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "weights").unlink(), "weights is missing"),
        (lambda d: (d / "weights").write_text("abcd"), "weights .*4 .*3"),
        (lambda d: (d / "weights").write_text("abd"), "weights .*digest"),
        (lambda d: (d / "MANIFEST.json").write_text("{"), "cannot be read"),
        (lambda d: (d / "MANIFEST.json").unlink(), "the checkpoint is incomplete"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str):
    directory = make(tmp_path / "a", "abc")
    damage(directory)
    with pytest.raises(CheckpointError, match=message):
        Manifest.read(directory).verify(directory)


def test_a_manifest_cannot_name_files_outside(tmp_path: Path):
    directory = make(tmp_path / "a", "abc")
    content = json.loads((directory / "MANIFEST.json").read_text())
    content["files"]["../b"] = content["files"].pop("weights")
    (directory / "MANIFEST.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"\.\./b"):
        Manifest.read(directory).verify(directory)


def test_replacing_a_directory_interrupted_anywhere_keeps_old_or_new(tmp_path: Path, monkeypatch):
    target = make(tmp_path / "t", "old")
    replace = Path.replace
    for allowed in (0, 1):
        calls = []

        def interrupted(self, other, limit=allowed, calls=calls):
            calls.append(self)
            if len(calls) > limit:
                raise KeyboardInterrupt
            return replace(self, other)

        temporary = prepare_target(target, overwrite=True)
        (temporary / "weights").write_text("new")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                finish_target(temporary, target, overwrite=True)
        prepare_target(target, overwrite=True)
        assert (target / "weights").read_text() == "old"
    temporary = prepare_target(target, overwrite=True)
    (temporary / "weights").write_text("new")
    finish_target(temporary, target, overwrite=True)
    assert (target / "weights").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_failed_replacement_puts_the_old_directory_back(tmp_path: Path, monkeypatch):
    target = make(tmp_path / "t", "old")
    temporary = prepare_target(target, overwrite=True)

    def fail(*_):
        raise OSError(5, "input/output error")

    monkeypatch.setattr("statex_dist.checkpoint.manifest.commit_directory", fail)
    with pytest.raises(OSError, match="input/output error"):
        finish_target(temporary, target, overwrite=True)
    assert (target / "weights").read_text() == "old"


def test_a_full_target_is_refused(tmp_path: Path):
    target = make(tmp_path / "t", "old")
    with raises(CheckpointError, "not empty", "--overwrite"):
        prepare_target(target, overwrite=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file; give a directory"):
        prepare_target(tmp_path / "file", overwrite=True)


def test_tags(tmp_path: Path):
    assert (step_of(tag_of(12)), step_of("global_stepx"), step_of(".tmp-global_step1")) == (12, None, None)
    assert rank_of("bf16_zero_pp_rank_10_mp_rank_00_optim_states.pt") == 10
    assert rank_of("zero_pp_rank_1_mp_rank_00_model_states.pt") == 1
    assert rank_of("MANIFEST.json") is None
    for step, complete in ((9, True), (10, True), (11, False)):
        (tmp_path / tag_of(step)).mkdir()
        if complete:
            write_durably(tmp_path / tag_of(step) / "MANIFEST.json", "{}")
    assert complete_tags(tmp_path) == ["global_step10", "global_step9"]
    assert complete_tags(tmp_path / "none") == []


def test_a_target_filled_meanwhile_is_not_replaced(tmp_path: Path):
    temporary = prepare_target(tmp_path / "t", overwrite=False)
    target = make(tmp_path / "t", "theirs")
    with raises(CheckpointError, "not empty", "--overwrite"):
        finish_target(temporary, target, overwrite=False)
    assert (target / "weights").read_text() == "theirs"
