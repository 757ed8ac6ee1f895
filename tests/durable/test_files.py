"""Atomic writes: a process that is killed at any system call leaves the old contents or the new ones."""

import json
import os
import signal
from pathlib import Path

import pytest

from statex_dist.durable.files import TEMPORARY_PREFIX, rename_durably, write_durably, write_json


def killed_before(call: int, work) -> bool:
    """Do ``work`` in a child that dies of SIGKILL before its ``call``-th step; return whether it came so far."""
    child = os.fork()
    if child == 0:
        left = call

        def before(step):
            def counted(*arguments, **options):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(*arguments, **options)

            return counted

        os.fsync = before(os.fsync)
        Path.replace = before(Path.replace)
        Path.open = before(Path.open)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("fsync", [True, False])
def test_a_killed_write_leaves_the_old_or_the_new_contents(tmp_path, fsync):
    path, seen, call = tmp_path / "a", [], 0
    write_durably(path, "old")
    while killed_before(call, lambda: write_durably(path, b"new", fsync=fsync)):
        seen.append(path.read_text())
        call += 1
    assert seen == (["old", "old", "old", "new"] if fsync else ["old", "old"])
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["a"], "the next write replaces the leftovers"


def test_a_failed_write_leaves_nothing(tmp_path):
    path = tmp_path / "a"
    write_json(path, {"é": 1}, ensure_ascii=False)
    assert path.read_text(encoding="utf-8") == '{\n "é": 1\n}\n'
    with pytest.raises(ValueError, match="nan"):
        write_json(path, float("nan"))
    with pytest.raises(UnicodeEncodeError):
        write_durably(path, "\ud800")
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_many_writers_do_not_share_a_temporary_file(tmp_path):
    path, children = tmp_path / "a", []
    for value in "xyz":
        child = os.fork()
        if child == 0:
            for _ in range(50):
                write_durably(path, value * 1000, fsync=False, many_writers=True)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert path.read_text() in {value * 1000 for value in "xyz"}
    assert not list(tmp_path.glob(f"{TEMPORARY_PREFIX}*"))


def test_a_directory_gets_its_name_when_it_is_finished(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a").touch()
    rename_durably(tmp_path / "made", tmp_path / "final")
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "a"]


def test_a_pipe_is_written_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)
    write_durably(pipe, "contents")
    assert os.read(reader, 100) == b"contents"
    assert pipe.is_fifo()
    os.close(reader)
