"""``statex prepare --part`` and ``--merge``: many machines, one dataset."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import build_parser, main
from statex_dist.data.corpus.documents import find_files, split_units
from statex_dist.data.corpus.work import WorkPart, parse_part
from statex_dist.data.formats import open_store
from statex_dist.durable.lock import acquire
from statex_dist.errors import ConfigError
from tests.data.options import prepare
from tests.data.prepared import files_of, json_lines, put, split_small
from tests.runs import REPOSITORY

SCRIPT = REPOSITORY / "launch" / "slurm_prepare.sbatch"
UNIT_BYTES = 500


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    split_small(monkeypatch, UNIT_BYTES)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    root.mkdir()
    put(root / "a.jsonl", json_lines(*({"text": f"line {i}" * (i % 5), "n": i} for i in range(200))))
    put(root / "b.jsonl", json_lines({"input_ids": [1, 2], "loss_mask": [0, 1], "n": 7}))
    return root


def statex(corpus: Path, out: Path, *options: str) -> int:
    return main(["prepare", str(corpus), "--out", str(out), *options])


def refused(capsys: pytest.CaptureFixture[str], corpus: Path, out: Path, *options: str) -> str:
    capsys.readouterr()
    assert statex(corpus, out, *options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def units_of(corpus: Path) -> int:
    return len(split_units(find_files([corpus]), UNIT_BYTES)[0])


@pytest.mark.parametrize("count", [1, 3, 20])
def test_parts_and_merge_make_what_one_machine_makes(tmp_path, corpus, capsys, count):
    prepare([corpus], tmp_path / "whole", where=["n<190"])
    for index in range(count, 0, -1):
        assert statex(corpus, tmp_path / "out", "--part", f"{index}/{count}", "--where", "n<190") == 0
        own = len(range(index - 1, units_of(corpus), count))
        assert f"part {index}/{count}: {own} unit{'s' * (own != 1)} (0 done before) with " in capsys.readouterr().out
        assert sorted(p.name for p in tmp_path.iterdir()) == [".out.work", "corpus", "whole"]
    assert statex(corpus, tmp_path / "out", "--merge", "--where", "n<190") == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "out", "whole"]


def test_parts_at_once_in_a_directory_of_their_own(tmp_path, corpus):
    code = (
        "import sys\n"
        "import statex_dist.data.corpus.source as source\n"
        "from launch.cli import main\n"
        "from statex_dist.data.corpus.documents import split_units\n"
        f"source.split_units = lambda files: split_units(files, {UNIT_BYTES})\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "prepare", str(corpus), "--out", str(tmp_path / "out")]
    command += ["--work", str(tmp_path / "shared" / "work"), "--part"]
    running = [subprocess.Popen([*command, f"{i}/3"], cwd=REPOSITORY, stdout=subprocess.DEVNULL) for i in (1, 2, 3)]
    assert [process.wait(timeout=100) for process in running] == [0, 0, 0]
    prepare([corpus], tmp_path / "out", merge=True, work=tmp_path / "shared" / "work")
    prepare([corpus], tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_merge_names_the_parts_that_are_missing(tmp_path, corpus, capsys):
    out, total = tmp_path / "out", units_of(corpus)
    assert "--part I/N" in refused(capsys, corpus, out, "--merge")
    for index in (1, 2, 4):
        assert statex(corpus, out, "--part", f"{index}/4") == 0
    third = len(range(2, total, 4))
    message = refused(capsys, corpus, out, "--merge")
    assert message == f"error: part 3/4 has {third} of {third} units to do; run it again, then --merge"
    victim = sorted((tmp_path / ".out.work" / "units").glob("*.done"))[0]
    victim.unlink()
    message = refused(capsys, corpus, out, "--merge")
    assert re.search(r"part \d/4 has 1 of \d+ units to do", message)
    assert message.endswith(f"part 3/4 has {third} of {third} units to do; run them again, then --merge") or (
        "part 4/4" in message
    )
    for index in (1, 2, 3, 4):
        assert statex(corpus, out, "--part", f"{index}/4") == 0
    assert statex(corpus, out, "--merge") == 0
    assert not out.with_name(".out.work").exists()


def test_a_finished_part_is_not_done_again(tmp_path, corpus, capsys):
    out = tmp_path / "out"
    assert statex(corpus, out, "--part", "2/2") == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / ".out.work" / "units").iterdir()}
    capsys.readouterr()
    assert statex(corpus, out, "--part", "2/2", "--json") == 0
    own = units_of(corpus) // 2
    assert f'"part": "2/2", "units": {own}, "units_before": {own}' in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / ".out.work" / "units").iterdir()} == before


def test_parts_with_other_settings_are_refused(tmp_path, corpus, capsys):
    out = tmp_path / "out"
    assert statex(corpus, out, "--part", "1/2") == 0
    for options, difference in (
        (("--part", "2/2", "--where", "n>3"), "where was [], now ['n>3']"),
        (("--part", "2/2", "--eos", "none"), "eos was 'append', now 'none'"),
        (("--part", "2/3"), "the number of parts was 2, now 3"),
        (("--merge", "--min-tokens", "5"), "min_tokens was 2, now 5"),
    ):
        message = refused(capsys, corpus, out, *options)
        assert f"other settings ({difference})" in message


def test_a_run_alone_takes_over_what_parts_have_done(tmp_path, corpus, capsys):
    assert statex(corpus, tmp_path / "out", "--part", "1/2") == 0
    capsys.readouterr()
    assert statex(corpus, tmp_path / "out") == 0
    assert "resuming: " in capsys.readouterr().err
    prepare([corpus], tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_inputs_that_changed_since_a_part_are_missing_units(tmp_path, corpus, capsys):
    out = tmp_path / "out"
    assert statex(corpus, out, "--part", "1/1") == 0
    put(corpus / "b.jsonl", json_lines({"text": "other"}))
    assert "part 1/1 has 1 of " in refused(capsys, corpus, out, "--merge")
    assert statex(corpus, out, "--part", "1/1") == 0
    assert statex(corpus, out, "--merge") == 0


@pytest.mark.parametrize("limit", [1, 40, 100, 5000])
def test_max_documents_with_parts(tmp_path, corpus, limit):
    prepare([corpus], tmp_path / "whole", max_documents=limit)
    for index in (1, 2, 3):
        assert statex(corpus, tmp_path / "out", "--part", f"{index}/3", "--max-documents", str(limit)) == 0
    done = len(list((tmp_path / ".out.work" / "units").glob("*.done")))
    assert done < units_of(corpus) if limit == 1 else done <= units_of(corpus)
    assert statex(corpus, tmp_path / "out", "--merge", "--max-documents", str(limit)) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert open_store(tmp_path / "out").manifest.documents == min(limit, 161)


def test_running_parts_are_not_disturbed(tmp_path, corpus, capsys):
    out, work = tmp_path / "out", tmp_path / ".out.work"
    assert statex(corpus, out, "--part", "1/2") == 0
    shared = acquire(work / "lock", shared=True)
    own = acquire(work / "lock-part-2-of-2", holder="part 2/2")
    for options in (("--merge",), (), ("--eos", "none"), ("--part", "2/2")):
        assert f"part 2/2 (process {os.getpid()} on " in refused(capsys, corpus, out, *options)
    assert statex(corpus, out, "--part", "1/2") == 0
    own.release()
    shared.release()
    alone = acquire(work / "lock", holder="a run")
    assert "a run (process" in refused(capsys, corpus, out, "--part", "2/2")
    alone.release()


@pytest.mark.parametrize("text", ["0/8", "9/8", "3", "3/0", "a/b", "-1/2", "1/8/2", "", "/8"])
def test_bad_parts(tmp_path, corpus, capsys, text):
    message = refused(capsys, corpus, tmp_path / "out", f"--part={text}")
    assert f"--part {text!r}" in message
    with pytest.raises(ConfigError):
        parse_part(text)


def test_part_and_merge_exclude_each_other(tmp_path, corpus, capsys):
    message = refused(capsys, corpus, tmp_path / "out", "--part", "1/2", "--merge")
    assert message == "error: --part and --merge are given; run the parts first, then --merge"
    assert parse_part("3/8") == WorkPart(3, 8)


def test_parts_are_refused_where_the_merge_would_be(tmp_path, corpus, capsys):
    prepare([corpus], tmp_path / "out")
    assert "not empty" in refused(capsys, corpus, tmp_path / "out", "--part", "1/2")
    assert not (tmp_path / ".out.work").exists()
    assert statex(corpus, tmp_path / "out", "--part", "1/1", "--overwrite") == 0
    assert statex(corpus, tmp_path / "out", "--merge", "--overwrite") == 0


def test_the_slurm_script(tmp_path, corpus):
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    text = SCRIPT.read_text(encoding="utf-8")
    options = shlex.split(re.search(r"^#\s+options='(.*)'$", text, re.MULTILINE)[1])
    merge = re.search(r'--wrap="statex prepare \$options (.*)"$', text, re.MULTILINE)[1]
    parsed = build_parser().parse_args(["prepare", *options, *shlex.split(merge)]).prepare
    assert parsed.merge
    assert parsed.out == "data/corpus"
    # The script itself, with a stand-in for the command that prints its arguments.
    statex_stub = put(tmp_path / "statex", b'#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    statex_stub.chmod(0o755)
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_CPUS_PER_TASK": "16"}
    for more, part in (({}, "3/8"), ({"PARTS": "12"}, "3/12")):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **slurm, **more}
        command = ["bash", str(SCRIPT), *options, "--where", "n > 3"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        parsed = build_parser().parse_args(done.stdout.splitlines()).prepare
        assert (parsed.part, parsed.workers, parsed.where) == (part, 16, ["n > 3"])
