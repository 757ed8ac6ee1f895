"""Every way in which a run ends, and the files that it leaves.

Saved before the end: all steps done, a signal, no batch (data damaged, unreadable or at its end), too many bad steps or
steps without targets (tests/train/test_targets.py). Not saved: a second Ctrl-C of a user who will not wait, a save that
fails itself, and crashes: a hang (tests/faults), an error of the program, a kill.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from statex_dist.checkpoint.layout import complete_tags
from statex_dist.config import parse_config
from statex_dist.data.loader import PackedLoader
from statex_dist.data.storage.mds import MdsShard
from statex_dist.engine import checkpoints as checkpoints_module
from statex_dist.engine.plain import PlainEngine
from statex_dist.errors import CheckpointError, DataError, StateXError
from statex_dist.run import train
from statex_dist.run_config import RunConfig
from statex_dist.train.metrics import read_metrics
from statex_dist.train.status import IMPATIENCE_SECONDS, StopRequest, read_status
from tests.raising import raises
from tests.runs import GLA, make_shards, write_run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _restore_signal_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def configure(directory: Path, shards: Path, *arguments: str, num_steps: int = 8) -> RunConfig:
    file = write_run(
        directory / "run.yaml",
        model={"config": GLA},
        data={"path": str(shards)},
        engine={"name": "plain"},
        train={"num_steps": num_steps},
    )
    return parse_config(RunConfig, ["--config", str(file), *arguments], prog="train.py")


def assert_saved(config: RunConfig, step: int, state: str, exit_code: int) -> None:
    """The newest checkpoint, the records and the status are of ``step``."""
    run = Path(config.run_dir)
    assert complete_tags(run / "checkpoints")[0] == f"global_step{step}"
    assert [record["step"] for record in read_metrics(run)] == list(range(1, step + 1))
    status = read_status(run)
    assert (status.state, status.step, status.exit_code) == (state, step, exit_code)
    assert status.epochs == read_metrics(run)[-1]["epochs"]


def batches_that(action: Callable[[], None], after: int) -> Callable[[PackedLoader], Iterator]:
    """Return an iterator over a loader that calls ``action`` before batch number ``after``."""
    original = PackedLoader.__iter__

    def iterate(self: PackedLoader) -> Iterator:
        for number, batch in enumerate(original(self)):
            if number == after:
                action()
            yield batch

    return iterate


def fail(error: Exception) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def test_all_steps_done(tmp_path: Path, shards: Path):
    config = configure(tmp_path, shards)
    assert train(config)
    assert_saved(config, 8, "complete", 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal(tmp_path: Path, shards: Path, monkeypatch, number: signal.Signals):
    config = configure(tmp_path, shards)
    monkeypatch.setattr(PackedLoader, "__iter__", batches_that(lambda: signal.raise_signal(number), 3))
    assert not train(config)
    assert_saved(config, 3, "preempted", 75)


@pytest.mark.parametrize(
    ("error", "kind", "message", "exit_code"),
    [
        (DataError("shard x is damaged"), DataError, "step 4: shard x", 2),
        (OSError(5, "Input/output error", "/data/x.mds"), StateXError, "step 4: .*/data/x.mds: Input", 1),
    ],
)
def test_no_batch(tmp_path: Path, shards: Path, monkeypatch, error, kind, message, exit_code):
    config = configure(tmp_path, shards)
    monkeypatch.setattr(PackedLoader, "__iter__", batches_that(fail(error), 3))
    with pytest.raises(kind, match=message):
        train(config)
    assert_saved(config, 3, "failed", exit_code)
    monkeypatch.undo()
    assert train(config)
    assert_saved(config, 8, "complete", 0)


def test_data_damaged_under_the_run_is_named_with_its_document_and_step(tmp_path: Path, shards: Path, monkeypatch):
    config = configure(tmp_path, shards)
    read, calls = MdsShard.read, []

    def damaged(self: MdsShard, *arguments: int):
        calls.append(arguments)
        if len(calls) > 20:
            raise OSError(5, "Input/output error")
        return read(self, *arguments)

    monkeypatch.setattr(MdsShard, "read", damaged)
    with pytest.raises(DataError, match=r"step \d+: source data, document \d+: .*shard\.0.*: Input/output"):
        train(config)
    assert_saved(config, read_status(Path(config.run_dir)).step, "failed", 2)


def test_the_end_of_the_data(tmp_path: Path, shards: Path, monkeypatch):
    original = PackedLoader.__iter__

    def short(self: PackedLoader) -> Iterator:
        batches = original(self)
        for _ in range(5):
            yield next(batches)

    config = configure(tmp_path, shards)
    monkeypatch.setattr(PackedLoader, "__iter__", short)
    with raises(DataError, "step 6", "train.num_steps=8"):
        train(config)
    assert_saved(config, 5, "failed", 2)


def test_no_batch_at_the_start_leaves_nothing(tmp_path: Path, shards: Path, monkeypatch):
    config = configure(tmp_path, shards)
    monkeypatch.setattr(PackedLoader, "__iter__", batches_that(fail(DataError("gone")), 0))
    with raises(DataError, "step 1", "gone"):
        train(config)
    assert complete_tags(Path(config.run_dir) / "checkpoints") == []


def test_a_save_that_fails_does_not_hide_why_the_run_ends(tmp_path: Path, shards: Path, monkeypatch, caplog):
    config = configure(tmp_path, shards, "--train.save_every", "2", "--train.save_retries", "0")

    def broken() -> None:
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints_module, "commit_directory", full)
        raise DataError("shard x is damaged")

    monkeypatch.setattr(PackedLoader, "__iter__", batches_that(broken, 3))
    with raises(DataError, "step 4", "shard x"):
        train(config)
    assert any("step 3 cannot be saved" in r.message and "No space left" in r.message for r in caplog.records)
    assert complete_tags(Path(config.run_dir) / "checkpoints") == ["global_step2"]
    assert "shard x is damaged" in read_status(Path(config.run_dir)).message


def test_a_last_save_that_fails_is_the_reason_itself(tmp_path: Path, shards: Path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints_module, "commit_directory", full)
    with pytest.raises(CheckpointError, match="step 8 cannot be saved"):
        train(configure(tmp_path, shards))


def test_an_impatient_user_gets_the_last_checkpoint_and_one_line(tmp_path: Path, shards: Path, monkeypatch):
    config = configure(tmp_path, shards, "--train.save_every", "2")
    step, calls, clock = PlainEngine.step, [], time.monotonic

    def interrupted(self: PlainEngine, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(time, "monotonic", lambda: clock() + IMPATIENCE_SECONDS + 1)
            signal.raise_signal(signal.SIGINT)
        return step(self, **kwargs)

    monkeypatch.setattr(PlainEngine, "step", interrupted)
    with raises(StateXError, "interrupted again", "step 3"):
        train(config)
    monkeypatch.undo()
    run = Path(config.run_dir)
    assert complete_tags(run / "checkpoints") == ["global_step2"]
    assert read_status(run).state == "failed"
    assert train(config)
    assert_saved(config, 8, "complete", 0)


def test_an_error_of_the_program_keeps_its_traceback_and_the_last_checkpoint(tmp_path: Path, shards: Path, monkeypatch):
    config = configure(tmp_path, shards, "--train.save_every", "2")
    monkeypatch.setattr(PackedLoader, "__iter__", batches_that(fail(ZeroDivisionError("a bug")), 3))
    with pytest.raises(ZeroDivisionError):
        train(config)
    run = Path(config.run_dir)
    assert complete_tags(run / "checkpoints") == ["global_step2"]
    assert (read_status(run).state, read_status(run).exit_code) == ("failed", 1)
