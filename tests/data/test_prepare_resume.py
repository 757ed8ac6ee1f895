"""``statex prepare`` killed at any moment, and gone on with."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from statex_dist.data.corpus.documents import split_units
from statex_dist.data.corpus.records import ReadReport
from statex_dist.data.corpus.tokenize_units import UnitJob, UnitTokenizer
from statex_dist.data.corpus.unit_files import UnitDocuments, UnitWriter, load_result
from statex_dist.data.formats import open_store
from statex_dist.errors import ConfigError, DataError
from tests.data.options import prepare
from tests.data.prepared import files_of, json_lines, put, split_small, texts_of
from tests.runs import REPOSITORY

UNIT_BYTES = 300

KILLED = """
import os, signal, sys
from importlib import import_module

if __name__ == "__main__":
    module, owner, name, count, when, workers, root, out = sys.argv[1:]
    count = int(count)
    def killing(*args, **options):
        global count
        count -= 1
        if count == 0 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **options)
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    target = getattr(import_module(module), owner)
    original = getattr(target, name)
    setattr(target, name, killing)
    import statex_dist.data.corpus.source as source
    from statex_dist.data.corpus.documents import split_units
    from tests.data.options import prepare
    source.split_units = lambda files: split_units(files, unit_bytes=%d)
    prepare([root], out, workers=int(workers))
"""


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    split_small(monkeypatch, UNIT_BYTES)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    root.mkdir()
    for name in ("a", "b"):
        put(root / f"{name}.jsonl", json_lines(*({"text": f"{name} {i}" * (i % 7)} for i in range(100))))
    put(root / "c.jsonl", json_lines({"input_ids": [1, 2], "loss_mask": [0, 1]}, {"input_ids": list(b"no mask")}))
    put(root / "d.txt", "Text ∑".encode())
    return root


@pytest.fixture
def said() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("statex_dist")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the units that this process tokenises from now on."""
    names: list[str] = []
    real = UnitTokenizer.run

    def run(self: UnitTokenizer, job: UnitJob):
        names.append(Path(job.base).name)
        return real(self, job)

    monkeypatch.setattr(UnitTokenizer, "run", run)
    return names


def kill(tmp_path: Path, corpus: Path, module: str, owner: str, name: str, count: int, when: str, workers: int) -> None:
    """Run ``prepare`` in a process that is killed before or after the call number ``count`` of a method."""
    script = put(tmp_path / "killed.py", (KILLED % UNIT_BYTES).encode())
    arguments = [f"statex_dist.data.{module}", owner, name, str(count), when, str(workers), str(corpus)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments, str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def finished(tmp_path: Path) -> set[str]:
    return {file.stem for file in (tmp_path / ".out.work" / "units").glob("*.done")}


def all_units(corpus: Path) -> int:
    from statex_dist.data.corpus.documents import find_files

    return len(split_units(find_files([corpus]), UNIT_BYTES)[0])


@pytest.mark.parametrize(
    ("module", "owner", "name", "count", "when", "workers", "done"),
    [
        ("corpus.unit_files", "UnitWriter", "_place", 1, "before", 1, 0),  # tokens under their temporary name
        ("corpus.unit_files", "UnitWriter", "_place", 9, "after", 1, 4),  # a fifth unit has its tokens only
        ("corpus.unit_files", "UnitWriter", "_place", 10, "after", 1, 5),
        ("corpus.unit_results", "UnitResults", "add", 6, "after", 2, None),  # in the parent of a pool
        ("storage.mds", "MdsShardWriter", "write", 50, "after", 1, "all"),
        ("manifest", "DatasetManifest", "write", 1, "after", 1, "all"),
        ("corpus.staging", "Staging", "commit", 1, "after", 1, "all"),
    ],
)
def test_killed_runs_are_gone_on_with(
    tmp_path, corpus, said, tokenised, module, owner, name, count, when, workers, done
):
    prepare([corpus], tmp_path / "undisturbed")
    total = all_units(corpus)
    assert len(tokenised) == total > 15
    tokenised.clear()
    kill(tmp_path, corpus, module, owner, name, count, when, workers)
    kept = finished(tmp_path)
    assert len(kept) == (total if done == "all" else len(kept) if done is None else done)
    if done is None:
        assert len(kept) >= 6
    committed = owner == "Staging"
    assert (tmp_path / "out").exists() == committed
    assert prepare([corpus], tmp_path / "out", workers=1).finished_before == committed
    assert set(tokenised).isdisjoint(kept)
    assert len(tokenised) == total - len(kept)
    assert (f"resuming: {len(kept)} of {total} units are done" in said) == (bool(kept) and not committed)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_killed_again_and_again(tmp_path, corpus):
    prepare([corpus], tmp_path / "undisturbed")
    for expected in (2, 4, 6):
        kill(tmp_path, corpus, "corpus.unit_results", "UnitResults", "add", expected, "after", 1)
        assert len(finished(tmp_path)) == expected  # units found done are added first
    prepare([corpus], tmp_path / "out", workers=2)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_a_failed_run_keeps_its_units_for_the_repaired_input(tmp_path, corpus, said, tokenised):
    good = (corpus / "b.jsonl").read_bytes()
    put(corpus / "b.jsonl", good + b"{broken\n")
    with pytest.raises(DataError, match=r"b\.jsonl:101: not valid JSON"):
        prepare([corpus], tmp_path / "out")
    kept = finished(tmp_path)
    assert any(f"{len(kept)} finished units are kept in {tmp_path / '.out.work'}" in line for line in said)
    put(corpus / "b.jsonl", good)
    tokenised.clear()
    prepare([corpus], tmp_path / "out")
    assert any("inputs are not those of the run before" in line and "b.jsonl changed" in line for line in said)
    assert 0 < len(tokenised) < all_units(corpus)
    prepare([corpus], tmp_path / "undisturbed")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def interrupted(tmp_path: Path, corpus: Path, **options) -> None:
    """Leave a work directory behind in which every unit is done."""
    with contextlib.suppress(ConfigError):
        prepare([corpus], tmp_path / "out", shard_bytes=1 << 40, **options)
    assert len(finished(tmp_path)) == all_units(corpus)


def test_changed_new_and_lost_inputs_are_noticed(tmp_path, corpus, said, tokenised):
    interrupted(tmp_path, corpus)
    tokenised.clear()
    same_size = (corpus / "d.txt").read_bytes().replace(b"Text", b"text")
    facts = (corpus / "d.txt").stat()
    put(corpus / "d.txt", same_size)
    os.utime(corpus / "d.txt", ns=(facts.st_mtime_ns, facts.st_mtime_ns + 1))
    (corpus / "c.jsonl").unlink()
    put(corpus / "e.jsonl", json_lines({"text": "new"}))
    prepare([corpus], tmp_path / "out")
    warning = next(line for line in said if "inputs are not those of the run before" in line)
    for name, what in (("d.txt", "changed"), ("e.jsonl", "new"), ("c.jsonl", "gone")):
        assert f"{corpus / name} {what}" in warning
    assert len(tokenised) == 2
    texts = texts_of(tmp_path / "out")
    assert "text ∑" in texts
    assert "new" in texts
    assert "no mask" not in texts


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"text_field": "body"}, "text_field was 'text', now 'body'"),
        ({"eos": "none"}, "eos was 'append', now 'none'"),
        ({"min_tokens": 3}, "min_tokens was 2, now 3"),
        ({"max_tokens": 9}, "max_tokens was None, now 9"),
        ({"skip_undecodable": True}, "skip_undecodable was False, now True"),
        ({"skip_bad_records": True}, "skip_bad_records was False, now True"),
        ({"rows": "text"}, "rows was 'auto', now 'text'"),
        ({"ignore_fields": ["weights"]}, "ignore_fields was [], now ['weights']"),
        ({"max_document_bytes": 999}, "max_document_bytes was 134217728, now 999"),
    ],
)
def test_other_settings_begin_again(tmp_path, corpus, said, tokenised, options, difference):
    put(corpus / "a.jsonl", json_lines({"text": "aa", "body": "bb"}))
    put(corpus / "b.jsonl", json_lines({"text": "aa", "body": "bb"}))
    put(corpus / "c.jsonl", json_lines({"text": "aa", "body": "bb"}))
    interrupted(tmp_path, corpus)
    tokenised.clear()
    prepare([corpus], tmp_path / "out", **options)
    assert any(f"begun with other settings ({difference}); beginning again" in line for line in said)
    assert len(tokenised) == all_units(corpus)


def test_settings_of_the_writing_do_not_matter(tmp_path, corpus, tokenised):
    interrupted(tmp_path, corpus)
    tokenised.clear()
    prepare([corpus], tmp_path / "out", seed=5, compression="zstd", max_documents=7)
    assert tokenised == []
    assert open_store(tmp_path / "out").manifest.documents == 7


def test_damaged_units_are_done_again(tmp_path, corpus, tokenised):
    interrupted(tmp_path, corpus)
    units = sorted((tmp_path / ".out.work" / "units").glob("*.done"))
    put(units[0], b"rubbish")
    put(units[1], units[1].read_bytes()[:-9])
    tokens = units[2].with_suffix(".tokens")
    put(tokens, tokens.read_bytes()[:-2])
    units[3].with_suffix(".tokens").unlink()
    next((tmp_path / ".out.work" / "units").glob("*.masks")).unlink()
    tokenised.clear()
    prepare([corpus], tmp_path / "out")
    assert len(tokenised) in (4, 5)  # the masks may be those of one of the four
    prepare([corpus], tmp_path / "undisturbed")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_unreadable_settings_begin_again(tmp_path, corpus):
    interrupted(tmp_path, corpus)
    put(tmp_path / ".out.work" / "settings.json", b"{")
    prepare([corpus], tmp_path / "out")
    assert not (tmp_path / ".out.work").exists()


def test_a_work_directory_in_use_is_refused(tmp_path, corpus):
    work = tmp_path / "work"
    code = "import sys\nfrom pathlib import Path\nfrom statex_dist.durable.lock import acquire\n"
    code += "lock = acquire(Path(sys.argv[1]), holder='a run')\nprint('locked', flush=True)\nsys.stdin.read()"
    command = [sys.executable, "-c", code, str(work / "lock")]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=rf"\(process {process.pid} on "):
            prepare([corpus], tmp_path / "out", work=work)
        process.kill()
    prepare([corpus], tmp_path / "out", work=work)  # no stale lock
    assert not work.exists()


def test_a_directory_of_something_else_is_not_taken_for_work(tmp_path, corpus):
    with pytest.raises(ConfigError, match=r"corpus holds .*\.jsonl"):
        prepare([corpus], tmp_path / "out", work=corpus)
    with pytest.raises(ConfigError, match=r"d\.txt .*--work"):
        prepare([corpus], tmp_path / "out", work=corpus / "d.txt")
    assert len(list(corpus.iterdir())) == 4


def test_an_input_that_changes_while_it_is_read_is_an_error(tmp_path, corpus, monkeypatch):
    real = UnitWriter.write

    def write(self, *args, **options):
        put(corpus / "d.txt", b"longer than it was before")
        real(self, *args, **options)

    monkeypatch.setattr(UnitWriter, "write", write)
    with pytest.raises(DataError, match=r"d\.txt changed"):
        prepare([corpus / "d.txt"], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


def test_more_units_than_files_may_be_open(tmp_path):
    """Python keeps a descriptor for every map; a corpus of many units must not run out of them."""
    code = (
        "import resource, sys\n"
        "import numpy as np\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from statex_dist.data.corpus.records import ReadReport\n"
        "from statex_dist.data.corpus.unit_files import UnitDocuments, UnitWriter\n"
        "results = []\n"
        "for i in range(200):\n"
        "    writer = UnitWriter(f'{sys.argv[1]}/{i}', 'uint16')\n"
        "    writer.write(np.full(3, i), None, 256)\n"
        "    results.append(writer.finish(short=0, long=0, reading=ReadReport()))\n"
        "documents = UnitDocuments(results, 'uint16', None)\n"
        "for i in [*range(200), *range(200)]:\n"
        "    assert documents.read(i)[0].tolist() == [i, i, i, 256]\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, check=True)


def test_masks_may_begin_late_in_a_unit(tmp_path):
    import numpy as np

    writer = UnitWriter(str(tmp_path / "u"), "uint32")
    writer.write(np.arange(3), None, 9)
    writer.write(np.arange(2), np.array([0, 1], np.uint8), 9)
    writer.write(np.arange(2), np.array([1, 0], np.uint8), None)
    writer.write(np.arange(1), None, None)
    result = writer.finish(short=1, long=2, reading=ReadReport(filtered=3, bad=1, listed=["x"]))
    found = load_result(str(tmp_path / "u"), "uint32")
    assert found is not None
    assert (found.short, found.long, found.reading) == (1, 2, ReadReport(filtered=3, bad=1, listed=["x"]))
    for one in (result, found):
        documents = UnitDocuments([one], "uint32", None)
        masks = [documents.read(i)[1].tolist() for i in range(4)]
        assert masks == [[1, 1, 1, 1], [0, 1, 0], [1, 0], [1]]
    assert load_result(str(tmp_path / "u"), "uint16") is None
    assert json.dumps(sorted(file.name for file in tmp_path.iterdir())) == '["u.done", "u.masks", "u.tokens"]'
