"""``statex prepare`` killed between its last steps: what the same command, and another one, then do."""

import itertools
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest

from launch.cli import main
from statex_dist.data.corpus.document_rules import DocumentRules
from statex_dist.data.corpus.staging import Staging
from statex_dist.data.corpus.work import WorkDirectory, WorkPart
from statex_dist.durable.lock import acquire
from statex_dist.errors import ConfigError, StateXError
from tests.data.options import prepare, prepare_part
from tests.data.prepared import files_of, json_lines, put, split_small

STEPS = ("unlink", "rmdir", "rename", "replace", "mkdir", "link", "fsync")


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    split_small(monkeypatch, 60)
    return put(tmp_path / "corpus.jsonl", json_lines(*({"text": f"document {i}"} for i in range(9))))


def killed_at(step: int, begin: tuple[type, str], work) -> bool:
    """Run ``work`` in a child that is killed before its ``step``-th change of the disk from a method on.

    Returns:
        Whether it was killed; otherwise it was done before.
    """
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    try:
        count = itertools.count()

        def killing(original):
            def change(*args, **options):
                if next(count) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **options)

            return change

        owner, name = begin
        method = getattr(owner, name)

        def begun(*args, **options):
            for step_name in STEPS:
                setattr(os, step_name, killing(getattr(os, step_name)))
            return method(*args, **options)

        setattr(owner, name, begun)
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def hidden(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("way", ["alone", "overwrite", "merge", "own work directory"])
def test_the_same_command_finishes_after_a_kill_at_any_step(tmp_path, corpus, way, caplog):
    undisturbed = tmp_path / "undisturbed"
    prepare([corpus], undisturbed)
    finished = set()
    for step in itertools.count():
        place = tmp_path / f"{step}"
        place.mkdir()
        out = place / "out"
        options = {"workers": 1}
        if way == "overwrite":
            prepare([put(place / "old.txt", b"another corpus")], out)
            options["overwrite"] = True
        elif way == "merge":
            for index in (1, 2):
                prepare_part([corpus], out, "bytes", WorkPart(index, 2), DocumentRules(), workers=1)
            options["merge"] = True
        elif way == "own work directory":
            options["work"] = place / "work"

        def run(out=out, options=options):
            return prepare([corpus], out, **options)

        killed = killed_at(step, (Staging, "commit"), run)
        left = hidden(place) or (place / "work").exists()
        if not left and killed and way != "overwrite":
            assert out.exists()  # killed behind the last step
            with pytest.raises(ConfigError, match="--overwrite"):
                run()
        elif killed:
            finished.add(run().finished_before)
        assert files_of(out) == files_of(undisturbed)
        assert hidden(place) == []
        assert not (place / "work").exists()
        shutil.rmtree(place)
        if not killed:
            break
    assert step > 15
    assert finished == {True, False}


def leave_work(tmp_path: Path, corpus: Path, **options) -> None:
    """Make ``out`` in a process that is killed as it begins to remove its work directory."""
    assert killed_at(0, (WorkDirectory, "remove"), lambda: prepare([corpus], tmp_path / "out", workers=1, **options))
    assert {".out.work", ".out.committed"} <= set(hidden(tmp_path))


def test_the_command_says_complete(tmp_path, corpus, capsys):
    arguments = ["prepare", str(corpus), "--out", str(tmp_path / "out")]
    leave_work(tmp_path, corpus)
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'out'}: complete: 9 documents, ")
    assert hidden(tmp_path) == []
    assert main(arguments) == 2  # nothing is left to finish: as ever
    shutil.rmtree(tmp_path / "out")
    leave_work(tmp_path, corpus)
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["finished_before"], found["documents"]) == (True, 9)


@pytest.mark.parametrize(
    "options",
    [{"seed": 1}, {"eos": "none"}, {"special_tokens": "keep"}, {"format": "wds"}, {"max_documents": 3}],
    ids=str,
)
def test_another_command_is_refused_as_ever(tmp_path, corpus, options):
    leave_work(tmp_path, corpus)
    with pytest.raises(ConfigError, match="--overwrite"):
        prepare([corpus], tmp_path / "out", **options)
    assert prepare([corpus], tmp_path / "out").finished_before


def test_other_inputs_are_refused_as_ever(tmp_path, corpus):
    leave_work(tmp_path, corpus)
    put(corpus, corpus.read_bytes() + json_lines({"text": "one more"}))
    with pytest.raises(ConfigError, match="--overwrite"):
        prepare([corpus], tmp_path / "out")
    assert prepare([corpus], tmp_path / "out", overwrite=True).documents == 10
    assert hidden(tmp_path) == []


def test_a_dataset_that_was_changed_meanwhile_is_not_taken(tmp_path, corpus):
    leave_work(tmp_path, corpus)
    manifest = tmp_path / "out" / "manifest.json"
    put(manifest, manifest.read_bytes() + b"\n")
    with pytest.raises(ConfigError, match="--overwrite"):
        prepare([corpus], tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert not prepare([corpus], tmp_path / "out").finished_before


def test_a_damaged_note_of_the_commit_is_not_taken(tmp_path, corpus):
    leave_work(tmp_path, corpus)
    for content in (b"", b"[" * 100_000, b"\xff", b"[]", b'{"command": 1}'):
        put(tmp_path / ".out.committed", content)
        with pytest.raises(ConfigError, match="--overwrite"):
            prepare([corpus], tmp_path / "out")


def test_a_work_directory_in_use_is_left(tmp_path, corpus):
    leave_work(tmp_path, corpus)
    with acquire(tmp_path / ".out.work" / "lock"), pytest.raises(ConfigError, match="is in use by"):
        prepare([corpus], tmp_path / "out")
    assert (tmp_path / ".out.work").exists()


def test_a_work_directory_that_another_command_has_taken_is_left(tmp_path, corpus):
    work = tmp_path / "work"
    assert killed_at(3, (WorkDirectory, "remove"), lambda: prepare([corpus], tmp_path / "out", workers=1, work=work))
    shutil.rmtree(work)
    prepare_part([corpus], tmp_path / "other", "bytes", WorkPart(1, 2), DocumentRules(eos="none"), workers=1, work=work)
    units = sorted((work / "units").iterdir())
    assert prepare([corpus], tmp_path / "out", work=work).finished_before
    assert sorted((work / "units").iterdir()) == units
    assert units


def full_disk(work) -> str:
    """Run ``work`` in a child that may write files of 300 bytes at most, and return its error."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
            work()
        except StateXError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as file:
        return file.read().decode()


def test_a_full_disk_is_named(tmp_path, corpus):
    """In the units, the settings and the shards; the limit of a file's size stands in for the disk's."""
    large = put(tmp_path / "large.txt", b"x" * 2000)
    said = full_disk(lambda: prepare([large], tmp_path / "out", workers=1))
    assert f"{tmp_path / '.out.work'}" in said
    assert "file sizes" in said
    prepare_part([corpus], tmp_path / "out", "bytes", WorkPart(1, 1), DocumentRules())
    said = full_disk(lambda: prepare([corpus], tmp_path / "out", merge=True))
    assert f"{tmp_path / '.out.partial-'}" in said
    assert len(said) <= 400
    assert prepare([corpus], tmp_path / "out", merge=True).documents == 9


def test_a_part_that_was_killed_at_any_step_is_run_again(tmp_path, corpus):
    rules = DocumentRules()
    undisturbed = tmp_path / "undisturbed"
    prepare([corpus], undisturbed)
    for step in itertools.count():
        out = tmp_path / f"{step}" / "out"
        out.parent.mkdir()

        def run(index, out=out):
            return prepare_part([corpus], out, "bytes", WorkPart(index, 2), rules, workers=1)

        killed = killed_at(step, (WorkDirectory, "__enter__"), lambda: run(1))
        first = run(1)
        run(2)
        assert first.units == first.units_before or killed
        prepare([corpus], out, merge=True)
        assert files_of(out) == files_of(undisturbed)
        assert hidden(out.parent) == []
        if not killed:
            break
    assert step > 10
