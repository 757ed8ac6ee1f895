"""After a kill a file has its old contents or the new ones, and a journal is whole up to its last whole line."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest

from statex_dist.durable.files import (
    TEMPORARY_PREFIX,
    JournalDamageError,
    JsonlJournal,
    read_journal,
    rename_durably,
    write_durably,
    write_json,
)
from statex_dist.durable.lock import LockHeldError


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


def test_records_before_a_kill_are_there(tmp_path):
    path = tmp_path / "j.jsonl"
    for start in (0, 5):
        child = os.fork()
        if child == 0:
            with JsonlJournal(path, exclusive=True) as journal:
                for i in range(start, start + 5):
                    journal.append({"i": i})
                os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert list(read_journal(path)) == [{"i": i} for i in range(start + 5)]


@pytest.mark.parametrize("tail", [b'{"i": 1', b'{"i": 1}', b"\xff", b""])
def test_a_line_without_its_end_does_not_count(tmp_path, tail):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"i": 0}\n' + tail)
    assert list(read_journal(path)) == [{"i": 0}]
    JsonlJournal(path).append({"i": 2}, fsync=False)
    assert path.read_bytes() == b'{"i": 0}\n{"i": 2}\n'


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"i": 0}\nnothing\n{"i": 2}\n')
    read = read_journal(path)
    assert next(read) == {"i": 0}
    with pytest.raises(JournalDamageError) as caught:
        next(read)
    assert (caught.value.path, caught.value.line) == (path, 2)
    with pytest.raises(JournalDamageError) as caught:
        list(read_journal(path, lambda line: line["i"]))
    assert (caught.value.line, type(caught.value.cause)) == (1, TypeError)
    assert list(read_journal(tmp_path / "none")) == []


def test_rewriting_replaces_all_records(tmp_path):
    journal = JsonlJournal(tmp_path / "j.jsonl")
    journal.append({"i": 0})
    journal.rewrite([{"i": 1}])
    journal.append({"\ud800": 2})
    assert list(read_journal(journal.path)) == [{"i": 1}, {"\ud800": 2}]


def test_an_exclusive_journal_is_for_one_process(tmp_path):
    path = tmp_path / "j.jsonl"
    with JsonlJournal(path, exclusive=True), pytest.raises(LockHeldError):
        JsonlJournal(path, exclusive=True)
    JsonlJournal(path, exclusive=True).close()


def test_a_record_that_does_not_fit_leaves_no_part(tmp_path):
    journal = JsonlJournal(tmp_path / "j.jsonl")
    journal.append({"i": 0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            journal.append({"text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    journal.append({"i": 1})
    assert list(read_journal(journal.path)) == [{"i": 0}, {"i": 1}]
