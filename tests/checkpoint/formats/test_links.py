"""Links of a model directory: inside it and into the blobs of its hub cache, nowhere else."""

import re

import pytest

from statex_dist.checkpoint.formats.places import check_link
from statex_dist.errors import CheckpointError
from tests.raising import raises


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    (directory / "deep").mkdir(parents=True)
    (directory / "file").write_text("x")
    (tmp_path / "secret").write_text("s")
    return directory


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../secret", "deep/../../secret", "../model2/file", "out/secret", "/proc/self/environ"]
)
def test_a_link_that_leaves_the_directory_is_refused(model, target):
    (model.parent / "model2").mkdir()
    (model.parent / "model2" / "file").write_text("x")
    (model / "out").symlink_to("..")
    (model / "link").symlink_to(target)
    with pytest.raises(CheckpointError, match=re.escape(f"{model / 'link'} ")):
        check_link(model / "link", model)


def test_a_link_in_a_circle_or_to_nothing_is_refused(model):
    (model / "a").symlink_to("b")
    (model / "b").symlink_to("a")
    (model / "gone").symlink_to("nothing")
    for name in ("a", "gone"):
        with raises(CheckpointError, model / name):
            check_link(model / name, model)


@pytest.mark.parametrize("target", ["file", "deep/../file", "chain"])
def test_a_link_inside_the_directory_is_followed(model, target):
    (model / "chain").symlink_to("file")
    (model / "link").symlink_to(target)
    check_link(model / "link", model)
    (model.parent / "alias").symlink_to(model)
    check_link(model.parent / "alias" / "link", model.parent / "alias")


def test_a_snapshot_of_the_hub_cache_may_refer_to_its_own_blobs(tmp_path):
    repository, other = tmp_path / "models--owner--name", tmp_path / "models--owner--other"
    snapshot = repository / "snapshots" / "abc"
    for folder in (repository, other):
        (folder / "blobs").mkdir(parents=True)
        (folder / "blobs" / "4f7b").write_text("{}")
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/4f7b")
    (snapshot / "merges.txt").symlink_to("../../../models--owner--other/blobs/4f7b")
    (snapshot / "vocab.json").symlink_to("../../refs")
    (repository / "refs").write_text("r")
    check_link(snapshot / "tokenizer.json", snapshot)
    for name in ("merges.txt", "vocab.json"):
        with raises(CheckpointError, snapshot / name):
            check_link(snapshot / name, snapshot)
