"""A log for each rank, folded warnings, and a console that many ranks share."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from statex_dist import rank_log as module
from statex_dist.rank_log import FOLD_SECONDS, LOGGERS, MAX_KINDS, MAX_SIMILAR, FoldFilter, ShareFilter, rank_log


class Clock:
    """A clock that stands still until it is told to move."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def record(text: str, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("statex_dist.x", level, __file__, 1, text, (), None)


def shown(found: logging.Filter, text: str, level: int = logging.WARNING) -> str | None:
    made = record(text, level)
    return made.getMessage() if found.filter(made) else None


def test_a_repeated_warning_is_shown_at_once_then_counted():
    clock = Clock()
    fold = FoldFilter(clock)
    assert shown(fold, "no disk") == "no disk"
    assert [shown(fold, "no disk") for _ in range(9)] == [None] * 9
    assert shown(fold, "another") == "another"
    clock.now = FOLD_SECONDS
    assert "9 more" in str(shown(fold, "no disk"))
    assert shown(fold, "no disk") is None


def test_warnings_that_differ_in_numbers_are_folded_later():
    clock = Clock()
    fold = FoldFilter(clock)
    found = [shown(fold, f"step {step} is bad") for step in range(MAX_SIMILAR + 3)]
    assert found[:MAX_SIMILAR] == [f"step {step} is bad" for step in range(MAX_SIMILAR)]
    assert found[MAX_SIMILAR:] == [None] * 3


def test_errors_and_lines_are_never_folded_and_memory_is_bounded():
    fold = FoldFilter(Clock())
    for level in (logging.ERROR, logging.INFO):
        assert [shown(fold, "same", level) for _ in range(3)] == ["same"] * 3
    for number in range(2 * MAX_KINDS):
        shown(fold, "x" * (number + 1))
    assert len(fold._kinds) <= MAX_KINDS


def test_other_ranks_have_a_share_of_the_console():
    clock = Clock()
    share = ShareFilter(2, clock)
    assert [share.filter(record(f"w{i}")) for i in range(4)] == [True, True, False, False]
    assert share.filter(record("e", logging.ERROR))
    clock.now = 60.0
    assert share.filter(record("w"))
    assert not ShareFilter(0, clock).filter(record("w"))


def texts(path: Path) -> list[str]:
    return [line.split(" ", 3)[3] for line in path.read_text().splitlines()]


def test_a_rank_has_a_log_that_goes_on_over_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "logs" / "rank3.log"
    before = {name: list(logging.getLogger(name).handlers) for name in LOGGERS}
    for start in range(2):
        with rank_log(path, rank=3, world_size=8):
            logging.getLogger("statex_dist.train").warning("warning of start %d", start)
        logging.getLogger("statex_dist.train").warning("outside")
    lines = texts(path)
    assert [line.partition(":")[0] for line in lines] == [
        *("rank 3 of 8 starts", "warning of start 0"),
        *("rank 3 of 8 starts", "warning of start 1"),
    ]
    assert {name: list(logging.getLogger(name).handlers) for name in LOGGERS} == before


def test_a_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_BYTES", 2000)
    with rank_log(tmp_path / "rank0.log", rank=0, world_size=1):
        for number in range(200):
            logging.getLogger("statex_dist.train").warning("warning %d", number)
    assert {path.name for path in tmp_path.iterdir()} == {"rank0.log", "rank0.log.1"}
    assert all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())
    assert texts(tmp_path / "rank0.log")[-1] == "warning 199"


def test_a_log_that_cannot_be_made_or_written_does_not_end_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "logs").touch()
    with rank_log(tmp_path / "logs" / "rank0.log", rank=0, world_size=1):
        pass
    with rank_log(Path("/dev/full"), rank=0, world_size=1):
        for _ in range(3):
            logging.getLogger("statex_dist.train").warning("lost")
    assert capsys.readouterr().err.count("cannot be written") == 1
