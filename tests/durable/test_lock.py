"""Locks end with their process, name their holder, and are never on a file that is gone."""

import errno
import fcntl
import os
import signal
import threading

import pytest

from statex_dist.durable.lock import LockHeldError, acquire, holder_of


def holding(path, **options) -> int:
    """Start a process that holds a lock until it is killed; return its number when it has it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        acquire(path, **options)
        os.write(write, b".")
        signal.pause()
    os.read(read, 1)
    os.close(read)
    os.close(write)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_lock_ends_with_a_killed_process(tmp_path):
    path = tmp_path / "deep" / "lock"
    child = holding(path, holder="a run")
    with pytest.raises(LockHeldError) as caught:
        acquire(path)
    assert caught.value.path == path
    assert caught.value.holder == holder_of(path) == f"a run (process {child} on {os.uname().nodename})"
    kill(child)
    assert holder_of(path) is None
    with acquire(path, holder="another"):
        assert path.read_text().startswith(f"another (process {os.getpid()} on ")
        assert holder_of(path) is not None
    assert holder_of(path) is None
    assert holder_of(tmp_path / "none") is None


@pytest.mark.parametrize("how", ["released", "killed"])
def test_a_forked_child_does_not_keep_the_lock(tmp_path, how):
    path = tmp_path / "lock"
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        lock = acquire(path)
        child = os.fork()
        if child == 0:
            signal.pause()
        if how == "released":
            lock.release()
        os.write(write, f"{child}\n".encode())
        signal.pause()
    child = int(os.read(read, 20))
    if how == "killed":
        with pytest.raises(LockHeldError):
            acquire(path)
        kill(parent)
    with acquire(path, wait=5):
        os.kill(child, signal.SIGKILL)
    if how == "released":
        kill(parent)


def test_a_directory_is_locked_while_it_is_renamed(tmp_path):
    child = holding(tmp_path / "a", directory=True)
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(LockHeldError):
        acquire(tmp_path / "b", directory=True)
    acquire(tmp_path / "a", directory=True).release()
    kill(child)
    acquire(tmp_path / "b", directory=True).release()


def test_sharers_share_and_keep_others_out(tmp_path):
    path = tmp_path / "lock"
    with acquire(path, shared=True), acquire(path, shared=True, create=False), pytest.raises(LockHeldError):
        acquire(path)
    with acquire(path), pytest.raises(LockHeldError):
        acquire(path, shared=True)
    with pytest.raises(FileNotFoundError):
        acquire(tmp_path / "none", create=False)


def test_who_waits_gets_the_lock(tmp_path):
    lock = acquire(tmp_path / "lock")
    releasing = threading.Timer(0.05, lock.release)
    releasing.start()
    with acquire(tmp_path / "lock", wait=30, poll=0.01):
        lock.release()  # a second time: nothing happens to the new holder's
        assert holder_of(tmp_path / "lock") is not None


def test_a_file_that_was_just_removed_is_made_again(tmp_path, monkeypatch):
    path, real, calls = tmp_path / "lock", fcntl.flock, []

    def flock(file, how):
        if not calls:
            path.unlink()
        calls.append(how)
        real(file, how)

    monkeypatch.setattr("statex_dist.durable.lock.fcntl.flock", flock)
    with acquire(path):
        monkeypatch.undo()
        assert holder_of(path) is not None
    assert len(calls) == 2


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("statex_dist.durable.lock.fcntl.flock", flock)
    monkeypatch.setattr("statex_dist.durable.lock.logger.propagate", True)
    with pytest.raises(OSError, match="No locks") as caught:
        acquire(tmp_path / "lock")
    assert caught.value.errno == errno.ENOLCK
    acquire(tmp_path / "lock", required=False).release()
