"""A disk that refuses is named, with what helps, whatever the command writes."""

import subprocess
import sys

import pytest

from tests.checkpoints_tools.builders import GLA, run_expand, write_model
from tests.checkpoints_tools.expand.test_expand_faults import mounted
from tests.launch.limited import run_limited


@pytest.fixture
def commands(tmp_path):
    """Commands that write to the directory ``disk``."""
    write_model(tmp_path / "gla", GLA)
    run_expand(tmp_path / "gla", tmp_path / "expanded", layers="0")
    (tmp_path / "text.txt").write_text("hello world " * 50_000)
    disk = tmp_path / "disk"
    return [
        ["prepare", tmp_path / "text.txt", "--out", disk / "shards", "--tokenizer", "bytes"],
        ["report", tmp_path / "expanded", "--out", disk / "page.html"],
        ["expand", "--source", tmp_path / "gla", "--target", disk / "larger"],
        ["reshard", "--source", tmp_path / "gla", "--target", disk / "ranks", "--to", "zero3", "--world-size", "2"],
    ]


@pytest.mark.parametrize("options", ["size=16k", "ro"])
def test_every_writer_names_path_and_remedy(commands, tmp_path, options):
    disk = tmp_path / "disk"
    mounted(disk, options)
    try:
        results = run_limited(commands, tmp_path, memory=4 << 30)
        left = sorted(path.name for path in disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    refused, remedy = (
        ("Read-only file system", "choose a place that can be written")
        if options == "ro"
        else ("No space left on device", "free space there, or choose another place")
    )
    for result in results:
        error = result["err"].splitlines()[-1]
        assert error.startswith("error: "), result
        assert str(disk) in error
        assert refused in error
        assert error.endswith(remedy)
        assert result["code"] in (1, 2)
    assert left == []


def test_a_limit_of_file_sizes_is_named(commands, tmp_path):
    (tmp_path / "disk").mkdir()
    limited = f"ulimit -f 4; exec {sys.executable} -m launch.cli " + " ".join(map(str, commands[0]))
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    error = result.stderr.splitlines()[-1]
    assert result.returncode == 1
    assert str(tmp_path / "disk") in error
    assert "(ulimit -f)" in error
