"""Journals of killed jobs are read up to the last whole line, and continued there."""

import os
import resource
import signal

import pytest

from statex_dist.durable.journal import JournalDamageError, JsonlJournal, read_journal
from statex_dist.durable.lock import LockHeldError


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
