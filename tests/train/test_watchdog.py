"""The watchdog ends real processes that really hang, and only those."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from statex_dist.train.watchdog import EXIT_HUNG, Watchdog

PROGRAM = """
import ctypes, faulthandler, logging, os, sys, threading, time
from pathlib import Path
from statex_dist.train.watchdog import Watchdog

logging.basicConfig(format="%(message)s")
watchdog = Watchdog(float(sys.argv[2]), Path(sys.argv[1]), 3, linger=0.2, grace=2)

def hang_in_python():
    watchdog.beat("forward", step=7)
    time.sleep(60)

def hang_holding_the_gil():
    watchdog.beat("forward", step=7)
    ctypes.PyDLL(None).sleep(60)

def hang_with_the_log_locked():
    watchdog.beat("forward", step=7)
    logging.root.handlers[0].acquire()
    time.sleep(60)

def beat_for_a_while():
    for step in range(30):
        watchdog.beat("forward", step=step)
        time.sleep(0.1)
    watchdog.beat("save", allow=30)
    time.sleep(2.5)

def hang_in_a_short_phase():
    watchdog.beat("save", step=9, allow=0.5)
    hang_within()

def hang_within():
    time.sleep(60)

watchdog.start()
globals()[sys.argv[3]]()
watchdog.stop()
faulthandler.dump_traceback_later(0.5, exit=True)  # the watchdog's own timer would be replaced, or gone
faulthandler.cancel_dump_traceback_later()
print("at the end", threading.active_count())
"""


def run(directory: Path, function: str, timeout: float) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    arguments = [sys.executable, "-c", PROGRAM, str(directory / "stacks"), str(timeout), function]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=50, check=False)
    return done, time.monotonic() - began


def test_a_hanging_process_ends_with_its_stacks_written(tmp_path: Path):
    done, seconds = run(tmp_path, "hang_in_python", 1.5)
    assert done.returncode == EXIT_HUNG == 76
    assert seconds < 15
    file = tmp_path / "stacks" / "rank3.txt"
    stacks = file.read_text()
    said = "rank 3 hangs: nothing for 2 s since 'forward' of step 7 began"
    assert said in stacks.splitlines()[0]
    assert "in hang_in_python" in stacks
    assert "in _watch" in stacks, "all threads are wanted, not the main one alone"
    assert f"{said}; the stacks of its threads are in {file}" in done.stderr.splitlines()
    assert "in hang_in_python" in done.stderr


def test_a_hang_that_holds_the_gil_is_ended_by_faulthandler(tmp_path: Path):
    done, seconds = run(tmp_path, "hang_holding_the_gil", 1.0)
    assert done.returncode == 1
    assert seconds < 15
    stacks = (tmp_path / "stacks" / "rank3.txt").read_text()
    assert stacks.startswith("Timeout (")
    assert "in hang_holding_the_gil" in stacks


def test_a_lock_that_the_hanging_thread_holds_does_not_keep_the_process_alive(tmp_path: Path):
    done, _ = run(tmp_path, "hang_with_the_log_locked", 1.0)
    assert done.returncode in (EXIT_HUNG, 1)  # the last resort, or faulthandler
    assert "in hang_with_the_log_locked" in (tmp_path / "stacks" / "rank3.txt").read_text()


def test_a_process_that_beats_goes_on(tmp_path: Path):
    done, _ = run(tmp_path, "beat_for_a_while", 1.0)
    assert (done.returncode, done.stdout, done.stderr) == (0, "at the end 1\n", "")
    assert list((tmp_path / "stacks").iterdir()) == []


def test_a_phase_may_have_a_limit_of_its_own_and_old_stacks_stay(tmp_path: Path):
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rank3.txt").write_text("of an earlier start\n")
    done, _ = run(tmp_path, "hang_in_a_short_phase", 600)
    assert done.returncode == EXIT_HUNG
    first, second, *_ = (tmp_path / "stacks" / "rank3.txt").read_text().splitlines()
    assert first == "of an earlier start"
    assert "since 'save' of step 9 began" in second
    assert "in hang_within" in done.stderr


def test_a_beat_is_cheap(tmp_path: Path):
    watchdog = Watchdog(600, tmp_path, 0)
    watchdog.start()
    try:
        began = time.perf_counter()
        for step in range(10_000):
            watchdog.beat("forward", step=step)
        assert (time.perf_counter() - began) / 10_000 < 50e-6
    finally:
        watchdog.stop()


def test_it_needs_a_place_to_write(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Watchdog(1, tmp_path / "file" / "stacks", 0).start()
