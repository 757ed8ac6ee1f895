"""Evaluations that are killed, shared and started again give what one undisturbed process gives."""

import json
import multiprocessing
import os
import signal
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file

from statex_dist.errors import ConfigError, DataError, StateXError
from statex_dist.evaluation.journal import EvalUnit, UnitJournal, model_fingerprint, work
from statex_dist.evaluation.ranks import EvalRanks

SETTINGS = {"settings": {"seed": 0, "lengths": (4, 8)}, "model": {"fingerprint": "abc"}}


def units(count=7, *, ran=None, die_at=None):
    """Units of one to three records each; ``ran`` collects which ones are run."""

    def run(i):
        if i == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if ran is not None:
            ran.append(i)
        return [{"unit": i, "value": 0.1 * i + j} for j in range(i % 3 + 1)]

    return [EvalUnit(key=f"unit {i}", run=lambda i=i: run(i)) for i in range(count)]


def evaluate(directory, *, settings=SETTINGS, overwrite=False, finish=True, **options):
    with UnitJournal(directory, "suite", settings, overwrite=overwrite) as journal:
        records = work(units(**options), journal)
        if finish:
            (directory / "suite.json").write_text(json.dumps(records))
            journal.finish()
    return records


def killed(directory, unit):
    """Evaluate in a process of its own that dies of SIGKILL inside ``unit``."""
    process = multiprocessing.get_context("fork").Process(
        target=evaluate, args=(directory,), kwargs={"die_at": unit}, daemon=True
    )
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_evaluation_goes_on_and_ends_alike(tmp_path):
    whole = evaluate(tmp_path / "whole")
    assert whole == work(units())
    killed(tmp_path / "cut", 4)
    killed(tmp_path / "cut", 6)
    ran = []
    assert evaluate(tmp_path / "cut", ran=ran) == whole
    assert ran == [6]
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["suite.json"]


@pytest.mark.parametrize("tail", [b'{"unit": "unit 3", "sec', b'{"unit": "unit 3", "seconds": 1.0, "records": []}'])
def test_a_line_without_its_end_is_done_again(tmp_path, tail):
    killed(tmp_path, 3)
    part = tmp_path / "suite.unfinished" / "part-0.jsonl"
    whole_lines = part.read_bytes()
    part.write_bytes(whole_lines + tail)
    ran = []
    assert evaluate(tmp_path, ran=ran, finish=False) == work(units())
    assert ran == [3, 4, 5, 6]
    assert part.read_bytes().startswith(whole_lines + b'{"unit": "unit 3"')
    assert len(part.read_bytes().splitlines()) == 7


def test_parts_of_other_ranks_are_found(tmp_path):
    killed(tmp_path, 5)
    part = tmp_path / "suite.unfinished" / "part-0.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[::2]))
    part.with_name("part-1.jsonl").write_bytes(b"".join(lines[1::2]))
    ran = []
    assert evaluate(tmp_path, ran=ran) == work(units())
    assert ran == [5, 6]


def test_ranks_share_the_units_and_rank_0_puts_them_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(EvalRanks, "together", lambda self: nullcontext())  # here one after the other
    shares = {}
    for rank in (2, 1, 0):
        shares[rank] = []
        if rank == 2:  # rank 0 makes the directory first
            UnitJournal(tmp_path, "suite", SETTINGS, ranks=EvalRanks(rank=0, world_size=3)).close()
        with UnitJournal(tmp_path, "suite", SETTINGS, ranks=EvalRanks(rank=rank, world_size=3)) as journal:
            records = work(units(ran=shares[rank]), journal)
        assert records == (work(units()) if rank == 0 else None)
    assert shares == {2: [2, 5], 1: [1, 4], 0: [0, 3, 6]}
    assert journal.seconds > 0


def test_a_damaged_line_is_named(tmp_path):
    killed(tmp_path, 3)
    part = tmp_path / "suite.unfinished" / "part-0.jsonl"
    part.write_bytes(part.read_bytes().replace(b'"unit 1"', b'"unit 1'))
    with pytest.raises(DataError, match=r"part-0.jsonl.*2.*suite.unfinished"):
        evaluate(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"seed": 1, "lengths": [4, 8]}}, r"settings.seed 0.*has 1"),
        ({"settings": {"seed": 0, "lengths": [4]}}, r"settings.lengths \[4, 8\].*\[4\]"),
        ({"model": {"fingerprint": "abd"}}, r'model.fingerprint "abc".*"abd"'),
        ({"data": "text"}, r'data none.*"text"'),
    ],
)
def test_other_settings_do_not_go_on(tmp_path, changes, message):
    killed(tmp_path, 3)
    other = {**SETTINGS, **changes}
    with pytest.raises(ConfigError, match=message):
        evaluate(tmp_path, settings=other)
    ran = []
    evaluate(tmp_path, settings=other, overwrite=True, ran=ran)
    assert ran == list(range(7))


def test_results_are_kept_unless_told_and_the_same_command_goes_on_replacing_them(tmp_path):
    evaluate(tmp_path)
    with pytest.raises(ConfigError, match=r"--overwrite"):
        evaluate(tmp_path)
    for name in ("suite.jsonl", "suite_a.png", "suite_notes.png"):
        (tmp_path / name).write_text("of before")
    (tmp_path / "suite.json").write_text(json.dumps({"plots": ["suite_a.png", "../" + tmp_path.name + "/suite.jsonl"]}))
    with UnitJournal(tmp_path, "suite", SETTINGS, overwrite=True) as journal:
        journal.add("unit 0", units()[0].run(), seconds=1.0)  # and there it ends
    assert sorted(path.name for path in tmp_path.iterdir()) == ["suite.unfinished", "suite_notes.png"]
    ran = []
    evaluate(tmp_path, overwrite=True, ran=ran)
    assert ran == [1, 2, 3, 4, 5, 6]


def test_directories_that_are_something_else_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        evaluate(tmp_path)
    with pytest.raises(ConfigError, match="directory"):
        evaluate(tmp_path / "notes.txt")
    evaluate(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_two_processes_do_not_share_a_part(tmp_path):
    with (
        UnitJournal(tmp_path, "suite", SETTINGS),
        pytest.raises(ConfigError, match="evaluating"),
    ):
        evaluate(tmp_path)


def test_a_model_is_told_from_another_by_its_contents(tmp_path):
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text("{}")
    save_file({"a": torch.zeros(2_500)}, weights)
    content = weights.read_bytes()
    first = model_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("not of the model")
    os.utime(weights, (0, 0))
    assert model_fingerprint(tmp_path) == first
    weights.write_bytes(content[:-1] + b"\1")
    assert model_fingerprint(tmp_path) != first
    weights.write_bytes(content)
    config.write_text("{ }")
    assert model_fingerprint(tmp_path) != first
    config.write_text("{}")


def test_a_change_of_one_small_tensor_in_a_large_file_is_seen(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("statex_dist.evaluation.journal._SAMPLED_BYTES", 1_000)
    monkeypatch.setattr("statex_dist.evaluation.journal._SAMPLES", 2)  # the file's ends alone
    tensors = {name: torch.zeros(n) for name, n in (("a", 50_000), ("b", 10), ("c", 300_000), ("d", 400_000))}

    def fingerprint():
        save_file(tensors, tmp_path / "model.safetensors")
        return model_fingerprint(tmp_path)

    seen = {fingerprint()}
    for name, place in (("b", 4), ("c", 0), ("c", 150_000), ("c", -1)):
        tensors[name][place] = 1
        seen.add(fingerprint())
    assert len(seen) == 5


def test_a_journal_that_is_being_written_is_not_removed(tmp_path):
    with UnitJournal(tmp_path, "suite", SETTINGS) as journal:
        journal.add("unit 0", units()[0].run(), seconds=1.0)
        for settings in ({**SETTINGS, "data": "other"}, SETTINGS):
            (tmp_path / "suite.json").write_text("{}")
            with pytest.raises(ConfigError, match=f"{tmp_path}"):
                UnitJournal(tmp_path, "suite", settings, overwrite=True)
            (tmp_path / "suite.json").unlink()
        with pytest.raises(ConfigError, match="evaluating"):
            UnitJournal(tmp_path, "suite", {**SETTINGS, "data": "other"}, overwrite=True)
        assert work(units(), journal) == work(units())


@pytest.mark.parametrize(
    ("hours", "what"), [(0, r"ended \(if it failed, it says why\)"), (13, "was silent for 12:00:00")]
)
def test_a_rank_that_waited_says_whether_the_other_ended_or_was_silent(monkeypatch, hours, what):
    def gather(*arguments):
        raise RuntimeError("Connection closed by peer")

    clock = iter((0.0, 3600.0 * hours))
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    monkeypatch.setattr("statex_dist.evaluation.ranks.time.monotonic", lambda: next(clock))
    with pytest.raises(StateXError, match=f"{what}"):  # noqa: SIM117
        with EvalRanks(rank=0, world_size=2).together():
            pass
