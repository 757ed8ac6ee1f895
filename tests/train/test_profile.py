"""The profiler over a few steps: what it writes, and that a run without it is as it was."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from statex_dist.errors import ConfigError
from statex_dist.train.callback import Ending
from statex_dist.train.profile import ProfileConfig, Profiler


def run(directory: Path, config: ProfileConfig, *, start: int = 0, end: int = 6, rank: int = 0) -> None:
    """Run steps that each leave their number in the trace."""
    profiler = Profiler(config, directory, rank=rank, world_size=2)
    for step in range(start + 1, end + 1):
        profiler.pre_step(step, [])
        with torch.profiler.record_function(f"number {step}"):
            torch.ones(50, 50) @ torch.ones(50, 50)
    profiler.on_end(Ending(state="complete", step=end))


def traced(path: Path) -> list[int]:
    """Return the steps in a trace."""
    with gzip.open(path, "rt") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    return sorted(int(name.split()[1]) for name in names if name.startswith("number "))


@pytest.mark.parametrize(
    ("steps", "start", "end", "found"),
    [
        ("3:4", 0, 6, [3, 4]),
        ("1:2", 0, 6, [1, 2]),
        ("6:6", 0, 6, [6]),
        ("2:5", 3, 6, [4, 5]),  # resumed inside the window
        ("4:9", 0, 6, [4, 5, 6]),  # and ended inside it
    ],
)
def test_the_steps_of_the_window_are_traced(tmp_path: Path, steps, start, end, found):
    run(tmp_path, ProfileConfig(steps=steps), start=start, end=end)
    stem = f"rank0-steps{found[0]}-{found[-1]}"
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [f"{stem}.json.gz", f"{stem}.txt"]
    assert traced(tmp_path / "profile" / f"{stem}.json.gz") == found
    table = (tmp_path / "profile" / f"{stem}.txt").read_text()
    assert "aten::mm" in table
    assert "Self CPU" in table


def test_ranks_directory_and_memory_can_be_chosen(tmp_path: Path):
    config = ProfileConfig(steps="2:2", ranks=[1], directory=str(tmp_path / "elsewhere"), memory=True)
    for rank in (0, 1):
        run(tmp_path, config, rank=rank)
    assert [p.name for p in tmp_path.rglob("*.txt")] == ["rank1-steps2-2.txt"]
    assert "CPU Mem" in (tmp_path / "elsewhere" / "rank1-steps2-2.txt").read_text()


@pytest.mark.parametrize(
    ("steps", "start", "message"),
    [("8:9", 0, "8:9 were not reached"), ("7:9", 0, "7:9 were not reached"), ("1:3", 4, "1:3 are over already")],
)
def test_a_window_that_is_missed_is_told(tmp_path: Path, caplog, steps, start, message):
    run(tmp_path, ProfileConfig(steps=steps), start=start)
    assert [record.message for record in caplog.records if message in record.message]
    assert not (tmp_path / "profile").exists()


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, caplog):
    (tmp_path / "profile").write_text("a file is in the way")
    run(tmp_path, ProfileConfig(steps="2:3"))
    assert "steps 2 to 3" in caplog.text


def test_off_it_does_nothing(tmp_path: Path, caplog):
    with caplog.at_level("INFO"):
        run(tmp_path, ProfileConfig())
    assert not list(tmp_path.iterdir())
    assert not caplog.records


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": "10"}, r"profile.steps.*FIRST:LAST.*not '10'"),
        ({"steps": "0:2"}, "not '0:2'"),
        ({"steps": "5:4"}, "not '5:4'"),
        ({"steps": "a:b"}, "not 'a:b'"),
        ({"steps": 612}, "quotes.*not 612"),
        ({"ranks": []}, r"profile.ranks.*not \[\]"),
        ({"ranks": [0, -1]}, "profile.ranks"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        ProfileConfig(**settings)


def test_a_rank_that_does_not_exist_is_said(tmp_path: Path, caplog):
    """A run may continue with fewer ranks than it began with."""
    Profiler(ProfileConfig(steps="1:2", ranks=[2]), tmp_path, rank=0, world_size=2)
    assert "profile.ranks [2]" in caplog.text
